"""Answers as clients see them, with workers that do nothing wrong."""

import asyncio
import resource
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from prometheus_client import generate_latest
from structlog.testing import capture_logs

from common.kv.prefix_hash import block_hashes, cache_root
from common.model.model_config import load_config
from router.callers.limits import CALLER, EVERYONE, Caller
from router.errors import CallError
from router.prompts.tokenizer import Tokenizer
from router.service import gather
from tests import health
from tests.router import models
from tests.router.cluster import PROMPT, cluster, eventually, expected, request
from tests.router.fake_worker import Script
from twostroke.v1 import inference_pb2 as pb

TOKENIZER = models.byte_level()
FALLBACK = models.byte_fallback()


def text_of(tokens: list[int]) -> str:
    text: str = TOKENIZER.decode(tokens)
    return text


async def test_the_whole_answer(model: Path) -> None:
    async with cluster(model) as it:
        response = await it.generate(request_id="mine", sampling=pb.Sampling(temperature=0, seed=7))
        choice = response.choices[0]
        assert list(choice.token_ids) == expected(8)
        assert choice.text == text_of(expected(8))
        assert choice.finish.reason == pb.FINISH_REASON_LENGTH
        assert response.prompt == pb.PromptInfo(request_id="mine", prompt_tokens=len(PROMPT), seed=7)
        usage = choice.finish.usage
        assert (usage.prompt_tokens, usage.completion_tokens, usage.resumes) == (len(PROMPT), 8, 0)
        assert (usage.prefill_cached_tokens, usage.decode_cached_tokens) == (3, 5)
        timing = choice.finish.timing
        assert timing.transfer_ms == 1.5
        assert 0 < timing.first_token_ms <= timing.total_ms
        assert 0 < timing.decode_ms <= timing.total_ms


async def test_the_log_line_of_a_refusal_has_the_callers_request_id(model: Path) -> None:
    with capture_logs([structlog.contextvars.merge_contextvars]) as logs:
        async with cluster(model) as it:
            for asked in ({"n": 17}, {"n": 17, "request_id": "mine"}, {"request_id": "two\nlines"}):
                with pytest.raises(grpc.aio.AioRpcError):
                    await it.generate(**asked)
    failed = [(entry.get("request_id"), entry["reason"]) for entry in logs if entry["event"] == "call failed"]
    wrong_n = "n: 17 is not within [1, 16]"
    assert failed == [(None, wrong_n), ("mine", wrong_n), (None, "request_id: must be printable")]


async def test_what_the_workers_are_told(model: Path) -> None:
    async with cluster(model, headroom_tokens=6) as it:
        sampling = pb.Sampling(temperature=0.5, top_k=9, seed=2**64 - 1, logit_bias={3: 1.5})
        stopping = {"stop_token_ids": [9], "min_tokens": 2}
        await it.generate(n=2, cache_salt="salt", sampling=sampling, stopping=stopping)
        prefill, reserve = it.prefills[0].prefills[0], it.decodes[0].reserves[0]
        sequence = prefill.sequence
        assert reserve.sequence == sequence
        start = it.decodes[0].starts[0]
        assert reserve.attempt_id == start.attempt_id == prefill.attempt_id
        assert start.first_token == expected(1)[0]
        assert start.kv.pool.instance == it.prefills[0].instance
        assert list(start.kv.block_ids) == [0, 1]
        assert reserve.headroom_tokens == 6
        assert tuple(sequence.token_ids) == PROMPT
        assert (sequence.prompt_length, sequence.max_length, sequence.min_length) == (20, 28, 22)
        assert set(sequence.stop_token_ids) == {models.EOS, 9}
        root = cache_root("f" * 32, "salt")
        assert sequence.cache_root == root
        assert sequence.block_hashes == b"".join(block_hashes(root, PROMPT, 16))
        assert (sequence.sampling.temperature, sequence.sampling.top_k) == (0.5, 9)
        assert dict(sequence.sampling.logit_bias) == {3: 1.5}
        seeds = [prefill.sequence.sampling.seed for prefill in it.prefills[0].prefills]
        assert seeds == [2**64 - 1, 0]
        assert [prefill.uncached_tokens for prefill in it.prefills[0].prefills] == [20, 4]


