// What the kernels of gemm_sm90.cuh agree on: parameters, tile shapes, the walk over tiles and the
// layout of shared memory.
#pragma once
#include <cuda_bf16.h>
#include "ptx.cuh"

namespace gemm {

using ptx::TensorMap;

enum Epilogue { STORE, STORE_POSITION, GELU, GEGLU, ADD, ROPE, LOOP = 8, UPRIGHT = 16, E4M3 = 32 };
// What the Euler loop's products have beside the towers': a bias behind an RMSNorm, a gate,
// positions behind the real prefix, x read twice.
constexpr Epilogue LOOP_STORE = Epilogue(LOOP + STORE), LOOP_GEGLU = Epilogue(LOOP + GEGLU),
                   LOOP_ADD = Epilogue(LOOP + ADD), LOOP_ROPE = Epilogue(LOOP + ROPE);
// Tokens as wgmma's M, features as its N: where that cuts a product into one more even wave.
constexpr Epilogue UPRIGHT_STORE = Epilogue(UPRIGHT + STORE),
                   UPRIGHT_GELU = Epilogue(UPRIGHT + GELU);
// Both operands E4M3, scaled into its range by powers of two (gemm_e4m3_sm90.cu).
constexpr Epilogue E4M3_GEGLU = Epilogue(E4M3 + GEGLU), E4M3_ADD = Epilogue(E4M3 + ADD);

// Mirrored field by field by the host twin (repr(C)). Pointers are device pointers; a null pointer
// switches its feature off. "Row" is a row of x, "feature" a row of W (in packed order).
struct GemmParams {
    const float* bias;       // [n] added to the product, or null; GEGLU, ROPE: the loop's alone
    const float* colsum;     // [n] Σ_k scale[k] · W[n, k] of the norm's scale and the bf16 weights:
                             // LayerNorm only, else null
    const float2* stats_in;  // [rows][slots_in] partial {Σx, Σx²} of each input row; null: no norm.
                             // E4M3: [rows] factors of the row's products: gate's and up's; down's
    float2* stats_out;       // [buffer rows of out][n / 64], written beside out; null: none
    const void* aux;         // STORE_POSITION: f32 [period][n] table. ROPE: float2 [128], turns per
                             // position of each frequency as hi + lo. ADD of the loop: f32 [n],
                             // multiplies the product, or null. Else null
    __nv_bfloat16* out;      // destination; ADD: the residual, updated in place. ROPE: q
    __nv_bfloat16* out_k;    // ROPE: keys of the cache, first row of sample 0
    __nv_bfloat16* out_v;    // ROPE: values of the cache, likewise
    __nv_bfloat16* scaled;   // ADD, STORE, STORE_POSITION: out · next_scale, the next product's x;
                             // laid out as out. Null: none
    const float* next_scale; // [n], learned scale of the norm that reads out next
    uint32_t rows;           // rows of x, all samples
    uint32_t n;              // rows of W (features before GeGLU halves them); a multiple of 8
    uint32_t k;              // columns of W; the copies read zeros beyond it
    uint32_t slots_in;       // partials per row of stats_in: K / 64; even
    float inv_width;         // 1 / (number of columns behind stats_in)
    uint32_t period;         // rows per sample (image): row = sample · period + i
    uint32_t out_stride;     // out row = sample · out_stride + i (= period when contiguous)
    uint32_t out_ld;         // elements from one row of out to the next
    uint32_t q_cols;         // ROPE: features of q (2048; 0 when W has only k‖v)
    uint32_t kv_stride;      // ROPE: cache row = sample · kv_stride + i
    uint32_t kv_ld;          // ROPE: elements from one cache row to the next
    uint32_t group;          // token tiles (in clusters) walked before the next weight tile; ≥ 1
    float scale;             // STORE_POSITION: multiplies the product
    uint32_t x_cols;         // columns of x: k. In the loop also k / 2, and x is read twice: f32
                             // weights are two bf16 matrices side by side, the rounded and what
                             // rounding left
    const uint2* lengths;    // ROPE of the loop: [samples], cameras and prompt tokens
    uint32_t image_tokens;   // ROPE of the loop: tokens of a camera
    uint32_t first_position; // ROPE of the loop: position of row 0 less the prefix's length
};
static_assert(sizeof(GemmParams) == 152, "the host twin mirrors GemmParams");

#ifndef GEMM_MARK
#define GEMM_MARK(i)  // the lab's stopwatch: i = 0 (start) … 7 (end), by consumers
#define GEMM_MARK_PRODUCER(i)  // 8 (the kernels in front are done), 9 (first tokens asked for)
#endif

constexpr int HEAD = 256;        // ROPE: head width
// CONSUMERS: warpgroups on the products. MI: 64-row blocks of weight per consumer. BN: tokens per
// tile (UPRIGHT: weight and tokens change places). CM (CN): CTAs of a cluster that share a token
// (weight) tile, each fetching every CM-th (CN-th) stage for all. CK: CTAs of a cluster that split
// K; they meet in shared memory and each finishes BN / CK of the tokens. TURNS: the consumers take
// tiles in turn, each a whole one, so that one's epilogue runs under the other's products; else
// they share every tile.
template <int CONSUMERS_, int MI_, int BN_, int STAGES_, int CM_, int CN_, int CK_, int TURNS_,
          Epilogue EPI_>
struct Tile {
    static constexpr int CONSUMERS = CONSUMERS_, THREADS = 128 * (1 + CONSUMERS);
    static constexpr int MI = MI_, BN = BN_, STAGES = STAGES_, CM = CM_, CN = CN_, CK = CK_;
    static constexpr bool TURNS = TURNS_;
    static constexpr int SHARERS = TURNS ? 1 : CONSUMERS;  // consumers of a tile
    static constexpr Epilogue EPI = Epilogue(EPI_ % LOOP);
    static constexpr bool OF_LOOP = (EPI_ & LOOP) != 0, UPRIGHT = (EPI_ & gemm::UPRIGHT) != 0;
    static constexpr bool E4M3 = (EPI_ & gemm::E4M3) != 0;    // its rows are normalised before
    static constexpr int K_STEP = E4M3 ? 128 : 64;  // columns per stage: a 128-byte swizzled row
    // No mean, in the towers no bias.
    static constexpr bool RMS = (EPI == GEGLU || EPI == ROPE) && !E4M3;
    static constexpr bool NORM = RMS || EPI == STORE || EPI == GELU || E4M3;  // has records
    // Whether statistics and a scaled copy may be left beside out; whether there are registers to
    // ask for that copy's scales before the products.
    static constexpr bool STATS = EPI == ADD || EPI == STORE_POSITION || EPI == STORE;
    static constexpr bool SCALES = STATS && MI == 1;
    // Whether a consumer stages a 64-feature slab of its tile whole; whether the copy engine takes
    // it from there.
    static constexpr bool WHOLE =
        (MI == 2 && EPI != GEGLU) || EPI == ADD || (EPI == ROPE && !OF_LOOP);
    static constexpr bool BULK = WHOLE && EPI != ADD && EPI != STORE_POSITION;
    static constexpr int BM = 64 * MI * SHARERS;
    static constexpr int CLUSTER = CM * CN * CK;
    static constexpr int GROUPS = BN / 8;                    // 8-token groups of the tile
    static constexpr int OWN = (GROUPS + CK - 1) / CK;       // of which this CTA finishes
    static constexpr int TOKENS = UPRIGHT ? BM : BN, FEATURES = UPRIGHT ? BN : BM;
    static constexpr int W_BYTES = BM * 128, X_BYTES = BN * 128, STAGE = W_BYTES + X_BYTES;
    static constexpr int RING = STAGES * STAGE;
    // Per consumer: [token][64 features]. UPRIGHT: [64 tokens][feature], rows an odd number of
    // chunks of 16 bytes apart, so that eight of them are in different banks.
    static constexpr int PITCH = (GROUPS | 1) * 16;
    static constexpr int STAGING = UPRIGHT ? 64 * PITCH : OWN * 8 * 128;
    static constexpr int RECORDS = NORM ? TOKENS * 8 : 0;    // {rstd, mean·rstd}; two buffers
    static constexpr int COLUMNS = UPRIGHT ? FEATURES * 8 : 0;  // {bias, colsum}; two buffers
    static constexpr int POSITIONS = EPI == ROPE ? BN * 4 : 0;  // two buffers
    static constexpr int BARRIERS = 8 * (2 * STAGES + 7 + 2 * CONSUMERS);
    static constexpr int SMEM =
        RING + CONSUMERS * STAGING + 2 * (RECORDS + POSITIONS + COLUMNS) + BARRIERS;
    static_assert(BN % 8 == 0 && BN <= 256 && BM <= 256, "TMA boxes have at most 256 rows");
    static_assert(EPI != GEGLU || MI == 2, "a consumer's 128 rows make 64 hidden units");
    static_assert((CK - 1) * CONSUMERS * MI * OWN * 2048 <= RING, "partials must fit the ring");
    static_assert(!TURNS || (CK == 1 && CONSUMERS == 2), "two consumers, whole tiles");
    static_assert(!UPRIGHT || (MI == 1 && CK == 1 && !TURNS && NORM && !RMS), "as upright() is");
    // Registers per thread of the producer's and the consumers' warpgroups, within the 64 Ki. Sums
    // of two blocks take nearly all; those of the loop, of fewer tokens, leave the records' warps
    // what positions behind a prefix need.
    static constexpr bool TIGHT = MI == 2 && !OF_LOOP;
    static constexpr int FEW = CONSUMERS == 2 ? (TIGHT ? 24 : 40) : 32;
    static constexpr int MANY = CONSUMERS == 2 ? (TIGHT ? 240 : 232) : CONSUMERS == 3 ? 160 : 112;
    static_assert(CONSUMERS >= 2 && CONSUMERS <= 4, "register table");
    static_assert(SMEM <= 232448, "shared memory of one CTA");
};

// What one CTA works on.
struct Place {
    int cm, cn, ck;                        // place in the cluster
    int cluster, clusters;                 // index, count
    int tiles_m, tiles_n;                  // in clusters
    int k_begin, k_steps;                  // this CTA's share of K, in stages
};

template <class T> static __device__ __forceinline__ Place place_of(const GemmParams& p) {
    Place c;
    const int rank = T::CLUSTER == 1 ? 0 : (int)ptx::cluster_rank();
    c.ck = rank % T::CK;
    c.cm = rank / T::CK % T::CM;
    c.cn = rank / (T::CK * T::CM);
    c.cluster = blockIdx.x / T::CLUSTER;
    c.clusters = gridDim.x / T::CLUSTER;
    c.tiles_m = ((T::UPRIGHT ? p.rows : p.n) + T::BM * T::CM - 1) / (T::BM * T::CM);
    c.tiles_n = ((T::UPRIGHT ? p.n : p.rows) + T::BN * T::CN - 1) / (T::BN * T::CN);
    const int steps = (p.k + T::K_STEP - 1) / T::K_STEP;
    c.k_begin = steps * c.ck / T::CK;
    c.k_steps = steps * (c.ck + 1) / T::CK - c.k_begin;
    return c;
}

// a / b for 0 ≤ a < 2²⁰ and 0 < b < 2²⁰: (a + ½) / b is farther from an integer than it is rounded.
static __device__ __forceinline__ int quotient(int a, int b) {
    return __float2int_rd(__fdividef((float)a + 0.5f, (float)b));
}

// First feature and first token of this CTA in tile `index`: `group` token tiles side by side, then
// the next weight tile, so that weights pass through L2 once per group.
template <class T>
static __device__ __forceinline__ int2 origin(const Place& c, int index, int group) {
    const int g = quotient(index, c.tiles_m * group);
    const int r = index - g * c.tiles_m * group;
    const int width = min(group, c.tiles_n - g * group);
    const int m = quotient(r, width), n = g * group + r - m * width;
    const int at_m = (m * T::CM + c.cm) * T::BM, at_n = (n * T::CN + c.cn) * T::BN;
    return T::UPRIGHT ? make_int2(at_n, at_m) : make_int2(at_m, at_n);
}

template <class T> struct Smem {
    uint32_t ring, staging, records, positions, columns;  // data
    uint32_t full, empty;          // mbarriers of a stage: filled, left by all its readers
    uint32_t rec_full, rec_empty;  // of a record buffer
    uint32_t turn;                 // of a consumer that takes turns: the other has left the ring
    uint32_t drained, parts_full;  // K-parts: the peers' rings may be written; mine have arrived
    uint32_t old_full;             // the residual has arrived in a consumer's staging
    __device__ __forceinline__ explicit Smem(uint32_t base) {
        ring = base;
        staging = ring + T::RING;
        records = staging + T::CONSUMERS * T::STAGING;
        positions = records + 2 * T::RECORDS;
        columns = positions + 2 * T::POSITIONS;
        full = columns + 2 * T::COLUMNS;
        empty = full + 8 * T::STAGES;
        rec_full = empty + 8 * T::STAGES;
        rec_empty = rec_full + 16;
        turn = rec_empty + 16;
        drained = turn + 16;
        old_full = drained + 8;
        parts_full = old_full + 8 * T::CONSUMERS;
    }
};

}  // namespace gemm
