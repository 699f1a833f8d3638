// SigLIP attention: out = softmax(scale · q·kᵀ)·v inside each image, 16 heads of 72, 256 tokens,
// no mask. Two kernels: `attention_vision_sm90` for few images, `attention_vision_many_sm90` for
// 12 and more.
//
// | what | few | many |
// |---|---|---|
// | qkv | bf16 [images · 256, 3 · 1152]: q, k, v, each head-major | the same |
// | out | bf16 [images · 256, 1152] | the same |
// | a CTA | one head's 128 queries × 256 keys | whole heads, each grid's width after the last |
// | warpgroups | two of 64 queries | the same, a third with a warp that loads, one that stores |
// | q, k in smem | 128 rows: columns 0-63 in a 128-byte swizzled tile, 64-71 and 8 zeros (out |  |
// |              | of bounds) in a 32-byte swizzled one, 20 KB | the same |
// | v in smem | five 32-byte swizzled tiles, 20 KB | as q and k |
// | arithmetic | wgmma m64n128k16 (S, two halves of keys), FP32; O, P in registers: | |
// |            | m64n72k16 | m64n64k16 and m64n8k16 |
// | overlap | S of the second half of keys runs under the softmax of the first | the next heads' |
// |         | tiles arrive in a ring of 11; the warpgroups take turns at the tensor cores |
// | stores | from registers | by the copy engine, from where the queries were |
// | threads | 256 | 384 (setmaxnreg: 240 registers, 24) |
// | dynamic smem | 102,432 bytes | 225,472 |
// | grid | (2, 16, images) | (min(multiprocessors, 16 · images)) |
// | maps | qkv as [images · 256, 48, 72], strides 6,912 and 144 bytes, bf16, out of bounds zero: |
// |      | `wide` box [128, 1, 64] with 128-byte swizzle, `rest` box [128, 1, 16] with 32-byte; |
// |      | many: and out as [images · 256, 16, 72] in boxes of 64 rows |
//
// Limit for 3 images: 0.9 GFLOP and 7 MB of L2 traffic, about 2 µs; 3.1 M exponentials alone take
// 0.8 µs of the whole chip. For 192: products 73 µs, exponentials 62, 453 MB of HBM about 110.
// Bit-stable: no atomics. The two round differently: `many` takes one maximum of all keys.
// µs, H200, nvcc 13.0, 2026-11-26, in a graph of dependent launches; "sustained" is 1 s of replays:
//
// | images | 3 | 6 | 9 | 12 | 24 | 48 | 192 | 192 sustained |
// |---|---|---|---|---|---|---|---|---|
// | few | 6.8 | 11.0 | 15.3 | 17.6 | 35.2 | 64.5 | 243 | 259 (665 W, 1.80 GHz) |
// | many | 9.7 | 11.2 | 16.9 | 17.2 | 25.9 | 45.9 | 158 | 178 (667 W, 1.54 GHz) |
//
// Error (relative L2 of the lab) 1.81e-3 and 1.84e-3. `few` fed by cp.async instead of TMA took 9.2
// at 3 images, two CTAs of 64 queries an SM 10.3.
//
// Short runs of 192 images by `many` vary with the card's state: 158, in another call 173.
//
// How `many` came about (192 images; predicted, measured). Of a CTA's 8,500 clocks in `few` 3,100
// are the wait for the first tiles and 800 the stores; its two warpgroups keep the same time, so
// that both want the tensor cores and both the exponentials at once.
// - Two CTAs an SM (keys by quarters, 128 registers): 160, 255.
// - Persistent, key halves one after the other, two warpgroups 197, three 181-233 (predicted 130).
//   Without loads they took 166 and 146. Taking turns changed nothing (184): the assembler moves
//   the exponentials behind the turn's barrier, among the products. Three with them held before
//   it: 189, two 199. A warpgroup waits at its HGMMAs until nearly all are done.
// - All 256 keys in one softmax, a turn of p·v and the next q·kᵀ: predicted 140, 175 (186
//   sustained). Stores by a warp of their own and v in two boxes instead of five: 158 (178).
//   Asking for the next tiles before the softmax: 2 % slower.
// - Turns at the exponentials instead of the tensor cores: 2 % less sustained, but needs the clock
//   register to keep them behind a barrier. The output announced a step late: no difference.
// - v in two boxes in `few`: spills, and 2-4 % slower from 6 images on.
// What is left. Loads alone take 154 µs, 2.2 TB/s: heads of 144 bytes are pieces of cache lines and
// of sectors. No L2 promotion 137, 128 bytes 144 (no gain in the whole kernel). With the first 64
// columns of all heads side by side and their last 8 behind them (QKV's rows in another order) 87;
// the kernel then took 167 where it took 179 (176 and 184 sustained), and loads alone at 3 images
// 2.9 instead of 3.6 and 4.2. Without loads it takes 126: 2,400 of a step's 4,900 clocks are a
// warpgroup's softmax, 1,300 its turn, 800 the way from o to the storing warp.
#include "attention_ptx.cuh"