async def test_one_token_needs_no_decode_worker(model: Path) -> None:
    async with cluster(model) as it:
        response = await it.generate(max_tokens=1)
        assert list(response.choices[0].token_ids) == expected(1)
        assert not it.decodes[0].reserves


async def test_a_stream_tells_the_prompt_first_and_the_finish_last(model: Path) -> None:
    async with cluster(model, decodes=[Script(step_seconds=0.002)]) as it:
        chunks = [chunk async for chunk in it.stub.GenerateStream(request(max_tokens=30, n=3))]
        assert chunks[0].prompt.prompt_tokens == len(PROMPT)
        assert not any(chunk.HasField("prompt") for chunk in chunks[1:])
        for index in range(3):
            own = [chunk for chunk in chunks[1:] if chunk.index == index]
            assert [token for chunk in own for token in chunk.delta.token_ids] == expected(30)
            assert "".join(chunk.delta.text for chunk in own) == text_of(expected(30))
            assert [chunk.HasField("finish") for chunk in own] == [False] * (len(own) - 1) + [True]


def ending(last: int, at: int) -> Script:
    """A worker whose token at place `at` of the output is `last`."""
    return Script(token=lambda length: last if length == len(PROMPT) + at else 40 + length % 50)


@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize(
    ("last", "fields", "reason", "text_has_it"),
    [
        (models.EOS, {}, pb.FINISH_REASON_EOS, False),
        (models.EOS, {"response": pb.ResponseOptions(special_tokens=True)}, pb.FINISH_REASON_EOS, True),
        (99, {"stopping": {"stop_token_ids": [99]}}, pb.FINISH_REASON_STOP, False),
        (99, {"stopping": {"stop_token_ids": [99], "include_stop": True}}, pb.FINISH_REASON_STOP, True),
    ],
)
async def test_a_stop_token_ends_the_answer(
    model: Path, at: int, last: int, fields: dict[str, Any], reason: pb.FinishReason.ValueType, text_has_it: bool
) -> None:
    async with cluster(model, prefills=[ending(last, at)], decodes=[ending(last, at)]) as it:
        choice = (await it.generate(**fields)).choices[0]
        assert list(choice.token_ids) == [*expected(at), last]
        assert choice.finish.reason == reason
        assert choice.finish.stop_token_id == last
        spoken = [*expected(at), last] if text_has_it else expected(at)
        assert choice.text == TOKENIZER.decode(spoken, skip_special_tokens=False)


@pytest.mark.parametrize("step_seconds", [0, 0.002])
@pytest.mark.parametrize("include_stop", [False, True])
async def test_a_stop_string_ends_the_answer_and_the_attempt(
    model: Path, include_stop: bool, step_seconds: float
) -> None:
    whole = text_of(expected(500))
    stop = whole[9:12]
    async with cluster(model, decodes=[Script(step_seconds=step_seconds)]) as it:
        stopping = {"stop": ["never", stop], "include_stop": include_stop}
        choice = (await it.generate(max_tokens=500, stopping=stopping)).choices[0]
        assert choice.finish.reason == pb.FINISH_REASON_STOP
        assert choice.finish.stop == stop
        assert 0 < choice.finish.timing.decode_ms < choice.finish.timing.total_ms
        assert choice.text == whole[: 12 if include_stop else 9]
        assert text_of(list(choice.token_ids)) == whole[:12]
        assert choice.finish.usage.completion_tokens == len(choice.token_ids)
        await eventually(lambda: len(it.decodes[0].ended) == 1)


async def test_stop_strings_wait_for_min_tokens(model: Path) -> None:
    whole = text_of(expected(100))
    async with cluster(model) as it:
        choice = (await it.generate(max_tokens=100, stopping={"stop": [whole[2]], "min_tokens": 20})).choices[0]
        assert whole[2] in whole[19:]
        assert choice.text == whole[: whole.index(whole[2], 19)]


