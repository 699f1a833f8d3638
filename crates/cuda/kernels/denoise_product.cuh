// One product out = epilogue(norm(x) * W^T) for up to 16 rows: a CTA owns MT tiles of 16 outputs
// and a slice of KC inputs, whose weights are in flight before the kernel's dependency is met.
#pragma once

#include "denoise_epilogue.cuh"

namespace denoise {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;    // that compute; one more warp loads the weights
constexpr int kBlock = kThreads + 32;
constexpr u32 kBox = 8192;   // bytes of one bulk copy

__device__ __forceinline__ float4 add(float4 a, float4 b) {
  return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

template <Epilogue E, int MT, int KC, int CL>
struct Product {
  static constexpr int kSlice = KC / kWarps;  // inputs of a warp
  static constexpr int kBlocks = kSlice / 32;
  static constexpr int NT = 2;                        // groups of 8 rows
  static constexpr int kHeld = MT == 1 ? kBlocks : 1;  // blocks of A in registers
  static constexpr int kTokens = NT * 8;
  static constexpr int kItems = MT * NT * 32;  // float4 of the CTA's output tile
  static constexpr int kRounds = (kItems + kThreads - 1) / kThreads;
  static constexpr int kMail = kItems / CL;  // the items one CTA finishes
  static constexpr u32 kMailBytes = CL * kMail * 16;
  static constexpr u32 kTileBytes = KC * 32;
  static constexpr u32 kWeightBytes = MT * kTileBytes;
  static constexpr u32 kBoxes = kWeightBytes / kBox;
  static constexpr u32 kSliceBytes = kSlice * 32;
  static constexpr bool kHasNorm = Finish<E>::kHasNorm;
  static_assert(CL == 1 || CL == 2 || CL == 4, "tokens are shared out by pairs");
  static_assert(kBlocks >= 1 && NT * 512 <= kSliceBytes, "partial sums reuse the weights");

  struct Fixed {
    float4 mail[CL > 1 ? CL * kMail : 1];  // partial sums from the cluster
    float inverse_rms[kTokens];
    u64 boxes[kBoxes];    // the copies of weights
    u64 mail_arrived;
  };

  const DenoiseProductParams& p;
  unsigned char* weights;
  Fixed& fixed;
  Finish<E> finish;
  u32 tid, warp, lane, rank, tile0;
  bool real[NT];           // whether this lane has a row, not padding
  const u16* x[NT];        // this lane's part of the input rows
  u32 sums_from[NT];       // and of their sums of squares

  __device__ __forceinline__ u32 tile_of(u32 item) const { return tile0 + item / (NT * 32); }

  // The first of the item's two tokens.
  __device__ __forceinline__ static u32 token_of(u32 item) {
    return (item / 32 % NT) * 8 + (item & 3) * 2;
  }

  // The CTA that finishes an item: a cluster of up to 4 shares the items out by token.
  __device__ __forceinline__ static u32 owner(u32 item) { return (item & 3) * CL / 4; }

  // Its place among the items of its owner.
  __device__ __forceinline__ static u32 mail_slot(u32 item) {
    return (item >> 2) * (4 / CL) + item % (4 / CL);
  }

  __device__ __forceinline__ void init_barriers() {
    for (u32 i = 0; i < kBoxes; ++i) mbarrier_init(shared_address(&fixed.boxes[i]), 1);
    if (CL > 1) {
      mbarrier_init(shared_address(&fixed.mail_arrived), 1);
    }
    mbarrier_init_fence();
    if (CL > 1) {
      mbarrier_expect(shared_address(&fixed.mail_arrived), kMailBytes);
    }
  }

  __device__ __forceinline__ void start_box(u32 i, u64 policy) {
    constexpr u32 kPerTile = kTileBytes / kBox;
    const u64 box = (static_cast<u64>(tile0 + i / kPerTile) * CL + rank) * kPerTile + i % kPerTile;
    const u32 bar = shared_address(&fixed.boxes[i]);
    mbarrier_expect(bar, kBox);
    bulk_load(shared_address(weights) + i * kBox,
              reinterpret_cast<const char*>(p.weight) + box * kBox, kBox, bar, policy);
  }

  // One thread of the last warp: at most `depth` copies are under way, so that what the other
  // kernels exchange does not queue behind weights that nobody waits for yet.
  __device__ __forceinline__ void load_weights() {
    const u64 policy = evict_first_policy();
    const u32 depth = min(p.depth, kBoxes);
    for (u32 i = 0; i < depth; ++i) start_box(i, policy);
    launch_dependents();
    for (u32 i = 0; i < kBoxes; ++i) {
      mbarrier_wait(shared_address(&fixed.boxes[i]), 0);
      if (i + depth < kBoxes) start_box(i + depth, policy);
    }
  }

  // Everything that does not hang on the dependency.
  __device__ __forceinline__ void prepare(Extra (&extra)[kRounds]) {
    const u32 column = rank * KC + warp * kSlice + (lane & 3) * 8;
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      real[n] = n * 8 + (lane >> 2) < p.rows;
      const u32 token = min(n * 8 + (lane >> 2), p.rows - 1);
      x[n] = p.input + element_of(p.input_rows, token, column);
    }
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      const u32 item = tid + i * kThreads;
      if (item >= kItems) continue;
      const bool ours = CL == 1 || owner(item) == rank;
      finish.prepare(extra[i], tile_of(item), token_of(item), ours);
    }
    if (kHasNorm) {
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        const u32 token = min(n * 8 + warp, p.rows - 1);
        sums_from[n] = row_index(p.input_rows, token) * kSums + lane * 2;
      }
    }
  }

  // The residual stream under the outputs, once the dependency is met.
  __device__ __forceinline__ void load_old(Extra (&extra)[kRounds]) const {
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      if (kItems % kThreads != 0 && tid + i * kThreads >= kItems) continue;
      finish.load_old(extra[i]);
    }
  }

  // Row statistics from the partial sums of squares the row's writers left: two rows at a time.
  __device__ __forceinline__ void finish_sums(const float2 (&sums)[NT]) const {
    const float a = sums[0].x + sums[0].y, b = sums[1].x + sums[1].y;
    const bool upper = lane & 16;
    float s = (upper ? b : a) + __shfl_xor_sync(~0u, upper ? a : b, 16);
#pragma unroll
    for (int d = 8; d > 0; d /= 2) s += __shfl_xor_sync(~0u, s, d);
    if ((lane & 15) == 0) {
      fixed.inverse_rms[(lane >> 4) * 8 + warp] = rsqrtf(s * (1.0f / (KC * CL)) + 1e-6f);
    }
  }

  // The inputs of this lane's rows. That every CTA fetches the rows is what takes
  // longest once the dependency is met: they go through L1, where the CTAs of a multiprocessor
  // share them, without their padding, and a cache line to a quarter of the warp (DenoiseRows).
  // STEP is a constant so that no addresses are computed here.
  template <int STEP>
  __device__ __forceinline__ void load_x(uint4 (&b)[kBlocks][NT]) const {
#pragma unroll
    for (int k = 0; k < kBlocks; ++k) {
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        b[k][n] = real[n] ? load_global(x[n] + k * STEP) : make_uint4(0, 0, 0, 0);
      }
    }
  }

  // This warp's share of the sums for all rows.
  __device__ __forceinline__ void accumulate(float4 (&sum)[MT][NT], Extra (&extra)[kRounds]) {
    uint4 b[kBlocks][NT];
    if (p.input_rows.step == 32) {
      load_x<32>(b);
    } else {
      load_x<512>(b);
    }
    float2 sums[NT];
    if (kHasNorm) {
#pragma unroll
      for (int n = 0; n < NT; ++n) sums[n] = load_global_pair(p.input_sums + sums_from[n]);
    }
    if (E == Epilogue::Add) load_old(extra);
    compute_sync<kBlock>(2);  // the loader has seen all weights
    const u32 w = shared_address(weights) + warp * kSliceBytes + (lane ^ (lane >> 3 & 1)) * 16;
    uint4 held[kHeld][MT][2];
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        held[k][m][0] = load_shared(w + m * kTileBytes + k * 1024);
        held[k][m][1] = load_shared((w ^ 32) + m * kTileBytes + k * 1024 + 512);
      }
    }
