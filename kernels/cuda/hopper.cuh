// Shared by the linear layers for Hopper GPUs (cuda_source.py puts it in front of each, after mbarrier.cuh): clusters,
// programmatic dependent launch, TMA and wgmma.
//
// Macros, 0 or 1: FLOAT16 (else bfloat16), and FP8 if the factors of a product are not of that type but e4m3.

#ifndef FP8
#define FP8 0
#endif

constexpr int STEP_BYTES = 128;       // of a row, that a pipeline stage has: the width of the swizzle
constexpr int STEP = FP8 ? 128 : 64;  // inputs (K), as many as that are

#if FLOAT16
#define TYPE "f16"
#else
#define TYPE "bf16"
#endif
#if FP8
#define FACTORS "k32.f32.e4m3.e4m3"
#define NOT_TRANSPOSED ""  // e4m3 cannot be
#else
#define FACTORS "k16.f32." TYPE "." TYPE
#define NOT_TRANSPOSED ", 0, 0"
#endif

struct alignas(64) TensorMap {
    u64 words[16];
};

__device__ __forceinline__ void sync_cluster() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ __forceinline__ void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void let_next_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// Loads a box of x by TMA. What lies out of bounds becomes zero.
__device__ __forceinline__ void load(void* to, const TensorMap& x, int input, int token, u64* barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
            shared_address(to)),
        "l"(&x), "r"(input), "r"(token), "r"(shared_address(barrier))
        : "memory");
}
// Loads a tile of a weight by TMA, from group `eight` of eight rows (of each half) on. The tensor map has the
// dimensions [rows of a half / 8, halves, 8, inputs].
__device__ __forceinline__ void load_weight(void* to, const TensorMap& weight, int input, int eight, u64* barrier) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3, %3, %4}], [%5];" ::"r"(shared_address(to)),
        "l"(&weight), "r"(input), "r"(0), "r"(eight), "r"(shared_address(barrier))
        : "memory");
}

// The wgmma descriptor of rows of a stage in shared memory, as TMA swizzles them: in groups of eight rows.
__device__ __forceinline__ u64 descriptor(const void* rows) {
    return (u64)((shared_address(rows) & 0x3ffff) >> 4) | 1ull << 16 | (u64)(8 * STEP_BYTES >> 4) << 32 | 1ull << 62;
}
// One wgmma: sums += 64 rows of one factor times N rows of the other, 32 bytes of each. cuda_source.py defines it for
// the kernel's N.
__device__ __forceinline__ void multiply(float* sums, u64 rows, u64 columns);
// Multiplies all inputs of a stage. Asynchronous: see wait_for_stages_but.
__device__ __forceinline__ void multiply_stage(float* sums, u64 rows, u64 columns) {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int part = 0; part < STEP_BYTES / 32; ++part)
        multiply(sums, rows + part * 2, columns + part * 2);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until all stages but the `last` most recent ones are multiplied.
template <int last>
__device__ __forceinline__ void wait_for_stages_but() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(last) : "memory");
}

__device__ __forceinline__ u32 pair_of(float first, float second) {
    u32 pair;
    asm("cvt.rn." TYPE "x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
}
__device__ __forceinline__ float silu(float x) { return __fdividef(x, 1 + __expf(-x)); }
