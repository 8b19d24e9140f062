"""Every kernel of ours at small odd sizes under compute-sanitizer's memcheck, each in a process of its own.

python -m tests.gpu.memcheck            all of them, side by side; exit code 1 where one has errors or does not end
python -m tests.gpu.memcheck KERNEL     the calls alone, for the sanitizer to look at
"""

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

TIMEOUT = 150  # seconds; compiling included, on a core that others use
PROCESSES = 8

# A call that reads behind its input, to see that such a thing is found.
CONTROL = "_rms_norm_kernel, given too few weights"


def _calls() -> dict[str, Callable[[], object]]:
    import torch

    from kernels import fp8
    from kernels.cuda import triton_norm
    from kernels.sampling import SamplingRows
    from tests.gpu import test_fp8_linear as quantized
    from tests.gpu import test_gated_linear as gated
    from tests.gpu import test_persistent_layers as persistent
    from tests.gpu import test_streamed_linear as streamed
    from tests.kernels import checks, fp8_checks
    from tests.kernels.inputs import DEVICE, randn

    dtype = torch.float16

    def sample() -> None:
        logits = randn(6, 1003, dtype=dtype) * 4
        temperature = torch.tensor([0, 0.7, 1, 1, 1.3, 1], device=DEVICE)
        top_k = torch.tensor([0, 5, 0, 50, 0, 0], dtype=torch.int32, device=DEVICE)
        top_p = torch.tensor([1, 1, 0.9, 0.8, 1, 1], device=DEVICE)
        min_p = torch.tensor([0, 0, 0, 0, 0.05, 0], device=DEVICE)
        numbers = torch.arange(6, device=DEVICE)
        checks.check_sample(logits, SamplingRows(temperature, top_k, top_p, min_p, numbers), numbers.int())

    def decode() -> None:
        checks.check_decode_attention((1, 17, 100, 333), 8, 2, 64, 16, dtype, with_norm=True)
        checks.check_decode_attention((700,), 16, 8, 128, 16, dtype)
        checks.check_decode_attention((1, 17, 100, 333), 8, 2, 64, 16, dtype, cache_dtype=fp8.E4M3)

    def too_few_weights() -> None:
        triton_norm.rms_norm(randn(5, 576, dtype=dtype), randn(500, dtype=dtype), 1e-5)
        torch.cuda.synchronize()

    return {
        CONTROL: too_few_weights,
        "_plan_kernel": decode,
        "_decode_kernel": decode,
        "_prefill_kernel": lambda: (
            checks.check_prefill_attention((33, 1, 70), (50, 17, 70), 8, 2, 64, 16, dtype),
            checks.check_prefill_attention((33, 1, 70), (50, 17, 70), 8, 2, 64, 16, dtype, cache_dtype=fp8.E4M3),
        ),
        "_chunk_kernel": sample,
        "_draw_kernel": sample,
        "_few_rows_kernel": lambda: checks.check_linear(3, 100, 576, True, dtype),
        "_tile_kernel": lambda: (
            checks.check_linear(70, 1000, 192, True, dtype),
            checks.check_norm_gated_linear(40, 96, 576, dtype),
        ),
        "streamed_linear": lambda: (
            streamed.check(streamed.randn(5, 192), streamed.weight(200, 192)),
            streamed.check_gated(streamed.randn(33, 576), streamed.weight(2 * 104, 576)),
            streamed.check_begun_norm(5, 576),
            quantized.check_norm_linear(5, (256, 384), in_blocks=True, biased=True),
            quantized.check_norm_linear(5, (200, 384), in_blocks=False, biased=True),
            quantized.check_add_linear(70, (384, 2176), in_blocks=True, biased=False),
            quantized.check_add_mlp(33, (384, 256), in_blocks=False),
            quantized.check_add_mlp(33, (112, 256), in_blocks=False),
        ),
        "gated_linear": lambda: (
            gated.check(streamed.randn(70, 192), streamed.weight(2 * 104, 192)),
            gated.check(streamed.randn(133, 576), streamed.weight(2 * 4008, 576)),
        ),
        "_choose_kernel": lambda: checks.check_choose(5, 11, 3, True, dtype),
        "_sort_kernel": lambda: checks.check_sort(40, 11, 3),
        "_expert_kernel": lambda: checks.check_mix(37, 88, 40, 11, 3, dtype),
        "_fp8_expert_kernel": lambda: (
            fp8_checks.check_grouped(37, 128, 384, 11, 3, True, dtype),
            fp8_checks.check_grouped(37, 40, 88, 11, 3, False, dtype),
            fp8_checks.check_grouped(300, 72, 176, 4, 2, False, dtype),
        ),
        "_quantize_kernel": lambda: (
            fp8_checks.check_quantize(5, 576, 576, "gate", dtype),
            fp8_checks.check_quantize(3, 1152, 128, "", dtype),
        ),
        "_sum_kernel": lambda: checks.check_mix(5, 1096, 40, 4, 2, dtype),
        "_rope_write_kernel": lambda: (
            checks.check_rope_write_kv(37, 8, 2, 64, 16, True, dtype),
            checks.check_rope_write_kv(37, 8, 2, 64, 16, True, dtype, cache_dtype=fp8.E4M3),
        ),
        "_rms_norm_kernel": lambda: checks.check_rms_norm(5, 576, dtype),
        "_silu_mul_kernel": lambda: checks.check_silu_mul(5, 1536, dtype),
        "_locate_kernel": lambda: checks.check_step(37, 16),
        "_advance_kernel": lambda: checks.check_step(37, 16, history=70),
        "_draft_kernel": lambda: checks.check_drafts([0, -1, 40, 5_000], 4, 16),
        "_accept_kernel": lambda: checks.check_drafts([0, -1, 40, 5_000], 4, 16),
        "persistent_layers": lambda: persistent.check_steps(persistent.make_case(persistent.SHAPES["small"], 41), [41]),
    }


def _under_memcheck(kernel: str) -> tuple[bool, str]:
    name = kernel.partition(",")[0]
    command = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", "--kernel-name", f"kns={name}"]
    command += ["--report-api-errors", "no"]  # CUDA's bindings ask for functions that only newer drivers have
    command += [sys.executable, "-m", "tests.gpu.memcheck", kernel]
    # Without torch's cache every tensor is an allocation of its own, behind which lies nothing.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False, env=environment)
    except subprocess.TimeoutExpired:
        return False, f"did not end within {TIMEOUT} s"
    lines = (done.stdout + done.stderr).strip().splitlines()
    summary = next((line for line in lines if "ERROR SUMMARY" in line), " ".join(lines[-3:]))
    return done.returncode == 0, summary


def main(arguments: list[str]) -> int:
    if arguments:
        _calls()[arguments[0]]()
        return 0
    kernels = list(_calls())
    with ThreadPoolExecutor(PROCESSES) as pool:
        results = dict(zip(kernels, pool.map(_under_memcheck, kernels), strict=True))
    for kernel, (clean, summary) in results.items():
        print(f"{kernel:40} {'clean' if clean else 'NOT CLEAN':10} {summary}")
    return 0 if all(clean == (kernel != CONTROL) for kernel, (clean, _) in results.items()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
