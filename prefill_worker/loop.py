"""Prefill, turn by turn: schedule a batch of chunks, launch it, read the batch before.

Knows nothing of messages: engine.py adds prompts and announces their first tokens.
"""

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from common.worker.worker_parts import WorkerParts
from prefill_worker.runner import FirstToken, LaunchedBatch, Runner
from prefill_worker.scheduler import Prompt, Scheduler

# How often an idle loop checks whether a grammar is compiled.
GRAMMAR_POLL_SECONDS = 0.001
# How often it checks whether KV has arrived from host memory.
LOAD_POLL_SECONDS = 0.0002


@dataclass(frozen=True, slots=True)
class Turn:
    launched_tokens: int
    complete: list[tuple[Prompt, FirstToken]]  # prompts whose blocks are the caller's from now on


class PrefillLoop:
    def __init__(self, parts: WorkerParts, runner: Runner, max_batch_tokens: int) -> None:
        self.scheduler = Scheduler(parts.blocks, parts.pool.layout.block_size, max_batch_tokens, parts.host_cache)
        self.pause = math.inf  # seconds that the next turn can wait; infinite: until a prompt or blocks come
        self._runner = runner
        self._in_flight: deque[LaunchedBatch] = deque()
        # On a GPU the next batch is launched before the first tokens of the running one are read.
        self._batches_ahead = 1 if parts.device.type == "cuda" else 0

    @property
    def busy(self) -> bool:
        """Whether there may be something to do in the next turn."""
        return self.pause < math.inf

    def turn(self) -> Turn:
        chunks = self.scheduler.schedule()
        if chunks:
            self._in_flight.append(self._runner.launch(chunks))
        enough_ahead = len(self._in_flight) > (self._batches_ahead if chunks else 0)
        complete = list(self._read(self._in_flight.popleft())) if enough_ahead else []
        self.pause = 0.0 if chunks or self._in_flight else self._poll_seconds()
        return Turn(sum(chunk.end - chunk.start for chunk in chunks), complete)

    def _poll_seconds(self) -> float:
        if self.scheduler.waits_for_load:
            return LOAD_POLL_SECONDS
        return GRAMMAR_POLL_SECONDS if self.scheduler.waits_for_grammar else math.inf

    def _read(self, batch: LaunchedBatch) -> Iterator[tuple[Prompt, FirstToken]]:
        first_tokens = iter(batch.first_tokens())
        for chunk in batch.chunks:
            first = next(first_tokens) if chunk.is_last else None
            if self.scheduler.finish(chunk) and first is not None:
                yield chunk.prompt, first
