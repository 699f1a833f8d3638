// Denoise attention: out = softmax(q·kᵀ + mask)·v, 8 query heads of 256 over one K/V head; few
// queries, so the keys are split over the CTAs of a cluster and the parts meet in one launch.
//
// | what | value |
// |---|---|
// | q, out | bf16 [batch · stride, 2048]: row i of a sample is M rows 8i … 8i+7 of [·, 256]; |
// |        | `out` may lie in blocks of 32 columns, as DenoiseRows in denoise_params.cuh says |
// | K, V | bf16 [batch · cache_rows, 256]: prefix keys s < cameras · image_tokens + prompt, |
// |      | suffix keys s in [prefix_rows, prefix_rows + suffix_keys) |
// | mask | all of those; with `state_row`, query row 0 sees no suffix key but the first |
// | tile | ROWS = 16·TILES M rows × (keys / CLUSTER): each CTA takes an even share of the prefix |
// |      | keys and of the suffix keys |
// | arithmetic | mma.sync m16n8k16, FP32; S: keys over 8 warps, K straight to registers; |
// |            | O: columns over 8 warps, V through shared memory |
// | combine | CTA r owns 256 / CLUSTER columns; the others store theirs into its smem (fp16, |
// |         | normalised), added in the order of their rank: bit-stable |
// | dependent launch | prefix K/V are fetched before the wait when `prefix_ready`, q and the |
// |                  | suffix keys after it |
// | threads | 256 |
// | dynamic smem | ROWS·(656 + 2·slots + 8·CLUSTER) + slots·528 + 16 |
// | grid | (CLUSTER, ceil(8 · queries / ROWS), batch) |
// | cluster | (CLUSTER, 1, 1), launch attribute |
//
// Limit at P = 788, h = 10: 0.8 MB of K/V from L2 once a row group, 0.2 µs; the price is latency.
// Measured 2026-11-22, H200, nvcc 13.0, in a graph of dependent launches, P = 788, µs: h = 10 or 11
// r16_c8 3.8; h = 50 r16_c8 7.3, r32_c8 7.4; B = 8 h = 10 r32_c8 8.9; B = 64 h = 10 r80_c8 58,
// h = 50 r32_c8 233. 16 warps were slower.
#include "attention_ptx.cuh"

/// Parameters of every attention_suffix_* kernel.
struct AttentionSuffixParams {
    const u16* q;        ///< bf16 [batch · q_stride, 2048]
    const u16* k;        ///< bf16 [batch · cache_rows, 256]
    const u16* v;        ///< bf16 [batch · cache_rows, 256]
    u16* out;            ///< bf16 [batch · out_stride, 2048], see `out_width`
    const u32* lengths;  ///< [batch, 2]: cameras, prompt length; written before the graph starts
    u32 queries;         ///< query rows of a sample
    u32 q_stride;        ///< rows from one sample's queries to the next's
    u32 out_stride;      ///< rows from one sample's outputs to the next's
    u32 out_width;       ///< elements from one row of `out` to the next
    u32 out_step;        ///< elements from 32 of its columns to the next 32
    u32 cache_rows;      ///< rows of a sample in K and V
    u32 prefix_rows;     ///< prefix slots: cache row of the first suffix key
    u32 suffix_keys;     ///< suffix keys
    u32 image_tokens;    ///< rows of one camera
    u32 key_slots;       ///< keys a CTA has room for: a multiple of 16, at most 128, at least
                         ///< ceil(prefix_rows / CLUSTER) + ceil(suffix_keys / CLUSTER)
    u32 state_row;       ///< 1: query row 0 sees no suffix key but the first
    u32 prefix_ready;    ///< 1: no kernel still running writes the prefix rows of K and V
};
static_assert(sizeof(AttentionSuffixParams) == 88, "shared with the host");

