"""Which dtype a worker chooses, without a GPU."""

from dataclasses import replace

import pytest
import torch

from common.device.devices import choose_dtype, choose_kv_dtype
from common.model.model_config import ModelConfig, Routing, parse_config
from common.model.model_error import ModelError
from common.model.quantization import Quantization
from tests.common.test_model_config import LLAMA

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
STORED_AS_FLOAT16 = parse_config(LLAMA | {"dtype": "float16"})
QUANTIZED = replace(STORED_AS_FLOAT16, quantization=Quantization(in_blocks=True, scales="weight_scale_inv"))


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))


@pytest.mark.parametrize(
    ("model", "device", "automatic"),
    [
        (STORED_AS_FLOAT16, CPU, "float32"),
        (STORED_AS_FLOAT16, GPU, "float16"),
        (replace(STORED_AS_FLOAT16, dtype="float32"), GPU, "bfloat16"),
        (QUANTIZED, CPU, "float32"),
    ],
)
def test_any_dtype_can_be_asked_for(model: ModelConfig, device: torch.device, automatic: str) -> None:
    assert choose_dtype("auto", model, device) == automatic
    for name in ("float32", "bfloat16", "float16"):
        assert choose_dtype(name, model, device) == name


@pytest.mark.parametrize("capability", [(8, 9), (9, 0), (12, 0)])
def test_8_bit_kv_is_kept_on_gpus_that_convert_it_and_on_cpus(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    for device in (CPU, GPU):
        assert choose_kv_dtype("fp8", "bfloat16", device) == "float8_e4m3fn"
        assert choose_kv_dtype("auto", "bfloat16", device) == "bfloat16"


def test_8_bit_kv_is_refused_on_other_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100")
    with pytest.raises(
        ModelError, match=r"8\.9 or more, and cuda:0 is NVIDIA A100, of 8\.0; leave --kv-cache-dtype out"
    ):
        choose_kv_dtype("fp8", "bfloat16", GPU)
    assert choose_kv_dtype("auto", "float16", GPU) == "float16"


@pytest.mark.usefixtures("hopper")
def test_8_bit_weights_on_a_gpu_are_served_in_bfloat16() -> None:
    for name in ("auto", "bfloat16"):
        assert choose_dtype(name, QUANTIZED, GPU) == "bfloat16"
    for name in ("float32", "float16"):
        with pytest.raises(ModelError, match=f"served in bfloat16 on a GPU, not in {name}; leave --dtype out"):
            choose_dtype(name, QUANTIZED, GPU)


@pytest.mark.parametrize("capability", [(8, 9), (10, 0), (12, 0)])
def test_8_bit_weights_need_a_hopper_gpu(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA L4")
    said = ".".join(map(str, capability))
    with pytest.raises(ModelError, match=f"need a Hopper GPU .*, and cuda:0 is NVIDIA L4, of compute .* {said};"):
        choose_dtype("auto", QUANTIZED, GPU)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("model", "words"),
    [
        (replace(QUANTIZED, hidden_size=4088), "hidden_size is 4088"),
        (replace(QUANTIZED, intermediate_size=14_328), "intermediate_size is 14328"),
        (replace(QUANTIZED, num_heads=3, num_kv_heads=1, head_dim=24), r"num_attention_heads \* head_dim is 72"),
        (replace(QUANTIZED, num_heads=4, num_kv_heads=1, head_dim=4), r"num_key_value_heads\) \* head_dim is 24"),
    ],
)
def test_8_bit_weights_of_sizes_that_cublas_does_not_take(model: ModelConfig, words: str) -> None:
    with pytest.raises(ModelError, match=f"multiples of 16 on a GPU, and .*{words};"):
        choose_dtype("auto", model, GPU)
    assert choose_dtype("auto", model, CPU) == "float32"


@pytest.mark.usefixtures("hopper")
def test_experts_may_have_any_size() -> None:
    routing = Routing(experts=4, per_token=2, normalized=True)
    assert choose_dtype("auto", replace(QUANTIZED, intermediate_size=72, routing=routing), GPU) == "bfloat16"
