// A linear layer of a few tokens, at the pace of its weight's bytes: see streamed_linear.py for when and why.
//
// out [tokens, outputs] = weight [outputs, inputs] @ x [tokens, inputs], which the matrix units take with the weight's
// rows first, as they come in 64s and tokens do not have to. A program has a tile of WARPGROUPS * 64 rows and one of
// SPLITS equal parts of the inputs. Its last warp brings both through a ring of stages in shared memory, by the tensor
// memory accelerator; x waits for the kernel before this one, the weight does not. The SPLITS programs of a tile are a
// cluster and add their sums up in each other's shared memory, always in the same order.
//
// GATED: the weight is that of gate and up, [2 * outputs, inputs]. A tile has both halves of its outputs, eight rows of
// the one and eight of the other in turn.
//
// Macros beside hopper.cuh's, all numbers: TOKENS (8, 16, 32 or 64) WARPGROUPS SPLITS STAGES, and 0 or 1: GATED.

constexpr int larger(int a, int b) { return a > b ? a : b; }
constexpr int ROWS = 64 * WARPGROUPS, OUTPUTS = GATED ? ROWS / 2 : ROWS;
constexpr int WEIGHT_BYTES = ROWS * STEP * 2, X_BYTES = TOKENS * STEP * 2, STAGE_BYTES = WEIGHT_BYTES + X_BYTES;
constexpr int PITCH = ROWS + 4;                 // floats of a token's sums; lanes that write them meet in no bank
constexpr int RING_BYTES = larger(STAGES * STAGE_BYTES, (TOKENS * PITCH * 4 + 15) / 16 * 16);
constexpr int CONSUMERS = 128 * WARPGROUPS, THREADS = CONSUMERS + 32;
constexpr int VALUES = 8;                       // that a thread writes at once

__device__ __forceinline__ void sync_consumers() { asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory"); }

// ---- sums

#if FLOAT16
__device__ __forceinline__ float wide(u16 half) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(half));
    return f;
}
__device__ __forceinline__ float low(u32 pair) { return wide((u16)pair); }
__device__ __forceinline__ float high(u32 pair) { return wide((u16)(pair >> 16)); }
#else
__device__ __forceinline__ float low(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
#endif
__device__ __forceinline__ void add(float* sums, const uint4& pairs) {
    sums[0] += low(pairs.x), sums[1] += high(pairs.x), sums[2] += low(pairs.y), sums[3] += high(pairs.y);
    sums[4] += low(pairs.z), sums[5] += high(pairs.z), sums[6] += low(pairs.w), sums[7] += high(pairs.w);
}
__device__ __forceinline__ float4 read(u32 address, int split) {
    float4 f;
    if (SPLITS > 1) asm("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(address) : "r"(split));
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(f.x), "=f"(f.y), "=f"(f.z), "=f"(f.w)
                 : "r"(address));
    return f;
}
// Eight neighbours, over all splits.
__device__ __forceinline__ void gather(float* sums, const float* staged) {
    const u32 address = shared_address(staged);
    for (int i = 0; i < VALUES; ++i) sums[i] = 0;
#pragma unroll
    for (int split = 0; split < SPLITS; ++split) {
        const float4 a = read(address, split), b = read(address + 16, split);
        sums[0] += a.x, sums[1] += a.y, sums[2] += a.z, sums[3] += a.w;
        sums[4] += b.x, sums[5] += b.y, sums[6] += b.z, sums[7] += b.w;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
#if SPLITS > 1
__cluster_dims__(SPLITS, 1, 1)
#endif
streamed_linear(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weight, const u16* bias,
                const u16* residual, u16* out, int tokens, int inputs, int outputs) {
    extern __shared__ __align__(1024) unsigned char ring[];
    u64 *full = (u64*)(ring + RING_BYTES), *empty = full + STAGES;
    const int tile = blockIdx.x / SPLITS, split = blockIdx.x % SPLITS;
    const int all_steps = inputs / STEP, most_steps = (all_steps + SPLITS - 1) / SPLITS;
    const int first_step = split * most_steps, steps = max(0, min(most_steps, all_steps - first_step));
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; ++stage) init(full + stage, 1), init(empty + stage, WARPGROUPS);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    let_next_start();
    __syncthreads();

    if (threadIdx.x >= CONSUMERS) {
        if (threadIdx.x == CONSUMERS) {
            const auto begin = [&](int step) {
                const int stage = step % STAGES;
                expect(full + stage, STAGE_BYTES);
                load_weight(ring + stage * STAGE_BYTES, weight, (first_step + step) * STEP, tile * (OUTPUTS / 8),
                            full + stage);
            };
            for (int step = 0; step < min(STAGES, steps); ++step) begin(step);
            wait_for_previous();
            for (int step = 0; step < steps; ++step) {
                const int stage = step % STAGES;
                if (step >= STAGES) {
                    wait(empty + stage, (step / STAGES - 1) & 1);
                    begin(step);
                }
                load(ring + stage * STAGE_BYTES + WEIGHT_BYTES, x, (first_step + step) * STEP, 0, full + stage);
            }
        }
        __syncwarp();
        if (SPLITS > 1) sync_cluster(), sync_cluster();  // with the consumers below
        return;
    }

    const int warpgroup = threadIdx.x / 128, warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
    float sums[TOKENS / 2] = {};
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
        const unsigned char* stage = ring + step % STAGES * STAGE_BYTES;
        wait(full + step % STAGES, step / STAGES & 1);
        multiply_stage(sums, descriptor(stage + warpgroup * 64 * STEP * 2), descriptor(stage + WEIGHT_BYTES));
        if (step) {
            wait_for_stages_but<1>();
            if (threadIdx.x % 128 == 0) arrive(empty + (step - 1) % STAGES);
        }
    }
    wait_for_stages_but<0>();
    sync_consumers();  // nobody reads the ring any more

    float* staged = (float*)ring;  // [TOKENS, PITCH]
    float* own = staged + lane % 4 * 2 * PITCH + warpgroup * 64 + warp * 16 + lane / 4;
#pragma unroll
    for (int i = 0; i < TOKENS / 8; ++i, own += 8 * PITCH)
        own[0] = sums[4 * i], own[PITCH] = sums[4 * i + 1], own[8] = sums[4 * i + 2], own[PITCH + 8] = sums[4 * i + 3];
    if (SPLITS > 1)
        sync_cluster();
    else
        sync_consumers();

    wait_for_previous();  // which has ended where there was x to wait for
    constexpr int VECTORS = OUTPUTS / VALUES;
    for (int item = threadIdx.x;; item += CONSUMERS) {
        const int token = item / VECTORS * SPLITS + split, vector = item % VECTORS;
        if (token >= tokens) break;
        const int output = tile * OUTPUTS + vector * VALUES;
        if (output >= outputs) continue;
        const float* at = staged + token * PITCH + vector * VALUES * (GATED ? 2 : 1);
        float total[VALUES];
        gather(total, at);
        if (bias) add(total, *(const uint4*)(bias + output));
        if (GATED) {
            float up[VALUES];
            gather(up, at + VALUES);
            for (int i = 0; i < VALUES; ++i) total[i] = total[i] / (1 + __expf(-total[i])) * up[i];
        }
        const long long place = (long long)token * outputs + output;
        if (residual) add(total, *(const uint4*)(residual + place));
        *(uint4*)(out + place) = make_uint4(pair_of(total[0], total[1]), pair_of(total[2], total[3]),
                                            pair_of(total[4], total[5]), pair_of(total[6], total[7]));
    }
    __syncwarp();
    if (SPLITS > 1) sync_cluster();  // while others may still read this program's sums
}
