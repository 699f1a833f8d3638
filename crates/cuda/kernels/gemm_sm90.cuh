// One product y[token, feature] = norm(x)[token, :] · W[feature, :]ᵀ + bias with its epilogue, for
// Hopper: TMA ring, one producer warp, two to four consumer warpgroups on wgmma. gemm_sm90.cu has
// the equation, the tile table and the instances; this file is the kernel.
#pragma once
#include "gemm_epilogue_sm90.cuh"
#include "wgmma.cuh"

namespace gemm {

// Requests what is wgmma's M (N) of stage `fill` at column k, for all CTAs that share the tile if
// it is this one's turn.
template <class T>
static __device__ __forceinline__ void load_m(const Smem<T>& s, const Place& c, const TensorMap* w,
                                              int fill, int k, int m) {
    const int slot = fill % T::STAGES;
    const uint32_t dst = s.ring + slot * T::STAGE, bar = s.full + 8 * slot;
    uint16_t mask = 0;
    for (int i = 0; i < T::CN; i++) mask |= 1 << (c.ck + T::CK * (c.cm + T::CM * i));
    if (T::CN == 1) ptx::tma_load(dst, w, k, m, bar);
    else if (fill % T::CN == c.cn) ptx::tma_load_multicast(dst, w, k, m, bar, mask);
}
template <class T>
static __device__ __forceinline__ void load_n(const Smem<T>& s, const Place& c, const TensorMap* x,
                                              int fill, int k, int n) {
    const int slot = fill % T::STAGES;
    const uint32_t dst = s.ring + slot * T::STAGE + T::W_BYTES, bar = s.full + 8 * slot;
    uint16_t mask = 0;
    for (int i = 0; i < T::CM; i++) mask |= 1 << (c.ck + T::CK * (i + T::CM * c.cn));
    if (T::CM == 1) ptx::tma_load(dst, x, k, n, bar);
    else if (fill % T::CM == c.cm) ptx::tma_load_multicast(dst, x, k, n, bar, mask);
}

template <class T>
static __device__ __forceinline__ void load_weights(const Smem<T>& s, const Place& c,
                                                    const TensorMap* w, int fill, int k, int at) {
    if (T::UPRIGHT) load_n<T>(s, c, w, fill, k, at);
    else load_m<T>(s, c, w, fill, k, at);
}
template <class T>
static __device__ __forceinline__ void load_tokens(const Smem<T>& s, const Place& c,
                                                   const TensorMap* x, int fill, int k, int at) {
    if (T::UPRIGHT) load_m<T>(s, c, x, fill, k, at);
    else load_n<T>(s, c, x, fill, k, at);
}

// Stages whose weights are requested before the kernels in front have finished. CTAs that fill the
// processors begin when those end, and the first tokens would queue behind all these weights.
template <class T> static __device__ __forceinline__ int early_stages(const Place& c) {
    constexpr int MOST = T::UPRIGHT ? 60 * 1024 / (T::FEATURES * 128) : T::STAGES;
    return min(min(T::STAGES, MOST), c.k_steps);
}
template <class T>
static __device__ __forceinline__ void load_early(const Smem<T>& s, const Place& c,
                                                  const TensorMap* w, const GemmParams& p) {
    if (c.cluster >= c.tiles_m * c.tiles_n) return;
    const int m = origin<T>(c, c.cluster, p.group).x;
    for (int i = 0; i < early_stages<T>(c); i++) {
        ptx::mbar_arrive_expect(s.full + 8 * i, T::STAGE);
        load_weights<T>(s, c, w, i, (c.k_begin + i) * T::K_STEP, m);
    }
}

// Fills the ring, by one thread, from where load_early left off. Between the end of the kernels in
// front and the first request for tokens lie as few instructions as can be.
template <class T>
static __device__ __forceinline__ void produce(const Smem<T>& s, const Place& c,
                                               const TensorMap* w, const TensorMap* x,
                                               const GemmParams& p) {
    int2 o = origin<T>(c, c.cluster, p.group);
    const int early = c.cluster < c.tiles_m * c.tiles_n ? early_stages<T>(c) : 0;
    const auto tokens = [&](int fill, int i) {
        const int k = (c.k_begin + i) * T::K_STEP;
        const bool again = T::OF_LOOP && k >= (int)p.x_cols;
        load_tokens<T>(s, c, x, fill, again ? k - (int)p.x_cols : k, o.y);
    };
    ptx::grid_dependency_wait_with(o.x, o.y);
    GEMM_MARK_PRODUCER(8);
    // Two loops take registers that products of two blocks a consumer do not leave.
    constexpr bool APART = T::MI == 1;
    int i = APART ? early : 0, fill = i;
#pragma unroll 1
    for (int first = 0; first < i; first++) {
        tokens(first, first);
        if (first == 0) GEMM_MARK_PRODUCER(9);
    }
    for (int t = c.cluster; t < c.tiles_m * c.tiles_n; t += c.clusters, i = 0) {
        if (t != c.cluster) o = origin<T>(c, t, p.group);
#pragma unroll 1
        for (; i < c.k_steps; i++, fill++) {
            if (APART || fill >= early) {
                const int slot = fill % T::STAGES, use = fill / T::STAGES;
                if (use > 0) ptx::mbar_wait(s.empty + 8 * slot, (use - 1) & 1);
                ptx::mbar_arrive_expect(s.full + 8 * slot, T::STAGE);
                load_weights<T>(s, c, w, fill, (c.k_begin + i) * T::K_STEP, o.x);
            }
            tokens(fill, i);
            if (!APART && fill == 0) GEMM_MARK_PRODUCER(9);
        }
    }
}

// {rstd, mean·rstd} of a row whose columns add up to `sum` and their squares to `squares`.
static __device__ __forceinline__ float2 record_of(const GemmParams& p, float sum, float squares) {
    const float mean = p.colsum != nullptr ? sum * p.inv_width : 0.f;
    const float rstd = rsqrtf(fmaxf(squares * p.inv_width - mean * mean, 0.f) + 1e-6f);
    return make_float2(rstd, mean * rstd);
}

// A row's record from the partial statistics that its writers left. Every CTA fetches those of all
// its rows, and a tile may have to wait for them. Behind RMSNorm a row has 256 bytes of them: by
// eight lanes, so that a quarter of a warp takes a cache line. Behind LayerNorm it has 144: one
// thread a row has more of them under way.
template <class T>
static __device__ __forceinline__ float2 read_record(const GemmParams& p, uint32_t row, int lane) {
    const float4* part = reinterpret_cast<const float4*>(p.stats_in + (size_t)row * p.slots_in);
    float sum = 0.f, squares = 0.f;
    if (T::RMS) {
#pragma unroll
        for (int j = 0; j < 16; j += 8) {
            if (j + lane >= p.slots_in / 2) continue;
            const float4 v = __ldcg(part + j + lane);
            sum += v.x + v.z, squares += v.y + v.w;
        }
#pragma unroll
        for (int d = 4; d > 0; d /= 2) {
            sum += __shfl_xor_sync(~0u, sum, d);
            squares += __shfl_xor_sync(~0u, squares, d);
        }
    } else {
#pragma unroll 4
        for (uint32_t j = 0; j < p.slots_in / 2; j++) {
            const float4 v = __ldcg(part + j);
            sum += v.x, squares += v.y;
            sum += v.z, squares += v.w;
        }
    }
    return record_of(p, sum, squares);
}

// The position of a row: its place in the sample; in the loop that is behind the real prefix.
template <class T>
static __device__ __forceinline__ uint32_t position_of(const GemmParams& p, uint32_t row) {
    const uint32_t sample = quotient(row, p.period), place = row - sample * p.period;
    if (!T::OF_LOOP) return place;
    const uint2 l = __ldg(p.lengths + sample);
    return l.x * p.image_tokens + l.y + p.first_position + place;
}

// The records of each tile's rows, by three spare warps. Two buffers take turns; behind RMSNorm
// most tiles of a CTA have the rows of one of the two tiles before, whose records are there.
template <class T>
static __device__ __forceinline__ void normalise(const Smem<T>& s, const Place& c,
                                                 const GemmParams& p, int tid) {
    constexpr int LANES = T::RMS ? 8 : 1;  // of a row
    if (!T::UPRIGHT) ptx::grid_dependency_wait();
    int count = 0, before = -1, last = -1;  // first rows of the two tiles before
    for (int t = c.cluster; t < c.tiles_m * c.tiles_n; t += c.clusters, count++) {
        const int2 o = origin<T>(c, t, p.group);
        const int first = o.y, buffer = count & 1;
        if (count >= 2) ptx::mbar_wait(s.rec_empty + 8 * buffer, (count / 2 - 1) & 1);
        if (T::UPRIGHT) {  // what belongs to features, before the kernels in front have finished
            for (int i = tid; i < T::FEATURES; i += 96) {
                const bool there = o.x + i < (int)p.n;
                const float bias = there && p.bias != nullptr ? p.bias[o.x + i] : 0.f;
                const float2 column = {T::EPI == GELU ? 0.5f * bias : bias,
                                       there && p.colsum != nullptr ? p.colsum[o.x + i] : 0.f};
                ptx::st_shared(s.columns + buffer * T::COLUMNS + 8 * i, column);
            }
            if (count == 0) ptx::grid_dependency_wait();
        }
        const bool there = T::RMS && first == before;
        if (T::RMS) before = last, last = first;
#pragma unroll(T::RMS ? 2 : 1)
        for (int i = tid / LANES; !there && i < T::TOKENS; i += 96 / LANES) {
            const uint32_t row = T::RMS ? min((uint32_t)(first + i), p.rows - 1) : first + i;
            float2 rec = make_float2(1.f, 0.f);
            if (T::E4M3 && row < p.rows) rec = __ldcg(p.stats_in + row);
            else if (p.stats_in != nullptr && row < p.rows)
                rec = read_record<T>(p, row, tid % LANES);
            if (tid % LANES == 0) {
                ptx::st_shared(s.records + buffer * T::RECORDS + 8 * i, rec);
                if (T::EPI == ROPE) {
                    const uint32_t at = s.positions + buffer * T::POSITIONS + 4 * i;
                    ptx::st_shared(at, (float)position_of<T>(p, row));
                }
            }
        }
        ptx::mbar_arrive(s.rec_full + 8 * buffer);
    }
}

// Adds the K-parts of a cluster in the order own, then ascending rank: each consumer ends with the
// sums of the OWN token groups from its rank · OWN on. Parts travel into the peers' drained rings.
template <class T>
static __device__ __forceinline__ void reduce(float (&acc)[T::MI][4 * T::GROUPS],
                                              float (&own)[T::MI][4 * T::OWN], const Smem<T>& s,
                                              const Place& c, int consumer, int tid) {
    const int base = (c.cm + T::CM * c.cn) * T::CK;
    const uint32_t at = s.ring + tid * 16, bar = s.parts_full + 8 * consumer;
    const int groups = min(T::OWN, T::GROUPS - c.ck * T::OWN);
    if (tid == 0) ptx::mbar_arrive_expect(bar, (T::CK - 1) * T::MI * groups * 2048);
    ptx::cluster_wait();  // the peers' mbarriers exist
    if (tid < T::CK && tid != c.ck) ptx::mbar_arrive_remote(s.drained, base + tid);
    ptx::mbar_wait(s.drained, 0);
    auto slot = [&](int from, int to, int mi, int j) {  // place of a part in CTA `to`
        const int index = from - (from > to);
        return (((index * T::CONSUMERS + consumer) * T::MI + mi) * T::OWN + j) * 2048;
    };
#pragma unroll
    for (int q = 0; q < T::CK; q++) {
        const uint32_t remote = ptx::remote_addr(at, base + q);
        const uint32_t remote_bar = ptx::remote_addr(bar, base + q);
#pragma unroll
        for (int mi = 0; mi < T::MI; mi++) {
#pragma unroll
            for (int j = 0; j < T::OWN; j++) {
                if (q * T::OWN + j >= T::GROUPS) break;
                const float* a = &acc[mi][4 * (q * T::OWN + j)];
                if (q != c.ck) {
                    ptx::st_async(remote + slot(c.ck, q, mi, j), remote_bar, a[0], a[1], a[2],
                                  a[3]);
                } else {
                    for (int i = 0; i < 4; i++) own[mi][4 * j + i] = a[i];
                }
            }
        }
    }
    ptx::mbar_wait_cluster(bar, 0);
    for (int from = 0; from < T::CK; from++) {
        if (from == c.ck) continue;
#pragma unroll
        for (int mi = 0; mi < T::MI; mi++) {
#pragma unroll
            for (int j = 0; j < T::OWN; j++) {
                const float4 v = ptx::ld_shared_f4(at + slot(from, c.ck, mi, j));
                own[mi][4 * j] += v.x, own[mi][4 * j + 1] += v.y;
                own[mi][4 * j + 2] += v.z, own[mi][4 * j + 3] += v.w;
            }
        }
    }
}

// 32 bytes of every row times 32 of every other.
template <class T, bool = T::E4M3> struct Product : ptx::Wgmma<T::BN> {};
template <class T> struct Product<T, true> : ptx::WgmmaE4m3<T::BN> {};

template <bool VALUE> struct Flag {
    static constexpr bool value = VALUE;
};

// One consumer warpgroup: products of its 64·MI weight rows with the tile's tokens, then epilogue.
template <class T>
static __device__ __forceinline__ void consume(const Smem<T>& s, const Place& c,
                                               const TensorMap* out, const GemmParams& p,
                                               int consumer, int tid) {
    // Thread i < CM + CN - 1 tells CTA `target` that this warpgroup has left a stage.
    int target = 0;
    if (T::CM * T::CN > 1) {
        const int m = tid < T::CN ? c.cm : (c.cm + 1 + tid - T::CN) % T::CM;
        const int n = tid < T::CN ? tid : c.cn;
        target = c.ck + T::CK * (m + T::CM * n);
    }
    auto release = [&](int slot) {
        const uint32_t bar = s.empty + 8 * slot;
        if (T::CM * T::CN == 1) {
            if (tid == 0) ptx::mbar_arrive(bar);
        } else if (tid < T::CM + T::CN - 1) {
            ptx::mbar_arrive_remote(bar, target);
        }
    };
    const int part = T::TURNS ? 0 : consumer;  // of the tile's weight rows
    const uint64_t w = ptx::wgmma_descriptor(s.ring + part * T::MI * 8192);
    const uint64_t x = ptx::wgmma_descriptor(s.ring + T::W_BYTES);
    int count = T::TURNS ? consumer : 0;  // tiles of this CTA so far
    uint32_t old_parity = 0;
    GEMM_MARK(1);
    ptx::grid_dependency_wait();
    GEMM_MARK(2);
    for (;; count += T::TURNS ? T::CONSUMERS : 1) {
        const int t = c.cluster + count * c.clusters;
        if (t >= c.tiles_m * c.tiles_n) break;
        int slot = count * c.k_steps % T::STAGES;
        uint32_t parity = count * c.k_steps / T::STAGES & 1;
        const int2 o = origin<T>(c, t, p.group);
        const int first = c.ck * T::OWN;
        if (T::EPI == ADD)
            fetch_old<T>(s, out, consumer, tid, o.x + part * 64 * T::MI, o.y + 8 * first);
        Rows rows = {};
        if (T::MI == 1 && !T::UPRIGHT) rows = rows_of<T>(p, o.x + part * 64, tid / 32, tid % 32);
        // A turn starts when the other consumer has seen its last stage arrive: only then do the
        // parities of the ring's mbarriers tell this turn's stages from earlier ones.
        if (T::TURNS && count > 0)
            ptx::mbar_wait(s.turn + 8 * consumer, (count - 1) / T::CONSUMERS & 1);
        // Of this tile alone: kept from tile to tile, they would be held through the epilogue.
        float acc[T::MI][4 * T::GROUPS];
        int last = 0;
        const auto step = [&](int i, auto first) {
            ptx::mbar_wait(s.full + 8 * slot, parity);
            if (i == 0) GEMM_MARK(3);
            ptx::wgmma_fence();
            const uint64_t at = (uint64_t)(slot * (T::STAGE / 16));
#pragma unroll
            for (int kk = 0; kk < 4; kk++) {
#pragma unroll
                for (int mi = 0; mi < T::MI; mi++)
                    Product<T>::run(acc[mi], w + at + mi * 512 + kk * 2, x + at + kk * 2,
                                    decltype(first)::value ? kk : 1);
            }
            ptx::wgmma_commit();
            if (T::TURNS && i == c.k_steps - 1 && tid == 0)
                ptx::mbar_arrive(s.turn + 8 * (1 - consumer));
            if (i > 0) {
                ptx::wgmma_wait<1>();
                release(last);
            }
            last = slot;
            if (++slot == T::STAGES) slot = 0, parity ^= 1;
        };
        step(0, Flag<true>());
        for (int i = 1; i < c.k_steps; i++) step(i, Flag<false>());
        ptx::wgmma_wait<0>();
        GEMM_MARK(4);
        release(last);
        const int buffer = count & 1;
        if constexpr (T::UPRIGHT) {
            ptx::mbar_wait(s.rec_full + 8 * buffer, (count / 2) & 1);
            GEMM_MARK(5);
            upright<T>(acc[0], s, p, consumer, tid, o, buffer);
        } else if constexpr (T::CK == 1) {
            if (T::NORM) ptx::mbar_wait(s.rec_full + 8 * buffer, (count / 2) & 1);
            GEMM_MARK(5);
            epilogue<T, T::GROUPS>(acc, s, out, p, consumer, tid, o, 0, T::GROUPS, buffer,
                                   rows, old_parity);
        } else {
            float own[T::MI][4 * T::OWN];
            reduce<T>(acc, own, s, c, consumer, tid);
            if (T::NORM) ptx::mbar_wait(s.rec_full, 0);
            GEMM_MARK(5);
            epilogue<T, T::OWN>(own, s, out, p, consumer, tid, o, 8 * first,
                                min(T::OWN, T::GROUPS - first), 0, rows, old_parity);
        }
    }
    if (T::BULK && tid == 0) ptx::tma_stores_read();  // the staging outlives its readers
}

template <class T>
static __device__ __forceinline__ void run(const TensorMap& w, const TensorMap& x,
                                           const TensorMap& out, const GemmParams& p) {
    extern __shared__ __align__(1024) uint8_t memory[];
    const Smem<T> s(ptx::smem_addr(memory));
    const Place c = place_of<T>(p);
    const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0), tid = threadIdx.x % 128;
    GEMM_MARK(0);
    // Multicasts need the peers' mbarriers at once, K-parts only when they are exchanged.
    constexpr bool SHARING = T::CM * T::CN > 1, SPLIT = T::CK > 1;
    if (threadIdx.x == 0) {
        for (int i = 0; i < T::STAGES; i++) {
            ptx::mbar_init(s.full + 8 * i, 1);
            ptx::mbar_init(s.empty + 8 * i, T::SHARERS * (T::CM + T::CN - 1));
        }
        ptx::mbar_init_fence();
    } else if (threadIdx.x == 32) {
        ptx::prefetch_tensor_map(&w);
        ptx::prefetch_tensor_map(&x);
        if (T::EPI == ADD || T::BULK) ptx::prefetch_tensor_map(&out);
    } else if (threadIdx.x == 64) {
        for (int i = 0; i < 2; i++) {
            ptx::mbar_init(s.rec_full + 8 * i, 96);
            ptx::mbar_init(s.rec_empty + 8 * i, T::SHARERS);
            ptx::mbar_init(s.turn + 8 * i, 1);
        }
        for (int i = 0; i < T::CONSUMERS; i++) {
            ptx::mbar_init(s.old_full + 8 * i, 1);
            ptx::mbar_init(s.parts_full + 8 * i, 1);
        }
        if (SPLIT) ptx::mbar_init(s.drained, T::CONSUMERS * (T::CK - 1));
        ptx::mbar_init_fence();
    }
    __syncthreads();
    if (SHARING || SPLIT) ptx::cluster_arrive_relaxed();
    if (SHARING) ptx::cluster_wait();
    // Not by the warp that asks for tokens, since most CTAs begin when the kernels in front have
    // nearly finished. (Products of milliseconds were 1 % slower.)
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
    if (warp == (T::MI == 1 ? 1 : 0) && ptx::elect_one()) load_early<T>(s, c, &w, p);
    __syncwarp();
    if (SHARING && SPLIT) ptx::cluster_arrive_relaxed();
    ptx::grid_launch_dependents();
    if (warpgroup == 0) {
        ptx::registers_shrink<T::FEW>();
        if (warp == 0) {
            if (ptx::elect_one()) produce<T>(s, c, &w, &x, p);
        } else if (T::NORM) {
            normalise<T>(s, c, p, tid - 32);
        }
        __syncwarp();
        if (SPLIT) ptx::cluster_wait();
    } else {
        ptx::registers_grow<T::MANY>();
        consume<T>(s, c, &out, p, warpgroup - 1, tid);
        GEMM_MARK(7);
    }
    if (SHARING) {  // no CTA leaves while others may still write or signal here
        ptx::cluster_arrive_relaxed();
        ptx::cluster_wait();
    }
}

}  // namespace gemm

// An instance as a kernel: X(name, consumers, MI, BN, stages, CM, CN, CK, turns, epilogue).
#define GEMM_KERNEL(NAME, C, MI, BN, STAGES, CM, CN, CK, TURNS, EPI)                               \
    extern "C" __global__ void __cluster_dims__((CM) * (CN) * (CK), 1, 1)                          \
        __launch_bounds__(                                                                         \
            gemm::Tile<C, MI, BN, STAGES, CM, CN, CK, TURNS, gemm::EPI>::THREADS, 1)               \
            NAME(const __grid_constant__ ptx::TensorMap w,                                         \
                 const __grid_constant__ ptx::TensorMap x,                                         \
                 const __grid_constant__ ptx::TensorMap out,                                       \
                 const __grid_constant__ gemm::GemmParams p) {                                     \
        gemm::run<gemm::Tile<C, MI, BN, STAGES, CM, CN, CK, TURNS, gemm::EPI>>(w, x, out, p);      \
    }
