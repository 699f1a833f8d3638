// What the portable kernels share: bf16 without headers (so that NVRTC needs none), row views,
// the epilogues of a product, dependent launch where the GPU has it. sm_80 and newer.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

namespace portable {

static __device__ __forceinline__ float from_bf16(u16 x) { return __uint_as_float((u32)x << 16); }

// Two f32 rounded to nearest even, the first in the low half.
static __device__ __forceinline__ u32 to_bf16x2(float lo, float hi) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
}
static __device__ __forceinline__ u16 to_bf16(float x) { return (u16)to_bf16x2(x, 0.f); }

// The nearest E4M3 number, ties to even, at most ±448.
static __device__ __forceinline__ float round_e4m3(float x) {
    const float a = fminf(fabsf(x), 448.f);
    const u32 bits = __float_as_uint(a);
    // Below 2^-6 numbers are 2^-9 apart.
    const u32 rounded = (bits + 0x7ffff + (bits >> 20 & 1)) & ~0xfffffu;
    const float y = a < 0.015625f ? rintf(a * 512.f) * (1.f / 512.f) : __uint_as_float(rounded);
    return copysignf(y, x);
}
// The number behind an E4M3 code, as bf16.
static __device__ __forceinline__ u16 from_e4m3(u8 code) {
    const u32 magnitude = code & 0x7f;
    const float y = magnitude < 8 ? magnitude * (1.f / 512.f)
                                  : __uint_as_float((magnitude << 20) + (120u << 23));
    return (u16)(__float_as_uint(y) >> 16 | (code & 0x80) << 8);
}

// Everything the program wrote before this kernel is visible, nobody reads what it will overwrite.
static __device__ __forceinline__ void wait_for_predecessors() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// The next kernel may start its prologue.
static __device__ __forceinline__ void launch_dependents() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Columns of some rows of every group; twin of the Rust struct. Row i of the work is matrix row
// (i / count) * stride + first + i % count.
struct View {
    u64 base;    // address of column 0 of matrix row 0
    u32 ld;      // elements from one matrix row to the next
    u32 stride;  // matrix rows from one group to the next
    u32 first;   // first row of a group
    u32 count;   // rows of a group, at least 1
    u32 f32;     // 1: elements are f32, 0: bf16
    u32 pad;

    __device__ __forceinline__ u64 offset(u32 i) const {
        return ((u64)(i / count) * stride + first + i % count) * ld;
    }
    __device__ __forceinline__ float load(u64 at) const {
        return f32 ? ((const float*)base)[at] : from_bf16(((const u16*)base)[at]);
    }
    __device__ __forceinline__ void store(u64 at, float y) const {
        if (f32) ((float*)base)[at] = y;
        else ((u16*)base)[at] = to_bf16(y);
    }
};
static_assert(sizeof(View) == 32, "shared with the host");

enum Epilogue : u32 { STORE, STORE_POSITION, GELU, SILU, GEGLU, ADD, ROPE };
enum Norm : u32 { NONE, RMS, LAYER, ADAPTIVE };

// Where a product goes; twin of the Rust struct.
struct Output {
    View out;             // Rope: q
    View k, v;            // Rope only
    u64 bias;             // f32 [n] in the weight's original row order, or 0
    u64 aux;              // StorePosition: f32 [period][n]; Add: f32 gate [n] or 0; Rope: float2
                          // (cos, sin) [positions][head_dim / 2]
    u64 lengths;          // u32 [samples][2]: cameras, prompt tokens (suffix positions)
    u32 epilogue;
    u32 n;                // columns of y before GeGLU halves them
    u32 period;           // rows of a group
    u32 q_heads;          // Rope: query heads, 0 for k‖v alone
    u32 head_dim;         // Rope
    u32 image_tokens;     // Rope, suffix: tokens of one camera
    u32 first_position;   // Rope, suffix: position of row 0 less the prefix length
    u32 suffix;           // Rope: 1 counts positions from the sample's prefix length
    float scale;          // multiplies y before the bias
    u32 pad;
    u64 factors;          // not 0: E4M3 operands, float2 [rows] multiplies their product; GeGlu:
                          // gate's and up's, and the result becomes E4M3
};
static_assert(sizeof(Output) == 3 * 32 + 4 * 8 + 10 * 4, "shared with the host");

// gelu with the tanh approximation, y·sigmoid(2u).
static __device__ __forceinline__ float gelu(float y) {
    const float u = 0.7978845608028654f * (y + 0.044715f * y * y * y);
    return y / (1.f + __expf(-2.f * u));
}

