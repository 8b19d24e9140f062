"""Prompts of real text, and what transformers answers to them on this machine's GPU."""

import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from common.sampling.parameters import SamplingParams
from kernels.sampling import philox_uniform

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LENGTHS: tuple[int, ...]
LENGTHS = (1, 2, 3, 5, 8, 15, 16, 17, 31, 32, 33, 47, 48, 63, 64, 65, 80, 100, 127, 128, 129, 150, 200, 255, 256)
LENGTHS += (300, 400, 511, 512, 700, 1_000, 1_500)


def text(directory: Path, lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Prompts of these lengths from the licence. After real text a model is sure enough of itself that a sampled token
    does not hang on the last bits of a sum over the vocabulary, which differ between batches of different sizes."""
    tokens = _licence(directory)
    starts = random.Random(seed).sample(range(len(tokens) - max(lengths)), len(lengths))
    return [tokens[start : start + length] for start, length in zip(starts, lengths, strict=True)]


@cache
def _licence(directory: Path) -> list[int]:
    written = (Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8")
    ids: list[int] = Tokenizer.from_file(str(directory / "tokenizer.json")).encode(written).ids
    return ids


@cache
def reference(directory: Path) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model.to(DEVICE).eval()


@torch.inference_mode()
def gaps(directory: Path, prompt: Sequence[int], output: Sequence[int]) -> torch.Tensor:
    """How far each output token's logit lies below the likeliest one's, as transformers has them in float32, by token.

    All zero: the output is what greedy generation gives.
    """
    tokens = torch.tensor([[*prompt, *output[:-1]]], device=DEVICE)
    logits = reference(directory)(tokens, logits_to_keep=len(output)).logits[0]
    chosen = logits.gather(1, torch.tensor(output, device=DEVICE)[:, None]).squeeze(1)
    gap: torch.Tensor = logits.amax(1) - chosen
    return gap


def assert_greedy(
    directory: Path, asked: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]], count: int
) -> None:
    for prompt, output in zip(asked, outputs, strict=True):
        assert len(output) == count
        gap = gaps(directory, prompt, output)
        assert not gap.any(), f"prompt of {len(prompt)}: first wrong at {int(gap.nonzero()[0])}, by {gap.max():.2e}"


@torch.inference_mode()
def assert_same_draws(
    directory: Path, prompt: Sequence[int], sampling: SamplingParams, one: Sequence[int], other: Sequence[int]
) -> None:
    """The same tokens, up to one, if there is one, where the draw lies nearer to what divides the two tokens than sums
    over the vocabulary in float32 can tell, which differ between batches of different sizes."""
    assert len(one) == len(other)
    place = next((place for place, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1]), None)
    if place is None:
        return
    tokens = torch.tensor([[*prompt, *one[:place]]], device=DEVICE)
    logits = reference(directory)(tokens, logits_to_keep=1).logits[0, 0].double()
    running = (logits / sampling.temperature).softmax(-1).cumsum(-1)
    position = torch.tensor([len(prompt) + place])
    draw = float(philox_uniform(torch.tensor([sampling.seed]), position))
    for token in (one[place], other[place]):
        first, last = float(running[token - 1]) if token else 0.0, float(running[token])
        assert first - 1e-5 <= draw <= last + 1e-5, f"token {place} is {token}, and that of the draw is another"
