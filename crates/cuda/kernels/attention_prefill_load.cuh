// What attention_prefill_sm90.cu takes, and how keys, values and queries come into shared memory:
// its parameters, the barriers, the walk over a sample's keys and the producer thread.
#pragma once
#include "attention_ptx.cuh"

/// Parameters of every attention_prefill_sm90_* kernel.
struct AttentionPrefillParams {
    u16* out;            ///< bf16 [batch · out_stride, 2048]
    const u32* lengths;  ///< [batch, 2]: cameras, prompt length
    u32 rows;            ///< query rows of a sample (prefill: its prefix slots)
    u32 q_stride;        ///< rows from one sample's queries to the next's
    u32 out_stride;      ///< rows from one sample's outputs to the next's
    u32 cache_rows;      ///< rows of a sample in K and V
    u32 image_tokens;    ///< rows of one camera
    u32 prefix_rows;     ///< prefix slots: cache row of the first suffix key
    u32 suffix_keys;     ///< suffix: keys behind the prefix slots
    u32 state_row;       ///< suffix: 1: query row 0 sees no suffix key but the first
    u32 samples;         ///< batch
    u32 prefix_ready;    ///< suffix: 1: K and V of the prefix were complete long ago
};
static_assert(sizeof(AttentionPrefillParams) == 56, "shared with the host");

