"""Answers that follow a guide, from clusters of processes."""

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from common.model.model_files import EMBEDDED, resolve
from tests.e2e.cluster import Cluster
from tests.e2e.tiny import prompt, tiny_cluster
from tests.router import models
from twostroke import Generation, InvalidArgument, Unavailable

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(60)]

SCHEMA: dict[str, object] = {
    "type": "object",
    "properties": {
        "color": {"enum": ["red", "green"]},
        "size": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-c]{1,3}$"}, "maxItems": 2},
    },
    "required": ["color", "size", "tags"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
REGEX = "[a-f]{3,6}-[0-9]{2}"
CHOICES = ["the quick brown fox", "the lazy dog", "日本"]
GRAMMAR = 'start: "a" start "b" | NUMBER\nNUMBER: /[0-9]{1,3}/'

GUIDES: list[dict[str, Any]] = [
    {"json_schema": SCHEMA, "temperature": 0},
    {"regex": REGEX, "temperature": 0},
    {"choices": CHOICES, "seed": 3},
    {"json_schema": json.dumps(SCHEMA), "seed": 4, "repetition_penalty": 1.2, "top_p": 0.9},
    {"grammar": GRAMMAR, "seed": 5, "logit_bias": {40: 3}},
]
PLAIN: list[dict[str, Any]] = [{"temperature": 0, "ignore_eos": True}, {"seed": 9}]
MIXED = [*GUIDES, *PLAIN] * 2
MAX_TOKENS = 80


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with tiny_cluster(tmp_path_factory.mktemp("tiny")) as cluster:
        yield cluster


def ask_all(cluster: Cluster) -> list[Generation]:
    with ThreadPoolExecutor(len(MIXED)) as pool:
        return list(pool.map(lambda place: ask(cluster, place), range(len(MIXED))))


def ask(cluster: Cluster, place: int) -> Generation:
    return cluster.client.generate(prompt(20 + place, seed=place), max_tokens=MAX_TOKENS, **MIXED[place])


def assert_follows(answer: Generation, guide: dict[str, Any]) -> None:
    text = answer.text
    assert answer.finish.reason == "eos", text
    if "json_schema" in guide:
        value = json.loads(text)
        assert list(value) == ["color", "size", "tags"]
        assert value["color"] in ("red", "green")
        assert value["size"] in range(100)
        assert len(value["tags"]) <= 2
        assert all(re.fullmatch("[a-c]{1,3}", tag) for tag in value["tags"])
    elif "regex" in guide:
        assert re.fullmatch(REGEX, text)
    elif "choices" in guide:
        assert text in CHOICES
    else:
        opened, _, closed = re.fullmatch("(a*)([0-9]{1,3})(b*)", text).groups()  # type: ignore[union-attr]
        assert len(opened) == len(closed)


def test_the_same_alone_together_and_after_preemptions(cluster: Cluster, tmp_path: Path) -> None:
    alone = [ask(cluster, place) for place in range(len(MIXED))]
    for answer, guide in zip(alone, MIXED, strict=True):
        if guide not in PLAIN:
            assert_follows(answer, guide)
    together = ask_all(cluster)
    cluster.assert_blocks_home()
    scarce = {"decode_flags": {"num-blocks": 14}, "router_flags": {"headroom-tokens": 1}}
    with tiny_cluster(tmp_path, **scarce) as small:
        rounds = [ask_all(small) for _ in range(3)]  # who is preempted in one is a matter of timing
        small.assert_blocks_home()
    resumed = [place for answers in rounds for place, answer in enumerate(answers) if answer.finish.usage.resumes]
    assert any(MIXED[place] not in PLAIN for place in resumed)
    tokens = [answer.token_ids for answer in alone]
    for answers in (together, *rounds):
        assert [answer.token_ids for answer in answers] == tokens


def test_several_answers_to_a_chat_in_a_stream_with_log_probabilities(cluster: Cluster) -> None:
    texts, tokens, logprobs = [""] * 3, [0] * 3, [0] * 3
    stream = cluster.client.stream_chat("Which?", choices=CHOICES, n=3, seed=11, logprobs=1, max_tokens=MAX_TOKENS)
    for piece in stream:
        texts[piece.index] += piece.text
        tokens[piece.index] += len(piece.token_ids)
        logprobs[piece.index] += len(piece.logprobs)
    assert set(texts) <= set(CHOICES)
    assert len(set(texts)) > 1
    assert tokens == logprobs


def test_what_cuts_an_answer_short(cluster: Cluster) -> None:
    cut = cluster.client.generate(prompt(20), regex="[ab]{60}", max_tokens=5, temperature=0)
    assert (cut.finish.reason, len(cut.token_ids)) == ("length", 5)
    stopped = cluster.client.generate(prompt(20), regex="a{9}x[ab]{9}", stop="x", max_tokens=MAX_TOKENS)
    assert (stopped.finish.reason, stopped.text) == ("stop", "a" * 9)


def test_a_client_that_leaves(cluster: Cluster) -> None:
    stream = cluster.client.stream(prompt(20), regex="[ab]{3000}", max_tokens=3000)
    for piece in stream:
        if piece.token_ids:
            break
    stream.close()
    cluster.assert_blocks_home()


def test_a_worker_without_a_tokenizer_does_not_go_on_without_the_guide(tmp_path: Path) -> None:
    models.write(tmp_path / "router", models.byte_level())
    models.write(tmp_path / "worker", models.byte_level())
    (tmp_path / "worker" / "tokenizer.json").unlink()
    flags = {"model": tmp_path / "worker", "load-format": "dummy", "prefill-tokens": 64}
    with Cluster(prefill=0, router_flags={"model": tmp_path / "router"}, decode_flags=flags) as bare:
        with pytest.raises(Unavailable, match="no pair of workers that is left can guide an answer"):
            bare.client.generate(prompt(20), regex="a")
        with pytest.raises(InvalidArgument, match=r"guide\.regex: "):
            bare.client.generate(prompt(20), regex="a(")
        assert len(bare.client.generate(prompt(20), max_tokens=2, ignore_eos=True).token_ids) == 2
        bare.assert_blocks_home()


CALLS_IN_TAGS = """
{%- if tools %}
    {{- "<|im_start|>system\nAnswer with <tool_call>, of one of:\n" + tools | tojson + "<|im_end|>\n" }}
{%- endif %}
{%- for message in messages %}
    {{- "<|im_start|>" + message.role + "\n" + message.content + "<|im_end|>\n" }}
{%- endfor %}
{{- "<|im_start|>assistant\n" }}
"""


def test_a_call_that_the_model_would_not_make(tmp_path: Path) -> None:
    for file in resolve(EMBEDDED).iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "chat_template.jinja").write_text(CALLS_IN_TAGS)
    days = {"type": "integer", "minimum": 1, "maximum": 7}
    schema = {
        "type": "object",
        "properties": {"place": {"type": "string", "maxLength": 20}, "days": days},
        "required": ["place", "days"],
        "additionalProperties": False,
    }
    names = ("weather", "news")
    tools = [{"type": "function", "function": {"name": name, "parameters": schema}} for name in names]
    choices: list[Any] = ["auto", "required", *({"type": "function", "function": {"name": name}} for name in names)]

    def ask(choice: Any) -> Generation:
        return embedded.client.chat(
            "How is the weather in Paris?", tools=tools, tool_choice=choice, max_tokens=60, temperature=0
        )

    with Cluster(router_flags={"model": tmp_path}, worker_flags={"model": tmp_path}) as embedded:
        with ThreadPoolExecutor(len(choices)) as pool:
            free, required, *named = pool.map(ask, choices)
        embedded.assert_blocks_home()
    assert not free.tool_calls
    assert required.tool_calls
    for name, answer in zip(names, named, strict=True):
        assert (answer.finish.reason, answer.text) == ("eos", "")
        (call,) = answer.tool_calls
        assert call.name == name
        assert len(str(call.arguments["place"])) <= 20
        assert call.arguments["days"] in range(1, 8)