#pragma unroll
    for (int k = 0; k < kBlocks; ++k) {
#pragma unroll
      for (int m = 0; m < MT; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const u32 from = (half ? w ^ 32 : w) + m * kTileBytes + k * 1024 + half * 512;
          const uint4 a = k < kHeld ? held[k < kHeld ? k : 0][m][half] : load_shared(from);
#pragma unroll
          for (int n = 0; n < NT; ++n) {
            mma(sum[m][n], a, half ? b[k][n].z : b[k][n].x, half ? b[k][n].w : b[k][n].y);
          }
        }
      }
    }
    if (kHasNorm) finish_sums(sums);
  }

  // Partial sums of a warp lie in its own slice of the weights, which are not needed again.
  __device__ __forceinline__ float4* partial(u32 m, u32 w) const {
    return reinterpret_cast<float4*>(weights + m * kTileBytes + w * kSliceBytes);
  }

  __device__ __forceinline__ void reduce(const float4 (&sum)[MT][NT],
                                         const Extra (&extra)[kRounds]) {
    __syncwarp();
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
      for (int n = 0; n < NT; ++n) partial(m, warp)[n * 32 + lane] = sum[m][n];
    }
    compute_sync<kThreads>(1);
    float4 total[kRounds];
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      const u32 item = tid + i * kThreads;
      if (item >= kItems) continue;
      float4 v[kWarps];
