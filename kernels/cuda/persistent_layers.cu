// All layers of a decode step of one sequence, in one launch: see persistent_layers.py for when and why.
//
// Thread blocks are persistent, one per SM: KV_HEADS * PIECES of them (PROGRAMS), all resident at once. A layer has
// five phases. In each, a thread block owns a few rows of a weight, or, in phase 2, a piece of the context of one KV
// head:
//
//   1  norm, q, k and v: each KV head's rows are divided among its own PIECES thread blocks
//   2  attention: to a piece of the cached keys of one KV head
//   3  merge of the pieces, and this KV head's columns of the output projection
//   4  sum over KV heads, residual, norm, gate and up, SiLU
//   5  down, residual
//
// Loads. A producer warp streams weights, keys and values through a ring of tiles in shared memory, up to a layer
// ahead. They depend on nothing that this launch computes, so memory is read even while thread blocks wait for each
// other.
//
// Synchronization. There are no grid-wide barriers. A phase passes its results on in words of global memory that hold
// the layer's number beside the data, and that are written and read atomically (as in NCCL's LL protocol). So a reader
// waits for just what it needs, and gets it in the same round trip. A word is overwritten only by a thread block that
// has already read, through other words, what all readers of the old value computed from it. So one copy of each word
// is enough.
//
// Code size. All of the code runs once per layer, so it should fit the SM's instruction cache: at 150 KiB of code a
// layer took twice as long as at 75 KiB. Hence loops are not unrolled, and there are no fast paths for special cases.
//
// Macros, all numbers: HIDDEN INTERMEDIATE KV_HEADS GROUP HEAD_DIM PIECES BLOCK_SIZE TILE_BYTES SHARED_BYTES, and 0 or
// 1: QK_NORM HAS_QKV_BIAS HAS_OUTPUT_BIAS. Weights and activations are bfloat16, their sums float32.

constexpr int PROGRAMS = KV_HEADS * PIECES, WARPS = 8, THREADS = 32 * WARPS;      // the producer is a ninth warp
constexpr int HEAD_QKV = (GROUP + 2) * HEAD_DIM, HEAD_INPUTS = GROUP * HEAD_DIM;  // rows and columns of one KV head
constexpr int IN_FLIGHT = (32 << 10) / TILE_BYTES;  // tiles; with more, words queue behind them (docs/kernels.md)
constexpr u32 ALL = 0xffffffffu;
constexpr float NO_TOP = -1e30f, NOTHING = -3e38f;  // top of no scores; a masked score, of weight 0 even beside it

__host__ __device__ constexpr int cdiv(int a, int b) { return (a + b - 1) / b; }
constexpr int multiple(int of, int least) { return cdiv(least, of) * of; }
__host__ __device__ constexpr int smaller(int a, int b) { return a < b ? a : b; }
constexpr int larger(int a, int b) { return a > b ? a : b; }
constexpr int power_of_2(int most) {
    int power = 1;
    while (2 * power <= most) power *= 2;
    return power;
}

// How a thread block multiplies its rows of a weight with x, a vector, on the tensor cores: an mma computes the dot
// products of eight slots. A slot is a row and a block of 32 of its inputs; if a tile has fewer than eight rows,
// several slots share a row. Each of a slot's four lanes has eight inputs of its row as one factor, and the same eight
// of x as the other. The slots' results are on the diagonal of the product.
template <int INPUTS, int WANTED_ROWS, int MOST_ROWS = 8> struct Product {
    static constexpr int BLOCKS = INPUTS / 32;
    static constexpr int TILE_ROWS = smaller(MOST_ROWS, power_of_2(TILE_BYTES / 2 / INPUTS));
    static constexpr int SLOT_ROWS = smaller(8, TILE_ROWS);
    static constexpr int SHARING = 8 / SLOT_ROWS;  // slots that share a row
    static constexpr int GROUPS = TILE_ROWS / SLOT_ROWS;
    static constexpr int STEPS = cdiv(BLOCKS, WARPS* SHARING);
    static constexpr bool EXACT = BLOCKS % (WARPS * SHARING) == 0;
    static constexpr int TILE_COUNT = cdiv(WANTED_ROWS, TILE_ROWS);
    static constexpr int ROWS = TILE_COUNT * TILE_ROWS;
    static constexpr int SLOTS = TILE_COUNT * GROUPS * 8;
    static_assert(INPUTS % 64 == 0 && ROWS <= THREADS, "a shape that persistent_layers.py should have refused");

    // The block of this lane's slot in a step. All rows begin in the same bank of shared memory, so odd rows take their
    // blocks in another order, to avoid conflicts.
    static __device__ __forceinline__ int block(int step) {
        const int slot = threadIdx.x % 32 / 4, row = slot % SLOT_ROWS;
        return ((step * WARPS + threadIdx.x / 32) * SHARING + slot / SLOT_ROWS) ^ (row & 1);
    }
    static __device__ __forceinline__ bool exists(int step) { return EXACT || block(step) < BLOCKS; }
    static __device__ __forceinline__ int vector(int step) { return block(step) * 4 + threadIdx.x % 4; }
};
// Rows are multiples of the values that are posted in one word.
using Qkv = Product<HIDDEN, multiple(2, cdiv(HEAD_QKV, PIECES))>;
using Output = Product<HEAD_INPUTS, multiple(4, cdiv(HIDDEN, PIECES)), 64>;
using GateUp = Product<HIDDEN, multiple(2, cdiv(INTERMEDIATE, PROGRAMS))>;
using Down = Product<INTERMEDIATE, multiple(2, cdiv(HIDDEN, PROGRAMS))>;
constexpr int SLOTS = larger(larger(Qkv::SLOTS, Output::SLOTS), larger(2 * GateUp::SLOTS, Down::SLOTS));

