"""Decode, turn by turn: give each sequence the block that it writes to, launch a step, read the step before.

Knows nothing of messages: engine.py adds sequences and sends their tokens on.
"""

import time
from collections import deque
from dataclasses import dataclass, field

from common.worker.worker_parts import WorkerParts
from decode_worker.pace import Pace
from decode_worker.runner import Runner, Step
from decode_worker.scheduler import Scheduler, Sequence, State
from twostroke.v1 import worker_pb2 as pb


@dataclass(frozen=True, slots=True)
class StepTokens:
    """What a step gave, in parallel lists: a sequence is there once for each of its tokens, which may be several if
    there were drafts. `logprobs` is empty if no sequence asked for any."""

    sequences: list[Sequence]
    tokens: list[int]
    logprobs: list[pb.Logprobs]
    drafts: int  # that the step had behind each token

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return len(set(self.sequences)) if self.drafts else len(self.sequences)


@dataclass(frozen=True, slots=True)
class Turn:
    """What happened in a turn, in this order. Sequences that finished, failed or were preempted have left the batch;
    their blocks are released, or will be after the last step that writes to them."""

    steps: list[StepTokens] = field(default_factory=list)
    finished: list[Sequence] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    failed: list[tuple[Sequence, str]] = field(default_factory=list)  # and why: no token can follow


class DecodeLoop:
    def __init__(self, parts: WorkerParts, runner: Runner, max_batch: int) -> None:
        self.scheduler = Scheduler(parts.blocks, parts.pool.layout.block_size, max_batch)
        self._runner = runner
        self._batch = runner.batch
        self._in_flight: deque[Step] = deque()
        # On a GPU the next step is launched before the running one is read, so that the GPU never waits for Python.
        self._steps_ahead = 1 if parts.device.type == "cuda" else 0
        self._pace = Pace()

    @property
    def busy(self) -> bool:
        """Whether there is anything to do in the next turn."""
        return bool(self._batch) or bool(self._in_flight)

    def spare_seconds(self) -> float:
        """How long the next turn can wait for more sequences to join its step before the device runs out of work. Ask
        again from time to time: the running step may end sooner than expected."""
        if not (self._batch and self._in_flight) or self._in_flight[0].tokens.arrived:
            return 0.0
        return self._pace.spare(time.monotonic())

    def start(self, sequence: Sequence) -> bool:
        """Adds a sequence whose KV and first token are here. False if that token already ended it."""
        self.scheduler.start(sequence)
        if sequence.spec.ends_with(sequence.tokens[-1], len(sequence.tokens)):
            self.scheduler.end(sequence)
            return False
        self._runner.add(sequence)
        return True

    def drop(self, sequence: Sequence) -> None:
        """Takes a sequence out, whatever its state."""
        if sequence in self._batch:
            self._runner.remove(sequence)
        self.scheduler.end(sequence)

    def turn(self) -> Turn:
        turn = Turn()
        self._grow(turn)
        if self._batch:
            self._in_flight.append(self._launch())
        if len(self._in_flight) > (self._steps_ahead if self._batch else 0):
            self._read(self._in_flight.popleft(), turn)
        return turn

    def _grow(self, turn: Turn) -> None:
        starved = self.scheduler.grow(self._batch.sequences, self._runner.drafts)
        if not starved:
            return
        # A preempted sequence keeps all its tokens; and one that ends here frees its blocks, or is none of them.
        while self._in_flight:
            self._read(self._in_flight.popleft(), turn)
        if self._runner.drafts:
            self.scheduler.give_back_drafts_blocks(self._batch.sequences)
        while starved := self.scheduler.grow([sequence for sequence in starved if sequence in self._batch]):
            victim = self.scheduler.cheapest()
            self.drop(victim)
            turn.preempted.append(victim)

    def _launch(self) -> Step:
        step = self._runner.launch(self._in_flight[-1] if self._in_flight else None)
        if self._in_flight:
            self._pace.launched(step.late)
        else:
            self._pace.begins(time.monotonic(), len(step.sequences))
        for sequence in step.sequences:
            sequence.kv_len += 1
            sequence.drafts_in_flight += step.drafts
            sequence.writes_in_flight += 1
            if not sequence.wants_step:
                self._runner.remove(sequence)
        return step

    def _read(self, step: Step, turn: Turn) -> None:
        tokens_of = step.read()
        self._pace.ended(step.seconds)
        if self._in_flight:
            self._pace.begins(time.monotonic(), len(self._in_flight[0].sequences))
        logprobs = step.logprobs.read() if step.logprobs is not None else {}
        read = StepTokens([], [], [], step.drafts)
        for row, (sequence, tokens) in enumerate(zip(step.sequences, tokens_of, strict=True)):
            sequence.writes_in_flight -= 1
            sequence.drafts_in_flight -= step.drafts
            if sequence.state is State.OVER:
                self.scheduler.release_if_idle(sequence)
                continue
            if row in step.problems:
                self.drop(sequence)
                turn.failed.append((sequence, step.problems[row]))
                continue
            sequence.kv_len += len(tokens) - 1
            for token in tokens:
                self.scheduler.deliver(sequence, token)
                read.sequences.append(sequence)
                read.tokens.append(token)
                if logprobs:
                    read.logprobs.append(logprobs.get(row, pb.Logprobs()))
                if sequence.spec.ends_with(token, len(sequence.tokens)):
                    self.drop(sequence)
                    turn.finished.append(sequence)
                    break
            if step.drafts and not sequence.wants_step and sequence in self._batch:  # the launched step ends it
                self._runner.remove(sequence)
        self._runner.observe(step, tokens_of)
        turn.steps.append(read)
