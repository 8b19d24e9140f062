"""What becomes of one choice's tokens, at the reader's pace."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from common.model.model_config import load_config
from router import validate
from router.answers import answer
from router.answers.answer import MOST_AT_ONCE, Answer
from router.dispatch.request import Prompt, Request, State
from router.mailbox import Mailbox
from router.metrics import Metrics
from router.prompts.tokenizer import Tokenizer
from router.turnstile import Turnstile
from tests.router.cluster import request


@pytest.mark.parametrize("stop", [(), ("never",)])
def test_a_reader_that_is_far_behind_gets_a_bounded_part_at_a_time(model: Path, stop: tuple[str, ...]) -> None:
    """All at once would be a message too large for most clients, which the event loop is busy with for 100 ms."""
    config, count = load_config(model), 2 * MOST_AT_ONCE + 1
    job = validate.check(request(max_tokens=count, stopping={"stop": stop}), config)
    choice = Request("", 0, 0, Prompt((40,), 0, frozenset(), ""), job.sampling, Mailbox(Turnstile()), count + 1)
    reader = Answer(choice, job, Tokenizer(model, config), config.eos_token_ids, Metrics(), begins_text=True)
    for _ in range(count):
        choice.add(41)
    choice.end(State.FINISHED)
    parts = [reader.advance() for _ in range(3)]
    assert [len(delta.token_ids) for delta, _ in parts] == [MOST_AT_ONCE, MOST_AT_ONCE, 1]
    assert [finish is not None for _, finish in parts] == [False, False, True]
    assert choice.taken == count


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
        reader.advance()
    value = metrics.registry.get_sample_value
    assert value("twostroke_inter_token_seconds_count") == 3
    assert value("twostroke_inter_token_seconds_sum") == 0.125 + 2.0 + 0.5
