// out = softmax(scale · q·kᵀ + mask)·v for any head width up to 256, in f32.
// One warp per (query, head), 32 keys at a time: each lane scores one key, then the lanes share
// out the columns of the values; running maximum and sum. The reference for the tensor-core
// kernels and the fallback for head widths they do not take.
#include "portable.cuh"

using namespace portable;

enum Mask : u32 { ALL, PREFIX, SUFFIX };

struct AttentionParams {
    View q, k, v, out;
    u64 lengths;       // u32 [samples][2]: cameras, prompt tokens
    u32 heads;
    u32 kv_heads;      // 1 or heads
    u32 head_dim;
    u32 rows;          // query rows of all groups
    u32 mask;
    u32 image_tokens;
    u32 prefix_rows;   // Suffix: prefix slots of the cache
    u32 state_row;     // Suffix: query row 0 sees no suffix key but the first
    float scale;       // of q·kᵀ
    u32 pad;
};
static_assert(sizeof(AttentionParams) == 4 * 32 + 8 + 40, "shared with the host");

constexpr int PARTS = 8;    // 32 lanes × 8 = 256 columns
constexpr u32 WARPS = 4;

// q · k for this lane's key; q lies in shared memory, f32.
static __device__ __forceinline__ float score(const float* q, const u16* k, u32 d, bool wide) {
    float dot = 0.f;
    if (wide) {
#pragma unroll 4
        for (u32 c = 0; c < d; c += 8) {
            const uint4 v = *(const uint4*)(k + c);
            const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                dot += q[c + 2 * i] * __uint_as_float(words[i] << 16);
                dot += q[c + 2 * i + 1] * __uint_as_float(words[i] & 0xffff0000u);
            }
        }
    } else {
        for (u32 c = 0; c < d; c++) dot += q[c] * from_bf16(k[c]);
    }
    return dot;
}

extern "C" __global__ void __launch_bounds__(32 * WARPS)
portable_attention(const __grid_constant__ AttentionParams p) {
    __shared__ float queries[WARPS][32 * PARTS];
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const u32 work = blockIdx.x * WARPS + warp;
    launch_dependents();
    wait_for_predecessors();
    if (work >= p.rows * p.heads) return;
    const u32 row = work / p.heads, head = work % p.heads, d = p.head_dim;
    const u32 group = row / p.q.count, i = row % p.q.count;
    const u32 kv_col = p.kv_heads == 1 ? 0 : head * d;
    const u64 q_at = p.q.offset(row) + head * d;
    float* q = queries[warp];
    for (u32 c = lane; c < d; c += 32) q[c] = p.scale * p.q.load(q_at + c);
    __syncwarp();

    u32 prefix = p.k.count, suffix = 0;
    if (p.mask != ALL) {
        const u32* l = (const u32*)p.lengths + 2 * group;
        prefix = l[0] * p.image_tokens + l[1];
    }
    if (p.mask == SUFFIX) suffix = p.state_row && i == 0 ? 1 : p.k.count - p.prefix_rows;
    const u32 keys = prefix + suffix;
    const u16* k0 = (const u16*)p.k.base + p.k.offset(group * p.k.count) + kv_col;
    const u16* v0 = (const u16*)p.v.base + p.v.offset(group * p.v.count) + kv_col;
    const bool wide = d % 8 == 0 && ((u64)k0 | (u64)p.k.ld * 2) % 16 == 0;

    float sum[PARTS] = {}, top = __int_as_float(0xff800000), total = 0.f;
    for (u32 first = 0; first < keys; first += 32) {
        // Lanes past the last key repeat it, so that the warp stays together.
        const u32 s = min(first + lane, keys - 1);
        const u32 key = s < prefix ? s : p.prefix_rows + s - prefix;
        const float dot = score(q, k0 + (u64)key * p.k.ld, d, wide);
        const float x = first + lane < keys ? dot : __int_as_float(0xff800000);
        const float high = fmaxf(top, warp_max(x));
        const float shrink = __expf(top - high), weight = __expf(x - high);
        top = high;
        total = total * shrink + warp_sum(weight);
#pragma unroll
        for (int c = 0; c < PARTS; c++) sum[c] *= shrink;
        const u32 count = min(32u, keys - first);
#pragma unroll 4
        for (u32 j = 0; j < count; j++) {
            const float f = __shfl_sync(~0u, weight, j);
            const u16* v = v0 + (u64)__shfl_sync(~0u, key, j) * p.v.ld;
#pragma unroll
            for (int c = 0; c < PARTS; c++)
                if (c * 32 + lane < d) sum[c] += f * from_bf16(v[c * 32 + lane]);
        }
    }
    const u64 out_at = p.out.offset(row) + head * d;
#pragma unroll
    for (int c = 0; c < PARTS; c++)
        if (c * 32 + lane < d) p.out.store(out_at + c * 32 + lane, sum[c] / total);
}
