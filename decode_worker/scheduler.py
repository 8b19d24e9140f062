"""Which sequences are admitted and which run: reservation, growth block by block, preemption.

A sequence is admitted with blocks for its prompt and a promise of more for some output. Promised blocks are counted but
not taken, so the prefix cache can use them until they are needed.
"""

import time
from collections.abc import Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from enum import Enum, auto

from common.kv.block_pool import BlockPool
from common.kv.kv_pool import blocks_for
from common.kv.prefix_hash import extend
from common.sampling.guided_sampling import GrammarState
from common.sequence import SequenceSpec
from common.telemetry.tracing import OFF, Span


class State(Enum):
    RESERVED = auto()  # has its blocks and waits for the prefill worker
    PULLING = auto()  # its KV is on its way
    PREFILLING = auto()  # is prefilled here; until that is done, its blocks belong to the prefill scheduler
    RUNNING = auto()
    OVER = auto()  # keeps its blocks only until the launched steps that write to them are over


@dataclass(slots=True, eq=False)
class Sequence:
    attempt_id: int
    connection: int  # of the router that asked for it
    spec: SequenceSpec
    tokens: list[int]  # prompt and output, as far as the host has read them
    state: State = State.RESERVED
    blocks: list[int] = field(default_factory=list)
    cached_blocks: int = 0  # leading blocks that the pool already had, or got from host memory
    loaded_blocks: int = 0  # those of them that came from there
    promised: int = 0  # blocks for output that are not taken yet
    safe_length: int = 0  # tokens up to which it is not preempted while others can be: it has reserved room for them
    last_hash: bytes = b""  # of the last full block
    kv_len: int = 0  # tokens whose KV is there or is being computed by launched steps, without drafts
    drafts_in_flight: int = 0  # of launched steps: so many further tokens may turn out to have KV
    drafts_kept: float = 1.0  # of a step with drafts, averaged over the last ones
    writes_in_flight: int = 0  # to its blocks: launched steps that have not been read, and a pull
    grammar: GrammarState | None = None  # how far the output is in its grammar, if it follows one
    trace: Span = OFF  # of the attempt
    received_at: float = field(default_factory=time.monotonic)
    running_since: float = 0.0

    @property
    def reach(self) -> int:
        """The most that `kv_len` may turn out to be."""
        return self.kv_len + self.drafts_in_flight

    @property
    def wants_step(self) -> bool:
        """Whether another step is needed: one at position kv_len makes the token at index kv_len + 1."""
        return self.state is State.RUNNING and self.kv_len + 1 < self.spec.max_length


