// One product out = epilogue(norm(x) * W^T) for few rows: a CTA owns MT tiles of 16 outputs and
// a slice of KC inputs, whose weights are in flight before the kernel's dependency is met.
#pragma once

#include "denoise_params.cuh"

namespace denoise {

enum class Epilogue { Qkv, GeGlu, Add, Store };

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;    // that compute; one more warp loads the weights
constexpr int kBlock = kThreads + 32;
constexpr u32 kBox = 8192;   // bytes of one bulk copy
constexpr u32 kSums = 64;    // partial sums of squares of a stream row: one per 16 features

__device__ __forceinline__ u32 row_index(const DenoiseRows& rows, u32 i) {
  const u32 sample = i < rows.count ? 0 : i / rows.count;
  return sample * rows.stride + rows.first + i - sample * rows.count;
}

__device__ __forceinline__ u64 row_offset(const DenoiseRows& rows, u32 i) {
  return static_cast<u64>(row_index(rows, i)) * rows.width;
}

// gelu_tanh(x) = x * sigmoid(2 * sqrt(2/pi) * (x + 0.044715 x^3))
__device__ __forceinline__ float gelu(float x) {
  const float u = 1.5957691216057308f * (x + 0.044715f * x * x * x);
  return __fdividef(x, 1.0f + __expf(-u));
}

// Eight lanes (those of equal lane % 4) hold one feature each of tokens t and t + 1, packed:
// gathers 8 consecutive features. Lanes 0-3 get token t, lanes 4-7 token t + 1.
__device__ __forceinline__ uint4 gather_features(u32 own, u32 lane) {
  const u32 other = __shfl_xor_sync(~0u, own, 4);
  const u32 two = lane & 4 ? __byte_perm(other, own, 0x7632) : __byte_perm(own, other, 0x5410);
  const u32 next = __shfl_xor_sync(~0u, two, 8);
  const u32 a = __shfl_xor_sync(~0u, two, 16);
  const u32 b = __shfl_xor_sync(~0u, next, 16);
  return make_uint4(two, next, a, b);
}

__device__ __forceinline__ float4 add(float4 a, float4 b) {
  return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

// What an output item needs besides its sum: fetched before the sum is there.
struct Extra {
  float first, second;  // bias (Qkv, GeGlu, Store) or gate (Add) of rows r and r + 8 of the tile
  float next_first, next_second;  // Add, Store: the scale of the norm that follows, same rows
  float2 turn0, turn1;  // Qkv: cos, sin of tokens t and t + 1
  u16 old[4];           // Add: stream values (row r: t, t + 1; row r + 8: t, t + 1)
  const u16* old_from[2];  // Add: where they are, tokens t and t + 1, row r
  u16* to;              // features of token t (lanes 0-3) or t + 1 (lanes 4-7); null: not ours
  float* sum_to;        // Add, Store: where the sum of squares goes
};

template <Epilogue E, int MT, int KC, int CL, int NT>
struct Product {
  static constexpr int kSlice = KC / kWarps;  // inputs of a warp
  static constexpr int kBlocks = kSlice / 32;
  // Blocks of x under way: as many as the registers of a CTA alone, or of one beside another, hold
  // together with the sums.
  static constexpr int kRoom = (NT <= 2 || NT > 4 ? 140 : 64) - MT * NT * 4;
  static constexpr int kAhead =
      kRoom >= kBlocks * NT * 4 ? kBlocks : kRoom >= 2 * NT * 4 ? 2 : 1;
  static constexpr int kHeld = MT == 1 && NT <= 2 ? kBlocks : 1;  // blocks of A in registers
  static constexpr int kTokens = NT * 8;
  static constexpr int kItems = MT * NT * 32;  // float4 of the CTA's output tile
  static constexpr int kRounds = (kItems + kThreads - 1) / kThreads;
  static constexpr int kMail = kItems / CL;  // the items one CTA finishes
  static constexpr u32 kMailBytes = CL * kMail * 16;
  static constexpr u32 kTileBytes = KC * 32;
  static constexpr u32 kWeightBytes = MT * kTileBytes;
  static constexpr u32 kBoxes = kWeightBytes / kBox;
  static constexpr u32 kSliceBytes = kSlice * 32;
  static constexpr bool kHasNorm = E == Epilogue::Qkv || E == Epilogue::GeGlu;
  static constexpr bool kToStream = !kHasNorm;
  static constexpr bool kFew = NT <= 2;
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
  u32 tid, warp, lane, rank, tile0;
  bool real[NT];           // whether this lane has a row, not padding
  const u16* x[NT];        // this lane's part of the input rows
  u32 sums_from[NT];       // and of their sums of squares

  // The first feature of rows 0-7 and of rows 8-15 of a tile. q and k keep the order in which the
  // host packs a head, rotary partners 8 apart: q * k does not care, and prefill does the same.
  __device__ __forceinline__ uint2 features(u32 tile) const {
    if (E == Epilogue::GeGlu) return make_uint2(tile * 8, gridDim.x / CL * MT * 8 + tile * 8);
    return make_uint2(tile * 16, tile * 16 + 8);
  }

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
    const char* from = reinterpret_cast<const char*>(p.weight) +
                       (static_cast<u64>(tile0 + i / kPerTile) * CL + rank) * kTileBytes;
    const u32 bar = shared_address(&fixed.boxes[i]);
    mbarrier_expect(bar, kBox);
    bulk_load(shared_address(weights) + i * kBox, from + i % kPerTile * kBox, kBox, bar, policy);
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

  __device__ __forceinline__ float2 turn_of(u32 token, u32 j) const {
    token = min(token, p.rows - 1);
    const u32 count = p.input_rows.count;
    const u32 sample = token < count ? 0 : token / count;
    const uint2 length = __ldg(reinterpret_cast<const uint2*>(p.lengths) + sample);
    const u32 position = length.x * p.image_tokens + length.y + p.first_position + token -
                         sample * count;
    return __ldg(p.rope + position * 128 + j);
  }

  // Everything that does not hang on the dependency.
  __device__ __forceinline__ void prepare(Extra (&extra)[kRounds]) {
    const u32 column = rank * KC + warp * kSlice + (lane & 3) * 8;
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      real[n] = n * 8 + (lane >> 2) < p.rows;
      const u32 token = min(n * 8 + (lane >> 2), p.rows - 1);
      x[n] = p.input + row_offset(p.input_rows, token) + column;
    }
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      const u32 item = tid + i * kThreads;
      if (item >= kItems) continue;
      Extra& e = extra[i];
      const u32 r = lane >> 2, token = token_of(item);
      const uint2 f = features(tile_of(item));
      const float* per_output = E == Epilogue::Add ? p.gate : p.bias;
      const float neutral = E == Epilogue::Add ? 1.0f : 0.0f;
      e.first = per_output ? __ldg(per_output + f.x + r) : neutral;
      e.second = per_output ? __ldg(per_output + f.y + r) : neutral;
      if (kToStream && p.scaled) {
        e.next_first = __ldg(p.next_scale + f.x + r);
        e.next_second = __ldg(p.next_scale + f.y + r);
      }
      if (E == Epilogue::Qkv && tile_of(item) < 144) {
        e.turn0 = turn_of(token, tile_of(item) % 16 * 8 + r);
        e.turn1 = turn_of(token + 1, tile_of(item) % 16 * 8 + r);
      }
      const u32 mine = token + (r & 1);
      e.to = nullptr;
      if (lane < 8 && mine < p.rows && (CL == 1 || owner(item) == rank)) {
        const bool q = E != Epilogue::Qkv || tile_of(item) < 128;
        const DenoiseRows& rows = q ? p.out_rows : p.cache_rows;
        u16* base = q ? p.out : tile_of(item) < 144 ? p.k : p.v;
        const u32 row = row_index(rows, mine);
        e.to = base + static_cast<u64>(row) * rows.width + (q ? f.x : f.x % 256);
        e.sum_to = p.out_sums + row * kSums + tile_of(item);
      }
      if (E == Epilogue::Add) {
        e.old_from[0] = p.old + row_offset(p.out_rows, min(token, p.rows - 1)) + f.x + r;
        e.old_from[1] = p.old + row_offset(p.out_rows, min(token + 1, p.rows - 1)) + f.x + r;
      }
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
      Extra& e = extra[i];
      e.old[0] = load_l2_half(e.old_from[0]);
      e.old[1] = load_l2_half(e.old_from[1]);
      e.old[2] = load_l2_half(e.old_from[0] + 8);
      e.old[3] = load_l2_half(e.old_from[1] + 8);
    }
  }

