"""What a worker says of its pool and its weights when it starts."""

from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from common.device.gpu_memory import Passes
from common.worker import loading
from common.worker.config import WorkerConfig
from tests.common import hf_quantized
from tests.router import models
from twostroke.v1 import inference_pb2


@pytest.mark.parametrize(
    ("blocks", "max_length", "told"),
    [(1, None, [(16, models.CONTEXT_LENGTH)]), (1, 16, []), (-(-models.CONTEXT_LENGTH // 16), None, [])],
)
def test_a_pool_that_is_too_small_for_the_context_is_told_of(
    tmp_path: Path, blocks: int, max_length: int | None, told: list[tuple[int, int]]
) -> None:
    directory = models.write(tmp_path, models.byte_level())
    warnings = _warnings(directory, num_blocks=blocks, max_length=max_length)
    assert [(entry["tokens"], entry["context_length"]) for entry in warnings] == told


def test_8_bit_weights_on_a_cpu_are_warned_of(tmp_path: Path) -> None:
    directory = models.write(tmp_path, models.byte_level())
    hf_quantized.change_config(directory, quantization_config=hf_quantized.FORMATS["channels"].config)
    (warning,) = _warnings(directory, num_blocks=-(-models.CONTEXT_LENGTH // 16))
    assert warning["event"].startswith("8-bit weights are slow on a CPU")


@pytest.mark.parametrize(
    ("biases", "kv", "warned"), [(True, "fp8", True), (True, "auto", False), (False, "fp8", False)]
)
def test_8_bit_kv_of_a_model_with_biases_is_warned_of(tmp_path: Path, biases: bool, kv: str, warned: bool) -> None:
    directory = models.write(tmp_path, models.byte_level())
    hf_quantized.change_config(directory, attention_bias=biases)
    warnings = _warnings(directory, num_blocks=-(-models.CONTEXT_LENGTH // 16), kv_cache_dtype=kv)
    assert [entry["event"].startswith("keys of a model with biases") for entry in warnings] == [True] * warned


def _warnings(directory: Path, *, num_blocks: int, **settings: Any) -> list[MutableMapping[str, Any]]:
    config = WorkerConfig(model=str(directory), load_format="dummy", device="cpu", num_blocks=num_blocks, **settings)
    with capture_logs() as logs:
        loading.load(
            config, inference_pb2.WORKER_ROLE_DECODE, max_batch=1, passes=Passes(tokens=1, rows=1, graphs=0)
        ).close()
    return [entry for entry in logs if entry["log_level"] == "warning"]
