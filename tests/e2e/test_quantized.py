"""A cluster that serves weights of 8-bit floats."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from tests.common.hf_quantized import FORMATS, save
from tests.e2e.cluster import Cluster
from tests.e2e.tiny import prompt
from tests.router import models

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

TOKENS = 16


def test_answers_are_those_of_transformers(tmp_path: Path) -> None:
    models.write(tmp_path, models.byte_level())
    reference = save(LlamaConfig.from_dict(models.CONFIG), FORMATS["channels"], tmp_path)
    asked = [prompt(length, seed) for seed, length in enumerate((1, 15, 16, 17, 40, 100))]
    flags = {"model": tmp_path, "num-blocks": 64}
    with Cluster(router_flags={"model": tmp_path}, worker_flags=flags) as cluster:
        answers = [cluster.ask_all(asked, TOKENS) for _ in range(2)]  # the second time with prefix hits
        cluster.assert_blocks_home()
    likeliest = []
    for tokens, answer in zip(asked * 2, [*answers[0], *answers[1]], strict=True):
        output = list(answer.token_ids)
        assert len(output) == TOKENS
        logits = reference.logits([*tokens, *output[:-1]])[len(tokens) - 1 :]
        likeliest.append(logits.argmax(1) == torch.tensor(output))
    # now and then a value next to the middle between two 8-bit floats becomes the other one (tests/common)
    assert torch.cat(likeliest).float().mean() > 0.9
