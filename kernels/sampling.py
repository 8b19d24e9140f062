"""Sampling the next token: temperature, top-k, top-p and min-p, with randomness keyed by (seed, position).

Nucleus sampling (top-p): Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020. Min-p: Nguyen et al.,
"Turning Up the Heat", 2024. Philox: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011, section 3.3.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF
_FIRST_WIDTH = 512  # most nuclei are smaller, so they are found without sorting the whole vocabulary


@dataclass(frozen=True, slots=True)
class SamplingRows:
    """How the tokens of B rows are sampled."""

    temperature: Tensor  # [B] float32; 0: greedy
    top_k: Tensor  # [B] int32; 0: all
    top_p: Tensor  # [B] float32; 1: all
    min_p: Tensor  # [B] float32; 0: all
    seeds: Tensor  # [B] int64, two's complement of the unsigned seed

    def select(self, rows: Callable[[Tensor], Tensor]) -> "SamplingRows":
        """Other rows: what `rows` makes of each column."""
        columns = self.temperature, self.top_k, self.top_p, self.min_p, self.seeds
        return SamplingRows(*map(rows, columns))


def philox_uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """One number in [0, 1) for each (seed, position), by Philox4x32-10.

    The key words are (seed low, seed high), the counter words (position, 0, 0, 0). The result is
    (first word >> 8) * 2^-24, exact in float32.

    seeds [B] int64 (two's complement of the unsigned seed); positions [B] int32 or int64. Returns [B] float32.
    """
    k0, k1 = seeds & _MASK32, (seeds >> 32) & _MASK32
    c0 = positions.long() & _MASK32
    c1, c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0), torch.zeros_like(c0)
    for _ in range(10):
        # int64 products wrap modulo 2^64, which keeps all 64 bits of the unsigned product
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _MASK32) ^ c1 ^ k0,
            product1 & _MASK32,
            ((product0 >> 32) & _MASK32) ^ c3 ^ k1,
            product0 & _MASK32,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return (c0 >> 8).float() * 2.0**-24


def sample(logits: Tensor, rows: SamplingRows, positions: Tensor) -> Tensor:
    """One token for each row; a row's token does not depend on the other rows.

    logits [B, V] float32 or the model's dtype; positions [B] int32 or int64: the index, in its sequence, of the token
    to draw. Returns [B] int32.

    Temperature 0 takes the token with the largest logit, of equal ones that with the lowest index. Otherwise, with
    p = softmax(logits / temperature) in float32, three filters apply in this order:
    - top-k keeps tokens whose logit is at least the k-th largest, and p is normalised over them;
    - top-p keeps tokens if those strictly more likely add up to less than top_p;
    - min-p keeps tokens with p of at least min_p times the largest p.
    Tokens of equal probability are kept or dropped together. The token drawn is the first, in token order, at which
    the running sum of the kept p exceeds u times their whole sum, with u = philox_uniform(seed, position).

    Of logits that are NaN or +inf, or all -inf, as a model that overflows makes them, any token of the vocabulary is
    drawn.
    """
    tokens = logits.argmax(dim=-1)
    drawn = (rows.temperature > 0).nonzero().squeeze(1)
    if drawn.numel() == 0:
        return tokens.int()
    drawn_rows = rows.select(lambda column: column[drawn])
    scaled = logits[drawn].float() / drawn_rows.temperature[:, None]
    p = _keep_top_k(scaled, drawn_rows.top_k).softmax(dim=-1)
    p = _keep_top_p(p, drawn_rows.top_p)
    p = p.masked_fill(p < drawn_rows.min_p[:, None] * p.amax(dim=-1, keepdim=True), 0.0)
    running = p.cumsum(dim=-1, dtype=torch.float64)
    u = philox_uniform(drawn_rows.seeds, positions[drawn])
    picked = torch.searchsorted(running, u[:, None] * running[:, -1:], right=True).squeeze(1)
    tokens[drawn] = picked.clamp(max=logits.shape[1] - 1)  # nothing exceeds NaN
    return tokens.int()


def _keep_top_k(scaled: Tensor, top_k: Tensor) -> Tensor:
    vocab = scaled.shape[1]
    widest = int(top_k.max())
    if widest == 0:
        return scaled
    largest = scaled.topk(min(widest, vocab), dim=-1).values
    least = largest.gather(1, top_k.long().clamp(1, largest.shape[1])[:, None] - 1)
    return scaled.masked_fill((scaled < least) & (top_k > 0)[:, None], -torch.inf)


def _keep_top_p(p: Tensor, top_p: Tensor) -> Tensor:
    limited = top_p < 1
    if not bool(limited.any()):
        return p
    vocab = p.shape[1]
    width = min(_FIRST_WIDTH, vocab)
    while True:
        largest = p.topk(width, dim=-1).values
        running = largest.cumsum(dim=-1)
        if width == vocab or bool((running[:, -1] >= top_p)[limited].all()):
            break
        width = min(8 * width, vocab)
    inside = running - largest < top_p[:, None]
    least = largest.where(inside, torch.inf).amin(dim=-1)
    return p.masked_fill((p < least[:, None]) & limited[:, None], 0.0)
