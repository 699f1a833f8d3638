// SigLIP attention: out = softmax(scale · q·kᵀ)·v inside each image, 16 heads of 72, 256 tokens,
// no mask.
//
// | what | value |
// |---|---|
// | qkv | bf16 [images · 256, 3 · 1152]: q | k | v, each head-major |
// | out | bf16 [images · 256, 1152] |
// | tile | one head's 128 queries × 256 keys; two warpgroups of 64 queries |
// | smem | q, k: columns 0-63 in a 128-byte swizzled tile, 64-71 and 8 zeros (out of bounds) in |
// |      | a 32-byte swizzled one; v: five 32-byte swizzled tiles; q 20 KB, k and v 40 KB each |
// | arithmetic | wgmma m64n128k16 (S, two halves of keys), m64n72k16 (O, P in registers), FP32 |
// | overlap | keys arrive in halves; S of the second half runs under the softmax of the first |
// | threads | 256 |
// | dynamic smem | 102,432 bytes |
// | grid | (2, 16, images) |
// | maps | qkv as [images · 256, 48, 72], strides 6,912 and 144 bytes, bf16, out of bounds zero: |
// |      | `wide` box [128, 1, 64] with 128-byte swizzle, `rest` box [128, 1, 16] with 32-byte |
//
// Limit for 3 images: 0.9 GFLOP and 7 MB of L2 traffic, about 2 µs; 3.1 M exponentials alone take
// 0.8 µs of the whole chip. Bit-stable: no atomics. Measured 2026-11-22, H200, nvcc 13.0, in a
// graph of dependent launches: 3 images 6.7 µs, 6 11.0, 24 35.2, 192 240. Fed by cp.async instead
// of TMA it took 9.2; two CTAs of 64 queries an SM 10.3.
#include "attention_ptx.cuh"

/// Parameters of attention_vision_sm90.
struct AttentionVisionParams {
    u16* out;     ///< bf16 [images · 256, 1152]
    float scale;  ///< of q·kᵀ, above 0
    u32 reserved; ///< 0
};
static_assert(sizeof(AttentionVisionParams) == 16, "shared with the host");

namespace vision {

constexpr u32 kTokens = 256, kHeads = 16, kDim = 72, kWidth = kHeads * kDim, kHalf = 128;
constexpr u32 kWide = kHalf * 128, kRest = kHalf * 32, kTile = kWide + kRest;  // of 128 rows
constexpr u32 kBarriers = 5 * kTile, kSmem = kBarriers + 32;
static_assert(kSmem == 102432, "the host asks for this much");
constexpr u32 kThreads = 256;

/// Where 128 rows of q (0) or k (1, 2) lie, and of v: wide parts first, for their alignment.
__device__ __forceinline__ u32 wide(u32 tile) { return tile * kWide; }
__device__ __forceinline__ u32 rest(u32 tile) { return 3 * kWide + tile * kRest; }
__device__ __forceinline__ u32 values_at(u32 half) { return rest(3 + half * 5); }

/// 128 rows of one head's q or k, for products along the columns.
__device__ __forceinline__ void load(u32 base, u32 tile, const AttentionTensorMap* wide_map,
                                     const AttentionTensorMap* rest_map, u32 bar, int slot,
                                     int row) {
    ptx::tma_load(base + wide(tile), wide_map, bar, 0, slot, row);
    ptx::tma_load(base + rest(tile), rest_map, bar, 64, slot, row);
}

/// 128 rows of one head's v, for products along the rows: five blocks of 16 columns, all alike.
__device__ __forceinline__ void load_values(u32 base, u32 half, const AttentionTensorMap* rest_map,
                                            u32 bar, int slot, int row) {
    for (u32 c = 0; c < 5; ++c)
        ptx::tma_load(base + values_at(half) + c * kRest, rest_map, bar, c * 16, slot, row);
}

/// s = q·kᵀ for this warpgroup's 64 queries and one half of the keys.
__device__ __forceinline__ void scores(float (&s)[64], u32 base, u32 half) {
    const u32 group = threadIdx.x / 128;
    ptx::wgmma_touch(s);
    ptx::wgmma_fence();
    const u64 a = ptx::wgmma_descriptor(base + wide(0) + group * 64 * 128, 16, 1024,
                                        ptx::kSwizzle128);
    const u64 b = ptx::wgmma_descriptor(base + wide(1 + half), 16, 1024, ptx::kSwizzle128);
#pragma unroll
    for (u32 i = 0; i < 4; ++i) ptx::wgmma_ss(s, a + i * 2, b + i * 2, i > 0);
    ptx::wgmma_ss(s,
                  ptx::wgmma_descriptor(base + rest(0) + group * 64 * 32, 16, 256,
                                        ptx::kSwizzle32),
                  ptx::wgmma_descriptor(base + rest(1 + half), 16, 256, ptx::kSwizzle32), 1);
    ptx::wgmma_commit();
}

/// o (+)= p·v over one half of the keys.
__device__ __forceinline__ void values(float (&o)[36], const u32 (&p)[32], u32 base, u32 half) {
    ptx::wgmma_touch(o);
    ptx::wgmma_fence();
    const u64 b = ptx::wgmma_descriptor(base + values_at(half), kRest, 256, ptx::kSwizzle32);
#pragma unroll
    for (u32 i = 0; i < 8; ++i)
        ptx::wgmma_rs(o, p + 4 * i, b + (i * 512 >> 4), half > 0 || i > 0);
    ptx::wgmma_commit();
}

/// Largest score of row r of the thread's two, over its quad.
__device__ __forceinline__ float row_max(const float (&s)[64], u32 r) {
    float m = s[2 * r];
#pragma unroll
    for (u32 j = 0; j < 16; ++j) m = fmaxf(m, fmaxf(s[4 * j + 2 * r], s[4 * j + 2 * r + 1]));
    return ptx::quad_max(m);
}

/// p = bf16(exp2((s − max)·factor)) of row r; returns the thread's part of the row's sum.
__device__ __forceinline__ float soften(u32 (&p)[32], const float (&s)[64], u32 r, float max,
                                        float factor) {
    const float shift = max * factor;
    float sum = 0.f;
#pragma unroll
    for (u32 j = 0; j < 16; ++j) {
        const float a = ptx::exp2_fast(fmaf(s[4 * j + 2 * r], factor, -shift));
        const float b = ptx::exp2_fast(fmaf(s[4 * j + 2 * r + 1], factor, -shift));
        p[2 * j + r] = ptx::pack_bf16(a, b);
        sum += a + b;
    }
    return sum;
}

__device__ __forceinline__ void store(const float (&o)[36], const float (&inverse)[2], u16* out) {
    const u32 q = threadIdx.x & 3;
#pragma unroll
    for (u32 r = 0; r < 2; ++r) {
        u16* row = out + r * 8 * kWidth;
#pragma unroll
        for (u32 g = 0; g < 2; ++g) {
            u32 v[4];
#pragma unroll
            for (u32 j = 0; j < 4; ++j) {
                const u32 at = (g * 4 + j) * 4 + 2 * r;
                v[j] = ptx::pack_bf16(o[at] * inverse[r], o[at + 1] * inverse[r]);
            }
            ptx::quad_transpose(v);
            *reinterpret_cast<uint4*>(row + g * 32 + q * 8) = make_uint4(v[0], v[1], v[2], v[3]);
        }
        *reinterpret_cast<u32*>(row + 64 + q * 2) =
            ptx::pack_bf16(o[32 + 2 * r] * inverse[r], o[33 + 2 * r] * inverse[r]);
    }
}

}  // namespace vision

