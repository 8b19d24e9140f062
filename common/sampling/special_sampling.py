"""Penalties, biases, minimum lengths and log-probabilities: what happens to logits around the kernels' `sample`.

Most sequences need none of it, and cost nothing here. For the others the device counts which tokens it has seen, and
counts each new one as soon as it is sampled, before the host has read it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from common.device.device_io import to_device
from common.sampling.parameters import SamplingParams
from common.sequence import SequenceSpec
from kernels.ops import Sample
from kernels.sampling import SamplingRows

# Float32 copies of logits are made of so many rows at once: of whole batches they would take gigabytes.
ROWS_AT_ONCE = 32


def wants_adjusting(spec: SequenceSpec, length: int) -> bool:
    """Whether logits of the token at index `length`, or of a later one, may have to be changed."""
    bars_stops = bool(spec.stop_token_ids) and length < spec.min_length
    return spec.sampling.has_penalties or bool(spec.sampling.logit_bias) or bars_stops


def wants_logprobs(spec: SequenceSpec) -> bool:
    return spec.sampling.logprobs is not None


@dataclass(frozen=True, slots=True)
class AdjustedRows:
    """The A rows of a batch whose logits are changed, on the device. Made afresh when the batch changes."""

    rows: Tensor  # [A] int64, in the logits
    slots: Tensor  # [A] int64, in the TokenCounts
    repetition: Tensor  # [A, 1] float32
    presence: Tensor  # [A, 1] float32
    frequency: Tensor  # [A, 1] float32
    bias_ids: Tensor  # [A, S] int64, padded with 0
    biases: Tensor  # [A, S] float32, padded with 0
    stop_ids: Tensor  # [A, E] int64, padded with the row's first one (with 0 where there is none)
    min_lengths: Tensor  # [A] int64, 0 where there are no stop ids

    def parts(self) -> Iterator["AdjustedRows"]:
        """Up to `ROWS_AT_ONCE` rows each."""
        columns = (getattr(self, field.name).split(ROWS_AT_ONCE) for field in fields(self))
        return (AdjustedRows(*part) for part in zip(*columns, strict=True))


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities of L rows' tokens in the model's own distribution, and of the likeliest tokens there."""

    tokens: Tensor  # [L] float32
    top_ids: Tensor  # [L, K] int64
    top: Tensor  # [L, K] float32


