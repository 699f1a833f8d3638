// The denoise loop's steps written plainly for CUDA cores (f32 sums, bf16 stores): the lab's
// reference. One warp per output; weights unpacked [N, K].
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

using bf16 = __nv_bfloat16;

__device__ inline float hash_normal(unsigned seed, unsigned long long i) {
  unsigned long long z = (i + 1) * 0x9E3779B97F4A7C15ull + seed * 0xD1B54A32D192ED03ull;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  z ^= z >> 31;
  const float u = ((unsigned)(z >> 32) + 0.5f) * 2.3283064e-10f;
  const float v = (unsigned)z * 2.3283064e-10f;
  return sqrtf(-2.0f * logf(u)) * cosf(6.2831853f * v);
}
__global__ void fill_bf16(bf16* p, size_t n, unsigned seed, float scale) {
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n;
       i += (size_t)gridDim.x * blockDim.x)
    p[i] = __float2bfloat16(hash_normal(seed, i) * scale);
}
__global__ void fill_f32(float* p, size_t n, unsigned seed, float scale, float offset) {
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n;
       i += (size_t)gridDim.x * blockDim.x)
    p[i] = hash_normal(seed, i) * scale + offset;
}

// out[row][n] = sum of f(x)[k] * w[n][k]; norm 0 none, 1 rms (scale), 2 adaptive (3 K).
struct RefProduct {
  const bf16* x; const bf16* w; float* out; const float* table;
  int rows, n, k, norm, first;  // x rows start at `first`
};
__global__ void ref_product(RefProduct p) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int n = blockIdx.x * 8 + warp, row = blockIdx.y;
  const bf16* x = p.x + (size_t)(p.first + row) * p.k;
  float squares = 0;
  for (int k = lane; k < p.k; k += 32) squares += (float)x[k] * (float)x[k];
  for (int d = 16; d; d /= 2) squares += __shfl_xor_sync(~0u, squares, d);
  const float r = p.norm ? rsqrtf(squares / p.k + 1e-6f) : 1.0f;
  float sum = 0;
  for (int k = lane; k < p.k; k += 32) {
    float v = (float)x[k] * r;
    if (p.norm) v *= p.table[k];
    if (p.norm == 2) v += p.table[p.k + k];
    sum += v * (float)p.w[(size_t)n * p.k + k];
  }
  for (int d = 16; d; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
  if (lane == 0) p.out[(size_t)row * p.n + n] = sum;
}
// y [rows][2560] -> q [first + row][2048], cache rows cache0 + row.
__global__ void ref_rope(const float* y, bf16* q, bf16* k, bf16* v, const float2* rope, int first,
                         int cache0, int position) {
  const int row = blockIdx.x;
  for (int i = threadIdx.x; i < 1280; i += blockDim.x) {
    const int head = i / 128, j = i % 128, at = j / 8 * 16 + j % 8;  // partners lie 8 apart
    const float* from = y + (size_t)row * 2560 + head * 256 + at;
    float a = from[0], b = from[8];
    if (head < 9) {
      const float2 cs = rope[(size_t)(position + row) * 128 + j];
      const float c = a * cs.x - b * cs.y, d = b * cs.x + a * cs.y;
      a = c, b = d;
    }
    bf16* to = head < 8 ? q + (size_t)(first + row) * 2048 + head * 256
                        : (head == 8 ? k : v) + (size_t)(cache0 + row) * 256;
    to[at] = __float2bfloat16(a);
    to[at + 8] = __float2bfloat16(b);
  }
}
__global__ void ref_attention(const bf16* q, const bf16* k, const bf16* v, bf16* out, int first,
                              int keys, int prefix, int prefix_rows, int state_row) {
  __shared__ float s[2048];
  __shared__ float total;
  const int row = blockIdx.x, head = blockIdx.y, lane = threadIdx.x % 32;
  const bf16* qr = q + (size_t)(first + row) * 2048 + head * 256;
  const int end = state_row && row == 0 ? prefix_rows + 1 : keys;
  for (int key = threadIdx.x / 32; key < keys; key += blockDim.x / 32) {
    float d = 0;
    for (int i = lane; i < 256; i += 32) d += (float)qr[i] * (float)k[(size_t)key * 256 + i];
    for (int e = 16; e; e /= 2) d += __shfl_xor_sync(~0u, d, e);
    const bool seen = key < prefix || (key >= prefix_rows && key < end);
    if (lane == 0) s[key] = seen ? expf(d) : 0.0f;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    total = 0;
    for (int key = 0; key < keys; ++key) total += s[key];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < 256; i += blockDim.x) {
    float o = 0;
    for (int key = 0; key < keys; ++key) o += s[key] * (float)v[(size_t)key * 256 + i];
    out[(size_t)(first + row) * 2048 + head * 256 + i] = __float2bfloat16(o / total);
  }
}
// mode 0: x += gate * y; 1: hidden = gelu(y[..m]) * y[m..]; 2: x = y + bias; n outputs.
__global__ void ref_finish(const float* y, bf16* x, const float* per_output, int n, int first,
                           int mode) {
  const int row = blockIdx.x;
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    bf16* to = x + (size_t)(first + row) * n + i;
    if (mode == 0) {
      const float gate = per_output ? per_output[i] : 1.0f;
      *to = __float2bfloat16((float)*to + gate * y[(size_t)row * n + i]);
    } else if (mode == 1) {
      const float g = y[(size_t)row * 2 * n + i], u = y[(size_t)row * 2 * n + n + i];
      const float t = tanhf(0.7978845608f * (g + 0.044715f * g * g * g));
      *to = __float2bfloat16(0.5f * g * (1 + t) * u);
    } else {
      *to = __float2bfloat16(y[(size_t)row * n + i] + per_output[i]);
    }
  }
}
// out = [silu](in * w + bias), w [32][1024].
__global__ void ref_in(const float* in, const float* w, const float* bias, bf16* out, int first,
                       int silu) {
  const int row = blockIdx.x, n = threadIdx.x;
  float s = bias[n];
  for (int j = 0; j < 32; ++j) s += in[row * 32 + j] * w[j * 1024 + n];
  if (silu) s = s / (1 + expf(-s));
  out[(size_t)(first + row) * 1024 + n] = __float2bfloat16(s);
}
// actions += norm(x) * w^T + b; w [32][1024]; table as above (null: rms).
__global__ void ref_out(const bf16* x, const float* table, const float* w, const float* b,
                        float* actions, int first) {
  const int row = blockIdx.x, j = threadIdx.x;
  const bf16* xr = x + (size_t)(first + row) * 1024;
  double squares = 0, sum = 0;
  for (int k = 0; k < 1024; ++k) squares += (double)xr[k] * (double)xr[k];
  const float r = rsqrt(squares / 1024 + 1e-6);
  for (int k = 0; k < 1024; ++k) {
    double v = (double)xr[k] * r;
    if (table) v = v * table[k] + table[1024 + k];
    sum += v * w[j * 1024 + k];
  }
  actions[row * 32 + j] += (float)sum + b[j];
}
// Sums of squares of every 16 features: grid rows, 64 threads.
__global__ void ref_sums(const bf16* x, float* sums, float* more) {
  const int i = blockIdx.x * 64 + threadIdx.x;
  float s = 0;
  for (int k = 0; k < 16; ++k) s += (float)x[i * 16 + k] * (float)x[i * 16 + k];
  sums[i] = more[i] = s;
}
// scaled = stream * scale, one block a row of 1024.
__global__ void ref_scale(const bf16* stream, bf16* scaled, const float* scale) {
  const int at = blockIdx.x * 1024 + threadIdx.x;
  scaled[at] = __float2bfloat16((float)stream[at] * scale[threadIdx.x]);
}
// A row-major row, one block each, to blocks of 32 columns `step` elements apart.
__global__ void ref_blocks(const bf16* plain, bf16* blocks, int width, int step) {
  const int row = blockIdx.x;
  for (int c = threadIdx.x; c < width; c += blockDim.x)
    blocks[row * 32 + c / 32 * step + c % 32] = plain[(size_t)row * width + c];
}