extern "C" __global__ void __launch_bounds__(vision::kThreads, 1)
    attention_vision_sm90(const __grid_constant__ AttentionVisionParams params,
                          const __grid_constant__ AttentionTensorMap wide_map,
                          const __grid_constant__ AttentionTensorMap rest_map) {
    using namespace vision;
    extern __shared__ __align__(1024) u8 smem[];
    const u32 base = ptx::smem_address(smem), warp = threadIdx.x / 32, lane = threadIdx.x & 31;
    const u32 first = blockIdx.x * kHalf, head = blockIdx.y, image = blockIdx.z;
    const u32 bar = base + kBarriers;  // one a step: q and k 0, k 1, v 0, v 1
    ptx::griddep_launch();
    if (threadIdx.x == 0) {
        for (u32 i = 0; i < 4; ++i) ptx::barrier_init(bar + 8 * i, 1);
        ptx::barrier_init_done();
        ptx::tma_prefetch(&wide_map);
        ptx::tma_prefetch(&rest_map);
        for (u32 i = 0; i < 4; ++i) ptx::barrier_expect(bar + 8 * i, i == 0 ? 2 * kTile : kTile);
    }
    __syncthreads();
    ptx::griddep_wait();
    if (threadIdx.x == 0) {
        const int row = image * kTokens;
        load(base, 0, &wide_map, &rest_map, bar, head, row + first);
        for (u32 i = 0; i < 2; ++i)
            load(base, 1 + i, &wide_map, &rest_map, bar + 8 * i, kHeads + head, row + i * kHalf);
        for (u32 i = 0; i < 2; ++i)
            load_values(base, i, &rest_map, bar + 16 + 8 * i, 2 * kHeads + head, row + i * kHalf);
    }
    __syncwarp();

    float s0[64], s1[64], o[36];
    u32 p0[32], p1[32];
    float max[2], sum[2], scale[2], inverse[2];
    const float factor = params.scale * ptx::kLog2e;
    ptx::barrier_wait(bar, 0);
    scores(s0, base, 0);
    ptx::barrier_wait(bar + 8, 0);
    scores(s1, base, 1);
    ptx::wgmma_wait<1>();
    ptx::wgmma_touch(s0);
#pragma unroll
    for (u32 r = 0; r < 2; ++r) {
        max[r] = row_max(s0, r);
        sum[r] = soften(p0, s0, r, max[r], factor);
    }
    ptx::wgmma_wait<0>();
    ptx::wgmma_touch(s1);
    ptx::barrier_wait(bar + 16, 0);
    values(o, p0, base, 0);
    ptx::wgmma_wait<0>();  // both halves of the weights at once do not fit the registers
    ptx::wgmma_touch(o);
#pragma unroll
    for (u32 r = 0; r < 2; ++r) {
        const float top = fmaxf(max[r], row_max(s1, r));
        scale[r] = ptx::exp2_fast((max[r] - top) * factor);
        sum[r] = fmaf(sum[r], scale[r], soften(p1, s1, r, top, factor));
    }
#pragma unroll
    for (u32 j = 0; j < 36; ++j) o[j] *= scale[(j >> 1) & 1];
    ptx::barrier_wait(bar + 24, 0);
    values(o, p1, base, 1);
#pragma unroll
    for (u32 r = 0; r < 2; ++r) inverse[r] = 1.f / ptx::quad_sum(sum[r]);
    ptx::wgmma_wait<0>();
    ptx::wgmma_touch(o);
    const u32 row = image * kTokens + first + warp * 16 + lane / 4;
    store(o, inverse, params.out + static_cast<u64>(row) * kWidth + head * kDim);
}