// One value of an epilogue without pairs; `column` < n.
static __device__ __forceinline__ void finish(const Output& o, u32 row, u32 column, float y) {
    y *= o.factors ? ((const float2*)o.factors)[row].x : o.scale;
    if (o.bias) y += ((const float*)o.bias)[column];
    const u64 at = o.out.offset(row) + column;
    const float* aux = (const float*)o.aux;
    switch (o.epilogue) {
    case STORE_POSITION: y += aux[(u64)(row % o.period) * o.n + column]; break;
    case GELU: y = gelu(y); break;
    case SILU: y = y / (1.f + __expf(-y)); break;
    case ADD: y = o.out.load(at) + (aux ? aux[column] : 1.f) * y; break;
    }
    o.out.store(at, y);
}

static __device__ __forceinline__ u32 position_of(const Output& o, u32 row) {
    const u32 i = row % o.period;
    if (!o.suffix) return i;
    const u32* l = (const u32*)o.lengths + 2 * (row / o.period);
    return l[0] * o.image_tokens + l[1] + o.first_position + i;
}

// Eight neighbours in memory, 16-byte aligned.
static __device__ __forceinline__ void load8(float (&v)[8], const u16* from) {
    const uint4 x = *(const uint4*)from;
    const u32 word[4] = {x.x, x.y, x.z, x.w};
    for (int i = 0; i < 4; i++) {
        v[2 * i] = from_bf16((u16)word[i]);
        v[2 * i + 1] = __uint_as_float(word[i] & 0xffff0000u);
    }
}
static __device__ __forceinline__ void load8(float (&v)[8], const float* from) {
    const float4 a = ((const float4*)from)[0], b = ((const float4*)from)[1];
    v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
}
static __device__ __forceinline__ void store8(u16* to, const float (&v)[8]) {
    *(uint4*)to = make_uint4(to_bf16x2(v[0], v[1]), to_bf16x2(v[2], v[3]), to_bf16x2(v[4], v[5]),
                             to_bf16x2(v[6], v[7]));
}

// Whether rows of a view can be read and written eight elements at a time.
static __device__ __forceinline__ bool rows_in_eights(const View& v) {
    return !v.f32 && v.ld % 8 == 0 && v.base % 16 == 0;
}

// A pair that the packing put 8 rows apart: `first` is the packed column of a, b is 8 behind it.
// GeGLU: gate and up of one hidden unit. Rope: the two halves of a rotated pair of q or k, or two
// plain values of v.
static __device__ __forceinline__ void finish_pair(const Output& o, u32 row, u32 first, float a,
                                                   float b) {
    const float* bias = (const float*)o.bias;
    const bool e4m3 = o.epilogue == GEGLU && o.factors != 0;
    const float2 by = e4m3 ? ((const float2*)o.factors)[row] : make_float2(o.scale, o.scale);
    a *= by.x, b *= by.y;
    if (o.epilogue == GEGLU) {
        const u32 unit = first / 16 * 8 + first % 8, units = o.n / 2;
        if (unit >= units) return;
        if (bias) a += bias[unit], b += bias[units + unit];
        const float hidden = gelu(a) * b;
        o.out.store(o.out.offset(row) + unit, e4m3 ? round_e4m3(hidden) : hidden);
        return;
    }
    const u32 half = o.head_dim / 2, packed_head = (half + 7) / 8 * 16;
    const u32 head = first / packed_head, within = first % packed_head;
    if (head > o.q_heads) {
        const u32 base = (o.q_heads + 1) * o.head_dim;
        const u32 column = first - (o.q_heads + 1) * packed_head;
        const u64 at = o.v.offset(row);
        if (column < o.head_dim) o.v.store(at + column, a + (bias ? bias[base + column] : 0.f));
        if (column + 8 < o.head_dim)
            o.v.store(at + column + 8, b + (bias ? bias[base + column + 8] : 0.f));
        return;
    }
    const u32 j = within / 16 * 8 + within % 8;
    if (j >= half) return;
    if (bias) a += bias[head * o.head_dim + j], b += bias[head * o.head_dim + half + j];
    const float2 turn = ((const float2*)o.aux)[(u64)position_of(o, row) * half + j];
    const View& out = head < o.q_heads ? o.out : o.k;
    const u64 at = out.offset(row) + (head < o.q_heads ? head * o.head_dim : 0);
    // q and k keep the packed order inside a head where it fills the head exactly: q·k does not
    // care, and the Hopper tier writes 16 neighbours at once.
    const bool packed = o.head_dim % 16 == 0;
    out.store(at + (packed ? within : j), a * turn.x - b * turn.y);
    out.store(at + (packed ? within + 8 : half + j), b * turn.x + a * turn.y);
}

static __device__ __forceinline__ float warp_max(float x) {
    for (int d = 16; d; d >>= 1) x = fmaxf(x, __shfl_xor_sync(~0u, x, d));
    return x;
}

static __device__ __forceinline__ float warp_sum(float x) {
    for (int d = 16; d; d >>= 1) x += __shfl_xor_sync(~0u, x, d);
    return x;
}

}  // namespace portable
