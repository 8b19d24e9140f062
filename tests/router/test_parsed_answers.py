"""Reasoning and tool calls, from a worker's tokens to the client and back into the next prompt."""

import json
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.router import models
from tests.router.answering import (
    END,
    LIKE_HERMES,
    LIKE_LLAMA,
    LIKE_MISTRAL,
    LIKE_NEW_MISTRAL,
    LIKE_QWEN,
    LIKE_R1,
    QUESTION,
    WEATHER,
    Model,
    answering,
)
from tests.router.cluster import cluster, request
from twostroke import AsyncClient, Message, ToolCall
from twostroke.v1 import inference_pb2 as pb

CALLED = '{"name": "weather", "arguments": {"place": "Zürich", "day": 1.0}}'
WITH_ID = '{"name": "weather", "arguments": {"place": "Zürich", "day": 1.0}, "id": "aB3dE5gH9"}'
NEXT = '{"name": "time", "arguments": {}, "id": "000000001"}'
ARGUMENTS = {"place": "Zürich", "day": 1.0}


@pytest.mark.parametrize(
    ("model", "answer", "text", "reasoning", "calls"),
    [
        (
            LIKE_QWEN,
            f"<think>\nHm 🙂.\n\nYes.\n</think>\n\nI look.\n<tool_call>\n{CALLED}\n</tool_call>",
            "I look.",
            "Hm 🙂.\n\nYes.",
            [(None, "weather", ARGUMENTS)],
        ),
        (
            LIKE_HERMES,
            f"<tool_call>\n{CALLED}\n</tool_call>\n<tool_call>\n{CALLED}\n</tool_call>",
            "",
            "",
            [(None, "weather", ARGUMENTS)] * 2,
        ),
        (
            LIKE_MISTRAL,
            f"[TOOL_CALLS] [{WITH_ID}, {NEXT}]",
            "",
            "",
            [("aB3dE5gH9", "weather", ARGUMENTS), ("000000001", "time", {})],
        ),
        (
            LIKE_NEW_MISTRAL,
            f"I look.[TOOL_CALLS]weather[CALL_ID]aB3dE5gH9[ARGS]{json.dumps(ARGUMENTS, ensure_ascii=False)}"
            "[TOOL_CALLS]time[CALL_ID]000000001[ARGS]{}",
            "I look.",
            "",
            [("aB3dE5gH9", "weather", ARGUMENTS), ("000000001", "time", {})],
        ),
        (LIKE_LLAMA, CALLED.replace("arguments", "parameters"), "", "", [(None, "weather", ARGUMENTS)]),
    ],
    ids=["Qwen", "Hermes", "Mistral", "new Mistral", "Llama"],
)
async def test_an_answer_goes_back_as_the_model_wrote_it(
    tmp_path: Path, model: Model, answer: str, text: str, reasoning: str, calls: list[tuple[str | None, str, Any]]
) -> None:
    async with answering(tmp_path, model, answer, tools=[WEATHER]) as (_, client):
        whole = await client.chat([QUESTION], tools=[WEATHER], max_tokens=400)
        assert (whole.text, whole.reasoning_content) == (text, reasoning)
        for call, (id, name, arguments) in zip(whole.tool_calls, calls, strict=True):
            assert call == ToolCall(id or call.id, name, arguments)
            assert call.id.isalnum()
            assert len(call.id) == 9
        assert len({call.id for call in whole.tool_calls}) == len(calls)
        assert whole.finish.reason == "eos"
        assert whole.finish.usage.completion_tokens == len(whole.token_ids)

        # What the next prompt begins with is in the caches, token by token.
        asked = await client.tokenize([QUESTION], tools=[WEATHER])
        again = await client.tokenize([QUESTION, whole.message()], tools=[WEATHER], add_generation_prompt=False)
        if model is LIKE_LLAMA:  # it has another word for its own end
            again = (*again[: len(asked) + len(whole.token_ids) - 1], models.EOS)
        assert again[: len(asked) + len(whole.token_ids)] == (*asked, *whole.token_ids)

        results: list[Message] = [
            {"role": "tool", "tool_call_id": call.id, "name": call.name, "content": "Rain."}
            for call in whole.tool_calls
        ]
        assert await client.tokenize([QUESTION, whole.message(), *results], tools=[WEATHER])


async def test_a_stream_has_the_same_parts(tmp_path: Path) -> None:
    answer = f"<think>\nHm.\n</think>\n\nI look.\n<tool_call>\n{CALLED}\n</tool_call>\nOr <tool_call>not?"
    async with answering(tmp_path, LIKE_QWEN, answer, tools=[WEATHER]) as (_, client):
        whole = await client.chat([QUESTION], tools=[WEATHER], max_tokens=400, request_id="r", seed=7, n=2, logprobs=0)
        options: Any = {"tools": [WEATHER], "max_tokens": 400, "request_id": "r", "seed": 7, "n": 2, "logprobs": 0}
        pieces = [piece async for piece in client.stream_chat([QUESTION], **options)]
        for choice in whole.choices:
            own = [piece for piece in pieces if piece.index == choice.index]
            assert "".join(piece.text for piece in own) == choice.text == "I look.\n\nOr <tool_call>not?"
            assert "".join(piece.reasoning_content for piece in own) == choice.reasoning_content == "Hm."
            assert tuple(call for piece in own for call in piece.tool_calls) == choice.tool_calls
            assert tuple(token for piece in own for token in piece.token_ids) == choice.token_ids
            assert [logprob.token_id for piece in own for logprob in piece.logprobs] == list(choice.token_ids)
            assert [piece.finish.reason for piece in own if piece.finish] == ["eos"]
        first, second = (choice.tool_calls[0].id for choice in whole.choices)
        assert first != second


