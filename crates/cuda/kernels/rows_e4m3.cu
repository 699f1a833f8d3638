// y[row, :] = e4m3(2^t · rms(x)[row, :]): the input of the prefix tower's MLPs at precision fp8,
// and what takes the powers of two out of their products again. What is read is the stream's copy
// that the norm's learned scale has multiplied, and the statistics beside the stream, as the bf16
// products read them; called by src/gemm.rs.
//
// t is the largest that keeps the row's largest value within 448. Hidden values are bounded by a
// squared length n of the row and by their unit's weights (fp8.rs of the model's crate): of 2^q, at
// most 1 / n, and the unit's own power of two, which lies in the weights. n is the smaller of the
// row's own and that of its values times their channels' powers.
//
// Two warps a row: 788 rows of 2048, 3.2 MB in and 1.6 MB out, both in L2, take 4.15 µs in the
// replay (H100, 2026-11-27; one warp a row 5.1).
#include <cuda_bf16.h>
#include "norm_stats.cuh"
#include "ptx.cuh"

struct RowsE4m3Params {
    const __nv_bfloat16* x;  // [rows][ld], learned scale in it
    const float2* stats;     // [rows][width / 64] partial {Σx, Σx²} of the plain stream
    const __nv_bfloat16* channels;  // [width] powers of two by which channels count
    uint8_t* out;            // [rows][width]
    float2* up;              // [rows] factors of gate's and up's products
    float2* down;            // [rows] {factor of down's product, 0}
    uint32_t rows;
    uint32_t width;          // a multiple of 256, at most 2048
    uint32_t ld;             // elements from one row of x to the next
    float gate_scale;        // 2^-gate, 2^-up, 2^-down of the weights
    float up_scale;
    float down_scale;
};
static_assert(sizeof(RowsE4m3Params) == 72, "the host twin mirrors RowsE4m3Params");

// The largest power of two that is at most v, for 2^-60 ≤ v ≤ 2^60.
static __device__ __forceinline__ float power_within(float v) {
    v = fminf(fmaxf(v, 8.67361738e-19f), 1.15292150e18f);
    return __uint_as_float(__float_as_uint(v) & 0x7f800000u);
}

extern "C" __global__ void __launch_bounds__(256)
rows_e4m3(const __grid_constant__ RowsE4m3Params p) {
    constexpr int RUNS = 4;  // of 8 elements a lane
    __shared__ float parts_of_row[4][2][3];
    const uint32_t lane = threadIdx.x % 32, first = threadIdx.x % 64, half = first / 32;
    const uint32_t of_block = threadIdx.x / 64, row = blockIdx.x * 4 + of_block;
    const uint32_t pieces = p.width / 8, parts = p.width / 64;
    ptx::grid_launch_dependents();
    uint4 v[RUNS], channels[RUNS];
#pragma unroll
    for (int r = 0; r < RUNS; r++) {
        channels[r] = make_uint4(0, 0, 0, 0);
        if (r * 64 + first < pieces)
            channels[r] = __ldg(reinterpret_cast<const uint4*>(p.channels) + r * 64 + first);
    }
    ptx::grid_dependency_wait();
    if (row >= p.rows) return;
    const uint4* from = reinterpret_cast<const uint4*>(p.x + (size_t)row * p.ld);
#pragma unroll
    for (int r = 0; r < RUNS; r++) {
        v[r] = make_uint4(0, 0, 0, 0);
        if (r * 64 + first < pieces) v[r] = __ldcg(from + r * 64 + first);
    }
    float2 total = lane < parts ? __ldcg(p.stats + (size_t)row * parts + lane)
                                : make_float2(0.f, 0.f);
#pragma unroll
    for (int d = 16; d > 0; d /= 2) total.y += __shfl_xor_sync(~0u, total.y, d);
    const float rstd = norm_stats::rms_scale(total, 1.f / p.width);
    float largest = 0.f, squares = 0.f, weighted = 0.f;
#pragma unroll
    for (int r = 0; r < RUNS; r++) {
        const uint32_t *w = &v[r].x, *c = &channels[r].x;
        for (int i = 0; i < 4; i++) {
            const float lo = ptx::bf16_lo(w[i]) * rstd, hi = ptx::bf16_hi(w[i]) * rstd;
            const float a = lo * ptx::bf16_lo(c[i]), b = hi * ptx::bf16_hi(c[i]);
            largest = fmaxf(largest, fmaxf(fabsf(lo), fabsf(hi)));
            squares = fmaf(lo, lo, fmaf(hi, hi, squares));
            weighted = fmaf(a, a, fmaf(b, b, weighted));
        }
    }
#pragma unroll
    for (int d = 16; d > 0; d /= 2) {
        squares += __shfl_xor_sync(~0u, squares, d);
        weighted += __shfl_xor_sync(~0u, weighted, d);
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, d));
    }
    float(&both)[2][3] = parts_of_row[of_block];
    if (lane == 0) both[half][0] = largest, both[half][1] = squares, both[half][2] = weighted;
    ptx::named_barrier(1 + of_block, 64);
    largest = fmaxf(both[0][0], both[1][0]);
    squares = fminf(both[0][1] + both[1][1], both[0][2] + both[1][2]);
    const float t = power_within(448.f / largest), q = power_within(1.f / squares);
    if (first == 0) {
        p.up[row] = make_float2(p.gate_scale / t, p.up_scale * q / t);
        p.down[row] = make_float2(p.down_scale / q, 0.f);
    }
    const float scale = t * rstd;
    uint2* to = reinterpret_cast<uint2*>(p.out + (size_t)row * p.width);
#pragma unroll
    for (int r = 0; r < RUNS; r++) {
        if (r * 64 + first >= pieces) continue;
        const uint32_t* w = &v[r].x;
        float f[8];
        for (int i = 0; i < 4; i++) {
            f[2 * i] = ptx::bf16_lo(w[i]) * scale;
            f[2 * i + 1] = ptx::bf16_hi(w[i]) * scale;
        }
        to[r * 64 + first] = make_uint2(ptx::pack_e4m3(f[0], f[1], f[2], f[3]),
                                        ptx::pack_e4m3(f[4], f[5], f[6], f[7]));
    }
}
