"""What a prefill worker on a GPU runs before it is ready."""

from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from benchmarks.parts import LoadedModel, worker_parts
from kernels.ops import REFERENCE
from prefill_worker.runner import WARM_UP_PROMPTS, Runner
from prefill_worker.scheduler import Chunk
from tests.common import hf_models

BLOCK = 4


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    directory: Path = tmp_path_factory.mktemp("model")
    hf_models.save("qwen3", directory)
    return LoadedModel(hf_models.load_ours(directory), REFERENCE, torch.device("cpu"))


@pytest.mark.parametrize(("tokens", "blocks"), [(100, 26), (65, 17), (1, 1), (300, 26)])
def test_all_sizes_run_and_the_blocks_come_home(loaded: LoadedModel, tokens: int, blocks: int) -> None:
    parts = worker_parts(loaded, blocks, BLOCK)
    runner, launch = Runner(parts), Runner.launch
    whole, ends, with_context = set[int](), set[int](), set[int]()

    def watch(self: Runner, chunks: list[Chunk]) -> object:
        size = sum(chunk.end - chunk.start for chunk in chunks)
        if chunks[0].start:
            with_context.add(size)
        else:
            whole.add(size)
            ends.add(len(chunks))
        return launch(self, chunks)

    with patch.object(Runner, "launch", watch):
        runner.warm_up(tokens)
    longest = blocks * BLOCK - 1
    sizes = {size for power in range(10) for size in (1 << power, (1 << power) + 1) if size <= tokens}
    assert whole >= {size for size in sizes if size <= longest}
    assert max(whole) >= tokens - tokens // longest
    assert ends >= {size for size in sizes if size <= WARM_UP_PROMPTS}
    assert with_context >= {size - size // 2 for size in sizes if 1 < size <= longest}
    assert parts.blocks.free_count == blocks