/// Parameters of attention_vision_sm90.
struct AttentionVisionParams {
    u16* out;     ///< bf16 [images · 256, 1152]
    float scale;  ///< of q·kᵀ, above 0
    u32 heads;    ///< images · 16
};
static_assert(sizeof(AttentionVisionParams) == 16, "shared with the host");

namespace vision {

constexpr u32 kTokens = 256, kHeads = 16, kDim = 72, kWidth = kHeads * kDim, kHalf = 128;
constexpr u32 kWide = kHalf * 128, kRest = kHalf * 32, kTile = kWide + kRest;  // of 128 rows

/// 128 rows of one head's q or k, for products along the columns.
__device__ __forceinline__ void load(u32 to, const AttentionTensorMap* wide_map,
                                     const AttentionTensorMap* rest_map, u32 bar, int slot,
                                     int row) {
    ptx::tma_load(to, wide_map, bar, 0, slot, row);
    ptx::tma_load(to + kWide, rest_map, bar, 64, slot, row);
}

/// 128 rows of one head's v, for products along the rows: five blocks of 16 columns, all alike.
__device__ __forceinline__ void load_values(u32 to, const AttentionTensorMap* rest_map, u32 bar,
                                            int slot, int row) {
    for (u32 c = 0; c < 5; ++c) ptx::tma_load(to + c * kRest, rest_map, bar, c * 16, slot, row);
}

/// s = q·kᵀ for 64 queries, row `first` of their tile and on, and 128 keys.
__device__ __forceinline__ void scores(float (&s)[64], u32 q, u32 first, u32 k) {
    ptx::wgmma_touch(s);
    ptx::wgmma_fence();
    const u64 a = ptx::wgmma_descriptor(q + first * 128, 16, 1024, ptx::kSwizzle128);
    const u64 b = ptx::wgmma_descriptor(k, 16, 1024, ptx::kSwizzle128);
#pragma unroll
    for (u32 i = 0; i < 4; ++i) ptx::wgmma_ss(s, a + i * 2, b + i * 2, i > 0);
    ptx::wgmma_ss(s, ptx::wgmma_descriptor(q + kWide + first * 32, 16, 256, ptx::kSwizzle32),
                  ptx::wgmma_descriptor(k + kWide, 16, 256, ptx::kSwizzle32), 1);
    ptx::wgmma_commit();
}

/// o (+)= p·v over 128 keys; not committed.
__device__ __forceinline__ void values(float (&o)[36], const u32 (&p)[32], u32 v, bool more) {
    const u64 b = ptx::wgmma_descriptor(v, kRest, 256, ptx::kSwizzle32);
#pragma unroll
    for (u32 i = 0; i < 8; ++i) ptx::wgmma_rs(o, p + 4 * i, b + (i * 512 >> 4), more || i > 0);
}

/// Largest score the thread has of row r of its two.
__device__ __forceinline__ float part_max(const float (&s)[64], u32 r) {
    float m = s[2 * r];
#pragma unroll
    for (u32 j = 0; j < 16; ++j) m = fmaxf(m, fmaxf(s[4 * j + 2 * r], s[4 * j + 2 * r + 1]));
    return m;
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

// ---- few images: a CTA for 128 queries of a head ------------------------------------------------

constexpr u32 kBarriers = 5 * kTile, kSmem = kBarriers + 32;
static_assert(kSmem == 102432, "the host asks for this much");
constexpr u32 kThreads = 256;

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
    const u32 k = base + kTile, v = base + 3 * kTile, mine = warp / 4 * 64;
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
    if (__shfl_sync(~0u, warp, 0) == 0 && ptx::elect_one()) {
        const int row = image * kTokens;
        load(base, &wide_map, &rest_map, bar, head, row + first);
        for (u32 i = 0; i < 2; ++i)
            load(k + i * kTile, &wide_map, &rest_map, bar + 8 * i, kHeads + head, row + i * kHalf);
        for (u32 i = 0; i < 2; ++i)
            load_values(v + i * kTile, &rest_map, bar + 16 + 8 * i, 2 * kHeads + head,
                        row + i * kHalf);
    }
    __syncwarp();

    float s0[64], s1[64], o[36];
    u32 p0[32], p1[32];
    float max[2], sum[2], scale[2], inverse[2];
    const float factor = params.scale * ptx::kLog2e;
    ptx::barrier_wait(bar, 0);
    scores(s0, base, mine, k);
    ptx::barrier_wait(bar + 8, 0);
    scores(s1, base, mine, k + kTile);
    ptx::wgmma_wait<1>();
    ptx::wgmma_touch(s0);
#pragma unroll
    for (u32 r = 0; r < 2; ++r) {
        max[r] = ptx::quad_max(part_max(s0, r));
        sum[r] = soften(p0, s0, r, max[r], factor);
    }
    ptx::wgmma_wait<0>();
    ptx::wgmma_touch(s1);
    ptx::barrier_wait(bar + 16, 0);
    ptx::wgmma_touch(o);
    ptx::wgmma_fence();
    values(o, p0, v, false);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();  // both halves of the weights at once do not fit the registers
    ptx::wgmma_touch(o);
#pragma unroll
    for (u32 r = 0; r < 2; ++r) {
        const float top = fmaxf(max[r], ptx::quad_max(part_max(s1, r)));
        scale[r] = ptx::exp2_fast((max[r] - top) * factor);
        sum[r] = fmaf(sum[r], scale[r], soften(p1, s1, r, top, factor));
    }
#pragma unroll
    for (u32 j = 0; j < 36; ++j) o[j] *= scale[(j >> 1) & 1];
    ptx::barrier_wait(bar + 24, 0);
    ptx::wgmma_touch(o);
    ptx::wgmma_fence();
    values(o, p1, v + kTile, true);
    ptx::wgmma_commit();
#pragma unroll
    for (u32 r = 0; r < 2; ++r) inverse[r] = 1.f / ptx::quad_sum(sum[r]);
    ptx::wgmma_wait<0>();
    ptx::wgmma_touch(o);
    const u32 row = image * kTokens + first + warp * 16 + lane / 4;
    store(o, inverse, params.out + static_cast<u64>(row) * kWidth + head * kDim);
}

// ---- many images: a CTA a multiprocessor, whole heads one after the other -----------------------

namespace vision_many {

using namespace vision;

/// A head's six tiles in the order they are loaded: those that are free first come first.
enum Tile : u32 { K0, K1, Q0, Q1, V0, V1, kTilesOfHead };

constexpr u32 kSlots = 11;  // of one ring for the tiles of all heads
constexpr u32 kFull = kSlots * kTile, kEmpty = kFull + 32, kStaged = kEmpty + 8 * kSlots;
constexpr u32 kRingSmem = kStaged + 64 + 8;
static_assert(kRingSmem == 225472, "the host asks for this much");
constexpr u32 kConsumers = 256, kRingThreads = kConsumers + 128;

/// Shared-memory addresses of tiles and barriers.
struct Ring {
    u32 base;
    __device__ u32 tile(u32 slot) const { return base + slot * kTile; }
    /// A head's q and k, or its v, have landed: heads alternate between two of each.
    __device__ u32 full(u32 i, bool values) const {
        return base + kFull + (i & 1) * 16 + (values ? 8 : 0);
    }
    /// Both warpgroups are done with the tile: four arrivals of each.
    __device__ u32 empty(u32 slot) const { return base + kEmpty + slot * 8; }
    /// A warpgroup's output of a step lies where its queries were. Four steps have barriers of
    /// their own: the queries of step t + 4 can't be there before those of t are sent.
    __device__ u32 staged(u32 step, u32 group) const {
        return base + kStaged + (step & 3) * 16 + group * 8;
    }
};

/// Slot of the n-th tile behind one in slot `first`, n below the number of slots.
__device__ __forceinline__ u32 slot_after(u32 first, u32 n) {
    const u32 slot = first + n;
    return slot >= kSlots ? slot - kSlots : slot;
}

/// The warp that loads.
__device__ void produce(Ring ring, const AttentionTensorMap* wide_map,
                        const AttentionTensorMap* rest_map, u32 heads) {
    for (u32 at = blockIdx.x, n = 0, i = 0; at < heads; at += gridDim.x, ++i) {
        const int row = at / kHeads * kTokens, head = at % kHeads;
#pragma unroll 1
        for (u32 tile = 0; tile < kTilesOfHead; ++tile, ++n) {
            const u32 slot = n % kSlots, to = ring.tile(slot);
            const u32 bar = ring.full(i, tile >= V0);
            const int from = row + (tile & 1) * kHalf;
            ptx::barrier_wait(ring.empty(slot), (n / kSlots & 1) ^ 1);
            if (tile == K0) ptx::barrier_expect(bar, 4 * kTile);
            if (tile == V0) ptx::barrier_expect(bar, 2 * kTile);
            const int part = tile >= V0 ? 2 : tile < Q0 ? 1 : 0;  // of qkv
            load(to, wide_map, rest_map, bar, part * kHeads + head, from);
        }
    }
}

/// The warp that stores: outputs out of the tiles their queries were in.
__device__ void send(Ring ring, const AttentionTensorMap* wide_map,
                     const AttentionTensorMap* rest_map, u32 steps) {
#pragma unroll 1
    for (u32 t = 0; t < steps; ++t) {
        const u32 i = t / 2, half = t & 1, at = blockIdx.x + i * gridDim.x, head = at % kHeads;
        const u32 slot = (i * kTilesOfHead + Q0 + half) % kSlots;
        for (u32 group = 0; group < 2; ++group) {
            const u32 first = group * 64, from = ring.tile(slot);
            const int row = at / kHeads * kTokens + half * kHalf + first;
            ptx::barrier_wait(ring.staged(t, group), t / 4 & 1);
            ptx::tma_store(wide_map, from + first * 128, 0, head, row);
            ptx::tma_store(rest_map, from + kWide + first * 32, 64, head, row);
            ptx::tma_store_read();
            ptx::barrier_arrive(ring.empty(slot), 4);
        }
    }
    ptx::tma_store_done();
}

/// o, normalised, as bf16 to where the warpgroup's queries were: row `first` of tile q and on.
__device__ __forceinline__ void stage(const float (&o)[36], const float (&sum)[2], u32 q,
                                      u32 first) {
    const u32 lane = threadIdx.x & 31, row = first + (threadIdx.x / 32 & 3) * 16 + (lane & 15);
    const u32 high = lane >> 4;  // the matrices' second 8 columns
    float inverse[2];
#pragma unroll
    for (u32 r = 0; r < 2; ++r) inverse[r] = 1.f / ptx::quad_sum(sum[r]);
    u32 x[18];
#pragma unroll
    for (u32 j = 0; j < 18; ++j)
        x[j] = ptx::pack_bf16(o[2 * j] * inverse[j & 1], o[2 * j + 1] * inverse[j & 1]);
#pragma unroll
    for (u32 j = 0; j < 4; ++j)
        ptx::stmatrix_x4(q + row * 128 + (((2 * j + high) ^ (row & 7)) << 4), x[4 * j],
                         x[4 * j + 1], x[4 * j + 2], x[4 * j + 3]);
    ptx::stmatrix_x2(q + kWide + row * 32 + ((row >> 2 & 1) << 4), x[16], x[17]);
    ptx::fence_async_proxy();
    __syncwarp();
}

/// o (+)= p·v over 128 keys, v's first 64 columns and its last 8; not committed.
__device__ __forceinline__ void split_values(float (&o)[36], const u32 (&p)[32], u32 v,
                                             bool more) {
    const u64 b = ptx::wgmma_descriptor(v, kWide, 1024, ptx::kSwizzle128);
    const u64 rest = ptx::wgmma_descriptor(v + kWide, kRest, 256, ptx::kSwizzle32);
#pragma unroll
    for (u32 i = 0; i < 8; ++i) {
        ptx::wgmma_rs_64(o, p + 4 * i, b + (i * 2048 >> 4), more || i > 0);
        ptx::wgmma_rs_8(o + 32, p + 4 * i, rest + (i * 512 >> 4), more || i > 0);
    }
}

/// The two warpgroups take turns at the tensor cores, so that one's softmax runs under the other's
/// products: `after` are sums of the softmax before. The barrier's number asks whether they are a
/// signalling NaN, which no sum is, to keep the exponentials in front of it, where the assembler
/// would not leave them.
__device__ __forceinline__ void turn_begin(u32 group, const float (&after)[2]) {
    constexpr u32 kNever = 0xFF800001;
    const bool never = __float_as_uint(after[0]) == kNever || __float_as_uint(after[1]) == kNever;
    ptx::named_barrier(1 + group + never, kConsumers);
}
__device__ __forceinline__ void turn_end(u32 group) {
    asm volatile("bar.arrive %0, 256;" :: "r"(2 - group) : "memory");
}

/// A consumer warpgroup: 64 queries and all keys a step, two steps a head. A turn is p·v of a step
/// and q·kᵀ of the next.
__device__ __forceinline__ void consume(Ring ring, u32 steps, float factor) {
    const u32 group = threadIdx.x / 128, first = group * 64;
    const bool speaks = (threadIdx.x & 31) == 0;
    const auto release = [&](u32 slot) {
        if (speaks) ptx::barrier_arrive(ring.empty(slot));
    };
    float s0[64], s1[64], o[36], sum[2] = {1.f, 1.f};
    u32 p0[32], p1[32], slot = 0;  // of the head's first tile
    if (group == 1) turn_end(group);
    ptx::barrier_wait(ring.full(0, false), 0);
    turn_begin(group, sum);
    scores(s0, ring.tile(Q0), first, ring.tile(K0));
    scores(s1, ring.tile(Q0), first, ring.tile(K1));
    turn_end(group);
#pragma unroll 1
    for (u32 t = 0; t < steps; ++t) {
        const u32 i = t / 2, half = t & 1;
        const u32 q = slot_after(slot, Q0 + half);
        const u32 v0 = slot_after(slot, V0), v1 = slot_after(slot, V1);
        ptx::wgmma_wait<0>();
        ptx::wgmma_touch(s0);
        ptx::wgmma_touch(s1);
        if (half == 1) {
            release(slot_after(slot, K0));
            release(slot_after(slot, K1));
        }
#pragma unroll
        for (u32 r = 0; r < 2; ++r) {
            const float max = ptx::quad_max(fmaxf(part_max(s0, r), part_max(s1, r)));
            sum[r] = soften(p0, s0, r, max, factor);
            sum[r] += soften(p1, s1, r, max, factor);
        }
        if (half == 0) ptx::barrier_wait(ring.full(i, true), i / 2 & 1);
        if (half == 1 && t + 1 < steps)
            ptx::barrier_wait(ring.full(i + 1, false), (i + 1) / 2 & 1);
        // behind the last step: the same head's again, which nobody reads
        if (half == 1 && t + 1 < steps) slot = slot_after(slot, kTilesOfHead);
        const u32 next = ring.tile(slot_after(slot, Q0 + (half ^ 1)));
        turn_begin(group, sum);
        ptx::wgmma_touch(o);
        ptx::wgmma_fence();
        split_values(o, p0, ring.tile(v0), false);
        split_values(o, p1, ring.tile(v1), true);
        ptx::wgmma_commit();
        scores(s0, next, first, ring.tile(slot_after(slot, K0)));
        ptx::wgmma_wait<1>();  // the second scores may now take the weights' registers
        ptx::wgmma_touch(o);
        scores(s1, next, first, ring.tile(slot_after(slot, K1)));
        turn_end(group);
        if (half == 1) {
            release(v0);
            release(v1);
        }
        stage(o, sum, ring.tile(q), first);
        if (speaks) ptx::barrier_arrive(ring.staged(t, group));
    }
    ptx::wgmma_wait<0>();
    if (group == 0) turn_begin(group, sum);  // takes the other's last turn_end
}

}  // namespace vision_many

extern "C" __global__ void __launch_bounds__(vision_many::kRingThreads, 1)
    attention_vision_many_sm90(const __grid_constant__ AttentionVisionParams params,
                               const __grid_constant__ AttentionTensorMap wide_map,
                               const __grid_constant__ AttentionTensorMap rest_map,
                               const __grid_constant__ AttentionTensorMap out_wide_map,
                               const __grid_constant__ AttentionTensorMap out_rest_map) {
    using namespace vision_many;
    extern __shared__ __align__(1024) u8 smem[];
    const Ring ring{ptx::smem_address(smem)};
    const u32 steps = (params.heads - blockIdx.x + gridDim.x - 1) / gridDim.x * 2;
    ptx::griddep_launch();
    if (threadIdx.x == 0) {
        for (u32 i = 0; i < 2; ++i)
            for (u32 values = 0; values < 2; ++values) ptx::barrier_init(ring.full(i, values), 1);
        for (u32 slot = 0; slot < kSlots; ++slot) ptx::barrier_init(ring.empty(slot), 8);
        for (u32 t = 0; t < 4; ++t)
            for (u32 group = 0; group < 2; ++group) ptx::barrier_init(ring.staged(t, group), 4);
        ptx::barrier_init_done();
    } else if (threadIdx.x == kConsumers) {
        ptx::tma_prefetch(&wide_map);
        ptx::tma_prefetch(&rest_map);
    } else if (threadIdx.x == kConsumers + 32) {
        ptx::tma_prefetch(&out_wide_map);
        ptx::tma_prefetch(&out_rest_map);
    }
    __syncthreads();
    ptx::griddep_wait();
    if (threadIdx.x >= kConsumers) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        const u32 warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
        if (warp == kConsumers / 32 && ptx::elect_one())
            produce(ring, &wide_map, &rest_map, params.heads);
        if (warp == kConsumers / 32 + 1 && ptx::elect_one())
            send(ring, &out_wide_map, &out_rest_map, steps);
        __syncwarp();
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
        consume(ring, steps, params.scale * ptx::kLog2e);
    }
}
