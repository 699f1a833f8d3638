// Load-time reshaping of the f32 matrices at the rim for the denoise kernels.
//   denoise_transpose: out[c][r] = in[r][c], f32
//   denoise_round:     out[i] = bf16(in[i])
//   denoise_split:     out[r] = hi ‖ lo, hi = bf16(in[r]), lo = bf16(in[r] − hi): f32 in two parts
// One thread per element. And, of a bf16 matrix, what the shift of an adaptive norm adds:
//   denoise_fold_rows: bias[step][r] = Σ_k W[r][k] · table[step][inputs + k], one warp each
#include "portable.cuh"

extern "C" __global__ void denoise_transpose(const float* in, float* out, u32 rows, u32 cols) {
    const u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < rows * cols) out[i % cols * rows + i / cols] = in[i];
}

extern "C" __global__ void denoise_round(const float* in, u16* out, u32 count) {
    const u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) out[i] = portable::to_bf16(in[i]);
}

extern "C" __global__ void denoise_split(const float* in, u16* out, u32 rows, u32 cols) {
    const u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= rows * cols) return;
    const u64 at = (u64)(i / cols) * 2 * cols + i % cols;
    const u16 high = portable::to_bf16(in[i]);
    out[at] = high;
    out[at + cols] = portable::to_bf16(in[i] - portable::from_bf16(high));
}

// W [rows][inputs], table [steps][3 · inputs] (1 + scale ‖ shift ‖ gate), bias [steps][rows];
// inputs a multiple of 256. Grid (⌈rows / 8⌉, steps), 256 threads.
extern "C" __global__ void denoise_fold_rows(const u16* weight, const float* table, float* bias,
                                             u32 rows, u32 inputs) {
    const u32 lane = threadIdx.x % 32, row = blockIdx.x * 8 + threadIdx.x / 32;
    if (row >= rows) return;
    const float* shift = table + ((u64)blockIdx.y * 3 + 1) * inputs;
    float sum = 0.f;
    for (u32 k = lane * 8; k < inputs; k += 256) {
        float w[8], s[8];
        portable::load8(w, weight + (u64)row * inputs + k);
        portable::load8(s, shift + k);
        for (int i = 0; i < 8; i++) sum += w[i] * s[i];
    }
    sum = portable::warp_sum(sum);
    if (lane == 0) bias[(u64)blockIdx.y * rows + row] = sum;
}
