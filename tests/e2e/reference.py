"""What transformers answers, in float32 on the CPU: the truth that a cluster must repeat."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from common.model.model_files import EMBEDDED, resolve


@cache
def reference_model(directory: Path) -> Any:
    torch.set_num_threads(1)
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


def assert_all_greedy(prompts: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]]) -> None:
    """As `assert_greedy`, on all cores: the cluster has stopped by then, or waits.

    A prompt on each core: of one that is computed on all of them, the cores wait for one another after every operation,
    which takes longer than one core alone where one of them is wanted elsewhere.
    """
    reference_model(resolve(EMBEDDED))
    longest_first = sorted(zip(prompts, outputs, strict=True), key=lambda pair: -len(pair[0]))
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for checked in [pool.submit(assert_greedy, prompt, output) for prompt, output in longest_first]:
            checked.result()
