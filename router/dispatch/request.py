"""One choice of a client's request, and the attempts at it. Both are used on the event loop only."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING, NamedTuple

from common.telemetry.tracing import OFF, Span
from router.errors import CallError
from router.mailbox import Mailbox
from twostroke.v1 import inference_pb2, worker_pb2

if TYPE_CHECKING:
    from router.cluster.worker import Worker


# A client that leaves more tokens of a choice unread than these, besides what gRPC buffers, has its call ended: it
# would hold a place in the batch for nothing.
MAX_UNREAD_TOKENS = 4096


class State(Enum):
    QUEUED = auto()  # in the router's queue
    DISPATCHED = auto()  # an attempt is under way
    FINISHED = auto()  # the output is complete
    FAILED = auto()  # `failure` says why
    DROPPED = auto()  # cancelled by the client, or ended by a stop string


class Kind(NamedTuple):
    """What the hashes of blocks depend on. It is the same for all workers that are connected at one time."""

    fingerprint: str
    block_size: int


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A prompt as it is sent to workers of one kind."""

    block_hashes: list[bytes]
    sequence: worker_pb2.Sequence = field(default_factory=worker_pb2.Sequence)  # empty until it is first needed


@dataclass(frozen=True, slots=True)
class Prompt:
    token_ids: Sequence[int]
    min_length: int
    stop_token_ids: frozenset[int]
    cache_salt: str
    grammar: str = ""  # that answers must follow; see common/sampling/grammar.py
    # Made for the first attempt and shared by all choices: for a long prompt it takes milliseconds.
    encoded: dict[Kind, EncodedPrompt] = field(default_factory=dict, init=False, compare=False)


@dataclass(slots=True, eq=False)
class Request:
    id: str
    index: int
    serial: int  # order of arrival
    prompt: Prompt
    sampling: worker_pb2.SamplingParams
    mailbox: Mailbox["Request"]
    max_length: int  # tokens of prompt and output together at which the sequence ends
    # Set while a request waits that came before there were workers: makes `max_length` of the longest sequence that
    # they can hold, or raises InvalidArgument.
    recheck_length: Callable[[int | None], int] | None = None
    trace: Span = OFF  # of the call
    arrived_at: float = field(default_factory=time.monotonic)  # of the call, before its prompt was tokenized
    queued_at: float = field(default_factory=time.monotonic)
    state: State = State.QUEUED
    failure: CallError | None = None
    attempt: "Attempt | None" = None
    posted: bool = False  # in the mailbox, and not yet taken out
    output: list[int] = field(default_factory=list)  # but for what came while it is settled, see settled.py
    taken: int = 0  # tokens of the output that were put into messages to the client
    told_at: float | None = None  # time.monotonic() of the last of these
    complete: bool = False  # the last token was a stop token, or the last that `max_length` allows
    most_tokens: int = field(init=False)  # of output, for which `max_length` has room
    stop_token_ids: frozenset[int] = field(init=False)  # the prompt's, nearer to `add`
    wants_logprobs: bool = field(init=False)
    logprobs: list[bytes] = field(default_factory=list)  # of the tokens not yet taken, if the client asked for them
    kind: Kind | None = None  # that `block_hashes` are for
    block_hashes: list[bytes] = field(default_factory=list)
    attempts: int = 0
    resumes: int = 0  # attempts that were cut short: by preemption, by a fault, or by a worker that drained
    preemptions: int = 0
    faults: int = 0
    avoid: set[str] = field(default_factory=set)  # instances of workers on which an attempt failed
    prefill_cached_tokens: int = 0
    decode_cached_tokens: int | None = None
    timing: inference_pb2.Timing = field(default_factory=inference_pb2.Timing)

    def __post_init__(self) -> None:
        self.limit(self.max_length)
        self.stop_token_ids = self.prompt.stop_token_ids
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
        """Adds those of the token that is added next."""
        # Serialized: part of a message keeps the whole message alive, which is a step of the whole batch.
        self.logprobs.append(logprobs.SerializeToString())

    def take_logprobs(self, count: int) -> list[worker_pb2.Logprobs]:
        """Removes and returns those of the next `count` tokens."""
        taken = [worker_pb2.Logprobs.FromString(packed) for packed in self.logprobs[:count]]
        del self.logprobs[:count]
        return taken

    def headroom(self, first: int) -> int:
        """Output tokens that the next attempt reserves blocks for: `first`, doubled by each preemption, so that a
        request which outgrew its reservation a few times asks for all that it may need."""
        return min(self.remaining, max(first, 1) << self.preemptions)

    def add(self, token: int) -> None:
        """Adds the next token of the output. Not to be called once the request is complete."""
        output = self.output
        output.append(token)
        if token in self.stop_token_ids or len(output) >= self.most_tokens:
            self.complete = True
        if not self.posted:
            self.posted = True
            self.mailbox.post(self)
        elif len(output) - self.taken > MAX_UNREAD_TOKENS:
            self.mailbox.overflow()

    def end(self, failure: CallError | None = None) -> None:
        """Without a failure, the output is complete."""
        self.state = State.FINISHED if failure is None else State.FAILED
        self.failure = failure
        self.post()

    def post(self) -> None:
        """Says that there is news, if that has not been said yet."""
        if not self.posted:
            self.posted = True
            self.mailbox.post(self)


@dataclass(slots=True, eq=False)
class Attempt:
    """One try at a request on a pair of workers, or on a decode worker that prefills the prompt itself (`in_place`).

    A worker becomes None once it holds nothing for the attempt any more.
    """

    id: int
    request: Request
    prefill: "Worker | None"
    decode: "Worker | None"
    prefill_tokens: int  # to be computed by the worker that prefills, as far as the router knows its cache
    decode_blocks: int  # that the decode worker was asked to reserve
    in_place: bool
    length: int  # of the request when the attempt began: tokens of prompt and output
    trace: Span = OFF
    dispatched_at: float = field(default_factory=time.monotonic)
    prefilled: worker_pb2.Prefilled | None = None
    reserved: bool = False
    decode_cached_tokens: int = 0
    decoding_since: float | None = None