constexpr int HALF = HEAD_DIM / 2;
constexpr int COLUMNS = HEAD_DIM / 32;                               // of a head, for each lane
constexpr int KEY_LANES = HEAD_DIM / 8, WARP_KEYS = 32 / KEY_LANES;  // lanes that read a key; keys that a warp reads
constexpr int TILE_KEYS = TILE_BYTES / 2 / HEAD_DIM;
constexpr int KEY_ROUNDS = TILE_KEYS / (WARPS * WARP_KEYS);
constexpr int QUADS = HEAD_INPUTS / 4;  // words of 4 columns
constexpr int SHARES = smaller(4, THREADS / QUADS), PARTS_AT_ONCE = 4;
static_assert(KEY_ROUNDS >= 1 && SHARES >= 1, "a shape that persistent_layers.py should have refused");

struct Arguments {
    const u64* weights;  // [layers, NUM_WEIGHTS] addresses, in the order of WEIGHTS; any value for what a model lacks
    const int* token;
    const u16* embedding;
    u16* out;                       // [HIDDEN]
    u64 *qkv, *hidden, *activated;  // words of two values
    uint4* parts;                   // [KV_HEADS, PIECES, QUADS], words of 4 floats: attention over a piece
    u64* scales;                    // [KV_HEADS, PIECES, GROUP], words of a float: log2 of its sum of weights
    uint4* shares;                  // [KV_HEADS, HIDDEN / 4], words of 4 floats: the output projection of a KV head
    u32* number;                    // that of this launch's first layer
    const int* position;
    const long long* slot;
    const int* seq_len;
    const float* cos_sin;
    const int* block_table;
    u16* pool;
    long long layer_stride, value_offset, block_stride, token_stride, head_stride;  // elements
    int layers;
    float eps, scale;  // of the norms; of the scores, in base 2
};
enum WEIGHTS {
    QKV,
    OUTPUT,
    GATE_UP,
    DOWN,
    ATTENTION_NORM,
    MLP_NORM,
    Q_NORM,
    K_NORM,
    QKV_BIAS,
    OUTPUT_BIAS,
    NUM_WEIGHTS
};

// ---- shared memory and its barriers

constexpr int MOST_TILES = 16;

struct alignas(128) Kept {
    u64 full[MOST_TILES], empty[MOST_TILES], norms_full[2], norms_empty[2];
    alignas(16) u16 norms[2][2 * HIDDEN + 2 * HEAD_DIM];
    // Double-buffered: a phase may write its sums while a slow warp still reads those of the phase before.
    alignas(16) float sums[2][SLOTS][WARPS];
    float squares[2][WARPS];
    alignas(16) float residual[HIDDEN];
    float qkv[HEAD_QKV];
    alignas(16) float heads[WARPS][HEAD_INPUTS];
    float tops[WARPS][GROUP], weights[WARPS][GROUP];
    alignas(16) float share_heads[SHARES][HEAD_INPUTS];
    float share_tops[SHARES][GROUP], share_weights[SHARES][GROUP];
};

constexpr int TILES = smaller(MOST_TILES, (SHARED_BYTES - (int)sizeof(Kept)) / TILE_BYTES);  // of the ring
static_assert(TILES > 2 * IN_FLIGHT, "a shape that persistent_layers.py should have refused");
// Tiles in flight while a long context is loaded, when nobody waits for words. At most TILES, since a tile must be seen
// to have landed before its place in the ring is filled again.
constexpr int KEYS_IN_FLIGHT = smaller(4 * IN_FLIGHT, TILES);

struct Shared : Kept {
    alignas(128) unsigned char tiles[TILES][TILE_BYTES];
};
static_assert(sizeof(Shared) <= SHARED_BYTES, "the ring was counted wrong");

struct Place {  // in the ring
    u32 tile, parity;
    __device__ __forceinline__ void next() {
        if (++tile == TILES) tile = 0, parity ^= 1;
    }
};

__device__ __forceinline__ void load(void* to, u64 from, u32 bytes, u64* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(to)),
                 "l"(from), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
}
__device__ __forceinline__ void release(Shared& s, Place& place) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) arrive(&s.empty[place.tile]);
    place.next();
}
__device__ __forceinline__ void sync_consumers() { asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory"); }

// ---- numbers

__device__ __forceinline__ float low(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
__device__ __forceinline__ u32 pair_of(float first, float second) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
}
__device__ __forceinline__ float rounded(float f) { return low(pair_of(f, 0)); }
__device__ __forceinline__ void unpack(const uint4& pairs, float* f) {
    f[0] = low(pairs.x), f[1] = high(pairs.x), f[2] = low(pairs.y), f[3] = high(pairs.y);
    f[4] = low(pairs.z), f[5] = high(pairs.z), f[6] = low(pairs.w), f[7] = high(pairs.w);
}
__device__ __forceinline__ uint4 pack(const float* f) {
    return make_uint4(pair_of(f[0], f[1]), pair_of(f[2], f[3]), pair_of(f[4], f[5]), pair_of(f[6], f[7]));
}
__device__ __forceinline__ float power2(float f) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(f));
    return r;
}
__device__ __forceinline__ float logarithm2(float f) {
    float r;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(f));
    return r;
}
__device__ __forceinline__ float reciprocal(float f) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(f));
    return r;
}

// ---- words between thread blocks: 4 bytes of data in 8, or 12 in 16. The other 4 are the number of the layer that
// wrote the word.

