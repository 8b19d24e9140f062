"""One choice of a client's request, and the attempts at it. The event loop owns both; nothing else touches them."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING, NamedTuple

from common.tracing import OFF, Span
from router.errors import CallError
from router.mailbox import Mailbox
from twostroke.v1 import inference_pb2, worker_pb2

if TYPE_CHECKING:
    from router.worker import Worker


# A client that leaves more tokens unread, beyond what gRPC holds for it, gets none: its stream ends, and its place goes
# to others.
MAX_UNREAD_TOKENS = 4096


class State(Enum):
    QUEUED = auto()  # in the router's queue
    DISPATCHED = auto()  # an attempt is under way
    FINISHED = auto()  # every token is there
    FAILED = auto()  # `failure` says why
    DROPPED = auto()  # the client went, or a stop string ended the answer


class Kind(NamedTuple):
    """What hashes of blocks depend on, and all workers that are there together have in common."""

    fingerprint: str
    block_size: int


@dataclass(frozen=True, slots=True)
class Told:
    """A prompt as workers of one kind are told of it."""

    block_hashes: list[bytes]
    packed: worker_pb2.Sequence = field(default_factory=worker_pb2.Sequence)


@dataclass(frozen=True, slots=True)
class Prompt:
    token_ids: tuple[int, ...]
    min_length: int
    stop_token_ids: frozenset[int]
    cache_salt: str
    grammar: str = ""  # that answers follow; see common/grammar.py
    # Made with the first attempt of the first choice, and shared by all: a long prompt takes milliseconds.
    told: dict[Kind, Told] = field(default_factory=dict, init=False, compare=False)


@dataclass(slots=True, eq=False)
class Request:
    id: str
    index: int
    serial: int  # order of arrival
    prompt: Prompt
    sampling: worker_pb2.SamplingParams
    mailbox: Mailbox["Request"]
    max_length: int  # tokens, prompt and output, at which the sequence ends
    # That, once it is known how long a sequence the workers hold: of a request that came before them, until it begins.
    settle: Callable[[int | None], int] | None = None
    trace: Span = OFF  # of the call
    arrived_at: float = field(default_factory=time.monotonic)  # the call it is of, before its prompt was tokenized
    queued_at: float = field(default_factory=time.monotonic)
    state: State = State.QUEUED
    failure: CallError | None = None
    attempt: "Attempt | None" = None
    posted: bool = False  # in the mailbox, not yet taken out
    output: list[int] = field(default_factory=list)
    taken: int = 0  # tokens of the output that are in messages to the client
    complete: bool = False  # the last token is one that ends it
    logprobs: list[bytes] = field(default_factory=list)  # where asked for: of the tokens that were not yet taken out
    kind: Kind | None = None  # of the workers that the hashes are for
    block_hashes: list[bytes] = field(default_factory=list)
    attempts: int = 0  # begun
    resumes: int = 0  # after preemptions and faults
    preemptions: int = 0
    faults: int = 0
    avoid: set[str] = field(default_factory=set)  # instances of workers that failed it
    prefill_cached_tokens: int = 0
    decode_cached_tokens: int | None = None
    timing: inference_pb2.Timing = field(default_factory=inference_pb2.Timing)

    most_tokens: int = field(init=False)  # of the output, by `max_length`
    wants_logprobs: bool = field(init=False)

    def __post_init__(self) -> None:
        self.limit(self.max_length)
        self.wants_logprobs = self.sampling.HasField("logprobs")

    def limit(self, max_length: int) -> None:
        self.max_length = max_length
        self.most_tokens = max_length - len(self.prompt.token_ids)

    @property
    def length(self) -> int:
        return len(self.prompt.token_ids) + len(self.output)

    @property
    def remaining(self) -> int:
        return self.max_length - self.length

    def add_logprobs(self, logprobs: worker_pb2.Logprobs) -> None:
        """Those of the token that comes next."""
        # As bytes: a message out of another one keeps all of that alive, here the step of a whole batch.
        self.logprobs.append(logprobs.SerializeToString())

    def take_logprobs(self, count: int) -> list[worker_pb2.Logprobs]:
        """Those of the next tokens; they are kept no longer."""
        taken = [worker_pb2.Logprobs.FromString(packed) for packed in self.logprobs[:count]]
        del self.logprobs[:count]
        return taken

    def headroom(self, first: int) -> int:
        """Tokens of output that the next attempt reserves room for: `first`, doubled with each preemption, so that a
        request which keeps outgrowing its pool soon asks for its whole need."""
        return min(self.remaining, max(first, 1) << self.preemptions)

    def add(self, token: int) -> None:
        """Takes the next token. None may follow one that makes it complete."""
        output = self.output
        output.append(token)
        if token in self.prompt.stop_token_ids or len(output) >= self.most_tokens:
            self.complete = True
        if not self.posted:
            self.posted = True
            self.mailbox.post(self)
        elif len(output) - self.taken > MAX_UNREAD_TOKENS:
            self.mailbox.overflow()

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
