"""What a model's answers lose by KV in 8-bit floats: one text through it with each type of weights and of KV, and how
well each predicts the text. To decide with, for your model and your texts. The log-probabilities that all are compared
with stay in memory: so many tokens times the vocabulary, times 4 bytes.

    python -m benchmarks.kv_cache_dtype --model Qwen/Qwen3-0.6B --text mine.txt
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from cyclopts import App
from tokenizers import Tokenizer
from torch import Tensor

from benchmarks.in_process import spec
from benchmarks.parts import LoadedModel, load_model, worker_parts
from benchmarks.report import Figure, Report
from common.device.device_io import to_device
from common.device.devices import choose_device
from common.kv.kv_pool import blocks_for
from common.model.model_config import load_config
from common.model.model_files import EMBEDDED, resolve
from common.worker.worker_parts import WorkerParts
from prefill_worker.batch import exact_shape, pack
from prefill_worker.forward import Forward
from prefill_worker.scheduler import Chunk, Prompt

app = App(name="kv_cache_dtype", help_format="plaintext")


@app.default
def main(
    *,
    model: str = EMBEDDED,
    text: Path = Path("docs/architecture.md"),
    tokens: int = 4096,
    window: int = 1024,
    dtypes: tuple[str, ...] = ("float32", "bfloat16"),
    device: str = "auto",
    out: Path | None = None,
) -> int:
    """Everything is compared with the first of the types, and KV in it.

    Parameters
    ----------
    model: as workers take it.
    tokens: how many of the text's tokens to read.
    window: each so many tokens are read by themselves.
    dtypes: of the weights.
    out: JSON file for the figures.
    """
    directory = resolve(model)
    window = min(window, load_config(directory).context_length - 1)
    ids = Tokenizer.from_file(str(directory / "tokenizer.json")).encode(text.read_text(encoding="utf-8")).ids[:tokens]
    windows = [ids[start : start + window] for start in range(0, len(ids) - 1, window)]
    if not windows:
        print("the text is too short: it must have two tokens at least", file=sys.stderr)
        return 2
    truth: list[Tensor] = []
    report = Report(out)
    where = choose_device(device)
    for dtype in dtypes:
        _compare_kv(report, load_model(directory, dtype, where, dummy=False, max_length=window + 1), windows, truth)
    return report.finish()


def _compare_kv(report: Report, loaded: LoadedModel, windows: list[list[int]], truth: list[Tensor]) -> None:
    for kv in ("auto", "fp8"):
        parts = worker_parts(loaded, blocks_for(max(map(len, windows)), 16), kv_cache_dtype=kv)
        name = f"{loaded.model.dtype}, KV {kv}"
        report.section(name, partial(_compare, parts, windows, truth, name))


def _compare(parts: WorkerParts, windows: list[list[int]], truth: list[Tensor], name: str) -> Iterator[Figure]:
    """`truth`: log-probabilities of each window by the first that was measured, which are filled in by that."""
    losses, divergences, same = [], [], []
    for index, tokens in enumerate(windows):
        predicted = _log_probabilities(parts, tokens)
        if index == len(truth):
            truth.append(predicted)
        exact = truth[index]
        losses.append(-predicted[:-1].gather(1, torch.tensor(tokens[1:])[:, None]).squeeze(1))
        divergences.append((exact.exp() * (exact - predicted)).sum(-1))
        same.append(exact.argmax(-1) == predicted.argmax(-1))
    yield Figure(f"{name}: perplexity", f"{torch.cat(losses).mean().exp():.3f}")
    yield Figure(f"{name}: divergence from the first (KL), a token", f"{torch.cat(divergences).mean():.4f} nats")
    yield Figure(f"{name}: the same token is likeliest", f"{100 * torch.cat(same).float().mean():.1f} %")


@torch.inference_mode()
def _log_probabilities(parts: WorkerParts, tokens: list[int]) -> Tensor:
    """Of all tokens that could follow each of `tokens`: [T, V] float32, on the CPU."""
    blocks = parts.blocks.allocate(blocks_for(len(tokens), parts.pool.layout.block_size))
    chunks = [Chunk(Prompt(0, 0, spec(tokens, len(tokens) + 1, temperature=0.0), blocks), 0, len(tokens))]
    shape = exact_shape(chunks, parts.pool.layout.block_size)
    array = to_device(pack(chunks, parts.pool.layout.block_size, shape), parts.device)
    batch = shape.views(array, (len(tokens),), (len(tokens),))
    everywhere = replace(batch, last_tokens=torch.arange(len(tokens), device=parts.device))
    logits = parts.model.logits(Forward(parts.model, parts.pool, parts.ops).last_hidden(everywhere))
    parts.blocks.release(blocks)
    return logits.float().log_softmax(-1).cpu()


if __name__ == "__main__":
    sys.exit(app())
