"""What one worker answers that nobody disturbs, one call after the other; and the KV of every block on the way."""

import random
from dataclasses import dataclass, field

from torch import Tensor

from benchmarks.parts import worker_parts
from common.kv.prefix_hash import block_hashes, cache_root
from common.sampling.parameters import sampling_from_proto
from common.worker.sequence import SequenceSpec
from common.worker.worker_parts import WorkerParts
from router.dispatch.request import Request
from tests.one_worker import OneWorker
from tests.simulation.host import Model
from tests.simulation.setting import BLOCK, FINGERPRINT
from tests.simulation.tasks import AtOnce
from twostroke.v1 import worker_pb2 as pb

_BLOCKS = 400


@dataclass(frozen=True, slots=True)
class Answer:
    tokens: list[int]
    logprobs: list[pb.Logprobs] = field(default_factory=list)


class _Worker(OneWorker):
    """Keeps log-probabilities, too: empty ones for those that want none."""

    def __init__(self, parts: WorkerParts) -> None:
        super().__init__(parts)
        self.logprobs: dict[int, list[pb.Logprobs]] = {}  # by attempt

    def _read(self, message: pb.WorkerMessage) -> None:
        super()._read(message)
        for prefilled in message.prefilled:
            self.logprobs[prefilled.attempt_id] = [prefilled.logprobs]
        if message.tokens.logprobs:
            for attempt, logprobs in zip(message.tokens.attempt_ids, message.tokens.logprobs, strict=True):
                self.logprobs[attempt].append(logprobs)


class Reference:
    def __init__(self, model: Model) -> None:
        self.kv: dict[bytes, Tensor] = {}  # by the block's hash
        self._worker = _Worker(worker_parts(model.guided(AtOnce(random.Random())), _BLOCKS, BLOCK))
        self._answers: dict[Request, Answer] = {}

    def ask(self, choices: list[Request]) -> None:
        """To be called before anybody else is asked."""
        attempts = [(request, self._worker.ask(_spec(request))) for request in choices]
        self._worker.finish()
        for request, attempt in attempts:
            assert self._worker.ended[attempt] == pb.Ended.CAUSE_FINISHED
            self._answers[request] = Answer(self._worker.outputs[attempt], self._worker.logprobs[attempt])
        parts = self._worker.parts
        for block_hash, block in parts.blocks._by_hash.items():
            if block_hash not in self.kv:
                self.kv[block_hash] = parts.pool.tensor[block].clone()

    def answer(self, request: Request) -> Answer:
        return self._answers[request]


def _spec(request: Request) -> SequenceSpec:
    prompt = request.prompt
    root = cache_root(FINGERPRINT, prompt.cache_salt)
    return SequenceSpec(
        token_ids=tuple(prompt.token_ids),
        prompt_length=len(prompt.token_ids),
        block_hashes=tuple(block_hashes(root, prompt.token_ids, BLOCK)),
        sampling=sampling_from_proto(request.sampling),
        max_length=request.max_length,
        min_length=prompt.min_length,
        stop_token_ids=prompt.stop_token_ids,
        cache_root=root,
        grammar=prompt.grammar,
    )
