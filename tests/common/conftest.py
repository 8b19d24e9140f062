from pathlib import Path

import pytest

from common.model import model_files


@pytest.fixture(scope="session")
def embedded() -> Path:
    return model_files.resolve(model_files.EMBEDDED)
