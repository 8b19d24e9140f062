"""What a chat becomes is what transformers' `apply_chat_template` makes of it with the same template."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from common.model import model_files
from router.errors import InvalidArgument
from router.prompts import chat_template, template_input
from router.prompts.chat_template import ChatTemplate
from tests.router import models
from tests.router.templates import LLAMA, QWEN
from twostroke import chat as client
from twostroke.v1 import inference_pb2 as pb

MOST = 100_000
SPECIAL = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the <weather> of a place & a day – “now” without one.",
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"type": "string", "enum": ["Zürich", "Aarau"]},
                "day": {"type": ["integer", "null"], "minimum": 0, "maximum": 1e3, "default": None},
            },
            "required": ["place"],
        },
    },
}
TIME = {"type": "function", "function": {"name": "time", "parameters": {"type": "object", "properties": {}}}}

SYSTEM = {"role": "system", "content": " Be brief.\n"}
QUESTION = {"role": "user", "content": "How is <b>Zürich</b>?"}
ANSWER = {"role": "assistant", "content": "It rains."}


def call(name: str, arguments: Any, id: str | None = None) -> dict[str, Any]:
    made = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return made if id is None else {"id": id, **made}


CALLS = {
    "role": "assistant",
    "reasoning_content": "\nI must look.\n",
    "tool_calls": [call("weather", {"place": "Zürich", "day": 3, "factor": 2.0, "none": None}, "a1"), call("time", {})],
}
RESULTS = [
    {"role": "tool", "name": "weather", "tool_call_id": "a1", "content": '{"rain": true}'},
    {"role": "tool", "content": "12:00"},
]


def asked(messages: list[dict[str, Any]], **options: Any) -> pb.Chat:
    """The chat as the client sends it."""
    chat = client.chat_of(messages)
    for name, value in options.items():
        client.set_option(chat, name, value)
    return pb.Chat.FromString(chat.SerializeToString())


def ours(source: str, messages: list[dict[str, Any]], **options: Any) -> str:
    return ChatTemplate(source, SPECIAL).render(asked(messages, **options), MOST)


def theirs(
    source: str | None,
    messages: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase | None = None,
    add_generation_prompt: bool = True,
    tools: list[Any] | None = None,
    template_variables: dict[str, Any] | None = None,
) -> str:
    tokenizer = tokenizer or PreTrainedTokenizerFast(tokenizer_object=models.byte_level(), **SPECIAL)
    rendered = tokenizer.apply_chat_template(
        messages,
        chat_template=source,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
        tools=tools,
        **(template_variables or {}),
    )
    assert isinstance(rendered, str)
    return rendered


@pytest.mark.parametrize("options", [{}, {"add_generation_prompt": False}, {"template_variables": {"unknown": 1}}])
@pytest.mark.parametrize("messages", [[QUESTION], [SYSTEM, QUESTION], [QUESTION, ANSWER, {**QUESTION, "content": ""}]])
def test_the_embedded_models(messages: list[dict[str, Any]], options: dict[str, Any]) -> None:
    directory = model_files.resolve(model_files.EMBEDDED)
    template = chat_template.load(directory)
    assert template is not None
    expected = theirs(None, messages, AutoTokenizer.from_pretrained(directory), **options)
    assert template.render(asked(messages, **options), MOST) == expected


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_generation_prompt": False},
        {"template_variables": {"enable_thinking": False}},
        {"template_variables": {"enable_thinking": True}, "tools": [WEATHER, TIME]},
        {"tools": [TIME], "template_variables": {}},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "messages",
    [
        [QUESTION],
        [SYSTEM, QUESTION],
        [SYSTEM, QUESTION, CALLS, *RESULTS],
        [QUESTION, CALLS, *RESULTS, ANSWER, QUESTION],
        [QUESTION, {**CALLS, "content": "Let me see."}, RESULTS[0], {**ANSWER, "reasoning_content": "Rain, then."}],
        [QUESTION, {**CALLS, "content": None, "name": None}, RESULTS[1]],
        [QUESTION, {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nIt rains."}],
        [QUESTION, {**ANSWER, "reasoning_content": "", "content": "</think>"}],
        [QUESTION, {"role": "assistant", "tool_calls": [call("time", '{"b": 1,"a": 2}'), call("time", None)]}],
    ],
    ids=["question", "system", "results", "earlier", "both", "nulls", "thoughts", "no thoughts", "JSON"],
)
def test_one_like_qwen3s(messages: list[dict[str, Any]], options: dict[str, Any]) -> None:
    as_objects = [with_objects(message) for message in messages]  # where the client takes JSON, too
    assert ours(QWEN, messages, **options) == theirs(QWEN, as_objects, **options)


def with_objects(message: dict[str, Any]) -> dict[str, Any]:
    if "tool_calls" not in message:
        return message
    calls = [made | {"function": dict(made["function"])} for made in message["tool_calls"]]
    for made in calls:
        arguments = made["function"]["arguments"]
        made["function"]["arguments"] = json.loads(arguments) if isinstance(arguments, str) else arguments or {}
    return message | {"tool_calls": calls}


ONE_CALL = {"role": "assistant", "tool_calls": CALLS["tool_calls"][:1]}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tools": [WEATHER, TIME]},
        {"tools": [WEATHER], "template_variables": {"tools_in_user_message": False, "date_string": "1 May 2031"}},
        {"template_variables": {"custom_tools": [TIME, {"n": 1, "x": 1.0, "far": 2**53 + 1}]}},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "messages",
    [[QUESTION], [SYSTEM, QUESTION, ONE_CALL, *RESULTS], [QUESTION, ANSWER, {"role": "ipython", "content": "x"}]],
    ids=["question", "results", "ipython"],
)
def test_one_like_llama_31s(messages: list[dict[str, Any]], options: dict[str, Any]) -> None:
    rendered = ours(LLAMA, messages, **options)
    assert rendered == theirs(LLAMA, messages, **options)
    assert ("Today: 1 May 2031" if "date_string" in str(options) else f"Today: {datetime.now():%Y}") in rendered


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0] | tojson(separators=(',', ':'), sort_keys=true) }}{{ '<&é>' | tojson(ensure_ascii=true) }}",
        "{{ messages | tojson('x', 2) }}",
        "{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
        "  {% for m in messages %}\n {% generation %}\n {% set x = 1 %}{{ m.content }}\n {% endgeneration %}\n"
        "[{{ x }}]\n {% endfor %}\n",
        "{{ documents is none }} {{ tools is none }} {{ nothing is defined }}",
        "{{ messages[1].thinking }} {{ messages[1] | length }} {{ messages[0] | length }}",
        "{% set ns = namespace(self=1, a=2) %}{% set ns.b = 3 %}{{ ns.self + ns.a + ns.b }}",
        "{{ dict(a=1) }} {{ dict([('b', 2)], c=3) | tojson }} {{ dict.fromkeys(['x', 'y'], 0) }}",
        "{{ bos_token }}{{ eos_token }}[{{ pad_token }}]",
        "\n{{ messages[0].content }}\n\n",
    ],
)
def test_names_filters_and_tags(source: str) -> None:
    messages = [QUESTION, {**ANSWER, "reasoning_content": "so"}]
    assert ours(source, messages) == theirs(source, messages)


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('never') }}",
        "{% set _ = dict.update(messages[0], {'role': 'x'}) %}",
        "{% set _ = messages.append(1) %}",
        "{% set ns = namespace() %}{% set ns.__html__ = 1 %}",
        "{% set ns = namespace(__class__=1) %}",
        "{{ messages[0].content.no.attribute }}",
    ],
)
def test_what_transformers_template_may_not_do_ours_may_not(source: str) -> None:
    with pytest.raises(Exception):  # noqa: B017, PT011, of any kind
        theirs(source, [QUESTION])
    with pytest.raises(InvalidArgument, match=r"^chat: the model's chat template refuses it: "):
        ours(source, [QUESTION])


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt", "eos_token"])
def test_variables_do_not_hide_what_the_chat_has(name: str) -> None:
    with pytest.raises(InvalidArgument, match=rf"^chat\.template_variables\.{name}: "):
        ours(QWEN, [QUESTION], template_variables={"enable_thinking": False, name: "x"})


@pytest.mark.parametrize("name", ["", "self", "a b", "range", "raise_exception", "__class__", "context", "environment"])
def test_any_other_name_does_no_harm(name: str) -> None:
    assert ours(QWEN, [QUESTION], template_variables={name: "x"}) == theirs(QWEN, [QUESTION])


@pytest.mark.parametrize(
    "source", [models.CHAT_TEMPLATE, "tools {{ builtin_tools }}", "{% set tools = 1 %}{{ tools }}"]
)
def test_tools_are_not_passed_over(source: str) -> None:
    assert ours(source, [QUESTION])
    with pytest.raises(InvalidArgument, match=r"^chat\.tools: this model's chat template does not know them"):
        ours(source, [QUESTION], tools=[TIME])


def test_tool_calls_are_not_passed_over() -> None:
    with pytest.raises(InvalidArgument, match=r"^chat\.messages\[1\]\.tool_calls: .* does not know them"):
        ours(models.CHAT_TEMPLATE, [QUESTION, CALLS])


def test_a_role_that_the_template_does_not_name() -> None:
    with pytest.raises(InvalidArgument, match=r"^chat\.messages\[1\]\.role: 'tool' is not one of"):
        ours(models.CHAT_TEMPLATE, [QUESTION, RESULTS[0]])


def message(**fields: Any) -> pb.ChatMessage:
    return pb.ChatMessage(role="assistant", **fields)


def check_and_render(chat: pb.Chat) -> None:
    template_input.check_sizes(chat)
    ChatTemplate(QWEN, SPECIAL).render(chat, MOST)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"messages": []}, "chat.messages: must not be empty"),
        ({"messages": [message()] * 16_385}, "chat.messages: has 16385 messages; at most 16384 are allowed"),
        ({"tools": ["{}"] * 129}, "chat.tools: has 129 tools; at most 128 are allowed"),
        ({"tools": ["{}", "[]"]}, "chat.tools[1]: must be a JSON object"),
        ({"template_variables": "null"}, "chat.template_variables: must be a JSON object"),
        ({"template_variables": '{"a": NaN}'}, "chat.template_variables: cannot be read as JSON: NaN"),
        (
            {"messages": [message(), message(tool_calls=[pb.ToolCall(arguments="{}")])]},
            "chat.messages[1].tool_calls[0].name: must not be empty",
        ),
        (
            {"messages": [message(tool_calls=[pb.ToolCall(name="f"), pb.ToolCall(name="f", arguments="7")])]},
            "chat.messages[0].tool_calls[1].arguments: must be a JSON object",
        ),
        (
            {"messages": [message(tool_calls=[pb.ToolCall(name="f")] * calls) for calls in (4_000, 97)]},
            "chat.messages: have 4097 tool calls; at most 4096 are allowed",
        ),
        (
            {
                "messages": [message(tool_calls=[pb.ToolCall(name="f", arguments=" " * 400_000)])],
                "tools": [" " * 400_000],
                "template_variables": " " * 248_577,
            },
            "chat: tools, template_variables and the tool calls' arguments have 1048577 bytes; at most 1048576 are",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_fields_that_are_wrong(fields: dict[str, Any], sentence: str) -> None:
    chat = pb.Chat(**{"messages": [message()], **fields})
    with pytest.raises(InvalidArgument) as refused:
        check_and_render(chat)
    assert refused.value.message.startswith(sentence)


def test_content_that_is_not_set_is_empty_but_beside_tool_calls() -> None:
    chat = pb.Chat(messages=[pb.ChatMessage(role="user"), pb.ChatMessage(tool_calls=[pb.ToolCall(name="f")])])
    plain, calls = template_input.read(chat).messages
    assert plain == {"role": "user", "content": ""}
    assert calls.keys() == {"role", "tool_calls"}


def test_a_template_that_makes_too_much_of_a_chat_is_stopped() -> None:
    source = (
        "{% for message in messages %}{% if loop.index == 20 %}{{ raise_exception('went on') }}{% endif %}"
        "{{ tools | tojson }}{% endfor %}"
    )
    template = ChatTemplate(source, SPECIAL)
    tool = {"description": "x" * 1_000}
    assert template.render(asked([QUESTION] * 9, tools=[tool]), 10_000)
    with pytest.raises(InvalidArgument, match="it has more than 10000 characters"):
        template.render(asked([QUESTION] * 1_000, tools=[tool]), 10_000)


# ---------------------------------------------------------------- where it is read from


def test_a_template_of_its_own_for_tools(tmp_path: Path) -> None:
    def written(directory: Path) -> list[str]:
        template = chat_template.load(directory)
        assert template is not None
        return [template.render(asked([QUESTION], tools=tools), MOST) for tools in ([], [TIME])]

    tool_use = "{{ tools[0].function.name }}"
    settings = [{"name": "tool_use", "template": tool_use}, {"name": "default", "template": "no tools"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": settings}))
    assert written(tmp_path) == ["no tools", "time"]

    (tmp_path / "chat_template.jinja").write_text("a file")
    with pytest.raises(InvalidArgument, match="does not know them"):
        written(tmp_path)  # the settings' templates count no more
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text(f"a file {tool_use}")
    assert written(tmp_path) == ["a file", "a file time"]