class TokenCounts:
    """How often each sequence has sampled each token, and which tokens are in its prompt.

    A running sequence has a slot, which takes 5 bytes for each token of the vocabulary. The table doubles when it is
    full.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._device = device
        self._sampled = torch.zeros((0, vocab_size), dtype=torch.int32, device=device)
        self._in_prompt = torch.zeros((0, vocab_size), dtype=torch.bool, device=device)
        self._free: list[int] = []

    def add(self, spec: SequenceSpec, tokens: Sequence[int]) -> int:
        """Takes a slot for a sequence that has `tokens` (prompt and output) so far, and returns it."""
        if not self._free:
            self._grow()
        slot = self._free.pop()
        ids = to_device(np.asarray(tokens, dtype=np.int64), self._device)
        prompt, output = ids[: spec.prompt_length], ids[spec.prompt_length :]
        self._in_prompt[slot] = False
        self._in_prompt[slot, prompt] = True
        self._sampled[slot] = 0
        self._sampled[slot].index_add_(0, output, torch.ones_like(output, dtype=torch.int32))
        return slot

    def remove(self, slot: int) -> None:
        self._free.append(slot)

    def select(self, entries: Sequence[tuple[int, int, SequenceSpec]]) -> AdjustedRows:
        """Copies what is to be changed in a batch to the device. `entries`: (row, slot, spec) of at least one
        sequence."""
        params = [spec.sampling for _, _, spec in entries]
        stops = [sorted(spec.stop_token_ids) for _, _, spec in entries]
        most_stops = max(map(len, stops))
        min_lengths = [spec.min_length if spec.stop_token_ids else 0 for _, _, spec in entries]
        penalties = [(p.repetition_penalty, p.presence_penalty, p.frequency_penalty) for p in params]
        repetition, presence, frequency = to_device(
            np.asarray(penalties, dtype=np.float32).T[:, :, None].copy(), self._device
        )
        rows, slots = to_device(
            np.asarray([(row, slot) for row, slot, _ in entries], dtype=np.int64).T.copy(), self._device
        )
        return AdjustedRows(
            rows=rows,
            slots=slots,
            repetition=repetition,
            presence=presence,
            frequency=frequency,
            bias_ids=self._padded([[token for token, _ in p.logit_bias] for p in params], np.int64),
            biases=self._padded([[bias for _, bias in p.logit_bias] for p in params], np.float32),
            stop_ids=self._padded([ids + ids[:1] * (most_stops - len(ids)) for ids in stops], np.int64),
            min_lengths=to_device(np.asarray(min_lengths, dtype=np.int64), self._device),
        )

    def adjust(self, logits: Tensor, positions: Tensor, adjusted: AdjustedRows) -> Tensor:
        """A copy of logits [B, V] to sample from, in float32, in which the `adjusted` rows are changed.

        In this order: repetition penalty over prompt and output (CTRL: Keskar et al., 2019, section 4.1), presence and
        frequency penalty over the output, bias, and -inf for stop tokens below the sequence's minimum length.

        Args:
            logits: [B, V] from the model.
            positions: [B] int32 or int64, index in its sequence of the token to sample.
            adjusted: what to change.
        """
        wide = logits.float() if logits.dtype != torch.float32 else logits.clone()
        for part in adjusted.parts():
            wide[part.rows] = self._changed(wide[part.rows], positions[part.rows], part)
        return wide

    def _changed(self, logits: Tensor, positions: Tensor, adjusted: AdjustedRows) -> Tensor:
        """Of `adjusted` rows only: logits [A, V] float32, positions [A]."""
        sampled = self._sampled[adjusted.slots]
        seen = self._in_prompt[adjusted.slots] | (sampled > 0)
        penalised = torch.where(logits > 0, logits / adjusted.repetition, logits * adjusted.repetition)
        changed = torch.where(seen, penalised, logits)
        changed -= adjusted.frequency * sampled + adjusted.presence * (sampled > 0)
        changed.scatter_add_(1, adjusted.bias_ids, adjusted.biases)
        barred = positions < adjusted.min_lengths
        stop_logits = changed.gather(1, adjusted.stop_ids)
        return changed.scatter_(1, adjusted.stop_ids, stop_logits.masked_fill(barred[:, None], -torch.inf))

    def record(self, tokens: Tensor, adjusted: AdjustedRows) -> None:
        """Counts the tokens [B] int32 that a step sampled, on the device and in stream order with the steps."""
        ids = tokens[adjusted.rows].long()
        self._sampled.index_put_((adjusted.slots, ids), self._sampled.new_ones(1), accumulate=True)

    def _grow(self) -> None:
        old = self._sampled.shape[0]
        new = max(4, 2 * old)
        self._sampled = torch.cat([self._sampled, self._sampled.new_zeros(new - old, self._sampled.shape[1])])
        self._in_prompt = torch.cat([self._in_prompt, self._in_prompt.new_zeros(new - old, self._in_prompt.shape[1])])
        self._free = list(range(old, new))

    def _padded(self, lists: Sequence[Sequence[float]], dtype: type[np.generic]) -> Tensor:
        array = np.zeros((len(lists), max(map(len, lists))), dtype=dtype)
        for row, values in zip(array, lists, strict=True):
            row[: len(values)] = values
        return to_device(array, self._device)


def logprobs(logits: Tensor, tokens: Tensor, rows: Tensor, top: int) -> TokenLogprobs:
    """Log-probabilities of sampled tokens and of the likeliest tokens, before penalties and temperature.

    Args:
        logits: [B, V] from the model.
        tokens: [B] int32, what was sampled.
        rows: [L] int64, the rows that want log-probabilities.
        top: K, the most alternatives that any of them wants.
    """
    parts = []
    for part in torch.split(rows, ROWS_AT_ONCE):
        chosen = logits[part].float().log_softmax(dim=-1)
        likeliest = chosen.topk(top, dim=-1)
        parts.append((chosen.gather(1, tokens[part].long()[:, None]).squeeze(1), likeliest.indices, likeliest.values))
    return TokenLogprobs(*(torch.cat(column) for column in zip(*parts, strict=True)))


@torch.inference_mode()
def warm_up(sample: Sample, most_rows: int, vocab_size: int, dtype: torch.dtype, device: torch.device) -> None:
    """Does everything in this module once, for logits [1, V] and [most_rows, V] of `dtype`. Otherwise the first request
    that needs it, and the whole batch with it, would wait while kernels are compiled and loaded; and too little memory
    for the largest batch would only show when there is one."""
    params = SamplingParams(0, presence_penalty=1, logit_bias=((0, 1.0),))
    spec = SequenceSpec((0,), 1, (), params, 3, min_length=3, stop_token_ids=frozenset((0,)))
    counts = TokenCounts(vocab_size, device)
    for rows in (1, most_rows):
        slots = [counts.add(spec, spec.token_ids) for _ in range(rows)]
        adjusted = counts.select([(row, slot, spec) for row, slot in enumerate(slots)])
        logits = torch.zeros((rows, vocab_size), dtype=dtype, device=device)
        zeros = torch.zeros(rows, device=device)
        integers = zeros.int()
        wide = counts.adjust(logits, integers, adjusted)
        tokens = sample(wide, SamplingRows(zeros, integers, zeros + 1, zeros, zeros.long()), integers)
        counts.record(tokens, adjusted)
        logprobs(logits, tokens, adjusted.rows, 1)
        for slot in slots:
            counts.remove(slot)
