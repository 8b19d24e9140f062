"""What one worker answers that nobody disturbs, one call after the other; and the KV of every block on the way."""

import random

from torch import Tensor

from benchmarks.parts import worker_parts
from common.kv.prefix_hash import block_hashes, cache_root
from common.sampling.parameters import sampling_from_proto
from common.sequence import SequenceSpec
from router.dispatch.request import Request
from tests.one_worker import OneWorker
from tests.simulation.model import Model
from tests.simulation.setting import BLOCK, FINGERPRINT
from tests.simulation.tasks import Tasks
from twostroke.v1 import worker_pb2 as pb


class Reference(OneWorker):
    def __init__(self, model: Model) -> None:
        super().__init__(worker_parts(model.with_grammars(Tasks(1.0, random.Random())), 400, BLOCK))
        self.kv: dict[bytes, Tensor] = {}  # by the block's hash
        self._logprobs: dict[int, list[pb.Logprobs]] = {}  # by attempt; empty where it wants none
        self._attempt_at: dict[Request, int] = {}

    def answer_first(self, choices: list[Request]) -> None:
        """Before anybody else is asked."""
        self._attempt_at |= {request: self.ask(_spec(request)) for request in choices}
        self.finish()
        for block_hash, block in self.parts.blocks._by_hash.items():
            if block_hash not in self.kv:
                self.kv[block_hash] = self.parts.pool.tensor[block].clone()

    def tokens(self, request: Request) -> list[int]:
        return self.outputs[self._attempt_at[request]]

    def logprobs(self, request: Request) -> list[pb.Logprobs]:
        return self._logprobs[self._attempt_at[request]]

    def _read(self, message: pb.WorkerMessage) -> None:
        super()._read(message)
        self._logprobs |= {prefilled.attempt_id: [prefilled.logprobs] for prefilled in message.prefilled}
        for attempt, logprobs in zip(message.tokens.attempt_ids, message.tokens.logprobs, strict=False):
            self._logprobs[attempt].append(logprobs)
        assert all(ended.cause == pb.Ended.CAUSE_FINISHED for ended in message.ended)


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
