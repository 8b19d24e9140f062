"""Hidden states on their way from one linear layer to the next."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class BegunNorm:
    """What the layer that wrote hidden states did of the RMS norm that comes next. The rest, a division of each token's
    row by the root of its mean square, may as well be done to what a linear layer makes of the row."""

    x: Tensor  # [T, H]: the states times the norm's weight
    squares: Tensor  # [T, any] float32, which add up to each token's sum of squares


@dataclass(frozen=True, slots=True)
class Hidden:
    states: Tensor  # [T, H], contiguous
    begun: BegunNorm | None = None
