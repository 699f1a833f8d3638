// Load-time helpers of the denoise loop: packing of weights, folding of the adaptive shift.
//
// Packed layout of a bf16 weight W [N, K]: 16-byte units in the order [N/16 tiles][K/32 blocks]
// [2 halves][32 places]. With r = 0 … 7, t = 0 … 3 and k = block * 32 + t * 8 + half * 4 a unit's
// eight elements are W[lo + r][k, k+1], W[hi + r][k, k+1], W[lo + r][k+2, k+3] and
// W[hi + r][k+2, k+3]. lo and hi are the original rows of tile rows 0 and 8:
//   plain (O, down, MLP, QKV)   lo = 16 tile,   hi = lo + 8
//   gate‖up (N = 2 M)           lo = 8 tile,    hi = M + 8 tile
// so that a unit is a lane's A fragment of mma.m16n8k16, the B fragment is 16 consecutive bytes
// of a token's row, and gate and up (or the two halves of a rotary pair, which the host has put 8
// apart) meet in one lane. Its place is 4 r + (t ^ (r / 2 % 2 + 2 half)): neither eight lanes that
// read such fragments (denoise_product.cuh) nor sixteen that read halves of units for fragments of
// consecutive inputs (denoise_wide.cuh) share banks.
#include "denoise_params.cuh"

namespace denoise {
namespace {
// Original rows of tile rows 0 and 8.
__device__ __forceinline__ uint2 packed_rows(u32 kind, u32 tile, u32 outputs) {
  return kind == 1 ? make_uint2(tile * 8, outputs / 2 + tile * 8)
                   : make_uint2(tile * 16, tile * 16 + 8);
}

// Where a unit lies.
__device__ __forceinline__ u64 unit_at(u32 tile, u32 block, u32 half, u32 r, u32 t, u32 inputs) {
  return (static_cast<u64>(tile) * (inputs / 32) + block) * 64 + half * 32 + r * 4 +
         (t ^ (r / 2 % 2 + 2 * half));
}
}  // namespace
}  // namespace denoise

// packed = pack(weight [outputs, inputs]), outputs in 64s, inputs in 128s; kind 0 plain, 1 gate‖up.
// One thread a unit: outputs * inputs / 8 threads.
extern "C" __global__ void denoise_pack(const unsigned short* weight, uint4* packed,
                                        unsigned outputs, unsigned inputs, unsigned kind) {
  using namespace denoise;
  const u64 unit = static_cast<u64>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (unit >= static_cast<u64>(outputs) * inputs / 8) return;
  const u32 r = unit / 4 % 8, t = unit % 4, half = unit / 32 % 2;
  const u32 block = unit / 64 % (inputs / 32), tile = unit / 64 / (inputs / 32);
  const uint2 f = packed_rows(kind, tile, outputs);
  const u32 k = block * 32 + t * 8 + half * 4;
  const uint2 lo = *reinterpret_cast<const uint2*>(weight + static_cast<u64>(f.x + r) * inputs + k);
  const uint2 hi = *reinterpret_cast<const uint2*>(weight + static_cast<u64>(f.y + r) * inputs + k);
  packed[unit_at(tile, block, half, r, t, inputs)] = make_uint4(lo.x, hi.x, lo.y, hi.y);
}

// bias[step][n] = sum over k of W[n][k] * table[step][inputs + k]: what the shift of an adaptive
// norm adds to a product. table is [steps, 3 * inputs] f32 (scale + 1 | shift | gate), bias
// [steps, outputs] f32. One warp a tile: grid (outputs / 16, steps), 32 threads.
extern "C" __global__ void denoise_fold_shift(const uint4* packed, const float* table, float* bias,
                                              unsigned outputs, unsigned inputs, unsigned kind) {
  using namespace denoise;
  const u32 lane = threadIdx.x, tile = blockIdx.x, step = blockIdx.y;
  const u32 r = lane / 4, t = lane % 4;
  const float* shift = table + (static_cast<u64>(step) * 3 + 1) * inputs;
  float lo = 0.0f, hi = 0.0f;
  for (u32 i = 0; i < inputs / 16; ++i) {
    const uint4 w = packed[unit_at(tile, i / 2, i % 2, r, t, inputs)];
    const float4 s = *reinterpret_cast<const float4*>(shift + i / 2 * 32 + t * 8 + i % 2 * 4);
    lo += bf16_low(w.x) * s.x + bf16_high(w.x) * s.y + bf16_low(w.z) * s.z + bf16_high(w.z) * s.w;
    hi += bf16_low(w.y) * s.x + bf16_high(w.y) * s.y + bf16_low(w.w) * s.z + bf16_high(w.w) * s.w;
  }
  for (u32 d = 1; d < 4; d *= 2) {
    lo += __shfl_xor_sync(~0u, lo, d);
    hi += __shfl_xor_sync(~0u, hi, d);
  }
  const uint2 f = packed_rows(kind, tile, outputs);
  if (lane % 4 == 0) {
    bias[static_cast<u64>(step) * outputs + f.x + lane / 4] = lo;
    bias[static_cast<u64>(step) * outputs + f.y + lane / 4] = hi;
  }
}
