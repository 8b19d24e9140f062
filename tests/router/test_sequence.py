"""Requests as workers are told of them: what choices share, and what each has of its own."""

import grpc
import pytest

from common.kv import prefix_hash
from common.sequence import sequence_from_proto
from router.dispatch.request import Kind, Prompt, Request
from router.dispatch.sequence import hash_blocks, sequence_of
from router.errors import CallError
from router.mailbox import Mailbox
from router.turnstile import Turnstile
from twostroke.v1 import worker_pb2

BLOCK = 16
KIND = Kind("f" * 32, BLOCK)
ROOT = prefix_hash.cache_root("f" * 32, "salt")


def choices(count: int, tokens: int) -> list[Request]:
    prompt = Prompt(tuple(range(tokens)), tokens + 3, frozenset([7, 5]), "salt")
    sampling = [worker_pb2.SamplingParams(temperature=1, top_p=1, seed=place) for place in range(count)]
    return [Request("id", place, place, prompt, sampling[place], Mailbox(Turnstile()), 1000) for place in range(count)]


def told(request: Request, kind: Kind = KIND) -> worker_pb2.Sequence:
    hash_blocks(request, kind)
    return sequence_of(request)


@pytest.mark.parametrize("tokens", [5, 16, 100])
def test_a_resumed_choice_goes_on_by_itself(tokens: int) -> None:
    requests = choices(3, tokens)
    for request in requests:
        told(request)
    for length in (3, 30, 40):  # more blocks, or none, with every attempt
        requests[1].output += [1000 + place for place in range(len(requests[1].output), length)]
        for place, request in enumerate(requests):
            whole = (*request.prompt.token_ids, *request.output)
            spec = sequence_from_proto(told(request))
            assert spec.token_ids == whole
            assert list(spec.block_hashes) == prefix_hash.block_hashes(ROOT, whole, BLOCK) == request.block_hashes
            assert (spec.prompt_length, spec.max_length, spec.min_length) == (tokens, 1000, tokens + 3)
            assert (spec.sampling.seed, spec.stop_token_ids) == (place, frozenset({5, 7}))
            assert (spec.cache_root, spec.request_id) == (ROOT, "id")


def test_choices_share_the_hashes_of_their_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = 0
    hash_them = prefix_hash.block_hashes

    def counted(root: bytes, tokens: tuple[int, ...], block_size: int) -> list[bytes]:
        nonlocal hashed
        hashed += len(tokens) // block_size
        return hash_them(root, tokens, block_size)

    monkeypatch.setattr(prefix_hash, "block_hashes", counted)
    requests = choices(16, 100 * BLOCK)
    for request in requests:
        told(request)
    assert hashed == 100
    assert all(request.block_hashes is requests[0].block_hashes for request in requests)


@pytest.mark.parametrize(
    ("fingerprint", "block_size", "output"),
    [("e" * 32, BLOCK, 0), ("e" * 32, 32, 0), ("f" * 32, 32, 0), ("f" * 32, 32, 40)],
)
def test_workers_of_another_kind_are_told_hashes_of_their_own(fingerprint: str, block_size: int, output: int) -> None:
    requests = choices(2, 100)
    for request in requests:
        request.output += range(output)
        told(request)
    old = requests[1].block_hashes
    root = prefix_hash.cache_root(fingerprint, "salt")
    for request in requests:
        spec = sequence_from_proto(told(request, Kind(fingerprint, block_size)))
        assert spec.cache_root == root
        whole = (*range(100), *range(output))
        assert list(spec.block_hashes) == prefix_hash.block_hashes(root, whole, block_size) == request.block_hashes
    assert old == prefix_hash.block_hashes(ROOT, whole, BLOCK), "somebody may still go by them"


@pytest.mark.parametrize("tokens", [5, 100])
def test_an_answer_does_not_go_on_under_other_weights(tokens: int) -> None:
    (request,) = choices(1, tokens)
    told(request)
    request.output.append(7)
    with pytest.raises(CallError) as raised:
        told(request, Kind("e" * 32, BLOCK))
    assert raised.value.code == grpc.StatusCode.UNAVAILABLE
