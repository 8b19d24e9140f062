"""The device's rows follow the host's list through any order of coming, going and growing."""

import random

import torch

from common.sampling.parameters import SamplingParams
from decode_worker.batch import UNUSED, DecodeBatch
from decode_worker.scheduler import Sequence, State
from tests.specs import spec

ROWS, BLOCKS, BLOCK = 5, 6, 4
HISTORY = 30


def sequence(attempt_id: int) -> Sequence:
    sampling = SamplingParams(
        temperature=0.5 + attempt_id, top_k=attempt_id, top_p=0.25, min_p=0.125, seed=2**64 - 1 - attempt_id
    )
    seq = Sequence(attempt_id, 0, spec([attempt_id], 4, sampling=sampling), [attempt_id, 1_000 * attempt_id])
    seq.state, seq.kv_len, seq.blocks = State.RUNNING, 1, [attempt_id]
    return seq


def test_rows_match_through_random_changes() -> None:
    random_ = random.Random(5)
    batch = DecodeBatch(ROWS, BLOCKS, BLOCK, torch.device("cpu"), history=HISTORY)
    texts: dict[int, list[int]] = {}
    next_id = 1
    for _ in range(2_000):
        for _ in range(random_.randrange(3)):
            if len(batch) < ROWS and random_.random() < 0.6:
                seq = sequence(next_id)
                texts[next_id] = list(seq.tokens)
                batch.add(seq)
                next_id += 1
            elif batch:
                batch.remove(random_.choice(batch.sequences))
        for seq in batch.sequences:
            if len(seq.blocks) < BLOCKS and random_.random() < 0.2:
                seq.blocks.append(random_.randrange(100))
        batch.upload()
        state = batch.state
        for row, seq in enumerate(batch.sequences):
            text = texts[seq.attempt_id]
            assert state.tokens[row] == text[-1]
            assert state.lengths[row] == len(text) - 1
            assert state.history[row, : len(text)].tolist() == text
            assert state.limits[row] == min(len(seq.blocks) * BLOCK, seq.spec.max_length - 1)
            assert state.block_tables[row, : len(seq.blocks)].tolist() == seq.blocks
            assert state.sampling.seeds[row].item() % 2**64 == seq.spec.sampling.seed
            assert state.sampling.temperature[row] == seq.spec.sampling.temperature
            assert state.sampling.top_k[row] == seq.spec.sampling.top_k
            assert state.sampling.top_p[row] == 0.25
            assert state.sampling.min_p[row] == 0.125
        assert (state.lengths[len(batch) :] == UNUSED).all()
        # A step: the rows move on where they are, each by some tokens. The host knows only that there is one, at least.
        for row, seq in enumerate(batch.sequences):
            text = texts[seq.attempt_id]
            text += range(text[-1] + 1, text[-1] + 1 + min(random_.randrange(1, 4), HISTORY - len(text)))
            state.tokens[row], state.lengths[row] = text[-1], len(text) - 1
            state.history[row, : len(text)] = torch.tensor(text)
            seq.kv_len += 1


def test_a_turn_without_changes_uploads_nothing() -> None:
    batch = DecodeBatch(ROWS, BLOCKS, BLOCK, torch.device("cpu"))
    batch.add(sequence(1))
    batch.upload()
    before = batch.state.block_tables.clone()
    batch.state.block_tables.zero_()
    batch.upload()
    assert not batch.state.block_tables.any()
    assert before.any()
