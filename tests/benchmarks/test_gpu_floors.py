"""The workload that others publish figures for, and what an H100 could do with it at best."""

import pytest

from benchmarks.gpu import floors, models
from benchmarks.gpu.workload import workload
from common.model.model_config import parse_config


def test_the_workload_is_that_of_nano_vllm() -> None:
    asks = workload(256)
    assert sum(ask.output_tokens for ask in asks) == 133_966
    assert all(100 <= len(ask.prompt) <= 1024 and 0 <= min(ask.prompt) <= max(ask.prompt) <= 10_000 for ask in asks)


def test_its_floor_on_an_h100() -> None:
    config = parse_config(models.SHAPES["qwen3-0.6b"])
    lengths = [(len(ask.prompt), ask.output_tokens) for ask in workload(256)]
    assert floors.workload_seconds(config, lengths, 3.0e12, 790e12) == pytest.approx(5.2, abs=0.05)


@pytest.mark.parametrize(("name", "parameters"), [("qwen3-0.6b", 0.596e9), ("llama-3.1-8b", 8.03e9)])
def test_shapes_have_the_parameters_of_their_names(name: str, parameters: float) -> None:
    config = parse_config(models.SHAPES[name])
    embedding = config.vocab_size * config.hidden_size
    total = floors.layer_parameters(config) + embedding * (1 if config.tie_word_embeddings else 2)
    assert total == pytest.approx(parameters, rel=0.002)


def test_a_step_of_a_mixture_reads_the_experts_that_its_tokens_choose() -> None:
    config = parse_config(models.SHAPES["qwen3-30b-a3b"])
    embeddings = 2 * config.vocab_size * config.hidden_size
    assert floors.layer_parameters(config) + embeddings == pytest.approx(3.35e9, rel=0.005)
    assert floors.layer_parameters(config, 10_000) + embeddings == pytest.approx(30.5e9, rel=0.005)
    assert floors.weight_bytes(config, 64) == pytest.approx(59e9, rel=0.02)  # 126 of 128 experts


def test_a_decode_step_reads_weights_and_kv() -> None:
    config = parse_config(models.SHAPES["qwen3-0.6b"])
    assert floors.kv_bytes(config) * 16 == 1.75 * 2**20
    one, two = floors.decode_step_bytes(config, [1000]), floors.decode_step_bytes(config, [1000, 1000])
    assert two - one == 1000 * floors.kv_bytes(config)
