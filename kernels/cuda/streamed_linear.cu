// A linear layer of up to 128 tokens, at the memory bandwidth of its weight: see streamed_linear.py for when and why.
//
// out [tokens, outputs] = x [tokens, inputs] @ weight [outputs, inputs]^T
//
// - The weight's rows are the M of wgmma, which is at least 64, and the tokens are its N, which can be as small as 8.
// - A thread block has a tile of WARPGROUPS * 64 rows and one of SPLITS equal parts of the inputs (split-K). The SPLITS
//   thread blocks of a tile form a cluster, and add up their sums through DSMEM, always in the same order.
// - A producer warp, the last one, loads the weight and x by TMA through two rings of stages in shared memory. The
//   weight is loaded before the previous kernel has ended; x has to wait for it.
// - GATED: the weight is that of gate and up, [2 * outputs, inputs]. A tile has the gate and the up rows of its
//   outputs, interleaved in groups of eight.
// - A norm between two layers has no launch of its own. The first layer's epilogue also writes its outputs times the
//   norm's weight, and, for each token and tile, their sum of squares. The second divides its sums by the root.
// - FP8: x and weight are 8-bit floats, to be multiplied by scales. Either there is one for each token and one for each
//   output, and the epilogue multiplies by both. Or IN_BLOCKS: one for each 128 inputs of a token, and one for each
//   block of 128 x 128 of the weight. A pipeline stage has 128 inputs, so its sums are scaled before they are added up.
//
// Macros beside hopper.cuh's, all numbers: TOKENS (a multiple of 8 up to 128) WARPGROUPS SPLITS WEIGHT_STAGES X_STAGES
// (at most WEIGHT_STAGES), and 0 or 1: GATED, IN_BLOCKS.

constexpr int larger(int a, int b) { return a > b ? a : b; }
constexpr int power_of_two(int most) { return most < 2 ? 1 : 2 * power_of_two(most / 2); }  // the largest up to it
constexpr int ROWS = 64 * WARPGROUPS, OUTPUTS = GATED ? ROWS / 2 : ROWS;
constexpr int WEIGHT_BYTES = ROWS * STEP_BYTES, X_BYTES = TOKENS * STEP_BYTES;  // of a stage
constexpr int BLOCK = 128;                      // rows and inputs of a weight that share a scale
constexpr int PITCH = ROWS + 4;                 // floats of a token's sums, padded against bank conflicts
constexpr int RING_BYTES = larger(WEIGHT_STAGES * WEIGHT_BYTES + X_STAGES * X_BYTES, (TOKENS * PITCH * 4 + 15) / 16 * 16);
constexpr bool IN_EPILOGUE = FP8 && !IN_BLOCKS;  // are sums multiplied by their scales
constexpr int ARRIVALS = IN_BLOCKS ? 4 * WARPGROUPS : WARPGROUPS;  // that free a stage of x
constexpr int CONSUMERS = 128 * WARPGROUPS, THREADS = CONSUMERS + 32;
constexpr int VALUES = 8;                       // outputs that a thread writes at once
constexpr int VECTORS = OUTPUTS / VALUES;
constexpr int TOKENS_AT_ONCE = CONSUMERS / VECTORS * SPLITS, ITEMS = (TOKENS + TOKENS_AT_ONCE - 1) / TOKENS_AT_ONCE;

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
// The sums of eight neighbouring outputs, added up over all splits.
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

__device__ __forceinline__ uint4 round(const float* sums) {
    return make_uint4(pair_of(sums[0], sums[1]), pair_of(sums[2], sums[3]), pair_of(sums[4], sums[5]),
                      pair_of(sums[6], sums[7]));
}

// ---- the norm between two layers

// The sum over `lanes` neighbouring lanes, a power of two. All of them get it.
template <int lanes>
__device__ __forceinline__ float sum_of_lanes(float value) {
    const u32 lane = threadIdx.x % 32, all = 0xffffffffu >> (32 - lanes) << lane / lanes * lanes;
#pragma unroll
    for (int apart = lanes / 2; apart; apart /= 2) value += __shfl_xor_sync(all, value, apart);
    return value;
}
// The norm's factor for each token's sums, from squares [tokens, parts].
__device__ __forceinline__ void scale_tokens(float* scales, const float* squares, int tokens, int parts, int inputs,
                                             float eps) {
    constexpr int LANES = power_of_two(CONSUMERS / TOKENS < 32 ? CONSUMERS / TOKENS : 32);  // that share a token
    const int token = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    float sum = 0;
    if (token < tokens)
#pragma unroll 8
        for (int part = lane; part < parts; part += LANES) sum += squares[token * parts + part];
    sum = sum_of_lanes<LANES>(sum);
    if (token < TOKENS && lane == 0) scales[token] = rsqrtf(sum / inputs + eps);
}

// ---- scales of 8-bit floats