__device__ __forceinline__ uint2 look(const u64* word) {
    u64 w;
    asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(w) : "l"(word) : "memory");
    return make_uint2((u32)w, (u32)(w >> 32));
}
__device__ __forceinline__ uint4 look_at_two(const u64* words) {
    u64 a, b;
    asm volatile("ld.relaxed.gpu.global.v2.b64 {%0, %1}, [%2];" : "=l"(a), "=l"(b) : "l"(words) : "memory");
    return make_uint4((u32)a, (u32)(a >> 32), (u32)b, (u32)(b >> 32));
}
__device__ __forceinline__ uint4 look(const uint4* word) {
    u64 a, b;
    asm volatile("{\n.reg .b128 w;\nld.relaxed.gpu.global.b128 w, [%2];\nmov.b128 {%0, %1}, w;\n}"
                 : "=l"(a), "=l"(b)
                 : "l"(word)
                 : "memory");
    return make_uint4((u32)a, (u32)(a >> 32), (u32)b, (u32)(b >> 32));
}
__device__ __forceinline__ void post(u64* word, u32 data, u32 number) {
    asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(word), "l"((u64)number << 32 | data) : "memory");
}
// Four floats, rounded to 24 bits (16 of mantissa). That is a two-hundredth of the error that rounding their sum to
// bfloat16 makes.
__device__ __forceinline__ void post(uint4* word, const float* f, u32 number) {
    u32 v[4];
    for (int i = 0; i < 4; ++i) v[i] = (__float_as_uint(f[i]) + 0x80) >> 8;
    const u64 a = (u64)(v[1] << 8 | (v[3] >> 8 & 0xff)) << 32 | (v[0] << 8 | v[3] >> 16);
    const u64 b = (u64)number << 32 | (v[2] << 8 | (v[3] & 0xff));
    asm volatile("{\n.reg .b128 w;\nmov.b128 w, {%0, %1};\nst.relaxed.gpu.global.b128 [%2], w;\n}" ::"l"(a), "l"(b),
                 "l"(word)
                 : "memory");
}
__device__ __forceinline__ void floats_of(const uint4& word, float* f) {
    f[0] = __uint_as_float(word.x & ~0xffu), f[1] = __uint_as_float(word.y & ~0xffu),
    f[2] = __uint_as_float(word.z & ~0xffu);
    f[3] = __uint_as_float((word.x & 0xff) << 24 | (word.y & 0xff) << 16 | (word.z & 0xff) << 8);
}
// Waits for four words of this number, and returns their eight values.
__device__ __forceinline__ uint4 take_eight(const u64* words, u32 number) {
    uint4 a, b;
    do {
        a = look_at_two(words), b = look_at_two(words + 2);
    } while (a.y != number || a.w != number || b.y != number || b.w != number);
    return make_uint4(a.x, a.z, b.x, b.z);
}

// ---- sums over a warp

__device__ __forceinline__ float warp_sum(float f) {
    for (int off = 16; off; off /= 2) f += __shfl_xor_sync(ALL, f, off);
    return f;
}

// sums += eight inputs of this lane's row times eight of x.
__device__ __forceinline__ void multiply_add(float* sums, const uint4& row, const uint4& x) {
    const u32 nothing = 0;  // rows 8 to 15 of the mma are unused
    for (int half = 0; half < 2; ++half)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%6,%5,%6}, {%7,%8}, {%0,%1,%2,%3};"
            : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
            : "r"(half ? row.z : row.x), "r"(half ? row.w : row.y), "r"(nothing), "r"(half ? x.z : x.x),
              "r"(half ? x.w : x.y));
}
// Multiplies `tiles` tiles of a weight with x [STEPS], which is 0 in steps without a block for this lane. Writes
// sums [slot][warp].
template <class P>
__device__ __forceinline__ void multiply(Shared& s, Place& place, int tiles, const uint4* x, float (*sums)[WARPS]) {
    const int slot = threadIdx.x % 32 / 4, row = slot % P::SLOT_ROWS;
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
        wait(&s.full[place.tile], place.parity);
        const uint4* rows = (const uint4*)s.tiles[place.tile] + row * P::BLOCKS * 4;
        uint4 weights[P::GROUPS][P::STEPS];
        for (int group = 0; group < P::GROUPS; ++group)
            for (int step = 0; step < P::STEPS; ++step)
                weights[group][step] = P::exists(step) ? rows[group * P::SLOT_ROWS * P::BLOCKS * 4 + P::vector(step)]
                                                       : make_uint4(0, 0, 0, 0);
        release(s, place);
        for (int group = 0; group < P::GROUPS; ++group) {
            float sum[4] = {};
            for (int step = 0; step < P::STEPS; ++step) multiply_add(sum, weights[group][step], x[step]);
            if (threadIdx.x % 4 == slot / 2)  // this lane has the slot's element of the diagonal
                sums[(tile * P::GROUPS + group) * 8 + slot][threadIdx.x / 32] = slot & 1 ? sum[1] : sum[0];
        }
    }
}
// The sum of one of this thread block's rows, over all warps and all slots of the row.
template <class P> __device__ __forceinline__ float row_sum(const float (*sums)[WARPS], int row) {
    const int group = row / P::SLOT_ROWS, first = group * 8 + row % P::SLOT_ROWS;
    float sum = 0;
    for (int i = 0; i < P::SHARING; ++i) {
        const float4* of = (const float4*)sums[first + i * P::SLOT_ROWS];
        const float4 a = of[0], b = of[1];
        sum += (a.x + a.y) + (a.z + a.w) + ((b.x + b.y) + (b.z + b.w));
    }
    return sum;
}
__device__ __forceinline__ float all_squares(const float* of_warps) {
    float sum = 0;
    for (int i = 0; i < WARPS; ++i) sum += of_warps[i];
    return sum;
}
// This thread's value and its neighbour's as a pair. Rows are posted in pairs, by the thread of the even row.
__device__ __forceinline__ u32 with_next(float f) { return pair_of(f, __shfl_down_sync(__activemask(), f, 1)); }

