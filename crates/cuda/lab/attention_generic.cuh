// Attention of any shape: out = softmax(q·kᵀ + mask)·v per head, one warp a query row and head, in
// FP32: what the attention lab compares the kernels with, at shapes too large for the host.
//
// | what | value |
// |---|---|
// | q, out | bf16, element (group g, row i, head n, d) at (g·stride + i)·pitch + n·head_dim + d |
// | K, V | the same with kv_heads: 1, shared by all query heads, or `heads` |
// | head_dim | 1 to 256; lane l holds d = l, l + 32, … |
// | mask | 0 all keys; 1 s < len; 2 s < len or s ≥ prefix_rows, and with `state_row` query row 0 |
// |      | sees no suffix key but the first; len = cameras · image_tokens + prompt of the group |
// | threads | 128: four query rows |
// | grid | (ceil(queries / 4), heads, groups) |
//
// Hidden keys are not read. A row that sees no key becomes zeros. FP32 arithmetic, bit-stable.

/// Parameters of attention_generic. Pointers are to the first row and column used.
struct AttentionGenericParams {
    const unsigned short* q;      ///< bf16
    const unsigned short* k;      ///< bf16
    const unsigned short* v;      ///< bf16
    unsigned short* out;          ///< bf16
    const unsigned int* lengths;  ///< [groups, 2]: cameras, prompt length; unused by mask 0
    unsigned int queries;         ///< query rows of a group
    unsigned int keys;            ///< key rows of a group, hidden ones included
    unsigned int heads;           ///< query heads
    unsigned int kv_heads;        ///< 1 or `heads`
    unsigned int head_dim;        ///< width of a head, at most 256
    unsigned int q_pitch;         ///< elements from row to row of q
    unsigned int k_pitch;         ///< … of k
    unsigned int v_pitch;         ///< … of v
    unsigned int out_pitch;       ///< … of out
    unsigned int q_stride;        ///< rows from group to group of q
    unsigned int k_stride;        ///< … of k
    unsigned int v_stride;        ///< … of v
    unsigned int out_stride;      ///< … of out
    unsigned int mask;            ///< 0 all, 1 prefix, 2 suffix
    unsigned int prefix_rows;     ///< first suffix key (mask 2)
    unsigned int state_row;       ///< 1: query row 0 is the state token (mask 2)
    unsigned int image_tokens;    ///< rows of one camera (masks 1, 2)
};
static_assert(sizeof(AttentionGenericParams) == 112, "shared with the host");

namespace generic {

constexpr unsigned kPerLane = 8;

/// NVRTC has no INFINITY.
__device__ __forceinline__ float infinity() { return __uint_as_float(0x7f800000u); }

__device__ __forceinline__ float from_bf16(unsigned short x) {
    return __uint_as_float(static_cast<unsigned>(x) << 16);
}

/// Round to nearest even, NaN stays NaN.
__device__ __forceinline__ unsigned short to_bf16(float x) {
    const unsigned bits = __float_as_uint(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return static_cast<unsigned short>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

/// This lane's elements of a row; zeros past head_dim.
__device__ __forceinline__ void load(float (&x)[kPerLane], const unsigned short* row,
                                     unsigned head_dim) {
#pragma unroll
    for (unsigned i = 0; i < kPerLane; ++i) {
        const unsigned d = i * 32 + threadIdx.x % 32;
        x[i] = d < head_dim ? from_bf16(row[d]) : 0.f;
    }
}

__device__ __forceinline__ bool visible(const AttentionGenericParams& p, unsigned query,
                                        unsigned key, unsigned len) {
    if (p.mask == 0) return true;
    if (key < len && (p.mask == 1 || key < p.prefix_rows)) return true;
    if (p.mask == 1 || key < p.prefix_rows) return false;
    return !(p.state_row && query == 0 && key > p.prefix_rows);
}

}  // namespace generic

extern "C" __global__ void __launch_bounds__(128)
    attention_generic(const __grid_constant__ AttentionGenericParams p) {
    using namespace generic;
    const unsigned query = blockIdx.x * 4 + threadIdx.x / 32, head = blockIdx.y;
    const unsigned long long group = blockIdx.z;
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
    if (query >= p.queries) return;
    const unsigned len = p.mask == 0 ? p.keys
                                     : p.lengths[2 * group] * p.image_tokens +
                                           p.lengths[2 * group + 1];
    const unsigned kv = (p.kv_heads == 1 ? 0 : head) * p.head_dim;
    float q[kPerLane], x[kPerLane], o[kPerLane] = {};
    load(q, p.q + (group * p.q_stride + query) * p.q_pitch + head * p.head_dim, p.head_dim);
    float max = -infinity(), sum = 0.f;
    for (unsigned s = 0; s < p.keys; ++s) {
        if (!visible(p, query, s, len)) continue;
        load(x, p.k + (group * p.k_stride + s) * p.k_pitch + kv, p.head_dim);
        float score = 0.f;
#pragma unroll
        for (unsigned i = 0; i < kPerLane; ++i) score = fmaf(q[i], x[i], score);
#pragma unroll
        for (unsigned d = 16; d > 0; d >>= 1) score += __shfl_xor_sync(~0u, score, d);
        const float top = fmaxf(max, score);
        const float scale = exp2f((max - top) * 1.4426950408889634f);
        const float weight = exp2f((score - top) * 1.4426950408889634f);
        load(x, p.v + (group * p.v_stride + s) * p.v_pitch + kv, p.head_dim);
#pragma unroll
        for (unsigned i = 0; i < kPerLane; ++i) o[i] = fmaf(weight, x[i], o[i] * scale);
        sum = fmaf(sum, scale, weight);
        max = top;
    }
    const float inverse = sum > 0.f ? 1.f / sum : 0.f;
    unsigned short* out =
        p.out + (group * p.out_stride + query) * p.out_pitch + head * p.head_dim;
#pragma unroll
    for (unsigned i = 0; i < kPerLane; ++i) {
        const unsigned d = i * 32 + threadIdx.x % 32;
        if (d < p.head_dim) out[d] = to_bf16(o[i] * inverse);
    }
}
