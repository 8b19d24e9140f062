"""8-bit floats (e4m3; Micikevicius et al., "FP8 Formats for Deep Learning", 2022): weights, products with them, KV.

Both factors of a product with weights are 8-bit floats times scales. Those of a weight are stored with it; those of x
are found for each token as it comes, so that the largest value becomes the largest 8-bit float. Either one scale holds
for all inputs of a token and of an output, or one for each group of 128 ("DeepSeek-V3 Technical Report", 2024, section
3.3.2).
"""

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # finite value of E4M3
GROUP = 128  # inputs, and outputs, that share a scale where it is not one for all inputs
SMALLEST = 1e-10  # largest value of a group from which its scale is computed: zeros would have none


@dataclass(frozen=True, slots=True)
class Fp8Weight:
    """A matrix of N outputs and K inputs: its values times their scales. A stack of such has one dimension more, the
    first.

    scales [N, 1]: one for each output; or [N / GROUP, K / GROUP]: one for each square block.
    """

    values: Tensor  # [N, K] E4M3
    scales: Tensor  # float32

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def in_blocks(self) -> bool:
        return self.scales.shape[-2] != self.values.shape[-2]

    @property
    def group(self) -> int:
        """How many inputs share a scale, of the weight and of what it is multiplied by."""
        return self.values.shape[-1] // self.scales.shape[-1]

    def __getitem__(self, index: int) -> "Fp8Weight":
        """One matrix of a stack."""
        return Fp8Weight(self.values[index], self.scales[index])


Weight = Tensor | Fp8Weight


def quantize(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """x [T, K] as (values [T, K] E4M3, scales [T, K / group] float32), of which x is about the product."""
    groups = x.float().reshape(x.shape[0], x.shape[1] // group, group)
    scales = groups.abs().amax(-1).clamp(min=SMALLEST) / LARGEST
    return (groups / scales.unsqueeze(-1)).to(E4M3).flatten(1), scales


def rounded(x: Tensor) -> Tensor:
    """Each value as the nearest E4M3, without a scale: as KV caches of that type hold it. Beyond the largest it is the
    largest; NaN stays NaN."""
    return x.float().clamp(-LARGEST, LARGEST).to(E4M3)


def widened(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in `dtype`. E4M3 is looked up, which takes a CPU a fifth of the time that torch takes to convert it."""
    if x.dtype != E4M3:
        return x.to(dtype)
    return _every(dtype, x.device).index_select(0, x.view(torch.uint8).flatten().int()).view(x.shape)


@cache
def _every(dtype: torch.dtype, device: torch.device) -> Tensor:
    """What each byte is as E4M3: [256]."""
    return torch.arange(256, dtype=torch.uint8, device=device).view(E4M3).to(dtype)


def dequantize(values: Tensor, scales: Tensor) -> Tensor:
    """The product of values [A, B] and scales [a, b], each of which holds for a block of A / a by B / b. float32."""
    rows, columns = (of // by for of, by in zip(values.shape, scales.shape, strict=True))
    blocks = values.float().view(scales.shape[0], rows, scales.shape[1], columns)
    return (blocks * scales[:, None, :, None]).view(values.shape)


def linear(x: Tensor, weight: Fp8Weight, bias: Tensor | None = None) -> Tensor:
    """x [T, K], quantized, times the weight, plus bias [N] or None. Summed in float32. Returns [T, N] in x's dtype."""
    product = F.linear(dequantize(*quantize(x, weight.group)), dequantize(weight.values, weight.scales))
    return (product if bias is None else product + bias.float()).to(x.dtype)