// The row of qkv that is row `row` of a KV head's q, k and v.
__device__ __forceinline__ int qkv_row(int row, int head) {
    if (row < HEAD_INPUTS) return head * HEAD_INPUTS + row;
    const int value = row >= HEAD_INPUTS + HEAD_DIM;
    return KV_HEADS * (HEAD_INPUTS + value * HEAD_DIM) + head * HEAD_DIM + row - HEAD_INPUTS - value * HEAD_DIM;
}

// This thread block's work in each phase.
struct Work {
    int head, piece;
    int first_key, end_key, pieces;  // its cached keys; pieces of the head that have keys (at least 1: the new token)
    bool has_new_token;
    int qkv_first, qkv_tiles, output_first, output_rows, gate_first, gate_rows, down_first, down_rows;
    __device__ __forceinline__ explicit Work(int cached) {
        const int program = blockIdx.x;
        head = program % KV_HEADS, piece = program / KV_HEADS;
        const int keys = max(cached, 1), span = cdiv(cdiv(keys, PIECES), BLOCK_SIZE) * BLOCK_SIZE;
        pieces = cdiv(keys, span);
        first_key = piece * span, end_key = min(first_key + span, cached);
        has_new_token = piece == pieces - 1;
        auto rows = [](int first, int most, int all) { return max(0, min(most, all - first)); };
        qkv_first = piece * Qkv::ROWS, qkv_tiles = cdiv(rows(qkv_first, Qkv::ROWS, HEAD_QKV), Qkv::TILE_ROWS);
        output_first = piece * Output::ROWS, output_rows = rows(output_first, Output::ROWS, HIDDEN);
        gate_first = program * GateUp::ROWS, gate_rows = rows(gate_first, GateUp::ROWS, INTERMEDIATE);
        down_first = program * Down::ROWS, down_rows = rows(down_first, Down::ROWS, HIDDEN);
    }
    __device__ __forceinline__ int key_tiles() const {
        return end_key > first_key ? cdiv(end_key - first_key, TILE_KEYS) : 0;
    }
    __device__ __forceinline__ int output_tiles() const { return cdiv(output_rows, Output::TILE_ROWS); }
    __device__ __forceinline__ int gate_tiles() const { return cdiv(gate_rows, GateUp::TILE_ROWS); }
    __device__ __forceinline__ int down_tiles() const { return cdiv(down_rows, Down::TILE_ROWS); }
};

// ---- the producer warp

// Loads a tile of keys or values. Its tokens are scattered over the pool, so threads copy 16 bytes each (cp.async):
// a bulk copy per token was slower.
__device__ __forceinline__ void load_keys(const Arguments& a, Shared& s, const Work& work, Place& place, u64 from,
                                          int first) {
    constexpr int SLOTS = TILE_KEYS / 32, TOKENS = 32 / KEY_LANES;  // tokens for each lane; tokens of a round
    const int lane = threadIdx.x % 32, vector = lane % KEY_LANES;
    u64 at[SLOTS];
    for (int slot = 0; slot < SLOTS; ++slot) {
        const int token = min(first + slot * 32 + lane, work.end_key - 1);
        at[slot] = from + 2 * (__ldg(a.block_table + token / BLOCK_SIZE) * a.block_stride +
                               token % BLOCK_SIZE * a.token_stride);
    }
    const u32 to = shared_address(s.tiles[place.tile]) + lane * 16;
    for (int slot = 0; slot < SLOTS; ++slot)
#pragma unroll 2
        for (int token = 0; token < min(32, work.end_key - first - slot * 32); token += TOKENS) {
            const u64 row = __shfl_sync(ALL, at[slot], token + lane / KEY_LANES) + vector * 16;
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + (slot * 32 + token) * HEAD_DIM * 2),
                         "l"(row)
                         : "memory");
        }
    asm volatile("cp.async.mbarrier.arrive.shared.b64 [%0];" ::"r"(shared_address(&s.full[place.tile])) : "memory");
    __syncwarp();
    if (lane == 0) arrive(&s.full[place.tile]);
    place.next();
}

// Where a tile of a weight is: `rows` rows of `bytes`, `stride` bytes apart.
struct Source {
    u64 from;
    int rows, bytes, stride;
};
// The source of tile number `tile` of a layer's weights. address: lane i has that of the layer's weight i.
__device__ __forceinline__ Source source(const Work& work, u64 address, int tile) {
    const u64 qkv = __shfl_sync(ALL, address, QKV), output = __shfl_sync(ALL, address, OUTPUT);
    const u64 gate_up = __shfl_sync(ALL, address, GATE_UP), down = __shfl_sync(ALL, address, DOWN);
    if (tile < work.qkv_tiles)
        return {qkv + (u64)qkv_row(work.qkv_first + tile * Qkv::TILE_ROWS, work.head) * (HIDDEN * 2), 1,
                Qkv::TILE_ROWS * HIDDEN * 2, 0};
    tile -= work.qkv_tiles;
    if (tile < work.output_tiles()) {
        const int row = tile * Output::TILE_ROWS, stride = KV_HEADS * HEAD_INPUTS * 2;
        return {output + (u64)(work.output_first + row) * stride + work.head * HEAD_INPUTS * 2,
                min(Output::TILE_ROWS, work.output_rows - row), HEAD_INPUTS * 2, stride};
    }
    tile -= work.output_tiles();
    if (tile < 2 * work.gate_tiles()) {
        const int row = tile / 2 * GateUp::TILE_ROWS;
        return {gate_up + (u64)((tile & 1) * INTERMEDIATE + work.gate_first + row) * (HIDDEN * 2), 1,
                min(GateUp::TILE_ROWS, work.gate_rows - row) * HIDDEN * 2, 0};
    }
    const int row = (tile - 2 * work.gate_tiles()) * Down::TILE_ROWS;
    return {down + (u64)(work.down_first + row) * (INTERMEDIATE * 2), 1,
            min(Down::TILE_ROWS, work.down_rows - row) * INTERMEDIATE * 2, 0};
}

