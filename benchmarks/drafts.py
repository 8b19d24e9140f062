"""What speculative decoding gives: tokens a second with and without drafts, where the model quotes its prompt and where
it writes what was not there before, of the engine in one process.

python -m benchmarks.drafts --threads 1
"""

import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from cyclopts import App
from tokenizers import Tokenizer

from benchmarks.in_process import InProcess, spec
from benchmarks.parts import load_model, worker_parts
from benchmarks.report import Figure, Report
from common.device.devices import choose_device, choose_dtype
from common.kv.kv_pool import blocks_for
from common.model.model_config import load_config
from common.model.model_files import EMBEDDED, resolve
from common.sequence import SequenceSpec

app = App(name="drafts", help_format="plaintext")

PASSAGE = 256  # tokens
BLOCK = 16


@app.default
def main(
    *,
    model: str = EMBEDDED,
    text: Path = Path("docs/architecture.md"),
    drafts: tuple[int, ...] = (2, 4, 8),
    batches: tuple[int, ...] = (1, 4, 16),
    output_tokens: int = 128,
    dtype: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    out: Path | None = None,
) -> int:
    """Everything is compared with the same requests without drafts, in the same run.

    Parameters
    ----------
    model: as workers take it.
    text: passages of 256 tokens are taken from it. To be quoted, their first half is repeated behind them, and the
        answer is greedy. To be written on, they are the prompts, and the answer is sampled at temperature 1: a small
        model that is greedy repeats itself.
    drafts: behind each token.
    batches: sequences that run together.
    output_tokens: of each.
    out: JSON file for the figures.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    directory, where = resolve(model), choose_device(device)
    ids = Tokenizer.from_file(str(directory / "tokenizer.json")).encode(text.read_text(encoding="utf-8")).ids
    starts = range(0, len(ids) - PASSAGE, max((len(ids) - PASSAGE) // max(batches), 1))
    passages = [ids[start : start + PASSAGE] for start in starts][: max(batches)]
    if len(passages) < max(batches):
        print("the text is too short for so many passages", file=sys.stderr)
        return 2
    kinds = {
        "quoting": (0.0, [[*passage, *passage[: PASSAGE // 2]] for passage in passages]),
        "writing on": (1.0, passages),
    }
    length = 2 * PASSAGE + output_tokens
    config = load_config(directory, length)
    loaded = load_model(directory, choose_dtype(dtype, config, where), where, dummy=False, max_length=length)

    def engine(count: int) -> InProcess:
        blocks = max(batches) * blocks_for(length, BLOCK)
        pools = (worker_parts(loaded, blocks, BLOCK) for _ in range(2))
        return InProcess(*pools, max_batch=max(batches), max_batch_tokens=512, drafts=count)

    engines = {count: engine(count) for count in (0, *drafts)}
    report = Report(out)
    for kind, (temperature, prompts) in kinds.items():
        specs = [
            spec(tokens, len(tokens) + output_tokens, temperature=temperature, seed=index, block_size=BLOCK)
            for index, tokens in enumerate(prompts)
        ]
        for batch in batches:
            name = f"{kind}, batch {batch}"
            report.section(name, partial(_compare, name, engines, specs[:batch]))
    return report.finish()


def _compare(name: str, engines: dict[int, InProcess], asked: Sequence[SequenceSpec]) -> Iterator[Figure]:
    for engine in engines.values():  # finds out what pays, and fills the prefix caches
        _tokens_per_second(engine, asked)
    rates = {count: max(_tokens_per_second(engine, asked) for _ in range(2)) for count, engine in engines.items()}
    without = rates.pop(0)
    for count, rate in rates.items():
        figure = f"{name}, {count} drafts"
        yield Figure(figure, f"{rate:.1f} tok/s", f"{without:.1f} without", rate / without)


def _tokens_per_second(engine: InProcess, asked: Sequence[SequenceSpec]) -> float:
    began = time.perf_counter()
    outputs = engine.run(asked)
    return sum(map(len, outputs)) / (time.perf_counter() - began)


if __name__ == "__main__":
    sys.exit(app())
