"""What a step's message leaves behind at the requests that it is for."""

from router.dispatch.decoding import Decoding
from router.dispatch.fan_out import fan_out
from router.dispatch.request import MAX_UNREAD_TOKENS, Prompt, Request
from router.mailbox import Mailbox
from router.turnstile import Turnstile
from tests.router.test_overload import resident_mib
from twostroke.v1 import worker_pb2

BATCH, ALTERNATIVES = 64, 20


def asking() -> Request:
    prompt = Prompt((1,), 0, frozenset(), "")
    sampling = worker_pb2.SamplingParams(logprobs=ALTERNATIVES)
    return Request("", 0, 0, prompt, sampling, Mailbox(Turnstile()), 1_000_000)


def decoding(requests: dict[int, Request]) -> Decoding:
    made = Decoding()
    made.requests = requests
    return made


def step() -> worker_pb2.StepTokens:
    top = range(1_000, 1_000 + ALTERNATIVES)
    logprobs = worker_pb2.Logprobs(logprob=-0.5, top_ids=top, top_logprobs=[-0.5] * ALTERNATIVES)
    packed = worker_pb2.StepTokens(attempt_ids=range(BATCH), token_ids=range(BATCH), logprobs=[logprobs] * BATCH)
    return worker_pb2.StepTokens.FromString(packed.SerializeToString())


def test_logprobs_that_wait_to_be_read_keep_nothing_of_other_sequences() -> None:
    request = asking()
    before = resident_mib()
    for _ in range(MAX_UNREAD_TOKENS):
        fan_out(decoding({0: request}), step())
    assert resident_mib() - before < 8  # about 1; with whole steps it is 168


def test_logprobs_that_were_taken_are_kept_no_longer() -> None:
    request = asking()
    for _ in range(5):
        fan_out(decoding({0: request}), step())
    taken = request.take_logprobs(3)
    assert [len(logprobs.top_ids) for logprobs in taken] == [ALTERNATIVES] * 3
    assert len(request.logprobs) == 2


def test_steps_that_were_joined_give_a_request_all_their_tokens_up_to_its_last() -> None:
    prompt = Prompt((1,), 0, frozenset({9}), "")
    one, other = (
        Request("", 0, serial, prompt, worker_pb2.SamplingParams(), Mailbox(Turnstile()), 4) for serial in range(2)
    )
    tokens = worker_pb2.StepTokens(attempt_ids=[1, 2, 1, 2, 1, 1], token_ids=[5, 6, 7, 9, 8, 8])
    fan_out(decoding({1: one, 2: other}), tokens)
    assert (one.output, one.complete) == ([5, 7, 8], True)
    assert (other.output, other.complete) == ([6, 9], True)