__device__ void produce(const Arguments& a, Shared& s, const Work& work) {
    const int lane = threadIdx.x % 32;
    Place place = {0, 1}, landed = {0, 0};
    int under_way = 0;  // tiles
    const int key_tiles = work.key_tiles(),
              tiles = work.qkv_tiles + work.output_tiles() + 2 * work.gate_tiles() + work.down_tiles();
    auto begin = [&](int most) {
        for (; under_way >= most; --under_way) wait(&s.full[landed.tile], landed.parity), landed.next();
        ++under_way;
        wait(&s.empty[place.tile], place.parity);
    };
    u64 next = lane < NUM_WEIGHTS ? __ldg(a.weights + lane) : 0;
#pragma unroll 1
    for (int layer = 0; layer < a.layers; ++layer) {
        const u64 address = next;
        if (layer + 1 < a.layers && lane < NUM_WEIGHTS) next = __ldg(a.weights + (layer + 1) * NUM_WEIGHTS + lane);

        u64* norms_full = &s.norms_full[layer & 1];
        wait(&s.norms_empty[layer & 1], (layer >> 1 & 1) ^ 1);
        if (lane == 0) expect(norms_full, (2 * HIDDEN + (QK_NORM ? 2 * HEAD_DIM : 0)) * 2);
        __syncwarp();
        u16* norms = s.norms[layer & 1];
        if (lane == ATTENTION_NORM || lane == MLP_NORM)
            load(norms + (lane - ATTENTION_NORM) * HIDDEN, address, HIDDEN * 2, norms_full);
        if (QK_NORM && (lane == Q_NORM || lane == K_NORM))
            load(norms + 2 * HIDDEN + (lane - Q_NORM) * HEAD_DIM, address, HEAD_DIM * 2, norms_full);

#pragma unroll 1
        for (int tile = 0; tile <= tiles; ++tile) {
            if (tile == work.qkv_tiles) {
                const u64 keys = (u64)(a.pool + layer * a.layer_stride + work.head * a.head_stride);
#pragma unroll 1
                for (int i = 0; i < 2 * key_tiles; ++i) {
                    begin(key_tiles > 1 ? KEYS_IN_FLIGHT : IN_FLIGHT);
                    load_keys(a, s, work, place, keys + (i & 1) * a.value_offset * 2,
                              work.first_key + i / 2 * TILE_KEYS);
                }
            }
            if (tile == tiles) break;  // only here, since a thread block may have keys and no weight tiles after them
            const Source at = source(work, address, tile);
            begin(IN_FLIGHT);
            if (lane == 0) expect(&s.full[place.tile], at.rows * at.bytes);
            __syncwarp();
#pragma unroll 1
            for (int row = lane; row < at.rows; row += 32)
                load(s.tiles[place.tile] + row * at.bytes, at.from + (u64)row * at.stride, at.bytes,
                     &s.full[place.tile]);
            place.next();
        }
    }
}

// ---- the phases

// Phase 1: norm; q, k and v of one KV head.
__device__ __forceinline__ void project_qkv(const Arguments& a, Shared& s, const Work& work, Place& place,
                                            const u16* embedded, const u16* norm, int layer, u32 number) {
    using P = Qkv;
    const int warp = threadIdx.x / 32, row = work.qkv_first + threadIdx.x;
    const bool has_row = threadIdx.x < P::ROWS && row < HEAD_QKV;
    float bias = 0;
    if (HAS_QKV_BIAS && has_row)
        bias = low(__ldg((const u16*)__ldg(a.weights + layer * NUM_WEIGHTS + QKV_BIAS) + qkv_row(row, work.head)));
    uint4 x[P::STEPS] = {};
    float squares = 0;
    for (int step = 0; step < P::STEPS; ++step)
        if (P::exists(step)) {
            const int vector = P::vector(step);
            float f[8], n[8];
            unpack(layer == 0 ? *((const uint4*)embedded + vector) : take_eight(a.hidden + vector * 4, number - 1), f);
            unpack(*((const uint4*)norm + vector), n);
            for (int i = 0; i < 8; ++i)
                squares += f[i] * f[i], f[i] *= n[i];  // the division by the root mean square comes at the end
            x[step] = pack(f);
        }
    multiply<P>(s, place, work.qkv_tiles, x, s.sums[0]);
    // Slots of one row have different blocks of x, and the other rows have the same blocks again: count one row only.
    if (threadIdx.x % 32 / 4 % P::SLOT_ROWS != 0) squares = 0;
    squares = warp_sum(squares);
    if (threadIdx.x % 32 == 0) s.squares[0][warp] = squares;
    sync_consumers();
    if (has_row) {
        const float inverse = rsqrtf(all_squares(s.squares[0]) / HIDDEN + a.eps);
        const u32 pair = with_next(row_sum<P>(s.sums[0], threadIdx.x) * inverse + bias);
        if (row % 2 == 0) post(a.qkv + qkv_row(row, work.head) / 2, pair, number);
    }
}

