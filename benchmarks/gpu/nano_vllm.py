"""nano-vLLM, the engine that this one grew from, on its own benchmark's workload, where it is installed.

It needs flash-attn, and a model with weights on disk; these are random, as in the other measurements.
"""

import importlib
import importlib.util
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

WARM_UP = 16  # of so many requests one is run before


def installed() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("nanovllm", "flash_attn"))


def seconds_of(
    model: Path, workload: Sequence[tuple[Sequence[int], int]], temperature: float, max_length: int, runs: int = 2
) -> list[float]:
    """How long each run takes. To be called in a process of its own, which keeps the GPU's memory until it ends.

    Args:
        model: config and tokenizer; its directory is left as it is.
        workload: token ids of each prompt, all below the vocabulary's size less `runs`, and tokens to generate.
    """
    nano = importlib.import_module("nanovllm")
    directory = _with_weights(model)
    engine = nano.LLM(str(directory), enforce_eager=False, max_model_len=max_length)
    seconds = []
    for run in range(runs + 1):
        some = workload[:: WARM_UP if run == 0 else 1]
        # Other tokens in each run: nano-vLLM, too, finds prefixes that it has seen.
        prompts = [[token + run for token in prompt] for prompt, _ in some]
        wanted = [tokens for _, tokens in some]
        settings = [
            nano.SamplingParams(temperature=temperature, ignore_eos=True, max_tokens=tokens) for tokens in wanted
        ]
        began = time.perf_counter()
        outputs = engine.generate(prompts, settings, use_tqdm=False)
        if run > 0:
            seconds.append(time.perf_counter() - began)
        assert [len(output["token_ids"]) for output in outputs] == wanted
    return seconds


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
