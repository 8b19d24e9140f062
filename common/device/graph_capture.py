"""Captures work on a GPU as a CUDA graph."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.cuda import _POOL_HANDLE


def capture(work: Callable[[], Tensor], pool: "_POOL_HANDLE") -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """Captures `work` after running it once, which compiles and loads its kernels.

    Args:
        work: launches kernels and returns their output.
        pool: memory that several graphs share, from torch.cuda.graph_pool_handle.

    Returns:
        The graph, and the tensor that every replay writes its output to.
    """
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        output = work()
    return graph, output
