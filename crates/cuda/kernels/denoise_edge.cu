// The edge between two Euler steps, one CTA per row (1024 threads), or, of many rows, several:
//   x_t += dt * (norm(stream) * W_out^T + b_out)          action_out + Euler, unless stream is null
//   out  = [silu](x_t * W_in^T + b_in)                    action_in of the next step, unless null
// CTAs past `rows` write a sample's state token: state_out = state * W_state^T + b_state.
//   shapes   stream bf16 [rows, 1024], actions f32 [rows, 32], out bf16 [rows, 1024]
//   what goes to the stream is also written times the first norm's scale (`scaled`)
//   weights  f32, out_weight [32][1024], in_weight and state_weight [32][1024] (input-major)
//   launch   grid rows + (state ? samples : 0), 1024 threads, no dynamic shared memory; of many
//            rows ceil(rows / share) + (state ? ceil(samples / share) : 0), share at most 16
//   limit    none worth naming: 10 launches of about 3 us in a loop of 2-3 ms
//
// Many rows, where every row's CTA would fetch 256 KB of weights: a CTA holds a column of each
// matrix a warp or thread and takes rows / processors of them, the same sums in the same order.
// H200, 2026-11-26, lab (edge.cu), 640 rows: 8.9 us between two steps of pi0 (predicted 10; one CTA
// a row 23.2), 11.6 of pi0.5 (32.4), 37.0 of 3,200 rows (110.6). In the replay of a batch of 64 it
// takes 12.9 us a step, where portable kernels took 81.5. Of 10 rows the other is 0.3 us faster.
#include "denoise_params.cuh"

namespace denoise {
namespace {

__device__ __forceinline__ u32 edge_index(const DenoiseRows& rows, u32 i) {
  const u32 sample = i / rows.count;
  return sample * rows.stride + rows.first + i - sample * rows.count;
}

__device__ __forceinline__ u64 edge_row(const DenoiseRows& rows, u32 i) {
  return static_cast<u64>(edge_index(rows, i)) * rows.width;
}

// Writes feature n of a row; of the stream also its scaled copy, and every 16 features the sum of
// their squares.
__device__ __forceinline__ void put(const DenoiseEdgeParams& p, u16* out, bool stream,
                                    const DenoiseRows& rows, u32 row, u32 n, float v) {
  const u16 rounded = static_cast<u16>(bf16_pair(v, 0.0f));
  const u64 at = edge_row(rows, row) + n;
  out[at] = rounded;
  if (!stream) return;
  if (p.scaled) {
    const float scaled = bf16_value(rounded) * __ldg(p.next_scale + n);
    const u32 to = edge_index(rows, row) * p.scaled_width + n / 32 * p.scaled_step + n % 32;
    p.scaled[to] = static_cast<u16>(bf16_pair(scaled, 0.0f));
  }
  float s = bf16_value(rounded) * bf16_value(rounded);
#pragma unroll
  for (int d = 8; d > 0; d /= 2) s += __shfl_xor_sync(~0u, s, d);
  if (n % 16 == 0) p.sums[edge_index(rows, row) * 64 + n / 16] = s;
}

// Warp j: the lane's weights of column j of action_out, the norm's scale in them, and its share of
// shift * column.
__device__ __forceinline__ void column_of_out(const DenoiseEdgeParams& p, u32 warp, u32 lane,
                                              float (&w)[32], float& shifted) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const u32 k = i / 2 * 256 + lane * 8 + i % 2 * 4;
    float4 v = __ldg(reinterpret_cast<const float4*>(p.out_weight + warp * 1024 + k));
    if (p.norm_shift) {
      const float4 s = __ldg(reinterpret_cast<const float4*>(p.norm_shift + k));
      shifted += s.x * v.x + s.y * v.y + s.z * v.z + s.w * v.w;
    }
    if (p.norm_scale) {
      const float4 s = __ldg(reinterpret_cast<const float4*>(p.norm_scale + k));
      v = make_float4(v.x * s.x, v.y * s.y, v.z * s.z, v.w * s.w);
    }
    w[i * 4] = v.x, w[i * 4 + 1] = v.y, w[i * 4 + 2] = v.z, w[i * 4 + 3] = v.w;
  }
}

