"""The workload that others publish figures for, and what an H100 could do with it at best."""

from dataclasses import replace

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


@pytest.mark.parametrize(
    ("name", "parameters"), [("qwen3-0.6b", 0.596e9), ("llama-3.1-8b", 8.03e9), ("qwen3-8b-fp8", 8.19e9)]
)
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


@pytest.mark.parametrize("name", ["llama-3.1-8b-fp8", "qwen3-8b-fp8", "qwen3-30b-a3b-fp8"])
def test_8_bit_weights_are_half_as_much_to_read_and_to_compute(name: str) -> None:
    config = parse_config(models.SHAPES[name])
    in_16_bits = replace(config, quantization=None)
    routers = 0 if config.routing is None else 2 * config.num_layers * 128 * config.hidden_size
    others = 2 * config.vocab_size * config.hidden_size + routers  # bytes of theirs, or operations of one token
    for tokens in (1, 64):
        layers, layers_in_16_bits = (floors.weight_bytes(each, tokens) - others for each in (config, in_16_bits))
        assert layers / layers_in_16_bits == pytest.approx(0.5, rel=3e-4)
    assert floors.kv_bytes(config) == floors.kv_bytes(in_16_bits)

    saved = floors.prefill_operations(in_16_bits, [100]) - floors.prefill_operations(config, [100])
    assert saved == pytest.approx(100 * (floors.layer_parameters(config) - routers / 2))


def test_scales_of_blocks_are_read() -> None:
    config = parse_config(models.SHAPES["qwen3-8b-fp8"])
    vocabulary = 2 * config.vocab_size * config.hidden_size
    scales = floors.weight_bytes(config) - vocabulary - floors.layer_parameters(config)
    assert scales == pytest.approx(4 * floors.layer_parameters(config) / 128**2)


@pytest.mark.parametrize("rates", [(1e12, 1e30), (1e30, 1e12)], ids=["reading", "computing"])
def test_a_workload_of_8_bit_weights_takes_what_is_left_of_reading_and_of_computing(rates: tuple[float, float]) -> None:
    config = parse_config(models.SHAPES["llama-3.1-8b-fp8"])
    layers, vocabulary = floors.layer_parameters(config), config.vocab_size * config.hidden_size
    both = (config, replace(config, quantization=None))
    seconds, in_16_bits = (floors.workload_seconds(each, [(10, 100)] * 8, *rates) for each in both)
    assert seconds / in_16_bits == pytest.approx((layers / 2 + vocabulary) / (layers + vocabulary), rel=0.01)
