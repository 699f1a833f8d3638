// The products of the prefix tower's MLPs at precision fp8: the towers' kernel (gemm_sm90.cuh)
// with both operands E4M3 and f32 sums, m64nNk32 at twice the rate of bf16's m64nNk16. Called by
// the same host twin, checked and timed by the same lab (cases fp8.up and fp8.down).
//
//   up    E4M3_GEGLU  [32768, 2048]  x = e4m3(2^t · norm(x)), by rows_e4m3.cu;
//                                    h = e4m3(gelu(factor.x · gate) · factor.y · up)
//   down  E4M3_ADD    [2048, 16384]  out += factor.x · product; leaves statistics, the scaled copy
//
// Factors are a row's: they take its powers of two and the weights' out of the product (fp8.rs of
// the model's crate says which, and why nothing overflows). They come as the other products'
// records do. A hidden unit's own power lies in its row of up and its column of down. 128 bytes of
// a row are 128 columns, so stages, rings and clusters are those of bf16 with half as many stages.
//
// wgmma sums E4M3 products with fewer bits than f32 has. It does not show: the actions of the full
// models are as far from openpi's F32 as with f32 sums by mma.sync of the same numbers (portable
// tier: π0 3.85, 4.03, 4.27 %, here 3.91, 4.04, 4.40 %).
//
// Inside the replay, 788 rows, µs (bf16 beside it; H100, 2026-11-27, nvcc 13.0): up 67.9 (134), to
// which comes rows_e4m3, 4.2; down 44.1 (78). Predicted 77 and 40. Limit
// at twice bf16's 790 TFLOP/s: 67 and 33. B = 64 (50432 rows), whole prefill at the power limit
// 291 → 164.5 ms. No gain (H200, batches of 4, 16 and 64): 256 × 192 tiles for up (254 → 260 ms),
// 256 × 200 for down; 128 × 184 for up is the same.
#include "gemm_sm90.cuh"

// As GEMM_INSTANCES of gemm_sm90.cu.
#define GEMM_E4M3_INSTANCES(X)                                                        \
    X(gemm_e4m3_geglu_128x144_t_x2, 2, 2, 144, 5, 2, 1, 1, 1, E4M3_GEGLU)             \
    X(gemm_e4m3_geglu_128x168_t_x2, 2, 2, 168, 4, 2, 1, 1, 1, E4M3_GEGLU)             \
    X(gemm_e4m3_geglu_128x184_t_x2, 2, 2, 184, 4, 2, 1, 1, 1, E4M3_GEGLU)             \
    X(gemm_e4m3_geglu_128x200_t_x2, 2, 2, 200, 4, 2, 1, 1, 1, E4M3_GEGLU)             \
    X(gemm_e4m3_add_128x72_k2, 2, 1, 72, 8, 1, 1, 2, 0, E4M3_ADD)                     \
    X(gemm_e4m3_add_128x104_k2, 2, 1, 104, 6, 1, 1, 2, 0, E4M3_ADD)                   \
    X(gemm_e4m3_add_128x136_k2, 2, 1, 136, 6, 1, 1, 2, 0, E4M3_ADD)                   \
    X(gemm_e4m3_add_128x184_k2, 2, 1, 184, 4, 1, 1, 2, 0, E4M3_ADD)                   \
    X(gemm_e4m3_add_128x200_k2, 2, 1, 200, 4, 1, 1, 2, 0, E4M3_ADD)                   \
    X(gemm_e4m3_add_128x248_k2, 2, 1, 248, 4, 1, 1, 2, 0, E4M3_ADD)                   \
    X(gemm_e4m3_add_128x200_w2, 2, 1, 200, 4, 1, 2, 1, 0, E4M3_ADD)                   \
    X(gemm_e4m3_add_128x192_t_x2, 2, 2, 192, 4, 2, 1, 1, 1, E4M3_ADD)                 \
    X(gemm_e4m3_add_256x192_w2, 2, 2, 192, 3, 1, 2, 1, 0, E4M3_ADD)
GEMM_E4M3_INSTANCES(GEMM_KERNEL)
