"""What the client's calls return."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

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
class Piece:
    """What came since the last piece of the same choice. The first piece of a stream has `prompt`, the last of each
    choice has `finish`. Text lags behind tokens where a character, or a possible stop string, is not complete yet."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[pb.TokenLogprob, ...]
    index: int
    prompt: pb.PromptInfo | None
    finish: Finish | None


@dataclass(frozen=True, slots=True)
class Choice:
    """One answer; there are several where `n` is more than 1."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[pb.TokenLogprob, ...]
    index: int
    finish: Finish


@dataclass(frozen=True, slots=True)
class Generation:
    """A whole answer. `text`, `token_ids` and `finish` are those of the first choice."""

    prompt: pb.PromptInfo
    choices: tuple[Choice, ...]

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.choices[0].token_ids

    @property
    def finish(self) -> Finish:
        return self.choices[0].finish


def piece_of(chunk: pb.GenerateChunk) -> Piece:
    delta = chunk.delta
    return Piece(
        text=delta.text,
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
            token_ids=tuple(choice.token_ids),
            logprobs=tuple(choice.logprobs),
            index=choice.index,
            finish=_finish_of(choice.finish),
        )
        for choice in response.choices
    )
    return Generation(response.prompt, tuple(choices))


def _finish_of(finish: pb.Finish) -> Finish:
    return Finish(
        reason=_REASONS.get(finish.reason, "unknown"),
        stop=finish.stop,
        stop_token_id=finish.stop_token_id if finish.HasField("stop_token_id") else None,
        usage=finish.usage,
        timing=finish.timing,
    )
