// Row statistics that travel beside a residual stream, so that the next product can normalise
// its input without a pass of its own.
//
// A stream bf16 [rows, width] has a companion float2 stats[rows][parts]: {Σx, Σx²} of disjoint
// slices of the row, as stored (after rounding). Whoever writes a row writes all `parts` entries;
// a writer that sees the whole row at once puts the sum into part 0 and zeros into the others.
// Readers add the parts in ascending order: the same bits every time.
#pragma once

namespace norm_stats {

/// {Σx, Σx²} of a row.
__device__ __forceinline__ float2 sum_parts(const float2* stats, unsigned row, unsigned parts) {
    const float2* at = stats + static_cast<unsigned long long>(row) * parts;
    float2 total = make_float2(0.f, 0.f);
    for (unsigned i = 0; i < parts; ++i) {
        const float2 x = at[i];
        total.x += x.x;
        total.y += x.y;
    }
    return total;
}

/// 1 / √(mean(x²) + 1e-6)
__device__ __forceinline__ float rms_scale(float2 total, float inverse_width) {
    return rsqrtf(fmaf(total.y, inverse_width, 1e-6f));
}

/// {mean, 1 / √(var + 1e-6)}, var = max(0, E[x²] − E[x]²)
__device__ __forceinline__ float2 layer_scale(float2 total, float inverse_width) {
    const float mean = total.x * inverse_width;
    const float var = fmaxf(0.f, fmaf(total.y, inverse_width, -mean * mean));
    return make_float2(mean, rsqrtf(var + 1e-6f));
}

/// Entry `part` of a row whose whole sum is `total`.
__device__ __forceinline__ float2 whole_row_part(float2 total, unsigned part) {
    return part == 0 ? total : make_float2(0.f, 0.f);
}

}  // namespace norm_stats
