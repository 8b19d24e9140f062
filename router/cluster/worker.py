"""One connected worker, from its hello to the end of its stream: what it has to do, its room, and messages to it."""

import time
from collections.abc import Collection
from typing import TypeVar

from router.cluster.circuit import Circuit
from router.cluster.outbox import Outbox, most_bytes_of
from router.cluster.prefix_index import PrefixIndex
from router.cluster.worker_faults import WorkerFault
from router.dispatch.decoding import Decoding
from router.dispatch.request import Attempt, Kind, Request
from twostroke.v1 import inference_pb2, worker_pb2

# Seconds before a worker that refused an attempt gets another; a decode worker also gets one when a sequence ends
# there. With each refusal the other worker of the pair has begun in vain.
REFUSAL_PAUSE = 0.1

# Tokens whose KV comes from host memory while one is computed. It is 10 with Llama-3.1-8B on an H200, and less with
# smaller models.
LOADED_WHILE_COMPUTED = 8

# A prefill worker is sent prompts for so many batches ahead. The rest waits in the router, where it can go to any
# worker.
BATCHES_AHEAD = 2


class Worker:
    """What the router knows of a worker, and the messages that it has for it.

    A restarted worker, or one that was connected to again, is another `Worker`: nothing that is meant for the old one
    can reach the new one.
    """

    def __init__(self, address: str, hello: worker_pb2.WorkerHello, circuit: Circuit) -> None:
        self.address = address
        self.hello = hello
        self.circuit = circuit
        self.instance = hello.instance
        self.kind = Kind(hello.fingerprint, hello.pool.layout.block_size)
        self.role = hello.role
        self.host = hello.host
        # Read for each waiting request. From the message, each would take several times as long.
        self._block_size = hello.pool.layout.block_size
        self._max_batch = max(hello.max_batch, 1)
        self._max_length = hello.max_length
        self._prefill_tokens = hello.prefill_tokens
        self._overflow_tokens = hello.prefill_overflow_tokens
        self._overflow_seconds = hello.prefill_overflow_seconds
        self.can_prefill = max(self._prefill_tokens, self._overflow_tokens) > 0  # decode: where nobody else can
        self.load = inference_pb2.WorkerLoad(role=hello.role)
        self.attempts: dict[int, Attempt] = {}
        self.decoding = Decoding()
        self.cache = PrefixIndex()
        self.reads: frozenset[str] = frozenset()  # decode: instances of the prefill workers that it is a pair with
        self.unreadable: dict[str, str] = {}  # decode: why it is none with those on its host
        self.draining = False  # it turned an attempt away as draining; for this instance that is final
        self.pending_tokens = 0  # prompt tokens that it has yet to compute for this router
        self._unanswered_blocks = 0  # decode: in reservations that it has not answered yet
        self._room = hello.pool.layout.num_blocks  # decode: blocks that can still be reserved, as far as is known
        self._others = 0  # decode: sequences of other routers
        self._others_tokens = 0  # prefill: prompt tokens that it has yet to compute for other routers
        self._refused_at = 0.0  # time.monotonic(); 0 if it may be asked again
        self.outbox = Outbox()

    def begin(self, attempt: Attempt) -> None:
        self.attempts[attempt.id] = attempt
        self.circuit.begin(attempt.id)
        self.cache.begin(attempt.request.block_hashes, self._computes(attempt))
        if self._computes(attempt):
            self.pending_tokens += attempt.prefill_tokens

    def prefilled(self, attempt: Attempt) -> None:
        """The attempt's prompt was computed here."""
        self.pending_tokens -= attempt.prefill_tokens

    def end(self, attempt: Attempt) -> None:
        # The request's hashes are still those of `begin`: more are added only before the next attempt.
        del self.attempts[attempt.id]
        self.circuit.ended(attempt.id)
        self.decoding.end(attempt.id)
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
        """Whether a sequence of so many tokens fits this worker when it is idle."""
        return tokens <= self._max_length

    def missing_tokens(self, request: Request) -> int:
        """Tokens of the request that it does not have and would have to compute; always the last one at least. Those
        that it would load count as what it computes in that time."""
        found = self.cache.computed(request.block_hashes)
        loaded = self.cache.loaded(request.block_hashes, found) * self._block_size // LOADED_WHILE_COMPUTED
        return max(request.length - found * self._block_size, 1) + loaded

    @property
    def pair_problems(self) -> list[str]:
        """decode: why it is no pair with some of the prefill workers on its host."""
        return [f"cannot read the KV of a prefill worker: {problem}" for problem in self.unreadable.values()]

    def prefills(self, request: Request) -> bool:
        """decode: whether it prefills this prompt itself, since so little is uncached that a hand-over costs more."""
        return self._lacks_at_most(request, self._prefill_tokens)

    def helps_out(self, request: Request) -> bool:
        """decode: whether it prefills this prompt while all prefill workers are busy. It takes one such prompt at a
        time, so that the sequences that it decodes get some steps in between. A request that is resumed has waited
        enough."""
        if self.pending_tokens or not self._lacks_at_most(request, self._overflow_tokens):
            return False
        return bool(request.output) or time.monotonic() - request.arrived_at >= self._overflow_seconds

    def _lacks_at_most(self, request: Request, tokens: int) -> bool:
        """Whether `missing_tokens` is at most `tokens`. Where it is not, that mostly takes one look-up: every waiting
        request is asked about again and again."""
        if not tokens:
            return False
        needed = self.blocks(request.length - tokens)
        if needed > len(request.block_hashes):
            return False
        if needed > 0 and not self.cache.may_have_computed(request.block_hashes[needed - 1]):
            return False
        return self.missing_tokens(request) <= tokens

    def new_blocks(self, request: Request, tokens: int) -> int:
        """Blocks that the request takes from the room until it has `tokens` tokens; those that it shares are not
        counted."""
        return self.blocks(tokens) - self.cache.shared(request.block_hashes)

    def has_room(self, request: Request, tokens: int) -> bool:
        """decode: whether the request can be sent now, with blocks reserved for `tokens` tokens."""
        if len(self.attempts) + self._others >= self._max_batch:
            return False
        lacking = self.blocks(tokens) - self.room
        return lacking <= 0 or self._shares_at_least(request, lacking)

    def _shares_at_least(self, request: Request, blocks: int) -> bool:
        """Whether so many of its blocks take no room. As in `_lacks_at_most`, where it is not so that mostly takes one
        look-up."""
        hashes = request.block_hashes
        if blocks > len(hashes) or not self.cache.may_share(hashes[blocks - 1]):
            return False
        return self.cache.shared(hashes) >= blocks

    @property
    def room(self) -> int:
        """Blocks that a new sequence can reserve, as far as the router knows."""
        return 0 if self._refuses else self._room

    @property
    def tokens_ahead(self) -> int:
        """prefill: prompt tokens that it has yet to compute, for this router and others, as far as is known."""
        return self.pending_tokens + self._others_tokens

    @property
    def accepts_prefill(self) -> bool:
        # Of this router's tokens alone: else one router that keeps the worker busy would keep all others out.
        return not self._refuses and self.pending_tokens < BATCHES_AHEAD * self._max_batch

    @property
    def _refuses(self) -> bool:
        return bool(self._refused_at) and time.monotonic() - self._refused_at < REFUSAL_PAUSE

    def note_refusal(self) -> None:
        """It turned an attempt away because it is full."""
        self._refused_at = time.monotonic()

    def reserve(self, blocks: int) -> None:
        self._room -= blocks
        self._unanswered_blocks += blocks

    def reservation_answered(self, blocks: int) -> None:
        """A reservation of so many blocks was answered, or its answer no longer matters: from now on the worker's load
        has it counted in."""
        self._unanswered_blocks -= blocks

    def release(self, blocks: int) -> None:
        """Blocks of a sequence come free, at the latest when the worker is told that it has ended."""
        self._room += blocks
        self._refused_at = 0.0

    def take_cache(self, changes: worker_pb2.CacheChanges) -> None:
        """
        Raises:
            WorkerFault: more blocks would be cached than the worker has.
        """
        self.cache.apply(changes)
        _check_count(self.cache.published, self.hello.pool.layout.num_blocks)

    def take_host_cache(self, changes: worker_pb2.CacheChanges) -> None:
        """Raises WorkerFault, in the same way, of the blocks in the worker's host memory."""
        self.cache.apply_host(changes)
        _check_count(self.cache.in_host_memory, self.hello.host_blocks)

    def take_load(self, load: inference_pb2.WorkerLoad) -> None:
        """Replaces the router's own estimate by what the worker reports. Everything else in the same message must have
        been taken in before, since the load has it counted in. Reservations that it has not answered yet are not in
        it."""
        self.load = load
        self._room = load.blocks.free + load.blocks.cached - load.blocks.reserved - self._unanswered_blocks
        held = sum(attempt.reserved for attempt in self.attempts.values())
        self._others = max(load.waiting + load.running - held, 0)
        self._others_tokens = max(load.pending_tokens - self.pending_tokens, 0)

    # ------------------------------------------------------------ sending

    def send_prefill(self, prefill: worker_pb2.Prefill, sequence: worker_pb2.Sequence) -> None:
        _put(self.outbox.last(most_bytes_of(sequence)).prefills.add(), prefill, sequence)

    def send_reserve(self, reserve: worker_pb2.Reserve, sequence: worker_pb2.Sequence) -> None:
        _put(self.outbox.last(most_bytes_of(sequence)).reserves.add(), reserve, sequence)

    def send_pool(self, pool: worker_pb2.PoolHandle) -> None:
        self.outbox.last(pool.ByteSize()).pools.append(pool)

    def send_start(self, start: worker_pb2.Start) -> None:
        self.outbox.last(start.ByteSize()).starts.append(start)

    def send_claim(self, blocks: int) -> None:
        self.outbox.last().claimed_blocks = blocks

    def send_ended(self, attempt_id: int) -> None:
        self.outbox.last().ended.append(attempt_id)


def _check_count(found: Collection[bytes], blocks: int) -> None:
    if len(found) > blocks:
        raise WorkerFault(f"it can find {len(found)} of {blocks} blocks")


M = TypeVar("M", worker_pb2.Prefill, worker_pb2.Reserve)


def _put(place: M, message: M, sequence: worker_pb2.Sequence) -> None:
    # `CopyFrom`, because `append` and constructors serialize and parse what they are given: milliseconds for a long
    # prompt.
    place.CopyFrom(message)
    place.sequence.CopyFrom(sequence)
