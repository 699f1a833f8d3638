// x += (1 − a·t)·y + a·pull·(chunk − x), a = weight · min(limit, strength): the Euler step of
// real-time chunking, y = dt·v from the product before. Rows with a = 0 get x + y and nothing else.
//   shapes   x a view, y and chunk f32 [rows][n], weights f32 [rows], limits f32 [samples]
//   launch   one block of 128 threads per row
//   limit    none worth naming: a launch per Euler step over some KB
#include "portable.cuh"

using namespace portable;

struct GuideParams {
    View out;         // x
    u64 y;            // f32 [rows][n]
    u64 chunk;        // f32 [rows][n]
    u64 weights;      // f32 [rows]
    u64 limits;       // f32 [rows / period]
    u32 n;
    u32 period;       // rows of a sample
    float time;
    float strength;   // infinite at time 1
    float pull;       // -dt
    u32 pad;
};
static_assert(sizeof(GuideParams) == 32 + 4 * 8 + 6 * 4, "shared with the host");

extern "C" __global__ void __launch_bounds__(128)
portable_guide(const __grid_constant__ GuideParams p) {
    const u32 row = blockIdx.x;
    launch_dependents();
    wait_for_predecessors();
    const float limit = ((const float*)p.limits)[row / p.period];
    const float a = ((const float*)p.weights)[row] * fminf(limit, p.strength);
    const float* y = (const float*)p.y + (u64)row * p.n;
    const float* chunk = (const float*)p.chunk + (u64)row * p.n;
    const u64 at = p.out.offset(row);
    for (u32 i = threadIdx.x; i < p.n; i += blockDim.x) {
        const float x = p.out.load(at + i);
        float step = y[i];
        if (a != 0.f) step = fmaf(a * p.pull, chunk[i] - x, (1.f - a * p.time) * step);
        p.out.store(at + i, x + step);
    }
}