  // Row statistics from the partial sums of squares the row's writers left: two rows at a time.
  __device__ __forceinline__ void finish_sums(const float2 (&sums)[NT]) const {
#pragma unroll
    for (int n = 0; n < NT; n += 2) {
      const float a = sums[n].x + sums[n].y;
      const float b = n + 1 < NT ? sums[n + 1 < NT ? n + 1 : n].x + sums[n + 1 < NT ? n + 1 : n].y
                                 : 0.0f;
      const bool upper = lane & 16;
      float s = (upper ? b : a) + __shfl_xor_sync(~0u, upper ? a : b, 16);
#pragma unroll
      for (int d = 8; d > 0; d /= 2) s += __shfl_xor_sync(~0u, s, d);
      if ((lane & 15) == 0 && (n + 1 < NT || lane == 0)) {
        fixed.inverse_rms[(n + (lane >> 4)) * 8 + warp] =
            rsqrtf(s * (1.0f / (KC * CL)) + 1e-6f);
      }
    }
  }

  // Inputs of block k of this lane's row of group n. That every CTA fetches the rows is what takes
  // longest once the dependency is met. So few rows go through L1, where the CTAs of a
  // multiprocessor share them, and without their padding; many would push each other out of it.
  __device__ __forceinline__ uint4 load_x(int n, int k) const {
    if (!kFew) return load_l2(x[n] + k * 32);
    return real[n] ? load_global(x[n] + k * 32) : make_uint4(0, 0, 0, 0);
  }

