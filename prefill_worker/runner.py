"""Runs packed batches of chunks, and samples the first token of each prompt that ends in one."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from common.device.device_io import HostCopy, to_device
from common.kv.kv_pool import blocks_for
from common.sampling.guided_sampling import UNRESTRICTED, AllowedTokens
from common.sampling.host_logprobs import HostLogprobs
from common.sampling.special_sampling import TokenCounts, wants_adjusting, wants_logprobs
from common.sequence import SequenceSpec
from common.worker.worker_parts import WorkerParts
from prefill_worker import draws
from prefill_worker.batch import exact_shape, pack
from prefill_worker.forward import Forward
from prefill_worker.graphs import PrefillGraphs
from prefill_worker.scheduler import Chunk, Prompt, max_chunks
from twostroke.v1 import worker_pb2 as pb


@dataclass(frozen=True, slots=True)
class FirstToken:
    token: int
    logprobs: pb.Logprobs | None
    problem: str | None = None  # why there is none: the prompt's grammar failed


@dataclass(frozen=True, slots=True)
class LaunchedBatch:
    """A batch on the device, with the first tokens of the prompts that end in it, in order."""

    chunks: list[Chunk]
    tokens: HostCopy
    logprobs: HostLogprobs | None
    problems: Mapping[int, str]  # by index in `tokens`

    def first_tokens(self) -> list[FirstToken]:
        """The first tokens; waits until the batch has been computed."""
        logprobs = self.logprobs.read() if self.logprobs is not None else {}
        tokens = enumerate(self.tokens.get().tolist())
        return [FirstToken(token, logprobs.get(row), self.problems.get(row)) for row, token in tokens]


class Runner:
    """Owns what a batch needs besides its prompts. On a GPU `launch` returns at once."""

    def __init__(self, parts: WorkerParts) -> None:
        self._parts = parts
        self._forward = Forward(parts.model, parts.pool, parts.ops)
        self._counts = TokenCounts(parts.model.config.vocab_size, parts.device)
        self.graphs: PrefillGraphs | None = None

    def capture(self, max_tokens: int) -> None:
        """Captures CUDA graphs for batches of up to `max_tokens`. Does nothing on a CPU, where operations run eagerly.

        It also compiles and loads every kernel, so that no request has to wait for that, and fails now where there is
        too little memory for the largest batch.
        """
        parts = self._parts
        if parts.device.type != "cuda":
            return
        table_blocks = blocks_for(parts.max_length, parts.pool.layout.block_size)
        self.graphs = PrefillGraphs(self._forward, max_tokens, table_blocks, parts.device)
        parts.warm_up_sampling(max_chunks(max_tokens))

    @torch.inference_mode()
    def launch(self, chunks: list[Chunk]) -> LaunchedBatch:
        prompts = [chunk.prompt for chunk in chunks if chunk.is_last]
        specs = [prompt.spec for prompt in prompts]
        hidden = self._last_hidden(chunks, len(specs))
        allowed = self._allowed(prompts)  # on the host, while the device runs the model
        tokens, logprobs = self._first_tokens(specs, hidden, allowed)
        return LaunchedBatch(chunks, HostCopy(tokens), logprobs, allowed.problems)

    def _allowed(self, prompts: list[Prompt]) -> AllowedTokens:
        """The tokens that grammars allow first."""
        states = {row: prompt.grammar for row, prompt in enumerate(prompts) if prompt.grammar is not None}
        return self._parts.guided.allowed(states) if self._parts.guided is not None and states else UNRESTRICTED

    def _first_tokens(
        self, specs: list[SequenceSpec], hidden: Tensor, allowed: AllowedTokens
    ) -> tuple[Tensor, HostLogprobs | None]:
        """First tokens [L] int32 from `hidden` [L, H], which `_last_hidden` has just returned."""
        if not specs:
            return hidden.new_empty(0, dtype=torch.int32), None
        special = [(row, spec) for row, spec in enumerate(specs) if wants_adjusting(spec, len(spec.token_ids))]
        asks = any(map(wants_logprobs, specs))
        if self.graphs is not None and not special and not asks and not allowed.rows:
            return self.graphs.first_tokens(specs), None
        logits = self._parts.model.logits(hidden)
        wanted = draws.views(to_device(draws.pack(specs, len(specs)), self._parts.device), len(specs))
        adjusted = self._adjusted(special, logits, wanted.positions)
        tokens = self._forward.draw(allowed.restrict(adjusted), wanted)
        return tokens, HostLogprobs(specs, logits, tokens) if asks else None

    def _last_hidden(self, chunks: list[Chunk], count: int) -> Tensor:
        """Hidden states [L, H] of the `count` tokens that end a prompt."""
        if self.graphs is not None:
            return self.graphs.last_hidden(chunks)
        parts = self._parts
        block_size = parts.pool.layout.block_size
        shape = exact_shape(chunks, block_size)
        batch = shape.views(
            to_device(pack(chunks, block_size, shape), parts.device),
            query_lens=tuple(chunk.end - chunk.start for chunk in chunks),
            kv_lens=tuple(chunk.end for chunk in chunks),
        )
        return self._forward.last_hidden(batch)[:count]

    def _adjusted(self, special: list[tuple[int, SequenceSpec]], logits: Tensor, positions: Tensor) -> Tensor:
        if not special:
            return logits
        entries = [(row, self._counts.add(spec, spec.token_ids), spec) for row, spec in special]
        logits = self._counts.adjust(logits, positions, self._counts.select(entries))
        for _, slot, _ in entries:
            self._counts.remove(slot)
        return logits
