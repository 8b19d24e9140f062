"""Prompts that a decode worker prefills itself, with the prefill worker's loop, on its own pool and stream."""

from common.worker.worker_parts import WorkerParts
from decode_worker.scheduler import Sequence
from prefill_worker.loop import PrefillLoop
from prefill_worker.runner import FirstToken, Runner
from prefill_worker.scheduler import Prompt


class OwnPrompts:
    """Reserved sequences whose prompts are prefilled here, into the blocks that they will decode in.

    Args:
        parts: the model and the pool.
        runner: computes the chunks.
        chunk_tokens: most prompt tokens in a turn, for which decode steps have to wait.
    """

    def __init__(self, parts: WorkerParts, runner: Runner, chunk_tokens: int) -> None:
        self._loop = PrefillLoop(parts, runner, chunk_tokens)
        self._block_size = parts.pool.layout.block_size
        self._sequences: dict[int, Sequence] = {}

    @property
    def busy(self) -> bool:
        """Whether there is anything to do in the next turn."""
        return bool(self._sequences) or self._loop.busy

    @property
    def pause(self) -> float:
        """Seconds that the next turn can wait; infinite: until a prompt comes."""
        return 0.0 if self._sequences and not self._loop.busy else self._loop.pause

    def has(self, attempt_id: int) -> bool:
        """Whether there is such a prompt, or chunks of one that was dropped are still being computed."""
        return self._loop.scheduler.has(attempt_id)

    def add(self, sequence: Sequence) -> None:
        """Takes the sequence and its blocks over, until `turn` returns them."""
        blocks, sequence.blocks = sequence.blocks, []
        self._sequences[sequence.attempt_id] = sequence
        self._loop.scheduler.add(
            Prompt(sequence.attempt_id, sequence.connection, sequence.spec, blocks, grammar=sequence.grammar)
        )

    def drop(self, sequence: Sequence) -> None:
        """Takes a sequence out, and releases its blocks now or after its last launched chunk. Does nothing if it is
        not here."""
        if self._sequences.pop(sequence.attempt_id, None) is not None:
            self._loop.scheduler.drop(sequence.attempt_id)

    def turn(self) -> list[tuple[Sequence, FirstToken]]:
        """Computes one batch of chunks. Returns the sequences whose prompts are complete; their first token is already
        appended."""
        return [(self._filled(prompt, first), first) for prompt, first in self._loop.turn().complete]

    def _filled(self, prompt: Prompt, first: FirstToken) -> Sequence:
        sequence = self._sequences.pop(prompt.attempt_id)
        sequence.blocks = prompt.blocks
        sequence.cached_blocks = prompt.cached_len // self._block_size
        sequence.loaded_blocks = prompt.loaded_len // self._block_size
        sequence.tokens.append(first.token)
        return sequence
