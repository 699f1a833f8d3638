// From a consumer's accumulators to memory: norm, bias and activation in registers, transposition
// to token-major through shared memory, residual, position table and row statistics on the way.
#pragma once
#include "gemm_tile_sm90.cuh"

namespace gemm {

// ½·g·(1 + tanh(√(2/π)·(g + 0.044715·g³))), of ½·g. With the hardware's tanh the relative
// L2 error of fc1 is 1.66e-3, as with an exponential: bf16 rounding.
static __device__ __forceinline__ float gelu_of_half(float h) {
    const float t = ptx::tanh_approx(h * fmaf(h * h, 0.28541926f, 1.5957692f));
    return fmaf(h, t, h);
}
static __device__ __forceinline__ float gelu_tanh(float g) { return gelu_of_half(0.5f * g); }

// Per-thread constants of one 64-row block: its two features' bias, column sum and frequency.
struct Rows {
    float b0, b1, c0, c1;
    float turns_hi, turns_lo;
    float scale;   // STORE_POSITION: of the product
    float g0, g1;  // ADD of the loop: of the features' products
    float next[8];  // scale of the next norm, of the thread's chunk in copy_out
};

// Learned scales of the next norm for the lane's eight of a slab's features.
static __device__ __forceinline__ void next_scale_of(float (&to)[8], const GemmParams& p, int slab,
                                                     int lane) {
    const int first = slab + lane % 8 * 8;
    if (first >= (int)p.n) return;
    const float4* from = reinterpret_cast<const float4*>(p.next_scale + first);
    const float4 a = __ldg(from), b = __ldg(from + 1);
    to[0] = a.x, to[1] = a.y, to[2] = a.z, to[3] = a.w;
    to[4] = b.x, to[5] = b.y, to[6] = b.z, to[7] = b.w;
}

template <class T>
static __device__ __forceinline__ Rows rows_of(const GemmParams& p, int block, int warp, int lane) {
    const int f = block + warp * 16 + lane / 4;
    Rows r = {};
    constexpr bool BIAS = (!T::RMS && !T::E4M3) || T::OF_LOOP;
    if (BIAS) r.b0 = p.bias != nullptr && f < (int)p.n ? p.bias[f] : 0.f;
    if (BIAS) r.b1 = p.bias != nullptr && f + 8 < (int)p.n ? p.bias[f + 8] : 0.f;
    r.c0 = T::NORM && !T::RMS && p.colsum != nullptr && f < (int)p.n ? p.colsum[f] : 0.f;
    r.c1 = T::NORM && !T::RMS && p.colsum != nullptr && f + 8 < (int)p.n ? p.colsum[f + 8] : 0.f;
    if (T::EPI == STORE_POSITION) r.scale = p.scale;
    if (T::OF_LOOP && T::EPI == ADD) {
        const float* gate = static_cast<const float*>(p.aux);
        r.g0 = gate != nullptr && f < (int)p.n ? gate[f] : 1.f;
        r.g1 = gate != nullptr && f + 8 < (int)p.n ? gate[f + 8] : 1.f;
    }
    if (T::SCALES && p.scaled != nullptr) next_scale_of(r.next, p, block, lane);
    if (T::EPI == ROPE && f < (int)p.q_cols + HEAD) {  // else no turn: cos 1, sin 0
        const float2 turns = static_cast<const float2*>(p.aux)[f % HEAD / 16 * 8 + lane / 4];
        r.turns_hi = turns.x, r.turns_lo = turns.y;
    }
    return r;
}

// Finishes the values of one 8-token group held by a thread: tokens 2·(lane%4) and + 1 (their
// {rstd, mean·rstd} in `rec`, positions in `pos`) of features f (v[0], v[1]) and f + 8 (v[2],
// v[3]). The products become what is stored, or, for GeGLU, the two hidden values in v[0], v[1].
template <class T>
static __device__ __forceinline__ void finish(float (&v)[4], const Rows& r, float4 rec,
                                              float2 pos) {
    if (T::E4M3 && T::EPI == GEGLU) {
        v[0] *= rec.x, v[1] *= rec.z, v[2] *= rec.y, v[3] *= rec.w;
    } else if (T::E4M3) {
        v[0] *= rec.x, v[1] *= rec.z, v[2] *= rec.x, v[3] *= rec.z;
    } else if (T::RMS && T::OF_LOOP) {
        v[0] = fmaf(v[0], rec.x, r.b0), v[1] = fmaf(v[1], rec.z, r.b0);
        v[2] = fmaf(v[2], rec.x, r.b1), v[3] = fmaf(v[3], rec.z, r.b1);
    } else if (T::EPI == ADD && T::OF_LOOP) {
        v[0] = fmaf(v[0], r.g0, r.b0), v[1] = fmaf(v[1], r.g0, r.b0);
        v[2] = fmaf(v[2], r.g1, r.b1), v[3] = fmaf(v[3], r.g1, r.b1);
    } else if (T::RMS) {
        v[0] *= rec.x, v[1] *= rec.z, v[2] *= rec.x, v[3] *= rec.z;
    } else if (T::NORM) {
        v[0] = fmaf(v[0], rec.x, fmaf(-rec.y, r.c0, r.b0));
        v[1] = fmaf(v[1], rec.z, fmaf(-rec.w, r.c0, r.b0));
        v[2] = fmaf(v[2], rec.x, fmaf(-rec.y, r.c1, r.b1));
        v[3] = fmaf(v[3], rec.z, fmaf(-rec.w, r.c1, r.b1));
    } else if (T::EPI == STORE_POSITION) {
        v[0] = fmaf(v[0], r.scale, r.b0), v[1] = fmaf(v[1], r.scale, r.b0);
        v[2] = fmaf(v[2], r.scale, r.b1), v[3] = fmaf(v[3], r.scale, r.b1);
    } else {
        v[0] += r.b0, v[1] += r.b0, v[2] += r.b1, v[3] += r.b1;
    }
    if (T::EPI == GELU) {
        for (int i = 0; i < 4; i++) v[i] = gelu_tanh(v[i]);
    } else if (T::EPI == GEGLU) {
        v[0] = gelu_tanh(v[0]) * v[2];
        v[1] = gelu_tanh(v[1]) * v[3];
    } else if (T::EPI == ROPE) {
        for (int i = 0; i < 2; i++) {
            const float at = i ? pos.y : pos.x;
            const float turn = at * r.turns_hi;
            const float whole = (turn + 12582912.f) - 12582912.f;  // rounded to an integer
            const float rest = fmaf(at, r.turns_lo, fmaf(at, r.turns_hi, -whole));
            float sin, cos;
            __sincosf(rest * 6.2831853f, &sin, &cos);
            const float a = v[i], b = v[i + 2];
            v[i] = a * cos - b * sin;
            v[i + 2] = b * cos + a * sin;
        }
    }
}

// Where row `at` of the product goes in a buffer with `stride` rows a sample.
static __device__ __forceinline__ uint32_t row_in(const GemmParams& p, uint32_t at,
                                                  uint32_t stride) {
    if (stride == p.period) return at;
    const uint32_t sample = quotient(at, p.period);
    return sample * stride + (at - sample * p.period);
}

// Chunks of 16 bytes that a thread takes side by side.
constexpr int CHUNKS = 4;

// Adds {Σx, Σx²} of four tokens' chunks up over the eight lanes that hold a token. Every step hands
// half of the values over and keeps half, since shuffles go the way of shared memory, which the
// products keep busy: lane l ends with Σx (even l) or Σx² (odd l) of token summed_by(l).
static __device__ __forceinline__ int summed_by(int lane) { return (lane & 2) | (lane >> 2 & 1); }
static __device__ __forceinline__ float row_sum(const float2 (&sums)[CHUNKS], int lane) {
    const auto hand_over = [lane](float low, float high, int bit) {
        const float kept = lane & bit ? high : low, given = lane & bit ? low : high;
        return kept + __shfl_xor_sync(~0u, given, bit);
    };
    float one[4];
#pragma unroll
    for (int u = 0; u < 4; u++) one[u] = hand_over(sums[u].x, sums[u].y, 1);
    return hand_over(hand_over(one[0], one[2], 2), hand_over(one[1], one[3], 2), 4);
}

// Writes `tokens` of one consumer's staged [tokens][64 features] to memory, 16 bytes a thread,
// adding the position table, reducing the rows' statistics and leaving a copy that the next norm's
// scale has multiplied on the way. Beside the products, a round trip to shared memory takes
// hundreds of clocks: a thread reads four chunks ahead of those it works on. Calls `read` when it
// has read all of them.
template <class T, class Read>
static __device__ __forceinline__ void copy_out(const GemmParams& p, uint32_t staging, int tid,
                                                int first_row, int tokens, int slab, const Rows& r,
                                                Read read) {
    const int chunk = tid & 7;
    const int width = T::EPI == GEGLU ? p.n / 2 : p.n;
    const bool in_width = slab + chunk * 8 < width;
    __nv_bfloat16* out = p.out + slab;
    uint32_t ld = p.out_ld, stride = T::EPI == ROPE || T::EPI == ADD ? p.period : p.out_stride;
    if (T::EPI == ROPE && slab >= (int)p.q_cols) {
        const int f = slab - p.q_cols;
        out = f < HEAD ? p.out_k + f : p.out_v + (f - HEAD);
        ld = p.kv_ld, stride = p.kv_stride;
    }
    out += chunk * 8;
    const bool scaling = T::STATS && p.scaled != nullptr && in_width;
    float next_scale[8] = {};
    if (scaling && !T::SCALES) next_scale_of(next_scale, p, slab, chunk);
    for (int i = 0; T::SCALES && i < 8; i++) next_scale[i] = r.next[i];
    uint4 v[CHUNKS], ahead[CHUNKS];
    const auto load = [&](uint4(&to)[CHUNKS], int t) {
#pragma unroll
        for (int u = 0; u < CHUNKS; u++) {
            const int token = t + 16 * u;
            to[u] = make_uint4(0, 0, 0, 0);
            if (token < tokens)
                to[u] = ptx::ld_shared_u4(staging + token * 128 + ((chunk ^ (token & 7)) << 4));
        }
    };
    load(ahead, tid >> 3);
    for (int t = tid >> 3, left = tokens; left > 0; t += 16 * CHUNKS, left -= 16 * CHUNKS) {
#pragma unroll
        for (int u = 0; u < CHUNKS; u++) v[u] = ahead[u];
        if (left > 16 * CHUNKS) load(ahead, t + 16 * CHUNKS);
        else read();
#pragma unroll
        for (int u = 0; u < CHUNKS; u++) {
            const int token = t + 16 * u;
            if (T::EPI == STORE_POSITION && in_width && token < tokens) {
                const uint32_t row = first_row + token;
                const uint32_t at = row - quotient(row, p.period) * p.period;
                const float* table = static_cast<const float*>(p.aux) + (size_t)at * p.n + slab +
                                     chunk * 8;
                uint32_t* word = &v[u].x;
                for (int i = 0; i < 4; i++)
                    word[i] = ptx::pack_bf16(ptx::bf16_lo(word[i]) + table[2 * i],
                                             ptx::bf16_hi(word[i]) + table[2 * i + 1]);
            }
        }
        if (T::STATS && p.stats_out != nullptr) {
            float2 sums[CHUNKS];
#pragma unroll
            for (int u = 0; u < CHUNKS; u++) {
                const uint32_t* word = &v[u].x;
                sums[u] = make_float2(0.f, 0.f);
                for (int i = 0; i < 4; i++) {
                    const float lo = ptx::bf16_lo(word[i]), hi = ptx::bf16_hi(word[i]);
                    sums[u].x += lo + hi;
                    sums[u].y = fmaf(lo, lo, fmaf(hi, hi, sums[u].y));
                }
            }
            const float sum = row_sum(sums, chunk);
            const int token = t + 16 * summed_by(chunk);
            float* stats = reinterpret_cast<float*>(p.stats_out) + 2 * (slab / 64) + (chunk & 1);
            if (token < tokens && first_row + token < (int)p.rows && slab < width)
                stats[(size_t)row_in(p, first_row + token, stride) * (p.n / 64) * 2] = sum;
        }
#pragma unroll
        for (int u = 0; u < CHUNKS; u++) {
            const int token = t + 16 * u;
            if (token >= tokens || first_row + token >= (int)p.rows || !in_width) continue;
            const size_t to = (size_t)row_in(p, first_row + token, stride) * ld;
            if (T::E4M3 && T::EPI == GEGLU) {
                uint8_t* bytes = reinterpret_cast<uint8_t*>(p.out) + slab + chunk * 8;
                *reinterpret_cast<uint2*>(bytes + to) = ptx::pack_e4m3(v[u]);
                continue;
            }
            *reinterpret_cast<uint4*>(out + to) = v[u];
            if (scaling) {
                uint32_t* word = &v[u].x;
                for (int i = 0; i < 4; i++)
                    word[i] = ptx::pack_bf16(ptx::bf16_lo(word[i]) * next_scale[2 * i],
                                             ptx::bf16_hi(word[i]) * next_scale[2 * i + 1]);
                *reinterpret_cast<uint4*>(p.scaled + to + slab + chunk * 8) = v[u];
            }
        }
    }
}

// Two neighbouring 8-token groups (one if not `both`) of a warp's 16 features, staging ↔ registers.
static __device__ __forceinline__ void load_pair(uint32_t* word, uint32_t at, bool both) {
    if (both) {
        const uint4 v = ptx::load_matrix_trans_x4(at);
        word[0] = v.x, word[1] = v.y, word[2] = v.z, word[3] = v.w;
    } else {
        const uint2 v = ptx::load_matrix_trans_x2(at);
        word[0] = v.x, word[1] = v.y;
    }
}
static __device__ __forceinline__ void store_pair(const uint32_t* word, uint32_t at, bool both) {
    if (both) ptx::store_matrix_trans_x4(at, word[0], word[1], word[2], word[3]);
    else ptx::store_matrix_trans_x2(at, word[0], word[1]);
}

// ADD: requests the residual of one staged [tokens][64 features] into the staging itself.
template <class T>
static __device__ __forceinline__ void fetch_old(const Smem<T>& s, const TensorMap* old,
                                                 int consumer, int tid, int feature, int row) {
    ptx::named_barrier(1 + consumer, 128);  // the staging's last readers are done
    if (tid == 0) {
        const uint32_t bar = s.old_full + 8 * consumer;
        ptx::fence_async_proxy();
        ptx::mbar_arrive_expect(bar, T::STAGING);
        ptx::tma_load(s.staging + consumer * T::STAGING, old, feature, row, bar);
    }
}

// One consumer's staging [tokens][64 features] and what a thread does with it.
struct Staged {
    uint32_t at, to;             // its begin; this lane's place in matrix stores
    uint32_t records, positions; // of the tile's tokens
};

// Finishes groups j … j + BLOCK − 1 of one 64-row block (GeGLU: of both) and stages them, loads
// first, so that their latencies overlap; ADD: adds the residual that lies there.
template <class T, int BLOCK, int GROUPS>
static __device__ __forceinline__ void stage(float (&acc)[T::MI][4 * GROUPS], int slab, int j,
                                             const Rows& r, const Rows& r1, const Staged& s) {
    const int pair = 2 * (threadIdx.x % 4);
    float4 rec[BLOCK];
    float2 pos[BLOCK];
    uint32_t word[2 * BLOCK] = {}, was[2 * BLOCK] = {};
#pragma unroll
    for (int i = 0; i < BLOCK; i++) {
        if (j + i >= GROUPS) break;
        const int token = 8 * (j + i) + pair;
        if (T::NORM) rec[i] = ptx::ld_shared_f4(s.records + 8 * token);
        if (T::EPI == ROPE) pos[i] = ptx::ld_shared_f2(s.positions + 4 * token);
        if (T::EPI == ADD && i % 2 == 0)
            load_pair(was + 2 * i, s.to + (j + i) * 1024, j + i + 1 < GROUPS);
    }
#pragma unroll
    for (int i = 0; i < BLOCK; i++) {
        if (j + i >= GROUPS) break;
        const float* a = &acc[slab][4 * (j + i)];
        float v[4] = {a[0], a[1], a[2], a[3]};
        finish<T>(v, r, rec[i], pos[i]);
        if (T::EPI == ADD) {
            v[0] += ptx::bf16_lo(was[2 * i]), v[1] += ptx::bf16_hi(was[2 * i]);
            v[2] += ptx::bf16_lo(was[2 * i + 1]), v[3] += ptx::bf16_hi(was[2 * i + 1]);
        }
        word[2 * i] = ptx::pack_bf16(v[0], v[1]);
        if (T::EPI == GEGLU) {
            const float* b = &acc[T::MI - 1][4 * (j + i)];
            float w[4] = {b[0], b[1], b[2], b[3]};
            finish<T>(w, r1, rec[i], pos[i]);
            word[2 * i + 1] = ptx::pack_bf16(w[0], w[1]);
        } else {
            word[2 * i + 1] = ptx::pack_bf16(v[2], v[3]);
        }
    }
#pragma unroll
    for (int i = 0; i < BLOCK; i += 2) {
        if (j + i < GROUPS) store_pair(word + 2 * i, s.to + (j + i) * 1024, j + i + 1 < GROUPS);
    }
}

// Takes a 64-feature slab, staged whole, away: by the copy engine where the destination is a matrix
// of the product's rows and nothing else is to be left; else by way of registers. Calls `read` when
// they hold it.
template <class T, class Read>
static __device__ __forceinline__ void leave(const TensorMap* out, const GemmParams& p,
                                             const Staged& s, int consumer, int tid, int2 o,
                                             int slab, int tokens, const Rows& r, Read read) {
    const bool whole = T::EPI == ROPE ? slab < (int)p.q_cols
                                      : p.out_stride == p.period && p.stats_out == nullptr &&
                                            p.scaled == nullptr;
    if (T::BULK && whole) {
        ptx::fence_async_proxy();
        ptx::named_barrier(1 + consumer, 128);
        if (tid == 0) ptx::tma_store(out, slab, o.y, s.at);
    } else {
        ptx::named_barrier(1 + consumer, 128);
        copy_out<T>(p, s.at, tid, o.y, tokens, slab, r, read);
    }
}

// Takes one consumer's accumulators of `groups` 8-token groups, from token `first` of the tile on,
// through the epilogue: registers → staging (transposed to token-major) → memory.
template <class T, int GROUPS>
static __device__ __forceinline__ void epilogue(float (&acc)[T::MI][4 * GROUPS], const Smem<T>& s,
                                                const TensorMap* out, const GemmParams& p,
                                                int consumer, int tid, int2 o, int first,
                                                int groups, int buffer, const Rows& rows,
                                                uint32_t& old_parity) {
    const int warp = tid / 32, lane = tid % 32;
    const int feature = o.x + (T::TURNS ? 0 : consumer * 64 * T::MI);
    const uint32_t staging = s.staging + consumer * T::STAGING;
    // Matrix q = lane / 8 of a store: q & 1 picks the 8-feature chunk, q >> 1 the 8-token group.
    const int q = lane / 8, in_group = lane % 8;
    const int chunk = T::EPI == GEGLU ? (q & 1) * 4 + warp : warp * 2 + (q & 1);
    const Staged staged = {
        staging, staging + ((q >> 1) * 8 + in_group) * 128 + ((chunk ^ in_group) << 4),
        s.records + buffer * T::RECORDS + 8 * first,
        s.positions + buffer * T::POSITIONS + 4 * first};
    constexpr int SLABS = T::EPI == GEGLU ? 1 : T::MI;
#pragma unroll
    for (int slab = 0; slab < SLABS; slab++) {
        const Rows r = T::MI == 1 ? rows : rows_of<T>(p, feature + slab * 64, warp, lane);
        const Rows r1 = T::EPI == GEGLU ? rows_of<T>(p, feature + 64, warp, lane) : r;
        const int out_slab = T::EPI == GEGLU ? feature / 2 : feature + slab * 64;
        if (T::EPI == ADD) {
            ptx::mbar_wait(s.old_full + 8 * consumer, old_parity);
            old_parity ^= 1;
        } else {
            if (T::BULK && tid == 0) ptx::tma_stores_read();
            ptx::named_barrier(1 + consumer, 128);  // the staging's last readers are done
        }
#pragma unroll
        for (int j = 0; j < GROUPS; j += 4) {
            stage<T, 4, GROUPS>(acc, slab, j, r, r1, staged);
            // 64 tokens at a time, so that stores drain under the arithmetic of the next.
            if (T::WHOLE || ((j + 4) % 8 != 0 && j + 4 < GROUPS)) continue;
            const int begin = j / 8 * 8;
            ptx::named_barrier(1 + consumer, 128);
            copy_out<T>(p, staging + begin * 1024, tid, o.y + first + 8 * begin,
                           min(64, (groups - begin) * 8), out_slab, r, [] {});
        }
        const auto fetch_next = [&] {
            if (T::EPI == ADD && slab + 1 < SLABS)
                fetch_old<T>(s, out, consumer, tid, feature + (slab + 1) * 64, o.y + first);
        };
        if constexpr (T::WHOLE)
            leave<T>(out, p, staged, consumer, tid, make_int2(o.x, o.y + first), out_slab,
                     groups * 8, r, fetch_next);
        GEMM_MARK(6);
        if (T::NORM && slab == SLABS - 1 && tid == 0) ptx::mbar_arrive(s.rec_empty + 8 * buffer);
    }
}

// UPRIGHT: the same for one consumer's 64 tokens × BN features. Its accumulators lie as the rows of
// the destination do, which follow each other as those of x; each warp stages its 16 tokens and
// takes them away, 16 bytes a thread. GELU: `columns` holds half of the bias.
template <class T>
static __device__ __forceinline__ void upright(float (&acc)[4 * T::GROUPS], const Smem<T>& s,
                                               const GemmParams& p, int consumer, int tid, int2 o,
                                               int buffer) {
    constexpr int BLOCK = 8;  // chunks of 8 features, staged and taken away at a time
    const int warp = tid / 32, lane = tid % 32, first = consumer * 64 + warp * 16;
    const uint32_t records = s.records + buffer * T::RECORDS + 8 * (first + lane / 4);
    float2 low = ptx::ld_shared_f2(records), high = ptx::ld_shared_f2(records + 64);
    if (T::EPI == GELU) low.x *= 0.5f, low.y *= 0.5f, high.x *= 0.5f, high.y *= 0.5f;
    const int rows = p.rows - (o.y + first), features = p.n - o.x;  // that are left
    __nv_bfloat16* out = p.out + (size_t)(o.y + first) * p.out_ld + o.x;
    const uint32_t columns = s.columns + buffer * T::COLUMNS + 16 * (lane % 4);
    // Matrix q = lane / 8 of a store: q & 1 picks the 8 tokens, q >> 1 the chunk.
    const uint32_t staged = s.staging + consumer * T::STAGING + warp * 16 * T::PITCH;
    const uint32_t to = staged + (lane % 16) * T::PITCH + (lane / 16) * 16;
    __syncwarp();  // the staging's last readers are done
#pragma unroll
    for (int j = 0; j < T::GROUPS; j += BLOCK) {
        uint32_t word[2 * BLOCK];
#pragma unroll
        for (int i = 0; i < BLOCK; i++) {
            if (j + i >= T::GROUPS) break;
            const float* a = &acc[4 * (j + i)];
            const float4 c = ptx::ld_shared_f4(columns + 64 * (j + i));  // bias, colsum, twice
            float v[4] = {fmaf(a[0], low.x, fmaf(-low.y, c.y, c.x)),
                          fmaf(a[1], low.x, fmaf(-low.y, c.w, c.z)),
                          fmaf(a[2], high.x, fmaf(-high.y, c.y, c.x)),
                          fmaf(a[3], high.x, fmaf(-high.y, c.w, c.z))};
            for (int e = 0; T::EPI == GELU && e < 4; e++) v[e] = gelu_of_half(v[e]);
            word[2 * i] = ptx::pack_bf16(v[0], v[1]);
            word[2 * i + 1] = ptx::pack_bf16(v[2], v[3]);
        }
#pragma unroll
        for (int i = 0; i < BLOCK; i += 2) {
            if (j + i >= T::GROUPS) break;
            const uint32_t* w = word + 2 * i;
            if (j + i + 1 < T::GROUPS)
                ptx::store_matrix_x4(to + (j + i) * 16, w[0], w[1], w[2], w[3]);
            else ptx::store_matrix_x2(to + (j + i) * 16, w[0], w[1]);
        }
        __syncwarp();
        const int chunks = min(BLOCK, T::GROUPS - j);  // eight lanes a token, or all a chunk
        uint4 v[BLOCK / 2];
#pragma unroll
        for (int i = 0; i < 16 * chunks; i += 32)
            v[i / 32] = ptx::ld_shared_u4(staged + min((i + lane) / chunks, 15) * T::PITCH +
                                          (j + (i + lane) % chunks) * 16);
#pragma unroll
        for (int i = 0; i < 16 * chunks; i += 32) {
            const int token = (i + lane) / chunks, chunk = j + (i + lane) % chunks;
            if (i + lane < 16 * chunks && token < rows && 8 * chunk < features)
                ptx::st_global_u4(out + token * p.out_ld + 8 * chunk, v[i / 32]);
        }
    }
    GEMM_MARK(6);
    ptx::named_barrier(1 + consumer, 128);
    if (tid == 0) ptx::mbar_arrive(s.rec_empty + 8 * buffer);
}

}  // namespace gemm
