// The products of an Euler loop of many rows (from 209 on: batches of 32 at horizon 10): the
// towers' kernel (gemm_sm90.cuh) with what the loop needs beside (OF_LOOP), in tiles for its
// widths. Called by the same host twin, checked and timed by the same lab; the choice and its
// formula are those of gemm_sm90.cu.
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
#include "gemm_sm90.cuh"

// As GEMM_INSTANCES of gemm_sm90.cu. Tiles are such that 320, 640, 800 and 3200 rows, with and
// without a state token each, fill the processors once or twice.
#define GEMM_LOOP_INSTANCES(X)                                                        \
    X(gemm_loop_rope_128x64, 2, 1, 64, 8, 1, 1, 1, 0, LOOP_ROPE)                      \
    X(gemm_loop_rope_128x112, 2, 1, 112, 6, 1, 1, 1, 0, LOOP_ROPE)                    \
    X(gemm_loop_rope_128x136, 2, 1, 136, 5, 1, 1, 1, 0, LOOP_ROPE)                    \
    X(gemm_loop_rope_128x208, 2, 1, 208, 4, 1, 1, 1, 0, LOOP_ROPE)                    \
    X(gemm_loop_geglu_128x160_t_x2, 2, 2, 160, 5, 2, 1, 1, 1, LOOP_GEGLU)             \
    X(gemm_loop_geglu_128x176_t_x2, 2, 2, 176, 4, 2, 1, 1, 1, LOOP_GEGLU)             \
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
