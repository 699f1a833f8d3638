// Prefix attention of Gemma-2B: out = softmax(q·kᵀ)·v, 8 query heads of 256 over one K/V head. The
// same for the expert's rows of many samples (`batch`), which see a suffix of keys as well.
//
// The 8 heads of a row are packed onto the M side (row r of a sample is M rows 8r … 8r+7, which is
// how q lies in memory anyway), so a sample is one [8·P, 256] × [len, 256]ᵀ problem.
//
// | what | value |
// |---|---|
// | q, out | bf16 [batch · rows, 2048] = [batch · rows · 8, 256]; the softmax scale is in q |
// | K, V | bf16 [batch · cache_rows, 256]; key s counts iff s < cameras · image_tokens + prompt, |
// |      | and in `batch` if it is in [prefix_rows, prefix_rows + suffix_keys) |
// | tile | 128 M rows × 80 keys, two consumer warpgroups of 64 rows, one producer |
// | arithmetic | wgmma m64n80k16 (S, Q from smem), m64n256k16 (O, P from registers), FP32 |
// | stages | 2 K + 2 V tiles of 40 KB beside Q's 64 KB |
// | SPLIT | CTAs of a cluster that share 128 rows and split the keys; each then owns 256 / SPLIT |
// |       | output columns and gathers the others' partial sums through distributed smem |
// | threads | 384 (setmaxnreg: consumers 240 registers, producer 24) |
// | dynamic smem | 230,400 bytes |
// | grid | (tiles · SPLIT, batch), tiles = ceil(8 · rows / 128); `prefill_split1`: any number of |
// |      | CTAs, CTA c takes row tiles c, c + grid, … of tiles · batch, sample after sample |
// | cluster | (SPLIT, 1, 1), launch attribute |
// | maps | q [batch·q_stride·8, 256] box [128 rows, 64]; k, v [batch·cache_rows, 256] box |
// |      | [80, 64]; bf16, 128-byte swizzle, no interleave, out of bounds reads as zero |
//
// Query rows at or past the prefix length get zeros. K/V rows past it may hold anything, NaN too.
// Bit-stable: no atomics, partial sums are combined in the order of their rank.
// `lengths` is read before the dependency wait: it must be written before the graph starts.
// Limit at P = 788: 5.1 GFLOP a sample, 6.4 µs at 800 TFLOP/s, 412 for 64. Measured 2026-11-26,
// H200, nvcc 13.0, in a graph of dependent launches, µs, before -> now: B = 1 split2 14.1 -> 13.8,
// 968 19.1 -> 17.5, 524 12.8 -> 12.3; split1 B = 2 25.0 -> 20.7, B = 8 98.8 -> 78.9, B = 32 340 ->
// 290, B = 64 665 -> 557 (584 TFLOP/s), and replayed for a second, at the power limit, 700 at 1.51
// GHz -> 592 at 1.33: a quarter fewer clocks, 15 % less time. Use split2 at B = 1, else split1.
// Where B = 64 lost it, by stamps of the clock (50,800 a row tile, 25,600 of them products):
// - a division for each output, 7,900: two a thread now, 653 -> 577;
// - the assembler's wait for the sums, before the softmax instead of after it: -> 569;
// - a CTA's begin, Q's way, the gap to the next CTA, 3,100: by walking -> 559, at the power limit
//   615 -> 592, 6 % fewer clocks (predicted 13).
// Of the rest no cause is large: without K's and V's copies it would be 525 at the power limit,
// without scaling the sums 570.
// `batch` (H200, 2026-11-26): 64 samples of 80 rows and 799 keys are 128 CTAs with the work of one
// of the prefill's each: the loop's attention of B = 64 took 76 µs by attention_suffix.cu, where 80
// rows share every key they read. The whole loop 30.9 -> 21.0 ms (predicted 20), B = 32 20.5 ->
// 16.2, B = 8 and 16 at h = 50 21.2 -> 17.5 and 34.9 -> 24. From 24 row tiles on.
// Its CTAs ask for the prefix's K and V before the product in front is done, as far as the rings
// have room, and warps without a row exchange nothing: 25.3 -> 23.4 µs on an H100 (split2, B = 64),
// the loop of B = 64 in the whole program 17.4 -> 16.6 ms (predicted 0.7 less).
// Tried and dropped: split 4 (two waves), a maximum that lags by up to 2^8 (0.3 µs faster, a
// quarter more error). At B = 64: K/V multicast to the row tiles of a cluster of two (555, at the
// power limit 577, predicted 570; no faster at B = 2 and 8); products of O asked for one by one
// between parts of the softmax, sums scaled under S (590, predicted 480: a warp waits to ask, and
// the assembler moves the rest); no turns (600), turns for S alone (565); sums scaled for half of
// the rows, barriers looked at ahead, Q waited for at once (0 to 1 %).
#include "attention_prefill_load.cuh"

