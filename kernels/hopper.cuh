// What the linear layers for Hopper GPUs share, put before each of them by cuda_source.py, after mbarrier.cuh: clusters,
// dependent launch, the tensor memory accelerator, and the matrix units' way to find their factors. multiply() itself
// comes after it: sums += 64 rows times a factor's rows, 16 inputs of each.
//
// Macro, 0 or 1: FLOAT16 (else bfloat16).

constexpr int STEP = 64;  // inputs of a stage: what a row of it has, 128 bytes, is swizzled as one

#if FLOAT16
#define TYPE "f16"
#else
#define TYPE "bf16"
#endif

struct alignas(64) TensorMap {
    u64 words[16];
};

__device__ __forceinline__ void sync_cluster() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ __forceinline__ void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void let_next_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// What lies behind a tensor's end comes as zeros.
__device__ __forceinline__ void load(void* to, const TensorMap& x, int input, int token, u64* barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
            shared_address(to)),
        "l"(&x), "r"(input), "r"(token), "r"(shared_address(barrier))
        : "memory");
}
// Where the matrix units find rows of STEP inputs, which the accelerator swizzled in groups of eight rows.
__device__ __forceinline__ u64 descriptor(const void* rows) {
    return (u64)((shared_address(rows) & 0x3ffff) >> 4) | 1ull << 16 | (u64)(8 * STEP * 2 >> 4) << 32 | 1ull << 62;
}
__device__ __forceinline__ u32 pair_of(float first, float second) {
    u32 pair;
    asm("cvt.rn." TYPE "x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
}
