"""Both workers' loops in one process, without router, gRPC and transport: to measure and to test the engine itself."""

from collections import deque
from collections.abc import Sequence as Items
from dataclasses import replace

import torch

from common.kv.prefix_hash import block_hashes
from common.sampling.parameters import SamplingParams
from common.sequence import SequenceSpec
from common.worker.worker_parts import WorkerParts
from decode_worker.loop import DecodeLoop
from decode_worker.runner import Runner as DecodeRunner
from decode_worker.scheduler import Sequence
from prefill_worker.loop import PrefillLoop
from prefill_worker.runner import FirstToken
from prefill_worker.runner import Runner as PrefillRunner
from prefill_worker.scheduler import Prompt


class InProcess:
    """Prefill and decode with a pool each; a finished prompt's blocks are copied from one to the other.

    Prompts go first: no decode step runs while there is a prompt that the decode side has room for. That is best for
    throughput.

    Args:
        prefill, decode: parts of one model, on one device.
        max_batch: most sequences in a decode step.
        max_batch_tokens: most tokens in a prefill batch.
        headroom_tokens: output tokens that room is reserved for, for each sequence.
        drafts: tokens that a decode step may draft behind each.
    """

    def __init__(
        self,
        prefill: WorkerParts,
        decode: WorkerParts,
        *,
        max_batch: int,
        max_batch_tokens: int,
        headroom_tokens: int = 1024,
        drafts: int = 0,
    ) -> None:
        self._prefill, self._decode = prefill, decode
        self._block_size = prefill.pool.layout.block_size
        self._headroom_tokens = headroom_tokens
        self.prefill_runner = PrefillRunner(prefill)
        self.prefill_runner.capture(max_batch_tokens)
        self._prompts = PrefillLoop(prefill, self.prefill_runner, max_batch_tokens)
        self.decode_runner = DecodeRunner(decode, max_batch, drafts)
        self._loop = DecodeLoop(decode, self.decode_runner, max_batch)
        self.preemptions = 0

    def run(self, specs: Items[SequenceSpec]) -> list[list[int]]:
        """Runs all sequences to their ends. Returns the output tokens of each."""
        waiting = deque(enumerate(specs))
        resumed: deque[tuple[int, SequenceSpec]] = deque()
        running: dict[int, Sequence] = {}
        outputs: list[list[int]] = [[] for _ in specs]

        def finish(sequence: Sequence) -> None:
            outputs[sequence.attempt_id] = sequence.tokens[sequence.spec.prompt_length :]
            del running[sequence.attempt_id]

        while waiting or resumed or running:
            self._admit(waiting, resumed, running)
            complete = self._prompts.turn().complete
            if complete:
                for sequence in self._hand_over(complete, running):
                    finish(sequence)
            if self._prompts.busy:
                continue
            turn = self._loop.turn()
            for sequence in turn.finished:
                finish(sequence)
            for sequence in turn.preempted:
                self.preemptions += 1
                del running[sequence.attempt_id]
                resumed.append((sequence.attempt_id, self._resumed(sequence)))
        while self._loop.busy:
            self._loop.turn()
        return outputs

    def blocks_home(self) -> bool:
        """Whether no block of either pool is in use."""
        return self._prefill.blocks.in_use_count == self._decode.blocks.in_use_count == 0

    def _admit(
        self,
        waiting: deque[tuple[int, SequenceSpec]],
        resumed: deque[tuple[int, SequenceSpec]],
        running: dict[int, Sequence],
    ) -> None:
        """Resumed sequences come first, and only once all that they may need fits."""
        while queue := resumed or waiting:
            index, spec = queue[0]
            sequence = Sequence(index, 0, spec, list(spec.token_ids))
            remaining = spec.max_length - len(spec.token_ids)
            headroom = remaining if queue is resumed else min(remaining, self._headroom_tokens)
            if not self._loop.scheduler.reserve(sequence, headroom):
                return
            queue.popleft()
            running[index] = sequence
            self._prompts.scheduler.add(Prompt(index, 0, spec))

    def _hand_over(self, complete: list[tuple[Prompt, FirstToken]], running: dict[int, Sequence]) -> list[Sequence]:
        """Copies the blocks that the decode side lacks, and starts the sequences there. Returns those whose first token
        was also their last."""
        ready = [(prompt, running[prompt.attempt_id], first.token) for prompt, first in complete]
        source: list[int] = []
        target: list[int] = []
        for prompt, sequence, _ in ready:
            source += prompt.blocks[sequence.cached_blocks :]
            target += sequence.blocks[sequence.cached_blocks : len(prompt.blocks)]
        device = self._decode.device
        theirs, ours = (parts.pool.tensor.view(torch.uint8) for parts in (self._prefill, self._decode))
        moved = theirs[torch.tensor(source, device=device, dtype=torch.int64)]
        ours[torch.tensor(target, device=device, dtype=torch.int64)] = moved
        over = []
        for prompt, sequence, token in ready:
            self._prefill.blocks.release(prompt.blocks)
            sequence.tokens.append(token)
            if not self._loop.start(sequence):
                over.append(sequence)
        return over

    def _resumed(self, sequence: Sequence) -> SequenceSpec:
        """Prompt and output so far, as the router sends them again."""
        hashes = block_hashes(sequence.spec.cache_root, sequence.tokens, self._block_size)
        return replace(sequence.spec, token_ids=tuple(sequence.tokens), block_hashes=tuple(hashes))


def spec(
    tokens: Items[int],
    max_length: int,
    *,
    temperature: float,
    seed: int = 0,
    block_size: int = 16,
    root: bytes = bytes(16),
) -> SequenceSpec:
    """A sequence as the router would send it, without stop tokens: it ends at `max_length`."""
    return SequenceSpec(
        token_ids=tuple(tokens),
        prompt_length=len(tokens),
        block_hashes=tuple(block_hashes(root, tokens, block_size)),
        sampling=SamplingParams(temperature=temperature, seed=seed),
        max_length=max_length,
        cache_root=root,
    )
