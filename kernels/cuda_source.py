"""The text of a kernel in CUDA C++, after what it shares with others."""

from pathlib import Path

_FOLDER = Path(__file__).parent


def read(name: str) -> str:
    """Of the file `name`. One text, as cupy's cache of compiled kernels would not see a change of what one includes."""
    return _joined("mbarrier.cuh", name)


def read_for_hopper(name: str, columns: int) -> str:
    """Of the file `name`, whose multiply() multiplies 64 rows of one factor with `columns` of the other."""
    return _joined("mbarrier.cuh", "hopper.cuh") + _multiply(columns) + _joined(name)


def _joined(*names: str) -> str:
    return "".join((_FOLDER / name).read_text(encoding="utf-8") for name in names)


def _multiply(columns: int) -> str:
    """The instruction names each of its registers, of which a thread has one for two columns (PTX: wgmma.mma_async)."""
    count = columns // 2
    registers = ", ".join(f"%{i}" for i in range(count))
    sums = ", ".join(f'"+f"(sums[{i}])' for i in range(count))
    return f"""
__device__ __forceinline__ void multiply(float* sums, u64 rows, u64 columns) {{
    asm volatile("wgmma.mma_async.sync.aligned.m64n{columns}k16.f32." TYPE "." TYPE
                 " {{{registers}}}, %{count}, %{count + 1}, 1, 1, 1, 0, 0;"
                 : {sums}
                 : "l"(rows), "l"(columns));
}}
"""
