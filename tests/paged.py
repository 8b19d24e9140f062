"""The bare engine in one process: chunked prefill and decode through block tables scattered over a pool."""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from common.kv.kv_pool import KvLayout, KvPool, allocate
from common.model.transformer import Model
from kernels.attention import PrefillAttention
from kernels.fp8 import E4M3
from kernels.ops import Ops
from kernels.rope import Rotation


class PagedSequences:
    """A static batch of sequences; blocks are given out in random order, and never used ones hold noise."""

    def __init__(
        self,
        model: Model,
        ops: Ops,
        prompts: Sequence[Sequence[int]],
        room: int,
        block_size: int = 16,
        kv_dtype: str | None = None,
    ) -> None:
        self.model, self.ops, self.block_size = model, ops, block_size
        self.tokens = [list(prompt) for prompt in prompts]
        self.pool, self.tables = self._scattered(room, kv_dtype or model.dtype)
        self.scale = model.config.head_dim**-0.5

    def prefill(self, chunk: int | None = None) -> Tensor:
        """Runs all prompts, all together, `chunk` tokens of each at a time. Returns the last tokens' logits [B, V]."""
        done = [0] * len(self.tokens)
        logits: dict[int, Tensor] = {}
        while rows := [row for row, tokens in enumerate(self.tokens) if done[row] < len(tokens)]:
            ends = {row: min(len(self.tokens[row]), done[row] + (chunk or len(self.tokens[row]))) for row in rows}
            hidden = self._run_chunks([(row, done[row], ends[row]) for row in rows])
            last = -1
            for row in rows:
                last += ends[row] - done[row]
                done[row] = ends[row]
                if done[row] == len(self.tokens[row]):
                    logits[row] = self.model.logits(hidden[last : last + 1])
        return torch.cat([logits[row] for row in range(len(self.tokens))])

    def step(self, tokens: Tensor) -> Tensor:
        """One decode step over `tokens` [B], the sequences' last ones. Returns logits [B, V]."""
        cached = torch.tensor([len(tokens) for tokens in self.tokens], dtype=torch.int32)
        positions, slots, lengths = self.ops.locate(cached, self.tables, self.block_size)
        for row, token in enumerate(tokens.tolist()):
            self.tokens[row].append(token)

        batch = self.ops.plan_decode(self.tables, lengths, self.pool.layer(0)[0])

        def attend(qkv: Tensor, rotation: Rotation, key_cache: Tensor, value_cache: Tensor) -> Tensor:
            return self.ops.decode_attention(qkv, rotation, key_cache, value_cache, batch, self.scale)

        return self.model.logits(self.model.forward(tokens, positions, slots, self.pool, attend))

    def generate(self, count: int, chunk: int | None = None) -> list[list[int]]:
        """Greedy: `count` tokens for each prompt."""
        tokens = self.prefill(chunk).argmax(-1)
        outputs = [tokens]
        for _ in range(count - 1):
            tokens = self.step(tokens).argmax(-1)
            outputs.append(tokens)
        return torch.stack(outputs, dim=1).tolist()

    def _scattered(self, room: int, kv_dtype: str) -> tuple[KvPool, Tensor]:
        counts = [-(-(len(tokens) + room) // self.block_size) for tokens in self.tokens]
        config = self.model.config
        layout = KvLayout(
            2 * sum(counts), config.num_layers, self.block_size, config.num_kv_heads, config.head_dim, kv_dtype
        )
        pool = allocate(layout, torch.device("cpu"))
        generator = torch.Generator().manual_seed(0)
        if pool.tensor.dtype == E4M3:
            pool.tensor.view(torch.uint8).random_(generator=generator)
        else:
            pool.tensor.normal_(0.0, 100.0, generator=generator)
        free = random.Random(0).sample(range(layout.num_blocks), layout.num_blocks)
        tables = torch.zeros(len(counts), max(counts), dtype=torch.int32)
        for row, count in enumerate(counts):
            tables[row, :count] = torch.tensor([free.pop() for _ in range(count)])
        return pool, tables

    def _run_chunks(self, chunks: list[tuple[int, int, int]]) -> Tensor:
        rows = [row for row, _, _ in chunks]
        query_lens = tuple(end - start for _, start, end in chunks)
        kv_lens = tuple(end for _, _, end in chunks)
        positions = torch.cat([torch.arange(start, end) for _, start, end in chunks])
        owners = torch.repeat_interleave(torch.tensor(rows), torch.tensor(query_lens))
        slots = self.tables[owners, positions // self.block_size].long() * self.block_size + positions % self.block_size
        batch = PrefillAttention(
            query_lens=query_lens,
            kv_lens=kv_lens,
            cu_query_lens=_running_sums(query_lens),
            seq_lens=torch.tensor(kv_lens, dtype=torch.int32),
            block_tables=self.tables[rows],
        )

        def attend(qkv: Tensor, rotation: Rotation, key_cache: Tensor, value_cache: Tensor) -> Tensor:
            q, k, v = self.ops.rope_write_kv(qkv, rotation, key_cache, value_cache)
            return self.ops.prefill_attention(q, k, v, key_cache, value_cache, batch, self.scale)

        tokens = torch.tensor([token for row, start, end in chunks for token in self.tokens[row][start:end]])
        return self.model.forward(tokens, positions, slots, self.pool, attend)


def _running_sums(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()