// Loads as many of a group's scales as there are tokens, and the padding behind them.
__device__ __forceinline__ void load_scales(float* to, const float* from, u32 bytes, u64* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(to)),
                 "l"(from), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
}
// The scales of eight neighbouring outputs.
__device__ __forceinline__ void read_scales(float* to, const float* from) {
    *(float4*)to = *(const float4*)from, *(float4*)(to + 4) = *(const float4*)(from + 4);
}
// Adds a stage's sums, times their scales, to the others. A thread has the sums of two rows, eight apart, for every
// eighth pair of tokens.
__device__ __forceinline__ void add_scaled(float* sums, const float* part, const float* token_scales, float first_row,
                                           float second_row) {
#pragma unroll
    for (int i = 0; i < TOKENS / 8; ++i) {
        const float2 scale = *(const float2*)(token_scales + threadIdx.x % 4 * 2 + 8 * i);
        sums[4 * i] += part[4 * i] * scale.x * first_row, sums[4 * i + 1] += part[4 * i + 1] * scale.y * first_row;
        sums[4 * i + 2] += part[4 * i + 2] * scale.x * second_row;
        sums[4 * i + 3] += part[4 * i + 3] * scale.y * second_row;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
#if SPLITS > 1
__cluster_dims__(SPLITS, 1, 1)
#endif
streamed_linear(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weight, const float* squares,
                const u16* bias, const u16* residual, u16* out, const u16* next_norm, u16* next_x, float* next_squares,
                const float* x_scales, const float* weight_scales, int tokens, int inputs, int outputs, int parts,
                int padded, float eps) {
    extern __shared__ __align__(1024) unsigned char ring[];
    unsigned char* x_ring = ring + WEIGHT_STAGES * WEIGHT_BYTES;
    float* scale_ring = (float*)(ring + RING_BYTES);  // [X_STAGES, TOKENS]
    u64 *full = (u64*)(scale_ring + IN_BLOCKS * X_STAGES * TOKENS), *x_full = full + WEIGHT_STAGES;
    u64* empty = x_full + X_STAGES;
    float* scales = (float*)(empty + X_STAGES);  // [TOKENS]
    const int tile = blockIdx.x / SPLITS, split = blockIdx.x % SPLITS;
    const int all_steps = inputs / STEP, most_steps = (all_steps + SPLITS - 1) / SPLITS;
    const int first_step = split * most_steps, steps = max(0, min(most_steps, all_steps - first_step));
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < WEIGHT_STAGES; ++stage) init(full + stage, 1);
        for (int stage = 0; stage < X_STAGES; ++stage) init(x_full + stage, 1), init(empty + stage, ARRIVALS);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    let_next_start();
    __syncthreads();

    if (threadIdx.x >= CONSUMERS) {
        if (threadIdx.x == CONSUMERS) {
            const auto input = [&](int step) { return (first_step + step) * STEP; };
            const auto begin = [&](int step) {
                const int stage = step % WEIGHT_STAGES;
                expect(full + stage, WEIGHT_BYTES);
                load_weight(ring + stage * WEIGHT_BYTES, weight, input(step), tile * (OUTPUTS / 8), full + stage);
            };
            for (int step = 0; step < min(WEIGHT_STAGES, steps); ++step) begin(step);
            wait_for_previous();
            for (int step = 0; step < steps; ++step) {
                const int stage = step % X_STAGES, next = step - X_STAGES + WEIGHT_STAGES;
                if (step >= X_STAGES) wait(empty + stage, (step / X_STAGES - 1) & 1);
                const u32 scale_bytes = IN_BLOCKS ? min(TOKENS, padded) * 4 : 0;
                expect(x_full + stage, X_BYTES + scale_bytes);
                if constexpr (IN_BLOCKS)
                    load_scales(scale_ring + stage * TOKENS, x_scales + (first_step + step) * padded, scale_bytes,
                                x_full + stage);
                load(x_ring + stage * X_BYTES, x, input(step), 0, x_full + stage);
                if (step >= X_STAGES && next < steps) begin(next);
            }
        }
        __syncwarp();
        if (SPLITS > 1) sync_cluster(), sync_cluster();  // with the consumers below
        return;
    }

    // Bias, norm weights and residual are loaded while the sums are computed.
    const int vector = threadIdx.x % VECTORS, output = tile * OUTPUTS + vector * VALUES;
    const int first_token = threadIdx.x / VECTORS * SPLITS + split;
    const bool inside = output < outputs;
    uint4 biases = {}, norms = {}, residuals[ITEMS] = {};
    if (inside && bias) biases = *(const uint4*)(bias + output);
    if (inside && next_norm) norms = *(const uint4*)(next_norm + output);
    float output_scales[VALUES] = {}, up_scales[VALUES] = {};
    if (IN_EPILOGUE && inside) read_scales(output_scales, weight_scales + output);
    if (IN_EPILOGUE && inside && GATED) read_scales(up_scales, weight_scales + outputs + output);
    wait_for_previous();
    if (IN_EPILOGUE && threadIdx.x < tokens) scales[threadIdx.x] = x_scales[threadIdx.x];
#pragma unroll
    for (int item = 0; item < ITEMS; ++item) {
        const int token = first_token + item * TOKENS_AT_ONCE;
        if (inside && residual && token < tokens)
            residuals[item] = *(const uint4*)(residual + (long long)token * outputs + output);
    }
    if (squares) scale_tokens(scales, squares, tokens, parts, inputs, eps);

    const int warpgroup = threadIdx.x / 128, warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
    float sums[TOKENS / 2] = {};
    // The scales of a step are read one step ahead. All rows of a warpgroup are of one block of the weight; if GATED,
    // of one block of gate and one of up.
    const int groups = inputs / BLOCK, block = (tile * OUTPUTS + warpgroup * (OUTPUTS / WARPGROUPS)) / BLOCK;
    const float* first_scales = weight_scales + block * groups + first_step;
    const float* second_scales = first_scales + (GATED ? outputs / BLOCK * groups : 0);
    float first_scale = 0, second_scale = 0;
    if (IN_BLOCKS && steps) first_scale = first_scales[0], second_scale = second_scales[0];
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
        const int stage = step % WEIGHT_STAGES, x_stage = step % X_STAGES;
        wait(full + stage, step / WEIGHT_STAGES & 1);
        wait(x_full + x_stage, step / X_STAGES & 1);
        const u64 rows = descriptor(ring + stage * WEIGHT_BYTES + warpgroup * 64 * STEP_BYTES);
        const u64 columns = descriptor(x_ring + x_stage * X_BYTES);
        if constexpr (IN_BLOCKS) {
            const int next = min(step + 1, steps - 1);
            const float next_first = first_scales[next], next_second = second_scales[next];
            float part[TOKENS / 2] = {};
            multiply_stage(part, rows, columns);
            wait_for_stages_but<0>();
            add_scaled(sums, part, scale_ring + x_stage * TOKENS, first_scale, second_scale);
            __syncwarp();
            if (lane == 0) arrive(empty + x_stage);
            first_scale = next_first, second_scale = next_second;
        } else {
            multiply_stage(sums, rows, columns);
            if (step) {
                wait_for_stages_but<1>();
                if (threadIdx.x % 128 == 0) arrive(empty + (step - 1) % X_STAGES);
            }
        }
    }
    wait_for_stages_but<0>();
    sync_consumers();  // nobody reads the ring any more: the sums can take its place

    float* staged = (float*)ring;  // [TOKENS, PITCH]
    float* own = staged + lane % 4 * 2 * PITCH + warpgroup * 64 + warp * 16 + lane / 4;
#pragma unroll
    for (int i = 0; i < TOKENS / 8; ++i, own += 8 * PITCH)
        own[0] = sums[4 * i], own[PITCH] = sums[4 * i + 1], own[8] = sums[4 * i + 2], own[PITCH + 8] = sums[4 * i + 3];
    if (SPLITS > 1)
        sync_cluster();
    else
        sync_consumers();

#pragma unroll
    for (int item = 0; item < ITEMS; ++item) {
        const int token = first_token + item * TOKENS_AT_ONCE;
        if (token >= tokens) break;
        float square = 0;
        if (inside) {
            const float* at = staged + token * PITCH + vector * VALUES * (GATED ? 2 : 1);
            const float scale = IN_EPILOGUE || squares ? scales[token] : 1;
            float total[VALUES];
            gather(total, at);
            for (int i = 0; i < VALUES; ++i) total[i] *= IN_EPILOGUE ? scale * output_scales[i] : scale;
            if (GATED) {
                float up[VALUES];
                gather(up, at + VALUES);
                for (int i = 0; i < VALUES; ++i) up[i] *= IN_EPILOGUE ? scale * up_scales[i] : scale;
                for (int i = 0; i < VALUES; ++i) total[i] = silu(total[i]) * up[i];
            } else {
                add(total, biases), add(total, residuals[item]);
            }
            const long long place = (long long)token * outputs + output;
            const uint4 rounded = round(total);
            *(uint4*)(out + place) = rounded;
            if (next_norm) {
                float values[VALUES] = {}, norm[VALUES] = {};
                add(values, rounded), add(norm, norms);
                for (int i = 0; i < VALUES; ++i) square += values[i] * values[i], values[i] *= norm[i];
                *(uint4*)(next_x + place) = round(values);
            }
        }
        if (next_norm) {
            square = sum_of_lanes<VECTORS>(square);
            if (vector == 0) next_squares[token * (gridDim.x / SPLITS) + tile] = square;
        }
    }
    __syncwarp();
    if (SPLITS > 1) sync_cluster();  // not to exit while others may still read this thread block's sums
}
