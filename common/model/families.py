"""The architectures that are served: how they differ, and what each takes for what its config.json leaves out, which is
what transformers takes. Imports no torch."""

from dataclasses import dataclass
from enum import Enum, auto


class Window(Enum):
    """When sliding-window attention is in use."""

    NEVER = auto()
    IF_TOLD = auto()  # by use_sliding_window
    IF_GIVEN = auto()


@dataclass(frozen=True, slots=True)
class Family:
    model_type: str  # transformers' name
    window: Window
    usual_window: int | None = None  # tokens; None: all
    usual_theta: float = 1e4
    usual_eps: float = 1e-6
    usual_head_dim: int | None = None  # None: the hidden size, divided among the heads
    usually_tied: bool = False  # embedding and output head
    qkv_bias: bool = False
    may_have_biases: bool = False  # of q, k, v and the output, if attention_bias says so
    qk_norm: bool = False
    has_experts: bool = False
    intermediate_size: str = "intermediate_size"  # where config.json has it
    joined_projections: bool = False  # q, k and v, and gate and up, are one matrix each
    skips_rotation: bool = False  # in some layers


FAMILIES = {
    "LlamaForCausalLM": Family("llama", Window.NEVER, may_have_biases=True),
    "MistralForCausalLM": Family("mistral", Window.IF_GIVEN, usual_window=4096),
    "MixtralForCausalLM": Family("mixtral", Window.IF_GIVEN, usual_theta=1e6, usual_eps=1e-5, has_experts=True),
    "Phi3ForCausalLM": Family("phi3", Window.IF_GIVEN, usual_eps=1e-5, joined_projections=True),
    "Qwen2ForCausalLM": Family("qwen2", Window.IF_TOLD, usual_window=4096, qkv_bias=True),
    "Qwen3ForCausalLM": Family(
        "qwen3", Window.IF_TOLD, usual_window=4096, usual_head_dim=128, may_have_biases=True, qk_norm=True
    ),
    "Qwen3MoeForCausalLM": Family(
        "qwen3_moe",
        Window.IF_TOLD,
        usual_window=4096,
        may_have_biases=True,
        qk_norm=True,
        has_experts=True,
        intermediate_size="moe_intermediate_size",
    ),
    "SmolLM3ForCausalLM": Family(
        "smollm3", Window.IF_TOLD, usual_theta=2e6, usually_tied=True, may_have_biases=True, skips_rotation=True
    ),
}
