"""CUDA graphs of prefill, captured at start: a batch is one copy and one replay. Python takes longer to launch the
kernels of a small batch one by one than the GPU takes to run them."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from common.device.device_io import copy_to_device
from common.device.gpu_memory import Passes
from common.device.graph_capture import capture
from common.model.dtypes import torch_dtype
from common.sequence import SequenceSpec
from kernels.attention import FEW_TOKENS, SHORT_TOKENS
from prefill_worker import draws
from prefill_worker.batch import BatchShape, exact_shape, pack
from prefill_worker.forward import Forward
from prefill_worker.scheduler import Chunk, max_chunks


def token_ladder(most: int) -> tuple[int, ...]:
    """Token counts to capture. A batch runs in the smallest graph that holds it. From 512 tokens on at most an eighth
    is padding, and a batch that uses up its budget has none. Only a batch of very many short chunks needs a larger
    graph than its tokens do."""
    sizes = []
    size = 16
    while size < most:
        sizes.append(size)
        size += size if size < 64 else max(64, (1 << size.bit_length() - 1) // 8)
    return (*sizes, most)


def row_ladder(most: int) -> tuple[int, ...]:
    """Powers of two."""
    return (*(1 << exponent for exponent in range((most - 1).bit_length())), most)


def shapes(max_tokens: int, table_blocks: int, block_size: int) -> list[BatchShape]:
    """The shapes to capture, best fit first: a batch takes the first that holds it. Small ones are there twice, because
    kernels work differently if no sequence is long."""
    short_blocks = min(SHORT_TOKENS // block_size, table_blocks) or table_blocks
    return [
        BatchShape(tokens, max_chunks(tokens), blocks)
        for tokens in token_ladder(max_tokens)
        for blocks in sorted({short_blocks, table_blocks} if tokens <= FEW_TOKENS else {table_blocks})
    ]


def passes(max_tokens: int) -> Passes:
    """What batches of up to `max_tokens` will need memory for."""
    rows = max_chunks(max_tokens)
    with_both_widths = shapes(max_tokens, table_blocks=2, block_size=SHORT_TOKENS)
    graphs = len(with_both_widths) + len(row_ladder(rows))
    return Passes(max_tokens, rows, graphs, special_rows=rows, special_parts=1)


class PrefillGraphs:
    """`Forward`, captured: the model for each shape of `shapes`, and sampling for each size of `row_ladder`.

    Args:
        forward: what is captured.
        max_tokens: tokens of the largest batch, which has at most `max_chunks(max_tokens)` chunks.
        table_blocks: blocks of the longest sequence.
    """

    def __init__(self, forward: Forward, max_tokens: int, table_blocks: int, device: torch.device) -> None:
        self._block_size = forward.pool.layout.block_size
        self._shapes = shapes(max_tokens, table_blocks, self._block_size)
        self._rows = row_ladder(max_chunks(max_tokens))
        self._array = torch.zeros(max(shape.size for shape in self._shapes), dtype=torch.int32, device=device)
        self._hidden = torch.zeros(
            (self._rows[-1], forward.model.config.hidden_size), dtype=torch_dtype(forward.model.dtype), device=device
        )
        self._draws = torch.zeros(draws.size(self._rows[-1]), dtype=torch.int32, device=device)
        self._forwards: dict[BatchShape, torch.cuda.CUDAGraph] = {}
        self._first_tokens: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._capture_all(forward)

    def last_hidden(self, chunks: Sequence[Chunk]) -> Tensor:
        """Runs a batch. Returns hidden states [L, H] of the tokens that end a prompt, valid until the next call."""
        shape = self._shape(chunks)
        self._write(chunks, shape)
        self._forwards[shape].replay()
        return self._hidden[: sum(chunk.is_last for chunk in chunks)]

    def first_tokens(self, specs: Sequence[SequenceSpec]) -> Tensor:
        """Samples the first tokens [L] int32 of the prompts that ended in the last batch."""
        rows = next(size for size in self._rows if size >= len(specs))
        copy_to_device(draws.pack(specs, rows), self._draws)
        graph, tokens = self._first_tokens[rows]
        graph.replay()
        return tokens[: len(specs)]

    def _shape(self, chunks: Sequence[Chunk]) -> BatchShape:
        exact = exact_shape(chunks, self._block_size)
        return next(shape for shape in self._shapes if shape.holds(exact))

    def _write(self, chunks: Sequence[Chunk], shape: BatchShape) -> None:
        copy_to_device(pack(chunks, self._block_size, shape), self._array)

    @torch.inference_mode()
    def _capture_all(self, forward: Forward) -> None:
        count = len(self._shapes) + len(self._rows)
        with tqdm(total=count, desc="capturing CUDA graphs of prefill", unit="graph") as progress:
            # Largest first, so that the smaller ones reuse its memory.
            for shape in self._shapes[::-1]:
                self._write([], shape)
                self._forwards[shape] = capture(partial(self._keep_hidden, forward, shape), self._pool)[0]
                progress.update()
            for rows in self._rows[::-1]:
                self._first_tokens[rows] = capture(partial(self._draw, forward, rows), self._pool)
                progress.update()

    def _keep_hidden(self, forward: Forward, shape: BatchShape) -> Tensor:
        hidden = forward.last_hidden(shape.views(self._array[: shape.size]))
        return self._hidden[: len(hidden)].copy_(hidden)

    def _draw(self, forward: Forward, rows: int) -> Tensor:
        logits = forward.model.logits(self._hidden[:rows])
        return forward.draw(logits, draws.views(self._draws, rows))
