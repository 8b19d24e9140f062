"""One connected worker, from its hello to the end of its stream."""

import asyncio
import time
from typing import TypeVar

from router.circuit import Circuit
from router.prefix_index import PrefixIndex
from router.request import Attempt, Kind, Request
from router.worker_faults import WorkerFault
from twostroke.v1 import inference_pb2, worker_pb2

# A worker that refused is asked again after so many seconds, a decode worker also when a sequence ends there: each time
# that it refuses, the other one of the pair has begun in vain.
REFUSAL_PAUSE = 0.1

# A prefill worker gets work for so many batches ahead; the rest waits in the router's queue, and can go anywhere.
BATCHES_AHEAD = 2


class Worker:
    """What the router knows of a worker, and what it has to tell it.

    A restarted worker is a new `Worker`, whatever its address, so nothing meant for the old one can reach it.
    """

    def __init__(self, address: str, hello: worker_pb2.WorkerHello, circuit: Circuit) -> None:
        self.address = address
        self.hello = hello
        self.circuit = circuit
        self.instance = hello.instance
        self.kind = Kind(hello.fingerprint, hello.pool.layout.block_size)
        self.role = hello.role
        self.host = hello.host
        # Read for each request that waits: out of the message, each would take several times as long.
        self._block_size = hello.pool.layout.block_size
        self._max_batch = max(hello.max_batch, 1)
        self._max_length = hello.max_length
        self._prefill_tokens = hello.prefill_tokens
        self._overflow_tokens = hello.prefill_overflow_tokens
        self.can_prefill = max(self._prefill_tokens, self._overflow_tokens) > 0  # decode: where nobody else can
        self.load = inference_pb2.WorkerLoad(role=hello.role)
        self.attempts: dict[int, Attempt] = {}
        self.decoding: dict[int, Request] = {}
        self.cache = PrefixIndex()
        self.reads: frozenset[str] = frozenset()  # decode: instances of the prefill workers that it is a pair with
        self.unreadable: dict[str, str] = {}  # decode: why it is none with those on its host
        self.draining = False  # it said so of an attempt: it takes none any more, whatever else it says
        self.pending_tokens = 0  # to be computed here for prompts that were sent, and not yet answered
        self._unanswered_blocks = 0  # decode: asked for, and not yet answered
        self._room = hello.pool.layout.num_blocks  # decode: blocks that can still be asked for, as far as is known
        self._others = 0  # decode: sequences that other routers have there
        self._refused_at = 0.0
        self._outgoing = worker_pb2.RouterMessage()
        self._has_outgoing = asyncio.Event()

    def begin(self, attempt: Attempt) -> None:
        self.attempts[attempt.id] = attempt
        self.circuit.begin(attempt.id)
        self.cache.begin(attempt.request.block_hashes, self._computes(attempt))
        if self._computes(attempt):
            self.pending_tokens += attempt.prefill_tokens

    def prefilled(self, attempt: Attempt) -> None:
        """It computed the attempt's prompt."""
        self.pending_tokens -= attempt.prefill_tokens

    def end(self, attempt: Attempt) -> None:
        # The request's hashes are still those that the attempt began with: only the next attempt adds to them.
        del self.attempts[attempt.id]
        self.circuit.left(attempt.id)
        self.decoding.pop(attempt.id, None)
        self.cache.end(attempt.request.block_hashes, self._computes(attempt))
        if self._computes(attempt) and attempt.prefilled is None:
            self.pending_tokens -= attempt.prefill_tokens

    def _computes(self, attempt: Attempt) -> bool:
        return attempt.in_place or self.role == inference_pb2.WORKER_ROLE_PREFILL

    # ------------------------------------------------------------ room

    def blocks(self, tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-tokens // self._block_size)

    def can_hold(self, tokens: int) -> bool:
        """Whether a sequence of so many tokens could ever be served."""
        return tokens <= self._max_length

    def missing_tokens(self, request: Request) -> int:
        """Tokens of the request that it would have to compute: those it will not find, at least the last one."""
        return max(request.length - self.cache.computed(request.block_hashes) * self._block_size, 1)

    @property
    def pair_problems(self) -> list[str]:
        """decode: what keeps it from being a pair with prefill workers that are there."""
        return [f"cannot read the KV of a prefill worker: {problem}" for problem in self.unreadable.values()]

    def prefills(self, request: Request) -> bool:
        """decode: whether a hand-over of this prompt costs more than it saves."""
        return self._lacks_at_most(request, self._prefill_tokens)

    def helps_out(self, request: Request) -> bool:
        """decode: whether it would prefill this prompt before a prefill worker has time. One at a time, so that the
        sequences that it decodes get a few steps between two prompts."""
        return self.pending_tokens == 0 and self._lacks_at_most(request, self._overflow_tokens)

    def _lacks_at_most(self, request: Request, tokens: int) -> bool:
        """As `missing_tokens` says, but a no mostly comes after one look: whatever waits is asked about again with
        every message of every worker."""
        if not tokens:
            return False
        needed = self.blocks(request.length - tokens)
        if needed > len(request.block_hashes):
            return False
        if needed > 0 and not self.cache.may_have_computed(request.block_hashes[needed - 1]):
            return False
        return self.missing_tokens(request) <= tokens

    def new_blocks(self, request: Request, tokens: int) -> int:
        """Blocks that the request would take from its room, if it grew to so many tokens."""
        return self.blocks(tokens) - self.cache.shared(request.block_hashes)

    def has_room(self, request: Request, tokens: int) -> bool:
        """decode: whether the request could come now, and grow to so many tokens."""
        if len(self.attempts) + self._others >= self._max_batch:
            return False
        return self.room >= self.blocks(tokens) or self.room >= self.new_blocks(request, tokens)

    @property
    def room(self) -> int:
        """Blocks that a new sequence may hope for."""
        return 0 if self._refuses else self._room

    @property
    def accepts_prefill(self) -> bool:
        return not self._refuses and self.pending_tokens < BATCHES_AHEAD * self._max_batch

    @property
    def _refuses(self) -> bool:
        return bool(self._refused_at) and time.monotonic() - self._refused_at < REFUSAL_PAUSE

    def is_full(self) -> None:
        """It said so of an attempt, which it did not take."""
        self._refused_at = time.monotonic()

    def reserve(self, blocks: int) -> None:
        self._room -= blocks
        self._unanswered_blocks += blocks

    def await_no_answer(self, blocks: int) -> None:
        """It answered for blocks that were asked for, or its answer no longer matters: what it reports counts."""
        self._unanswered_blocks -= blocks

    def give_back(self, blocks: int) -> None:
        """Blocks that a sequence held come free, or will as soon as the worker hears of it."""
        self._room += blocks
        self._refused_at = 0.0

    def take_cache(self, changes: worker_pb2.CacheChanges) -> None:
        """
        Raises:
            WorkerFault: it can find more blocks than it has.
        """
        self.cache.apply(changes)
        if len(self.cache) > self.hello.pool.layout.num_blocks:
            raise WorkerFault(f"it can find {len(self.cache)} of {self.hello.pool.layout.num_blocks} blocks")

    def take_load(self, load: inference_pb2.WorkerLoad) -> None:
        """What the worker says of itself, once all else that it says in the same message was taken in: that is in the
        load already. What it had not yet heard of when it wrote that still counts."""
        self.load = load
        self._room = load.blocks.free + load.blocks.cached - load.blocks.reserved - self._unanswered_blocks
        held = sum(attempt.reserved for attempt in self.attempts.values())
        self._others = max(load.waiting + load.running - held, 0)

    # ------------------------------------------------------------ sending

    def send_prefill(self, prefill: worker_pb2.Prefill, sequence: worker_pb2.Sequence) -> None:
        _put(self._outgoing.prefills.add(), prefill, sequence)
        self._has_outgoing.set()

    def send_reserve(self, reserve: worker_pb2.Reserve, sequence: worker_pb2.Sequence) -> None:
        _put(self._outgoing.reserves.add(), reserve, sequence)
        self._has_outgoing.set()

    def send_pool(self, pool: worker_pb2.PoolHandle) -> None:
        self._outgoing.pools.append(pool)
        self._has_outgoing.set()

    def send_start(self, start: worker_pb2.Start) -> None:
        self._outgoing.starts.append(start)
        self._has_outgoing.set()

    def send_ended(self, attempt_id: int) -> None:
        self._outgoing.ended.append(attempt_id)
        self._has_outgoing.set()

    async def next_message(self) -> worker_pb2.RouterMessage:
        """Everything that was queued since the last call, as one message."""
        await self._has_outgoing.wait()
        self._has_outgoing.clear()
        message, self._outgoing = self._outgoing, worker_pb2.RouterMessage()
        return message


M = TypeVar("M", worker_pb2.Prefill, worker_pb2.Reserve)


def _put(place: M, message: M, sequence: worker_pb2.Sequence) -> None:
    # Copied into its place: `append` and a constructor's argument write and parse what they are given, which for a long
    # prompt takes milliseconds.
    place.CopyFrom(message)
    place.sequence.CopyFrom(sequence)
