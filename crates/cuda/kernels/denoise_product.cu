// The products of the denoise loop for up to 16 rows: out = epilogue(norm(x) * W^T), BF16 weights
// and rows, FP32 sums. More rows are for denoise_wide.cu.
//
// | kernel denoise_… | N x K       | out                      | grid           |
// |------------------|-------------|--------------------------|----------------|
// | qkv_16           | 2560 x 1024 | rotary; q, k, v rows     | 160            |
// | o_16             | 1024 x 2048 | old + gate * y, stream   | 128, cluster 2 |
// | gate_up_16       | 8192 x 1024 | gelu(gate) * up          | 256            |
// | down_16          | 1024 x 4096 | old + gate * y, stream   | 256, cluster 4 |
// | mlp_out_16       | 1024 x 1024 | y + bias, stream         | 64             |
//
// 288 threads: 8 warps that compute, one that loads weights. A CTA has N / 16 / (grid / cluster)
// tiles of 16 outputs. Dynamic shared memory: 32 KB a tile. The cluster size and programmatic
// dependent launch are launch attributes.
//
// Weights: packed as denoise_load.cu says; a tile of 16 outputs is contiguous, K-slices in order.
// A cluster splits K. A warp owns an eighth of the CTA's inputs and all of its outputs; x goes
// from L2 by way of L1 to registers as the B fragment of mma.m16n8k16 (tokens are the n
// side), weights through shared memory. x lies in blocks of 32 columns (DenoiseRows).
// Norm (qkv, gate‖up): y = rms(x) * (W * (scale * x)) + bias. Whoever writes the stream also
// writes it times the scale of the norm that follows (learned, or an adaptive norm's 1 + scale),
// rounded once, and its sums of squares, one per 16 features; W * shift of an adaptive norm comes
// as `bias` from denoise_fold_shift. A scale inside W would round the weights twice.
// `input_sums` belongs to the stream as `out_sums` does to `out`; a kernel that reads one stream
// and writes the next must not share one buffer of sums between them.
// Every sum has a fixed order: over warps as a tree, over the cluster by rank.
//
// Notes (π0 / π0.5, h = 10, whole loop of 10 x 18 with 788 prefix keys, CUDA 13.0)
// Limit: 6.23 GB of weights, 1.35 ms (H200) or 2.05 ms (H100). Predicted 2.6 ms for five dependent
// launches a layer-step.
// | version (2026-11-22, H200)                                             | ms          |
// |------------------------------------------------------------------------|-------------|
// | norm in each CTA from x itself, addresses after the wait                | 4.39        |
// | cluster mail by st.async instead of stores and a barrier (no MEMBAR)    | 4.21        |
// | sums of squares handed on by the writers (predicted 3.9)                | 4.1 - 4.3   |
// | arrival polled in the data (poison) instead of the launch dependency    | 4.1 - 4.4   |
// | at most 3 copies of 8 KB under way, else the same (predicted 3.5)       | 4.05        |
// | no run-time modes, every address before the wait: 1650 -> 780 instrs    | 3.55 - 3.74 |
// | down in 256 CTAs of 32 KB instead of 128 of 64 KB                       | 3.45        |
// | attention_suffix_r16_c8 instead of a stand-in of our own                | 3.18        |
// | depth 4, scales folded into W (dropped: it rounds W twice)              | 3.13        |
// | norm scales multiplied by every reader of x (96 registers)              | 3.51        |
// | version (2026-11-25, H100)                                             |             |
// | the same                                                                | 3.74        |
// | the stream's writers also write it times the scale (predicted 3.4)      | 3.40        |
// | depth by kernel (all 4 before)                                          | 3.35        |
// | rows of padding not fetched                                             | 3.31        |
// | x through L1 instead of L2: half of gate‖up's traffic                   | 3.20        |
// | sums through L1, depth 3 2 4 3                                          | 3.12 - 3.18 |
// | rows in blocks of 32 columns: a quarter of a warp takes one cache line, |             |
// |   not halves of two (predicted 3.05), `old` by its owner alone          | 3.07        |
// | depth 3 2 4 4, no address computed once x is asked for                  | 2.97 - 3.00 |
//
// Where a layer-step goes (H100, stamps of %globaltimer in every CTA, us): from a kernel's last
// store to the release of the next 0.6 - 0.7; from there to x in the slowest CTA 1.9 - 2.8 (0.6 in
// the fastest); products and sums 0.3 - 1.1; cluster mail of o and down 0.7. Attention 4.4. The
// weights are there before x but for the gate‖up CTAs that find no room beside attention's. What
// shortens the fetch of x helps, what makes room or fetches weights earlier does not: a loaded
// memory system answers x later.
// Tried, no better (H100, against 3.40): weights of later kernels brought into L2 by this one, all
// or part, early or once released (3.74 - 4.2); x by bulk copies into shared memory (3.5 - 3.9), by
// multicast to 2 or 4 CTAs (qkv 3.36, gate‖up 3.48 and 3.64: x is there after 0.9, but takes room
// and is read twice); K split over clusters so that a CTA needs a part of x (qkv 3.37, o 3.49,
// gate‖up 3.61, down 3.44); 56 or 40 registers for more CTAs at once (3.51, 4.6); gate‖up with 16
// warps (3.73); attention over 16 CTAs (3.56). Boxes of 4 KB, 6 of them: 0.03 better, once. Against
// 3.19: qkv or down in 2 tiles (3.33, 3.37), gate‖up in 4 or 1 (3.43, 3.64). Against 3.12:
// attention with K before V or V after q (3.13, 3.18), its V in registers early (3.15); weights of
// 64 outputs side by side (3.20), boxes of 4 KB (3.17), weights in rows of 64 bytes, so that a
// fragment is put together of two loads (3.26); o, gate‖up or down by the wide kernel of 24 rows
// (3.27, 3.45, 3.16). Against 3.18: two or four copies of x, so that fewer CTAs read the same lines
// (3.23, 3.30); x in blocks of 8 columns (3.29: four lines to a quarter of a warp). Against 3.00:
// the CTAs of a product that found room fetch the weights of those that did not into L2 (gate‖up
// 3.03, down 3.01, qkv 3.00); o or down in 2 tiles, so that more of the next product's CTAs find
// room (3.28 where 2.8 was predicted, 3.25), o without a cluster (3.15), qkv in 2 tiles (3.02);
// sums of even and odd columns apart (3.04), the norm's sums before the products (3.11). The same
// binary takes 2.97 to 3.02, by where its buffers come to lie.
// What is left (H100, 2026-11-26, 3.09): without the fetch of x 2.86, without weights 2.63, with
// neither weights, x nor sums 2.22, which is the chain of dependencies alone (qkv 1.7, attention
// 3.5, o 2.0, gate‖up 2.3, down 2.4 us). Weights that come from L2 3.10; a copy of x for every
// multiprocessor, so that no line is read by two, 3.13. Dependents launched later, once the weights
// are there or the sums are taken: one kind of kernel 3.2 - 3.9, all 4.1 - 4.4, attention's 3.3;
// earlier, as the first instruction: 3.09 - 3.2.
// Copies of weights asked for by a lane that the compiler knows to be alone, so earlier: 0.04 ms
// slower in the whole replay (elect_one, which the wide kernels gain by: h = 50 4.95 -> 4.89).
#include "denoise_product.cuh"

#define DENOISE_PRODUCT(name, CTAS, ...)                                \
  extern "C" __global__ void __launch_bounds__(denoise::kBlock, CTAS)   \
      name(const __grid_constant__ DenoiseProductParams p) {            \
    using namespace denoise;                                            \
    run_product<__VA_ARGS__>(p);                                        \
  }

DENOISE_PRODUCT(denoise_qkv_16, 3, Epilogue::Qkv, 1, 1024, 1)
DENOISE_PRODUCT(denoise_o_16, 3, Epilogue::Add, 1, 1024, 2)
DENOISE_PRODUCT(denoise_gate_up_16, 3, Epilogue::GeGlu, 2, 1024, 1)
DENOISE_PRODUCT(denoise_down_16, 3, Epilogue::Add, 1, 1024, 4)
DENOISE_PRODUCT(denoise_mlp_out_16, 3, Epilogue::Store, 1, 1024, 1)