// First half of phase 2: brings this KV head's q, and the new token's k and v, to shared memory, with q and k normed
// and rotated, and writes k and v to the pool. Each warp takes a head at a time.
__device__ __forceinline__ void gather_qkv(const Arguments& a, Shared& s, const Work& work, const float* cos,
                                           const float* sin, const u16* norms, u16* slot, u32 number) {
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int index = threadIdx.x / 32; index < (work.has_new_token ? GROUP + 2 : GROUP); index += WARPS) {
        const u64* words = a.qkv + (qkv_row(index * HEAD_DIM, work.head) + lane * COLUMNS) / 2;
        float f[COLUMNS];
        for (int i = 0; i < COLUMNS / 2; ++i) {
            uint2 word;
            do word = look(words + i);
            while (word.y != number);
            f[2 * i] = low(word.x), f[2 * i + 1] = high(word.x);
        }
        if (index <= GROUP) {
            if (QK_NORM) {
                float squares = 0;
                for (int i = 0; i < COLUMNS; ++i) squares += f[i] * f[i];
                const float inverse = rsqrtf(warp_sum(squares) / HEAD_DIM + a.eps);
                const u16* norm = norms + (index == GROUP ? HEAD_DIM : 0) + lane * COLUMNS;
                for (int i = 0; i < COLUMNS; ++i) f[i] = rounded(rounded(f[i] * inverse) * low(norm[i]));
            }
            for (int i = 0; i < COLUMNS; ++i) {
                const float other = __shfl_xor_sync(ALL, f[i], 16);
                f[i] = rounded(f[i] * cos[i] + other * sin[i]);
            }
        }
        for (int i = 0; i < COLUMNS; ++i) s.qkv[index * HEAD_DIM + lane * COLUMNS + i] = f[i];
        if (index >= GROUP && slot != nullptr)
            for (int i = 0; i < COLUMNS; i += 2)
                *(u32*)(slot + (index - GROUP) * a.value_offset + lane * COLUMNS + i) = pair_of(f[i], f[i + 1]);
    }
    sync_consumers();
}

// Second half of phase 2: attention to this thread block's piece of the keys. Each warp has its own keys and an online
// softmax over them (Milakov and Gimelshein, 2018); at the end the warps' results are merged.
__device__ __forceinline__ void attend(const Arguments& a, Shared& s, const Work& work, Place& place, u32 number) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, part = lane % KEY_LANES;
    const int own_key = warp * WARP_KEYS + lane / KEY_LANES;  // in a round
    float q[GROUP][8], top[GROUP], weight[GROUP], total[GROUP][COLUMNS];
    for (int g = 0; g < GROUP; ++g) {
        for (int i = 0; i < 8; ++i) q[g][i] = s.qkv[g * HEAD_DIM + part * 8 + i] * a.scale;
        const bool has_new = work.has_new_token && warp == 0;
        float score = 0;
        if (has_new)
            for (int i = 0; i < 8; ++i) score += q[g][i] * s.qkv[HEAD_INPUTS + part * 8 + i];
        for (int off = KEY_LANES / 2; off; off /= 2) score += __shfl_xor_sync(ALL, score, off);
        top[g] = has_new ? score : NO_TOP, weight[g] = has_new;
        for (int i = 0; i < COLUMNS; ++i)
            total[g][i] = has_new ? s.qkv[HEAD_INPUTS + HEAD_DIM + lane * COLUMNS + i] : 0;
    }
#pragma unroll 1
    for (int first = work.first_key; first < work.end_key; first += TILE_KEYS) {
        const int keys = min(TILE_KEYS, work.end_key - first);
        float score[GROUP][KEY_ROUNDS];
        wait(&s.full[place.tile], place.parity);
        for (int round = 0; round < KEY_ROUNDS; ++round) {
            float k[8];
            unpack(((const uint4*)s.tiles[place.tile])[(round * WARPS * WARP_KEYS + own_key) * KEY_LANES + part], k);
            for (int g = 0; g < GROUP; ++g) {
                score[g][round] = 0;
                for (int i = 0; i < 8; ++i) score[g][round] += q[g][i] * k[i];
            }
        }
        release(s, place);
        for (int g = 0; g < GROUP; ++g) {
            float new_top = top[g];
            for (int round = 0; round < KEY_ROUNDS; ++round) {
                for (int off = KEY_LANES / 2; off; off /= 2)
                    score[g][round] += __shfl_xor_sync(ALL, score[g][round], off);
                if (round * WARPS * WARP_KEYS + own_key >= keys) score[g][round] = NOTHING;
                new_top = fmaxf(new_top, score[g][round]);
            }
            for (int off = KEY_LANES; off < 32; off *= 2) new_top = fmaxf(new_top, __shfl_xor_sync(ALL, new_top, off));
            const float shrink = power2(top[g] - new_top);
            top[g] = new_top, weight[g] *= shrink;
            for (int i = 0; i < COLUMNS; ++i) total[g][i] *= shrink;
            for (int round = 0; round < KEY_ROUNDS; ++round)
                score[g][round] = rounded(power2(score[g][round] - new_top));
        }
        wait(&s.full[place.tile], place.parity);
        for (int round = 0; round < KEY_ROUNDS; ++round)
            for (int j = 0; j < WARP_KEYS; ++j) {
                // a missing key has weight 0, but its place may hold a NaN: read the last key instead
                const int key = min((round * WARPS + warp) * WARP_KEYS + j, keys - 1);
                const u32* pairs = (const u32*)s.tiles[place.tile] + (key * HEAD_DIM + lane * COLUMNS) / 2;
                float v[COLUMNS];
                for (int i = 0; i < COLUMNS / 2; ++i) v[2 * i] = low(pairs[i]), v[2 * i + 1] = high(pairs[i]);
                for (int g = 0; g < GROUP; ++g) {
                    const float p = __shfl_sync(ALL, score[g][round], j * KEY_LANES);
                    weight[g] += p;
                    for (int i = 0; i < COLUMNS; ++i) total[g][i] += p * v[i];
                }
            }
        release(s, place);
    }
    for (int g = 0; g < GROUP; ++g) {
        for (int i = 0; i < COLUMNS; ++i) s.heads[warp][g * HEAD_DIM + lane * COLUMNS + i] = total[g][i];
        if (lane == 0) s.tops[warp][g] = top[g], s.weights[warp][g] = weight[g];
    }
    sync_consumers();
    if (threadIdx.x < QUADS) {
        const int g = threadIdx.x * 4 / HEAD_DIM, at = work.head * PIECES + work.piece;
        float most = s.tops[0][g], sum = 0, f[4] = {};
        for (int i = 1; i < WARPS; ++i) most = fmaxf(most, s.tops[i][g]);
        for (int i = 0; i < WARPS; ++i) {
            const float share = power2(s.tops[i][g] - most);
            const float4 h = *(const float4*)&s.heads[i][threadIdx.x * 4];
            sum += share * s.weights[i][g];
            f[0] += share * h.x, f[1] += share * h.y, f[2] += share * h.z, f[3] += share * h.w;
        }
        const float inverse = reciprocal(sum);
        for (int i = 0; i < 4; ++i) f[i] *= inverse;
        post(a.parts + at * QUADS + threadIdx.x, f, number);
        if (threadIdx.x * 4 % HEAD_DIM == 0)
            post(a.scales + at * GROUP + g, __float_as_uint(most + logarithm2(sum)), number);
    }
}

