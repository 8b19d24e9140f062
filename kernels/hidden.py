"""Hidden states on their way from one linear layer to the next."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class BegunNorm:
    """The part of the next RMS norm that was done by the layer that wrote the hidden states.

    What is left is to divide each token's row by the root of its mean square. That is one factor per row, so a linear
    layer may apply it to its output instead of its input.
    """

    x: Tensor  # [T, H]: the states times the norm's weight
    squares: Tensor  # [T, any] float32: partial sums of a token's squares, to be added up


@dataclass(frozen=True, slots=True)
class Hidden:
    states: Tensor  # [T, H], contiguous, of the model's dtype
    begun: BegunNorm | None = None
