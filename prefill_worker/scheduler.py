"""Which prompts run next: first come, first served, within a token budget, long prompts in chunks."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from common.kv.block_pool import BlockPool
from common.kv.host_cache import HostCache, Load
from common.kv.kv_pool import blocks_for
from common.sampling.guided_sampling import GrammarState
from common.sequence import SequenceSpec
from common.telemetry.tracing import OFF, Span


@dataclass(slots=True, eq=False)
class Prompt:
    """A prompt on its way through the worker; it belongs to the scheduler until its last chunk has run."""

    attempt_id: int
    connection: int  # of the router that asked for it
    spec: SequenceSpec
    blocks: list[int] = field(default_factory=list)  # all or none; a decode worker's own prompts come with theirs
    cached_len: int = 0  # tokens whose KV was found, in the pool or in host memory
    loaded_len: int = 0  # those of them that were in host memory only
    launched_len: int = 0  # tokens whose KV is there, being computed or being loaded
    computed_len: int = 0  # tokens whose KV is there
    dropped: bool = False  # its blocks are released once its last launched chunk is computed, and its load is over
    awaited: int = 0  # index of the first block that it lacked when it was last looked up
    grammar: GrammarState | None = None  # how far the output is in its grammar, if it follows one
    uncached_tokens: int = 0  # by the router's estimate when it sent the prompt
    trace: Span = OFF  # of the attempt
    received_at: float = field(default_factory=time.monotonic)

    @property
    def length(self) -> int:
        return len(self.spec.token_ids)

    @property
    def loading(self) -> bool:
        """Whether KV is on its way from host memory."""
        return self.computed_len < self.cached_len


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens [start, end) of a prompt, to be computed in one batch."""

    prompt: Prompt
    start: int
    end: int

    @property
    def is_last(self) -> bool:
        return self.end == self.prompt.length


