"""The text of a kernel in CUDA C++, after what all of them share."""

from pathlib import Path

_FOLDER = Path(__file__).parent


def read(name: str) -> str:
    """Of the file `name`. One text, as cupy's cache of compiled kernels would not see a change of what one includes."""
    return "".join((_FOLDER / file).read_text(encoding="utf-8") for file in ("mbarrier.cuh", name))
