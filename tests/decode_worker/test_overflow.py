"""A model in float16 that overflows: that is the end of one answer's sense, and nobody else's."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from benchmarks.in_process import spec
from benchmarks.parts import LoadedModel, load_model, worker_parts
from common.sequence import SequenceSpec
from tests.one_worker import OneWorker
from tests.router import models
from twostroke.v1 import worker_pb2 as pb

BLOCK = 4
BLOCKS = 8
OVERFLOWS = 7  # the token whose embedding float16 cannot hold


@pytest.fixture
def one(tmp_path: Path) -> OneWorker:
    torch.set_num_threads(1)
    models.write(tmp_path, models.byte_level())
    loaded: LoadedModel = load_model(tmp_path, "float16", torch.device("cpu"), dummy=True, max_length=BLOCKS * BLOCK)
    weights = loaded.model._weights
    embedding = weights.embedding.clone()
    embedding[OVERFLOWS] = math.inf
    loaded.model._weights = dataclasses.replace(weights, embedding=embedding)
    return OneWorker(worker_parts(loaded, BLOCKS, BLOCK))


def overflowing(temperature: float) -> SequenceSpec:
    """Takes all blocks of the pool but one."""
    return spec([OVERFLOWS, *range(20, 40)], (BLOCKS - 1) * BLOCK, temperature=temperature, block_size=BLOCK)


def test_what_it_leaves_in_blocks_gets_into_no_other_answer(one: OneWorker) -> None:
    asked = [spec(range(40, 50), 22, temperature=0, block_size=BLOCK)]
    wanted = one.run(asked)
    one.run([overflowing(temperature=0)])
    assert not one.parts.pool.tensor.isfinite().all()
    assert one.run(asked) == wanted


def test_its_tokens_are_drawn_from_the_vocabulary(one: OneWorker) -> None:
    attempt = one.ask(overflowing(temperature=1))
    one.finish()
    assert one.ended[attempt] == pb.Ended.CAUSE_FINISHED
    assert max(one.outputs[attempt]) < models.VOCAB_SIZE