def max_chunks(tokens: int) -> int:
    """Most chunks in a batch of up to this many tokens. A CUDA graph has room for a fixed number of chunks, and each
    costs a little even when it is empty."""
    return min(max(tokens // 8, 8), 128)


class Scheduler:
    """The waiting queue and the running prompts. Every operation is O(1) per prompt or block."""

    def __init__(
        self, blocks: BlockPool, block_size: int, max_batch_tokens: int, host_cache: HostCache | None = None
    ) -> None:
        self._blocks = blocks
        self._host_cache = host_cache
        self._block_size = block_size
        self._max_batch_tokens = max_batch_tokens
        self._max_batch_chunks = max_chunks(max_batch_tokens)
        self._waiting: dict[int, Prompt] = {}  # in order of arrival
        self._running: dict[int, Prompt] = {}  # have blocks, and chunks left to launch or to finish
        self._loading: list[tuple[Prompt, Load]] = []
        self._computing: set[bytes] = set()  # hashes of blocks that a running prompt has yet to publish
        self.waits_for_grammar = False  # a prompt was left out of the last batch for that

    @property
    def waiting_count(self) -> int:
        return len(self._waiting)

    @property
    def running_count(self) -> int:
        return len(self._running)

    @property
    def waits_for_load(self) -> bool:
        """Whether KV is on its way from host memory."""
        return bool(self._loading)

    @property
    def pending_tokens(self) -> int:
        """Tokens to compute for the prompts that are here, by their routers' estimates. Each router takes its own share
        of them away, so they must be counted as routers do: a prompt whole until it is complete."""
        prompts = (*self._waiting.values(), *self._running.values())
        return sum(prompt.uncached_tokens for prompt in prompts if not prompt.dropped)

    def has(self, attempt_id: int) -> bool:
        return attempt_id in self._waiting or attempt_id in self._running

    def add(self, prompt: Prompt) -> None:
        self._waiting[prompt.attempt_id] = prompt

    def drop(self, attempt_id: int) -> None:
        """Takes a prompt out, whatever its state. Does nothing if it is not here."""
        if (waiting := self._waiting.pop(attempt_id, None)) is not None:
            self._blocks.release(waiting.blocks)
            return
        prompt = self._running.get(attempt_id)
        if prompt is None:
            return
        prompt.dropped = True
        self._release_if_idle(prompt)

    def drop_connection(self, connection: int) -> None:
        for prompt in [*self._waiting.values(), *self._running.values()]:
            if prompt.connection == connection:
                self.drop(prompt.attempt_id)

    def schedule(self) -> list[Chunk]:
        """The next batch; empty when nothing can run now."""
        self.waits_for_grammar = False
        self._end_loads()
        budget = self._max_batch_tokens
        chunks: list[Chunk] = []
        for prompt in self._candidates():
            start = prompt.launched_len
            prompt.launched_len = min(prompt.length, start + budget)
            chunks.append(Chunk(prompt, start, prompt.launched_len))
            budget -= prompt.launched_len - start
            if budget == 0 or len(chunks) == self._max_batch_chunks:
                break
        return chunks

    def finish(self, chunk: Chunk) -> bool:
        """Publishes the blocks that a computed chunk completed. Returns True if that was the whole prompt; its blocks
        then belong to the caller."""
        prompt = chunk.prompt
        self._advance(prompt, chunk.end)
        if prompt.dropped:
            return False
        if chunk.is_last:
            self._leave(prompt)
            if self._host_cache is not None:
                self._host_cache.touch(prompt.spec.block_hashes)
        return chunk.is_last

    def _advance(self, prompt: Prompt, end: int) -> None:
        """The KV of the prompt's first `end` tokens is there."""
        for index in range(prompt.computed_len // self._block_size, end // self._block_size):
            self._blocks.publish(prompt.blocks[index], prompt.spec.block_hashes[index])
            self._computing.discard(prompt.spec.block_hashes[index])
        prompt.computed_len = end
        if prompt.dropped:
            self._release_if_idle(prompt)

    def _candidates(self) -> Iterator[Prompt]:
        for prompt in self._running.values():
            if prompt.launched_len < prompt.length and not prompt.dropped and not prompt.loading:
                yield prompt
        for prompt in list(self._waiting.values()):
            if prompt.grammar is not None and not prompt.grammar.ready:
                self.waits_for_grammar = True
                continue
            if self._is_being_computed(prompt):
                continue
            if not self._admit(prompt):
                return
            if not prompt.loading:
                yield prompt

    def _is_being_computed(self, prompt: Prompt) -> bool:
        """Whether a running prompt is about to publish the first block that this one lacks. Waiting for it costs less
        than computing it, or loading it, twice.

        Blocks that were there at an earlier look are not looked up again: all prompts that wait are asked before every
        batch, and thousands of blocks may precede the one that they wait for. If one of those was evicted since, the
        worst is that the prompt waits for nothing until the running one is done.
        """
        if not self._computing:
            return False
        hashes, last = prompt.spec.block_hashes, prompt.spec.blocks_before_last_token(self._block_size)
        while prompt.awaited < last and self._has(hashes[prompt.awaited]):
            prompt.awaited += 1
        return prompt.awaited < last and hashes[prompt.awaited] in self._computing

    def _admit(self, prompt: Prompt) -> bool:
        """Gives a waiting prompt its blocks: the cached ones, and fresh ones for the rest, into which it loads what is
        in host memory. False if there are too few. A prompt that came with blocks swaps those for cached ones where it
        can."""
        hashes = prompt.spec.hashes_before_last_token(self._block_size)
        hits = self._blocks.match(hashes)
        missing = 0 if prompt.blocks else blocks_for(prompt.length, self._block_size) - len(hits)
        if missing > self._blocks.available:
            self._blocks.release(hits)
            return False
        self._blocks.release(prompt.blocks[: len(hits)])
        prompt.blocks = hits + prompt.blocks[len(hits) :] + self._blocks.allocate(missing)
        prompt.cached_len = prompt.launched_len = prompt.computed_len = len(hits) * self._block_size
        del self._waiting[prompt.attempt_id]
        self._running[prompt.attempt_id] = prompt
        self._computing.update(prompt.spec.block_hashes[len(hits) :])
        if self._host_cache is not None:
            self._begin_load(prompt, self._host_cache.load(hashes[len(hits) :], prompt.blocks[len(hits) :]))
        return True

    def _begin_load(self, prompt: Prompt, load: Load | None) -> None:
        if load is None:
            return
        prompt.loaded_len = load.count * self._block_size
        prompt.cached_len = prompt.launched_len = prompt.cached_len + prompt.loaded_len
        self._loading.append((prompt, load))

    def _end_loads(self) -> None:
        loading, self._loading = self._loading, []
        for prompt, load in loading:
            if load.arrived():
                self._advance(prompt, prompt.launched_len)
            else:
                self._loading.append((prompt, load))

    def _has(self, block_hash: bytes) -> bool:
        """Whether it is in the pool, or in host memory and nobody is loading it."""
        if self._blocks.finds(block_hash):
            return True
        host_cache = self._host_cache
        return host_cache is not None and host_cache.finds(block_hash) and block_hash not in self._computing

    def _release_if_idle(self, dropped: Prompt) -> None:
        """Takes a dropped prompt out, unless a chunk or a load that writes to its blocks is still under way."""
        if dropped.launched_len == dropped.computed_len:
            self._leave(dropped)
            self._blocks.release(dropped.blocks)

    def _leave(self, prompt: Prompt) -> None:
        del self._running[prompt.attempt_id]
        self._computing.difference_update(prompt.spec.block_hashes)
