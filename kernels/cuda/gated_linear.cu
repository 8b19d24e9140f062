// Gate, up and SiLU of 65 to 256 tokens: see gated_linear.py for when and why.
//
// out [tokens, outputs] = silu(gate) * up, [gate, up] = x [tokens, inputs] @ weight [2 * outputs, inputs]^T
//
// - Thread blocks are persistent. Each has X_ROWS tokens, up to 64 for each of its two consumer warpgroups, and takes
//   one tile of ROWS rows of the weight after another.
// - A producer warp, the last one, loads x and the weight by TMA through a ring of stages in shared memory. The weight
//   is loaded before the previous kernel has ended; x has to wait for it.
// - With more than 128 tokens, two thread blocks form a cluster. Each loads half of a tile and multicasts it to both.
// - A tile has the gate and the up rows of its outputs, interleaved in groups of eight, so that a thread holds both
//   sums of an output.
//
// Macros beside hopper.cuh's, all numbers: SHARING (thread blocks of a cluster, 1 or 2) ROWS (of a tile, a multiple of
// 16 for each thread block of the cluster) STAGES X_ROWS (up to 128).

constexpr int WARPGROUPS = 2, TOKENS = 64 * WARPGROUPS, OUTPUTS = ROWS / 2;
constexpr int WEIGHT_BYTES = ROWS * STEP_BYTES, X_BYTES = TOKENS * STEP_BYTES, STAGE_BYTES = WEIGHT_BYTES + X_BYTES;
constexpr int LOADED_BYTES = WEIGHT_BYTES + X_ROWS * STEP_BYTES;  // of a stage
constexpr int CONSUMERS = 128 * WARPGROUPS, THREADS = CONSUMERS + 32;

__device__ __forceinline__ void arrive_at(u64* barrier, int program) {
    asm volatile(
        "{\n.reg .u32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(shared_address(barrier)),
        "r"(program)
        : "memory");
}
// Loads one thread block's share of a weight tile and multicasts it to all of the cluster. Each counts the bytes that
// it receives in its own barrier.
__device__ __forceinline__ void load_share(void* to, const TensorMap& weight, int input, int share, u64* barrier) {
    const int eight = share * (OUTPUTS / SHARING / 8);
#if SHARING == 1
    load_weight(to, weight, input, eight, barrier);
#else
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%2, %3, %3, %4}], [%5], %6;" ::"r"(shared_address(to)),
        "l"(&weight), "r"(input), "r"(0), "r"(eight), "r"(shared_address(barrier)),
        "h"((u16)((1 << SHARING) - 1))
        : "memory");
#endif
}

// A stage of the ring, and how many rounds of the ring came before.
struct Place {
    int stage = 0;
    u32 round = 0;
    __device__ __forceinline__ void next() {
        if (++stage == STAGES) stage = 0, ++round;
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) __cluster_dims__(SHARING, 1, 1)
gated_linear(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weight, u16* out, int tokens,
             int inputs, int outputs) {
    extern __shared__ __align__(1024) unsigned char ring[];
    u64 *full = (u64*)(ring + STAGES * STAGE_BYTES), *empty = full + STAGES;
    const int rank = blockIdx.x % SHARING, first_tile = blockIdx.x / SHARING, tiles_apart = gridDim.x / SHARING;
    const int steps = inputs / STEP, tiles = (outputs + OUTPUTS - 1) / OUTPUTS;
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; ++stage) init(full + stage, 1), init(empty + stage, WARPGROUPS * SHARING);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    let_next_start();
    sync_cluster();

    if (threadIdx.x == CONSUMERS) {
        const auto begin = [&](const Place& at, int tile, int step) {
            expect(full + at.stage, LOADED_BYTES);
            load_share(ring + at.stage * STAGE_BYTES + rank * (WEIGHT_BYTES / SHARING), weight, step * STEP,
                       tile * SHARING + rank, full + at.stage);
        };
        Place at;
        for (int step = 0; step < STAGES; ++step, at.next()) begin(at, first_tile, step);  // steps >= STAGES
        wait_for_previous();
        at = {};
        for (int tile = first_tile; tile < tiles; tile += tiles_apart)
            for (int step = 0; step < steps; ++step, at.next()) {
                if (at.round) {
                    wait(empty + at.stage, at.round - 1 & 1);
                    begin(at, tile, step);
                }
                load(ring + at.stage * STAGE_BYTES + WEIGHT_BYTES, x, step * STEP, rank * X_ROWS, full + at.stage);
            }
    } else if (threadIdx.x < CONSUMERS) {
        const int warpgroup = threadIdx.x / 128, thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
        // A thread has this token and the one that is 8 further. Sums of tokens that were not loaded mean nothing.
        const int token = rank * X_ROWS + warpgroup * 64 + warp * 16 + lane / 4, end = min(tokens, (rank + 1) * X_ROWS);
        Place at, before;
        const auto let_load = [&] {
            if (thread < SHARING) arrive_at(empty + before.stage, thread);
            before.next();
        };
        wait_for_previous();
        for (int tile = first_tile; tile < tiles; tile += tiles_apart) {
            float sums[ROWS / 2] = {};
#pragma unroll 1
            for (int step = 0; step < steps; ++step, at.next()) {
                const unsigned char* stage = ring + at.stage * STAGE_BYTES;
                wait(full + at.stage, at.round & 1);
                const u64 rows = descriptor(stage);
                const u64 values = descriptor(stage + WEIGHT_BYTES + warpgroup * (X_BYTES / WARPGROUPS));
                multiply_stage(sums, values, rows);
                if (step) {
                    wait_for_stages_but<1>();
                    let_load();
                }
            }
            wait_for_stages_but<0>();
            let_load();

            const int first = tile * OUTPUTS;
            u16* to = out + (long long)token * outputs + first + lane % 4 * 2;
#pragma unroll
            for (int eight = 0; eight < OUTPUTS / 8; ++eight, to += 8) {
                const float *gate = sums + eight * 8, *up = gate + 4;
                if (first + eight * 8 >= outputs) break;
                if (token < end) *(u32*)to = pair_of(silu(gate[0]) * up[0], silu(gate[1]) * up[1]);
                if (token + 8 < end)
                    *(u32*)(to + 8ll * outputs) = pair_of(silu(gate[2]) * up[2], silu(gate[3]) * up[3]);
            }
        }
    }
    __syncwarp();
    sync_cluster();  // not to exit while the other thread block may still arrive at this one's barriers
}
