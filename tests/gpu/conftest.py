"""Everything here needs a CUDA device, and is skipped where there is none."""

import os
from pathlib import Path

import pytest
import torch

from common.model import gguf_import, model_files
from common.model.model_error import ModelError


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here not in item.path.parents:
            continue
        item.add_marker(pytest.mark.gpu)
        if not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device: torch.cuda.is_available() is False"))


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face directory: TWOSTROKE_TEST_MODEL (such a directory, or the GGUF), else the
    embedded model."""
    named = os.environ.get("TWOSTROKE_TEST_MODEL")
    if named and named.endswith(".gguf"):
        directory = tmp_path_factory.mktemp("smollm2")
        gguf_import.convert(Path(named), directory)
        return directory
    try:
        return model_files.resolve(named or model_files.EMBEDDED)
    except ModelError as error:
        pytest.skip(str(error))