// Warp j: column j of action_out for this row; lane 0 advances x_t. w is the column with the
// norm's scale in it, shifted the lane's share of shift * column.
__device__ __forceinline__ void advance(const DenoiseEdgeParams& p, u32 row, u32 warp, u32 lane,
                                        const float (&w)[32], float shifted) {
  const u16* x = p.stream + edge_row(p.stream_rows, row);
  float squares = 0.0f, dot = 0.0f;
  uint4 packed[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) packed[i] = load_l2(x + i * 256 + lane * 8);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const u32 pairs[4] = {packed[i].x, packed[i].y, packed[i].z, packed[i].w};
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const float v = e % 2 ? bf16_high(pairs[e / 2]) : bf16_low(pairs[e / 2]);
      squares = fmaf(v, v, squares);
      dot = fmaf(v, w[i * 8 + e], dot);
    }
  }
#pragma unroll
  for (int d = 16; d > 0; d /= 2) {
    squares += __shfl_xor_sync(~0u, squares, d);
    dot += __shfl_xor_sync(~0u, dot, d);
    shifted += __shfl_xor_sync(~0u, shifted, d);
  }
  if (lane == 0) {
    const float v = dot * rsqrtf(squares * (1.0f / 1024.0f) + 1e-6f) + shifted;
    p.actions[row * 32 + warp] += v + __ldg(p.out_bias + warp);
  }
}

__device__ __forceinline__ float project(const float* in, const float* weight, const float* bias,
                                         u32 n) {
  float sum = __ldg(bias + n);
#pragma unroll 16
  for (int j = 0; j < 32; ++j) sum = fmaf(in[j], __ldg(weight + j * 1024 + n), sum);
  return sum;
}

}  // namespace
}  // namespace denoise

extern "C" __global__ void __launch_bounds__(1024, 1)
    denoise_edge(const __grid_constant__ DenoiseEdgeParams p) {
  using namespace denoise;
  __shared__ float in[32];
  const u32 tid = threadIdx.x, warp = tid / 32, lane = tid % 32, row = blockIdx.x;
  launch_dependents();
  const bool is_state = row >= p.rows;
  float w[32], shifted = 0.0f;
  if (p.stream && !is_state) column_of_out(p, warp, lane, w, shifted);
  dependency_wait();
  if (is_state) {
    const u32 sample = row - p.rows;
    if (tid < 32) in[tid] = p.state[sample * 32 + tid];
    __syncthreads();
    const float v = project(in, p.state_weight, p.state_bias, tid);
    put(p, p.state_out, true, p.state_rows, sample, tid, v);
    return;
  }
  if (p.stream) advance(p, row, warp, lane, w, shifted);
  if (!p.in_weight) return;
  __syncthreads();
  if (tid < 32) in[tid] = p.actions[row * 32 + tid];
  __syncthreads();
  float v = project(in, p.in_weight, p.in_bias, tid);
  if (p.silu) v = __fdividef(v, 1.0f + __expf(-v));
  put(p, p.out, !p.silu, p.out_rows, row, tid, v);
}

namespace denoise {
namespace {

constexpr u32 kMost = 16;  // rows of a CTA of many

// action_out and the Euler step of `count` rows from `first` on, which pass through shared memory:
// all their latency at once. Warp j does column j, whose weights are w.
__device__ __forceinline__ void advance_many(const DenoiseEdgeParams& p, u32 first, u32 count,
                                             u32 warp, u32 lane, const float (&w)[32],
                                             float shifted) {
  __shared__ __align__(16) u16 rows[kMost][1024];
  __shared__ float scales[kMost];
  const u32 base = shared_address(rows), tid = warp * 32 + lane;
  for (u32 i = tid; i < count * 128; i += 1024)
    copy_async(base + i * 16, p.stream + edge_row(p.stream_rows, first + i / 128) + i % 128 * 8,
               true);
#pragma unroll
  for (int d = 16; d > 0; d /= 2) shifted += __shfl_xor_sync(~0u, shifted, d);
  copies_done();
  if (warp < count) {
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint4 packed = load_shared(base + warp * 2048 + i * 512 + lane * 16);
      const u32 pairs[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        squares = fmaf(bf16_low(pairs[e]), bf16_low(pairs[e]), squares);
        squares = fmaf(bf16_high(pairs[e]), bf16_high(pairs[e]), squares);
      }
    }
#pragma unroll
    for (int d = 16; d > 0; d /= 2) squares += __shfl_xor_sync(~0u, squares, d);
    if (lane == 0) scales[warp] = rsqrtf(squares * (1.0f / 1024.0f) + 1e-6f);
  }
  __syncthreads();
  const float bias = __ldg(p.out_bias + warp);
#pragma unroll 2
  for (u32 r = 0; r < count; ++r) {
    float dot = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint4 packed = load_shared(base + r * 2048 + i * 512 + lane * 16);
      const u32 pairs[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        dot = fmaf(bf16_low(pairs[e]), w[i * 8 + 2 * e], dot);
        dot = fmaf(bf16_high(pairs[e]), w[i * 8 + 2 * e + 1], dot);
      }
    }
#pragma unroll
    for (int d = 16; d > 0; d /= 2) dot += __shfl_xor_sync(~0u, dot, d);
    if (lane == 0) p.actions[(first + r) * 32 + warp] += dot * scales[r] + shifted + bias;
  }
}