  __device__ __forceinline__ float2 load_sums(int n) const {
    const float* from = p.input_sums + sums_from[n];
    return kFew ? load_global_pair(from) : load_l2_pair(from);
  }

  // This warp's share of the sums for all rows.
  __device__ __forceinline__ void accumulate(float4 (&sum)[MT][NT], Extra (&extra)[kRounds]) {
    uint4 b[kAhead][NT];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
#pragma unroll
      for (int n = 0; n < NT; ++n) b[a][n] = load_x(n, a);
    }
    float2 sums[NT];
    if (kHasNorm) {
#pragma unroll
      for (int n = 0; n < NT; ++n) sums[n] = load_sums(n);
    }
    if (E == Epilogue::Add) load_old(extra);
    compute_sync<kBlock>(2);  // the loader has seen all weights
    const u32 w = shared_address(weights) + warp * kSliceBytes + lane * 16;
    uint4 held[kHeld][MT][2];
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        held[k][m][0] = load_shared(w + m * kTileBytes + k * 1024);
        held[k][m][1] = load_shared(w + m * kTileBytes + k * 1024 + 512);
      }
    }
#pragma unroll
    for (int k = 0; k < kBlocks; ++k) {
      uint4 now[NT];
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        now[n] = b[k % kAhead][n];
        if (k + kAhead < kBlocks) b[k % kAhead][n] = load_x(n, k + kAhead);
      }
