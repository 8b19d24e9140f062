"""Batches as arrays: what a batch of a fixed size says of its chunks, and that its padding says nothing."""

import random
from itertools import accumulate

import pytest
import torch

from common.sampling.parameters import SamplingParams
from kernels.attention import FEW_TOKENS, SHORT_TOKENS
from prefill_worker import draws
from prefill_worker.batch import BatchShape, exact_shape, pack
from prefill_worker.graphs import row_ladder, shapes, token_ladder
from prefill_worker.scheduler import Chunk, Prompt, max_chunks
from tests.specs import spec

BLOCK = 4


def chunks(count: int, seed: int) -> list[Chunk]:
    draw = random.Random(seed)
    made = []
    for index in range(count):
        length = draw.randint(1, 30)
        tokens = draw.choices(range(1_000), k=length)
        start = draw.randrange(length)
        blocks = draw.sample(range(500), -(-length // BLOCK))
        end = draw.choice((length, draw.randint(start + 1, length)))
        made.append(Chunk(Prompt(index, 0, spec(tokens, BLOCK), blocks), start, end))
    return made


@pytest.mark.parametrize("count", [1, 5, 17])
@pytest.mark.parametrize("padding", [0, 9])
def test_a_batch_says_where_each_token_belongs_and_what_it_sees(count: int, padding: int) -> None:
    batch_chunks = chunks(count, seed=count)
    exact = exact_shape(batch_chunks, BLOCK)
    shape = BatchShape(exact.tokens + padding, exact.chunks + padding, exact.table_blocks + padding)
    array = torch.from_numpy(pack(batch_chunks, BLOCK, shape))
    whole = torch.full((shape.size,), 7, dtype=torch.int32)  # what an earlier batch has left
    whole[: len(array)] = array
    batch = shape.views(whole)

    spans = [(chunk, position) for chunk in batch_chunks for position in range(chunk.start, chunk.end)]
    assert batch.tokens.tolist() == [c.prompt.spec.token_ids[p] for c, p in spans] + [0] * padding
    assert batch.positions.tolist() == [p for _, p in spans] + [0] * padding
    slots = [c.prompt.blocks[p // BLOCK] * BLOCK + p % BLOCK for c, p in spans]
    assert batch.slots.tolist() == slots + [-1] * padding
    query_lens = [c.end - c.start for c in batch_chunks]
    assert batch.attention.cu_query_lens.tolist() == list(accumulate([0, *query_lens, *[0] * padding]))
    assert batch.attention.seq_lens.tolist() == [c.end for c in batch_chunks] + [0] * padding
    ends = [row for row, (c, p) in enumerate(spans) if p == c.prompt.length - 1]
    assert batch.last_tokens.tolist() == ends + [0] * (shape.chunks - len(ends))
    for table, chunk in zip(batch.attention.block_tables.tolist(), batch_chunks, strict=False):
        used = -(-chunk.end // BLOCK)
        assert table == chunk.prompt.blocks[:used] + [0] * (shape.table_blocks - used)


def test_a_batch_of_padding_alone_writes_nowhere() -> None:
    shape = BatchShape(16, 8, 3)
    array = torch.from_numpy(pack([], BLOCK, shape))
    batch = shape.views(torch.cat([array, torch.zeros(shape.size - len(array), dtype=torch.int32)]))
    assert batch.slots.tolist() == [-1] * 16
    assert batch.attention.cu_query_lens.tolist() == [0] * 9


def test_parts_of_a_batch_begin_where_kernels_like_it() -> None:
    shape = BatchShape(33, 5, 7)
    batch = shape.views(torch.zeros(shape.size, dtype=torch.int32))
    parts = (batch.tokens, batch.positions, batch.slots, batch.last_tokens, batch.attention.block_tables)
    assert [part.storage_offset() % 4 for part in parts] == [0] * 5


def test_draws_of_fewer_prompts_than_rows() -> None:
    params = [
        SamplingParams(temperature=0.5, top_k=7, top_p=0.25, min_p=0.125, seed=2**64 - 1),
        SamplingParams(temperature=0.0, seed=3),
    ]
    specs = [spec([1] * (index + 4), BLOCK, sampling=sampling) for index, sampling in enumerate(params)]
    wanted = draws.views(torch.from_numpy(draws.pack(specs, 4)), 4)
    assert wanted.rows.seeds.tolist() == [-1, 3, 0, 0]
    assert wanted.rows.temperature.tolist() == [0.5, 0, 0, 0]
    assert wanted.rows.top_p.tolist() == [0.25, 1, 0, 0]
    assert wanted.rows.min_p.tolist() == [0.125, 0, 0, 0]
    assert wanted.rows.top_k.tolist() == [7, 0, 0, 0]
    assert wanted.positions.tolist() == [4, 5, 0, 0]


@pytest.mark.parametrize("most", [1, 7, 16, 100, 512, 2048, 2049, 8192, 16384])
def test_every_batch_fits_a_graph_that_is_little_larger(most: int) -> None:
    sizes = token_ladder(most)
    assert sizes[-1] == most
    assert list(sizes) == sorted(set(sizes))
    for tokens in range(512, most, 61):
        assert next(size for size in sizes if size >= tokens) <= tokens * 9 / 8
    rows = row_ladder(max_chunks(most))
    assert (rows[0], rows[-1]) == (1, max_chunks(most))
    assert list(rows) == sorted(set(rows))


@pytest.mark.parametrize("block_size", [1, 16, 48, 1024])
@pytest.mark.parametrize("max_length", [100, 512, 4096])
def test_few_tokens_of_short_sequences_have_graphs_of_their_own(max_length: int, block_size: int) -> None:
    table_blocks = -(-max_length // block_size)
    made = shapes(2048, table_blocks, block_size)
    assert len(set(made)) == len(made)

    def found(tokens: int, length: int) -> BatchShape:
        return next(shape for shape in made if shape.holds(BatchShape(tokens, 1, -(-length // block_size))))

    for tokens in (1, FEW_TOKENS, FEW_TOKENS + 1, 2048):
        for length in (tokens, SHORT_TOKENS - block_size, SHORT_TOKENS, max_length):
            if not tokens <= length <= max_length:
                continue
            shape = found(tokens, length)
            assert shape.tokens < tokens + max(64, tokens / 8)
            # the table tells that all are short, as far as whole blocks can
            known_short = shape.table_blocks * block_size <= SHORT_TOKENS
            if tokens <= FEW_TOKENS and -(-length // block_size) <= SHORT_TOKENS // block_size:
                assert known_short
            elif length > SHORT_TOKENS:
                assert not known_short
