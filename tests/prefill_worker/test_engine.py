"""The prefill worker's loop, whole but for gRPC: the test makes its turns, and is its router."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch

from benchmarks.in_process import spec
from benchmarks.parts import load_model, worker_parts
from common.sequence import sequence_to_proto
from common.tracing import Tracing
from common.worker_service import Received, WorkerService
from prefill_worker import engine
from prefill_worker.metrics import PrefillMetrics
from prefill_worker.runner import Runner
from tests.one_worker import ROUTER, Wire
from tests.router import models
from twostroke.v1 import worker_pb2 as pb

BLOCK = 4


def test_prompts_beyond_what_may_wait_are_answered_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "MAX_WAITING", 2)
    torch.set_num_threads(1)
    directory = models.write(tmp_path, models.byte_level())
    loaded = load_model(directory, "float32", torch.device("cpu"), dummy=True, max_length=64)
    parts, wire = worker_parts(loaded, 40, BLOCK), Wire()
    service = cast(WorkerService, cast(Any, wire))
    worker = engine.Engine(
        parts, service, Runner(parts), PrefillMetrics(), Tracing(), max_batch_tokens=16, lease_seconds=60
    )

    def ask(*attempts: int) -> pb.WorkerMessage:
        """What the worker says in the turns that it takes to compute them."""
        prompts = [spec([40 + attempt] * 10, 20, temperature=0, block_size=BLOCK) for attempt in attempts]
        sequences = [sequence_to_proto(prompt) for prompt in prompts]
        prefills = [
            pb.Prefill(attempt_id=attempt, sequence=sequence)
            for attempt, sequence in zip(attempts, sequences, strict=True)
        ]
        wire.to_worker.append(Received(ROUTER, pb.RouterMessage(prefills=prefills)))
        worker._receive(draining=False)
        for _ in range(4):
            worker._tell(worker._loop.turn())
        wire.flush()
        return wire.to_router.pop()

    said = ask(1, 2, 3, 4, 5)
    assert [prefilled.attempt_id for prefilled in said.prefilled] == [1, 2]
    assert [(ended.attempt_id, ended.cause) for ended in said.ended] == [
        (attempt, pb.Ended.CAUSE_FULL) for attempt in (3, 4, 5)
    ]
    assert [prefilled.attempt_id for prefilled in ask(6).prefilled] == [6]
    wire.to_worker.append(Received(ROUTER, None))
    worker._receive(draining=False)
    assert parts.blocks.in_use_count == 0
