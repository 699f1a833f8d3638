// The products of an Euler loop of many rows (from 89 on: batches of 9 at horizon 10): the towers'
// kernel (gemm_sm90.cuh) with what the loop needs beside (OF_LOOP), in tiles for its widths. Called
// by the same host twin, checked and timed by the same lab; the choice and its formula are those of
// gemm_sm90.cu.
//
//   qkv   LOOP_ROPE   [2560, 1024]  norm, positions behind the real prefix
//   out   LOOP_ADD    [1024, 2048]  gate (π0.5); leaves statistics and the scaled copy
//   up    LOOP_GEGLU  [8192, 1024]  norm
//   down  LOOP_ADD    [1024, 4096]  as out
//   mlp   LOOP_STORE  [1024, 2048]  π0's action MLP: f32 weights in two parts, w = hi + lo as bf16
//                     matrices side by side, on 1024 columns of x read twice. |w − hi − lo| is at
//                     most 2⁻¹⁸ |w|, a 500th of what rounding the output to bf16 costs
//
// An adaptive norm is rstd · (x · (1 + s)) + t: s is in the scaled copy, t · Wᵀ is the bias.
//
// Fastest, µs per launch, H200, 2026-11-26, nvcc 13.0, lab `time`, weights cold in L2:
//          160 rows         200              640                  704
//   qkv    128x32    5.3    128x40     5.8   128x112       10.3   128x136       12.3
//   out    128x32_k2 6.2    128x32_k2  6.4   128x80_k2      8.3   128x88_k2      8.7
//   up     128x88_t  8.8    128x104_t  9.3   128x160_t     19.2   128x176_t     20.4
//   down   128x32_k2 9.6    128x32_k2 10.0   128x80_k2     12.4   128x88_k2     13.4
//   mlp    128x48_k2 6.4    128x48_k2  6.9   128x80_k2      8.3   128x104_k2     9.2
// In the replay of a batch of 64 mlp takes 10.4 µs a step (predicted 12 to 13); in f32, by a
// portable kernel, it took 200, and f32's limit would be 28 at 1.43 GHz. Before, a pass over the
// rows normalised them for qkv and up (4.8 µs each), another turned q and k (5.6), π0.5's gates
// were two more: 98.6 → 93.5 µs a layer-step of 640 rows in the replay and not 83, since out and
// down take 1.5 µs more for the copy and attention waits for q itself. Whole loops, ms (before):
//   π0    h = 10: B = 12 11.3 (14.0), 16 12.1 (16.9), 32 12.9 (16.3), 64 17.0 (21.0)
//         h = 50: B = 2 8.0 (9.2), 16 19.6 (23.5), 64 59.6
//   π0.5  h = 10: B = 16 11.8 (16.4), 64 16.8 (21.0)
// Up to 208 rows "before" were denoise_wide.cu's kernels, which at B = 8 are nearly as fast (9.0;
// 8.7) and stay.
// One wave of 256 × 160 tiles for up at 640 rows instead of two of 128 × 160 that take turns (H100,
// 2026-11-26): cold with pauses 24.7 → 22.7 µs, back to back 21.7 → 20.3, the loop of B = 64 16.6 →
// 16.35 ms (predicted 16.3).
// No gain: narrower tiles for fewer rows (16 and 24 tokens; 48 for up), since the weights' way from
// memory is the limit; 48 of add at 160 rows 6.3.
#include "gemm_sm90.cuh"

// As GEMM_INSTANCES of gemm_sm90.cu. Tiles are such that 160, 200, 320, 640, 800 and 3200 rows,
// with and without a state token each, fill the processors once or twice.
#define GEMM_LOOP_INSTANCES(X)                                                        \
    X(gemm_loop_rope_128x32, 2, 1, 32, 8, 1, 1, 1, 0, LOOP_ROPE)                      \
    X(gemm_loop_rope_128x40, 2, 1, 40, 8, 1, 1, 1, 0, LOOP_ROPE)                      \
    X(gemm_loop_rope_128x64, 2, 1, 64, 8, 1, 1, 1, 0, LOOP_ROPE)                      \
    X(gemm_loop_rope_128x112, 2, 1, 112, 6, 1, 1, 1, 0, LOOP_ROPE)                    \
    X(gemm_loop_rope_128x136, 2, 1, 136, 5, 1, 1, 1, 0, LOOP_ROPE)                    \
    X(gemm_loop_rope_128x208, 2, 1, 208, 4, 1, 1, 1, 0, LOOP_ROPE)                    \
    X(gemm_loop_geglu_128x88_t_x2, 2, 2, 88, 7, 2, 1, 1, 1, LOOP_GEGLU)               \
    X(gemm_loop_geglu_128x104_t_x2, 2, 2, 104, 6, 2, 1, 1, 1, LOOP_GEGLU)             \
    X(gemm_loop_geglu_128x160_t_x2, 2, 2, 160, 5, 2, 1, 1, 1, LOOP_GEGLU)             \
    X(gemm_loop_geglu_128x176_t_x2, 2, 2, 176, 4, 2, 1, 1, 1, LOOP_GEGLU)             \
    X(gemm_loop_geglu_256x160_w2, 2, 2, 160, 3, 1, 2, 1, 0, LOOP_GEGLU)               \
    X(gemm_loop_add_128x32_k2, 2, 1, 32, 8, 1, 1, 2, 0, LOOP_ADD)                     \
    X(gemm_loop_add_128x48_k2, 2, 1, 48, 8, 1, 1, 2, 0, LOOP_ADD)                     \
    X(gemm_loop_add_128x80_k2, 2, 1, 80, 8, 1, 1, 2, 0, LOOP_ADD)                     \
    X(gemm_loop_add_128x88_k2, 2, 1, 88, 7, 1, 1, 2, 0, LOOP_ADD)                     \
    X(gemm_loop_add_128x104_k2, 2, 1, 104, 6, 1, 1, 2, 0, LOOP_ADD)                   \
    X(gemm_loop_add_128x208, 2, 1, 208, 4, 1, 1, 1, 0, LOOP_ADD)                      \
    X(gemm_loop_store_128x48_k2, 2, 1, 48, 8, 1, 1, 2, 0, LOOP_STORE)                 \
    X(gemm_loop_store_128x80_k2, 2, 1, 80, 8, 1, 1, 2, 0, LOOP_STORE)                 \
    X(gemm_loop_store_128x104_k2, 2, 1, 104, 6, 1, 1, 2, 0, LOOP_STORE)               \
    X(gemm_loop_store_128x208, 2, 1, 208, 4, 1, 1, 1, 0, LOOP_STORE)
GEMM_LOOP_INSTANCES(GEMM_KERNEL)
