"""Which tools an answer calls, as tool_choice says: none, any, or one by its name; in the form of each model."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import tokenizers

from common.model.model_config import load_config
from common.sampling.grammar import GrammarError, compile_grammar, load_tokenizer
from router import json_object
from router.answers.answer_parser import AnswerParser
from router.errors import InvalidArgument
from router.grammars import tool_choice
from router.grammars.grammar_check import GrammarCheck
from router.grammars.guides import Guides
from router.prompts.tokenizer import Tokenized, Tokenizer
from router.vocabulary.answer_format import AnswerFormat
from tests.guided import allowed_tokens
from tests.router import models
from tests.router.answering import (
    LIKE_HERMES,
    LIKE_LLAMA,
    LIKE_MISTRAL,
    LIKE_NEW_MISTRAL,
    LIKE_QWEN,
    QUESTION,
    Model,
    answering,
)
from tests.router.cluster import cluster
from tests.router.templates import QWEN
from twostroke import InvalidArgument as Refused
from twostroke.v1 import inference_pb2 as pb

LIKE_SMOL = Model(QWEN)  # the template alone knows of calls: no mark is a token
WITH_SPECIAL_MARKS = Model(QWEN, special=("<think>", "</think>", "<tool_call>", "</tool_call>"))


def tool(name: str, **properties: Any) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


PLACES = tool("weather", place={"enum": ["Aarau", "Zürich"]}, days={"type": "integer", "minimum": 0, "maximum": 9})
TIME = named("time")
TOOLS = [PLACES, TIME]

REQUIRED = pb.ToolChoice(required=True)

AARAU = '{"place": "Aarau", "days": 3}'


def chat(choice: pb.ToolChoice, tools: list[dict[str, Any]] = TOOLS) -> pb.Chat:
    message = pb.ChatMessage(role="user", content="How is it?")
    return pb.Chat(messages=[message], tools=[json.dumps(tool) for tool in tools], tool_choice=choice)


class Speaker:
    """What a model may answer."""

    def __init__(self, directory: Path, model: Model) -> None:
        model.write(directory)
        config = load_config(directory)
        self.grammar_tokenizer = load_tokenizer(directory, config)
        self.tokenizer = Tokenizer(directory, config)
        self.form: AnswerFormat = self.tokenizer.answer_format

    def grammar(self, choice: pb.ToolChoice, tools: list[dict[str, Any]] = TOOLS, in_reasoning: bool = False) -> str:
        to_call = tool_choice.tools_to_call(chat(choice, tools))
        return tool_choice.answer_grammar(to_call, self.form, several=choice.required, in_reasoning=in_reasoning)

    async def may_answer(self, text: str, grammar: str) -> bool:
        matcher = compile_grammar(self.grammar_tokenizer, grammar)
        tokens = await self.tokenizer.encode(text, add_special_tokens=False)
        return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()

    def answer_at_random(self, grammar: str, dice: random.Random) -> list[int]:
        """Without the token that ends it. Marks, and the end, come more often than chance has them."""
        matcher, answer = compile_grammar(self.grammar_tokenizer, grammar), list[int]()
        while len(answer) < 2_000:
            allowed = allowed_tokens(self.grammar_tokenizer, matcher)
            marks = [token for token in allowed if token in (models.EOS, *self.form.tokens.values())]
            token = dice.choice(marks if marks and dice.random() < 0.3 else allowed)
            if token == models.EOS:
                return answer
            answer.append(token)
            assert matcher.consume_token(token)
        raise AssertionError("it does not come to an end")

    def parts(self, answer: list[int], in_reasoning: bool) -> tuple[str, list[tuple[str, Any]]]:
        """Text and calls."""
        detokenizer = self.tokenizer.detokenizer(special_tokens=False, signs=self.form.signs)
        names = frozenset({"weather", "time"})
        parser = AnswerParser(self.form, in_reasoning=in_reasoning, tools=names, new_id=str)
        parts = parser.feed(detokenizer.feed(answer) + detokenizer.finish(), last=True)
        return parts.text, [(call.name, json.loads(call.arguments)) for call in parts.calls]


def tagged(arguments: str, name: str = "weather") -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


TAGGED = [tagged(AARAU), tagged("{}", "time"), f"{tagged(AARAU)}\n{tagged('{}', 'time')}"]
NOT_TAGGED = [
    "",
    "I look.",
    f"I look.\n{tagged(AARAU)}",
    f"{tagged(AARAU)}\nThere.",
    tagged(AARAU).removesuffix("</tool_call>"),
    tagged("{}"),
    tagged('{"place": "Bern", "days": 3}'),
    tagged(AARAU, "time"),
    tagged(AARAU, "weathers"),
]
LISTED = f'[TOOL_CALLS] [{{"name": "weather", "arguments": {AARAU}}}]'
LISTED_WITH_ID = f'[TOOL_CALLS] [{{"name": "weather", "arguments": {AARAU}, "id": "aB3dE5gH9"}}]'
NAMED = f"[TOOL_CALLS]weather[ARGS]{AARAU}"
BARE = f'{{"name": "weather", "parameters": {AARAU}}}'


@pytest.mark.parametrize(
    ("model", "whole", "not_whole"),
    [
        (LIKE_QWEN, [*TAGGED, f"<think>\nHm 🙂 </thin\n</think>\n\n{TAGGED[0]}"], [*NOT_TAGGED, f"<think>{TAGGED[0]}"]),
        (LIKE_SMOL, [*TAGGED, f"<think>\nHm 🙂 </thin\n</think>\n\n{TAGGED[0]}"], [*NOT_TAGGED, f"<think>{TAGGED[0]}"]),
        (LIKE_HERMES, TAGGED, NOT_TAGGED),
        (
            LIKE_MISTRAL,
            [
                LISTED,
                LISTED.replace("] [", "]["),
                LISTED_WITH_ID,
                f'{LISTED[:-1]}, {{"name": "time", "arguments": {{}}}}]',
            ],
            ["", "[TOOL_CALLS] []", LISTED[:-1], f"I look.{LISTED}", f"{LISTED}{LISTED}", NAMED],
        ),
        (
            LIKE_NEW_MISTRAL,
            [NAMED, NAMED.replace("[ARGS]", "[CALL_ID]aB3dE5gH9[ARGS]"), f"{NAMED}[TOOL_CALLS]time[ARGS]{{}}"],
            ["", "[TOOL_CALLS]weather", f"I look.{NAMED}", LISTED, "[TOOL_CALLS]other[ARGS]{}"],
        ),
        (LIKE_LLAMA, [BARE], ["", f"{BARE}; {BARE}", BARE.replace("parameters", "arguments"), f"I look.\n{BARE}"]),
    ],
    ids=["Qwen", "Smol", "Hermes", "Mistral", "new Mistral", "Llama"],
)
async def test_an_answer_is_a_call_in_the_models_own_form(
    tmp_path: Path, model: Model, whole: list[str], not_whole: list[str]
) -> None:
    speaker = Speaker(tmp_path, model)
    required = speaker.grammar(REQUIRED)
    assert [text for text in whole if not await speaker.may_answer(text, required)] == []
    assert [text for text in not_whole if await speaker.may_answer(text, required)] == []
    one = [text for text in whole if "time" not in text]
    weather = speaker.grammar(pb.ToolChoice(name="weather"))
    assert [text for text in whole if await speaker.may_answer(text, weather)] == one


@pytest.mark.parametrize(
    ("model", "in_reasoning"),
    [
        (LIKE_QWEN, False),
        (LIKE_QWEN, True),
        (WITH_SPECIAL_MARKS, False),
        (WITH_SPECIAL_MARKS, True),
        (LIKE_MISTRAL, False),
        (LIKE_NEW_MISTRAL, False),
        (LIKE_LLAMA, False),
    ],
)
def test_whatever_is_answered_is_read_as_calls(tmp_path: Path, model: Model, in_reasoning: bool) -> None:
    speaker, dice = Speaker(tmp_path, model), random.Random(5)
    grammar = speaker.grammar(REQUIRED, in_reasoning=in_reasoning)
    for _ in range(12):
        text, calls = speaker.parts(speaker.answer_at_random(grammar, dice), in_reasoning)
        assert text == ""
        assert calls
        for name, arguments in calls:
            if name == "weather":
                assert arguments["place"] in ("Aarau", "Zürich")
                assert arguments["days"] in range(10)
            else:
                assert (name, arguments) == ("time", {})


async def test_reasoning_that_the_prompt_begins_comes_to_its_end(tmp_path: Path) -> None:
    for model in (LIKE_QWEN, LIKE_SMOL):
        speaker = Speaker(tmp_path, model)
        grammar = speaker.grammar(REQUIRED, in_reasoning=True)
        assert await speaker.may_answer(f"Hm.</think>\n\n{TAGGED[0]}", grammar)
        assert await speaker.may_answer(f"<think>Hm.</think>{TAGGED[0]}", grammar)
        assert not await speaker.may_answer(TAGGED[0], grammar)


def test_the_mark_that_ends_reasoning_is_not_spelled_where_it_is_a_token(tmp_path: Path) -> None:
    """The parser would end the reasoning there, and take the token for text."""
    speaker = Speaker(tmp_path, LIKE_QWEN)
    vocabulary = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    letters = [models.token_id(vocabulary, letter) for letter in "Hm</think>"]
    matcher = compile_grammar(speaker.grammar_tokenizer, speaker.grammar(REQUIRED, in_reasoning=True))
    assert matcher.try_consume_tokens(letters) == len(letters) - 1


async def test_arguments_follow_the_schema_as_it_came(tmp_path: Path) -> None:
    """With references to its own parts, in its own order and spacing, and whatever else goes with an object."""
    speaker = Speaker(tmp_path, LIKE_QWEN)
    ordered = {
        "type": ["object", "null"],
        "properties": {"z": {"type": "integer"}, "a": {"type": "integer"}},
        "x-guidance": {"whitespace_flexible": False},
    }
    tools: list[dict[str, Any]] = [
        {"name": "bare"},
        {"function": {"name": "refers", "parameters": {"$ref": "#/$defs/a", "$defs": {"a": {"required": ["x"]}}}}},
        {"function": {"name": "ordered", "parameters": ordered}},
        {"function": {"name": 'say "ü"\x7f', "parameters": {}}},
    ]
    grammar = speaker.grammar(REQUIRED, tools)
    calls = {
        tagged("{}", "bare"): True,
        tagged('{"x": 1}', "bare"): False,
        tagged('{"x": 1}', "refers"): True,
        tagged('{"y": 1}', "refers"): False,
        tagged('{"z":1,"a":2}', "ordered"): True,
        tagged('{"z": 1,"a":2}', "ordered"): False,
        tagged('{"a":1,"z":2}', "ordered"): False,
        tagged("null", "ordered"): False,
        tagged('{"any": [1]}', r"say \"ü\"" "\x7f"): True,
        tagged("[]", r"say \"ü\"" "\x7f"): False,
        tagged("{" + " " * 41 + '"x": 1}', "refers"): False,
    }
    assert {text: await speaker.may_answer(text, grammar) for text in calls} == calls


# ------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"tool_choice": "required"}, "chat.tool_choice: there are no tools to call"),
        ({"tools": TOOLS, "tool_choice": named("wether")}, "chat.tool_choice.name: 'wether' is the name of no tool"),
        ({"tools": TOOLS, "tool_choice": named("")}, "chat.tool_choice.name: '' is the name of no tool"),
        (
            {"tools": TOOLS, "tool_choice": "required", "regex": "a"},
            "chat.tool_choice: a required tool call cannot go with a guide",
        ),
        (
            {"tools": TOOLS, "tool_choice": "required", "min_tokens": 1},
            "stopping.min_tokens: cannot go with a required tool call",
        ),
        (
            {"tools": TOOLS, "tool_choice": named("time"), "ignore_eos": True},
            "stopping.ignore_eos: cannot go with a required tool call",
        ),
        (
            {"tools": [TIME, tool("weather", place={"not": {}})], "tool_choice": "required"},
            "chat.tools[1]: calls of 'weather' cannot be guided: Unimplemented keys: [\"not\"]",
        ),
        (
            {"tools": [{"function": {"name": "x", "parameters": {"x-guidance": 3}}}], "tool_choice": "required"},
            "chat.tools[0]: calls of 'x' cannot be guided: ",
        ),
        (
            {"tools": [{"function": {"name": "x", "parameters": []}}], "tool_choice": "required"},
            "chat.tools[0]: the parameters of 'x' must be a JSON schema",
        ),
        (
            {"tools": [TIME, {"function": {"name": "x", "parameters": {"type": "array"}}}], "tool_choice": "required"},
            "chat.tools[1]: the parameters of 'x' must have the type object",
        ),
        ({"tools": [{"function": {}}], "tool_choice": "required"}, "chat.tools[0]: has no name to call it by"),
        ({"tools": [{"function": 5}], "tool_choice": "required"}, "chat.tools[0]: has no name to call it by"),
    ],
)
async def test_what_cannot_be_called(tmp_path: Path, fields: dict[str, Any], sentence: str) -> None:
    await assert_refused(tmp_path, LIKE_QWEN, fields, sentence)


async def test_what_a_model_has_no_way_to_call(tmp_path: Path) -> None:
    spaced = {"tools": [tool("say it")], "tool_choice": "required"}
    sentence = "chat.tools[0]: this model has no way to write the name 'say it' in a call"
    await assert_refused(tmp_path / "Mistral", LIKE_NEW_MISTRAL, spaced, sentence)
    unknown = Model("{{ tools }}{{ messages[0].content }}")
    sentence = "chat.tool_choice: the router does not know how this model writes calls of tools"
    await assert_refused(tmp_path / "other", unknown, {"tools": TOOLS, "tool_choice": named("time")}, sentence)


async def test_what_cannot_be_called_cannot_be_tokenized(tmp_path: Path) -> None:
    async with answering(tmp_path, LIKE_QWEN, "") as (_, client):
        with pytest.raises(Refused, match=r"^chat\.tool_choice: there are no tools to call: set chat\.tools$"):
            await client.tokenize([QUESTION], tool_choice="required")
        with pytest.raises(Refused, match=r"^chat\.tool_choice\.name: 'zzz' is the name of no tool in chat\.tools$"):
            await client.tokenize([QUESTION], tools=TOOLS, tool_choice=named("zzz"))
        assert await client.tokenize([QUESTION], tools=TOOLS, tool_choice=named("time"))


async def assert_refused(directory: Path, model: Model, fields: dict[str, Any], sentence: str) -> None:
    async with answering(directory, model, "") as (_, client):
        with pytest.raises(Refused) as refused:
            await client.chat([QUESTION], max_tokens=5, **fields)
        assert refused.value.message.startswith(sentence)


@pytest.mark.parametrize("kind", ["auto", "none", "required"])
async def test_a_choice_that_is_not_true(tmp_path: Path, kind: str) -> None:
    choice = pb.ToolChoice()
    setattr(choice, kind, False)
    async with cluster(LIKE_QWEN.write(tmp_path)) as it:
        asked = chat(choice)
        for call in (it.generate(chat=asked), it.stub.Tokenize(pb.TokenizeRequest(chat=asked))):
            with pytest.raises(grpc.aio.AioRpcError, match=rf"chat\.tool_choice\.{kind}: must be true") as refused:
                await call
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_the_schemas_together_are_bounded(tmp_path: Path) -> None:
    tools = [tool(f"t{place}", x={"const": "a" * (json_object.MAX_BYTES // 2)}) for place in range(2)]
    speaker = Speaker(tmp_path, LIKE_QWEN)
    with pytest.raises(InvalidArgument, match=r"chat\.tools: .* have 26\d{4} bytes; at most 262144 are allowed"):
        speaker.grammar(REQUIRED, tools)
    assert speaker.grammar(pb.ToolChoice(name="t1"), tools)


async def test_tools_that_only_together_are_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = Tokenized([], form=Speaker(tmp_path, LIKE_QWEN).form)
    guides = Guides(tmp_path, load_config(tmp_path))
    check = GrammarCheck.__call__

    def one_at_most(self: GrammarCheck, text: str) -> None:
        if text.count("%json") > 1:
            raise GrammarError("too much")
        check(self, text)

    monkeypatch.setattr(GrammarCheck, "__call__", one_at_most)
    with pytest.raises(InvalidArgument, match=r"chat\.tools: the calls cannot be compiled: too much"):
        await guides.call(chat(REQUIRED), prompt)
    assert await guides.call(chat(pb.ToolChoice(name="time")), prompt)


# ------------------------------------------------------------ from door to door


async def test_workers_are_told_of_a_call_that_must_be_made(tmp_path: Path) -> None:
    async with answering(tmp_path, LIKE_QWEN, TAGGED[0], tools=TOOLS) as (it, client):
        choices: list[Any] = ["auto", "required", named("weather")]
        for choice in choices:
            answer = await client.chat([QUESTION], tools=TOOLS, tool_choice=choice, max_tokens=200, n=2)
            assert [call.name for choice in answer.choices for call in choice.tool_calls] == ["weather"] * 2
        told = [prefill.sequence for prefill in it.prefills[0].prefills]
        assert len({tuple(sequence.token_ids) for sequence in told}) == 1
        speaker = Speaker(tmp_path, LIKE_QWEN)
        grammars = ["", speaker.grammar(REQUIRED), speaker.grammar(pb.ToolChoice(name="weather"))]
        assert [sequence.grammar for sequence in told] == [grammar for grammar in grammars for _ in range(2)]
        assert [reserve.sequence.grammar for reserve in it.decodes[0].reserves] == [
            sequence.grammar for sequence in told
        ]


async def test_a_call_that_is_cut_short_is_none(tmp_path: Path) -> None:
    async with answering(tmp_path, LIKE_QWEN, TAGGED[0], tools=TOOLS) as (_, client):
        answer = await client.chat([QUESTION], tools=TOOLS, tool_choice="required", max_tokens=12)
        assert (answer.finish.reason, answer.tool_calls) == ("length", ())
        assert answer.text.startswith("<tool_call>")


async def test_reasoning_that_a_prompt_begins_is_part_of_the_grammar(tmp_path: Path) -> None:
    model = replace(LIKE_QWEN, template=f"{QWEN}{{{{- '<think>\\n' }}}}")
    async with answering(tmp_path, model, f"Hm.\n</think>\n{TAGGED[0]}", tools=TOOLS) as (it, client):
        answer = await client.chat([QUESTION], tools=TOOLS, tool_choice="required", max_tokens=200)
        assert (answer.reasoning_content, len(answer.tool_calls)) == ("Hm.", 1)
        told = it.prefills[0].prefills[-1].sequence.grammar
        assert told == Speaker(tmp_path, model).grammar(REQUIRED, in_reasoning=True)


async def test_where_the_prompt_ends_the_reasoning_there_is_no_more(tmp_path: Path) -> None:
    quiet = {"enable_thinking": False}
    async with answering(tmp_path, LIKE_QWEN, TAGGED[0], tools=TOOLS, template_variables=quiet) as (it, client):
        options: dict[str, Any] = {"tools": TOOLS, "tool_choice": "required", "template_variables": quiet}
        answer = await client.chat([QUESTION], max_tokens=200, **options)
        assert len(answer.tool_calls) == 1
        told = it.prefills[0].prefills[-1].sequence.grammar
        speaker = Speaker(tmp_path, LIKE_QWEN)
        assert await speaker.may_answer(TAGGED[0], told)
        assert not await speaker.may_answer(f"<think>Hm.</think>{TAGGED[0]}", told)


@pytest.mark.parametrize("model", [LIKE_QWEN, LIKE_MISTRAL, LIKE_LLAMA])
async def test_no_tools_are_shown_and_no_call_is_read(tmp_path: Path, model: Model) -> None:
    written = {LIKE_QWEN: f"<think>Hm.</think>{TAGGED[0]}", LIKE_MISTRAL: LISTED, LIKE_LLAMA: BARE}[model]
    async with answering(tmp_path, model, written) as (it, client):
        without = await client.tokenize([QUESTION])
        assert await client.tokenize([QUESTION], tools=TOOLS) != without
        assert await client.tokenize([QUESTION], tools=TOOLS, tool_choice="none") == without
        options: dict[str, Any] = {"tools": TOOLS, "tool_choice": "none", "max_tokens": 200}
        answer = await client.chat([QUESTION], **options)
        assert answer.tool_calls == ()
        assert answer.text == written.removeprefix("<think>Hm.</think>").removeprefix("[TOOL_CALLS]")
        assert answer.reasoning_content == ("Hm." if model is LIKE_QWEN else "")
        sequence = it.prefills[0].prefills[-1].sequence
        assert (tuple(sequence.token_ids), sequence.grammar) == (without, "")
        await client.chat([QUESTION], json_object=True, **options)
        assert it.prefills[0].prefills[-1].sequence.grammar