// Phase 3: merges the pieces, of which each team of threads takes a share; then this KV head's columns of the output
// projection.
__device__ __forceinline__ void project_output(const Arguments& a, Shared& s, const Work& work, Place& place,
                                               u32 number) {
    using P = Output;
    if (threadIdx.x < QUADS * SHARES) {
        const int quad = threadIdx.x % QUADS, share = threadIdx.x / QUADS, g = quad * 4 / HEAD_DIM;
        float top = NO_TOP, sum = 0, total[4] = {};
#pragma unroll 1
        for (int first = share; first < work.pieces; first += SHARES * PARTS_AT_ONCE) {
            uint4 part[PARTS_AT_ONCE];
            uint2 scale[PARTS_AT_ONCE];
            bool all;
            do {
                all = true;
                for (int i = 0; i < PARTS_AT_ONCE; ++i) {
                    const int piece =
                        work.head * PIECES + (first + i * SHARES < work.pieces ? first + i * SHARES : first);
                    part[i] = look(a.parts + piece * QUADS + quad), scale[i] = look(a.scales + piece * GROUP + g);
                }
                for (int i = 0; i < PARTS_AT_ONCE; ++i) all &= part[i].w == number && scale[i].y == number;
            } while (!all);
            float new_top = top;
            for (int i = 0; i < PARTS_AT_ONCE; ++i) new_top = fmaxf(new_top, __uint_as_float(scale[i].x));
            const float shrink = power2(top - new_top);
            top = new_top, sum *= shrink;
            for (int i = 0; i < 4; ++i) total[i] *= shrink;
            for (int i = 0; i < PARTS_AT_ONCE; ++i) {
                float f[4];
                floats_of(part[i], f);
                const float p = first + i * SHARES < work.pieces ? power2(__uint_as_float(scale[i].x) - top) : 0;
                sum += p;
                for (int j = 0; j < 4; ++j) total[j] += p * f[j];
            }
        }
        *(float4*)&s.share_heads[share][quad * 4] = make_float4(total[0], total[1], total[2], total[3]);
        if (quad * 4 % HEAD_DIM == 0) s.share_tops[share][g] = top, s.share_weights[share][g] = sum;
    }
    sync_consumers();
    uint4 x[P::STEPS] = {};
    for (int step = 0; step < P::STEPS; ++step)
        if (P::exists(step)) {
            const int vector = P::vector(step), g = vector * 8 / HEAD_DIM;
            float most = s.share_tops[0][g], sum = 0, f[8] = {};
            for (int i = 1; i < SHARES; ++i) most = fmaxf(most, s.share_tops[i][g]);
            for (int i = 0; i < SHARES; ++i) {
                const float p = power2(s.share_tops[i][g] - most);
                sum += p * s.share_weights[i][g];
                for (int j = 0; j < 8; ++j) f[j] += p * s.share_heads[i][vector * 8 + j];
            }
            const float inverse = reciprocal(sum);
            for (int j = 0; j < 8; ++j) f[j] *= inverse;
            x[step] = pack(f);
        }
    multiply<P>(s, place, work.output_tiles(), x, s.sums[1]);
    sync_consumers();
    const int row = threadIdx.x * 4;
    if (row < work.output_rows) {
        float f[4];
        for (int i = 0; i < 4; ++i) f[i] = row_sum<P>(s.sums[1], row + i);
        post(a.shares + (work.head * HIDDEN + work.output_first + row) / 4, f, number);
    }
}