@pytest.mark.parametrize(("min_tokens", "found"), [(19, True), (20, True), (21, False)])
async def test_a_stop_string_counts_where_it_ends(model: Path, min_tokens: int, found: bool) -> None:
    """It begins with the 16th token and is complete with the 20th."""
    whole = text_of(expected(40))
    stop = text_of(expected(20)).removeprefix(text_of(expected(15)))
    async with cluster(model) as it:
        stopping = {"stop": [stop], "min_tokens": min_tokens}
        choice = (await it.generate(max_tokens=40, stopping=stopping)).choices[0]
        assert choice.text == (whole[: whole.index(stop)] if found else whole)


async def test_logprobs_come_with_the_tokens_bytes(model: Path) -> None:
    async with cluster(model) as it:
        choice = (await it.generate(response=pb.ResponseOptions(logprobs=2))).choices[0]
        assert [entry.token_id for entry in choice.logprobs] == expected(8)
        assert b"".join(entry.token for entry in choice.logprobs).decode() == choice.text
        assert all(len(entry.alternatives) == 2 for entry in choice.logprobs)
        assert not (await it.generate()).choices[0].logprobs


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ({"text": "the quick"}, " brown"),
        ({"prompt": FALLBACK.encode("the quick").ids}, " brown"),
        ({"prompt": [FALLBACK.token_to_id("</s>")]}, "brown"),
        ({"chat": pb.Chat(messages=[pb.ChatMessage(role="user", content="the quick")])}, "brown"),
    ],
    ids=["text", "token_ids", "no text", "chat"],
)
async def test_what_goes_on_with_the_prompt_keeps_its_space(tmp_path: Path, asked: dict[str, Any], text: str) -> None:
    """With SentencePiece a text begins with a space that is none of it, and a word in a text with one that is."""
    directory = models.write(tmp_path, models.byte_fallback())
    pieces = iter(FALLBACK.encode("brown").ids)
    script = Script(token=lambda _length: next(pieces))
    async with cluster(directory, prefills=[script], decodes=[script]) as it:
        assert (await it.generate(max_tokens=6, **asked)).choices[0].text == text


async def test_token_ids_are_left_out_on_request(model: Path) -> None:
    async with cluster(model) as it:
        choice = (await it.generate(response=pb.ResponseOptions(token_ids=False))).choices[0]
        assert not choice.token_ids
        assert choice.text == text_of(expected(8))
        assert choice.finish.usage.completion_tokens == 8


async def test_nothing_is_not_tokenized(model: Path) -> None:
    """Empty text is: into the special tokens that begin every text, or none."""
    async with cluster(model) as it:
        assert not (await it.stub.Tokenize(pb.TokenizeRequest(text=""))).token_ids
        with pytest.raises(grpc.aio.AioRpcError, match="input: one of text and chat must be set") as refused:
            await it.stub.Tokenize(pb.TokenizeRequest())
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_text_and_chat_are_tokenized(model: Path) -> None:
    long = "the quick brown fox " * 500
    async with cluster(model) as it:
        for text in ("the lazy dog", long):
            ids = (await it.stub.Tokenize(pb.TokenizeRequest(text=text))).token_ids
            assert list(ids) == TOKENIZER.encode(text).ids
            assert (await it.stub.Detokenize(pb.DetokenizeRequest(token_ids=ids))).text == text
        chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="hi")])
        rendered = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
        ids = (await it.stub.Tokenize(pb.TokenizeRequest(chat=chat))).token_ids
        assert list(ids) == TOKENIZER.encode(rendered).ids
        assert (await it.generate(chat=chat)).prompt.prompt_tokens == len(ids)
        assert tuple(it.prefills[0].prefills[0].sequence.token_ids) == tuple(ids)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"prompt": ()}, "input: the prompt has no tokens"),
        ({"text": ""}, "input: the prompt has no tokens"),
        ({"prompt": (5, 600)}, r"token_ids.ids\[1\]: 600 is not in the vocabulary of 600 tokens"),
        ({"prompt": (5,) * 2047, "max_tokens": 2}, "stopping.max_tokens: 2 and .* 2048"),
        ({"chat": pb.Chat()}, "chat.messages: must not be empty"),
        ({"chat": pb.Chat(messages=[pb.ChatMessage(role="boss", content="x")])}, r"chat.messages\[0\].role: 'boss'"),
        ({"chat": pb.Chat(messages=[pb.ChatMessage(role="user")])}, "chat: .* must say something"),
        ({"n": 17}, "n: 17"),
    ],
)
async def test_bad_input_reaches_no_worker(model: Path, fields: dict[str, Any], sentence: str) -> None:
    async with cluster(model) as it:
        with pytest.raises(grpc.aio.AioRpcError, match=sentence) as refused:
            await it.generate(**fields)
        assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert not it.prefills[0].prefills


