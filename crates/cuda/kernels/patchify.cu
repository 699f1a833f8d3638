// Camera images to patch rows: patches[p, (row, column, channel)] = pixel − 128, exact in bf16.
//
// | what | value |
// |---|---|
// | images | u8 [images, side, side, 3] |
// | patches | bf16 [images · (side / patch)², stride], columns past 3 · patch² are zero |
// | unit | one CTA turns one row of patches: `patch` image rows, contiguous in memory |
// | threads | 256 |
// | dynamic smem | patch · side · 3 bytes rounded up to 16 (9,408 at 224 / 14) |
// | grid | (side / patch, images) |
//
// 0.45 MB in and 0.98 MB out for three cameras: the launch is the price. 2.7 µs
// (2026-11-22, H200, in a graph of dependent launches).
#include "attention_ptx.cuh"

/// Parameters of patchify.
struct PatchifyParams {
    const u8* images;  ///< u8 [images, side, side, 3]
    u16* patches;      ///< bf16 [images · (side / patch)², stride]
    u32 side;          ///< pixels, a multiple of `patch`
    u32 patch;         ///< pixels
    u32 stride;        ///< columns of `patches`, a multiple of 8, at least 3 · patch²
    u32 reserved;      ///< 0
};
static_assert(sizeof(PatchifyParams) == 32, "shared with the host");

extern "C" __global__ void __launch_bounds__(256)
    patchify(const __grid_constant__ PatchifyParams params) {
    extern __shared__ __align__(16) u8 pixels[];
    const u32 line = params.side * 3, bytes = params.patch * line, across = params.patch * 3;
    const u32 side_patches = params.side / params.patch;
    const u8* from = params.images + (static_cast<u64>(blockIdx.y) * side_patches + blockIdx.x) *
                                         bytes;
    ptx::griddep_launch();
    ptx::griddep_wait();
    if ((reinterpret_cast<u64>(from) | bytes) % 16 == 0) {
        for (u32 i = threadIdx.x; i < bytes / 16; i += 256)
            reinterpret_cast<uint4*>(pixels)[i] = reinterpret_cast<const uint4*>(from)[i];
    } else {
        for (u32 i = threadIdx.x; i < bytes; i += 256) pixels[i] = from[i];
    }
    __syncthreads();
    const u32 chunks = params.stride / 8, live = across * params.patch;
    uint4* to = reinterpret_cast<uint4*>(params.patches) +
                (static_cast<u64>(blockIdx.y) * side_patches + blockIdx.x) * side_patches * chunks;
    for (u32 i = threadIdx.x; i < side_patches * chunks; i += 256) {
        const u32 token = i / chunks, first = i % chunks * 8;
        u32 at = first % across;
        const u8* pixel = pixels + first / across * line + token * across;
        float x[8];
#pragma unroll
        for (u32 j = 0; j < 8; ++j, ++at) {
            if (at == across) at = 0, pixel += line;
            x[j] = first + j < live ? static_cast<float>(pixel[at]) - 128.f : 0.f;
        }
        to[i] = make_uint4(ptx::pack_bf16(x[0], x[1]), ptx::pack_bf16(x[2], x[3]),
                           ptx::pack_bf16(x[4], x[5]), ptx::pack_bf16(x[6], x[7]));
    }
}
