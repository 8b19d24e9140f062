"""Both engines in one process, without router, gRPC and transport: the same schedulers and runners, called in the same
order as the workers' loops call them, for figures of the engine itself and for tests of it."""

from collections import deque
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace

import torch

from common.prefix_hash import block_hashes
from common.sampling import SamplingParams
from common.sequence import SequenceSpec
from common.worker_parts import WorkerParts
from decode_worker.runner import Runner as DecodeRunner
from decode_worker.runner import StepOutput
from decode_worker.scheduler import Scheduler as DecodeScheduler
from decode_worker.scheduler import Sequence, State
from prefill_worker.runner import LaunchedBatch
from prefill_worker.runner import Runner as PrefillRunner
from prefill_worker.scheduler import Prompt
from prefill_worker.scheduler import Scheduler as PrefillScheduler


@dataclass(frozen=True, slots=True)
class Step:
    """A launched step, and the sequences of its rows."""

    sequences: tuple[Sequence, ...]
    output: StepOutput


class DecodeLoop:
    """The turn of `decode_worker.engine`: grow, launch, deliver the step before."""

    def __init__(self, parts: WorkerParts, runner: DecodeRunner, max_batch: int) -> None:
        self.runner = runner
        self.scheduler = DecodeScheduler(parts.blocks, parts.pool.layout.block_size, max_batch)
        self.preempted: list[Sequence] = []
        self.finished: list[Sequence] = []
        self._steps_ahead = 1 if parts.device.type == "cuda" else 0
        self._in_flight: deque[Step] = deque()

    @property
    def busy(self) -> bool:
        return bool(self.runner.batch) or bool(self._in_flight)

    def start(self, sequence: Sequence, first_token: int) -> None:
        """The KV of a reserved sequence is in its blocks."""
        sequence.tokens.append(first_token)
        self.scheduler.start(sequence)
        if sequence.wants_step and first_token not in sequence.spec.stop_token_ids:
            self.runner.add(sequence)
        else:
            self._end(sequence, self.finished)

    def turn(self) -> None:
        self._grow()
        if self.runner.batch:
            self._in_flight.append(self._launch())
        if len(self._in_flight) > (self._steps_ahead if self.runner.batch else 0):
            self._deliver(self._in_flight.popleft())

    def drop(self, sequence: Sequence) -> None:
        self._end(sequence, [])

    def _grow(self) -> None:
        starved = self.scheduler.grow(self.runner.batch.sequences)
        if not starved:
            return
        while self._in_flight:
            self._deliver(self._in_flight.popleft())
        while starved := self.scheduler.grow([sequence for sequence in starved if sequence in self.runner.batch]):
            self._end(self.scheduler.cheapest(), self.preempted)

    def _launch(self) -> Step:
        step = Step(tuple(self.runner.batch.sequences), self.runner.launch())
        for sequence in step.sequences:
            sequence.kv_len += 1
            sequence.steps_in_flight += 1
            if not sequence.wants_step:
                self.runner.remove(sequence)
        return step

    def _deliver(self, step: Step) -> None:
        for sequence, token in zip(step.sequences, step.output.tokens.get().tolist(), strict=True):
            sequence.steps_in_flight -= 1
            if sequence.state is State.OVER:
                self.scheduler.release_if_idle(sequence)
                continue
            self.scheduler.deliver(sequence, token)
            if token in sequence.spec.stop_token_ids or len(sequence.tokens) >= sequence.spec.max_length:
                self._end(sequence, self.finished)

    def _end(self, sequence: Sequence, ended: list[Sequence]) -> None:
        if sequence in self.runner.batch:
            self.runner.remove(sequence)
        self.scheduler.end(sequence)
        ended.append(sequence)


