"""How a config.json stretches rotary embeddings to longer contexts. Imports no torch."""

import math
from dataclasses import dataclass
from typing import Any

from common.model.config_values import MOST, number, object_of, positive
from common.model.model_error import ModelError


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """All frequencies are divided by `factor` (Chen et al., "Extending Context Window of Large Language Models via
    Positional Interpolation", 2023)."""

    factor: float


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Llama 3.1's stretch of the slow rotary frequencies (`rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """Slow frequencies are divided by `factor` and fast ones kept, with a ramp between them (Peng et al., "YaRN:
    Efficient Context Window Extension of Large Language Models", 2023, sections 3.2 and 3.4)."""

    factor: float
    original_context: int
    fast_turns: float  # within the original context; what turns faster is kept
    slow_turns: float  # what turns slower is divided
    whole_ends: bool  # the ramp begins and ends at whole dimensions
    attention_factor: float  # of cosines and sines

    @property
    def context_length(self) -> int:
        return round(self.factor * self.original_context)


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling


def parse(raw: dict[str, Any], usual_theta: float) -> tuple[float, RopeScaling | None]:
    """The base of the frequencies, and how they are stretched. Raises ModelError for what is not supported."""
    # Where there are both, transformers takes rope_scaling: the one that people add to what it has written.
    parameters = object_of(raw, "rope_scaling") or object_of(raw, "rope_parameters")
    theta = number(raw if parameters.get("rope_theta") is None else parameters, "rope_theta", usual_theta)
    partial = parameters.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if partial not in (None, 1):
        raise ModelError(f"partial_rotary_factor {partial} is not supported: whole heads must be rotated")
    match kind := parameters.get("rope_type") or parameters.get("type") or "default":
        case "default":
            return theta, None
        case "linear":
            return theta, LinearScaling(number(parameters, "factor"))
        case "llama3":
            return theta, _llama3(parameters)
        case "yarn":
            if theta <= 1:
                raise ModelError(f"the rope type 'yarn' needs a rope_theta above 1; config.json gives {theta}")
            return theta, _yarn(parameters, positive(raw, "max_position_embeddings"))
    raise ModelError(f"the rope type {kind!r} is not supported; supported are 'default', 'linear', 'llama3' and 'yarn'")


def _llama3(parameters: dict[str, Any]) -> Llama3Scaling:
    needed = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    if missing := [key for key in needed if key not in parameters]:
        raise ModelError(f"the rope type 'llama3' needs {missing[0]} in config.json")
    scaling = Llama3Scaling(
        factor=number(parameters, "factor"),
        low_freq_factor=number(parameters, "low_freq_factor"),
        high_freq_factor=number(parameters, "high_freq_factor"),
        original_context=positive(parameters, "original_max_position_embeddings"),
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise ModelError("config.json must give a high_freq_factor above its low_freq_factor")
    return scaling


def _yarn(parameters: dict[str, Any], context_length: int) -> YarnScaling:
    """Whatever config.json leaves out is as in transformers."""
    original = positive(parameters, "original_max_position_embeddings", context_length)
    factor = number(parameters, "factor", context_length / original)
    fast, slow = number(parameters, "beta_fast", 32.0), number(parameters, "beta_slow", 1.0)
    if fast <= slow:
        raise ModelError(f"config.json must give a beta_fast above its beta_slow; it gives {fast} and {slow}")
    if not isinstance(whole := parameters.get("truncate", True), bool):
        raise ModelError(f"config.json must give truncate as true or false; it gives {whole!r}")
    attention = _yarn_attention(factor)
    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        attention = _yarn_attention(factor, number(parameters, "mscale")) / _yarn_attention(
            factor, number(parameters, "mscale_all_dim")
        )
    scaling = YarnScaling(factor, original, fast, slow, whole, number(parameters, "attention_factor", attention))
    if scaling.context_length > MOST:
        raise ModelError(f"config.json stretches {original} tokens {factor} times, which no model does")
    return scaling


def _yarn_attention(factor: float, scale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0
