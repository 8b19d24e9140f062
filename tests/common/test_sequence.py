"""Sequences to and from the workers' protocol."""

import pytest

from common.sampling.parameters import SamplingParams
from common.sequence import SequenceSpec, sequence_from_proto
from tests.specs import sequence_to_proto
from twostroke.v1 import worker_pb2 as pb

SPEC = SequenceSpec(
    token_ids=(5, 6, 7),
    prompt_length=2,
    block_hashes=(b"a" * 16, b"b" * 16),
    sampling=SamplingParams(
        temperature=0.5,
        top_k=4,
        top_p=0.25,
        min_p=0.125,
        repetition_penalty=1.5,
        presence_penalty=-0.5,
        frequency_penalty=2.0,
        seed=2**64 - 1,
        logit_bias=((1, -2.0), (9, 4.0)),
        logprobs=0,
    ),
    max_length=100,
    min_length=10,
    stop_token_ids=frozenset({2, 3}),
    cache_root=b"r" * 16,
    request_id="wanted",
    grammar='{"grammars": [{"lark_grammar": "start: /a+/"}]}',
)


@pytest.mark.parametrize(
    "spec",
    [SPEC, SequenceSpec(token_ids=(1,), prompt_length=1, block_hashes=(), sampling=SamplingParams(), max_length=2)],
)
def test_there_and_back(spec: SequenceSpec) -> None:
    sent = sequence_to_proto(spec).SerializeToString()
    assert sequence_from_proto(pb.Sequence.FromString(sent)) == spec


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (pb.Sequence(token_ids=[1], prompt_length=1, block_hashes=b"x" * 17), "17 bytes"),
        (pb.Sequence(token_ids=[1], prompt_length=2), "prompt_length is 2, but there are 1"),
        (pb.Sequence(token_ids=[1], prompt_length=0), "prompt_length is 0"),
        (pb.Sequence(token_ids=[1], prompt_length=1, max_length=2, request_id="a\nb"), "request_id"),
    ],
)
def test_a_message_that_contradicts_itself_is_refused(message: pb.Sequence, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sequence_from_proto(message)
