"""One choice of a client's request, and the attempts at it. The event loop owns both; nothing else touches them."""

import time
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING

from common.tracing import OFF, Span
from router.errors import CallError
from router.mailbox import Mailbox
from twostroke.v1 import inference_pb2, worker_pb2

if TYPE_CHECKING:
    from router.worker import Worker


class State(Enum):
    QUEUED = auto()  # in the router's queue
    DISPATCHED = auto()  # an attempt is under way
    FINISHED = auto()  # every token is there
    FAILED = auto()  # `failure` says why
    DROPPED = auto()  # the client went, or a stop string ended the answer


@dataclass(frozen=True, slots=True)
class Prompt:
    token_ids: tuple[int, ...]
    max_length: int  # tokens, prompt and output, at which a sequence ends
    min_length: int
    stop_token_ids: frozenset[int]
    cache_salt: str


@dataclass(slots=True, eq=False)
class Request:
    id: str
    index: int
    serial: int  # order of arrival
    prompt: Prompt
    sampling: worker_pb2.SamplingParams
    mailbox: Mailbox["Request"]
    trace: Span = OFF  # of the call
    arrived_at: float = field(default_factory=time.monotonic)
    queued_at: float = field(default_factory=time.monotonic)
    state: State = State.QUEUED
    failure: CallError | None = None
    attempt: "Attempt | None" = None
    posted: bool = False  # in the mailbox, not yet taken out
    output: list[int] = field(default_factory=list)
    logprobs: list[worker_pb2.Logprobs] = field(default_factory=list)  # parallel to output where asked for
    block_hashes: list[bytes] = field(default_factory=list)
    attempts: int = 0  # begun
    resumes: int = 0  # after preemptions and faults
    faults: int = 0
    avoid: set[str] = field(default_factory=set)  # instances of workers that failed it
    prefill_cached_tokens: int = 0
    decode_cached_tokens: int | None = None
    timing: inference_pb2.Timing = field(default_factory=inference_pb2.Timing)

    @property
    def length(self) -> int:
        return len(self.prompt.token_ids) + len(self.output)

    @property
    def remaining(self) -> int:
        return self.prompt.max_length - self.length

    @property
    def complete(self) -> bool:
        """Its last token is one that ends it."""
        return bool(self.output) and (self.output[-1] in self.prompt.stop_token_ids or self.remaining <= 0)

    @property
    def over(self) -> bool:
        return self.state is not State.QUEUED and self.state is not State.DISPATCHED

    def add(self, token: int) -> None:
        self.output.append(token)
        if not self.posted:
            self.posted = True
            self.mailbox.post(self)

    def end(self, state: State, failure: CallError | None = None) -> None:
        self.state = state
        self.failure = failure
        if not self.posted:
            self.posted = True
            self.mailbox.post(self)


@dataclass(slots=True, eq=False)
class Attempt:
    """One try at a request on one pair of workers, or on a decode worker that prefills the prompt, too (`in_place`). A
    worker is None here once it holds nothing for the attempt."""

    id: int
    request: Request
    prefill: "Worker | None"
    decode: "Worker | None"
    prefill_tokens: int  # that the worker which prefills was asked to compute
    decode_blocks: int  # that the decode worker was asked to reserve
    in_place: bool
    length: int  # tokens that the request had, prompt and output
    trace: Span = OFF
    dispatched_at: float = field(default_factory=time.monotonic)
    prefilled: worker_pb2.Prefilled | None = None
    reserved: bool = False
    decode_cached_tokens: int = 0
    decoding_since: float | None = None
