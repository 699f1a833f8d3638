// One product out = epilogue(norm(x) * W^T) for 17 to some 200 rows: a CTA owns 64 outputs and a
// slice of K; one warpgroup multiplies by wgmma, the weights' fragments in registers, the rows
// (wgmma's n side) in shared memory.
#pragma once

#include "denoise_epilogue.cuh"
#include "wgmma.cuh"

namespace denoise {

// E: epilogue; K: inputs of the product; CL: CTAs that share them; NT: 8-row groups; STAGES: of the
// ring, each 128 inputs of the weights and of the rows.
template <Epilogue E, int K, int CL, int NT, int STAGES>
struct Wide {
  static constexpr int kPart = 128;  // inputs of a stage
  static constexpr int kParts = K / CL / kPart;
  static constexpr int kStages = STAGES < kParts ? STAGES : kParts;
  static constexpr int kThreads = 128;        // that multiply
  static constexpr int kBlock = kThreads + 128;  // a warp that loads, three for the norm
  static constexpr int kTokens = NT * 8;
  static constexpr u32 kBoxBytes = kTokens * 128;   // 64 inputs of all rows
  static constexpr u32 kTileBytes = kPart * 32;     // a stage's weights of 16 outputs
  static constexpr u32 kStageBytes = 2 * kBoxBytes + 4 * kTileBytes;
  // The items that one CTA of a cluster finishes: some pairs of every eight rows, some of the four
  // tiles, all groups of rows. A warp takes four of them at a time.
  static constexpr int kPairs = CL < 4 ? 4 / CL : 1;
  static constexpr int kTiles = 16 / CL / kPairs;
  static constexpr int kUnits = kTiles * NT * kPairs;
  static constexpr int kRounds = CL == 1 ? NT : (kUnits + 15) / 16;
  static constexpr u32 kMailBytes = CL > 1 ? CL * kUnits * 128 : 0;
  static constexpr u32 kSmem = kStages * kStageBytes + kMailBytes + 1024;  // for its alignment
  static constexpr bool kHasNorm = Finish<E>::kHasNorm;
  // Whether the registers hold what the items need beside the sums.
  static constexpr bool kEarly = kRounds <= (CL == 1 ? 7 : 2);
  static_assert(kParts * CL * kPart == K, "whole parts");
  static_assert(kBoxBytes % 1024 == 0, "the swizzle repeats every 1024 bytes");
  static_assert(CL == 1 || CL == 2 || CL == 4 || CL == 8, "items are shared out evenly");

  struct Fixed {
    float inverse_rms[kTokens];
    u64 full[kStages], empty[kStages];
    u64 mail_arrived;
  };

  struct Items {
    Extra extra[kRounds];
    u32 unit[kRounds], tile[kRounds], token[kRounds];
  };

  const DenoiseProductParams& p;
  const ptx::TensorMap& x;
  Fixed& fixed;
  Finish<E> finish;
  u32 ring, mail;  // shared memory
  u32 warp, lane, rank, tile0;

  __device__ __forceinline__ static u32 bar(const u64& b) { return shared_address(&b); }

  __device__ __forceinline__ void init_barriers() {
    for (int s = 0; s < kStages; ++s) {
      mbarrier_init(bar(fixed.full[s]), 1);
      mbarrier_init(bar(fixed.empty[s]), 4);
    }
    if (CL > 1) mbarrier_init(bar(fixed.mail_arrived), 1);
    mbarrier_init_fence();
    if (CL > 1) mbarrier_expect(bar(fixed.mail_arrived), kMailBytes);
  }

  __device__ __forceinline__ void load_weights(u32 part, u64 policy) {
    const u32 s = part % kStages, to = ring + s * kStageBytes + 2 * kBoxBytes;
    mbarrier_expect(bar(fixed.full[s]), 4 * kTileBytes + 2 * 128 * p.rows);
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      const u64 from = static_cast<u64>(tile0 + t) * (K / kPart) + rank * kParts + part;
      bulk_load(to + t * kTileBytes, reinterpret_cast<const char*>(p.weight) + from * kTileBytes,
                kTileBytes, bar(fixed.full[s]), policy);
    }
  }

