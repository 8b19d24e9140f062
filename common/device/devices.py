"""Which device a worker runs its model on, and in which dtype."""

import torch

from common.model.model_config import ModelConfig
from common.model.model_error import ModelError

HOPPER = 9  # its GPUs' compute capability is 9.x
_CONVERTS_8_BITS = (8, 9)  # and later; that of Ada Lovelace
_MULTIPLE = 16  # of inputs and outputs: cuBLAS multiplies no other matrices of 8-bit floats


def choose_device(name: str) -> torch.device:
    """The device that `name` stands for: auto, cpu, cuda or cuda:N. A GPU becomes torch's current device.

    Raises:
        ModelError: there is no such GPU.
    """
    available = torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if available else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        if not available:
            raise ModelError(
                f"device {name} was asked for, but torch sees no GPU; use --device cpu, or check the driver"
            )
        if ":" not in name:
            device = torch.device("cuda", 0)
        if device.index >= torch.cuda.device_count():
            raise ModelError(f"device {name} was asked for, but there are {torch.cuda.device_count()} GPUs")
        torch.cuda.set_device(device)
    return device


def choose_dtype(name: str, model: ModelConfig, device: torch.device) -> str:
    """`name`, or for auto the dtype that suits the model on this device: "float32", "bfloat16" or "float16". Of a model
    with 8-bit weights it is the dtype of all else.

    Raises:
        ModelError: the model has 8-bit weights, and this GPU has no kernels for them, or none for their sizes, or none
            for this dtype.
    """
    if model.quantization is not None and device.type == "cuda":
        return _beside_8_bits(name, model, device)
    if name != "auto":
        return name
    if device.type == "cpu":
        return "float32"
    return "bfloat16" if model.dtype == "float32" else model.dtype


def choose_kv_dtype(name: str, dtype: str, device: torch.device) -> str:
    """The dtype of KV that `name` stands for, "auto" or "fp8", where `dtype` is that of the model.

    Raises:
        ModelError: this GPU cannot convert 8-bit floats.
    """
    if name == "auto":
        return dtype
    if device.type == "cuda" and (capability := torch.cuda.get_device_capability(device)) < _CONVERTS_8_BITS:
        raise ModelError(
            f"KV in 8-bit floats needs a GPU of compute capability 8.9 or more, and {device} is "
            f"{torch.cuda.get_device_name(device)}, of {capability[0]}.{capability[1]}; leave --kv-cache-dtype out"
        )
    return "float8_e4m3fn"


def _beside_8_bits(name: str, model: ModelConfig, device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    if major != HOPPER:
        raise ModelError(
            f"8-bit weights need a Hopper GPU (H100, H200), and {device} is {torch.cuda.get_device_name(device)}, of "
            f"compute capability {major}.{minor}; serve the model's 16-bit original there"
        )
    if name not in ("auto", "bfloat16"):
        raise ModelError(
            f"a model with 8-bit weights is served in bfloat16 on a GPU, not in {name}; leave --dtype out, or set it "
            "to bfloat16"
        )
    for what, size in _sizes(model).items():
        if size % _MULTIPLE:
            raise ModelError(
                f"8-bit weights need sizes that are multiples of {_MULTIPLE} on a GPU, and {what} is {size}; serve the "
                "model's 16-bit original there"
            )
    return "bfloat16"


def _sizes(model: ModelConfig) -> dict[str, int]:
    """Inputs and outputs of the matrices that cuBLAS multiplies. Experts have a kernel of ours, for any size."""
    sizes = {
        "hidden_size": model.hidden_size,
        "num_attention_heads * head_dim": model.num_heads * model.head_dim,
        "(num_attention_heads + 2 * num_key_value_heads) * head_dim": (model.num_heads + 2 * model.num_kv_heads)
        * model.head_dim,
    }
    return sizes if model.routing is not None else sizes | {"intermediate_size": model.intermediate_size}
