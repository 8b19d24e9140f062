"""What transformers answers, in float32 on the CPU: the truth that a cluster must repeat."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from common.model_files import EMBEDDED, resolve


@cache
def reference_model(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@cache
@torch.inference_mode()
def _likeliest(directory: Path, tokens: tuple[int, ...], count: int) -> list[int]:
    """What the model finds likeliest at the last `count` places of `tokens`."""
    logits = reference_model(directory)(torch.tensor([tokens[:-1]]), logits_to_keep=count).logits
    return [int(token) for token in logits[0].argmax(-1)]


def assert_greedy(prompt: Sequence[int], output: Sequence[int], directory: Path | None = None) -> None:
    """Asserts that `output` is what transformers would generate after `prompt`, greedily.

    One pass over prompt and output suffices: if each token is the likeliest one after those before it, then the whole
    is what greedy generation gives, token by token.
    """
    tokens = (*prompt, *output)
    likeliest = _likeliest(directory or resolve(EMBEDDED), tokens, len(output))
    assert list(output) == likeliest