  __device__ __forceinline__ void load_rows(u32 part) {
    const u32 s = part % kStages, to = ring + s * kStageBytes;
    const u32 column = (rank * kParts + part) * kPart;
    ptx::tma_load_3d(to, &x, column, 0, 0, bar(fixed.full[s]));
    ptx::tma_load_3d(to + kBoxBytes, &x, column + 64, 0, 0, bar(fixed.full[s]));
  }

  // One thread: the weights of the first stages before the dependency is met.
  __device__ __forceinline__ void load() {
    const u64 policy = evict_first_policy();
    for (u32 i = 0; i < kStages; ++i) load_weights(i, policy);
    launch_dependents();
    dependency_wait();
    for (u32 i = 0; i < kStages; ++i) load_rows(i);
    for (u32 i = kStages; i < kParts; ++i) {
      mbarrier_wait(bar(fixed.empty[i % kStages]), (i / kStages - 1) & 1);
      load_weights(i, policy);
      load_rows(i);
    }
  }

  // Three warps: row statistics from the partial sums of squares that the row's writers left.
  __device__ __forceinline__ void finish_sums(u32 first) const {
    constexpr int kAtOnce = 8;
    for (u32 row = first; row < p.rows; row += 3 * kAtOnce) {
      float2 v[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const u32 at = row_index(p.input_rows, min(row + 3 * i, p.rows - 1));
        v[i] = load_global_pair(p.input_sums + at * kSums + lane * 2);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        float s = v[i].x + v[i].y;
#pragma unroll
        for (int d = 16; d > 0; d /= 2) s += __shfl_xor_sync(~0u, s, d);
        if (lane == 0 && row + 3 * i < p.rows) {
          fixed.inverse_rms[row + 3 * i] = rsqrtf(s * (1.0f / K) + 1e-6f);
        }
      }
    }
  }