class InProcess:
    """Prefill and decode with a pool each; a finished prompt's blocks are copied from one to the other. Prompts go
    first: while one waits that the decode side has room for, no step runs, which suits throughput best.

    Args:
        prefill, decode: parts of one model, on one device.
        max_batch: sequences decoded together.
        max_batch_tokens: tokens of a prefill batch.
        headroom_tokens: room for output that is set aside for each sequence.
    """

    def __init__(
        self,
        prefill: WorkerParts,
        decode: WorkerParts,
        *,
        max_batch: int,
        max_batch_tokens: int,
        headroom_tokens: int = 1024,
    ) -> None:
        self._prefill, self._decode = prefill, decode
        self._block_size = prefill.pool.layout.block_size
        self._headroom_tokens = headroom_tokens
        self._prefill_runner = PrefillRunner(prefill)
        self._prefill_scheduler = PrefillScheduler(prefill.blocks, self._block_size, max_batch_tokens)
        self._batches_ahead = 1 if prefill.device.type == "cuda" else 0
        self._batches: deque[LaunchedBatch] = deque()
        self.decode_runner = DecodeRunner(decode, max_batch)
        self.loop = DecodeLoop(decode, self.decode_runner, max_batch)
        self.preemptions = 0

    def run(self, specs: Items[SequenceSpec]) -> list[list[int]]:
        """Runs all to their ends; returns the output of each."""
        waiting = deque(enumerate(specs))
        resumed: deque[tuple[int, SequenceSpec]] = deque()
        running: dict[int, Sequence] = {}
        outputs: list[list[int]] = [[] for _ in specs]
        while waiting or resumed or running:
            self._admit(waiting, resumed, running)
            if not self._prefill_turn(running):
                self.loop.turn()
            for sequence in self.loop.finished:
                outputs[sequence.attempt_id] = sequence.tokens[sequence.spec.prompt_length :]
                del running[sequence.attempt_id]
            for sequence in self.loop.preempted:
                self.preemptions += 1
                del running[sequence.attempt_id]
                resumed.append((sequence.attempt_id, self._resumed(sequence)))
            self.loop.finished.clear()
            self.loop.preempted.clear()
        while self.loop.busy:
            self.loop.turn()
        return outputs

    def blocks_home(self) -> bool:
        """Whether no block of either pool is in use."""
        return self._prefill.blocks.in_use_count == self._decode.blocks.in_use_count == 0

    def _admit(
        self,
        waiting: deque[tuple[int, SequenceSpec]],
        resumed: deque[tuple[int, SequenceSpec]],
        running: dict[int, Sequence],
    ) -> None:
        """Resumed sequences first; one of them comes back only when its whole need fits."""
        while queue := resumed or waiting:
            index, spec = queue[0]
            sequence = Sequence(index, 0, spec, list(spec.token_ids))
            remaining = spec.max_length - len(spec.token_ids)
            headroom = remaining if queue is resumed else min(remaining, self._headroom_tokens)
            if not self.loop.scheduler.reserve(sequence, headroom):
                return
            queue.popleft()
            running[index] = sequence
            self._prefill_scheduler.add(Prompt(index, 0, spec))

    def _prefill_turn(self, running: dict[int, Sequence]) -> bool:
        """Launches a batch of prompts and takes over those of the one before. False where there was nothing to do."""
        chunks = self._prefill_scheduler.schedule()
        if chunks:
            self._batches.append(self._prefill_runner.launch(chunks))
        if len(self._batches) > (self._batches_ahead if chunks else 0):
            self._hand_over(self._batches.popleft(), running)
        return bool(chunks or self._batches)

    def _hand_over(self, batch: LaunchedBatch, running: dict[int, Sequence]) -> None:
        first_tokens = iter(batch.first_tokens())
        ready: list[tuple[Prompt, Sequence, int]] = []
        for chunk in batch.chunks:
            first = next(first_tokens) if chunk.is_last else None
            if self._prefill_scheduler.finish(chunk) and first is not None:
                ready.append((chunk.prompt, running[chunk.prompt.attempt_id], first.token))
        source: list[int] = []
        target: list[int] = []
        for prompt, sequence, _ in ready:
            source += prompt.blocks[sequence.cached_blocks :]
            target += sequence.blocks[sequence.cached_blocks : len(prompt.blocks)]
        device = self._decode.device
        moved = self._prefill.pool.tensor[torch.tensor(source, device=device, dtype=torch.int64)]
        self._decode.pool.tensor[torch.tensor(target, device=device, dtype=torch.int64)] = moved
        for prompt, sequence, token in ready:
            self._prefill.blocks.release(prompt.blocks)
            self.loop.start(sequence, token)

    def _resumed(self, sequence: Sequence) -> SequenceSpec:
        """Prompt and output so far, as the router sends them again."""
        hashes = block_hashes(sequence.spec.cache_root, sequence.tokens, self._block_size)
        return replace(sequence.spec, token_ids=tuple(sequence.tokens), block_hashes=tuple(hashes))


def spec(
    tokens: Items[int],
    max_length: int,
    *,
    temperature: float,
    seed: int = 0,
    block_size: int = 16,
    root: bytes = bytes(16),
) -> SequenceSpec:
    """A prompt as the router would send it; no token ends it before `max_length`."""
    return SequenceSpec(
        token_ids=tuple(tokens),
        prompt_length=len(tokens),
        block_hashes=tuple(block_hashes(root, tokens, block_size)),
        sampling=SamplingParams(temperature=temperature, seed=seed),
        max_length=max_length,
        cache_root=root,
    )
