"""`python -m benchmarks.gpu.handover [JSON]`: how fast blocks come out of another process's GPU memory.

The owner runs on the last GPU and the reader on the first; with one GPU, both on that one. Each way moves 1 GiB of
blocks in random order, and is held against one copy of 1 GiB by CUDA itself between the same places, in the same run.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import cupy
import torch

from benchmarks.gpu.timing import launched
from benchmarks.pool_owner import pool_owner
from benchmarks.report import Figure, Report
from common.kv.kv_pool import KvLayout, allocate
from common.transport import cuda_ipc
from common.transport.block_copy import CTAS

MOVED_BYTES = 1 << 30
REPEATS = 7
ANY_KIND = 4  # cudaMemcpyDefault: from the addresses
READER = torch.device("cuda", 0)
# Qwen3-0.6B's in bfloat16: 16 tokens of one of its layers, and of all 28
SMALL = KvLayout(MOVED_BYTES >> 16, 1, 16, 8, 128, "bfloat16")
WHOLE = KvLayout(MOVED_BYTES // (28 << 16), 28, 16, 8, 128, "bfloat16")


def size(layout: KvLayout) -> str:
    return f"{layout.block_bytes / (1 << 20):.4g} MiB"


def pairs(layout: KvLayout) -> tuple[list[int], list[int]]:
    generator = torch.Generator().manual_seed(0)
    source = torch.randperm(layout.num_blocks, generator=generator).tolist()
    target = torch.randperm(layout.num_blocks, generator=generator).tolist()
    return source, target


def gigabytes_per_second(layout: KvLayout, milliseconds: float) -> float:
    return layout.pool_bytes / milliseconds / 1e6


def timed(start: Callable[[cupy.cuda.Stream], None]) -> tuple[float, float]:
    """Median milliseconds until what `start` enqueues has ended, and until it is enqueued."""
    stream = cupy.cuda.Stream(non_blocking=True)
    whole, enqueued = launched(lambda: start(stream), stream.synchronize, REPEATS)
    return 1000 * whole, 1000 * enqueued


def measure(layout: KvLayout, device: int, across: bool) -> Iterator[Figure]:
    with pool_owner("cuda_ipc", layout, torch.device("cuda", device)) as descriptor, cupy.cuda.Device(0):
        pool = allocate(layout, READER)
        torch.cuda.synchronize()
        source, target = pairs(layout)
        runtime = cupy.cuda.runtime
        mapped = runtime.ipcOpenMemHandle(bytes.fromhex(json.loads(descriptor)["handle"]))
        local, span = pool.tensor.data_ptr(), layout.pool_bytes

        ms, _ = timed(lambda stream: runtime.memcpyAsync(local, mapped, span, ANY_KIND, stream.ptr))
        peak = gigabytes_per_second(layout, ms)
        yield Figure(f"{size(layout)} blocks: one copy of everything", f"{peak:.0f} GB/s")

        def ratio(what: str, ms: float, note: str, bound: float | None = None) -> Figure:
            speed = gigabytes_per_second(layout, ms)
            return Figure(
                f"{size(layout)} blocks: {what}", f"{speed:.0f} GB/s{note}", f"{peak:.0f} GB/s", speed / peak, bound
            )

        for ctas in (8, 16, 32):
            peer = cuda_ipc.open_peer(descriptor, layout, READER, ctas)
            on_gpu, on_host = [], []
            for _ in range(REPEATS + 2):
                began = time.perf_counter()
                transfer = peer.read(source, pool, target)
                on_host.append((time.perf_counter() - began) * 1000)
                transfer.wait()
                on_gpu.append(transfer.milliseconds)
            peer.close()
            # Within one GPU the peak is that of its memory, which so few SMs are not meant to reach.
            bound = 0.9 if across and ctas == CTAS else None
            host = statistics.median(on_host[2:])
            yield ratio(f"one launch, {ctas} CTAs", statistics.median(on_gpu[2:]), f", {host:.2f} ms CPU", bound)

        layer_bytes = layout.block_bytes // layout.num_layers

        def copy_layers(stream: cupy.cuda.Stream) -> None:
            for src, dst in zip(source, target, strict=True):
                for start in range(0, layout.block_bytes, layer_bytes):
                    runtime.memcpyAsync(
                        local + dst * layout.block_bytes + start,
                        mapped + src * layout.block_bytes + start,
                        layer_bytes,
                        ANY_KIND,
                        stream.ptr,
                    )

        ms, enqueued = timed(copy_layers)
        yield ratio("a copy for each block and layer", ms, f", {enqueued:.0f} ms CPU")
        runtime.ipcCloseMemHandle(mapped)


def main() -> int:
    if not torch.cuda.is_available():
        sys.exit("no CUDA device: torch.cuda.is_available() is False")
    report = Report(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
    last = torch.cuda.device_count() - 1
    print(f"owner on GPU {last}, reader on GPU 0: {torch.cuda.get_device_name(0)}")
    for layout in (SMALL, WHOLE):
        report.section(f"blocks of {size(layout)}", partial(measure, layout, last, last > 0))
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