async def test_what_a_chat_template_raises_is_the_chats_fault(tmp_path: Path) -> None:
    directory = models.write(tmp_path, models.byte_level())
    (directory / "chat_template.jinja").write_text("{{ messages[0]['content'] + 1 }}")
    async with cluster(directory) as it:
        with pytest.raises(grpc.aio.AioRpcError, match="the model's chat template refuses it") as refused:
            await it.generate(chat=pb.Chat(messages=[pb.ChatMessage(role="user", content="hi")]))
        assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_a_chats_variables_and_tools_reach_its_template(tmp_path: Path) -> None:
    directory = models.write(tmp_path, models.byte_level())
    template = "{{ mood }}{% for tool in tools or [] %} {{ tool.name }}{% endfor %}{{ messages[0].content }}"
    (directory / "chat_template.jinja").write_text(template)
    asked = [pb.ChatMessage(role="user", content="?")]
    chat = pb.Chat(messages=asked, template_variables='{"mood": "quick"}', tools=['{"name": "fox"}'])
    async with cluster(directory) as it:
        ids = TOKENIZER.encode("quick fox?").ids
        assert list((await it.stub.Tokenize(pb.TokenizeRequest(chat=chat))).token_ids) == ids
        await it.generate(chat=chat)
        assert list(it.prefills[0].prefills[0].sequence.token_ids) == ids
        for wrong in (pb.Chat(messages=asked, template_variables="{"), pb.Chat(messages=asked, tools=["null"])):
            for call in (it.stub.Tokenize(pb.TokenizeRequest(chat=wrong)), it.generate(chat=wrong)):
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await call
                assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_a_short_chat_that_its_template_makes_long_is_tokenized_on_a_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = models.write(tmp_path, models.byte_level())
    (directory / "chat_template.jinja").write_text("{{ messages[0].content * 20 }}")
    encode, threads = Tokenizer._encode, []

    def noted(self: Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
        threads.append((len(text), threading.current_thread() is threading.main_thread()))
        return encode(self, text, add_special_tokens)

    monkeypatch.setattr(Tokenizer, "_encode", noted)
    async with cluster(directory) as it:
        for content in ("a" * 50, "a" * 500):
            chat = pb.Chat(messages=[pb.ChatMessage(role="user", content=content)])
            await it.stub.Tokenize(pb.TokenizeRequest(chat=chat))
    assert threads == [(1_000, True), (10_000, False)]


async def test_what_an_answer_took_counts_from_before_its_prompt_was_tokenized(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = Tokenizer._encode

    def slow(self: Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
        time.sleep(0.2)
        return encode(self, text, add_special_tokens)

    monkeypatch.setattr(Tokenizer, "_encode", slow)
    async with cluster(model) as it:
        timing = (await it.generate(text="the lazy dog", max_tokens=2)).choices[0].finish.timing
        assert timing.first_token_ms >= 200
        assert timing.total_ms >= timing.first_token_ms
        assert timing.queued_ms < 200
        for name in ("first_token", "request"):
            assert (it.router.metrics.registry.get_sample_value(f"twostroke_{name}_seconds_sum") or 0) >= 0.2


async def test_tokens_that_the_model_does_not_have_reach_no_worker(tmp_path: Path) -> None:
    """A tokenizer may have been given tokens that the weights know nothing of."""
    tokenizer = models.byte_level()
    tokenizer.add_special_tokens([f"<extra-{number}>" for number in range(models.VOCAB_SIZE)])
    async with cluster(models.write(tmp_path, tokenizer)) as it:
        with pytest.raises(grpc.aio.AioRpcError, match="is not in the vocabulary of 600 tokens") as refused:
            await it.generate(text=f"a<extra-{models.VOCAB_SIZE - 1}>")
        assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert not it.prefills[0].prefills


async def test_text_that_waits_for_its_tokens_is_limited(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "the lazy dog " * 1_000
    monkeypatch.setattr("router.callers.waiting_bytes.MOST_OF_A_CALLER", 2 * len(text))
    encode, go_on = Tokenizer._encode, threading.Event()

    def held_up(self: Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
        go_on.wait(30)
        return encode(self, text, add_special_tokens)

    monkeypatch.setattr(Tokenizer, "_encode", held_up)
    async with cluster(model) as it:
        calls = [asyncio.ensure_future(_code(it.stub.Tokenize(pb.TokenizeRequest(text=text)))) for _ in range(20)]
        await eventually(lambda: sum(call.done() for call in calls) == 18)
        go_on.set()
        codes = await asyncio.gather(*calls)
        assert codes.count(grpc.StatusCode.OK) == 2
        assert codes.count(grpc.StatusCode.RESOURCE_EXHAUSTED) == 18
        assert (await it.stub.Tokenize(pb.TokenizeRequest(text=text))).token_ids


async def _code(call: Any) -> grpc.StatusCode:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


@pytest.mark.parametrize("limit", ["MOST_OF_A_CALLER", "MOST"])
async def test_text_counts_until_a_thread_has_come_to_it_though_its_caller_left(
    model: Path, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "the lazy dog " * 1_000
    monkeypatch.setattr(f"router.callers.waiting_bytes.{limit}", 4 * len(text))
    tokenizer = Tokenizer(model, load_config(model))
    go_on = threading.Event()
    for _ in range(2):
        tokenizer._threads.submit(EVERYONE.name, go_on.wait)  # both that it gets are busy
    try:
        for _ in range(4):
            left = asyncio.ensure_future(tokenizer.encode(text, add_special_tokens=False))
            await asyncio.sleep(0)
            left.cancel()
            with pytest.raises(asyncio.CancelledError):
                await left
        with pytest.raises(CallError, match="too much text waits"):
            await tokenizer.encode(text, add_special_tokens=False)
    finally:
        go_on.set()
    await eventually(lambda: tokenizer._waiting.total == 0)
    assert await tokenizer.encode(text, add_special_tokens=False)


async def test_a_chat_that_is_too_large_does_not_wait_to_be_told_so(model: Path) -> None:
    """Its message takes far more memory than it has bytes."""
    chat = pb.Chat(messages=[pb.ChatMessage()] * 16_385)
    go_on = threading.Event()
    async with cluster(model) as it:
        for _ in range(3):
            it.router.service._tokenizer._threads.submit(EVERYONE.name, go_on.wait)
        try:
            for call in (
                it.stub.Generate(pb.GenerateRequest(chat=chat), timeout=5),
                it.stub.Tokenize(pb.TokenizeRequest(chat=chat), timeout=5),
            ):
                with pytest.raises(grpc.aio.AioRpcError, match="has 16385 messages; at most 16384 are allowed"):
                    await call
        finally:
            go_on.set()


async def test_one_callers_texts_hold_up_nobody_else(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "the lazy dog " * 1_000
    tokenizer = Tokenizer(model, load_config(model))
    encode, go_on = Tokenizer._encode, threading.Event()

    def slow(self: Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
        if text.startswith("slow"):
            go_on.wait(10)
        return encode(self, text, add_special_tokens)

    monkeypatch.setattr(Tokenizer, "_encode", slow)
    monkeypatch.setattr("router.callers.waiting_bytes.MOST_OF_A_CALLER", 5 * len(text))

    async def tokenize(caller: str, text: str) -> list[int]:
        CALLER.set(Caller(caller))
        return await tokenizer.encode(text, add_special_tokens=False)

    many = [asyncio.create_task(tokenize("alice", f"slow {text[5:]}")) for _ in range(6)]
    try:
        async with asyncio.timeout(5):
            assert await asyncio.gather(*(asyncio.create_task(tokenize("bob", text)) for _ in range(4)))
    finally:
        go_on.set()
    ends = await asyncio.gather(*many, return_exceptions=True)
    assert [isinstance(end, CallError) for end in ends] == [False] * 5 + [True]


async def test_health_is_that_of_the_pair(model: Path) -> None:
    async with cluster(model) as it:

        async def status(service: str) -> int:
            return await health.check(it.channel, service)

        serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
        for service in ("", "twostroke.v1.Inference", "twostroke.v1.Registry"):
            assert await status(service) == serving
        await it.decodes[0].die()
        await eventually(lambda: not it.router.dispatcher.workers.ready)
        assert await status("twostroke.v1.Inference") == not_serving
        assert await status("twostroke.v1.Registry") == serving
        await it.decodes[0].start(it.decodes[0].address)
        await eventually(lambda: it.router.dispatcher.workers.ready)
        assert await status("twostroke.v1.Inference") == serving


async def test_reflection_lists_the_services(model: Path) -> None:
    async with cluster(model) as it:
        stub_of: Any = reflection_pb2_grpc.ServerReflectionStub
        asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        call = stub_of(it.channel).ServerReflectionInfo(asked)
        names = {service.name for answer in [await call.read()] for service in answer.list_services_response.service}
        assert {"twostroke.v1.Inference", "twostroke.v1.Registry", "grpc.health.v1.Health"} <= names


async def test_model_and_load_are_told(model: Path) -> None:
    async with cluster(model) as it:
        answer = await it.stub.GetModel(pb.GetModelRequest())
        assert (answer.architecture, answer.vocab_size, answer.block_size) == ("LlamaForCausalLM", 600, 16)
        assert answer.limits.max_total_tokens == 2048
        assert answer.fingerprint == "f" * 32
        load = await it.stub.GetLoad(pb.GetLoadRequest())
        assert load.answered == 0
        assert {worker.instance for worker in load.workers} == {worker.instance for worker in it.workers}
        assert all(worker.ready and worker.blocks.total == 4096 for worker in load.workers)
        await it.generate(n=3)
        assert (await it.stub.GetLoad(pb.GetLoadRequest())).answered == 3


async def test_metrics_count_what_happened(model: Path) -> None:
    async with cluster(model, decodes=[Script(refuse=1)]) as it:
        await it.generate()
        with pytest.raises(grpc.aio.AioRpcError):
            await it.generate(n=0)
        await it.stub.GetModel(pb.GetModelRequest())
        await it.stub.GetLoad(pb.GetLoadRequest())
        await it.stub.Tokenize(pb.TokenizeRequest(text="a"))
        await it.stub.Detokenize(pb.DetokenizeRequest(token_ids=[40]))
        lines = generate_latest(it.router.metrics.registry).decode().splitlines()
        for method in ("Generate", "GetModel", "GetLoad", "Tokenize", "Detokenize"):
            assert f'twostroke_calls_total{{code="OK",method="{method}"}} 1.0' in lines
        assert 'twostroke_calls_total{code="INVALID_ARGUMENT",method="Generate"} 1.0' in lines
        assert "twostroke_output_tokens_total 8.0" in lines
        assert "twostroke_first_token_seconds_count 1.0" in lines
        assert 'twostroke_workers{role="decode"} 1.0' in lines


async def test_a_long_answer_in_one_message_takes_no_more_memory_than_its_text() -> None:
    async def chunks() -> AsyncIterator[pb.GenerateChunk]:
        for token in range(tokens):
            yield pb.GenerateChunk(index=1, delta=pb.Delta(text="word ", token_ids=[token]))

    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    tokens = 12_000
    before = resident_bytes()
    response = await gather(chunks())
    assert resident_bytes() - before < 64 << 20
    assert [choice.text for choice in response.choices] == ["", "word " * tokens]
    assert list(response.choices[1].token_ids) == list(range(tokens))
