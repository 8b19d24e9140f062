"""What the pool leaves free for CUDA graphs, without a GPU."""

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from benchmarks.gpu import models
from common.device.gpu_memory import Passes, bytes_for
from common.kv.kv_pool import KvLayout
from common.kv.pool_size import GPU_POOL_SHARE, blocks_that_fit
from common.model.model_config import ModelConfig, load_config
from common.model.model_error import ModelError
from decode_worker import graphs as decode_graphs
from prefill_worker import graphs as prefill_graphs

CUDA = torch.device("cuda", 0)
LAYOUT = KvLayout(1, num_layers=32, block_size=16, num_kv_heads=8, head_dim=128, dtype="bfloat16")
MIB = 1 << 20


def fit(free: int, kept: int) -> int:
    with patch("torch.cuda.mem_get_info", return_value=(free, 80 << 30)):
        return blocks_that_fit(LAYOUT, CUDA, kept)


def test_a_share_of_what_is_free_where_that_leaves_enough() -> None:
    assert fit(60 << 30, 1 << 30) == int((60 << 30) * GPU_POOL_SHARE) // LAYOUT.block_bytes


def test_what_graphs_need_stays_free_on_a_small_gpu() -> None:
    free, kept = 4 << 30, 1 << 30
    assert free - fit(free, kept) * LAYOUT.block_bytes >= kept


def test_no_room_at_all_is_said() -> None:
    with pytest.raises(ModelError, match="no KV block"):
        fit(1 << 30, 2 << 30)


@pytest.mark.parametrize(
    ("name", "measured_mib"),
    # what capturing took on an H100: batches of up to 8,192 tokens, decode batches of up to 256
    [("qwen3-0.6b", (708, 712)), ("llama-3.1-8b", (1288, 602))],
)
def test_the_estimate_is_above_what_was_measured(
    name: str, measured_mib: tuple[int, int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = _shape(name, tmp_path_factory)
    both = (prefill_graphs.passes(8192), decode_graphs.passes(256))
    passes = [replace(each, special_rows=0, special_parts=0) for each in both]
    for each, measured in zip(passes, measured_mib, strict=True):
        assert measured * MIB <= bytes_for(each, model, "bfloat16") <= 3 * measured * MIB
    assert bytes_for(passes[0] + passes[1], model, "bfloat16") == sum(
        bytes_for(each, model, "bfloat16") for each in passes
    )


def test_a_token_needs_room_for_each_of_its_experts(tmp_path_factory: pytest.TempPathFactory) -> None:
    model = _shape("qwen3-30b-a3b", tmp_path_factory)
    activated_and_parts = 8192 * 8 * (768 + 2048) * 2
    assert 2 * activated_and_parts < bytes_for(Passes(8192, 0, 0), model, "bfloat16") < 5 * activated_and_parts


def test_what_is_rounded_to_8_bits_needs_room_too(tmp_path_factory: pytest.TempPathFactory) -> None:
    plain, quantized = (
        bytes_for(Passes(8192, 0, 0), _shape(name, tmp_path_factory), "bfloat16")
        for name in ("llama-3.1-8b", "llama-3.1-8b-fp8")
    )
    assert quantized - plain == 2 * 8192 * 14_336


def test_sampling_that_is_not_captured_needs_room_too(tmp_path_factory: pytest.TempPathFactory) -> None:
    model = _shape("qwen3-0.6b", tmp_path_factory)
    for passes in (decode_graphs.passes(256), prefill_graphs.passes(2048)):
        captured = replace(passes, special_rows=0, special_parts=0)
        special = bytes_for(passes, model, "bfloat16") - bytes_for(captured, model, "bfloat16")
        two_float32_copies = 2 * passes.rows * model.vocab_size * 4
        assert 1.5 * two_float32_copies < special < 3.5 * two_float32_copies


def _shape(name: str, folder: pytest.TempPathFactory) -> ModelConfig:
    return load_config(models.write(name, folder.mktemp(name)), None)


def test_nothing_is_kept_for_nothing() -> None:
    assert Passes(0, 0, 0) + Passes(1, 2, 3) == Passes(1, 2, 3)