#pragma unroll
      for (int w = 0; w < kWarps; ++w) v[w] = partial(item / (NT * 32), w)[item % (NT * 32)];
      const float4 t = add(add(add(v[0], v[1]), add(v[2], v[3])),
                           add(add(v[4], v[5]), add(v[6], v[7])));
      if (CL > 1) {
        const u32 slot = shared_address(&fixed.mail[rank * kMail + mail_slot(item)]);
        const u32 bar = shared_address(&fixed.mail_arrived);
        peer_store(peer_address(slot, owner(item)), t, peer_address(bar, owner(item)));
      }
      total[i] = t;
    }
    if (CL > 1 && warp * 32 < kItems) {
      mbarrier_wait(shared_address(&fixed.mail_arrived), 0);
      __syncwarp();
    }
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      const u32 item = tid + i * kThreads;
      if (item >= kItems) continue;
      if (CL > 1) {
        const u32 mine = owner(item) == rank ? mail_slot(item) : 0;
        total[i] = fixed.mail[mine];
#pragma unroll
        for (int c = 1; c < CL; ++c) {
          total[i] = add(total[i], fixed.mail[c * kMail + mine]);
        }
      }
      finish.store(total[i], extra[i], tile_of(item), &fixed.inverse_rms[token_of(item)]);
    }
  }

  __device__ __forceinline__ void run() {
    if (warp == kWarps) {
      if (lane == 0) init_barriers();
      __syncwarp();
    }
    if (CL > 1) cluster_arrive();
    if (warp == kWarps) {
      if (lane == 0) load_weights();
      __syncwarp();
      if (CL > 1) cluster_wait();
      compute_sync<kBlock>(2);
      return;
    }
    Extra extra[kRounds];
    prepare(extra);
    if (CL > 1) cluster_wait();
    dependency_wait();
    float4 sum[MT][NT] = {};
    accumulate(sum, extra);
    reduce(sum, extra);
  }
};

template <Epilogue E, int MT, int KC, int CL>
__device__ __forceinline__ void run_product(const DenoiseProductParams& p) {
  using Body = Product<E, MT, KC, CL>;
  extern __shared__ __align__(128) unsigned char dynamic[];
  __shared__ __align__(16) typename Body::Fixed fixed;
  const u32 rank = CL > 1 ? cluster_rank() : 0;
  const Finish<E> finish{p, threadIdx.x % 32, gridDim.x / CL * MT};
  Body body{p, dynamic, fixed, finish, threadIdx.x, threadIdx.x / 32, threadIdx.x % 32, rank,
            blockIdx.x / CL * MT};
  body.run();
}

}  // namespace denoise
