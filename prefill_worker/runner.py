"""Runs packed batches of chunks and samples the first token of each prompt that they end."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.device_io import HostCopy, to_device
from common.host_logprobs import HostLogprobs
from common.sampling import SamplingParams
from common.sequence import SequenceSpec
from common.special_sampling import TokenCounts, wants_adjusting
from common.worker_parts import WorkerParts
from prefill_worker.batch import pack
from prefill_worker.scheduler import Chunk, Prompt
from twostroke.v1 import worker_pb2 as pb

WARM_UP_PROMPTS = 65  # in one batch; more of them run the same kernels


@dataclass(frozen=True, slots=True)
class FirstToken:
    token: int
    logprobs: pb.Logprobs | None


@dataclass(frozen=True, slots=True)
class LaunchedBatch:
    """A batch that the device is at work on, with the first tokens of the prompts that it ends, in order."""

    chunks: list[Chunk]
    tokens: HostCopy
    logprobs: HostLogprobs

    def first_tokens(self) -> list[FirstToken]:
        """Waits for the batch."""
        logprobs = self.logprobs.read()
        return [FirstToken(token, logprobs.get(row)) for row, token in enumerate(self.tokens.get().tolist())]


class Runner:
    def __init__(self, parts: WorkerParts) -> None:
        self._parts = parts
        self._counts = TokenCounts(parts.model.config.vocab_size, parts.device)

    def warm_up(self, tokens: int) -> None:
        """Runs batches of all sizes up to `tokens`, so that no request pays for kernels being compiled or loaded, and
        memory that is too small for the largest shows at start. What runs depends on the tokens of a batch, on the
        prompts that it ends, on whether those counts are multiples of 16, and on whether a chunk has context."""
        longest = min(tokens, self._parts.max_length - 1)
        blocks = self._parts.blocks.allocate(-(-longest // self._parts.pool.layout.block_size))
        for size in _warm_up_sizes(tokens):
            prompts = -(-size // longest)
            self._run_dummies(prompts, 0, size // prompts, blocks)
            if size // prompts > 1:
                self._run_dummies(1, size // prompts // 2, size // prompts, blocks)
            if size <= WARM_UP_PROMPTS:
                self._run_dummies(size, 0, 1, blocks)
        self._parts.blocks.release(blocks)

    def _run_dummies(self, prompts: int, start: int, end: int, blocks: list[int]) -> None:
        """The last chunk of some prompts, from `start`. All write to the same blocks, which nobody reads for long."""
        spec = SequenceSpec((0,) * end, end, (), SamplingParams(), max_length=end + 1)
        self.launch([Chunk(Prompt(0, 0, spec, blocks), start, end)] * prompts).first_tokens()

    @torch.inference_mode()
    def launch(self, chunks: list[Chunk]) -> LaunchedBatch:
        parts = self._parts
        batch = pack(chunks, parts.pool.layout.block_size, parts.device)
        scale = parts.model.config.head_dim**-0.5

        def attend(q: Tensor, k: Tensor, v: Tensor, key_cache: Tensor, value_cache: Tensor) -> Tensor:
            return parts.ops.prefill_attention(q, k, v, key_cache, value_cache, batch.attention, scale)

        hidden = parts.model.forward(batch.tokens, batch.positions, batch.slots, parts.pool, attend)
        logits = parts.model.logits(hidden[batch.last_tokens])
        specs = [chunk.prompt.spec for chunk in chunks if chunk.is_last]
        tokens = self._sample(specs, logits)
        return LaunchedBatch(chunks, HostCopy(tokens), HostLogprobs(specs, logits, tokens))

    def _sample(self, specs: list[SequenceSpec], logits: Tensor) -> Tensor:
        if not specs:
            return logits.new_empty(0, dtype=torch.int32)
        device = self._parts.device
        params = [spec.sampling for spec in specs]
        floats = np.asarray([(p.temperature, p.top_p, p.min_p) for p in params], dtype=np.float32).T.copy()
        integers = np.asarray([(p.top_k, len(spec.token_ids)) for p, spec in zip(params, specs, strict=True)])
        seeds = np.asarray([p.seed for p in params], dtype=np.uint64).view(np.int64)
        temperature, top_p, min_p = to_device(floats, device)
        top_k, positions = to_device(integers.astype(np.int32).T.copy(), device)
        special = [
            (row, self._counts.add(spec, spec.token_ids), spec)
            for row, spec in enumerate(specs)
            if wants_adjusting(spec, len(spec.token_ids))
        ]
        if special:
            logits = self._counts.adjust(logits, positions, self._counts.select(special))
        for _, slot, _ in special:
            self._counts.remove(slot)
        return self._parts.ops.sample(logits, temperature, top_k, top_p, min_p, to_device(seeds, device), positions)


def _warm_up_sizes(most: int) -> list[int]:
    """`most`, and the powers of two below it with their successors; the largest first, so that it is what memory is
    taken for."""
    powers = [1 << exponent for exponent in range(most.bit_length())]
    sizes = {size for power in powers for size in (power, power + 1) if size < most}
    return [most, *sorted(sizes, reverse=True)]
