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


@pytest.mark.parametrize(("tokens", "blocks"), [(100, 26), (65, 17), (1, 1)])
def test_all_sizes_run_and_the_blocks_come_home(loaded: LoadedModel, tokens: int, blocks: int) -> None:
    parts = worker_parts(loaded, blocks, BLOCK)
    runner, launch = Runner(parts), Runner.launch
    ran: set[tuple[int, int]] = set()

    def watch(self: Runner, chunks: list[Chunk]) -> object:
        ran.add((len(chunks), sum(chunk.end - chunk.start for chunk in chunks)))
        return launch(self, chunks)

    with patch.object(Runner, "launch", watch):
        runner.warm_up(tokens)
    sizes = {size for power in range(8) for size in (1 << power, (1 << power) + 1) if size <= tokens} | {tokens}
    assert ran == {(1, size) for size in sizes} | {(size, size) for size in sizes if size <= WARM_UP_PROMPTS}
    assert parts.blocks.free_count == blocks