namespace suffix {

constexpr u32 kDim = 256, kHeads = 8, kWarps = 8, kThreads = kWarps * 32;
constexpr u32 kQPitch = kDim * 2 + 64, kVPitch = kDim * 2 + 16;  // bytes, free of bank conflicts
constexpr u32 kKeyTiles = 16 / kWarps;  // of 8 keys, a warp
constexpr u32 kOutTiles = 32 / kWarps;  // of 8 output columns, a warp

/// Blocks of 16 output columns that a rank owns.
template <u32 CLUSTER>
constexpr u32 kBlocks = 16 / CLUSTER;

/// Shared-memory offsets of one CTA, in bytes.
template <u32 TILES, u32 CLUSTER>
struct Layout {
    static constexpr u32 kRows = 16 * TILES;
    u32 slots;
    __host__ __device__ u32 q() const { return 0; }
    /// Partial results of all ranks, over q once every CTA has read its own.
    __host__ __device__ u32 parts() const { return 0; }
    __host__ __device__ u32 v() const { return kRows * kQPitch; }
    __host__ __device__ u32 weights() const { return v() + slots * kVPitch; }
    __host__ __device__ u32 weight_pitch() const { return slots * 2 + 16; }
    __host__ __device__ u32 max() const { return weights() + kRows * weight_pitch(); }
    __host__ __device__ u32 sum() const { return max() + kRows * kWarps * 4; }
    __host__ __device__ u32 stats() const { return sum() + kRows * kWarps * 4; }
    __host__ __device__ u32 gather() const { return stats() + CLUSTER * kRows * 8; }
    __host__ __device__ u32 bytes() const { return gather() + 16; }
    /// What the other ranks and this one store here.
    __host__ __device__ u32 gathered() const { return kRows * 512 + CLUSTER * kRows * 8; }
};

/// The keys of one CTA: an even share of the prefix, then one of the suffix.
struct Keys {
    u32 prefix_first, prefix, suffix_first, suffix;
    __device__ u32 count() const { return prefix + suffix; }
    __device__ u32 padded() const { return (count() + 15) / 16 * 16; }
};

/// `rows` rows of 256 to padded shared memory; those at or past `live` become zeros.
template <u32 PITCH>
__device__ __forceinline__ void load_rows(u32 to, const u16* from, u32 rows, u32 live) {
    for (u32 i = threadIdx.x; i < rows * 32; i += kThreads) {
        const u32 row = i / 32, c = i % 32, source = row < live ? row : 0;
        ptx::copy_async(to + row * PITCH + c * 16, from + source * kDim + c * 8,
                        row < live ? 16 : 0);
    }
}

/// B fragments of this warp's key tiles, straight from memory: thread (lane / 4, lane % 4) holds
/// 8 consecutive elements of key lane / 4 in each 32, for two k-steps. q is read in the same order.
struct KeyFragments {
    uint4 x[kKeyTiles][8];

