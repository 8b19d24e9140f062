"""The table of rotary embeddings (Su et al., "RoFormer", 2021, section 3.2.2), stretched as the model's config says."""

import math

import torch
from torch import Tensor

from common.model.model_config import ModelConfig
from common.model.rope_scaling import LinearScaling, Llama3Scaling, YarnScaling


def rotary_table(config: ModelConfig) -> Tensor:
    """[context_length, head_dim] float32: cosines of each position's head_dim/2 angles, then their sines."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies, amplitude = 1.0 / config.rope_theta**exponents, 1.0
    match scaling := config.rope_scaling:
        case LinearScaling():
            frequencies = frequencies / scaling.factor
        case Llama3Scaling():
            frequencies = _stretched(frequencies, scaling.factor, _kept_by_llama3(frequencies, scaling))
        case YarnScaling():
            frequencies = _stretched(frequencies, scaling.factor, _kept_by_yarn(config, scaling))
            amplitude = scaling.attention_factor
    angles = torch.outer(torch.arange(config.context_length, dtype=torch.float32), frequencies)
    return torch.cat([angles.cos(), angles.sin()], dim=1).mul_(amplitude)


def unrotated_table(config: ModelConfig) -> Tensor:
    """Such a table of angles that are zero, for layers that rotate nothing. Empty if there are none."""
    length, half = config.context_length if config.unrotated_layers else 0, config.head_dim // 2
    return torch.cat([torch.ones(length, half), torch.zeros(length, half)], dim=1)


def _stretched(frequencies: Tensor, factor: float, share_kept: Tensor) -> Tensor:
    return frequencies * share_kept + frequencies / factor * (1 - share_kept)


def _kept_by_llama3(frequencies: Tensor, scaling: Llama3Scaling) -> Tensor:
    turns = scaling.original_context * frequencies / (2 * math.pi)  # within the context that was trained first
    share_kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return share_kept.clamp(0.0, 1.0)


def _kept_by_yarn(config: ModelConfig, scaling: YarnScaling) -> Tensor:
    """A ramp over the dimensions, from the one that turns `fast_turns` times to the one that turns `slow_turns` times
    within the original context."""

    def dimension(turns: float) -> float:
        wavelengths = scaling.original_context / (turns * 2 * math.pi)
        return config.head_dim * math.log(wavelengths) / (2 * math.log(config.rope_theta))

    first, last = dimension(scaling.fast_turns), dimension(scaling.slow_turns)
    if scaling.whole_ends:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, config.head_dim - 1)
    if first == last:
        last += 0.001  # as in transformers: a step
    ramp = (torch.arange(config.head_dim // 2, dtype=torch.float32) - first) / (last - first)
    return 1 - ramp.clamp(0.0, 1.0)
