"""Prompts that this worker prefills itself: the prefill worker's loop beside its own, on the same pool and stream."""

from common.worker_parts import WorkerParts
from decode_worker.scheduler import Sequence
from prefill_worker.loop import PrefillLoop
from prefill_worker.runner import FirstToken, Runner
from prefill_worker.scheduler import Prompt


class OwnPrompts:
    """Reserved sequences on their way to their first token. Their KV goes into the blocks that they decode in.

    Args:
        chunk_tokens: of prompts, that one turn computes at most: so long does a decode step wait.
    """

    def __init__(self, parts: WorkerParts, runner: Runner, chunk_tokens: int) -> None:
        self._loop = PrefillLoop(parts, runner, chunk_tokens)
        self._block_size = parts.pool.layout.block_size
        self._sequences: dict[int, Sequence] = {}

    @property
    def busy(self) -> bool:
        """Whether the next turn has something to do."""
        return bool(self._sequences) or self._loop.busy

    @property
    def held_back(self) -> bool:
        """Whether all that the last turn had to do waits for grammars to be compiled."""
        return self._loop.held_back

    def add(self, sequence: Sequence) -> None:
        """Its blocks are the prompt's until `turn` gives the sequence back."""
        blocks, sequence.blocks = sequence.blocks, []
        self._sequences[sequence.attempt_id] = sequence
        self._loop.scheduler.add(
            Prompt(sequence.attempt_id, sequence.connection, sequence.spec, blocks, grammar=sequence.grammar)
        )

    def drop(self, sequence: Sequence) -> None:
        """Takes a sequence out; one that is not here is left alone. Its blocks go home now, or with its last chunk."""
        if self._sequences.pop(sequence.attempt_id, None) is not None:
            self._loop.scheduler.drop(sequence.attempt_id)

    def turn(self) -> list[tuple[Sequence, FirstToken]]:
        """Computes one chunk; returns the sequences whose KV is in place, with the first token at their end."""
        return [(self._filled(prompt, first), first) for prompt, first in self._loop.turn().complete]

    def _filled(self, prompt: Prompt, first: FirstToken) -> Sequence:
        sequence = self._sequences.pop(prompt.attempt_id)
        sequence.blocks = prompt.blocks
        sequence.cached_blocks = prompt.cached_len // self._block_size
        sequence.tokens.append(first.token)
        return sequence
