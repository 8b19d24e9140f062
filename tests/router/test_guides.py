"""Guides at the door: what is said of wrong ones, what workers are told, and which workers are asked."""

import asyncio
import json
import os
import re
import signal
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
import pytest
from llguidance import LLMatcher

from common.model.model_config import load_config
from common.sampling.grammar import (
    AT_ONCE,
    CompiledGrammars,
    GrammarError,
    GrammarTokenizer,
    compile_grammar,
    load_tokenizer,
)
from router.errors import CallError, InvalidArgument
from router.grammars import grammar_check, grammar_checks, guides
from router.grammars.grammar_check import GrammarCheck
from router.grammars.grammar_checks import GrammarChecks
from router.grammars.guides import Guides, grammar_of
from tests.router import models
from tests.router.cluster import Cluster, cluster, eventually, expected, request
from tests.router.fake_worker import DECODE, PREFILL, FakeWorker, Script
from twostroke.v1 import inference_pb2 as pb
from twostroke.v1 import worker_pb2

Choices = pb.Guide.Choices


@pytest.fixture(scope="module")
def guides_of_model(tmp_path_factory: pytest.TempPathFactory) -> Guides:
    directory = models.write(tmp_path_factory.mktemp("model"), models.byte_level())
    return Guides(directory, load_config(directory))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> GrammarTokenizer:
    directory = models.write(tmp_path_factory.mktemp("model"), models.byte_level())
    return load_tokenizer(directory, load_config(directory))


def matches(tokenizer: GrammarTokenizer, guide: pb.Guide, text: str) -> bool:
    """Whether the text is a whole answer."""
    matcher = compile_grammar(tokenizer, grammar_of(guide))
    return matcher.consume_tokens(tokenizer.tokens.tokenize_str(text)) and matcher.is_accepting()


@pytest.mark.parametrize(
    ("guide", "whole", "not_whole"),
    [
        (pb.Guide(json_object=True), ['{"a": [1, {}]}', "{}", '{\n    "a": 1\n}'], ["[1]", "{", " {}", "{} "]),
        (pb.Guide(json_schema='{"type": "array", "maxItems": 1}'), ["[ ]", "[null]"], ["[1, 2]", "{}"]),
        (pb.Guide(regex="[ab]+c?"), ["a", "bac"], ["", "c", "acc", "xa"]),
        (pb.Guide(regex=r"\d+"), ["12", "१२"], ["a"]),  # docs/api.md warns of this
        (pb.Guide(json_schema=r'{"type": "string", "pattern": "^\\d+$"}'), ['"12"'], ['"१२"', '"a"']),
        (pb.Guide(grammar=r"start: /\d+/"), ["12", "१२"], ["a"]),
        (pb.Guide(regex=r"(?-u:\d)+"), ["12"], ["१२", "a"]),
        (pb.Guide(regex="[0-9]+"), ["12"], ["१२", "a"]),
        (pb.Guide(choices=Choices(texts=["yes", 'no "way"\\\n', "🙂"])), ["yes", 'no "way"\\\n', "🙂"], ["no", "yes."]),
        (pb.Guide(choices=Choices(texts=["", "a|b"])), ["", "a|b"], ["a", "b"]),
        (pb.Guide(choices=Choices(texts=["\0\x7f\x80", "\\u007f"])), ["\0\x7f\x80", "\\u007f"], ["\x7f"]),
        (pb.Guide(grammar='start: "a" start "b" | "c"'), ["c", "aacbb"], ["acbb", ""]),
    ],
)
def test_what_answers_may_be(
    tokenizer: GrammarTokenizer, guide: pb.Guide, whole: list[str], not_whole: list[str]
) -> None:
    assert [text for text in whole if not matches(tokenizer, guide, text)] == []
    assert [text for text in not_whole if matches(tokenizer, guide, text)] == []


def test_json_has_no_endless_spaces_unless_its_schema_asks_for_them(tokenizer: GrammarTokenizer) -> None:
    far_in = json.dumps({"a": {"b": 1}}, indent=19)
    for guide in (pb.Guide(json_object=True), pb.Guide(json_schema='{"type": "object"}')):
        assert matches(tokenizer, guide, far_in)
        assert not matches(tokenizer, guide, f'{{{" " * 41}"a": 1}}')
    compact = {"type": "object", "x-guidance": {"whitespace_flexible": False}}
    assert matches(tokenizer, pb.Guide(json_schema=json.dumps(compact)), '{"a":1}')
    assert not matches(tokenizer, pb.Guide(json_schema=json.dumps(compact)), '{"a": 1}')
    wide = {"type": "object", "x-guidance": {"whitespace_pattern": "[ ]+"}}
    assert matches(tokenizer, pb.Guide(json_schema=json.dumps(wide)), f'{{{" " * 90}"a":1}}')


