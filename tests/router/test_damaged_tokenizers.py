"""Whatever a model's tokenizer files hold, there is a tokenizer, or a ModelError with a sentence: nothing else
is raised."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.model.model_config import parse_config
from common.model.model_error import ModelError
from router.prompts.tokenizer import Tokenizer
from tests.damage import JSON, altered, damaged
from tests.messages import fuzz
from tests.router import models

MODEL = parse_config(models.CONFIG)
EXAMPLES = [40, pytest.param(2_000, marks=[pytest.mark.slow, pytest.mark.timeout(900)])]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return models.write(tmp_path, models.byte_fallback())


def load(directory: Path) -> None:
    sentence = ""
    try:
        Tokenizer(directory, MODEL).decode(range(MODEL.vocab_size), special_tokens=True)
    except ModelError as error:
        sentence = str(error)
    assert not sentence or len(sentence.split()) > 3


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_any_bytes(directory: Path, name: str) -> None:
    (directory / "chat_template.jinja").write_text(models.CHAT_TEMPLATE)
    file = directory / name
    whole = file.read_bytes()

    @fuzz(25)
    @given(damaged(whole) | st.sampled_from([b"", b"\xff\xfe", b"[" * 50_000, b"{" * 50_000, b"{% if", b"null"]))
    def any_bytes(content: bytes) -> None:
        file.write_bytes(content)
        load(directory)

    any_bytes()


@pytest.mark.parametrize("examples", EXAMPLES)
def test_any_tokenizer(directory: Path, examples: int) -> None:
    file = directory / "tokenizer.json"
    valid = json.loads(file.read_text())
    valid["model"]["vocab"] = dict(list(valid["model"]["vocab"].items())[:20])

    @fuzz(examples)
    @given(altered(valid))
    def any_tokenizer(changed: Any) -> None:
        file.write_text(json.dumps(changed))
        load(directory)

    any_tokenizer()


@pytest.mark.parametrize("examples", EXAMPLES)
def test_any_settings(directory: Path, examples: int) -> None:
    file = directory / "tokenizer_config.json"
    template = {"name": "default", "template": models.CHAT_TEMPLATE}
    valid = {"chat_template": [template], "eos_token": {"content": "</s>"}, "bos_token": "x"}

    @fuzz(examples)
    @given(altered(valid) | st.builds(lambda value: {"chat_template": value}, JSON))
    def any_settings(changed: Any) -> None:
        file.write_text(json.dumps(changed))
        load(directory)

    any_settings()
