// The products of the denoise loop for 17 to 88 rows (h = 50; small batches): out =
// epilogue(norm(x) * W^T), BF16 weights and rows, FP32 sums. Weights, parameters and epilogues are
// those of denoise_product.cu.
//
// A CTA owns 64 outputs, so that every role has 40 to 128 of them: K is split over a cluster where
// N alone gives too few, and the cluster shares the epilogue out. One thread fills a ring of stages
// (128 inputs: 16 KB of weights by bulk copies, the rows by two tensor copies of 64 columns); the
// first stages' weights are requested before the dependency is met. A warpgroup reads the weights'
// fragments into registers and multiplies by wgmma, rows being its n side, straight from the ring.
// Blocks of 256 threads: 128 multiply, one warp loads, three turn sums of squares into rms. Every
// sum has a fixed order: over K in the accumulators, over the cluster by rank.
// Limit: the weights, 11.5 us a layer-step on an H100 (8 on an H200); every CTA also reads its K
// slice of all rows from L2, gate‖up's 128 CTAs 14.7 MB at 56 rows.
//
// Grid: N / 64 * cluster. Dynamic shared memory: stages * (64 + rows) * 256, and 2048 a group of
// rows for a cluster's mail, and 1024 to align the ring. The cluster size and programmatic
// dependent launch are launch attributes. Rows: a tensor map of bf16 [samples][count][K], boxes of
// 64 columns and all rows, 128-byte swizzle, no interleave.
//
// H100, 2026-11-25, nvcc 13.0, pi0.5, whole loop of 10 x 18 with 788 prefix keys, ms (before: the
// mma.sync kernels of denoise_product.cuh at 32 and 56 rows, the tower's products from 57 on):
// | rows | shape        | before | now  |     | rows | shape          | before | now  |
// |------|--------------|--------|------|-----|------|----------------|--------|------|
// | 20   | h = 10, B 2  | 4.80   | 3.70 |     | 80   | h = 10, B 8    | 14.3   | 7.2  |
// | 40   | h = 10, B 4  | 6.93   | 4.76 |     | 160  | h = 10, B 16   | 16.9   | 12.0 |
// | 50   | h = 50       | 7.10   | 4.98 |     | 200  | h = 50, B 4    |        | 14.1 |
// From 89 rows on the tower's products are faster since they take the loop's norms and epilogues in
// (gemm_loop_sm90.cu): H200, 2026-11-26, whole runs, 120 rows 11.3 ms instead of 14.0, 160 12.1
// instead of 16.9, 80 8.7 instead of 9.0. The instances for 136, 176 and 208 rows went.
// At 50 rows alone, us: qkv 5.3, o 3.7, gate‖up 7.2 (5.6 for its weights), down 6.1.
// Tried at 50 rows, no better (against 5.20, qkv in clusters of 2): qkv in clusters of 4 (5.75; its
// 160 CTAs keep attention's out), o in 4 (5.46), down in 4 (5.47), gate‖up with 128 outputs a CTA
// (5.94) or 2 stages (5.17), rows by multicast to pairs of gate‖up's CTAs (5.07 against 5.06, at 80
// rows 7.27 against 7.19, at 160 12.75 against 12.72) or of qkv's (5.15), 7 stages and one CTA a
// multiprocessor (5.33), down in 2 stages (5.50).
// Nor, whole runs at h = 50 (H100, 2026-11-27): the weights of the stages behind the ring brought
// into L2 before the dependency is met (11.34 ms against 11.00; for gate‖up alone 11.35).
// These kernels at 10 rows: 3.42, against 3.12 of denoise_product.cu. Weights with the 64 outputs
// of a stage side by side would give 0.1 here and cost 0.09 there.
#include "denoise_wide.cuh"

// X(name, CTAs a multiprocessor, epilogue, K, cluster, groups of 8 rows, stages)
#define DENOISE_WIDE(X)                                       \
  X(denoise_qkv_24, 2, Qkv, 1024, 2, 3, 4)                    \
  X(denoise_o_24, 2, Add, 2048, 4, 3, 4)                      \
  X(denoise_gate_up_24, 2, GeGlu, 1024, 1, 3, 4)              \
  X(denoise_down_24, 2, Add, 4096, 8, 3, 4)                   \
  X(denoise_mlp_out_24, 2, Store, 1024, 8, 3, 4)              \
  X(denoise_qkv_56, 2, Qkv, 1024, 1, 7, 3)                    \
  X(denoise_o_56, 2, Add, 2048, 8, 7, 3)                      \
  X(denoise_gate_up_56, 2, GeGlu, 1024, 1, 7, 3)              \
  X(denoise_down_56, 2, Add, 4096, 8, 7, 3)                   \
  X(denoise_mlp_out_56, 2, Store, 1024, 8, 7, 3)              \
  X(denoise_qkv_88, 2, Qkv, 1024, 2, 11, 2)                   \
  X(denoise_o_88, 2, Add, 2048, 8, 11, 2)                     \
  X(denoise_gate_up_88, 2, GeGlu, 1024, 1, 11, 2)             \
  X(denoise_down_88, 2, Add, 4096, 8, 11, 2)                  \
  X(denoise_mlp_out_88, 2, Store, 1024, 8, 11, 2)

#define DENOISE_WIDE_KERNEL(NAME, CTAS, E, ...)                                              \
  extern "C" __global__ void                                                                 \
      __launch_bounds__(denoise::Wide<denoise::Epilogue::E, __VA_ARGS__>::kBlock, CTAS)      \
      NAME(const __grid_constant__ DenoiseProductParams p,                                   \
           const __grid_constant__ ptx::TensorMap x) {                                       \
    denoise::run_wide<denoise::Epilogue::E, __VA_ARGS__>(p, x);                              \
  }
DENOISE_WIDE(DENOISE_WIDE_KERNEL)