namespace prefill {

constexpr u32 kRows = 128, kKeys = 80, kHeads = 8, kDim = 256;
constexpr u32 kQBytes = kRows * kDim * 2, kTileBytes = kKeys * kDim * 2;
constexpr u32 kQBlock = kRows * 128, kTileBlock = kKeys * 128;  // 64 columns of all rows
constexpr u32 kK = kQBytes, kV = kK + 2 * kTileBytes, kBarriers = kV + 2 * kTileBytes;
constexpr u32 kSmem = kBarriers + 1024;
static_assert(kSmem == 230400, "the host asks for this much");
constexpr u32 kConsumers = 256, kThreads = kConsumers + 128;
constexpr u32 kExchangeStats = 65536;  // past the exchanged partial sums
constexpr u32 kGather = 96;            // the barrier that counts them, among `Barriers`

/// Shared-memory addresses of the barriers.
struct Barriers {
    u32 base;
    __device__ u32 start(u32 c) const { return base + 8 * c; }  // Q and first K, a slice each
    __device__ u32 k_full(u32 s) const { return base + 32 + 8 * s; }
    __device__ u32 k_empty(u32 s) const { return base + 48 + 8 * s; }
    __device__ u32 v_full(u32 s) const { return base + 64 + 8 * s; }
    __device__ u32 v_empty(u32 s) const { return base + 80 + 8 * s; }
    __device__ u32 q_empty() const { return base + 104; }
};

/// Key tiles of a sample: those of the prefix, then those of the suffix, which follow the prefix
/// slots; as one range where the prompt leaves no slot empty.
struct KeyTiles {
    u32 first, second, second_row;  // keys of both ranges, cache row of the second
    __device__ KeyTiles(u32 prefix, u32 suffix, u32 prefix_rows)
        : first(prefix == prefix_rows ? prefix + suffix : prefix),
          second(prefix == prefix_rows ? 0 : suffix), second_row(prefix_rows) {}
    KeyTiles() = default;
    __device__ u32 of_first() const { return (first + kKeys - 1) / kKeys; }
    __device__ u32 count() const { return of_first() + (second + kKeys - 1) / kKeys; }
    __device__ u32 row(u32 tile) const {
        const u32 n = of_first();
        return tile < n ? tile * kKeys : second_row + (tile - n) * kKeys;
    }
    /// Keys of a tile that count: the others weigh nothing, and hold anything.
    __device__ u32 valid(u32 tile) const {
        const u32 n = of_first();
        return min(kKeys, tile < n ? first - tile * kKeys : second - (tile - n) * kKeys);
    }
};

/// One K or V tile: four boxes of 64 columns.
__device__ __forceinline__ void load_tile(u32 to, const AttentionTensorMap* map, u32 bar,
                                          int row) {
    ptx::barrier_expect(bar, kTileBytes);
#pragma unroll
    for (int c = 0; c < 4; ++c) ptx::tma_load(to + c * kTileBlock, map, bar, c * 64, row);
}

/// What went through the barriers before: K tiles (as many of V), and Q tiles. Tile n has slot
/// n & 1, and its barriers complete their phase n >> 1.
struct Passed {
    u32 keys, queries;
};

/// Before the kernels in front are done: K and V of the CTA's first tiles, as many as there is room
/// for and as are of `prefix` keys alone. Returns their number.
__device__ u32 produce_early(u32 smem, Barriers bars, const AttentionTensorMap* k_map,
                             const AttentionTensorMap* v_map, int key_row, u32 prefix, u32 begin,
                             u32 blocks) {
    const u32 whole = prefix / kKeys, early = min(min(blocks, 2u), whole - min(whole, begin));
    for (u32 i = 0; i < early; ++i) {
        const int row = key_row + (begin + i) * kKeys;
        const u32 k = smem + kK + i * kTileBytes;
        if (i == 0) {
            ptx::barrier_arrive(bars.k_full(0));
            for (u32 c = 0; c < 4; ++c) {
                ptx::barrier_expect(bars.start(c), kQBlock + kTileBlock);
                ptx::tma_load(k + c * kTileBlock, k_map, bars.start(c), c * 64, row);
            }
        } else {
            load_tile(k, k_map, bars.k_full(i), row);
        }
        load_tile(smem + kV + i * kTileBytes, v_map, bars.v_full(i), row);
    }
    return early;
}

/// The producer of one row tile: Q with the first K tile in four slices of 64 columns, so that the
/// first scores start after a quarter of it, then V and K tiles in the order of their use. K and V
/// of the first `early` tiles were asked for.
__device__ void produce(u32 smem, Barriers bars, const AttentionTensorMap* q_map,
                        const AttentionTensorMap* k_map, const AttentionTensorMap* v_map,
                        int q_row, int key_row, KeyTiles keys, u32 begin, u32 blocks,
                        Passed passed, u32 early) {
    const auto wait_empty = [](u32 bar, u32 n) {
        if (n >= 2) ptx::barrier_wait(bar, (n >> 1 & 1) ^ 1);
    };
    u32 n = passed.keys, to = smem + kK + (n & 1) * kTileBytes;
    if (early == 0) {
        wait_empty(bars.k_empty(n & 1), n);
        ptx::barrier_arrive(bars.k_full(n & 1));  // for its phase: the four below are waited for
        if (passed.queries > 0) ptx::barrier_wait(bars.q_empty(), (passed.queries & 1) ^ 1);
    }
    for (u32 c = 0; c < 4; ++c) {
        if (early == 0) {
            ptx::barrier_expect(bars.start(c), kQBlock + kTileBlock);
            ptx::tma_load(to + c * kTileBlock, k_map, bars.start(c), c * 64,
                          key_row + keys.row(begin));
        }
        ptx::tma_load(smem + c * kQBlock, q_map, bars.start(c), c * 64, q_row);
    }
    for (u32 i = 0; i < blocks; ++i, ++n) {
        if (i + 1 < blocks && i + 1 >= early) {
            const u32 s = (n + 1) & 1;
            wait_empty(bars.k_empty(s), n + 1);
            load_tile(smem + kK + s * kTileBytes, k_map, bars.k_full(s),
                      key_row + keys.row(begin + i + 1));
        }
        if (i < early) continue;
        const u32 s = n & 1;
        wait_empty(bars.v_empty(s), n);
        load_tile(smem + kV + s * kTileBytes, v_map, bars.v_full(s),
                  key_row + keys.row(begin + i));
    }
}

}  // namespace prefill
