// y[token, feature] = epilogue(norm(x)[token, :] · W[feature, :]ᵀ + bias): every product of the
// vision tower and of the prefill, in bf16 with f32 sums. Called step by step by the host twin
// src/gemm.rs; checked and timed by lab/gemm.cu.
//
// How: the operands are swapped, weight rows are wgmma's M and tokens its N, so that a tile is as
// wide as the tokens need (any multiple of 8). UPRIGHT instances have tokens as M: 768 rows are six
// times 128, and features in tiles of 200 make one wave of 132 where weights in tiles of 192 made
// 115 larger ones. One warp fills a ring of stages (64 columns of a
// weight tile and of a token tile, 128-byte swizzle) by TMA, weights before the kernels in front
// have finished; 2 to 4 warpgroups multiply; three spare warps turn row statistics into rstd and
// mean. Accumulators pass through shared memory and leave as 16-byte stores, row-major.
//
// Norm: norm(x)·Wᵀ = rstd·((scale·x)·Wᵀ − mean·colsum). Whoever writes a residual stream leaves
// scale·x beside it for the norm that comes next: folded into W, a learned scale would round every
// weight twice. Statistics of a stream [rows, C] lie beside it, too, as float2 [rows][C / 64]:
// {Σ, Σ²} of the stored bf16 values of each 64 columns. Whoever writes the stream (ADD,
// STORE_POSITION, STORE with stats_out, the embedding) writes all C / 64 of its rows; readers add
// them in order.
// No atomics anywhere: equal inputs give equal bits.
//
// Packed order of W's rows, in every 16: GEGLU 8 gate rows, then the 8 up rows of the same hidden
// units. ROPE, within each head of q and k: rows j … j+7, then j+128 … j+135 (j a multiple of 8);
// so q and the cached k are permuted alike and their dot products stay. v in natural order.
//
// Launch: grid as `grid` below, block = threads, cluster = CM·CN·CK (compiled in), dynamic shared
// memory = smem (raise the limit once), attribute PROGRAMMATIC_STREAM_SERIALIZATION. Each kernel
// lets its successor start at once, so the successor must wait (griddepcontrol.wait) before its
// first read of, or write to, anything but weights.
//   tiles = ⌈n / (BM·CM)⌉ · ⌈rows / (BN·CN)⌉ clusters (UPRIGHT: n and rows change places)
//   grid  = cluster · (CK > 1 ? tiles : min(tiles, cuOccupancyMaxActiveClusters)); four
//   multiprocessors fewer where the first Euler step runs beside (denoise_beside.cu)
// Tensor maps: bf16, 2-D, inner box 64 columns, SWIZZLE_128B, L2_PROMOTION_256B, no interleave, OOB
// zeros, element strides 1: w [n, k] box BM rows; x [rows, k] box BN rows (UPRIGHT: BN, BM); out
// [rows, features that go there] box ⌈BN / 8 / CK⌉ · 8 rows, any valid map if there are none. ADD
// reads the residual by it, what is BULK (gemm_tile_sm90.cuh) leaves by it where rows follow each
// other. K needs row strides of 16 bytes (patch: 588 columns padded to 640 with zeros).
//
// Choice: among the instances of an epilogue, the host takes the least of
//   3000 + waves · main + (turns ? 1 : waves) · 30 · BN · BM / 128 + (CK > 1 ? 1250 · CK : 0),
//   in clocks: main = ⌈K / 64⌉ / CK · max(BM · BN / 32, 2.4 · (BM + BN)): the tensor cores' time
//   or that of 53 bytes a clock into an SM; for products of a millisecond, which meet the power
//   limit, (BM + BN) · 17 / 32 more a stage for what moving the operands takes of it,
//   waves = ⌈CTAs with a tile / 132 (120 for clusters of 4)⌉,
// but for the few shapes at which it errs and that are known beforehand (`MEASURED` of
// gemm_tiles.rs).
// Rows of x and W begin at cache lines (`row_pitch` in layout.rs): with 4304 columns side by side
// vision.fc2 took 18.1 µs instead of 16.7 (768 rows), 121 instead of 100 (6144).
//
// Fastest, µs per launch on an H200 in a chain of dependent launches, weights cold in L2, epilogue
// included (nvcc 13.0, lab `time`); in brackets torch's cuBLAS without any epilogue, run beside an
// earlier state. The power limit holds the clock at 1.5 to 1.8 GHz: the same binary's prefill.up
// took 142 to 148.
//                 768 / 788 rows              512 / 532          968
//   vision.patch  128x64         5.7 ( 5.2)   128x40       5.3
//   vision.qkv    192x112       11.2 (12.0)   128x128      9.1
//   vision.out    128x64         6.6 ( 6.7)   128x64       6.1
//   vision.fc1    192x160       15.2 (13.2)   192x104     11.4
//   vision.fc2    128x128_w2_k2 16.6 (14.7)   128x80_k2   15.3
//   projector     128x96         8.6 ( 7.9)   128x64       7.2
//   prefill.qkv   128x136_w2    14.9 (14.8)   128x96      12.4     128x168       17.3
//   prefill.kv    128x32         7.8 ( 6.9)   128x32       7.5     128x32         8.0
//   prefill.out   128x104       12.9 (11.4)   128x136_k2  11.1     128x128       15.1
//   prefill.up    128x200_t_w2   146 ( 141)   128x200_t_x2 115     128x200_t_x2   180
//   prefill.down  128x200_k2    74.8 (79.8)   128x136_k2  55.7     128x248_k2    91.3
//                 B = 2                B = 4                B = 8 (rows 6144 / 6304)
//   vision.patch  128x64         9.9   128x64        19.1   128x64          34 (  17)
//   vision.qkv    192x112       20.5   128x128       42.5   128x192_t_w2    78 (  71)
//   vision.out    128x128        9.6   128x128       17.3   128x216         27 (  26)
//   vision.fc1    192x160       29.1   128x192_t_x2  57.6   128x192_t_x2    99 (  85)
//   vision.fc2    128x128       31.9   128x128       63.4   128x216         98 (  83)
//   projector     128x96        15.4   128x128       28.4   128x192_t_w2    54 (  43)
//   prefill.qkv   128x136_w2    28.1   128x168       54.8   128x192_t_x2   101 (  88)
//   prefill.kv    128x96        10.9   128x96        12.2   128x96          24 (  20)
//   prefill.out   128x200_w2    20.6   128x200_w2    39.9   128x192_t_x2    81 (  72)
//   prefill.up    128x200_t_w2   285   128x200_t_w2   640   128x200_t_x2  1258 (1188)
//   prefill.down  128x200_w2     156   128x200_w2     322   128x192_t_x2   633 ( 589)
// H100, 2026-11-25, rows of fewer cameras and more prompt (before: what the instances of the
// table above gave): prefill.up 276 rows 128x144_t_w2 66 (106), 340 128x184_t_w2 77 (87), 456
// 128x152_t_x2 99 (146), 532 128x184_t_x2 108 (129), 712 128x184_t_w2 152 (165); prefill.down 276
// 128x72_k2 49 (57), 456 128x120_k2 58 (76), 712 128x184_k2 71; vision.fc1 256 128x88 8.5 (12.2);
// vision.fc2 256 128x48_k2 12.2 (15.2). Of 788 rows, same card: prefill.out 128x104 14.1.
// H100, 2026-11-26, 768 / 788 rows, back to back, what the tables above have → now: vision.qkv
// 192x112 11.8 → u128x160_x2 10.9; fc1 192x160 15.7 → u128x200_x2 13.5 (1536 rows 31.0 → 25.4; qkv
// 21.7 → 20.4, 3072 rows 42.0 → 39.7); fc2 16.4 → 16.0; prefill.out 128x104 14.9 → with pairs that
// share weights (w2) 14.1. Stamps of the clock had shown where the rest of these products goes: a
// CTA began 0.5 µs after the last one in front of it had ended, took 0.9 µs to get to its first
// request for tokens, and those waited behind all the weights it had asked for. So another thread
// asks for the weights, UPRIGHT for 60 KB of them at first, and mbarriers are made by two threads
// (by a lane each they cost 1000 clocks: the compiler makes a loop of it). No gain: the first
// columns of the next product's weights brought into L2 while this one ends; 192x136 and 256x104
// UPRIGHT tiles; 128x128 in pairs for 512 rows.
// Later, on another H100, by stamps of every CTA, µs after the last one in front has ended: the
// last CTA starts at 0.5, learns at 1.1 that it may go on, asks for tokens 0.35 to 0.5 later, has
// them after 0.6 to 1.4, and of vision.fc1's 13.8 the last 3.1 were the epilogue. So: nothing is
// divided between that news and the first request, quotients by floats (3 to 9 divisions of
// integers a thread), requests by a lane that the compiler knows to be alone (elect), fewer
// instructions in upright() (the chunk's scale and bias halved beforehand, one address, reads
// before writes). vision.fc1 13.5 → 13.1, out 7.2 → 7.0, prefill.qkv 15.1 → 14.7, out 14.1 → 13.9;
// in a chain of a layer's products vision 50.9 → 48.4 µs a layer, prefill 248.6 → 242.5; the whole
// replay -0.09 ms. No gain: tokens asked for by a warp that waits for nobody, registers handed over
// first (the weights came later), two or three stages of tokens at a time while the ring fills,
// K-parts added four groups at a time as they arrive; three chains of 256 rows side by side, two
// CTAs an SM, for the three images (48.7 → 66 µs a layer: smaller tiles).
// The tables are of products whose every tile read its rows' statistics anew, one thread a row:
// 3.4 million requests to L2 in prefill.up of 788 rows, and tiles that waited for them. By eight
// lanes a row, and kept from tile to tile, it takes 137 instead of 154 µs inside the whole
// replay; prefill of B = 2 8.7 instead of 9.6 ms, of B = 64 295 instead of 333 (H100,
// 2026-11-26). The vision tower's norms, by eight lanes, too, were slower (B = 64 80.3 ms instead
// of 77), and so were more token tiles side by side that a cluster could keep for longer: `group`
// 6 300, 11 304, 22 327, 33 356 ms.
// B = 64, 2026-11-26, at the power limit (SUSTAIN=1, H200, nvcc 13.0, one call each; before → now,
// in brackets torch's cuBLAS on another card): vision (49152 rows) qkv 706 → 640 (618), out 294 →
// 269 (218), fc1 854 → 812 (803), fc2 836 → 817 (777); prefill (50432 rows) qkv 860 → 836, out 741
// → 712 (641), up 10.62 → 10.53 ms (10.32), down 5470 → 5137 (4941). What did it:
// - Beside products that keep shared memory busy, a warp's access to it (LDS, SHFL, and STG's way
//   out) takes hundreds of clocks: copying a 192 × 128 tile out took 9.5 thousand clocks, with the
//   residual's statistics and scaled copy 18 to 23 thousand, where products of K = 1152 take 14.
//   By the copy engine 1.6 thousand; sums that hand half of their values over 13.
// - The warpgroup's number by a shuffle, so that the compiler knows that it is uniform: operand
//   descriptors in uniform registers. The main loop had four moves and five integer operations per
//   wgmma (prefill.up executed 1.85 G instructions, cuBLAS 0.95 G).
// - A first step that is known to start from zero: with a predicate that says so at run time, all
//   accumulators were held through the epilogue, which had 46 registers left. With four chunks a
//   thread read ahead and the next residual asked for early: out 295 → 276, down 5.07 → 4.97 ms,
//   out of the prefill 760 → 750, fc1 0 to 3 % less (H100, in turn, at the power limit).
// - 256 × 192 tiles for prefill.down: a third fewer bytes through L2 (3.59 instead of 3.70 J). For
//   up a gain of 0.8 %, since its epilogues are in the open then.
// No gain: the copy engine for GEGLU (up 1.7 % slower: stores queue with the ring's loads) and for
// ADD (out 298: the scaled copy waits for the engine to have read the staging); row sums as the
// diagonal of x·xᵀ by mma.sync (out 295); clusters of four; other L2 promotions; 256 × 192 tiles
// for vision's qkv and fc1, and before ADD for K of 2048 and less (epilogues in the open).
// Neither (H100, 2026-11-26): residuals that leave by the copy engine while the consumer writes
// their scaled copy, and all twelve chunks of a slab in registers (out 275 and 282 against 276);
// eight token groups staged at a time; more token tiles side by side (`group` 4 to 16) and L2's
// eviction hints for up, at 10.0 to 10.3 ms each; 128 × 200 tiles in turns for up (prefill 292.8
// against 294.7 ms, the whole batch the same).
// B = 1, 788 rows (H100, 2026-11-27): up in pairs that share tokens (x2) instead of weights (w2)
// asks a seventh less of L2: alone at the power limit 165 instead of 175 µs, the whole run by the
// GPU's clock 8.80 → 8.74 ms (40 a second) and on another card 8.86 → 8.78 (60 a second); B = 2 to
// 8 the same or 1 % better. So x2 alone is left of 200 tokens; of 144, 168 and 184 w2 is as good or
// 0.03 ms better. No gain, whole runs: up in 256 × 200 tiles (8.94 and 8.97 against 8.80: epilogues
// in the open) or without clusters (8.79), fc1 without clusters (8.81), vision.out in pairs that
// share weights (8.81); against 8.78: qkv in pairs that share tokens (8.81, with 200 tokens 8.86),
// prefill.out (8.79), vision.out (8.79) and fc2 (8.90) likewise, fc2 in 128 × 96 tiles (9.05). Up
// in clusters of four takes as long at the power limit as in pairs of w2 (173), with 120
// processors.
#include "gemm_sm90.cuh"

