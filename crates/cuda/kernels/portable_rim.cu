// y = norm(x) · Wᵀ, then bias and epilogue, in f32 throughout: the small matrices at the rim of
// the network (actions in and out, state). x rows of a view (bf16 or f32), W f32 [n, k].
// A warp owns one output column, a block 8 columns × 8 rows; warp r brings row r, normalised, to
// shared memory. Up to 1024 columns the weights are in registers before the dependency is met, so
// that a launch costs little more than its latency.
#include "portable.cuh"

using namespace portable;

constexpr u32 ROWS = 8, COLUMNS = 8;

struct RimParams {
    View input;
    u64 weight;      // f32 [n][k]
    u64 modulation;  // f32 [k], the learned scale, or 0. Adaptive: [3·k], 1 + scale ‖ shift ‖ gate
    u32 rows;
    u32 k;
    u32 norm;
    u32 pad;
    Output output;
};
static_assert(sizeof(RimParams) == 32 + 16 + 16 + sizeof(Output), "shared with the host");

constexpr u32 HELD = 8;  // float4 of W per lane: 1024 columns

// 8 values of a row from column `at` on, in one load of bf16 or two of f32.
static __device__ __forceinline__ void load8(float (&x)[8], const View& view, u64 at) {
    if (view.f32) {
        const float4* from = (const float4*)((const float*)view.base + at);
        const float4 a = from[0], b = from[1];
        x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w;
        x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
    } else {
        const uint4 v = *(const uint4*)((const u16*)view.base + at);
        const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            x[2 * i] = __uint_as_float(words[i] << 16);
            x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
        }
    }
}

// Row `row` to shared memory, f32; zeros past the last row.
static __device__ __forceinline__ void bring(const RimParams& p, float* to, u32 row, u32 lane,
                                             bool wide) {
    const u64 at = row < p.rows ? p.input.offset(row) : 0;
    if (row >= p.rows) {
        for (u32 i = lane; i < p.k; i += 32) to[i] = 0.f;
    } else if (wide) {
#pragma unroll 4
        for (u32 i = lane * 8; i < p.k; i += 256) {
            float x[8];
            load8(x, p.input, at + i);
#pragma unroll
            for (int j = 0; j < 8; j += 4)
                *(float4*)(to + i + j) = make_float4(x[j], x[j + 1], x[j + 2], x[j + 3]);
        }
    } else {
        for (u32 i = lane; i < p.k; i += 32) to[i] = p.input.load(at + i);
    }
    __syncwarp();
}

static __device__ __forceinline__ void normalise(const RimParams& p, float* x, u32 lane) {
    float sum = 0.f, squares = 0.f;
    if (p.norm == LAYER)
        for (u32 i = lane; i < p.k; i += 32) sum += x[i];
    const float mean = p.norm == LAYER ? warp_sum(sum) / p.k : 0.f;
    for (u32 i = lane; i < p.k; i += 32) squares += (x[i] - mean) * (x[i] - mean);
    const float scale = rsqrtf(warp_sum(squares) / p.k + 1e-6f);
    const float* m = (const float*)p.modulation;
#pragma unroll 8
    for (u32 i = lane; i < p.k; i += 32) {
        float v = (x[i] - mean) * scale;
        if (m) v *= m[i];
        x[i] = p.norm == ADAPTIVE ? v + m[p.k + i] : v;
    }
}

extern "C" __global__ void __launch_bounds__(256)
portable_rim(const __grid_constant__ RimParams p) {
    extern __shared__ __align__(16) float x[];  // [ROWS][k]
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const u32 m0 = blockIdx.x * ROWS, column = blockIdx.y * COLUMNS + warp;
    const float* w = (const float*)p.weight + (u64)column * p.k;
    const bool held = p.k % 4 == 0 && p.k <= HELD * 128;
    float4 mine[HELD];
#pragma unroll
    for (u32 j = 0; j < HELD; j++) {
        const u32 i = j * 128 + lane * 4;
        const bool in = held && column < p.output.n && i < p.k;
        mine[j] = in ? *(const float4*)(w + i) : make_float4(0.f, 0.f, 0.f, 0.f);
    }
    launch_dependents();
    wait_for_predecessors();

    const u32 bytes = p.input.f32 ? 4 : 2;
    const bool wide = p.k % 8 == 0 && (p.input.base | (u64)p.input.ld * bytes) % 16 == 0;
    bring(p, x + (u64)warp * p.k, m0 + warp, lane, wide);
    if (p.norm != NONE) normalise(p, x + (u64)warp * p.k, lane);
    __syncthreads();
    if (column >= p.output.n) return;
    float sums[ROWS] = {};
    if (held) {
#pragma unroll
        for (u32 j = 0; j < HELD; j++) {
            const u32 i = j * 128 + lane * 4;
            if (i >= p.k) break;
#pragma unroll
            for (u32 r = 0; r < ROWS; r++) {
                const float4 v = *(const float4*)(x + r * p.k + i);
                sums[r] += mine[j].x * v.x + mine[j].y * v.y + mine[j].z * v.z + mine[j].w * v.w;
            }
        }
    } else {
        for (u32 i = lane; i < p.k; i += 32) {
            const float f = w[i];
#pragma unroll
            for (u32 r = 0; r < ROWS; r++) sums[r] += f * x[r * p.k + i];
        }
    }
    float y = 0.f;
#pragma unroll
    for (u32 r = 0; r < ROWS; r++) {
        const float sum = warp_sum(sums[r]);
        if (lane == r) y = sum;
    }
    if (lane < ROWS && m0 + lane < p.rows) finish(p.output, m0 + lane, column, y);
}
