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