// X(name, consumers, MI, BN, stages, CM, CN, CK, turns, epilogue)
// BM = 64 · MI · (turns ? 1 : consumers); name = gemm_<epilogue>_<BM>x<BN>, t: turns, w2: CN = 2,
// k2: CK = 2.
#ifdef GEMM_CANDIDATES  // the lab tries others
#include GEMM_CANDIDATES
#else
#define GEMM_INSTANCES(X)                                                             \
    X(gemm_geglu_128x144_t_w2, 2, 2, 144, 5, 1, 2, 1, 1, GEGLU)                       \
    X(gemm_geglu_128x144_t_x2, 2, 2, 144, 5, 2, 1, 1, 1, GEGLU)                       \
    X(gemm_geglu_128x152_t_x2, 2, 2, 152, 5, 2, 1, 1, 1, GEGLU)                       \
    X(gemm_geglu_128x168_t_w2, 2, 2, 168, 4, 1, 2, 1, 1, GEGLU)                       \
    X(gemm_geglu_128x168_t_x2, 2, 2, 168, 4, 2, 1, 1, 1, GEGLU)                       \
    X(gemm_geglu_128x184_t_w2, 2, 2, 184, 4, 1, 2, 1, 1, GEGLU)                       \
    X(gemm_geglu_128x184_t_x2, 2, 2, 184, 4, 2, 1, 1, 1, GEGLU)                       \
    X(gemm_geglu_128x200_t_x2, 2, 2, 200, 4, 2, 1, 1, 1, GEGLU)                       \
    X(gemm_geglu_256x192_w2, 2, 2, 192, 3, 1, 2, 1, 0, GEGLU)                         \
    X(gemm_add_128x64, 2, 1, 64, 8, 1, 1, 1, 0, ADD)                                  \
    X(gemm_add_128x72, 2, 1, 72, 8, 1, 1, 1, 0, ADD)                                  \
    X(gemm_add_128x104_w2, 2, 1, 104, 6, 1, 2, 1, 0, ADD)                             \
    X(gemm_add_128x128, 2, 1, 128, 6, 1, 1, 1, 0, ADD)                                \
    X(gemm_add_128x216, 2, 1, 216, 4, 1, 1, 1, 0, ADD)                                \
    X(gemm_add_128x48_k2, 2, 1, 48, 8, 1, 1, 2, 0, ADD)                               \
    X(gemm_add_128x72_k2, 2, 1, 72, 8, 1, 1, 2, 0, ADD)                               \
    X(gemm_add_128x80_k2, 2, 1, 80, 8, 1, 1, 2, 0, ADD)                               \
    X(gemm_add_128x96_k2, 2, 1, 96, 7, 1, 1, 2, 0, ADD)                               \
    X(gemm_add_128x120_k2, 2, 1, 120, 6, 1, 1, 2, 0, ADD)                             \
    X(gemm_add_128x128_w2_k2, 2, 1, 128, 6, 1, 2, 2, 0, ADD)                          \
    X(gemm_add_128x136_k2, 2, 1, 136, 6, 1, 1, 2, 0, ADD)                             \
    X(gemm_add_128x168_k2, 2, 1, 168, 4, 1, 1, 2, 0, ADD)                             \
    X(gemm_add_128x184_k2, 2, 1, 184, 4, 1, 1, 2, 0, ADD)                             \
    X(gemm_add_128x200_k2, 2, 1, 200, 4, 1, 1, 2, 0, ADD)                             \
    X(gemm_add_128x224_k2, 2, 1, 224, 4, 1, 1, 2, 0, ADD)                             \
    X(gemm_add_128x248_k2, 2, 1, 248, 4, 1, 1, 2, 0, ADD)                             \
    X(gemm_add_128x200_w2, 2, 1, 200, 4, 1, 2, 1, 0, ADD)                             \
    X(gemm_add_128x192_t_x2, 2, 2, 192, 4, 2, 1, 1, 1, ADD)                           \
    X(gemm_add_128x192_t_w2, 2, 2, 192, 4, 1, 2, 1, 1, ADD)                           \
    X(gemm_add_256x192_w2, 2, 2, 192, 3, 1, 2, 1, 0, ADD)                             \
    X(gemm_add_256x200_w2, 2, 2, 200, 3, 1, 2, 1, 0, ADD)                             \
    X(gemm_rope_128x32, 2, 1, 32, 8, 1, 1, 1, 0, ROPE)                                \
    X(gemm_rope_128x48, 2, 1, 48, 8, 1, 1, 1, 0, ROPE)                                \
    X(gemm_rope_128x64, 2, 1, 64, 8, 1, 1, 1, 0, ROPE)                                \
    X(gemm_rope_128x80, 2, 1, 80, 7, 1, 1, 1, 0, ROPE)                                \
    X(gemm_rope_128x96, 2, 1, 96, 7, 1, 1, 1, 0, ROPE)                                \
    X(gemm_rope_128x120, 2, 1, 120, 6, 1, 1, 1, 0, ROPE)                              \
    X(gemm_rope_128x168, 2, 1, 168, 4, 1, 1, 1, 0, ROPE)                              \
    X(gemm_rope_128x136_w2, 2, 1, 136, 5, 1, 2, 1, 0, ROPE)                           \
    X(gemm_rope_128x192_t_x2, 2, 2, 192, 4, 2, 1, 1, 1, ROPE)                         \
    X(gemm_store_128x64, 2, 1, 64, 8, 1, 1, 1, 0, STORE)                              \
    X(gemm_store_128x96, 2, 1, 96, 7, 1, 1, 1, 0, STORE)                              \
    X(gemm_store_128x128, 2, 1, 128, 6, 1, 1, 1, 0, STORE)                            \
    X(gemm_store_128x192_t_w2, 2, 2, 192, 4, 1, 2, 1, 1, STORE)                       \
    X(gemm_store_u128x160_x2, 2, 1, 160, 5, 2, 1, 1, 0, UPRIGHT_STORE)                \
    X(gemm_gelu_128x88, 2, 1, 88, 7, 1, 1, 1, 0, GELU)                                \
    X(gemm_gelu_192x104, 3, 1, 104, 5, 1, 1, 1, 0, GELU)                              \
    X(gemm_gelu_128x192_t_x2, 2, 2, 192, 4, 2, 1, 1, 1, GELU)                         \
    X(gemm_gelu_u128x200_x2, 2, 1, 200, 4, 2, 1, 1, 0, UPRIGHT_GELU)                  \
    X(gemm_store_position_128x40, 2, 1, 40, 8, 1, 1, 1, 0, STORE_POSITION)            \
    X(gemm_store_position_128x64, 2, 1, 64, 8, 1, 1, 1, 0, STORE_POSITION)            \
    X(gemm_store_position_128x192_t_w2, 2, 2, 192, 4, 1, 2, 1, 1, STORE_POSITION)
#endif

GEMM_INSTANCES(GEMM_KERNEL)