async def test_a_shared_call_has_the_same_parts(tmp_path: Path) -> None:
    answer = f"<think>\nHm.\n</think>\n\nI look.\n<tool_call>\n{CALLED}\n</tool_call>"
    async with (
        answering(tmp_path, LIKE_QWEN, answer, tools=[WEATHER]) as (it, _),
        AsyncClient(it.address, share_call=True) as client,
    ):
        pieces = [piece async for piece in client.stream_chat([QUESTION], tools=[WEATHER], max_tokens=400)]
        assert "".join(piece.text for piece in pieces) == "I look."
        assert "".join(piece.reasoning_content for piece in pieces) == "Hm."
        assert [call.arguments for piece in pieces for call in piece.tool_calls] == [ARGUMENTS]


async def test_an_answer_that_is_not_parsed_is_text(tmp_path: Path) -> None:
    answer = f"[TOOL_CALLS] [{CALLED}]"
    async with answering(tmp_path, LIKE_MISTRAL, answer, tools=[WEATHER]) as (it, client):
        for options, text in (
            ({"parsed": False}, f" [{CALLED}]"),
            ({"special_tokens": True}, f"{answer}{END}"),
        ):
            given: Any = options
            whole = await client.chat([QUESTION], tools=[WEATHER], max_tokens=200, **given)
            assert (whole.text, whole.tool_calls) == (text, ())
            assert whole.message() == {"role": "assistant", "content": text}
        chat = pb.Chat(
            messages=[pb.ChatMessage(role="user", content=str(QUESTION["content"]))], tools=[json.dumps(WEATHER)]
        )
        assert (await it.generate(chat=chat, max_tokens=200)).choices[0].text == f" [{CALLED}]"


async def test_reasoning_that_the_prompt_begins(tmp_path: Path) -> None:
    async with answering(tmp_path, LIKE_R1, "Hm.\n</think>\n\nYes.") as (_, client):
        whole = await client.chat([QUESTION], parsed=True, max_tokens=50)
        assert (whole.reasoning_content, whole.text) == ("Hm.", "Yes.")
        assert whole.message() == {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm."}
        plain = await client.chat([QUESTION], max_tokens=50)
        assert (plain.reasoning_content, plain.text) == ("", "Hm.\n</think>\n\nYes.")
        cut = await client.chat([QUESTION], parsed=True, max_tokens=2)
        assert cut.finish.reason == "length"
        assert (cut.reasoning_content, cut.text) == ("Hm", "")


@pytest.mark.parametrize(
    ("options", "text", "called"),
    [
        ({"stop": "</tool_call>"}, "", True),
        ({"stop": "</tool_call>", "include_stop": True}, "", True),
        ({"stop": "</think>"}, "", False),
        ({"stop": '"arguments"'}, '<tool_call>\n{"name": "weather", ', False),
        ({"max_tokens": 20}, "<tool_call>\n{", False),
    ],
)
async def test_an_answer_that_is_cut_short(tmp_path: Path, options: Any, text: str, called: bool) -> None:
    answer = f"<think>Hm.</think><tool_call>\n{CALLED}\n</tool_call>"
    async with answering(tmp_path, LIKE_QWEN, answer, tools=[WEATHER]) as (_, client):
        whole = await client.chat([QUESTION], tools=[WEATHER], **{"max_tokens": 200, **options})
        assert whole.reasoning_content == "Hm."
        assert whole.finish.reason == ("length" if "max_tokens" in options else "stop")
        assert whole.text.startswith(text)
        assert bool(whole.text) == bool(text)
        assert bool(whole.tool_calls) == called


@pytest.mark.parametrize(
    ("stop", "text", "called"),
    [
        ('"arguments"', 'I look.{"name": "weather", ', False),
        ("look.{", "I look.", True),
        ("none of it", "I look.", True),
    ],
)
async def test_a_special_token_stands_between_what_stop_strings_are_looked_for_in(
    tmp_path: Path, stop: str, text: str, called: bool
) -> None:
    answer = f"I look.<tool_call>{CALLED}</tool_call>"
    async with answering(tmp_path, LIKE_HERMES, answer, tools=[WEATHER]) as (_, client):
        whole = await client.chat([QUESTION], tools=[WEATHER], max_tokens=200, stop=stop)
        assert (whole.text, bool(whole.tool_calls)) == (text, called)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"text": "hi", "response": pb.ResponseOptions(parsed=True)}, "response.parsed: goes with chat only"),
        ({"response": pb.ResponseOptions(parsed=True)}, "response.parsed: goes with chat only"),
        (
            {"chat": pb.Chat(), "response": pb.ResponseOptions(parsed=True, special_tokens=True)},
            "response.special_tokens: cannot go with parsed",
        ),
    ],
)
async def test_what_cannot_be_parsed(model: Path, fields: dict[str, Any], sentence: str) -> None:
    async with cluster(model) as it:
        unary, stream = it.stub.Generate(request(**fields)), it.stub.GenerateStream(request(**fields))
        for answer in (unary, aiter(stream).__anext__()):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await answer
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert str(refused.value.details()).startswith(sentence)