#pragma unroll
      for (int m = 0; m < MT; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint4 a = k < kHeld ? held[k < kHeld ? k : 0][m][half]
                                    : load_shared(w + m * kTileBytes + k * 1024 + half * 512);
#pragma unroll
          for (int n = 0; n < NT; ++n) {
            mma(sum[m][n], a, half ? now[n].z : now[n].x, half ? now[n].w : now[n].y);
          }
        }
      }
    }
    if (kHasNorm) finish_sums(sums);
  }

  // Stores 8 features of tokens t (lanes 0-3) and t + 1 (lanes 4-7).
  __device__ __forceinline__ void store(u16* to, u32 f, u32 pair) const {
    const uint4 packed = gather_features(pair, lane);
    if (to) store_unit(to + f, packed);
  }

  // Sum of squares of the 16 features just stored, for the norm of the next product.
  __device__ __forceinline__ void store_sum(const Extra& e, u32 low, u32 high) const {
    const float s0 = bf16_low(low) * bf16_low(low) + bf16_low(high) * bf16_low(high);
    const float s1 = bf16_high(low) * bf16_high(low) + bf16_high(high) * bf16_high(high);
    const bool odd = lane & 4;
    float s = (odd ? s1 : s0) + __shfl_xor_sync(~0u, odd ? s0 : s1, 4);
    s += __shfl_xor_sync(~0u, s, 8);
    s += __shfl_xor_sync(~0u, s, 16);
    if (e.to) *e.sum_to = s;
  }

  // sum = (row r: tokens t, t + 1; row r + 8: tokens t, t + 1) of a tile, complete.
  __device__ __forceinline__ void finish(float4 sum, const Extra& e, u32 item) const {
    const u32 tile = tile_of(item);
    if (kHasNorm) {
      const float2 r = *reinterpret_cast<const float2*>(&fixed.inverse_rms[token_of(item)]);
      sum = make_float4(fmaf(sum.x, r.x, e.first), fmaf(sum.y, r.y, e.first),
                        fmaf(sum.z, r.x, e.second), fmaf(sum.w, r.y, e.second));
    }
    if (E == Epilogue::GeGlu) {
      store(e.to, 0, bf16_pair(gelu(sum.x) * sum.z, gelu(sum.y) * sum.w));
    } else if (E == Epilogue::Qkv) {
      if (tile < 144) {
        sum = make_float4(sum.x * e.turn0.x - sum.z * e.turn0.y,
                          sum.y * e.turn1.x - sum.w * e.turn1.y,
                          sum.z * e.turn0.x + sum.x * e.turn0.y,
                          sum.w * e.turn1.x + sum.y * e.turn1.y);
      }
      store(e.to, 0, bf16_pair(sum.x, sum.y));
      store(e.to, 8, bf16_pair(sum.z, sum.w));
    } else {
      if (E == Epilogue::Add) {
        sum = make_float4(fmaf(sum.x, e.first, bf16_value(e.old[0])),
                          fmaf(sum.y, e.first, bf16_value(e.old[1])),
                          fmaf(sum.z, e.second, bf16_value(e.old[2])),
                          fmaf(sum.w, e.second, bf16_value(e.old[3])));
      } else {
        sum = make_float4(sum.x + e.first, sum.y + e.first, sum.z + e.second, sum.w + e.second);
      }
      const u32 low = bf16_pair(sum.x, sum.y), high = bf16_pair(sum.z, sum.w);
      store(e.to, 0, low);
      store(e.to, 8, high);
      if (p.scaled) {
        u16* to = e.to ? p.scaled + (e.to - p.out) : nullptr;
        store(to, 0, bf16_pair(bf16_low(low) * e.next_first, bf16_high(low) * e.next_first));
        store(to, 8, bf16_pair(bf16_low(high) * e.next_second, bf16_high(high) * e.next_second));
      }
      store_sum(e, low, high);
    }
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
      finish(total[i], extra[i], item);
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

template <Epilogue E, int MT, int KC, int CL, int NT>
__device__ __forceinline__ void run_product(const DenoiseProductParams& p) {
  using Body = Product<E, MT, KC, CL, NT>;
  extern __shared__ __align__(128) unsigned char dynamic[];
  __shared__ __align__(16) typename Body::Fixed fixed;
  const u32 rank = CL > 1 ? cluster_rank() : 0;
  Body body{p,          dynamic, fixed, threadIdx.x, threadIdx.x / 32, threadIdx.x % 32, rank,
            blockIdx.x / CL * MT};
  body.run();
}

}  // namespace denoise