  // Sums of 64 outputs and all rows over this CTA's part of K.
  __device__ __forceinline__ void multiply(float (&sum)[4 * NT]) const {
    // A fragment's lane t wants words t and t + 4 of eight consecutive inputs of rows r and r + 8,
    // which lie as the first or second half of units 2 j and 2 j + 1 (see denoise_load.cu).
    const u32 r = lane >> 2, t = lane & 3, swizzle = (r >> 1 & 1) + (t & 2);
    const u32 weights = ring + 2 * kBoxBytes + warp * kTileBytes + (t >> 1) * 512 + r * 64 +
                        (t & 1) * 8;
    const u32 unit[4] = {weights + (0 ^ swizzle) * 16, weights + (1 ^ swizzle) * 16,
                         weights + (2 ^ swizzle) * 16, weights + (3 ^ swizzle) * 16};
    for (u32 i = 0; i < kParts; ++i) {
      const u32 s = i % kStages, at = s * kStageBytes;
      mbarrier_wait(bar(fixed.full[s]), (i / kStages) & 1);
      uint4 a[8];
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        const uint2 low = load_shared_pair(unit[k % 2 * 2] + at + k / 2 * 1024);
        const uint2 high = load_shared_pair(unit[k % 2 * 2 + 1] + at + k / 2 * 1024);
        a[k] = make_uint4(low.x, low.y, high.x, high.y);
      }
      const u64 rows = ptx::wgmma_descriptor(ring + at);
      ptx::wgmma_fence();
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        const u64 b = rows + (k / 4) * (kBoxBytes / 16) + k % 4 * 2;
        ptx::WgmmaRegisters<8 * NT>::run(sum, a[k], b, i + k > 0);
      }
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
      if (i + kStages < kParts && lane == 0) ptx::mbar_arrive(bar(fixed.empty[s]));
    }
  }

  // Who finishes an item of a tile, a group and a pair of rows, and where it comes among theirs.
  __device__ __forceinline__ static u32 owner_of(u32 tile, u32 pair) {
    return pair / kPairs + (4 / kPairs) * (tile / kTiles);
  }
  __device__ __forceinline__ static u32 unit_of(u32 tile, u32 group, u32 pair) {
    return (tile % kTiles * NT + group) * kPairs + pair % kPairs;
  }

  // The items this lane finishes.
  __device__ __forceinline__ void prepare(Items& items) const {
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      u32 tile = warp, group = i, pair = lane & 3;
      bool ours = true;
      if (CL > 1) {
        const u32 at = i * 16 + warp * 4 + (lane & 3), unit = min(at, kUnits - 1);
        tile = unit / kPairs / NT + rank / (4 / kPairs) * kTiles;
        group = unit / kPairs % NT;
        pair = unit % kPairs + rank % (4 / kPairs) * kPairs;
        ours = at < kUnits;
        items.unit[i] = unit;
      }
      items.tile[i] = tile0 + tile;
      items.token[i] = group * 8 + pair * 2;
      finish.prepare(items.extra[i], items.tile[i], items.token[i], ours);
    }
  }

  __device__ __forceinline__ void load_old(Items& items) const {
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      if (E == Epilogue::Add) finish.load_old(items.extra[i]);
    }
  }

  __device__ __forceinline__ void send(const float (&sum)[4 * NT]) const {
    const u32 r = lane >> 2, pair = lane & 3, to = owner_of(warp, pair);
    const u32 arrived = peer_address(bar(fixed.mail_arrived), to);
    const u32 slot = peer_address(mail + rank * kUnits * 128 + r * 16, to);
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const float4 v = make_float4(sum[4 * n], sum[4 * n + 1], sum[4 * n + 2], sum[4 * n + 3]);
      peer_store(slot + unit_of(warp, n, pair) * 128, v, arrived);
    }
  }

  // By rank, whoever came first.
  __device__ __forceinline__ float4 received(u32 unit) const {
    float4 t = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
    for (int c = 0; c < CL; ++c) {
      const uint4 v = load_shared(mail + (c * kUnits + unit) * 128 + (lane >> 2) * 16);
      t = make_float4(t.x + __uint_as_float(v.x), t.y + __uint_as_float(v.y),
                      t.z + __uint_as_float(v.z), t.w + __uint_as_float(v.w));
    }
    return t;
  }

  __device__ __forceinline__ void compute() {
    Items items;
    if (kEarly) prepare(items);
    if (E == Epilogue::Add) dependency_wait();
    if (kEarly) load_old(items);
    float sum[4 * NT];
    multiply(sum);
    if (CL > 1) send(sum);
    if (!kEarly) {
      prepare(items);
      load_old(items);
    }
    if (CL > 1) mbarrier_wait(bar(fixed.mail_arrived), 0);
    if (kHasNorm) compute_sync<kBlock>(1);
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      const float4 total = CL > 1 ? received(items.unit[i])
                                  : make_float4(sum[4 * i], sum[4 * i + 1], sum[4 * i + 2],
                                                sum[4 * i + 3]);
      finish.store(total, items.extra[i], items.tile[i], &fixed.inverse_rms[items.token[i]]);
    }
  }

  __device__ __forceinline__ void run() {
    if (threadIdx.x == kThreads) {
      ptx::prefetch_tensor_map(&x);
      init_barriers();
    }
    if (CL > 1) {
      cluster_arrive();
      cluster_wait();
    } else {
      __syncthreads();
    }
    if (warp < 4) {
      compute();
      return;
    }
    if (warp == 4) {
      if (elect_one()) load();
      __syncwarp();
    } else if (kHasNorm) {
      dependency_wait();
      finish_sums(warp - 5);
    }
    if (kHasNorm) compute_sync<kBlock>(1);
  }
};

template <Epilogue E, int K, int CL, int NT, int STAGES>
__device__ __forceinline__ void run_wide(const DenoiseProductParams& p, const ptx::TensorMap& x) {
  using Body = Wide<E, K, CL, NT, STAGES>;
  extern __shared__ __align__(128) unsigned char dynamic[];
  __shared__ __align__(16) typename Body::Fixed fixed;
  const u32 ring = (shared_address(dynamic) + 1023) & ~1023u;
  const u32 rank = CL > 1 ? cluster_rank() : 0;
  const Finish<E> finish{p, threadIdx.x % 32, gridDim.x / CL * 4};
  Body body{p, x, fixed, finish, ring, ring + Body::kStages * Body::kStageBytes,
            threadIdx.x / 32, threadIdx.x % 32, rank, blockIdx.x / CL * 4};
  body.run();
}

}  // namespace denoise
