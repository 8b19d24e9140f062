"""nano-vLLM, the engine that this one grew from, on its own benchmark's workload, where it is installed.

It needs flash-attn, and a model with weights on disk; these are random, as in the other measurements.
"""

import importlib
import importlib.util
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.workload import Ask, timed_runs


def installed() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("nanovllm", "flash_attn"))


def seconds_of(model: Path, max_length: int, asks: Sequence[Ask], temperature: float) -> list[float]:
    """How long each run takes. To be called in a process of its own, which keeps the GPU's memory until it ends.

    Args:
        model: config and tokenizer; its directory is left as it is.
    """
    nano = importlib.import_module("nanovllm")
    engine = nano.LLM(str(_with_weights(model)), enforce_eager=False, max_model_len=max_length)

    def generate(prompts: list[list[int]], settings: list[Any]) -> list[int]:
        return [len(output["token_ids"]) for output in engine.generate(prompts, settings, use_tqdm=False)]

    def settings_of(tokens: int) -> Any:
        return nano.SamplingParams(temperature=temperature, ignore_eos=True, max_tokens=tokens)

    return timed_runs(generate, settings_of, asks)


def _with_weights(model: Path) -> Path:
    transformers: Any = importlib.import_module("transformers")
    directory = model.with_name(f"{model.name}-random")
    shutil.copytree(model, directory)
    config = transformers.AutoConfig.from_pretrained(model)
    with torch.device("cuda"):
        made = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    made.save_pretrained(directory)
    del made
    torch.cuda.empty_cache()
    return directory
