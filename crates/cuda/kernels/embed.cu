// Prompt tokens to the prompt rows of the prefix stream, with their row statistics.
//
// stream[b, cameras[b] · image_tokens + j] = bf16(scale · table[tokens[b, j]]), j < prompt_len[b];
// scaled = bf16(stream · norm_scale), what the product behind the first norm reads;
// rows from there to `rows` are zeroed (their statistics too). Image rows are left alone.
//
// | what | value |
// |---|---|
// | table | bf16 [vocab, width] |
// | stream | bf16 [batch · rows, width] |
// | scaled | bf16 [batch · rows, width]; null to skip |
// | stats | float2 [batch · rows, parts], see norm_stats.cuh; null to skip |
// | unit | one CTA writes one row |
// | threads | 256; width a multiple of 8 |
// | dynamic smem | 0 |
// | grid | (rows, batch) |
//
// 20 rows of 4 KB: the launch is the price. 1.6 µs at P = 788 (2026-11-22, H200, in a graph of
// dependent launches).
#include "attention_ptx.cuh"
#include "norm_stats.cuh"

/// Parameters of embed.
struct EmbedParams {
    const u32* tokens;   ///< [batch, prompt_tokens]
    const u32* lengths;  ///< [batch, 2]: cameras, prompt length
    const u16* table;    ///< bf16 [vocab, width]
    u16* stream;         ///< bf16 [batch · rows, width]
    u16* scaled;         ///< bf16 [batch · rows, width] or null
    const float* norm_scale;  ///< f32 [width], with `scaled` alone
    float2* stats;       ///< [batch · rows, parts] or null
    u32 vocab;           ///< rows of the table; a larger token reads the last row
    u32 width;           ///< columns, a multiple of 8
    u32 prompt_tokens;   ///< slots of `tokens`
    u32 rows;            ///< prefix rows of a sample (P)
    u32 image_tokens;    ///< rows of one camera
    u32 parts;           ///< entries of a row's statistics (T)
    float scale;         ///< √width
    u32 reserved;        ///< 0
};
static_assert(sizeof(EmbedParams) == 88, "shared with the host");

namespace embed_rows {

/// Sums over the CTA's 256 threads, in a fixed order; valid in every thread.
__device__ __forceinline__ float2 cta_sum(float2 x) {
    __shared__ float2 warps[8];
#pragma unroll
    for (u32 d = 16; d > 0; d >>= 1) {
        x.x += __shfl_xor_sync(~0u, x.x, d);
        x.y += __shfl_xor_sync(~0u, x.y, d);
    }
    if ((threadIdx.x & 31) == 0) warps[threadIdx.x / 32] = x;
    __syncthreads();
    float2 total = make_float2(0.f, 0.f);
#pragma unroll
    for (u32 w = 0; w < 8; ++w) {
        total.x += warps[w].x;
        total.y += warps[w].y;
    }
    return total;
}

/// Two scaled, rounded elements; adds what they become to the sums.
__device__ __forceinline__ u32 scaled(u32 pair, float scale, float2& sums) {
    const u32 y = ptx::pack_bf16(ptx::bf16_lo(pair) * scale, ptx::bf16_hi(pair) * scale);
    const float lo = ptx::bf16_lo(y), hi = ptx::bf16_hi(y);
    sums.x += lo + hi;
    sums.y = fmaf(lo, lo, fmaf(hi, hi, sums.y));
    return y;
}

/// Two elements times a factor each.
__device__ __forceinline__ u32 times(u32 pair, float lo, float hi) {
    return ptx::pack_bf16(ptx::bf16_lo(pair) * lo, ptx::bf16_hi(pair) * hi);
}

}  // namespace embed_rows

extern "C" __global__ void __launch_bounds__(256)
    embed(const __grid_constant__ EmbedParams params) {
    const u32 row = blockIdx.x, sample = blockIdx.y;
    ptx::griddep_launch();
    ptx::griddep_wait();
    const u32 first = params.lengths[2 * sample] * params.image_tokens;
    const u32 prompt = min(params.lengths[2 * sample + 1], params.prompt_tokens);
    if (row < first) return;
    const u64 at = static_cast<u64>(sample) * params.rows + row;
    const u32 slot = row - first, chunks = params.width / 8;
    const bool live = slot < prompt;
    u32 token = live ? params.tokens[static_cast<u64>(sample) * params.prompt_tokens + slot] : 0;
    token = min(token, params.vocab - 1);
    const uint4* from = reinterpret_cast<const uint4*>(params.table) +
                        static_cast<u64>(token) * chunks;
    uint4* to = reinterpret_cast<uint4*>(params.stream) + at * chunks;
    uint4* scaled_to = reinterpret_cast<uint4*>(params.scaled) + at * chunks;
    float2 sums = make_float2(0.f, 0.f);
    for (u32 i = threadIdx.x; i < chunks; i += 256) {
        uint4 x = make_uint4(0, 0, 0, 0);
        if (live) {
            x = from[i];
            x.x = embed_rows::scaled(x.x, params.scale, sums);
            x.y = embed_rows::scaled(x.y, params.scale, sums);
            x.z = embed_rows::scaled(x.z, params.scale, sums);
            x.w = embed_rows::scaled(x.w, params.scale, sums);
        }
        to[i] = x;
        if (params.scaled == nullptr) continue;
        const float4* by = reinterpret_cast<const float4*>(params.norm_scale) + i * 2;
        const float4 a = __ldg(by), b = __ldg(by + 1);
        scaled_to[i] =
            make_uint4(embed_rows::times(x.x, a.x, a.y), embed_rows::times(x.y, a.z, a.w),
                       embed_rows::times(x.z, b.x, b.y), embed_rows::times(x.w, b.z, b.w));
    }
    if (params.stats == nullptr) return;
    const float2 total = embed_rows::cta_sum(sums);
    for (u32 i = threadIdx.x; i < params.parts; i += 256)
        params.stats[at * params.parts + i] = norm_stats::whole_row_part(total, i);
}
