// Row-wise work: normalisation before a product, image patches, token rows.
#include "portable.cuh"

using namespace portable;

struct NormParams {
    View input;
    u64 modulation;  // f32 [k], the learned scale, or 0. Adaptive: [3·k], 1 + scale ‖ shift ‖ gate
    u64 out;         // bf16 [rows][ld], zero beyond k
    u32 rows;
    u32 k;
    u32 ld;
    u32 norm;
    u32 e4m3;           // 1: rows become E4M3 numbers, each row times a power of two
    float gate_scale;   // then: what takes the weights' powers out of the row's products
    float up_scale;
    float down_scale;
    u64 up;             // then: float2 [rows], factors of gate's and up's products
    u64 down;           // float2 [rows], of down's, and 0
    u64 channels;       // bf16 [k], powers of two by which channels count
};
static_assert(sizeof(NormParams) == 32 + 16 + 16 + 40, "shared with the host");

// The largest power of two that is at most v, for 2^-60 ≤ v ≤ 2^60.
static __device__ __forceinline__ float power_within(float v) {
    v = fminf(fmaxf(v, 8.67361738e-19f), 1.15292150e18f);
    return __uint_as_float(__float_as_uint(v) & 0x7f800000u);
}

// What a lane knows of a row.
struct Extent {
    float largest = 0.f, squares = 0.f, weighted = 0.f;

    __device__ __forceinline__ void add(float v, float channel) {
        largest = fmaxf(largest, fabsf(v));
        squares += v * v;
        weighted += v * channel * (v * channel);
    }
};

// What a row is multiplied by before it is rounded; leaves the factors of its products. As
// rows_e4m3.cu.
static __device__ __forceinline__ float scale_of_row(const NormParams& p, u32 row, u32 lane,
                                                     const Extent& e) {
    const float squares = warp_sum(e.squares), weighted = warp_sum(e.weighted);
    const float t = power_within(448.f / warp_max(e.largest));
    const float q = power_within(1.f / fminf(squares, weighted));
    if (lane == 0) {
        ((float2*)p.up)[row] = make_float2(p.gate_scale / t, p.up_scale * q / t);
        ((float2*)p.down)[row] = make_float2(p.down_scale / q, 0.f);
    }
    return t;
}

// A row of at most 2,048 elements, fetched once and kept: lane l has every 32nd run of eight.
static __device__ __forceinline__ void norm_kept(const NormParams& p, u32 row, u32 lane) {
    constexpr u32 RUNS = 8;
    const u16* from = (const u16*)p.input.base + p.input.offset(row);
    const float* m = (const float*)p.modulation;
    u16* out = (u16*)p.out + (u64)row * p.ld;
    float x[RUNS][8];
    float sum = 0.f, squares = 0.f;
#pragma unroll
    for (u32 r = 0; r < RUNS; r++) {
        const u32 at = (r * 32 + lane) * 8;
        for (u32 e = 0; e < 8; e++) x[r][e] = 0.f;
        if (at < p.k) load8(x[r], from + at);
    }
#pragma unroll
    for (u32 r = 0; r < RUNS; r++)
        for (u32 e = 0; e < 8; e++) sum += x[r][e];
    const float mean = p.norm == LAYER ? warp_sum(sum) / p.k : 0.f;
#pragma unroll
    for (u32 r = 0; r < RUNS; r++) {
        if ((r * 32 + lane) * 8 >= p.k) continue;
        for (u32 e = 0; e < 8; e++) squares += (x[r][e] - mean) * (x[r][e] - mean);
    }
    const float scale = rsqrtf(warp_sum(squares) / p.k + 1e-6f);
#pragma unroll
    for (u32 r = 0; r < RUNS; r++) {
        const u32 at = (r * 32 + lane) * 8;
        if (at >= p.k) continue;
        float by[8] = {1, 1, 1, 1, 1, 1, 1, 1}, shift[8] = {};
        if (m) load8(by, m + at);
        if (p.norm == ADAPTIVE) load8(shift, m + p.k + at);
        for (u32 e = 0; e < 8; e++) x[r][e] = (x[r][e] - mean) * scale * by[e] + shift[e];
    }
    if (p.e4m3) {
        Extent extent;
        for (u32 r = 0; r < RUNS; r++) {
            const u32 at = (r * 32 + lane) * 8;
            float channels[8] = {};
            if (at < p.k) load8(channels, (const u16*)p.channels + at);
            for (u32 e = 0; e < 8; e++) extent.add(x[r][e], channels[e]);
        }
        const float t = scale_of_row(p, row, lane, extent);
        for (u32 r = 0; r < RUNS; r++)
            for (u32 e = 0; e < 8; e++) x[r][e] = round_e4m3(x[r][e] * t);
    }
#pragma unroll
    for (u32 r = 0; r < RUNS; r++) {
        const u32 at = (r * 32 + lane) * 8;
        if (at < p.k) store8(out + at, x[r]);
    }
}