@pytest.mark.parametrize(
    ("guide", "field", "words"),
    [
        (pb.Guide(), "guide", "one of json_schema, json_object, regex, choices, grammar must be set"),
        (pb.Guide(json_object=False), "guide.json_object", "must be true"),
        (pb.Guide(json_schema=""), "guide.json_schema", "cannot be read as JSON"),
        (pb.Guide(json_schema="[1]"), "guide.json_schema", "must be a JSON object"),
        (pb.Guide(json_schema='{"type": "number", "minimum": 1e999}'), "guide.json_schema", "too large for a double"),
        (pb.Guide(json_schema='{"type": "nothing"}'), "guide.json_schema", "nothing"),
        (pb.Guide(json_schema='{"not": {}}'), "guide.json_schema", 'Unimplemented keys: ["not"]'),
        (pb.Guide(json_schema='{"$ref": "http://localhost/x"}'), "guide.json_schema", "does not fetch"),
        (pb.Guide(json_schema='{"x-guidance": {"lenient": 3}}'), "guide.json_schema", "invalid type"),
        (pb.Guide(json_schema='{"enum": []}'), "guide.json_schema", "Unsatisfiable"),
        (pb.Guide(json_schema='{"a": "%s"}' % ("x" * guides.MAX_BYTES)), "guide.json_schema", "262144 are allowed"),
        (pb.Guide(regex="a("), "guide.regex", "unclosed group"),
        (pb.Guide(regex="(?=a)b"), "guide.regex", "look-around"),
        (pb.Guide(regex=r"[^\x00-\U0010ffff]"), "guide.regex", "no text follows it"),
        (pb.Guide(regex="é" * (guides.MAX_BYTES // 2 + 1)), "guide.regex", "262146 bytes; at most 262144"),
        (pb.Guide(choices=Choices()), "guide.choices", "0 texts; 1 to 1024"),
        (pb.Guide(choices=Choices(texts=["a"] * 1025)), "guide.choices", "1025 texts"),
        (pb.Guide(choices=Choices(texts=["a" * 200_000] * 2)), "guide.choices", "400000 bytes"),
        (pb.Guide(grammar="start: nobody"), "guide.grammar", "unknown name"),
        (pb.Guide(grammar=""), "guide.grammar", "Empty grammar"),
        (pb.Guide(grammar=f"start: {'(' * 10_000}"), "guide.grammar", "too deeply nested"),
    ],
)
async def test_what_nothing_can_follow_is_named(
    guides_of_model: Guides, guide: pb.Guide, field: str, words: str
) -> None:
    with pytest.raises(InvalidArgument, match=re.escape(words)) as refused:
        await guides_of_model.grammar(guide)
    assert refused.value.message.startswith(f"{field}: ")


async def test_what_takes_too_much_work_is_refused(guides_of_model: Guides) -> None:
    too_much = {"type": "integer", "minimum": 1, "multipleOf": 799999919}
    with pytest.raises(InvalidArgument, match=r"guide\.json_schema: fuel exhausted"):
        await guides_of_model.grammar(pb.Guide(json_schema=json.dumps(too_much)))


def chain(rules: int) -> str:
    """Each rule names the next one."""
    return "start: r0\n" + "\n".join(f"r{place}: r{place + 1}" for place in range(rules)) + f'\nr{rules}: "a"'


async def test_what_crashes_the_library_crashes_no_more(guides_of_model: Guides, tokenizer: GrammarTokenizer) -> None:
    with pytest.raises(InvalidArgument, match=r"guide\.grammar: it is too deeply nested"):
        await guides_of_model.grammar(pb.Guide(grammar=chain(17_000)))
    deep = await guides_of_model.grammar(pb.Guide(grammar=chain(4_000)))  # more than a thread usually bears
    compiled = CompiledGrammars(tokenizer).get(deep).result()
    assert compiled.consume_tokens(tokenizer.tokens.tokenize_str("a"))


async def test_what_takes_the_library_for_ever_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_check, "SECONDS", 0.1)
    checked = Guides(model, load_config(model))
    disjoint = {"type": "object", "patternProperties": {f"^{number:04}.*": {} for number in range(2_000)}}
    with pytest.raises(InvalidArgument, match=r"guide\.json_schema: it takes more than"):
        await checked.grammar(pb.Guide(json_schema=json.dumps(disjoint)))
    await checked.grammar(pb.Guide(json_object=True))


async def test_what_takes_too_much_memory_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This one takes 100 MiB, and half a second: more on a slow machine."""
    monkeypatch.setattr(grammar_check, "MOST_BYTES", 32 << 20)
    monkeypatch.setattr(grammar_check, "SECONDS", 30.0)
    checked = Guides(model, load_config(model))
    with pytest.raises(InvalidArgument, match=r"guide\.regex: it is too deeply nested, or too large"):
        await checked.grammar(pb.Guide(regex="((a{100}){100}){20}"))
    await checked.grammar(pb.Guide(json_object=True))


async def test_a_process_that_was_killed_is_held_against_no_grammar(model: Path) -> None:
    check = GrammarCheck(model, load_config(model))
    check(LLMatcher.grammar_from_regex("a"))
    process = check._process
    assert process is not None
    process.kill()
    process.join()
    check(LLMatcher.grammar_from_regex("b"))


async def test_a_process_that_is_killed_at_work_is_held_against_no_grammar(model: Path) -> None:
    check = GrammarCheck(model, load_config(model))
    check(LLMatcher.grammar_from_regex("a"))
    process = check._process
    assert process is not None
    assert process.pid is not None
    os.kill(process.pid, signal.SIGSTOP)
    checking = asyncio.create_task(asyncio.to_thread(check, LLMatcher.grammar_from_regex("b")))
    await asyncio.sleep(0.2)
    process.kill()
    await checking


def kill_at_work(pipe: Connection, *_: object) -> None:
    """In place of a process that answers."""
    pipe.send("")
    pipe.recv()
    os.kill(os.getpid(), signal.SIGKILL)


async def test_a_grammar_at_which_it_is_killed_twice_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_check, "_serve", kill_at_work)
    with pytest.raises(GrammarError, match="too large"):
        GrammarCheck(model, load_config(model))(LLMatcher.grammar_from_regex("a"))


async def test_the_router_comes_before_what_checks_grammars(model: Path) -> None:
    check = GrammarCheck(model, load_config(model))
    check(LLMatcher.grammar_from_regex("a"))
    assert check._process is not None
    assert check._process.pid is not None
    assert os.getpriority(os.PRIO_PROCESS, check._process.pid) > os.getpriority(os.PRIO_PROCESS, 0)


def end_at_once(*_: object) -> None:
    """In place of a process that answers."""


async def test_a_process_that_cannot_start_is_tried_again(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = Guides(model, load_config(model))
    with monkeypatch.context() as broken:
        broken.setattr(grammar_check, "_serve", end_at_once)
        with pytest.raises(RuntimeError, match="ended at its start"):
            await checked.grammar(pb.Guide(regex="a"))
    await checked.grammar(pb.Guide(regex="a"))


@pytest.mark.parametrize(
    ("stopping", "field"), [({"ignore_eos": True}, "stopping.ignore_eos"), ({"min_tokens": 1}, "stopping.min_tokens")]
)
async def test_what_cannot_go_with_a_guide_is_named(model: Path, stopping: dict[str, Any], field: str) -> None:
    async with cluster(model) as it:
        with pytest.raises(grpc.aio.AioRpcError, match=f"{field}: cannot go with a guide") as refused:
            await it.generate(guide=pb.Guide(regex="a"), stopping=stopping)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_model_without_an_end_token_cannot_be_guided(tmp_path: Path) -> None:
    models.write(tmp_path, models.byte_level())
    endless = {name: value for name, value in models.CONFIG.items() if name != "eos_token_id"}
    (tmp_path / "config.json").write_text(json.dumps(endless))
    workers = [FakeWorker(role, eos_token_ids=[]) for role in (PREFILL, DECODE)]
    async with cluster(tmp_path, prefills=workers[:1], decodes=workers[1:]) as it:
        with pytest.raises(grpc.aio.AioRpcError, match=r"guide: .*no end-of-sequence token") as refused:
            await it.generate(guide=pb.Guide(regex="a"))
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert list((await it.generate()).choices[0].token_ids) == expected(8)


async def test_what_waits_to_be_compiled_is_bounded(guides_of_model: Guides, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    check = GrammarCheck.__call__

    def held_up(self: GrammarCheck, text: str) -> None:
        go_on.wait(10)
        check(self, text)

    monkeypatch.setattr(GrammarCheck, "__call__", held_up)
    texts = [f"b{{{count}}}" for count in range(1, grammar_checks.MAX_WAITING + 1)]
    waiting = [asyncio.create_task(guides_of_model.grammar(pb.Guide(regex=text))) for text in texts]
    await asyncio.sleep(0)
    with pytest.raises(CallError) as refused:
        await guides_of_model.grammar(pb.Guide(regex="one too many"))
    assert refused.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    again = asyncio.create_task(guides_of_model.grammar(pb.Guide(regex=texts[1])))
    waiting[0].cancel()
    go_on.set()
    assert await asyncio.gather(*waiting[1:]) == [LLMatcher.grammar_from_regex(text) for text in texts[1:]]
    assert await again == LLMatcher.grammar_from_regex(texts[1])
    await guides_of_model.grammar(pb.Guide(regex=texts[0]))


async def test_messages_that_wait_for_one_guide_are_bounded(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any number of calls may wait for it, each with a message of up to 4 MiB."""
    go_on = threading.Event()
    monkeypatch.setattr(GrammarCheck, "__call__", lambda _self, _text: go_on.wait(30))
    guide = pb.Guide(regex="a")
    chat = pb.Chat(messages=[pb.ChatMessage()] * 16_385)
    asked = request(guide=guide)
    monkeypatch.setattr("router.callers.waiting_bytes.MOST_OF_A_CALLER", 3 * asked.ByteSize())
    monkeypatch.setattr("router.parsing.LARGE_BYTES", 1 << 20)  # that of parsing is another limit
    async with cluster(model) as it:
        calls = [asyncio.ensure_future(it.stub.Generate(asked, timeout=60)) for _ in range(9)]
        await eventually(lambda: sum(call.done() for call in calls) == 6)
        for code, sentence, more in (
            ("RESOURCE_EXHAUSTED", "too many messages wait for their guides", {}),
            ("INVALID_ARGUMENT", "chat.messages: has 16385 messages", {"chat": chat}),
        ):
            with pytest.raises(grpc.aio.AioRpcError, match=sentence) as refused:
                await it.generate(guide=guide, **more)
            assert refused.value.code().name == code
        assert list((await it.generate()).choices[0].token_ids) == expected(8)
        go_on.set()
        ends = await asyncio.gather(*calls, return_exceptions=True)
        assert sum(isinstance(end, pb.GenerateResponse) for end in ends) == 3
        await it.generate(guide=guide)


async def test_slow_grammars_of_one_caller_hold_up_nobody_else(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, begun = threading.Event(), []

    def slow(_: GrammarCheck, text: str) -> None:
        begun.append(text)
        if text.startswith("slow"):
            go_on.wait(10)

    monkeypatch.setattr(GrammarCheck, "__call__", slow)
    checks = GrammarChecks(model, load_config(model))
    many = [asyncio.create_task(checks.check(f"slow {place}", "alice")) for place in range(5)]
    try:
        async with asyncio.timeout(5):
            await checks.check("quick", "bob")
            await asyncio.gather(*(checks.check(f"quick {place}", caller) for place in range(3) for caller in "bcd"))
        # A thread that has its turn may come to it later than another to ten quick ones.
        await eventually(lambda: sum(text.startswith("slow") for text in begun) >= AT_ONCE - 1)
        assert sum(text.startswith("slow") for text in begun) == AT_ONCE - 1
    finally:
        go_on.set()
        await asyncio.gather(*many)


async def test_one_callers_slow_grammar_does_not_hold_up_its_next_one(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    monkeypatch.setattr(GrammarCheck, "__call__", lambda _, text: text == "slow" and go_on.wait(10))
    checks = GrammarChecks(model, load_config(model))
    slow = asyncio.create_task(checks.check("slow", "alice"))
    try:
        async with asyncio.timeout(5):
            await checks.check("quick", "alice")
    finally:
        go_on.set()
        await slow


async def test_a_grammar_that_waits_behind_one_callers_slow_ones_does_not_hold_up_another(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    monkeypatch.setattr(GrammarCheck, "__call__", lambda _, text: text.startswith("slow") and go_on.wait(10))
    checks = GrammarChecks(model, load_config(model))
    alices = [asyncio.create_task(checks.check(text, "alice")) for text in ("slow 1", "slow 2", "slow 3", "common")]
    await asyncio.sleep(0)
    try:
        async with asyncio.timeout(5):
            await checks.check("common", "bob")
    finally:
        go_on.set()
        await asyncio.gather(*alices)


async def test_a_grammar_that_is_known_is_not_checked_again(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[str] = []

    def wrong(_: GrammarCheck, text: str) -> None:
        checked.append(text)
        raise GrammarError("nothing follows it")

    monkeypatch.setattr(GrammarCheck, "__call__", wrong)
    checks = GrammarChecks(model, load_config(model))
    asked = [checks.check("a", caller) for caller in ("alice", "bob", "alice", "carol", "dave", "erin")]
    assert [str(end) for end in await asyncio.gather(*asked, return_exceptions=True)] == ["nothing follows it"] * 6
    assert len(checked) <= AT_ONCE  # those of callers who all had a turn at once
    checked.clear()
    with pytest.raises(GrammarError):
        await checks.check("a", "frank")
    assert not checked


async def test_workers_are_told_the_grammar_with_every_attempt(model: Path) -> None:
    preempts = Script(end_after={3: [worker_pb2.Ended.CAUSE_PREEMPTED]})
    async with cluster(model, decodes=[preempts]) as it:
        answer = await it.generate(guide=pb.Guide(regex="[a-z]*"), n=2)
        assert [list(choice.token_ids) for choice in answer.choices] == [expected(8)] * 2
        told = [prefill.sequence for prefill in it.prefills[0].prefills]
        told += [reserve.sequence for reserve in it.decodes[0].reserves]
        assert len(told) == 6
        assert {sequence.grammar for sequence in told} == {LLMatcher.grammar_from_regex("[a-z]*")}
        await it.generate()
        assert it.prefills[0].prefills[-1].sequence.grammar == ""


async def test_an_answer_has_every_byte_that_its_guide_matched(tmp_path: Path) -> None:
    """Also the space with which some tokenizers begin every text."""
    tokenizer = models.byte_fallback()
    models.write(tmp_path, tokenizer)
    space = models.token_id(tokenizer, "\u2581")
    async with cluster(tmp_path, prefills=[Script(token=lambda _: space)]) as it:
        chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="hi")])
        plain = await it.generate(chat=chat, max_tokens=1)
        guided = await it.generate(chat=chat, max_tokens=1, guide=pb.Guide(regex=" .*"))
        assert (plain.choices[0].text, guided.choices[0].text) == ("", " ")


# ------------------------------------------------------------ workers that cannot


def worker(role: Any, *, guides: bool, **hello: Any) -> FakeWorker:
    return FakeWorker(role, guides=guides, **hello)


async def guided(it: Cluster, **fields: Any) -> list[int]:
    return list((await it.generate(guide=pb.Guide(regex="a*"), **fields)).choices[0].token_ids)


@pytest.mark.parametrize("max_tokens", [1, 4])
async def test_requests_go_to_workers_that_can(model: Path, max_tokens: int) -> None:
    prefills = [worker(PREFILL, guides=False), worker(PREFILL, guides=True)]
    decodes = [worker(DECODE, guides=True), worker(DECODE, guides=False)]
    async with cluster(model, prefills=prefills, decodes=decodes) as it:
        for _ in range(4):
            assert await guided(it, max_tokens=max_tokens) == expected(max_tokens)
        assert not prefills[0].prefills
        assert not decodes[1].reserves


@pytest.mark.parametrize("able", [None, PREFILL, DECODE])
async def test_where_no_pair_can_the_answer_is_a_status(model: Path, able: Any) -> None:
    sides = [[worker(role, guides=role == able)] for role in (PREFILL, DECODE)]
    async with cluster(model, prefills=sides[0], decodes=sides[1]) as it:
        with pytest.raises(grpc.aio.AioRpcError, match="no pair of workers that is left can guide") as refused:
            await guided(it)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        assert list((await it.generate()).choices[0].token_ids) == expected(8)


async def test_a_worker_that_does_both_needs_no_other_that_can(model: Path) -> None:
    both = worker(DECODE, guides=True, prefill_tokens=1)
    async with cluster(model, prefills=[worker(PREFILL, guides=False)], decodes=[both]) as it:
        assert await guided(it, max_tokens=1) == expected(1)
        assert await guided(it) == expected(8)
        assert all(reserve.prefill for reserve in both.reserves)


async def test_while_there_is_no_pair_yet_requests_wait(model: Path) -> None:
    decode = worker(DECODE, guides=True)
    decode.script.silent_of_pools = True
    async with cluster(model, decodes=[decode], ready=False, worker_grace=5) as it:
        asked = it.stub.Generate(request(guide=pb.Guide(regex="a*")), timeout=10)
        await eventually(lambda: it.router.dispatcher.queued == 1 and bool(decode.pools))
        decode.send(opened=[{"instance": it.prefills[0].instance}])
        assert list((await asked).choices[0].token_ids) == expected(8)
