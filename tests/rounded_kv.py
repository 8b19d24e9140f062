"""What transformers answers with keys and values rounded as a KV cache of 8-bit floats rounds them."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from kernels.fp8 import rounded

# How far below the likeliest token's logit a token may lie. Sums of float32 differ in their last bits, so now and then
# a key or value lies on the other side of the middle between two 8-bit floats, and becomes the other one. The furthest
# of 15,360 tokens after three texts lay 1.12 below: in graphs and without, with drafts and without (SmolLM2, an H200).
GAP = 1.25
SAME = 0.95  # share of tokens that are the likeliest all the same; of a model without rounding it is less


class RoundedCache(DynamicCache):
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **more: Any) -> tuple[Tensor, Tensor]:
        keys, values = (rounded(states).to(states.dtype) for states in (key_states, value_states))
        kept: tuple[Tensor, Tensor] = super().update(keys, values, *args, **more)
        return kept


@torch.inference_mode()
def logits(model: Any, tokens: Sequence[int], count: int) -> Tensor:
    """Of the last `count` of `tokens`: [count, V]."""
    ids = torch.tensor([tokens], device=model.device)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # that the cache's name changes; older releases know this one only
        answer: Tensor = model(ids, past_key_values=RoundedCache(), use_cache=True, logits_to_keep=count).logits[0]
    return answer


def assert_greedy(model: Any, prompts: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]], count: int) -> None:
    """Asserts that each of `outputs` is `count` tokens that the model finds likeliest with rounding, up to GAP and
    SAME, and that fewer of them are without."""
    gaps, same_without_rounding = [], []
    different = dict.fromkeys(zip(map(tuple, prompts), map(tuple, outputs), strict=True))
    for prompt, output in different:
        assert len(output) == count
        tokens, tokens_out = [*prompt, *output[:-1]], torch.tensor(output, device=model.device)
        found = logits(model, tokens, count)
        gaps.append(found.amax(1) - found.gather(1, tokens_out[:, None]).squeeze(1))
        with torch.inference_mode():
            exact = model(torch.tensor([tokens], device=model.device), logits_to_keep=count).logits[0]
        same_without_rounding.append(exact.argmax(1) == tokens_out)
    gap, same = torch.cat(gaps), (torch.cat(gaps) == 0).float().mean()
    assert gap.max() <= GAP, gap.max()
    assert same >= SAME
    assert same > torch.cat(same_without_rounding).float().mean()