// out[row, :] = norm(x[row, :]), one warp per row: mean, then squares about it.
extern "C" __global__ void __launch_bounds__(128)
portable_norm(const __grid_constant__ NormParams p) {
    const u32 lane = threadIdx.x % 32, row = blockIdx.x * 4 + threadIdx.x / 32;
    launch_dependents();
    wait_for_predecessors();
    if (row >= p.rows) return;
    if (p.k % 8 == 0 && p.k <= 2048 && p.ld == p.k && rows_in_eights(p.input))
        return norm_kept(p, row, lane);
    const u64 at = p.input.offset(row);
    float sum = 0.f, squares = 0.f;
    if (p.norm == LAYER)
        for (u32 i = lane; i < p.k; i += 32) sum += p.input.load(at + i);
    const float mean = p.norm == LAYER ? warp_sum(sum) / p.k : 0.f;
    for (u32 i = lane; i < p.k; i += 32) {
        const float d = p.input.load(at + i) - mean;
        squares += d * d;
    }
    const float scale = rsqrtf(warp_sum(squares) / p.k + 1e-6f);
    const float* m = (const float*)p.modulation;
    const auto value = [&](u32 i) {
        float v = (p.input.load(at + i) - mean) * scale;
        if (m) v *= m[i];
        return p.norm == ADAPTIVE ? v + m[p.k + i] : v;
    };
    float t = 0.f;
    if (p.e4m3) {
        Extent extent;
        for (u32 i = lane; i < p.k; i += 32)
            extent.add(value(i), from_bf16(((const u16*)p.channels)[i]));
        t = scale_of_row(p, row, lane, extent);
    }
    u16* out = (u16*)p.out + (u64)row * p.ld;
    for (u32 i = lane; i < p.ld; i += 32) {
        const float v = i < p.k ? value(i) : 0.f;
        out[i] = to_bf16(p.e4m3 ? round_e4m3(v * t) : v);
    }
}

struct PatchifyParams {
    u64 images;   // u8 [images][side][side][3]
    u64 patches;  // bf16 [images · tokens][ld]
    u32 side;
    u32 patch;
    u32 ld;
    u32 pad;
};
static_assert(sizeof(PatchifyParams) == 32, "shared with the host");

// patches[p, (row, column, channel)] = pixel − 128, exact in bf16. One block per patch.
extern "C" __global__ void __launch_bounds__(128)
portable_patchify(const __grid_constant__ PatchifyParams p) {
    const u32 grid = p.side / p.patch, tokens = grid * grid, line = p.patch * 3;
    const u32 image = blockIdx.x / tokens, token = blockIdx.x % tokens;
    launch_dependents();
    wait_for_predecessors();
    const u8* from = (const u8*)p.images + (u64)image * p.side * p.side * 3;
    u16* out = (u16*)p.patches + (u64)blockIdx.x * p.ld;
    for (u32 i = threadIdx.x; i < p.ld; i += blockDim.x) {
        float v = 0.f;
        if (i < p.patch * line) {
            const u32 y = token / grid * p.patch + i / line;
            v = (float)from[(y * p.side + token % grid * p.patch) * 3 + i % line] - 128.f;
        }
        out[i] = to_bf16(v);
    }
}

struct EmbedParams {
    View out;      // all prefix rows of every sample
    u64 tokens;    // u32 [samples][slots]
    u64 table;     // bf16 [vocab][width]
    u64 lengths;   // u32 [samples][2]: cameras, prompt tokens
    u32 slots;
    u32 width;
    u32 image_tokens;
    float scale;
};
static_assert(sizeof(EmbedParams) == 32 + 24 + 16, "shared with the host");

// Stream row cameras · image_tokens + j = scale · table[tokens[j]]; rows behind the prompt become
// zero (attention multiplies their values by zero: they must be finite). One block per row.
extern "C" __global__ void __launch_bounds__(128)
portable_embed(const __grid_constant__ EmbedParams p) {
    const u32 row = p.image_tokens + blockIdx.x, sample = blockIdx.y;
    launch_dependents();
    wait_for_predecessors();
    const u32* l = (const u32*)p.lengths + 2 * sample;
    const u32 begin = l[0] * p.image_tokens;
    if (row < begin) return;
    const u64 at = p.out.offset(sample * p.out.count + row);
    const u16* from = 0;
    if (row < begin + l[1]) {
        const u32 token = ((const u32*)p.tokens)[(u64)sample * p.slots + row - begin];
        from = (const u16*)p.table + (u64)token * p.width;
    }
    for (u32 i = threadIdx.x; i < p.width; i += blockDim.x)
        p.out.store(at + i, from ? p.scale * from_bf16(from[i]) : 0.f);
}
