// What gemm.cu checks against: random operands, a plain f32 product with its norm and epilogue
// element by element, and counts of what differs.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include "../kernels/gemm_sm90.cuh"

using bf16 = __nv_bfloat16;
using gemm::GemmParams;

enum Norm { NONE, RMS, LAYER };

__device__ float random_normal(uint64_t i, uint32_t seed) {
    uint64_t z = i * 0x9E3779B97F4A7C15ull + seed * 0xD1B54A32D192ED03ull + 0x632BE59BD9B4E019ull;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    z ^= z >> 31;
    const float sum = (z & 0xFFFF) + ((z >> 16) & 0xFFFF) + ((z >> 32) & 0xFFFF) + (z >> 48);
    return (sum / 65536.f - 2.f) * 1.7320508f;
}
__global__ void fill(bf16* p, size_t n, float scale, float shift, uint32_t seed) {
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n;
         i += (size_t)gridDim.x * blockDim.x)
        p[i] = __float2bfloat16(random_normal(i, seed) * scale + shift);
}
__global__ void fill_e4m3(__nv_fp8_e4m3* p, size_t n, float scale, uint32_t seed) {
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n;
         i += (size_t)gridDim.x * blockDim.x)
        p[i] = __nv_fp8_e4m3(random_normal(i, seed) * scale);
}
// An element of a matrix of either kind.
__device__ float element(const void* p, size_t i, bool e4m3) {
    return e4m3 ? (float)((const __nv_fp8_e4m3*)p)[i] : __bfloat162float(((const bf16*)p)[i]);
}
__global__ void fill_f32(float* p, size_t n, float scale, uint32_t seed) {
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n;
         i += (size_t)gridDim.x * blockDim.x)
        p[i] = random_normal(i, seed) * scale;
}
__global__ void sum_columns(const bf16* w, float* sums, int k) {
    float s = 0;
    for (int i = threadIdx.x; i < k; i += 32) s += __bfloat162float(w[(size_t)blockIdx.x * k + i]);
    for (int d = 16; d; d /= 2) s += __shfl_xor_sync(~0u, s, d);
    if (threadIdx.x == 0) sums[blockIdx.x] = s;
}
// Partial statistics of 64-column slabs.
__global__ void slab_stats(const bf16* x, float2* stats, int cols, int ld) {
    const int slabs = cols / 64;
    for (int s = threadIdx.x; s < slabs; s += blockDim.x) {
        float a = 0, b = 0;
        for (int i = 0; i < 64; i++) {
            const float v = __bfloat162float(x[(size_t)blockIdx.x * ld + s * 64 + i]);
            a += v, b += v * v;
        }
        stats[(size_t)blockIdx.x * slabs + s] = make_float2(a, b);
    }
}
// Of `cols` columns, written over and over up to k.
__global__ void reference_norm(const void* x, float* out, int cols, int k, int norm, bool e4m3) {
    __shared__ float total[2];
    const auto row = [=](int i) { return element(x, (size_t)blockIdx.x * cols + i, e4m3); };
    if (threadIdx.x < 2) total[threadIdx.x] = 0;
    __syncthreads();
    float s = 0;
    for (int i = threadIdx.x; i < cols; i += blockDim.x) s += row(i);
    atomicAdd(&total[0], s);
    __syncthreads();
    const float mean = norm == LAYER ? total[0] / cols : 0;
    float v = 0;
    for (int i = threadIdx.x; i < cols; i += blockDim.x) {
        const float d = row(i) - mean;
        v += d * d;
    }
    atomicAdd(&total[1], v);
    __syncthreads();
    const float scale = norm == NONE ? 1.f : 1.f / sqrtf(total[1] / cols + 1e-6f);
    for (int i = threadIdx.x; i < k; i += blockDim.x)
        out[(size_t)blockIdx.x * k + i] = (row(i % cols) - mean) * scale;
}
__global__ void reference_product(const float* x, const void* w, const float* bias, float* y,
                                  int rows, int n, int k, bool e4m3) {
    __shared__ float xs[32][33], ws[32][33];
    const int row = blockIdx.y * 32, col = blockIdx.x * 32, tx = threadIdx.x, ty = threadIdx.y;
    float acc[4] = {0, 0, 0, 0};
    for (int k0 = 0; k0 < k; k0 += 32) {
        for (int i = 0; i < 4; i++) {
            const int r = ty + 8 * i;
            const bool in_k = k0 + tx < k;
            xs[r][tx] = in_k && row + r < rows ? x[(size_t)(row + r) * k + k0 + tx] : 0;
            const size_t at = (size_t)(col + r) * k + k0 + tx;
            ws[r][tx] = in_k && col + r < n ? element(w, at, e4m3) : 0;
        }
        __syncthreads();
        for (int q = 0; q < 32; q++)
            for (int i = 0; i < 4; i++) acc[i] += xs[ty + 8 * i][q] * ws[tx][q];
        __syncthreads();
    }
    for (int i = 0; i < 4; i++)
        if (row + ty + 8 * i < rows && col + tx < n)
            y[(size_t)(row + ty + 8 * i) * n + col + tx] = acc[i] + (bias ? bias[col + tx] : 0);
}
__device__ double gelu_exact(double g) {
    return 0.5 * g * (1 + tanh(0.7978845608028654 * (g + 0.044715 * g * g * g)));
}
// The epilogue, element by element, in the packed order of the weight's rows; `sums` receives
// {Σ(out − ref)², Σref²}. Values that are not numbers count as infinitely wrong.
__global__ void reference_compare(const float* y, const bf16* before, GemmParams p, int epilogue,
                                  bool e4m3, double* sums) {
    const size_t width = epilogue == gemm::GEGLU ? p.n / 2 : p.n, total = p.rows * width;
    double err = 0, norm = 0;
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < total;
         i += (size_t)gridDim.x * blockDim.x) {
        const uint32_t row = i / width, f = i % width, sample = row / p.period, at = row % p.period;
        const float* v = y + (size_t)row * p.n;
        const float2 by = e4m3 ? p.stats_in[row] : make_float2(1.f, 1.f);
        double want = v[f] * by.x;
        const bf16* got = p.out + ((size_t)sample * p.out_stride + at) * p.out_ld + f;
        if (epilogue == gemm::STORE_POSITION) {
            want += ((const float*)p.aux)[(size_t)at * p.n + f];
        } else if (epilogue == gemm::GELU) {
            want = gelu_exact(want);
        } else if (epilogue == gemm::GEGLU) {
            const int g = f / 8 * 16 + f % 8;
            want = gelu_exact(v[g] * by.x) * v[g + 8] * by.y;
        } else if (epilogue == gemm::ADD) {
            if (p.aux) want *= ((const float*)p.aux)[f];
            want += __bfloat162float(before[(size_t)row * p.out_ld + f]);
        } else if (epilogue == gemm::ROPE) {
            if (f < p.q_cols + 256) {
                const int j = f % 256 / 16 * 8 + f % 8;
                uint32_t position = at;
                if (p.lengths) {
                    const uint2 l = p.lengths[sample];
                    position += l.x * p.image_tokens + l.y + p.first_position;
                }
                const double angle = position * pow(10000.0, -j / 128.0);
                const bool second = f % 16 >= 8;
                const double a = v[second ? f - 8 : f], b = v[second ? f : f + 8];
                want = second ? b * cos(angle) + a * sin(angle) : a * cos(angle) - b * sin(angle);
            }
            if (f >= p.q_cols) {
                const uint32_t c = f - p.q_cols;
                got = (c < 256 ? p.out_k + c : p.out_v + (c - 256)) +
                      ((size_t)sample * p.kv_stride + at) * p.kv_ld;
            } else {
                got = p.out + (size_t)row * p.out_ld + f;
            }
        }
        const bool coarse = e4m3 && epilogue == gemm::GEGLU;
        const size_t at_out = ((size_t)sample * p.out_stride + at) * p.out_ld + f;
        const double d = (coarse ? element(p.out, at_out, true) : __bfloat162float(*got)) - want;
        err += d == d ? d * d : 1e30;
        norm += want * want;
    }
    atomicAdd(&sums[0], err);
    atomicAdd(&sums[1], norm);
}
// How many elements of the written rows are not out · scale, rounded.
__global__ void count_unscaled(GemmParams p, int* count) {
    int c = 0;
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < (size_t)p.rows * p.n;
         i += (size_t)gridDim.x * blockDim.x) {
        const size_t row = i / p.n, f = i % p.n;
        const size_t at = (row / p.period * p.out_stride + row % p.period) * p.out_ld + f;
        const bf16 want = __float2bfloat16(__bfloat162float(p.out[at]) * p.next_scale[f]);
        c += __bfloat16_as_ushort(p.scaled[at]) != __bfloat16_as_ushort(want);
    }
    if (c) atomicAdd(count, c);
}
__global__ void count_different(const uint32_t* a, const uint32_t* b, size_t words, int* count) {
    int c = 0;
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < words;
         i += (size_t)gridDim.x * blockDim.x)
        c += a[i] != b[i];
    if (c) atomicAdd(count, c);
}
