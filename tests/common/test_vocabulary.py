"""What tells one vocabulary from another, however it was written down."""

import json
from pathlib import Path

import pytest

from common.model import vocabulary
from common.model.model_error import ModelError


def written(directory: Path, **tokenizer: object) -> Path:
    directory.mkdir()
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    return directory


def test_the_same_tokens_have_the_same_digest_however_they_are_written(tmp_path: Path) -> None:
    added = [{"id": 2, "content": "</s>", "special": True}]
    one = written(tmp_path / "one", model={"vocab": {"a": 0, "b": 1}, "merges": ["a b"]}, added_tokens=added)
    other = written(tmp_path / "other", version="1.0", model={"type": "BPE", "vocab": {"</s>": 2, "b": 1, "a": 0}})
    unigram = written(tmp_path / "unigram", model={"vocab": [["a", -1.5], ["b", -2.0], ["</s>", 0.0]]})
    assert len(vocabulary.digest(one)) == 32
    assert vocabulary.digest(one) == vocabulary.digest(other) == vocabulary.digest(unigram)


@pytest.mark.parametrize("vocab", [{"a": 1, "b": 0}, {"a": 0, "c": 1}, {"a": 0, "b": 1, "c": 2}])
def test_other_tokens_have_another_digest(tmp_path: Path, vocab: dict[str, int]) -> None:
    one = written(tmp_path / "one", model={"vocab": {"a": 0, "b": 1}})
    assert vocabulary.digest(one) != vocabulary.digest(written(tmp_path / "other", model={"vocab": vocab}))


def test_a_directory_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    assert vocabulary.digest(tmp_path) == ""


@pytest.mark.parametrize("model", [None, {}, {"vocab": 3}, {"vocab": [["a"]]}, {"vocab": {"a": "x"}}])
def test_a_file_without_a_vocabulary_is_refused(tmp_path: Path, model: object) -> None:
    with pytest.raises(ModelError, match="holds no vocabulary"):
        vocabulary.digest(written(tmp_path / "one", model=model))
