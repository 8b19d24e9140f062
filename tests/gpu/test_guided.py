"""Output that follows grammars, with CUDA graphs and steps that are launched ahead."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from llguidance import LLMatcher
from tokenizers import Tokenizer

from benchmarks.in_process import spec
from benchmarks.parts import LoadedModel, worker_parts
from common.sampling.parameters import SamplingParams
from common.sequence import SequenceSpec
from tests import guided
from tests.gpu import tiny_models
from tests.gpu.greedy import DEVICE
from tests.one_worker import OneWorker
from tests.router import models

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "pattern": "^[a-z]{0,5}$"}, "of": {"enum": [["ü"], {"b": None}]}},
    "required": ["name", "of"],
    "additionalProperties": False,
}
REGEX = "[a-f]{3,6}-[0-9]{2}"
CHOICES = ["the quick brown fox", "the lazy dog"]
GRAMMARS = {
    "schema": LLMatcher.grammar_from_json_schema(SCHEMA, defaults={"whitespace_pattern": "[ ]"}),
    "regex": LLMatcher.grammar_from_regex(REGEX),
    "choices": LLMatcher.grammar_from_lark(f"start: {' | '.join(map(json.dumps, CHOICES))}"),
}
KINDS = (*GRAMMARS, None)
PLACES = range(24)
FILTERS: dict[str, Any] = {"top_k": 3, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2, "logprobs": 1}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    written = tiny_models.write("llama", tmp_path_factory.mktemp("llama"))
    models.byte_level().save(str(written / "tokenizer.json"))
    config = json.loads((written / "config.json").read_text())
    (written / "config.json").write_text(json.dumps({**config, "eos_token_id": models.EOS}))
    (written / "generation_config.json").unlink(missing_ok=True)
    return written


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def loaded(request: pytest.FixtureRequest, directory: Path) -> LoadedModel:
    return guided.load(directory, request.param, DEVICE, dummy=False, max_length=512)


def asked(place: int) -> SequenceSpec:
    tokens = [2 + (7 * place + 31 * at) % 300 for at in range(5 + place)]
    kind = KINDS[place % len(KINDS)]
    filters = FILTERS if place % 3 == 1 else {}
    sampling = SamplingParams(temperature=0.0 if place % 2 else 1.0, seed=place, **filters)
    made = spec(tokens, len(tokens) + 60, temperature=0)
    grammar = GRAMMARS[kind] if kind else ""
    return replace(made, sampling=sampling, stop_token_ids=frozenset([models.EOS]), grammar=grammar)


def assert_follows(kind: str, text: str) -> None:
    if kind == "regex":
        assert re.fullmatch(REGEX, text)
    elif kind == "choices":
        assert text in CHOICES
    else:
        value = json.loads(text)
        assert re.fullmatch("[a-z]{0,5}", value["name"])
        assert value["of"] in (["ü"], {"b": None})


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "eager"])
@pytest.mark.parametrize("blocks", [400, 30], ids=["roomy", "scarce"])
def test_answers_follow_their_grammars(loaded: LoadedModel, directory: Path, graphs: bool, blocks: int) -> None:
    """That they are the same in every batch is asserted on CPUs: here a sum's last bit may differ between batches of
    different sizes, and these models are sure of nothing."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    one = OneWorker(worker_parts(loaded, blocks), graphs=graphs)
    outputs = one.run([asked(place) for place in PLACES], headroom_tokens=1)
    assert bool(one.preemptions) == (blocks == 30)
    for place, output in zip(PLACES, outputs, strict=True):
        if (kind := KINDS[place % len(KINDS)]) is not None:
            assert output[-1] == models.EOS
            assert models.EOS not in output[:-1]
            assert_follows(kind, tokenizer.decode(output[:-1]))


def test_a_float32_sequence_has_the_tokens_that_it_has_alone(directory: Path) -> None:
    loaded = guided.load(directory, "float32", DEVICE, dummy=False, max_length=512)
    greedy = [replace(asked(place), sampling=SamplingParams(temperature=0)) for place in PLACES if place % 4 != 3]
    together = OneWorker(worker_parts(loaded, 400)).run(greedy)
    alone = [OneWorker(worker_parts(loaded, 400), graphs=False).run([one])[0] for one in greedy]
    same = sum(output == other for output, other in zip(together, alone, strict=True))
    assert same >= len(greedy) - 1
