"""Times of single kernels, by replays of a CUDA graph that holds many."""

from collections.abc import Callable, Sequence

import torch

from benchmarks.gpu.timing import median


def graph_microseconds(calls: Sequence[Callable[[], object]], repeats: int = 10) -> float:
    """Median time of one of `calls`, run in a row from one graph.

    Several calls over different memory keep a small input out of the L2 cache.
    """
    for call in calls:  # compiles, and allocates what is kept
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return median(torch.device("cuda"), graph.replay, repeats) / len(calls) * 1e6


def launch_microseconds() -> float:
    """One more launch in a graph: a kernel that does next to nothing, after another."""
    one = torch.zeros(1, device="cuda")
    return graph_microseconds([lambda: one.add_(1)] * 1000)