// out = [silu](in * weight^T + bias) of `count` rows of 32 inputs from row `first` on; of the
// stream also its scaled copy and the rows' statistics. Thread n does feature n.
__device__ __forceinline__ void project_many(const DenoiseEdgeParams& p, const float* inputs,
                                             const float* weight, const float* bias, u16* out,
                                             bool stream, const DenoiseRows& rows, u32 first,
                                             u32 count) {
  __shared__ __align__(16) float in[kMost][32];
  __shared__ float2 sums[kMost][32];
  const u32 n = threadIdx.x, warp = n / 32, lane = n % 32;
  float w[32];
#pragma unroll
  for (int j = 0; j < 32; ++j) w[j] = __ldg(weight + j * 1024 + n);
  const float b = __ldg(bias + n), scale = p.scaled && stream ? __ldg(p.next_scale + n) : 0.0f;
  if (n < count * 32) in[n / 32][lane] = inputs[first * 32 + n];
  __syncthreads();
  for (u32 r = 0; r < count; ++r) {
    float v = b;
#pragma unroll
    for (int j = 0; j < 32; j += 4) {
      const float4 x = *reinterpret_cast<const float4*>(&in[r][j]);
      v = fmaf(x.x, w[j], v), v = fmaf(x.y, w[j + 1], v);
      v = fmaf(x.z, w[j + 2], v), v = fmaf(x.w, w[j + 3], v);
    }
    if (!stream) v = __fdividef(v, 1.0f + __expf(-v));
    const u16 rounded = static_cast<u16>(bf16_pair(v, 0.0f));
    const u64 at = edge_row(rows, first + r) + n;
    out[at] = rounded;
    if (!stream) continue;
    v = bf16_value(rounded);
    if (p.scaled) p.scaled[at] = static_cast<u16>(bf16_pair(v * scale, 0.0f));
    float2 s = make_float2(v, v * v);
#pragma unroll
    for (int d = 16; d > 0; d /= 2) {
      s.x += __shfl_xor_sync(~0u, s.x, d);
      s.y += __shfl_xor_sync(~0u, s.y, d);
    }
    if (lane == 0) sums[r][warp] = s;
  }
  if (!stream) return;
  __syncthreads();
  if (n >= count * 16) return;
  const float2 a = sums[n / 16][n % 16 * 2], c = sums[n / 16][n % 16 * 2 + 1];
  p.stats[edge_index(rows, first + n / 16) * 16 + n % 16] = make_float2(a.x + c.x, a.y + c.y);
}

}  // namespace
}  // namespace denoise

extern "C" __global__ void __launch_bounds__(1024, 1)
    denoise_edge_many(const __grid_constant__ DenoiseEdgeParams p) {
  using namespace denoise;
  const u32 tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
  const u32 blocks = (p.rows + p.share - 1) / p.share;
  const bool is_state = blockIdx.x >= blocks;
  const u32 first = (is_state ? blockIdx.x - blocks : blockIdx.x) * p.share;
  const u32 count = min(p.share, (is_state ? p.samples : p.rows) - first);
  launch_dependents();
  float w[32], shifted = 0.0f;
  if (p.stream && !is_state) column_of_out(p, warp, lane, w, shifted);
  dependency_wait();
  if (is_state) {
    project_many(p, p.state, p.state_weight, p.state_bias, p.state_out, true, p.state_rows, first,
                 count);
    return;
  }
  if (p.stream) {
    advance_many(p, first, count, warp, lane, w, shifted);
    __syncthreads();
  }
  if (p.in_weight)
    project_many(p, p.actions, p.in_weight, p.in_bias, p.out, !p.silu, p.out_rows, first, count);
}
