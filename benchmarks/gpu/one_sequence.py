"""A decode step of one sequence, up to its logits: with all layers in one launch, and with kernels one by one.

python -m benchmarks.gpu.one_sequence --out one_sequence.json
"""

import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from cyclopts import App

from benchmarks.gpu import floors, models
from benchmarks.gpu.graph_timing import graph_microseconds
from benchmarks.gpu.timing import copy_bytes_per_second
from benchmarks.parts import load_model, worker_parts
from benchmarks.report import Figure, Report
from decode_worker.batch import DecodeBatch
from decode_worker.step import Stepper

NAMES = ("smollm2-135m", "qwen2.5-0.5b", "qwen3-0.6b", "llama-3.2-1b", "qwen3-1.7b")
CONTEXTS = (128, 1024, 8000)
BLOCK_SIZE = 16
REPLAYED = 10  # steps of a graph

app = App(name="one_sequence", help_format="plaintext")


@app.default
def main(*, out: Path | None = None, names: tuple[str, ...] = NAMES, contexts: tuple[int, ...] = CONTEXTS) -> int:
    """Measures models of random weights.

    Parameters
    ----------
    out: JSON file for the figures.
    names: models, by the names in benchmarks/gpu/models.py.
    contexts: tokens of the sequence.
    """
    report = Report(out)
    device = torch.device("cuda")
    copy = copy_bytes_per_second(device)
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            report.section(name, partial(_measure, device, copy, name, Path(folder), contexts))
    return report.finish()


@torch.inference_mode()
def _measure(device: torch.device, copy: float, name: str, folder: Path, contexts: tuple[int, ...]) -> Iterator[Figure]:
    loaded = load_model(models.write(name, folder), "bfloat16", device, dummy=True, max_length=max(contexts))
    width = -(-max(contexts) // BLOCK_SIZE)
    parts = worker_parts(loaded, 2 * width, BLOCK_SIZE)
    fused = Stepper(parts.model, parts.pool, parts.ops, parts.model.fused_layers(parts.pool))
    one_by_one = replace(fused, fused_layers=None)
    state = DecodeBatch(1, width, parts.pool.layout.block_size, device).state
    state.block_tables[0] = torch.tensor(parts.blocks.allocate(width), device=device)
    for context in contexts:
        state.lengths.fill_(context - 1)
        kernels = graph_microseconds([partial(one_by_one.logits, state)] * REPLAYED)
        case = f"{name}, {context} tokens"
        floor = floors.decode_step_bytes(loaded.model.config, [context]) / copy * 1e6
        yield Figure(f"{case}: kernels one by one", f"{kernels:.0f} us", f"floor {floor:.0f} us", kernels / floor)
        if fused.fused_layers is not None:
            together = graph_microseconds([partial(fused.logits, state)] * REPLAYED)
            yield Figure(f"{case}: one launch", f"{together:.0f} us", f"floor {floor:.0f} us", together / floor)


if __name__ == "__main__":
    sys.exit(app())
