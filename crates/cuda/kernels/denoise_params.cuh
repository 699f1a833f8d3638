// What the host hands to the denoise kernels: plain structs, same bytes as their Rust twins.
#pragma once

#include "denoise_ptx.cuh"

// Rows of a matrix: row i of the work is matrix row (i / count) * stride + first + i % count, and
// its column c is element row * width + c / 32 * step + c % 32: row-major where `step` is 32, else
// in blocks of 32 columns and 16 rows, `width` 32 and `step` 512. What many CTAs of few rows read
// is in blocks: a quarter of a warp then fetches one whole cache line instead of halves of two.
struct DenoiseRows {
  denoise::u32 stride;  // matrix rows from one sample to the next
  denoise::u32 first;   // first row of a sample
  denoise::u32 count;   // rows of a sample, at least 1
  denoise::u32 width;   // elements from one matrix row to the next
  denoise::u32 step;    // elements from 32 columns to the next 32
};
static_assert(sizeof(DenoiseRows) == 20, "shared with the host");

// One product with its norm and epilogue. Pointers a kernel does not use are null.
struct DenoiseProductParams {
  const uint4* weight;         // packed bf16, see denoise_load.cu
  const denoise::u16* input;   // bf16 [*, K]; qkv, gate‖up: with the norm's scale in it
  denoise::u16* out;           // bf16: q, hidden units, or the residual stream (may be `old`)
  const denoise::u16* old;     // o, down: bf16 residual stream to add to (rows as `out`'s)
  denoise::u16* k;             // qkv: bf16 key rows of this layer's cache, 256 wide
  denoise::u16* v;             // qkv: bf16 value rows of this layer's cache, 256 wide
  const float* bias;           // f32 [N] in the weight's original row order, or null
  const float* gate;           // f32 [N], adaptive norm's gate of this step, or null
  const float* input_sums;     // qkv, gate‖up: f32 [stream rows][64] sums of squares of the stream
  const float* next_scale;     // o, down, mlp_out: f32 [N], scale of the norm that follows
  denoise::u16* scaled;        // the same: bf16 copy of `out` times it, or null
  float* out_sums;             // o, down, mlp_out: the same of `out`, 16 features each
  const float2* rope;          // qkv: (cos, sin) [positions][128]
  const denoise::u32* lengths; // qkv: [samples][2]: cameras, prompt tokens
  DenoiseRows input_rows;      // where the rows of `input` lie
  DenoiseRows out_rows;        // where the rows of `out` lie (same count)
  DenoiseRows cache_rows;      // qkv: where the rows of `k` and `v` lie (same count)
  DenoiseRows scaled_rows;     // where the rows of `scaled` lie (same count)
  denoise::u32 rows;           // rows of work: samples * count
  denoise::u32 image_tokens;   // qkv: prefix tokens of one camera
  denoise::u32 first_position; // qkv: position of a sample's row 0 less its prefix length
  denoise::u32 depth;          // copies of 8 KB of weights under way at a time
};
static_assert(sizeof(DenoiseProductParams) == 14 * 8 + 4 * 20 + 16, "shared with the host");

// The edge between two steps: action_out + Euler of the step before, action_in of the next.
struct DenoiseEdgeParams {
  const denoise::u16* stream;     // bf16 residual stream after the last layer; null: no action_out
  const float* norm_scale;        // f32 [1024] 1 + scale of the final adaptive norm, or null
  const float* norm_shift;        // f32 [1024] its shift, or null
  const float* out_weight;        // f32 [32][1024], dt (and π0's norm weight) folded in
  const float* out_bias;          // f32 [32], dt folded in
  float* actions;                 // f32 [samples * horizon][32], x_t, updated in place
  const float* in_weight;         // f32 [32][1024] (input-major); null: no action_in
  const float* in_bias;           // f32 [1024] of the coming step
  denoise::u16* out;              // bf16 rows that action_in writes
  const float* state;             // f32 [samples][32]; null: no state token
  const float* state_weight;      // f32 [32][1024] (input-major)
  const float* state_bias;        // f32 [1024]
  denoise::u16* state_out;        // bf16 residual stream for the state token
  const float* next_scale;        // f32 [1024] scale of the norm of the first layer
  denoise::u16* scaled;           // bf16 copy of what goes to the stream times it, or null
  float* sums;                    // f32 [stream rows][64] sums of squares of what goes to the
                                  // stream (`state_out`, and `out` unless silu), 16 features each
  float2* stats;                  // of many rows, instead: [stream rows][16] sums and sums of
                                  // squares, 64 features each
  DenoiseRows stream_rows;        // where the action rows of `stream` lie
  DenoiseRows out_rows;           // where the action rows of `out` lie
  DenoiseRows state_rows;         // where the state rows of `state_out` lie (count 1)
  denoise::u32 rows;              // samples * horizon
  denoise::u32 samples;           // samples
  denoise::u32 silu;              // 1: action_in ends in x * sigmoid(x)
  denoise::u32 scaled_width;      // as DenoiseRows says, of `scaled`; its rows are the stream's
  denoise::u32 scaled_step;
  denoise::u32 share;             // rows of a CTA of many rows
  denoise::u32 reserved;          // 0
};
static_assert(sizeof(DenoiseEdgeParams) == 17 * 8 + 3 * 20 + 28, "shared with the host");
