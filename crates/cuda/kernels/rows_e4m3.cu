// y[row, :] = e4m3(factor · rms(x)[row, :]), at most ±448: the input of the prefix tower's MLPs at
// precision fp8. What is read is the stream's copy that the norm's learned scale has multiplied,
// and the statistics beside the stream, as the bf16 products read them; called by src/gemm.rs.
//
// One warp a row. 788 rows of 2048 are 3.2 MB in and 1.6 MB out, both in L2.
#include <cuda_bf16.h>
#include "norm_stats.cuh"
#include "ptx.cuh"

struct RowsE4m3Params {
    const __nv_bfloat16* x;  // [rows][ld], learned scale in it
    const float2* stats;     // [rows][width / 64] partial {Σx, Σx²} of the plain stream
    uint8_t* out;            // [rows][width]
    uint32_t rows;
    uint32_t width;          // a multiple of 256, at most 2048
    uint32_t ld;             // elements from one row of x to the next
    float factor;            // a power of two
};
static_assert(sizeof(RowsE4m3Params) == 40, "the host twin mirrors RowsE4m3Params");

extern "C" __global__ void __launch_bounds__(128)
rows_e4m3(const __grid_constant__ RowsE4m3Params p) {
    constexpr int RUNS = 8;  // of 8 elements a lane
    const uint32_t lane = threadIdx.x % 32, row = blockIdx.x * 4 + threadIdx.x / 32;
    ptx::grid_launch_dependents();
    ptx::grid_dependency_wait();
    if (row >= p.rows) return;
    const uint4* from = reinterpret_cast<const uint4*>(p.x + (size_t)row * p.ld);
    const uint32_t pieces = p.width / 8, parts = p.width / 64;
    uint4 v[RUNS];
#pragma unroll
    for (int r = 0; r < RUNS; r++)
        if (r * 32 + lane < pieces) v[r] = __ldcg(from + r * 32 + lane);
    const float2 part = lane < parts ? __ldcg(p.stats + (size_t)row * parts + lane)
                                     : make_float2(0.f, 0.f);
    float2 total = part;
#pragma unroll
    for (int d = 16; d > 0; d /= 2) total.y += __shfl_xor_sync(~0u, total.y, d);
    const float scale = p.factor * norm_stats::rms_scale(total, 1.f / p.width);
    uint2* to = reinterpret_cast<uint2*>(p.out + (size_t)row * p.width);
#pragma unroll
    for (int r = 0; r < RUNS; r++) {
        if (r * 32 + lane >= pieces) continue;
        const uint32_t* w = &v[r].x;
        float f[8];
        for (int i = 0; i < 4; i++) {
            f[2 * i] = ptx::bf16_lo(w[i]) * scale;
            f[2 * i + 1] = ptx::bf16_hi(w[i]) * scale;
        }
        to[r * 32 + lane] = make_uint2(ptx::pack_e4m3(f[0], f[1], f[2], f[3]),
                                       ptx::pack_e4m3(f[4], f[5], f[6], f[7]));
    }
}