// Phase 4: adds attention to the residual; norm; gate, up and SiLU.
__device__ __forceinline__ void gate_and_up(const Arguments& a, Shared& s, const Work& work, Place& place,
                                            const u16* embedded, const u16* norm, int layer, u32 number) {
    using P = GateUp;
    const int warp = threadIdx.x / 32;
    float squares = 0;
#pragma unroll 1
    for (int column = threadIdx.x * 4; column < HIDDEN; column += THREADS * 4) {
        uint2 before, added = make_uint2(0, 0);
        if (layer == 0) {
            before = *(const uint2*)(embedded + column);
        } else {
            // Number - 1 is the previous layer's. A thread block that has rows of down only may find this layer's
            // number as well, since the others do not wait for it. That does no harm: it needs the residual of its own
            // rows only, whose words nobody else writes.
            uint4 words;
            do words = look_at_two(a.hidden + column / 2);
            while (number - words.y > 1 || number - words.w > 1);
            before = make_uint2(words.x, words.z);
        }
        if (HAS_OUTPUT_BIAS)
            added = __ldg((const uint2*)((const u16*)__ldg(a.weights + layer * NUM_WEIGHTS + OUTPUT_BIAS) + column));
        uint4 share[KV_HEADS];
        bool all;
        do {
            all = true;
            for (int head = 0; head < KV_HEADS; ++head) share[head] = look(a.shares + (head * HIDDEN + column) / 4);
            for (int head = 0; head < KV_HEADS; ++head) all &= share[head].w == number;
        } while (!all);
        float sum[4] = {low(added.x), high(added.x), low(added.y), high(added.y)};
        for (int head = 0; head < KV_HEADS; ++head) {
            float f[4];
            floats_of(share[head], f);
            for (int i = 0; i < 4; ++i) sum[i] += f[i];
        }
        const float old[4] = {low(before.x), high(before.x), low(before.y), high(before.y)};
        for (int i = 0; i < 4; ++i) {
            const float f = rounded(old[i] + sum[i]);
            squares += f * f;
            s.residual[column + i] = f;
        }
    }
    squares = warp_sum(squares);
    if (threadIdx.x % 32 == 0) s.squares[1][warp] = squares;
    sync_consumers();
    uint4 x[P::STEPS] = {};
    for (int step = 0; step < P::STEPS; ++step)
        if (P::exists(step)) {
            const int vector = P::vector(step);
            float f[8];
            unpack(*((const uint4*)norm + vector), f);
            for (int i = 0; i < 8; ++i) f[i] *= s.residual[vector * 8 + i];
            x[step] = pack(f);
        }
    multiply<P>(s, place, 2 * work.gate_tiles(), x, s.sums[0]);
    sync_consumers();
    const int row = threadIdx.x;
    if (row < work.gate_rows) {
        const float inverse = rsqrtf(all_squares(s.squares[1]) / HIDDEN + a.eps);
        const int tile = row / P::TILE_ROWS, in_tile = row % P::TILE_ROWS;  // tiles of gate and of up alternate
        const float gate = row_sum<P>(s.sums[0], 2 * tile * P::TILE_ROWS + in_tile) * inverse;
        const float up = row_sum<P>(s.sums[0], (2 * tile + 1) * P::TILE_ROWS + in_tile) * inverse;
        const u32 pair = with_next(gate * reciprocal(1 + power2(-1.4426950408889634f * gate)) * up);
        if (row % 2 == 0) post(a.activated + (work.gate_first + row) / 2, pair, number);
    }
}

// Phase 5: down, added to the residual: the hidden state after this layer.
__device__ __forceinline__ void project_down(const Arguments& a, Shared& s, const Work& work, Place& place,
                                             bool is_last, u32 number) {
    using P = Down;
    uint4 x[P::STEPS] = {};
    for (int step = 0; step < P::STEPS; ++step)
        if (P::exists(step)) x[step] = take_eight(a.activated + P::vector(step) * 4, number);
    multiply<P>(s, place, work.down_tiles(), x, s.sums[1]);
    sync_consumers();
    if (threadIdx.x < work.down_rows) {
        const int row = work.down_first + threadIdx.x;
        const u32 pair = with_next(row_sum<P>(s.sums[1], threadIdx.x) + s.residual[row]);
        if (row % 2 == 0) {
            post(a.hidden + row / 2, pair, number);
            if (is_last) *(u32*)(a.out + row) = pair;
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS + 32, 1) persistent_layers(const Arguments a) {
    extern __shared__ __align__(128) unsigned char memory[];
    Shared& s = *(Shared*)memory;
    if (threadIdx.x == 0) {
        for (int i = 0; i < TILES; ++i) init(&s.full[i], 1), init(&s.empty[i], WARPS);
        for (int i = 0; i < 2; ++i) init(&s.norms_full[i], 1), init(&s.norms_empty[i], WARPS);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    const Work work(*a.seq_len - 1);
    if (threadIdx.x >= THREADS) return produce(a, s, work);

    const int lane = threadIdx.x % 32;
    const u32 first_number = *a.number;
    const u16* embedded = a.embedding + (long long)*a.token * HIDDEN;
    float cos[COLUMNS], sin[COLUMNS];
    const float* angles = a.cos_sin + (long long)*a.position * HEAD_DIM;
    for (int i = 0; i < COLUMNS; ++i) {
        const int column = lane * COLUMNS + i;
        cos[i] = angles[column % HALF], sin[i] = column < HALF ? -angles[HALF + column] : angles[column];
    }
    u16* slot = nullptr;
    if (*a.slot >= 0)
        slot = a.pool + work.head * a.head_stride + *a.slot / BLOCK_SIZE * a.block_stride +
               *a.slot % BLOCK_SIZE * a.token_stride;
    Place place = {0, 0};
#pragma unroll 1
    for (int layer = 0; layer < a.layers; ++layer) {
        const u32 number = first_number + layer;
        const u16* norms = s.norms[layer & 1];
        wait(&s.norms_full[layer & 1], layer >> 1 & 1);
        if (work.qkv_tiles > 0) project_qkv(a, s, work, place, embedded, norms, layer, number);
        if (work.piece < work.pieces) {
            gather_qkv(a, s, work, cos, sin, norms + 2 * HIDDEN,
                       slot == nullptr ? nullptr : slot + layer * a.layer_stride, number);
            attend(a, s, work, place, number);
        }
        if (work.output_rows > 0) project_output(a, s, work, place, number);
        if (work.gate_rows > 0 || work.down_rows > 0)
            gate_and_up(a, s, work, place, embedded, norms + HIDDEN, layer, number);
        __syncwarp();
        if (lane == 0) arrive(&s.norms_empty[layer & 1]);
        if (work.down_rows > 0)
            project_down(a, s, work, place, layer == a.layers - 1, number);
        else
            sync_consumers();  // as in project_down: the next phase may overwrite what the one before read
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) *a.number = first_number + a.layers;
}
