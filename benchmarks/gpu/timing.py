"""Seconds that work takes on a device."""

import statistics
import time
from collections.abc import Callable

import torch


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def elapsed(device: torch.device, work: Callable[[], object], *, idle: bool = True) -> float:
    """From the first operation that `work` launches to the end of the last, on a GPU by its own clock.

    `idle`: waits first for what was launched before, so that launching the first operation counts.
    """
    if idle:
        synchronize(device)
    if device.type != "cuda":
        started = time.perf_counter()
        work()
        return time.perf_counter() - started
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    work()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000


def launched(start: Callable[[], object], wait: Callable[[], object], repeats: int) -> tuple[float, float]:
    """By the host's clock, until what `start` launches has ended, which `wait` waits for, and until it is launched:
    medians of `repeats` runs, after two that do not count."""
    whole, launching = [], []
    for _ in range(repeats + 2):
        wait()
        began = time.perf_counter()
        start()
        launching.append(time.perf_counter() - began)
        wait()
        whole.append(time.perf_counter() - began)
    return statistics.median(whole[2:]), statistics.median(launching[2:])


def median(device: torch.device, work: Callable[[], object], repeats: int) -> float:
    """The median of `repeats` runs, after two that do not count."""
    for _ in range(2):
        work()
    return statistics.median(elapsed(device, work) for _ in range(repeats))


def copy_bytes_per_second(device: torch.device, size: int = 2 << 30) -> float:
    """Of a copy from device memory to device memory, bytes read plus bytes written."""
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / median(device, lambda: target.copy_(source), 10)


def gemm_operations_per_second(device: torch.device, size: int = 8192) -> float:
    """Of a product of two random square bfloat16 matrices."""
    a = torch.randn(size, size, device=device).bfloat16()
    b = torch.randn(size, size, device=device).bfloat16()
    return 2 * size**3 / median(device, lambda: torch.mm(a, b), 10)
