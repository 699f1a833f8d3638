// Load-time reshaping of the f32 matrices at the rim for the denoise kernels.
//   denoise_transpose: out[c][r] = in[r][c], f32
//   denoise_round:     out[i] = bf16(in[i])
// One thread per element.
#include "portable.cuh"

extern "C" __global__ void denoise_transpose(const float* in, float* out, u32 rows, u32 cols) {
    const u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < rows * cols) out[i % cols * rows + i / cols] = in[i];
}

extern "C" __global__ void denoise_round(const float* in, u16* out, u32 count) {
    const u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) out[i] = portable::to_bf16(in[i]);
}