namespace prefill {

/// State of one consumer thread: rows `lane / 4` and `+ 8` of its warp's 16.
struct Rows {
    float max[2], sum[2];
};

/// Says that this warp is done with a tile.
__device__ __forceinline__ void release(u32 bar) {
    if ((threadIdx.x & 31) == 0) ptx::barrier_arrive(bar);
}

/// The two warpgroups take turns to feed the tensor cores: one's softmax runs under the other's
/// products.
__device__ __forceinline__ void turn_begin(u32 group) { ptx::named_barrier(3 + group, 256); }
__device__ __forceinline__ void turn_end(u32 group) {
    asm volatile("bar.arrive %0, 256;" :: "r"(4 - group) : "memory");
}

/// s = Q·Kᵀ, waiting slice by slice when the tile is the first.
template <bool FIRST>
__device__ __forceinline__ void scores(float (&s)[40], u32 q, u32 k, Barriers bars, u32 parity) {
    ptx::wgmma_touch(s);
    ptx::wgmma_fence();
    const u64 a = ptx::wgmma_descriptor(q, 16, 1024, ptx::kSwizzle128);
    const u64 b = ptx::wgmma_descriptor(k, 16, 1024, ptx::kSwizzle128);
#pragma unroll
    for (u32 i = 0; i < kDim / 16; ++i) {
        if (FIRST && i % 4 == 0) {
            ptx::barrier_wait(bars.start(i / 4), parity);
            ptx::wgmma_fence();
        }
        ptx::wgmma_ss(s, a + ((i / 4 * kQBlock + i % 4 * 32) >> 4),
                      b + ((i / 4 * kTileBlock + i % 4 * 32) >> 4), i > 0);
    }
    ptx::wgmma_commit();
}

/// o += P·V; of the first key tile o = P·V.
__device__ __forceinline__ void values(float (&o)[128], const u32 (&p)[20], u32 v, bool first) {
    ptx::wgmma_touch(o);
    ptx::wgmma_fence();
    const u64 b = ptx::wgmma_descriptor(v, kTileBlock, 1024, ptx::kSwizzle128);
#pragma unroll
    for (u32 i = 0; i < kKeys / 16; ++i)
        ptx::wgmma_rs(o, p + 4 * i, b + (i * 2048 >> 4), !first || i > 0);
    ptx::wgmma_commit();
}

/// Scores to weights exp2((s − max)·log2e) in place; keys at or past `valid` weigh nothing.
/// Returns through `scale` what the sums so far must be multiplied by.
__device__ __forceinline__ void soften(float (&s)[40], Rows& rows, float (&scale)[2], u32 valid) {
    if (valid < kKeys) {
        const u32 first = (threadIdx.x & 3) * 2;
#pragma unroll
        for (u32 i = 0; i < 40; ++i)
            if (i / 4 * 8 + first + (i & 1) >= valid) s[i] = -ptx::infinity();
    }
#pragma unroll
    for (u32 r = 0; r < 2; ++r) {
        float m = s[2 * r];
#pragma unroll
        for (u32 j = 0; j < 10; ++j) m = fmaxf(m, fmaxf(s[4 * j + 2 * r], s[4 * j + 2 * r + 1]));
        m = fmaxf(rows.max[r], ptx::quad_max(m));
        scale[r] = ptx::exp2_fast((rows.max[r] - m) * ptx::kLog2e);
        rows.max[r] = m;
        const float shift = m * ptx::kLog2e;
        float sum = 0.f;
#pragma unroll
        for (u32 j = 0; j < 20; ++j) {
            float& x = s[4 * (j / 2) + 2 * r + (j & 1)];
            x = ptx::exp2_fast(fmaf(x, ptx::kLog2e, -shift));
            sum += x;
        }
        rows.sum[r] = fmaf(rows.sum[r], scale[r], sum);
    }
}

__device__ __forceinline__ void pack(u32 (&p)[20], const float (&s)[40]) {
#pragma unroll
    for (u32 j = 0; j < 20; ++j) p[j] = ptx::pack_bf16(s[2 * j], s[2 * j + 1]);
}

/// Hides suffix keys but the first from this thread's row lane / 4: that of a state token. The
/// tile's first key is cache row `row`.
__device__ __forceinline__ void hide_suffix(float (&s)[40], u32 row, u32 prefix_rows) {
    const u32 first = row + (threadIdx.x & 3) * 2;
#pragma unroll
    for (u32 i = 0; i < 40; ++i)
        if ((i >> 1 & 1) == 0 && first + i / 4 * 8 + (i & 1) > prefix_rows)
            s[i] = -ptx::infinity();
}

/// Zeroes V rows past the keys of a tile: 0 · NaN is NaN.
__device__ __forceinline__ void zero_rows(u32 v, u32 valid, u32 group) {
    const u32 chunks = (kKeys - valid) * 8;  // of 16 bytes, in each block of 64 columns
    for (u32 i = threadIdx.x & 127; i < 4 * chunks; i += 128) {
        const u32 at = v + i / chunks * kTileBlock + valid * 128 + i % chunks * 16;
        asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" :: "r"(at), "r"(0) : "memory");
    }
    ptx::fence_async_proxy();
    ptx::named_barrier(1 + group, 128);
}

/// What a CTA computes of one row tile.
struct Share {
    u16* out;                 // the sample's first row
    u32 rows, real;           // M rows of a sample, those before the prefix length
    u32 sample, tile;         // row tile of the sample
    u32 begin, blocks;        // first key tile, key tiles
    KeyTiles keys;
    bool idle;                // nothing but rows past the prefix: zeros
};

/// All keys of this CTA for 64 rows: o and rows hold the partial result. SUFFIX: tiles in the
/// middle may be short, and the first 8 rows a state token's (`state`: this warp has them).
template <int SPLIT, bool SUFFIX>
__device__ __forceinline__ void consume(float (&o)[128], Rows& rows, u32 smem, Barriers bars,
                                        u32 group, const Share& share, Passed passed, bool state) {
    const u32 begin = share.begin, blocks = share.blocks;
    const KeyTiles& keys = share.keys;
    const u32 last_valid = keys.valid(begin + blocks - 1);
    const auto valid = [&](u32 i) {
        return SUFFIX ? keys.valid(begin + i) : i + 1 == blocks ? last_valid : kKeys;
    };
    const u32 q = smem + group * 64 * 128;
    float s[40], scale[2];
    u32 p[20], n = passed.keys;  // of key tile i
    // The scores of key tile i are there.
    const auto scored = [&](u32 i) {
        ptx::wgmma_touch(s);
        release(bars.k_empty(n & 1));
        if (i + 1 == blocks) release(bars.q_empty());
        if (SUFFIX && state) hide_suffix(s, keys.row(begin + i), keys.second_row);
        soften(s, rows, scale, valid(i));
    };
    // The products of key tile i, the m-th that went through the barriers, are there.
    const auto added = [&](u32 m) {
        ptx::wgmma_touch(o);
        release(bars.v_empty(m & 1));
    };
    turn_begin(group);
    scores<true>(s, q, smem + kK + (n & 1) * kTileBytes, bars, passed.queries & 1);
    turn_end(group);
    ptx::wgmma_wait<0>();
    scored(0);
    pack(p, s);
    for (u32 i = 1; i < blocks; ++i) {
        const u32 m = n++, v = smem + kV + (m & 1) * kTileBytes;  // m: of the tile before
        turn_begin(group);
        ptx::barrier_wait(bars.k_full(n & 1), n >> 1 & 1);
        scores<false>(s, q, smem + kK + (n & 1) * kTileBytes, bars, 0);
        ptx::barrier_wait(bars.v_full(m & 1), m >> 1 & 1);
        if (SUFFIX && valid(i - 1) < kKeys) zero_rows(v, valid(i - 1), group);
        values(o, p, v, i == 1);
        turn_end(group);
        ptx::wgmma_wait<1>();
        scored(i);
        ptx::wgmma_touch(s);
        // A wait in each branch: the assembler moves one wait up to the start of its basic block,
        // before the softmax that is to run under the products.
        if (__any_sync(~0u, scale[0] != 1.f || scale[1] != 1.f)) {
            asm volatile("wgmma.wait_group.sync.aligned 0;  // to scale" ::: "memory");
            added(m);
#pragma unroll
            for (u32 j = 0; j < 128; ++j) o[j] *= scale[(j >> 1) & 1];
        } else {
            asm volatile("wgmma.wait_group.sync.aligned 0;  // to keep" ::: "memory");
            added(m);
        }
        pack(p, s);
    }
    if (SPLIT > 1) ptx::cluster_arrive();  // Q and K are read: the peer may put its sums there
    const u32 v = smem + kV + (n & 1) * kTileBytes;
    ptx::barrier_wait(bars.v_full(n & 1), n >> 1 & 1);
    if (last_valid < kKeys) zero_rows(v, last_valid, group);
    values(o, p, v, blocks == 1);
#pragma unroll
    for (u32 r = 0; r < 2; ++r) rows.sum[r] = ptx::quad_sum(rows.sum[r]);
    ptx::wgmma_wait<0>();
    added(n);
}

/// Warps of a row tile with a row of the sample: the others exchange nothing.
__device__ __forceinline__ u32 live_warps(u32 rows, u32 tile) {
    return (min(rows - tile * kRows, kRows) + 15) / 16;
}

/// Gathers the SPLIT partial results; `mine` = the normalised columns this CTA owns.
template <int SPLIT>
__device__ __forceinline__ void combine(float (&mine)[128 / SPLIT], const float (&o)[128],
                                        const Rows& rows, const u8* smem, u32 part, u32 live) {
    constexpr u32 kCount = 128 / SPLIT, kSlot = kCount * 4 * kConsumers;
    const u32 tid = threadIdx.x, base = ptx::smem_address(smem);
    ptx::cluster_wait();
    if (tid / 32 >= live) {
#pragma unroll
        for (u32 j = 0; j < kCount; ++j) mine[j] = 0.f;
        return;
    }
#pragma unroll
    for (u32 t = 0; t < SPLIT; ++t) {
        if (t == part) {
#pragma unroll
            for (u32 j = 0; j < kCount; ++j) mine[j] = o[t * kCount + j];
        } else {
            const u32 slot = part < t ? part : part - 1;
            const u32 to = ptx::remote_address(base, t), bar = to + kBarriers + kGather;
            const u32 at = to + slot * kSlot + tid * 16;
#pragma unroll
            for (u32 j = 0; j < kCount; j += 4)
                ptx::remote_store(at + j * 4 * kConsumers, bar, o[t * kCount + j],
                                  o[t * kCount + j + 1], o[t * kCount + j + 2],
                                  o[t * kCount + j + 3]);
            ptx::remote_store(to + kExchangeStats + slot * 4096 + tid * 16, bar, rows.max[0],
                              rows.max[1], rows.sum[0], rows.sum[1]);
        }
    }
    ptx::barrier_wait_cluster(base + kBarriers + kGather, 0);
    float4 stats[SPLIT];
    float top[2] = {-ptx::infinity(), -ptx::infinity()}, total[2] = {0.f, 0.f};
#pragma unroll
    for (u32 t = 0; t < SPLIT; ++t) {
        const u32 slot = t < part ? t : t - 1;
        stats[t] = t == part ? make_float4(rows.max[0], rows.max[1], rows.sum[0], rows.sum[1])
                             : *reinterpret_cast<const float4*>(smem + kExchangeStats +
                                                                slot * 4096 + tid * 16);
        top[0] = fmaxf(top[0], stats[t].x);
        top[1] = fmaxf(top[1], stats[t].y);
    }
#pragma unroll
    for (u32 t = 0; t < SPLIT; ++t) {
        stats[t].x = ptx::exp2_fast((stats[t].x - top[0]) * ptx::kLog2e);
        stats[t].y = ptx::exp2_fast((stats[t].y - top[1]) * ptx::kLog2e);
        total[0] = fmaf(stats[t].x, stats[t].z, total[0]);
        total[1] = fmaf(stats[t].y, stats[t].w, total[1]);
    }
    const float inverse[2] = {1.f / total[0], 1.f / total[1]};
#pragma unroll
    for (u32 j = 0; j < kCount; j += 4) {
        float acc[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
        for (u32 t = 0; t < SPLIT; ++t) {
            const u32 slot = t < part ? t : t - 1;
            const float4 x = t == part
                ? make_float4(mine[j], mine[j + 1], mine[j + 2], mine[j + 3])
                : *reinterpret_cast<const float4*>(smem + slot * kSlot + j * 4 * kConsumers +
                                                   tid * 16);
            acc[0] = fmaf(stats[t].x, x.x, acc[0]);
            acc[1] = fmaf(stats[t].x, x.y, acc[1]);
            acc[2] = fmaf(stats[t].y, x.z, acc[2]);
            acc[3] = fmaf(stats[t].y, x.w, acc[3]);
        }
#pragma unroll
        for (u32 k = 0; k < 4; ++k) mine[j + k] = acc[k] * inverse[k >> 1];
    }
}

/// Writes columns [first, first + COUNT · 2) of the thread's two rows; rows past `real` as zeros.
template <int COUNT>
__device__ __forceinline__ void store(const float (&x)[COUNT], u16* out, u32 row, u32 rows,
                                      u32 real, u32 first) {
    const u32 q = threadIdx.x & 3;
#pragma unroll
    for (u32 j = 0; j < COUNT; j += 16) {
#pragma unroll
        for (u32 r = 0; r < 2; ++r) {
            u32 v[4];
#pragma unroll
            for (u32 k = 0; k < 4; ++k)
                v[k] = ptx::pack_bf16(x[j + 4 * k + 2 * r], x[j + 4 * k + 2 * r + 1]);
            ptx::quad_transpose(v);
            const u32 at = row + 8 * r;
            const bool live = at < real;
            const uint4 word = live ? make_uint4(v[0], v[1], v[2], v[3]) : make_uint4(0, 0, 0, 0);
            if (at < rows)
                *reinterpret_cast<uint4*>(out + static_cast<u64>(at) * kDim + first + j * 2 +
                                          q * 8) = word;
        }
    }
}

/// A consumer warpgroup from the barriers of a row tile to its stores.
template <int SPLIT, bool SUFFIX>
__device__ __forceinline__ void work(const u8* smem, Barriers bars, const Share& share, u32 part,
                                     Passed passed, bool state) {
    float mine[128 / SPLIT];
    if (share.idle) {
#pragma unroll
        for (u32 j = 0; j < 128 / SPLIT; ++j) mine[j] = 0.f;
    } else {
        float o[128];
#pragma unroll
        for (u32 j = 0; j < 128; ++j) o[j] = 0.f;
        Rows rows = {{-ptx::infinity(), -ptx::infinity()}, {0.f, 0.f}};
        if (share.blocks > 0)
            consume<SPLIT, SUFFIX>(o, rows, ptx::smem_address(smem), bars,
                                         threadIdx.x / 128, share, passed,
                                         state && share.tile == 0 && threadIdx.x < 32);
        else if (SPLIT > 1)
            ptx::cluster_arrive();
        if constexpr (SPLIT > 1) {
            combine<SPLIT>(mine, o, rows, smem, part, live_warps(share.rows, share.tile));
        } else {
            const float inverse[2] = {1.f / rows.sum[0], 1.f / rows.sum[1]};
#pragma unroll
            for (u32 j = 0; j < 128; ++j) mine[j] = o[j] * inverse[(j >> 1) & 1];
        }
    }
    const u32 row = share.tile * kRows + threadIdx.x / 32 * 16 + (threadIdx.x & 31) / 4;
    store(mine, share.out, row, share.rows, share.real, part * (kDim / SPLIT));
}

/// Prefix keys of a sample.
__device__ __forceinline__ u32 prefix_of(const AttentionPrefillParams& params, u32 sample) {
    const u32 want = params.lengths[2 * sample] * params.image_tokens +
                     params.lengths[2 * sample + 1];
    return min(want, min(params.prefix_rows, params.cache_rows));
}

/// What part `part` of the keys of a row tile of a sample is.
template <int SPLIT, bool SUFFIX>
__device__ __forceinline__ Share share_of(const AttentionPrefillParams& params, u32 sample,
                                          u32 tile, u32 part, u32 prefix) {
    Share share;
    share.rows = params.rows * kHeads;
    share.real = SUFFIX ? share.rows : prefix * kHeads;
    share.out = params.out + static_cast<u64>(sample) * params.out_stride * kHeads * kDim;
    share.sample = sample;
    share.tile = tile;
    share.idle = tile * kRows >= share.real;
    share.keys = KeyTiles(prefix, SUFFIX ? params.suffix_keys : 0, params.prefix_rows);
    const u32 all = share.keys.count();
    share.begin = all * part / SPLIT;
    share.blocks = share.idle ? 0 : all * (part + 1) / SPLIT - share.begin;
    return share;
}

template <int SPLIT, bool SUFFIX, bool WALK>
__device__ __forceinline__ void run(const AttentionPrefillParams& params,
                                    const AttentionTensorMap* q_map,
                                    const AttentionTensorMap* k_map,
                                    const AttentionTensorMap* v_map) {
    extern __shared__ __align__(1024) u8 smem[];
    const u32 base = ptx::smem_address(smem);
    const u32 part = SPLIT > 1 ? ptx::cluster_rank() : 0;
    const Barriers bars{base + kBarriers};
    ptx::griddep_launch();
    if (threadIdx.x == 0) {
        for (u32 c = 0; c < 4; ++c) ptx::barrier_init(bars.start(c), 1);
        for (u32 s = 0; s < 2; ++s) {
            ptx::barrier_init(bars.k_full(s), 1);
            ptx::barrier_init(bars.v_full(s), 1);
            ptx::barrier_init(bars.k_empty(s), 8);
            ptx::barrier_init(bars.v_empty(s), 8);
        }
        ptx::barrier_init(bars.q_empty(), 8);
        ptx::barrier_init(bars.base + kGather, 1);
        ptx::barrier_init_done();
        if (SPLIT > 1)
            ptx::barrier_expect(bars.base + kGather,
                                (SPLIT - 1) * 32 * (512 / SPLIT + 16) *
                                    live_warps(params.rows * kHeads, blockIdx.x / SPLIT));
    } else if (threadIdx.x == kConsumers) {
        ptx::tma_prefetch(q_map);
        ptx::tma_prefetch(k_map);
        ptx::tma_prefetch(v_map);
    }
    const u32 tiles = (params.rows * kHeads + kRows - 1) / kRows;
    const u32 sample = WALK ? blockIdx.x / tiles : blockIdx.y;
    u32 prefix = prefix_of(params, sample);
    const Share first = share_of<SPLIT, SUFFIX>(
        params, sample, WALK ? blockIdx.x % tiles : blockIdx.x / SPLIT, part, prefix);
    Passed passed = {0, 0};
    // Calls f for each row tile of this CTA.
    const auto each = [&](auto f) {
        if constexpr (!WALK) {
            f(first);
        } else {
            const u32 all = tiles * params.samples;
            for (u32 t = blockIdx.x; t < all; t += gridDim.x) {
                const Share share = share_of<SPLIT, SUFFIX>(params, t / tiles, t % tiles, part,
                                                            prefix);
                if (t + gridDim.x < all) prefix = prefix_of(params, (t + gridDim.x) / tiles);
                f(share);
                passed.keys += share.blocks;
                passed.queries += share.blocks > 0;
            }
        }
    };
    __syncthreads();
    u32 early = 0;
    const bool produces = __shfl_sync(~0u, threadIdx.x / 32, 0) == kConsumers / 32;
    if (SUFFIX && !WALK && params.prefix_ready != 0 && produces && ptx::elect_one())
        early = produce_early(base, bars, k_map, v_map, sample * params.cache_rows, prefix,
                              first.begin, first.blocks);
    ptx::griddep_wait();
    if (threadIdx.x >= kConsumers) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (produces && ptx::elect_one())
            each([&](const Share& share) {
                if (share.blocks > 0)
                    produce(base, bars, q_map, k_map, v_map,
                            share.sample * params.q_stride * kHeads + share.tile * kRows,
                            share.sample * params.cache_rows, share.keys, share.begin,
                            share.blocks, passed, early);
            });
        __syncwarp();
        if (SPLIT > 1 && !first.idle) {
            ptx::cluster_arrive();
            ptx::cluster_wait();
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
        const u32 group = threadIdx.x / 128;
        if (group == 1) turn_end(1);
        each([&](const Share& share) {
            work<SPLIT, SUFFIX>(smem, bars, share, part, passed,
                                SUFFIX && params.state_row != 0);
        });
        if (group == 0) turn_begin(0);  // to the other's last end
    }
}

}  // namespace prefill

#define PIR_PREFILL(name, split, suffix, walk)                                                 \
    extern "C" __global__ void __launch_bounds__(prefill::kThreads, 1)                         \
        name(const __grid_constant__ AttentionPrefillParams params,                            \
             const __grid_constant__ AttentionTensorMap q,                                     \
             const __grid_constant__ AttentionTensorMap k,                                     \
             const __grid_constant__ AttentionTensorMap v) {                                   \
        prefill::run<split, suffix, walk>(params, &q, &k, &v);                                 \
    }

PIR_PREFILL(attention_prefill_sm90_split1, 1, false, true)
PIR_PREFILL(attention_prefill_sm90_split2, 2, false, false)
PIR_PREFILL(attention_batch_sm90_split1, 1, true, false)
PIR_PREFILL(attention_batch_sm90_split2, 2, true, false)