class Scheduler:
    """Owns the worker's sequences and their blocks. O(1) per block; only preemption goes through all sequences."""

    def __init__(self, blocks: BlockPool, block_size: int, max_batch: int) -> None:
        self._blocks = blocks
        self._block_size = block_size
        self._max_batch = max_batch
        self._sequences: dict[int, Sequence] = {}
        self.promised = 0  # blocks, to all sequences

    @property
    def count(self) -> int:
        return len(self._sequences)

    @property
    def running_count(self) -> int:
        return sum(sequence.state is State.RUNNING for sequence in self._sequences.values())

    @property
    def waiting_count(self) -> int:
        return len(self._sequences) - self.running_count

    def get(self, attempt_id: int) -> Sequence | None:
        return self._sequences.get(attempt_id)

    def of_connection(self, connection: int) -> list[Sequence]:
        return [sequence for sequence in self._sequences.values() if sequence.connection == connection]

    def reserve(self, sequence: Sequence, headroom_tokens: int, kept_blocks: int = 0) -> bool:
        """Takes blocks for the sequence's tokens, and a promise of blocks for `headroom_tokens` more. False if there is
        no room; then nothing is taken. `kept_blocks`: are for another one, with a place in the batch."""
        if len(self._sequences) + (kept_blocks > 0) >= self._max_batch:
            return False
        length = len(sequence.tokens)
        spec = sequence.spec
        prefills = sequence.state is State.PREFILLING
        hits = self._blocks.match(spec.hashes_before_last_token(self._block_size) if prefills else spec.block_hashes)
        for_prompt = blocks_for(length, self._block_size)
        # The very last token is never run, so it needs no room for KV.
        safe_length = min(length + headroom_tokens, spec.max_length - 1)
        promised = max(blocks_for(safe_length, self._block_size) - for_prompt, 0)
        missing = for_prompt - len(hits)
        if missing + promised > self._blocks.available - self.promised - kept_blocks:
            self._blocks.release(hits)
            return False
        sequence.blocks = hits + self._blocks.allocate(missing)
        sequence.cached_blocks = len(hits)
        sequence.promised = promised
        sequence.safe_length = safe_length
        sequence.kv_len = length
        self.promised += promised
        self._sequences[sequence.attempt_id] = sequence
        return True

    def start(self, sequence: Sequence) -> None:
        """The sequence's KV is in place: it may run, and its full blocks are published."""
        sequence.state = State.RUNNING
        hashes = sequence.spec.block_hashes
        for index in range(sequence.cached_blocks, len(hashes)):
            self._blocks.publish(sequence.blocks[index], hashes[index])
        sequence.last_hash = hashes[-1] if hashes else sequence.spec.cache_root

    def grow(self, running: Items[Sequence], drafts: int = 0) -> list[Sequence]:
        """Gives each sequence the block that its next step writes to, and if there is room for all, those that so many
        drafts would be written to. Returns the sequences that cannot run yet: no block is left, or it takes the result
        of launched steps to know whether they end before that step."""
        starved = []
        for sequence in running:
            needed, most = sequence.reach + 1, sequence.spec.max_length
            if needed < most and needed <= len(sequence.blocks) * self._block_size:
                continue  # as for nearly all
            if sequence.wants_step and (needed >= most or not self._grow_to(sequence, needed)):
                starved.append(sequence)
        if drafts and not starved:
            for sequence in running:
                if sequence.wants_step:
                    self._grow_to(sequence, min(sequence.reach + 1 + drafts, sequence.spec.max_length - 1))
        return starved

    def _grow_to(self, sequence: Sequence, tokens: int) -> bool:
        """Whether there are blocks now for so many tokens."""
        while len(sequence.blocks) * self._block_size < tokens:
            if sequence.promised:
                sequence.promised -= 1
                self.promised -= 1
            elif self._blocks.available <= self.promised:
                return False
            sequence.blocks += self._blocks.allocate(1)
        return True

    def give_back_drafts_blocks(self, running: Iterable[Sequence]) -> None:
        """Releases the blocks that only drafts would be written to, and promises again those of them that were. To be
        called while no step is in flight."""
        for sequence in running:
            kept = blocks_for(sequence.kv_len + 1, self._block_size)
            drafts_blocks = sequence.blocks[kept:]
            del sequence.blocks[kept:]
            self._blocks.release(drafts_blocks)
            promised = max(blocks_for(sequence.safe_length, self._block_size) - len(sequence.blocks), 0)
            self.promised += promised - sequence.promised
            sequence.promised = promised

    def cheapest(self) -> Sequence:
        """The running sequence that costs least to bring back: the one with the fewest tokens to prefill again.

        Sequences that have not made the tokens yet that room was reserved for come last. A starved sequence has made
        them, so there is another one for as long as they are safe. Routers ask for more with each preemption, up to all
        that a sequence may need, so there is progress however scarce blocks are.
        """
        running = (sequence for sequence in self._sequences.values() if sequence.state is State.RUNNING)
        return min(running, key=lambda sequence: (len(sequence.tokens) <= sequence.safe_length, len(sequence.tokens)))

    def deliver(self, sequence: Sequence, token: int) -> None:
        """Adds the token that a step made behind those whose KV is there now."""
        sequence.tokens.append(token)
        computed = len(sequence.tokens) - 1
        if computed % self._block_size == 0:
            block_tokens = sequence.tokens[computed - self._block_size : computed]
            sequence.last_hash = extend(sequence.last_hash, block_tokens)
            self._blocks.publish(sequence.blocks[computed // self._block_size - 1], sequence.last_hash)

    def end(self, sequence: Sequence) -> None:
        """Takes the sequence out. Its blocks are released now, or after the last launched step that writes to them."""
        if sequence.state is State.OVER:
            return
        sequence.state = State.OVER
        self.promised -= sequence.promised
        sequence.promised = 0
        del self._sequences[sequence.attempt_id]
        self.release_if_idle(sequence)

    def release_if_idle(self, sequence: Sequence) -> None:
        if sequence.state is State.OVER and sequence.writes_in_flight == 0:
            blocks, sequence.blocks = sequence.blocks, []
            self._blocks.release(blocks)
