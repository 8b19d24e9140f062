"""CUDA graphs of the decode step, one for each batch size of a ladder, captured at start."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from common.device.gpu_memory import Passes
from common.device.graph_capture import capture
from decode_worker.batch import BatchState
from decode_worker.drafting import most_sequences
from decode_worker.step import Stepper


def ladder(max_batch: int) -> tuple[int, ...]:
    """Batch sizes to capture, dense enough to keep padding cheap: a batch runs in the smallest that holds it."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max_batch, 32)]
    return (*(size for size in sizes if size < max_batch), max_batch)


def passes(max_batch: int, drafts: int = 0) -> Passes:
    """What batches of up to `max_batch` will need memory for."""
    made = Passes(max_batch, max_batch, 2 * len(ladder(max_batch)), special_rows=max_batch, special_parts=1)
    if drafts:
        most = most_sequences(max_batch, drafts)
        rows = most * (drafts + 1)
        made += Passes(rows, rows, len(ladder(most)), histories=max_batch)
    return made


class DecodeGraphs:
    """The captured step. `plain` is the whole step. `logits` stops before sampling, which then runs eagerly: for
    batches in which a sequence wants penalties, biases, log-probabilities or a grammar. `drafted` is the whole step
    with `drafts` behind each token, for batches that may have them."""

    def __init__(self, stepper: Stepper, state: BatchState, max_batch: int, drafts: int) -> None:
        self._sizes = ladder(max_batch)
        self._state = state
        self._plain: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._logits: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        pool = torch.cuda.graph_pool_handle()
        # Largest first, so that the smaller ones reuse its memory.
        for size in tqdm(self._sizes[::-1], desc="capturing CUDA graphs", unit="graph"):
            rows = state.first(size)
            for graphs, step in ((self._plain, stepper.plain), (self._logits, stepper.logits)):
                graphs[size] = capture(partial(step, rows), pool)
        self._drafted: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        sizes = ladder(most_sequences(max_batch, drafts)) if drafts else ()
        for size in tqdm(sizes[::-1], desc="capturing CUDA graphs with drafts", unit="graph", disable=not sizes):
            self._drafted[size] = capture(partial(stepper.drafted, state.first(size), drafts), pool)

    def plain(self, rows: int) -> Tensor:
        return _replayed(self._plain, rows)

    def logits(self, rows: int) -> Tensor:
        return _replayed(self._logits, rows)

    def drafted(self, rows: int) -> Tensor:
        return _replayed(self._drafted, rows)


def _replayed(graphs: Mapping[int, tuple[torch.cuda.CUDAGraph, Tensor]], rows: int) -> Tensor:
    """The first rows of what the smallest graph gives that holds them."""
    graph, output = graphs[min(size for size in graphs if size >= rows)]
    graph.replay()
    return output[:rows]
