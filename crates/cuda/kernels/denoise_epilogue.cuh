// What becomes of the sums of a denoise product: norm, bias, rotary turn, GeGLU, gate and residual,
// the copy for the next norm and its sums of squares. Shared by the few-row and the wide kernels.
#pragma once

#include "denoise_params.cuh"

namespace denoise {

enum class Epilogue { Qkv, GeGlu, Add, Store };

constexpr u32 kSums = 64;  // partial sums of squares of a stream row: one per 16 features

__device__ __forceinline__ u32 row_index(const DenoiseRows& rows, u32 i) {
  const u32 sample = i < rows.count ? 0 : i / rows.count;
  return sample * rows.stride + rows.first + i - sample * rows.count;
}

// Where column c of row i lies.
__device__ __forceinline__ u64 element_of(const DenoiseRows& rows, u32 i, u32 c) {
  return static_cast<u64>(row_index(rows, i)) * rows.width + c / 32 * rows.step + c % 32;
}

// gelu_tanh(x) = x * sigmoid(2 * sqrt(2/pi) * (x + 0.044715 x^3))
__device__ __forceinline__ float gelu(float x) {
  const float u = 1.5957691216057308f * (x + 0.044715f * x * x * x);
  return __fdividef(x, 1.0f + __expf(-u));
}

// Eight lanes (those of equal lane % 4) hold one feature each of tokens t and t + 1, packed:
// gathers 8 consecutive features. Lanes 0-3 get token t, lanes 4-7 token t + 1.
__device__ __forceinline__ uint4 gather_features(u32 own, u32 lane) {
  const u32 other = __shfl_xor_sync(~0u, own, 4);
  const u32 two = lane & 4 ? __byte_perm(other, own, 0x7632) : __byte_perm(own, other, 0x5410);
  const u32 next = __shfl_xor_sync(~0u, two, 8);
  const u32 a = __shfl_xor_sync(~0u, two, 16);
  const u32 b = __shfl_xor_sync(~0u, next, 16);
  return make_uint4(two, next, a, b);
}

// What an output item needs besides its sum: fetched before the sum is there.
struct Extra {
  float first, second;  // bias (Qkv, GeGlu, Store) or gate (Add) of rows r and r + 8 of the tile
  float next_first, next_second;  // Add, Store: the scale of the norm that follows, same rows
  float2 turn0, turn1;  // Qkv: cos, sin of tokens t and t + 1
  u16 old[4];           // Add: stream values (row r: t, t + 1; row r + 8: t, t + 1)
  const u16* old_from[2];  // Add: where they are, tokens t and t + 1, row r
  bool ours;            // whether this CTA finishes the item
  u16* to;              // features of token t (lanes 0-3) or t + 1 (lanes 4-7); null: not ours
  u16* scaled_to;       // Add, Store: the same of the scaled copy; null: not ours, or none
  float* sum_to;        // Add, Store: where the sum of squares goes
};

// An item is a tile of 16 outputs and a pair of tokens: lane r * 4 + anything holds outputs r and
// r + 8 of it, so that the eight lanes of equal lane % 4 hold the whole.
template <Epilogue E>
struct Finish {
  static constexpr bool kHasNorm = E == Epilogue::Qkv || E == Epilogue::GeGlu;
  static constexpr bool kToStream = !kHasNorm;

  const DenoiseProductParams& p;
  u32 lane;
  u32 tiles;  // of all outputs

  // The first feature of rows 0-7 and of rows 8-15 of a tile. q and k keep the order in which the
  // host packs a head, rotary partners 8 apart: q * k does not care, and prefill does the same.
  __device__ __forceinline__ uint2 features(u32 tile) const {
    if (E == Epilogue::GeGlu) return make_uint2(tile * 8, tiles * 8 + tile * 8);
    return make_uint2(tile * 16, tile * 16 + 8);
  }

  __device__ __forceinline__ float2 turn_of(u32 token, u32 j) const {
    token = min(token, p.rows - 1);
    const u32 count = p.input_rows.count;
    const u32 sample = token < count ? 0 : token / count;
    const uint2 length = __ldg(reinterpret_cast<const uint2*>(p.lengths) + sample);
    const u32 position = length.x * p.image_tokens + length.y + p.first_position + token -
                         sample * count;
    return __ldg(p.rope + position * 128 + j);
  }

