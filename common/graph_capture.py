"""Work on a GPU, captured once as a CUDA graph."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.cuda import _POOL_HANDLE


def capture(work: Callable[[], Tensor], pool: "_POOL_HANDLE") -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph of `work`, and the tensor that every replay writes its output to. Runs it once before, which compiles and
    loads kernels. `pool`, of torch.cuda.graph_pool_handle, is memory that graphs share."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        output = work()
    return graph, output
