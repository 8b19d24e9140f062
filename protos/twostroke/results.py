"""What the client's calls return."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from twostroke.chat import Message
from twostroke.v1 import inference_pb2 as pb

FinishReason: TypeAlias = Literal["length", "eos", "stop", "unknown"]
"""Why an answer ended. unknown: for a reason that a newer router has, and this client does not know."""

_REASONS: dict[int, FinishReason] = {
    pb.FINISH_REASON_LENGTH: "length",
    pb.FINISH_REASON_EOS: "eos",
    pb.FINISH_REASON_STOP: "stop",
}


@dataclass(frozen=True, slots=True)
class Finish:
    """Why a choice ended, and what it took: `usage` in tokens, `timing` in milliseconds."""

    reason: FinishReason
    stop: str
    stop_token_id: int | None
    usage: pb.Usage
    timing: pb.Timing


@dataclass(frozen=True, slots=True)
class ToolCall:
    """What the model calls. What becomes of it goes back as
    `{"role": "tool", "tool_call_id": call.id, "name": call.name, "content": "..."}`."""

    id: str
    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Piece:
    """What came since the last piece of the same choice. The first piece of a stream has `prompt`, the last of each
    choice has `finish`. Text lags behind tokens where a character, or a possible stop string, is not complete yet.
    Where the answer is `parsed`, its reasoning and the tools that it calls are no part of the text."""

    text: str
    reasoning_content: str
    tool_calls: tuple[ToolCall, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[pb.TokenLogprob, ...]
    index: int
    prompt: pb.PromptInfo | None
    finish: Finish | None


@dataclass(frozen=True, slots=True)
class Choice:
    """One answer; there are several where `n` is more than 1."""

    text: str
    reasoning_content: str
    tool_calls: tuple[ToolCall, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[pb.TokenLogprob, ...]
    index: int
    finish: Finish

    def message(self) -> Message:
        """The answer as one of the messages that a chat goes on with."""
        message: dict[str, object] = {"role": "assistant"}
        if self.text or not self.tool_calls:
            message["content"] = self.text
        if self.reasoning_content:
            message["reasoning_content"] = self.reasoning_content
        if self.tool_calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self.tool_calls
            ]
        return message


@dataclass(frozen=True, slots=True)
class Generation:
    """A whole answer. All but `prompt` and `choices` is of the first choice."""

    prompt: pb.PromptInfo
    choices: tuple[Choice, ...]

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def reasoning_content(self) -> str:
        return self.choices[0].reasoning_content

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        return self.choices[0].tool_calls

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.choices[0].token_ids

    @property
    def logprobs(self) -> tuple[pb.TokenLogprob, ...]:
        return self.choices[0].logprobs

    @property
    def finish(self) -> Finish:
        return self.choices[0].finish

    def message(self) -> Message:
        """The answer as one of the messages that a chat goes on with."""
        return self.choices[0].message()


def piece_of(chunk: pb.GenerateChunk) -> Piece:
    delta = chunk.delta
    return Piece(
        text=delta.text,
        reasoning_content=delta.reasoning_content,
        tool_calls=_tool_calls_of(delta.tool_calls),
        token_ids=tuple(delta.token_ids),
        logprobs=tuple(delta.logprobs),
        index=chunk.index,
        prompt=chunk.prompt if chunk.HasField("prompt") else None,
        finish=_finish_of(chunk.finish) if chunk.HasField("finish") else None,
    )


def generation_of(response: pb.GenerateResponse) -> Generation:
    choices = (
        Choice(
            text=choice.text,
            reasoning_content=choice.reasoning_content,
            tool_calls=_tool_calls_of(choice.tool_calls),
            token_ids=tuple(choice.token_ids),
            logprobs=tuple(choice.logprobs),
            index=choice.index,
            finish=_finish_of(choice.finish),
        )
        for choice in response.choices
    )
    return Generation(response.prompt, tuple(choices))


def _tool_calls_of(calls: Iterable[pb.ToolCall]) -> tuple[ToolCall, ...]:
    return tuple(ToolCall(call.id, call.name, json.loads(call.arguments or "{}")) for call in calls)


def _finish_of(finish: pb.Finish) -> Finish:
    return Finish(
        reason=_REASONS.get(finish.reason, "unknown"),
        stop=finish.stop,
        stop_token_id=finish.stop_token_id if finish.HasField("stop_token_id") else None,
        usage=finish.usage,
        timing=finish.timing,
    )