    /// Loads the keys whose local index is in [first, last); `row` is where index `first` lies.
    __device__ __forceinline__ void load(const u16* row, u32 first, u32 last) {
        const u32 warp = threadIdx.x / 32, lane = threadIdx.x & 31;
#pragma unroll
        for (u32 t = 0; t < kKeyTiles; ++t) {
            const u32 key = (warp + t * kWarps) * 8 + lane / 4;
            if (key < first || key >= last) continue;
            const u16* from = row + (key - first) * kDim + lane % 4 * 8;
#pragma unroll
            for (u32 i = 0; i < 8; ++i) x[t][i] = ptx::load_l2(from + i * 32);
        }
    }
};

/// s = q·kᵀ of all rows against this warp's key tiles; hidden keys get −∞.
template <u32 TILES>
__device__ __forceinline__ void score(float (&s)[TILES][kKeyTiles][4], const u8* q,
                                      const KeyFragments& k, const Keys& keys, u32 first_row,
                                      bool state_row) {
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x & 31;
    const u8* at = q + lane / 4 * kQPitch + lane % 4 * 16;
#pragma unroll
    for (u32 m = 0; m < TILES; ++m) {
        float odd[kKeyTiles][4] = {};
#pragma unroll
        for (u32 t = 0; t < kKeyTiles; ++t)
#pragma unroll
            for (u32 c = 0; c < 4; ++c) s[m][t][c] = 0.f;
#pragma unroll
        for (u32 i = 0; i < 8; ++i) {
            const u8* row = at + m * 16 * kQPitch + i * 64;
            const uint4 a = *reinterpret_cast<const uint4*>(row);
            const uint4 b = *reinterpret_cast<const uint4*>(row + 8 * kQPitch);
#pragma unroll
            for (u32 t = 0; t < kKeyTiles; ++t) {
                ptx::mma(s[m][t], a.x, b.x, a.y, b.y, k.x[t][i].x, k.x[t][i].y);
                ptx::mma(odd[t], a.z, b.z, a.w, b.w, k.x[t][i].z, k.x[t][i].w);
            }
        }
#pragma unroll
        for (u32 t = 0; t < kKeyTiles; ++t) {
#pragma unroll
            for (u32 c = 0; c < 4; ++c) {
                const u32 key = (warp + t * kWarps) * 8 + lane % 4 * 2 + (c & 1);
                const u32 row = first_row + m * 16 + lane / 4 + c / 2 * 8;
                const bool other = key >= keys.prefix && keys.suffix_first + key > keys.prefix;
                const bool hidden = key >= keys.count() || (state_row && row < kHeads && other);
                s[m][t][c] = hidden ? -ptx::infinity() : s[m][t][c] + odd[t][c];
            }
        }
    }
}

/// Each warp's row maxima to shared memory.
template <u32 TILES>
__device__ __forceinline__ void share_max(const float (&s)[TILES][kKeyTiles][4], float* max) {
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x & 31;
#pragma unroll
    for (u32 m = 0; m < TILES; ++m) {
#pragma unroll
        for (u32 r = 0; r < 2; ++r) {
            float x = -ptx::infinity();
#pragma unroll
            for (u32 t = 0; t < kKeyTiles; ++t)
                x = fmaxf(x, fmaxf(s[m][t][2 * r], s[m][t][2 * r + 1]));
            x = ptx::quad_max(x);
            if (lane % 4 == 0) max[(m * 16 + r * 8 + lane / 4) * kWarps + warp] = x;
        }
    }
}

/// The largest, and the sum, of the warps' entries of a row.
__device__ __forceinline__ float row_max(const float* max, u32 row) {
    float x = -ptx::infinity();
#pragma unroll
    for (u32 w = 0; w < kWarps; w += 4) {
        const float4 a = *reinterpret_cast<const float4*>(max + row * kWarps + w);
        x = fmaxf(fmaxf(x, fmaxf(a.x, a.y)), fmaxf(a.z, a.w));
    }
    return x;
}
__device__ __forceinline__ float row_sum(const float* sum, u32 row) {
    float x = 0.f;
#pragma unroll
    for (u32 w = 0; w < kWarps; w += 4) {
        const float4 a = *reinterpret_cast<const float4*>(sum + row * kWarps + w);
        x += (a.x + a.y) + (a.z + a.w);
    }
    return x;
}

/// Softmax weights of this warp's keys in bf16 and its part of each row's sum, to shared memory.
template <u32 TILES, u32 CLUSTER>
__device__ __forceinline__ void soften(const float (&s)[TILES][kKeyTiles][4], u8* smem,
                                       Layout<TILES, CLUSTER> at, u32 padded) {
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x & 31;
    const float* max = reinterpret_cast<const float*>(smem + at.max());
    float* sums = reinterpret_cast<float*>(smem + at.sum());
#pragma unroll
    for (u32 m = 0; m < TILES; ++m) {
#pragma unroll
        for (u32 r = 0; r < 2; ++r) {
            const u32 row = m * 16 + r * 8 + lane / 4;
            const float top = row_max(max, row);
            const float shift = top == -ptx::infinity() ? 0.f : top * ptx::kLog2e;
            float sum = 0.f;
#pragma unroll
            for (u32 t = 0; t < kKeyTiles; ++t) {
                const u32 key = (warp + t * kWarps) * 8 + lane % 4 * 2;
                const float x = ptx::exp2_fast(fmaf(s[m][t][2 * r], ptx::kLog2e, -shift));
                const float y = ptx::exp2_fast(fmaf(s[m][t][2 * r + 1], ptx::kLog2e, -shift));
                sum += x + y;
                if (key < padded)
                    *reinterpret_cast<u32*>(smem + at.weights() + row * at.weight_pitch() +
                                            key * 2) = ptx::pack_bf16(x, y);
            }
            sum = ptx::quad_sum(sum);
            if (lane % 4 == 0) sums[row * kWarps + warp] = sum;
        }
    }
}

/// This warp's 32 columns of weights · V over this CTA's keys.
template <u32 TILES, u32 CLUSTER>
__device__ __forceinline__ void weigh(float (&o)[TILES][kOutTiles][4], u32 base,
                                      Layout<TILES, CLUSTER> at, u32 padded) {
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x & 31;
    const u32 p = base + at.weights() + lane % 16 * at.weight_pitch() + lane / 16 * 16;
    const u32 v = base + at.v() + lane % 16 * kVPitch + warp * kOutTiles * 16 + lane / 16 * 16;
#pragma unroll 2
    for (u32 k = 0; k < padded / 16; ++k) {
        u32 b[kOutTiles / 2][4];
#pragma unroll
        for (u32 j = 0; j < kOutTiles / 2; ++j)
            ptx::ldmatrix_x4_trans(b[j], v + k * 16 * kVPitch + j * 32);
#pragma unroll
        for (u32 m = 0; m < TILES; ++m) {
            u32 a[4];
            ptx::ldmatrix_x4(a, p + m * 16 * at.weight_pitch() + k * 32);
#pragma unroll
            for (u32 j = 0; j < kOutTiles; ++j)
                ptx::mma(o[m][j], a[0], a[1], a[2], a[3], b[j / 2][j % 2 * 2],
                         b[j / 2][j % 2 * 2 + 1]);
        }
    }
}

/// Partial results to the rank that owns their columns, {max, sum} of each row to every rank.
/// The network between SMs is what this costs, so the parts travel normalised, in half precision:
/// four times finer than the bf16 they end in.
template <u32 TILES, u32 CLUSTER>
__device__ __forceinline__ void push(const float (&o)[TILES][kOutTiles][4], const u8* smem,
                                     Layout<TILES, CLUSTER> at, u32 rank) {
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x & 31, base = ptx::smem_address(smem);
    const float* max = reinterpret_cast<const float*>(smem + at.max());
    const float* sum = reinterpret_cast<const float*>(smem + at.sum());
#pragma unroll
    for (u32 m = 0; m < TILES; ++m) {
        const float a = row_sum(sum, m * 16 + lane / 4), b = row_sum(sum, m * 16 + 8 + lane / 4);
        const float ia = a > 0.f ? 1.f / a : 0.f, ib = b > 0.f ? 1.f / b : 0.f;
#pragma unroll
        for (u32 j = 0; j < kOutTiles; j += 2) {
            const u32 block = (warp * kOutTiles + j) / 2;  // of 16 columns
            const u32 cta = ptx::remote_address(base, block / kBlocks<CLUSTER>);
            const u32 x[4] = {ptx::pack_half(o[m][j][0] * ia, o[m][j][1] * ia),
                              ptx::pack_half(o[m][j][2] * ib, o[m][j][3] * ib),
                              ptx::pack_half(o[m][j + 1][0] * ia, o[m][j + 1][1] * ia),
                              ptx::pack_half(o[m][j + 1][2] * ib, o[m][j + 1][3] * ib)};
            const u32 slot = (rank * TILES + m) * kBlocks<CLUSTER> + block % kBlocks<CLUSTER>;
            ptx::remote_store(cta + at.parts() + slot * 512 + lane * 16, cta + at.gather(), x);
        }
    }
    for (u32 i = threadIdx.x; i < at.kRows * CLUSTER; i += kThreads) {
        const u32 row = i / CLUSTER, to = ptx::remote_address(base, i % CLUSTER);
        ptx::remote_store(to + at.stats() + (rank * at.kRows + row) * 8, to + at.gather(),
                          row_max(max, row), row_sum(sum, row));
    }
}

/// Weighs the ranks' parts of the columns this CTA owns, adds them, writes; `out` is where the
/// first of its rows lies.
template <u32 TILES, u32 CLUSTER>
__device__ __forceinline__ void combine(const u8* smem, Layout<TILES, CLUSTER> at, u16* out,
                                        const AttentionSuffixParams& p, u32 live, u32 rank) {
    constexpr u32 kCount = kBlocks<CLUSTER>;
    const u32 lane = threadIdx.x & 31;
    for (u32 i = threadIdx.x / 32; i < TILES * kCount * 2; i += kWarps) {
        const u32 r = i & 1, m = i / 2 / kCount, block = i / 2 % kCount;
        const u32 row = m * 16 + r * 8 + lane / 4;
        const float2* stats = reinterpret_cast<const float2*>(smem + at.stats()) + row;
        float2 part[CLUSTER];
        float top = -ptx::infinity(), total = 0.f, acc[4] = {};
#pragma unroll
        for (u32 c = 0; c < CLUSTER; ++c) {
            part[c] = stats[c * at.kRows];
            top = fmaxf(top, part[c].x);
        }
#pragma unroll
        for (u32 c = 0; c < CLUSTER; ++c) {
            const u8* x = smem + at.parts() + ((c * TILES + m) * kCount + block) * 512 +
                          lane * 16 + r * 4;
            const float w = ptx::exp2_fast((part[c].x - top) * ptx::kLog2e) * part[c].y;
            const float2 a = ptx::unpack_half(*reinterpret_cast<const u32*>(x));
            const float2 b = ptx::unpack_half(*reinterpret_cast<const u32*>(x + 8));
            total += w;
            acc[0] = fmaf(w, a.x, acc[0]);
            acc[1] = fmaf(w, a.y, acc[1]);
            acc[2] = fmaf(w, b.x, acc[2]);
            acc[3] = fmaf(w, b.y, acc[3]);
        }
        const float inverse = 1.f / total;
        const u32 column = row % kHeads * kDim + (rank * kCount + block) * 16 + lane % 4 * 2;
        u16* to = out + row / kHeads * p.out_width + column / 32 * p.out_step + column % 32;
        if (row >= live) continue;
        *reinterpret_cast<u32*>(to) = ptx::pack_bf16(acc[0] * inverse, acc[1] * inverse);
        *reinterpret_cast<u32*>(to + 8) = ptx::pack_bf16(acc[2] * inverse, acc[3] * inverse);
    }
}

/// This CTA's share of the keys of sample `sample`.
template <u32 CLUSTER>
__device__ __forceinline__ Keys share(const AttentionSuffixParams& p, u32 sample, u32 rank) {
    const u32 want = p.lengths[2 * sample] * p.image_tokens + p.lengths[2 * sample + 1];
    const u32 len = min(want, p.prefix_rows);
    const u32 prefix = len * rank / CLUSTER, suffix = p.suffix_keys * rank / CLUSTER;
    return {prefix, len * (rank + 1) / CLUSTER - prefix, p.prefix_rows + suffix,
            p.suffix_keys * (rank + 1) / CLUSTER - suffix};
}

template <u32 TILES, u32 CLUSTER>
__device__ __forceinline__ void run(const AttentionSuffixParams& params) {
    extern __shared__ __align__(128) u8 smem[];
    const Layout<TILES, CLUSTER> at{params.key_slots};
    const u32 base = ptx::smem_address(smem), rank = ptx::cluster_rank(), sample = blockIdx.z;
    const u32 first_row = blockIdx.y * at.kRows, live = params.queries * kHeads - first_row;
    ptx::griddep_launch();
    if (threadIdx.x == 0) {
        ptx::barrier_init(base + at.gather(), 1);
        ptx::barrier_init_done();
        ptx::barrier_expect(base + at.gather(), at.gathered());
    }
    if (!params.prefix_ready) ptx::griddep_wait();
    Keys keys = share<CLUSTER>(params, sample, rank);
    const u64 cache = static_cast<u64>(sample) * params.cache_rows * kDim;
    const u16 *k = params.k + cache, *v = params.v + cache;
    load_rows<kVPitch>(base + at.v(), v + keys.prefix_first * kDim, keys.prefix, keys.prefix);
    KeyFragments fragments = {};
    fragments.load(k + keys.prefix_first * kDim, 0, keys.prefix);
    if (params.prefix_ready) ptx::griddep_wait();
    const u64 q = (static_cast<u64>(sample) * params.q_stride * kHeads + first_row) * kDim;
    load_rows<kQPitch>(base + at.q(), params.q + q, at.kRows, live);
    ptx::copy_commit();
    load_rows<kVPitch>(base + at.v() + keys.prefix * kVPitch, v + keys.suffix_first * kDim,
                       keys.padded() - keys.prefix, keys.suffix);
    ptx::copy_commit();
    fragments.load(k + keys.suffix_first * kDim, keys.prefix, keys.count());

    keys.suffix_first -= params.prefix_rows;
    float s[TILES][kKeyTiles][4];
    ptx::copy_wait<1>();
    __syncthreads();
    score<TILES>(s, smem + at.q(), fragments, keys, first_row, params.state_row);
    share_max<TILES>(s, reinterpret_cast<float*>(smem + at.max()));
    __syncthreads();
    ptx::cluster_arrive();  // q is read: peers may put their parts there
    soften<TILES, CLUSTER>(s, smem, at, keys.padded());
    ptx::copy_wait<0>();
    __syncthreads();
    float o[TILES][kOutTiles][4] = {};
    weigh<TILES, CLUSTER>(o, base, at, keys.padded());
    ptx::cluster_wait();
    push<TILES, CLUSTER>(o, smem, at, rank);
    ptx::barrier_wait_cluster(base + at.gather(), 0);
    const u64 row = static_cast<u64>(sample) * params.out_stride + first_row / kHeads;
    combine<TILES, CLUSTER>(smem, at, params.out + row * params.out_width, params, live, rank);
}

}  // namespace suffix

#define PIR_SUFFIX(name, tiles, cluster)                                                       \
    extern "C" __global__ void __launch_bounds__(suffix::kThreads, tiles <= 2 ? 2 : 1)         \
        name(const __grid_constant__ AttentionSuffixParams params) {                           \
        suffix::run<tiles, cluster>(params);                                                   \
    }

PIR_SUFFIX(attention_suffix_r16_c8, 1, 8)
PIR_SUFFIX(attention_suffix_r32_c8, 2, 8)
PIR_SUFFIX(attention_suffix_r80_c8, 5, 8)
