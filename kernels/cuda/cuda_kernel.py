"""CUDA C++ kernels for one GPU architecture only, compiled and launched through NVIDIA's own bindings.

cupy, which compiles the other CUDA C++ kernel, cannot target an architecture-specific feature set (sm_90a), and
supports neither clusters nor programmatic dependent launch (`kernels.cuda.triton_launch`)."""

import ctypes
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kernels.cuda import cuda_source, triton_launch
from kernels.cuda.gpu import is_hopper, tma_aligned

if TYPE_CHECKING:
    from cuda.bindings import driver

HOPPER_STEP_BYTES = 128  # of a row, that a pipeline stage has


@cache
def _bindings() -> tuple[ModuleType, ModuleType]:
    """CUDA's driver and its compiler. A machine without a GPU may lack them."""
    from cuda.bindings import driver, nvrtc

    return driver, nvrtc


class CudaKernel:
    """One kernel, compiled for one device: the function `name` of the file of that name."""

    def __init__(
        self,
        name: str,
        columns: int,
        macros: Mapping[str, int],
        shared_bytes: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """
        Args:
            name: of the function, and of its file without .cu.
            columns: N of the kernel's wgmma instructions.
            macros: preprocessor definitions of the kernel.
            shared_bytes: dynamic shared memory of a thread block.
            dtype: of outputs, torch.bfloat16 or torch.float16.
            device: where it is to run.

        Raises:
            RuntimeError: compiling or loading failed; the message is the compiler's, or the driver's.
        """
        driver, _ = _bindings()
        source = cuda_source.read_for_hopper(f"{name}.cu", columns)
        all_macros = {**macros, "FLOAT16": int(dtype == torch.float16)}
        with torch.cuda.device(device):
            self._module = _checked(driver.cuModuleLoadData(_compiled(name, source, all_macros, device)))
            self._function = _checked(driver.cuModuleGetFunction(self._module, name.encode()))
            limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _checked(driver.cuFuncSetAttribute(self._function, limit, shared_bytes))
        self._shared_bytes = shared_bytes
        self._device = device

    def __call__(self, programs: int, threads: int, arguments: Sequence[Any]) -> None:
        """Launches the kernel on torch's current stream, with programmatic dependent launch. Its device must be the
        current one.

        Args:
            programs: thread blocks.
            threads: of a thread block.
            arguments: ctypes values, or objects of the bindings that have getPtr().

        Raises:
            RuntimeError: the driver refused the launch.
        """
        driver, _ = _bindings()
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = programs, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes = self._shared_bytes
        config.hStream = driver.CUstream(torch.cuda.current_stream(self._device).cuda_stream)
        if triton_launch.enabled:
            dependent = driver.CUlaunchAttribute()
            dependent.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            dependent.value.programmaticStreamSerializationAllowed = 1
            config.attrs, config.numAttrs = [dependent], 1
        addresses = (ctypes.c_void_p * len(arguments))(*map(_address, arguments))
        _checked(driver.cuLaunchKernelEx(config, self._function, ctypes.addressof(addresses), 0))


def hopper_step(dtype: torch.dtype) -> int:
    """Inputs (K) of a pipeline stage, of factors of this dtype."""
    return HOPPER_STEP_BYTES // dtype.itemsize


def suits_hopper(x: Tensor, weight: Tensor) -> bool:
    """Whether x [rows, inputs] and weight [outputs, inputs] meet what all linear layers for Hopper require. Each has
    requirements of its own beside these. If the weight has 8-bit floats, x is what is yet to be quantized."""
    return (
        is_hopper(x.device)  # later architectures have no wgmma
        and x.dtype in (torch.bfloat16, torch.float16)
        and x.shape[1] % hopper_step(weight.dtype) == 0
        and tma_aligned(x, weight)
    )


def tensor_map(
    tensor: Tensor, sizes: Sequence[int], strides: Sequence[int], box: Sequence[int]
) -> "driver.CUtensorMap":
    """The TMA descriptor of a tensor of 16-bit or 8-bit floats, with the 128-byte swizzle.

    Args:
        sizes: of its dimensions, the contiguous one first.
        strides: of the other dimensions, in elements.
        box: sizes of what one load brings.

    Raises:
        RuntimeError: the driver refused them.
    """
    return _tensor_map(tensor.data_ptr(), tensor.dtype, tuple(sizes), tuple(strides), tuple(box))


@lru_cache(maxsize=1 << 14)
def _tensor_map(
    address: int, dtype: torch.dtype, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]
) -> "driver.CUtensorMap":
    driver, _ = _bindings()
    types = driver.CUtensorMapDataType
    return _checked(
        driver.cuTensorMapEncodeTiled(
            {
                torch.bfloat16: types.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                torch.float16: types.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                torch.float8_e4m3fn: types.CU_TENSOR_MAP_DATA_TYPE_UINT8,
            }[dtype],
            len(sizes),
            address,
            [driver.cuuint64_t(size) for size in sizes],
            [driver.cuuint64_t(stride * dtype.itemsize) for stride in strides],
            [driver.cuuint32_t(size) for size in box],
            [driver.cuuint32_t(1)] * len(sizes),
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )


def _compiled(name: str, source: str, macros: Mapping[str, int], device: torch.device) -> bytes:
    _, nvrtc = _bindings()
    major, minor = torch.cuda.get_device_capability(device)
    options = [f"-arch=sm_{major}{minor}a", "-std=c++17", "-default-device"]
    options += [f"-D{macro}={value}" for macro, value in macros.items()]
    program = _checked(nvrtc.nvrtcCreateProgram(source.encode(), name.encode(), 0, [], []))
    try:
        result = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        if result[0] != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = bytes(_checked(nvrtc.nvrtcGetProgramLogSize(program)))
            _checked(nvrtc.nvrtcGetProgramLog(program, log))
            raise RuntimeError(f"{name} cannot be compiled: {log.rstrip(bytes(1)).decode(errors='replace')}")
        binary = bytes(_checked(nvrtc.nvrtcGetCUBINSize(program)))
        _checked(nvrtc.nvrtcGetCUBIN(program, binary))
        return binary
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _address(argument: Any) -> int:
    return int(argument.getPtr()) if hasattr(argument, "getPtr") else ctypes.addressof(argument)


def _checked(result: tuple[Any, ...]) -> Any:
    """What a call of the bindings returned besides its status."""
    status, *values = result
    if int(status):
        raise RuntimeError(f"a call of CUDA's driver or compiler failed: {status.name}")
    return values[0] if values else None
