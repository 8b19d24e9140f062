"""What becomes of one choice's tokens, at the reader's pace."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from common.model.model_config import load_config
from router import validate
from router.answers import answer
from router.answers.answer import Answer
from router.dispatch.request import Prompt, Request
from router.mailbox import Mailbox
from router.metrics import Metrics
from router.prompts.tokenizer import Tokenizer
from router.turnstile import Turnstile
from tests.router.cluster import request
from twostroke.v1 import inference_pb2 as pb
from twostroke.v1 import worker_pb2


def test_tokens_that_come_together_end_one_gap(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As benchmarks/README.md defines ITL: what a reader sees at once hides no stall before it."""
    config, metrics, now = load_config(model), Metrics(), 100.0
    monkeypatch.setattr(answer, "time", SimpleNamespace(monotonic=lambda: now))
    job = validate.check(request(max_tokens=50), config)
    prompt = Prompt((40,), 0, frozenset(), "")
    choice = Request("", 0, 0, prompt, job.sampling, Mailbox(Turnstile()), 51)
    reader = Answer(choice, job, Tokenizer(model, config), config.eos_token_ids, metrics, begins_text=True)
    for gap, tokens in ((0.0, 1), (0.125, 1), (2.0, 20), (0.25, 0), (0.25, 2)):
        now += gap
        for _ in range(tokens):
            choice.add(41)
        reader.take()
    value = metrics.registry.get_sample_value
    assert value("twostroke_inter_token_seconds_count") == 3
    assert value("twostroke_inter_token_seconds_sum") == 0.125 + 2.0 + 0.5


@pytest.mark.parametrize("stop", [(), ("never",)], ids=["no stop string", "a stop string"])
def test_a_reader_that_is_far_behind_catches_up_in_several_steps(model: Path, stop: tuple[str, ...]) -> None:
    """All other answers wait for each of them, and the log-probabilities of thousands of tokens take long."""
    config = load_config(model)
    options = pb.ResponseOptions(logprobs=20, token_ids=True)
    job = validate.check(request(max_tokens=1_000, stopping={"stop": stop}, response=options), config)
    prompt = Prompt((40,), 0, frozenset(), "")
    choice = Request("", 0, 0, prompt, job.sampling, Mailbox(Turnstile()), 1_001)
    reader = Answer(choice, job, Tokenizer(model, config), config.eos_token_ids, Metrics(), begins_text=True)
    tokens = [40 + place % 40 for place in range(1_000)]
    for token in tokens:
        choice.add_logprobs(worker_pb2.Logprobs(logprob=-token))
        choice.add(token)
    choice.end()
    deltas = []
    while not reader.over:
        delta = pb.Delta()
        news = _, _, finish = reader.take()
        reader.write(news, delta)
        assert (finish is None) == reader.behind
        deltas.append(delta)
    assert max(len(delta.token_ids) for delta in deltas) == answer.MOST_TOKENS
    assert [token for delta in deltas for token in delta.token_ids] == tokens
    assert [entry.logprob for delta in deltas for entry in delta.logprobs] == [-token for token in tokens]
    assert finish is not None
    assert finish.usage.completion_tokens == 1_000