  // Everything of an item that does not hang on the dependency; `ours`: whether this CTA stores it.
  __device__ __forceinline__ void prepare(Extra& e, u32 tile, u32 token, bool ours) const {
    const u32 r = lane >> 2;
    const uint2 f = features(tile);
    const float* per_output = E == Epilogue::Add ? p.gate : p.bias;
    const float neutral = E == Epilogue::Add ? 1.0f : 0.0f;
    e.first = per_output ? __ldg(per_output + f.x + r) : neutral;
    e.second = per_output ? __ldg(per_output + f.y + r) : neutral;
    if (kToStream && p.scaled) {
      e.next_first = __ldg(p.next_scale + f.x + r);
      e.next_second = __ldg(p.next_scale + f.y + r);
    }
    if (E == Epilogue::Qkv && tile < 144) {
      e.turn0 = turn_of(token, tile % 16 * 8 + r);
      e.turn1 = turn_of(token + 1, tile % 16 * 8 + r);
    }
    const u32 mine = token + (r & 1);
    e.ours = ours;
    e.to = e.scaled_to = nullptr;
    if (lane < 8 && mine < p.rows && ours) {
      const bool q = E != Epilogue::Qkv || tile < 128;
      const DenoiseRows& rows = q ? p.out_rows : p.cache_rows;
      u16* base = q ? p.out : tile < 144 ? p.k : p.v;
      e.to = base + element_of(rows, mine, q ? f.x : f.x % 256);
      if (kToStream) {
        if (p.scaled) e.scaled_to = p.scaled + element_of(p.scaled_rows, mine, f.x);
        e.sum_to = p.out_sums + row_index(rows, mine) * kSums + tile;
      }
    }
    if (E == Epilogue::Add) {
      e.old_from[0] = p.old + element_of(p.out_rows, min(token, p.rows - 1), f.x) + r;
      e.old_from[1] = p.old + element_of(p.out_rows, min(token + 1, p.rows - 1), f.x) + r;
    }
  }

  // Add: the residual stream under the item, once the dependency is met.
  __device__ __forceinline__ void load_old(Extra& e) const {
    if (!e.ours) return;
    e.old[0] = load_l2_half(e.old_from[0]);
    e.old[1] = load_l2_half(e.old_from[1]);
    e.old[2] = load_l2_half(e.old_from[0] + 8);
    e.old[3] = load_l2_half(e.old_from[1] + 8);
  }

  // Stores 8 features of tokens t (lanes 0-3) and t + 1 (lanes 4-7).
  __device__ __forceinline__ void store_pair(u16* to, u32 f, u32 pair) const {
    const uint4 packed = gather_features(pair, lane);
    if (to) store_unit(to + f, packed);
  }

  // Sum of squares of the 16 features just stored, for the norm of the next product.
  __device__ __forceinline__ void store_sum(const Extra& e, u32 low, u32 high) const {
    const float s0 = bf16_low(low) * bf16_low(low) + bf16_low(high) * bf16_low(high);
    const float s1 = bf16_high(low) * bf16_high(low) + bf16_high(high) * bf16_high(high);
    const bool odd = lane & 4;
    float s = (odd ? s1 : s0) + __shfl_xor_sync(~0u, odd ? s0 : s1, 4);
    s += __shfl_xor_sync(~0u, s, 8);
    s += __shfl_xor_sync(~0u, s, 16);
    if (e.to) *e.sum_to = s;
  }

  // sum = (row r: tokens t, t + 1; row r + 8: tokens t, t + 1) of a tile, complete; inverse_rms of
  // t and t + 1.
  __device__ __forceinline__ void store(float4 sum, const Extra& e, u32 tile,
                                        const float* inverse_rms) const {
    if (kHasNorm) {
      const float2 r = *reinterpret_cast<const float2*>(inverse_rms);
      sum = make_float4(fmaf(sum.x, r.x, e.first), fmaf(sum.y, r.y, e.first),
                        fmaf(sum.z, r.x, e.second), fmaf(sum.w, r.y, e.second));
    }
    if (E == Epilogue::GeGlu) {
      store_pair(e.to, 0, bf16_pair(gelu(sum.x) * sum.z, gelu(sum.y) * sum.w));
    } else if (E == Epilogue::Qkv) {
      if (tile < 144) {
        sum = make_float4(sum.x * e.turn0.x - sum.z * e.turn0.y,
                          sum.y * e.turn1.x - sum.w * e.turn1.y,
                          sum.z * e.turn0.x + sum.x * e.turn0.y,
                          sum.w * e.turn1.x + sum.y * e.turn1.y);
      }
      store_pair(e.to, 0, bf16_pair(sum.x, sum.y));
      store_pair(e.to, 8, bf16_pair(sum.z, sum.w));
    } else {
      if (E == Epilogue::Add) {
        sum = make_float4(fmaf(sum.x, e.first, bf16_value(e.old[0])),
                          fmaf(sum.y, e.first, bf16_value(e.old[1])),
                          fmaf(sum.z, e.second, bf16_value(e.old[2])),
                          fmaf(sum.w, e.second, bf16_value(e.old[3])));
      } else {
        sum = make_float4(sum.x + e.first, sum.y + e.first, sum.z + e.second, sum.w + e.second);
      }
      const u32 low = bf16_pair(sum.x, sum.y), high = bf16_pair(sum.z, sum.w);
      store_pair(e.to, 0, low);
      store_pair(e.to, 8, high);
      if (p.scaled) {
        const float a = e.next_first, b = e.next_second;
        store_pair(e.scaled_to, 0, bf16_pair(bf16_low(low) * a, bf16_high(low) * a));
        store_pair(e.scaled_to, 8, bf16_pair(bf16_low(high) * b, bf16_high(high) * b));
      }
      store_sum(e, low, high);
    }
  }
};

}  // namespace denoise
