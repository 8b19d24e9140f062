"""What operators see of a cluster: every part's metrics over HTTP, and log lines that a request can be followed by."""

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.request import urlopen

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from common.network.free_port import free_port
from tests.e2e.cluster import Cluster
from tests.e2e.tiny import prompt, tiny_cluster
from twostroke import Generation, InvalidArgument

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

PARTS = ("router", "prefill", "decode")
PORTS = {part: free_port() for part in PARTS}
TEXT = "the quick brown fox jumps over the lazy dog"
OUTPUT = 500
# Two answers do not fit side by side: one is preempted and resumed.
DECODE_BLOCKS = 40


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("log") / "log"


@pytest.fixture(scope="module")
def cluster(log: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with tiny_cluster(
        tmp_path_factory.mktemp("model"),
        {"log-format": "json"},
        router_flags={"log-format": "json", "metrics-port": PORTS["router"], "headroom-tokens": 1},
        prefill_flags={"metrics-port": PORTS["prefill"]},
        decode_flags={"metrics-port": PORTS["decode"], "num-blocks": DECODE_BLOCKS},
        log=log,
    ) as it:
        yield it


def families(part: str) -> list[Metric]:
    with urlopen(f"http://127.0.0.1:{PORTS[part]}/metrics", timeout=10) as response:
        return list(text_string_to_metric_families(response.read().decode()))


def value(part: str, name: str, **labels: str) -> float:
    """The sample with these labels; 0 where there is none."""
    samples = (sample for family in families(part) for sample in family.samples)
    return next((sample.value for sample in samples if sample.name == name and sample.labels == labels), 0)


def ask(cluster: Cluster, seed: int, request_id: str = "") -> Generation:
    tokens = prompt(20, seed=seed)
    return cluster.client.generate(
        tokens, max_tokens=OUTPUT, temperature=0, ignore_eos=True, request_id=request_id, timeout=60
    )


def test_every_part_tells_what_it_does(cluster: Cluster) -> None:
    ask(cluster, seed=0)
    ask(cluster, seed=0)  # of which the first block is in both caches
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda seed: ask(cluster, seed), (1, 2)))
    with pytest.raises(InvalidArgument):
        cluster.client.generate(TEXT, n=1000)
    preempted = sum(answer.finish.usage.resumes for answer in answers)
    assert preempted > 0
    cluster.assert_blocks_home()
    cluster.wait_for(lambda: value("decode", "twostroke_blocks", state="in_use") == 0)

    for name in ("first_token", "request"):
        assert value("router", f"twostroke_{name}_seconds_count") == 4
    assert value("router", "twostroke_inter_token_seconds_count") > 0
    for phase in ("queued", "reserved", "prefill", "transfer", "decode"):
        assert value("router", "twostroke_phase_seconds_count", phase=phase) == 4
    assert value("router", "twostroke_phase_seconds_sum", phase="decode") > 0
    for code, count in (("OK", 4), ("INVALID_ARGUMENT", 1), ("INTERNAL", 0)):
        assert value("router", "twostroke_calls_total", method="Generate", code=code) == count
    assert value("router", "twostroke_resumes_total", cause="preempted") == preempted
    assert value("router", "twostroke_prompt_tokens_total") == 4 * 20
    assert value("router", "twostroke_output_tokens_total") == 4 * OUTPUT
    for gauge in ("twostroke_queued", "twostroke_queued_prompt_tokens", "twostroke_running"):
        assert value("router", gauge) == 0
    for role in ("prefill", "decode"):
        assert value("router", "twostroke_workers", role=role) == 1
        assert value("router", "twostroke_workers_paused", role=role) == 0

    for part, total in (("prefill", 1024), ("decode", DECODE_BLOCKS)):
        blocks = {
            state: value(part, "twostroke_blocks", state=state) for state in ("free", "cached", "in_use", "reserved")
        }
        assert blocks["in_use"] == blocks["reserved"] == 0
        assert blocks["free"] + blocks["cached"] == total
        assert value(part, "twostroke_prompt_tokens_total", source="cache") >= 16
        assert value(part, "twostroke_waiting") == value(part, "twostroke_running") == 0
    assert value("prefill", "twostroke_prompt_tokens_total", source="computed") > 0
    assert value("prefill", "twostroke_batch_tokens_count") > 0
    assert value("prefill", "twostroke_leases") == 0
    assert value("decode", "twostroke_attempts_ended_total", cause="preempted") == preempted
    assert value("decode", "twostroke_attempts_ended_total", cause="finished") == 4
    assert value("decode", "twostroke_batch_sequences_count") > 0
    pulled = value("decode", "twostroke_prompt_tokens_total", source="prefill worker")
    assert pulled > 0
    assert value("decode", "twostroke_handover_bytes_total") > 0
    assert value("decode", "twostroke_handover_seconds_count") == 4 + preempted


@pytest.mark.parametrize("part", PARTS)
def test_metrics_are_named_by_convention(cluster: Cluster, part: str) -> None:
    for family in families(part):
        assert family.name.startswith("twostroke_")
        assert family.documentation
        if family.type == "counter":
            assert any(sample.name == f"{family.name}_total" for sample in family.samples) or not family.samples
        elif family.type == "histogram":
            assert re.search(r"_(seconds|tokens|sequences)$", family.name)
        assert not re.search(r"_(ms|milliseconds|kib|mib|mb)(_|$)", family.name)


def test_a_request_can_be_followed_in_the_log(cluster: Cluster, log: Path) -> None:
    cluster.client.generate(TEXT, max_tokens=4, ignore_eos=True, request_id="followed", timeout=60)
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda seed: ask(cluster, seed, f"pressed-{seed}"), (3, 4)))
    assert sum(answer.finish.usage.resumes for answer in answers) > 0
    cluster.assert_blocks_home()
    written = log.read_text()
    entries = [json.loads(line) for line in written.splitlines()]
    assert all({"event", "level", "timestamp"} <= entry.keys() for entry in entries)
    (answered,) = [entry for entry in entries if entry.get("request_id") == "followed"]
    assert (answered["event"], answered["completion_tokens"], answered["reason"]) == ("answered", 4, "length")
    resuming = [entry for entry in entries if entry["event"] == "resuming"]
    assert resuming
    assert all(entry["request_id"] and entry["worker"] and entry["cause"] == "preempted" for entry in resuming)
    assert {"pressed-3", "pressed-4"} & {entry["request_id"] for entry in resuming}
    assert {entry["event"] for entry in entries} >= {"router listening", "prefill worker ready", "decode worker ready"}
    assert TEXT not in written
    assert str(prompt(20, seed=3))[1:20] not in written
