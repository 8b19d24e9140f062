"""Sequences as the router would send them, for tests of the workers."""

from collections.abc import Sequence

from common.kv.prefix_hash import block_hashes, cache_root
from common.sampling.parameters import SamplingParams
from common.sequence import SequenceSpec
from twostroke.v1 import worker_pb2 as pb

ROOT = cache_root("test-model", "")


def spec(
    tokens: Sequence[int],
    block_size: int,
    max_length: int = 1_000,
    sampling: SamplingParams | None = None,
    stop_token_ids: frozenset[int] = frozenset(),
) -> SequenceSpec:
    return SequenceSpec(
        token_ids=tuple(tokens),
        prompt_length=len(tokens),
        block_hashes=tuple(block_hashes(ROOT, tokens, block_size)),
        sampling=sampling or SamplingParams(temperature=0),
        max_length=max_length,
        stop_token_ids=stop_token_ids,
        cache_root=ROOT,
    )


def sequence_to_proto(spec: SequenceSpec) -> pb.Sequence:
    return pb.Sequence(
        token_ids=spec.token_ids,
        prompt_length=spec.prompt_length,
        block_hashes=b"".join(spec.block_hashes),
        sampling=_sampling_to_proto(spec.sampling),
        max_length=spec.max_length,
        min_length=spec.min_length,
        stop_token_ids=sorted(spec.stop_token_ids),
        cache_root=spec.cache_root,
        request_id=spec.request_id,
        grammar=spec.grammar,
    )


def _sampling_to_proto(params: SamplingParams) -> pb.SamplingParams:
    return pb.SamplingParams(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        seed=params.seed,
        logit_bias=dict(params.logit_bias),
        logprobs=params.logprobs,
    )
