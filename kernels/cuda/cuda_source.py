"""The source text of a CUDA C++ kernel, with the headers that it shares with others in front."""

from pathlib import Path

_FOLDER = Path(__file__).parent


def read(name: str) -> str:
    """The source of the file `name`. It is one text, since cupy's cache of compiled kernels would not notice a change
    in an included file."""
    return _joined("mbarrier.cuh", name)


def read_for_hopper(name: str, columns: int) -> str:
    """The source of the file `name`, with a multiply() for tiles of 64 x `columns`: the M and N of its wgmma."""
    return _joined("mbarrier.cuh", "hopper.cuh") + _multiply(columns) + _joined(name)


def _joined(*names: str) -> str:
    return "".join((_FOLDER / name).read_text(encoding="utf-8") for name in names)


def _multiply(columns: int) -> str:
    """multiply() for N = `columns`. The instruction has to name every accumulator register, of which a thread has one
    for every two columns (PTX: wgmma.mma_async)."""
    count = columns // 2
    registers = ", ".join(f"%{i}" for i in range(count))
    sums = ", ".join(f'"+f"(sums[{i}])' for i in range(count))
    return f"""
__device__ __forceinline__ void multiply(float* sums, u64 rows, u64 columns) {{
    asm volatile("wgmma.mma_async.sync.aligned.m64n{columns}" FACTORS
                 " {{{registers}}}, %{count}, %{count + 1}, 1, 1, 1" NOT_TRANSPOSED ";"
                 : {sums}
                 : "l"(rows), "l"(columns));
}}
"""
