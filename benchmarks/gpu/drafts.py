"""What a decode step with drafts takes, against one without: so many drafts must be kept for it to pay.

python -m benchmarks.gpu.drafts --out drafts.json
"""

import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from cyclopts import App
from torch import Tensor

from benchmarks.gpu import models
from benchmarks.gpu.graph_timing import graph_microseconds
from benchmarks.parts import load_model, worker_parts
from benchmarks.report import Figure, Report
from decode_worker.batch import BatchState, DecodeBatch
from decode_worker.drafting import most_sequences
from decode_worker.step import Stepper

NAMES = ("qwen3-0.6b", "llama-3.1-8b", "llama-3.1-8b-fp8")
CONTEXT = 1024
BLOCK = 16
REPLAYED = 5  # steps of a graph

app = App(name="drafts", help_format="plaintext")


@app.default
def main(
    *,
    out: Path | None = None,
    names: tuple[str, ...] = NAMES,
    drafts: tuple[int, ...] = (2, 4, 8),
    batches: tuple[int, ...] = (1, 4, 16, 48),
) -> int:
    """Measures models of random weights, with sequences of 1,024 tokens.

    Parameters
    ----------
    out: JSON file for the figures.
    names: models, by the names in benchmarks/gpu/models.py.
    drafts: behind each token.
    batches: sequences that run together.
    """
    report = Report(out)
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            report.section(name, partial(_measure, name, Path(folder), drafts, batches))
    return report.finish()


@torch.inference_mode()
def _measure(name: str, folder: Path, drafts: tuple[int, ...], batches: tuple[int, ...]) -> Iterator[Figure]:
    device = torch.device("cuda")
    length = CONTEXT + 32
    loaded = load_model(models.write(name, folder), "bfloat16", device, dummy=True, max_length=length)
    width, most = -(-length // BLOCK), max(batches)
    parts = worker_parts(loaded, most * width, BLOCK)
    stepper = Stepper(parts.model, parts.pool, parts.ops, parts.model.fused_layers(parts.pool))
    state = DecodeBatch(most, width, BLOCK, device, history=length).state
    state.block_tables.copy_(torch.tensor(parts.blocks.allocate(most * width)).view(most, width))
    state.history.random_(0, loaded.model.config.vocab_size)
    state.limits.fill_(length)

    def again(rows: BatchState, count: int) -> Tensor:
        rows.lengths.fill_(CONTEXT - 1)
        return stepper.drafted(rows, count) if count else stepper.plain(rows)

    for batch in batches:
        rows = state.first(batch)
        without = graph_microseconds([partial(again, rows, 0)] * REPLAYED)
        for count in drafts:
            if batch > most_sequences(batch, count):
                continue
            taken = graph_microseconds([partial(again, rows, count)] * REPLAYED)
            figure = f"{name}, batch {batch}, {count} drafts"
            yield Figure(figure, f"{taken:.0f} us", f"{without:.0f} us without", taken / without)


if __name__ == "__main__":
    sys.exit(app())
