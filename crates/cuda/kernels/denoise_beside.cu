// One layer of the first Euler step on four multiprocessors, while the prefill has the others:
// attention, O, gate‖up, down, and the next layer's QKV, for up to 16 rows of one sample.
//
// Layer l of the first step needs of the prefix nothing but the keys and values of layer l, and
// those are there long before the prefill ends. The prefill's products are cut into 128 parts, or
// rounds of 128, so that four of 132 multiprocessors have nothing to do: they take the step.
// | phase     | tiles of 16 outputs | K    | a warp's | bytes   |
// |-----------|---------------------|------|----------|---------|
// | attention | a head a warp       |      |          | 0.8 MB  |
// | o         | 64                  | 2048 | 2        | 4.2 MB  |
// | gate‖up   | 512                 | 1024 | 16       | 16.8 MB |
// | down      | 64                  | 4096 | 2        | 8.4 MB  |
// | next qkv  | 160                 | 1024 | 5        | 5.2 MB  |
// Grid 4, cluster 2, 256 threads, dynamic shared memory 416 · 528 bytes, beside which nothing of
// the prefill fits. Programmatic dependent launch.
//
// How: a warp owns whole tiles, two at a time, and its own ring of weights (bulk copies, four
// stages of 64 inputs, filled in the order of use across tiles and products). The rows of a product
// lie in shared memory, in the blocks of 32 columns of DenoiseRows. Attention: a CTA has a quarter
// of the keys, a warp a head; the parts meet when O's rows are put together. The CTAs wait for each
// other between phases at a counter that is never set back: a launch adds 16 to it. They are two
// clusters of two, because the prefill's clusters are: a single multiprocessor taken from a
// processor group of 16 or 18 would cost the prefill a cluster.
// What is stored, by whom, in which layout: as the kernels of denoise_product.cu do, whose epilogue
// this is. Sums have another order than theirs, a fixed one.
//
// Limit: 35.4 MB at what four multiprocessors draw from memory, about 270 GB/s: 131 µs a layer. The
// prefill's layer takes 257. A skeleton (H100, kernels that spin with the prefill's grids and times
// beside this one's reads) took 3.54 ms with and without the step; with gate‖up on 132
// multiprocessors instead of 128 5.50, with single CTAs instead of clusters 4.47, six CTAs 5.04.
// | version (H200, µs a layer, π0 P = 788, h = 11)              | alone | beside    |
// |--------------------------------------------------------------|-------|-----------|
// | weights to registers, attention two heads a CTA, 147 KB      | 166   | 200 - 297 |
// | attention by quarters of the keys, 219 KB                    | 195   | 270       |
// | weights by bulk copies to a ring, two tiles a warp           | 153   | 224       |
// | fragments a stage ahead of the products                      |       | 219       |
// Loads to registers wait in L1, of which 219 KB of shared memory leave little; the ring does not
// need it. Beside the prefill it is the way into the multiprocessors that is short: a CTA gets 64
// GB/s instead of 82, and the prefill's products that live off the same (O, down, attention, QKV;
// gate‖up, whose weights go to two CTAs at once, does not) take 4 - 10 % longer, down 77.7, not 73.
// That is half of what the step gains: π0 8.91 -> 8.80 ms (predicted 8.65), prefill 4.52 -> 4.67,
// denoise 3.08 -> 2.77. No difference: weights of the prefill first to leave L2, its rows last.
// A layer that is not placed before the prefill's next kernel begins early waits for its end; then
// every later one does, too. So the step begins with the request, the next layer is queued before
// this one ends, and its blocks come before the prefill's.
#include "denoise_epilogue.cuh"

// A layer of the first step. `o`, `gate_up` and `down` are this layer's, `qkv` the next one's.
struct DenoiseBesideParams {
  DenoiseProductParams o, gate_up, down, qkv;
  const denoise::u16* q;      // bf16 [rows][2048] of this layer, scaled and rotated
  const denoise::u16* k;      // bf16 [cache rows][256] of this layer, prefix and suffix
  const denoise::u16* v;      // the same
  denoise::u16* parts;        // f16 [4][16][2048] scratch: the CTAs' parts of the attention
  float* part_stats;          // f32 [4][16][8][2] scratch: their maxima and sums, by token and head
  denoise::u32* arrivals;     // where the CTAs meet; a multiple of 16 between launches
  DenoiseRows q_rows;         // where the rows of `q` lie
  denoise::u32 prefix_rows;   // cache row of the first suffix key
  denoise::u32 suffix_keys;   // suffix keys
  denoise::u32 state_row;     // 1: row 0 sees no suffix key but the first
};
static_assert(sizeof(DenoiseBesideParams) == 4 * 208 + 6 * 8 + 20 + 12, "shared with the host");

namespace denoise {
namespace {

constexpr u32 kCtas = 4, kWarps = 8, kThreads = kWarps * 32;
constexpr u32 kRound = kCtas * kWarps;                   // tiles from a warp's one to its next
constexpr u32 kTokens = 16, kBlockBytes = kTokens * 64;  // 32 columns of all rows
constexpr float kLog2e = 1.4426950408889634f;

// Shared memory has every warp's ring of weights, 64 inputs of two tiles a stage, and behind them
// up to 2048 columns of a product's rows; before that a share of the keys and values.
constexpr u32 kStages = 4, kPieceBytes = 64 * 32, kStageBytes = 2 * kPieceBytes;
constexpr u32 kRows = kWarps * kStages * kStageBytes;
constexpr u32 kShare = 256;       // keys of a CTA, at most
constexpr u32 kKeyPitch = 528;    // bytes of a key or value, free of bank conflicts
constexpr u32 kKeySlots = 416;    // keys and values there is room for
static_assert(kRows + 2048 / 32 * kBlockBytes <= kKeySlots * kKeyPitch, "what the host asks for");
static_assert(kShare <= kKeySlots && 2 * kShare - kKeySlots <= kShare, "values in place of keys");

struct Fixed {
  u64 full[kWarps][kStages];
  float inverse_rms[kTokens];
  float scale[kTokens * kWarps][kCtas];  // of the CTAs' parts, for a token and head
};

// Whatever any of the CTAs has written before is visible to all of them after.
__device__ __forceinline__ void meet(u32* arrivals) {
  __syncthreads();
  if (threadIdx.x == 0) {
    u32 before, now;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;"
                 : "=r"(before)
                 : "l"(arrivals)
                 : "memory");
    const u32 all = before / kCtas * kCtas + kCtas;
    do {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(arrivals) : "memory");
    } while (static_cast<int>(now - all) < 0);
  }
  __syncthreads();
}

struct Beside {
  const DenoiseBesideParams& p;
  unsigned char* room;
  Fixed& fixed;
  u32 base;        // address of `room`
  u32 warp, lane;
  u32 first_tile;  // of this warp; then every 32nd
  u32 turn;        // parity of the barriers that the ring is at
  u64 policy;

  // ---- weights ----

  // Where the copies are that are still to be asked for: of which product, in which of its rounds
  // of two tiles, and at which 64 of its inputs.
  struct Cursor {
    u32 product, round, part;
  };
  Cursor cursor;

  // The ring is filled in the order in which the products use it, four stages ahead, across tiles,
  // rounds and products.
  __device__ __forceinline__ void ask(u32 stage) {
    if (cursor.product > 3) return;
    const DenoiseProductParams& product = (&p.o)[cursor.product];
    const u32 parts = cursor.product == 0 ? 32 : cursor.product == 2 ? 64 : 16;
    const u32 rounds = cursor.product == 1 ? 8 : cursor.product == 3 ? 3 : 1;
    const bool single = cursor.product == 3 && cursor.round == 2;
    const u32 to = base + (warp * kStages + stage) * kStageBytes;
    const u32 bar = shared_address(&fixed.full[warp][stage]);
    const u64 tile_bytes = parts * kPieceBytes;
    const u32 tile = first_tile + cursor.round * 2 * kRound;
    const char* from = reinterpret_cast<const char*>(product.weight) + tile * tile_bytes +
                       cursor.part * kPieceBytes;
    mbarrier_expect(bar, single ? kPieceBytes : kStageBytes);
    bulk_load(to, from, kPieceBytes, bar, policy);
    if (!single) bulk_load(to + kPieceBytes, from + kRound * tile_bytes, kPieceBytes, bar, policy);
    if (++cursor.part < parts) return;
    cursor.part = 0;
    if (++cursor.round < rounds) return;
    cursor.round = 0, ++cursor.product;
  }

  // ---- products ----

  // 64 inputs of two tiles, and of 16 tokens.
  struct Fragments {
    uint4 weight[2][2][2];  // [32 inputs][tile][half]
    uint4 row[2][2];        // [32 inputs][8 tokens]
  };

  __device__ __forceinline__ void load(Fragments& x, u32 stage, u32 rows) const {
    const u32 place = lane ^ (lane >> 3 & 1);
    const u32 from = base + (warp * kStages + stage) * kStageBytes;
#pragma unroll
    for (u32 k = 0; k < 2; ++k) {
#pragma unroll
      for (u32 n = 0; n < 2; ++n) x.row[k][n] = load_shared(rows + k * kBlockBytes + n * 512);
#pragma unroll
      for (u32 m = 0; m < 2; ++m) {
        const u32 piece = from + m * kPieceBytes + k * 1024;
        x.weight[k][m][0] = load_shared(piece + place * 16);
        x.weight[k][m][1] = load_shared(piece + 512 + (place ^ 2) * 16);
      }
    }
  }

  // sum[m][n] += those inputs of tile m times those of tokens 8n to 8n + 7.
  __device__ __forceinline__ static void multiply(float4 (&sum)[2][2], const Fragments& x) {
#pragma unroll
    for (u32 k = 0; k < 2; ++k) {
#pragma unroll
      for (u32 half = 0; half < 2; ++half) {
#pragma unroll
        for (u32 m = 0; m < 2; ++m) {
#pragma unroll
          for (u32 n = 0; n < 2; ++n) {
            const uint4 row = x.row[k][n];
            mma(sum[m][n], x.weight[k][m][half], half ? row.z : row.x, half ? row.w : row.y);
          }
        }
      }
    }
  }

  // K columns of a product's rows from `first` on to shared memory, padding as zeros, and behind a
  // norm their statistics.
  template <u32 K, bool NORM>
  __device__ __forceinline__ void take_rows(const DenoiseProductParams& product,
                                            u32 first = 0) const {
    for (u32 u = threadIdx.x; u < K / 32 * 64; u += kThreads) {
      const u32 token = u / 4 % kTokens;
      const bool real = token < product.rows;
      const u32 column = first + u / 64 * 32 + u % 4 * 8;
      copy_async(base + kRows + u * 16,
                 product.input + element_of(product.input_rows, real ? token : 0, column), real);
    }
    if (NORM) {
#pragma unroll
      for (u32 token = warp; token < kTokens; token += kWarps) {
        const u32 row = row_index(product.input_rows, min(token, product.rows - 1));
        const float2 s = load_cached_pair(product.input_sums + row * kSums + lane * 2);
        float sum = s.x + s.y;
#pragma unroll
        for (u32 d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
        if (lane == 0) fixed.inverse_rms[token] = rsqrtf(sum * (1.0f / K) + 1e-6f);
      }
    }
    copies_done();
  }

  // A whole product: rounds of two tiles, but for what is left at the end.
  template <Epilogue E, u32 K, u32 TILES>
  __device__ __forceinline__ void product(const DenoiseProductParams& what) {
    constexpr u32 kAtOnce = K < 2048 ? K : 2048;  // columns of the rows in shared memory
    const Finish<E> finish{what, lane, TILES};
    const u32 pair = (lane & 3) * 2;
#pragma unroll 1
    for (u32 tile = first_tile; tile < TILES; tile += 2 * kRound) {
      const bool both = tile + kRound < TILES;
      // The next layer's launch may be queued now, so that it finds these multiprocessors free and
      // the prefill does not; not earlier, or it would take others.
      if (E == Epilogue::Qkv && tile + 2 * kRound >= TILES) launch_dependents();
      Extra extra[2][2];
#pragma unroll
      for (u32 n = 0; n < 2; ++n) {
        finish.prepare(extra[0][n], tile, n * 8 + pair, true);
        if (both) finish.prepare(extra[1][n], tile + kRound, n * 8 + pair, true);
      }
      float4 sum[2][2] = {};
#pragma unroll 1
      for (u32 first = 0; first < K; first += kAtOnce) {
        if (first > 0) {
          __syncthreads();
          take_rows<kAtOnce, false>(what, first);
        }
        const auto take = [&](Fragments& x, u32 stage, u32 part) {
          mbarrier_wait(shared_address(&fixed.full[warp][stage]), turn);
          load(x, stage, base + kRows + part * 2 * kBlockBytes + lane * 16);
        };
        Fragments x[2];
        take(x[0], 0, 0);
#pragma unroll 1
        for (u32 part = 0; part < kAtOnce / 64; part += kStages) {
          const bool last = part + kStages == kAtOnce / 64;
#pragma unroll
          for (u32 stage = 0; stage < kStages; ++stage) {
            // What comes next is on its way to registers while this is multiplied.
            if (stage + 1 < kStages) {
              take(x[(stage + 1) % 2], stage + 1, part + stage + 1);
            } else {
              turn ^= 1;
              if (!last) take(x[0], 0, part + kStages);
            }
            multiply(sum, x[stage % 2]);
            __syncwarp();
            if (elect_one()) ask(stage);
          }
        }
      }
#pragma unroll
      for (u32 m = 0; m < 2; ++m) {
        if (m == 1 && !both) break;
#pragma unroll
        for (u32 n = 0; n < 2; ++n) {
          if (E == Epilogue::Add) finish.load_old(extra[m][n]);
        }
#pragma unroll
        for (u32 n = 0; n < 2; ++n) {
          finish.store(sum[m][n], extra[m][n], tile + m * kRound,
                       &fixed.inverse_rms[n * 8 + pair]);
        }
      }
    }
  }

  // ---- attention ----

  // This CTA's share of the keys: all prefix keys, then the suffix keys, a quarter each.
  struct Keys {
    u32 prefix, count;  // of all CTAs: prefix keys, all keys
    u32 first, share;   // of this one: the first, and how many
  };

  __device__ __forceinline__ Keys share_of_keys() const {
    const uint2 length = __ldg(reinterpret_cast<const uint2*>(p.qkv.lengths));
    Keys keys;
    keys.prefix = length.x * p.qkv.image_tokens + length.y;
    keys.count = keys.prefix + p.suffix_keys;
    const u32 each = (keys.count + 16 * kCtas - 1) / (16 * kCtas) * 16;
    keys.first = min(blockIdx.x * each, keys.count);
    keys.share = min(each, keys.count - keys.first);
    return keys;
  }

  // Rows `from` to `to` of this CTA's share of keys or values to the slots from `slot` on. Behind
  // the last one come copies of it, to a multiple of 16.
  __device__ __forceinline__ void take_keys(const u16* cache, const Keys& keys, u32 from, u32 to,
                                            u32 slot) const {
    for (u32 u = threadIdx.x; u < (to - from) * 32; u += kThreads) {
      const u32 at = from + u / 32, s = keys.first + min(at, keys.share - 1);
      const u32 row = s < keys.prefix ? s : p.prefix_rows + s - keys.prefix;
      copy_async(base + (slot + u / 32) * kKeyPitch + u % 32 * 16,
                 cache + static_cast<u64>(row) * 256 + u % 32 * 8, true);
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  }

  // One head's queries as A fragments, all 256 columns.
  __device__ __forceinline__ void take_queries(uint4 (&q)[16], u32 head) const {
    u32 from[2];  // of the tokens lane / 4 and + 8
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
      const u32 token = min(half * 8 + lane / 4, p.o.rows - 1);
      from[half] = element_of(p.q_rows, token, head * 256) + lane % 4 * 2;
    }
#pragma unroll
    for (u32 i = 0; i < 16; ++i) {
      const auto pair = [&](u32 half, u32 column) {
        u32 v;
        asm volatile("ld.global.cg.u32 %0, [%1];"
                     : "=r"(v)
                     : "l"(p.q + from[half] + i * 16 + column)
                     : "memory");
        return v;
      };
      q[i] = make_uint4(pair(0, 0), pair(1, 0), pair(0, 8), pair(1, 8));
    }
  }

  // A warp has a head. Its part of the attention, over this CTA's keys, goes to `parts`, normalised
  // and in half precision (four times finer than the bf16 it ends in), its maximum and sum beside.
  __device__ __forceinline__ void attend() const {
    const Keys keys = share_of_keys();
    const u32 padded = (keys.share + 15) / 16 * 16;
    // Values behind the keys, and where the keys were once nobody needs them.
    const u32 behind = min(padded, kKeySlots - padded);
    if (padded > 0) {
      take_keys(p.k, keys, 0, padded, 0);
      take_keys(p.v, keys, 0, behind, padded);
    }
    float4 s[kShare / 8];
    {
      uint4 q[16];
      take_queries(q, warp);
      asm volatile("cp.async.wait_group 1;" ::: "memory");
      __syncthreads();
      const u32 from = base + lane % 8 * kKeyPitch + lane / 8 * 16;
#pragma unroll
      for (u32 t = 0; t < kShare / 8; ++t) {
        s[t] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (t * 8 >= padded) continue;
        float4 other = s[t];
#pragma unroll
        for (u32 i = 0; i < 16; i += 2) {
          u32 k[4];
          load_matrices(k, from + t * 8 * kKeyPitch + i * 32);
          mma(s[t], q[i], k[0], k[1]);
          mma(other, q[i + 1], k[2], k[3]);
        }
        s[t].x += other.x, s[t].y += other.y, s[t].z += other.z, s[t].w += other.w;
      }
    }
    if (padded > behind) {
      __syncthreads();
      take_keys(p.v, keys, behind, padded, 0);
    }
    const float hide = __uint_as_float(0xff800000u);
    float top[2] = {hide, hide};
#pragma unroll
    for (u32 t = 0; t < kShare / 8; ++t) {
      const u32 key = t * 8 + lane % 4 * 2;
      if (key >= keys.share) s[t].x = s[t].z = hide;
      if (key + 1 >= keys.share) s[t].y = s[t].w = hide;
      if (p.state_row && lane < 4) {
        if (keys.first + key > keys.prefix) s[t].x = hide;
        if (keys.first + key + 1 > keys.prefix) s[t].y = hide;
      }
      top[0] = fmaxf(top[0], fmaxf(s[t].x, s[t].y));
      top[1] = fmaxf(top[1], fmaxf(s[t].z, s[t].w));
    }
    float sum[2] = {}, shift[2];
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
      top[half] = fmaxf(top[half], __shfl_xor_sync(~0u, top[half], 1));
      top[half] = fmaxf(top[half], __shfl_xor_sync(~0u, top[half], 2));
      shift[half] = top[half] == hide ? 0.0f : top[half] * kLog2e;
    }
    u32 weight[kShare / 8][2];
#pragma unroll
    for (u32 t = 0; t < kShare / 8; ++t) {
      const float x = exp2f(fmaf(s[t].x, kLog2e, -shift[0]));
      const float y = exp2f(fmaf(s[t].y, kLog2e, -shift[0]));
      const float z = exp2f(fmaf(s[t].z, kLog2e, -shift[1]));
      const float w = exp2f(fmaf(s[t].w, kLog2e, -shift[1]));
      sum[0] += x + y, sum[1] += z + w;
      weight[t][0] = bf16_pair(x, y), weight[t][1] = bf16_pair(z, w);
    }
    float inverse[2];
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
      sum[half] += __shfl_xor_sync(~0u, sum[half], 1);
      sum[half] += __shfl_xor_sync(~0u, sum[half], 2);
      inverse[half] = sum[half] > 0.0f ? 1.0f / sum[half] : 0.0f;
      const u32 token = half * 8 + lane / 4;
      if (lane % 4 == 0) {
        const u32 at = (blockIdx.x * kTokens + token) * kWarps + warp;
        *reinterpret_cast<float2*>(p.part_stats + at * 2) = make_float2(top[half], sum[half]);
      }
    }
    copies_done();
    u16* out = p.parts + static_cast<u64>(blockIdx.x) * kTokens * 2048 + warp * 256 + lane % 4 * 2;
    // Half of the columns at a time: sums for all of them do not fit beside the weights.
#pragma unroll 1
    for (u32 columns = 0; columns < 256; columns += 128) {
      float4 o[16] = {};
      const u32 from = base + lane % 16 * kKeyPitch + lane / 16 * 16 + columns * 2;
#pragma unroll
      for (u32 t = 0; t < kShare / 8; t += 2) {
        if (t * 8 >= padded) continue;
        const u32 slot = t * 8 < behind ? padded + t * 8 : t * 8 - behind;
        const uint4 a =
            make_uint4(weight[t][0], weight[t][1], weight[t + 1][0], weight[t + 1][1]);
#pragma unroll
        for (u32 j = 0; j < 16; j += 2) {
          u32 v[4];
          load_transposed(v, from + slot * kKeyPitch + j * 16);
          mma(o[j], a, v[0], v[1]);
          mma(o[j + 1], a, v[2], v[3]);
        }
      }
#pragma unroll
      for (u32 j = 0; j < 16; ++j) {
        u16* to = out + columns + j * 8;
        const u32 low = lane / 4, high = low + 8;
        if (low < p.o.rows) store_half(to + low * 2048, o[j].x * inverse[0], o[j].y * inverse[0]);
        if (high < p.o.rows) store_half(to + high * 2048, o[j].z * inverse[1], o[j].w * inverse[1]);
      }
    }
  }

  // The parts of the attention become the rows of its product, in shared memory.
  __device__ __forceinline__ void take_attended() const {
    if (threadIdx.x < kTokens * kWarps) {  // a token and a head
      float2 part[kCtas];
      float top = __uint_as_float(0xff800000u), sum = 0.0f;
#pragma unroll
      for (u32 c = 0; c < kCtas; ++c) {
        part[c] = load_cached_pair(p.part_stats + (c * kTokens * kWarps + threadIdx.x) * 2);
        top = fmaxf(top, part[c].x);
      }
      float scale[kCtas];
#pragma unroll
      for (u32 c = 0; c < kCtas; ++c) {
        scale[c] = part[c].y > 0.0f ? part[c].y * exp2f((part[c].x - top) * kLog2e) : 0.0f;
        sum += scale[c];
      }
#pragma unroll
      for (u32 c = 0; c < kCtas; ++c) fixed.scale[threadIdx.x][c] = scale[c] / sum;
    }
    __syncthreads();
    constexpr u32 kAtOnce = 8;
#pragma unroll 1
    for (u32 first = threadIdx.x; first < 2048 / 32 * 64; first += kAtOnce * kThreads) {
      uint4 x[kAtOnce][kCtas];
#pragma unroll
      for (u32 i = 0; i < kAtOnce; ++i) {
        const u32 u = first + i * kThreads, token = u / 4 % kTokens;
        const u32 column = u / 64 * 32 + u % 4 * 8;
#pragma unroll
        for (u32 c = 0; c < kCtas; ++c) {
          x[i][c] = token < p.o.rows
                        ? load_cached(p.parts + (c * kTokens + token) * 2048 + column)
                        : make_uint4(0, 0, 0, 0);
        }
      }
#pragma unroll
      for (u32 i = 0; i < kAtOnce; ++i) {
        const u32 u = first + i * kThreads, token = u / 4 % kTokens;
        const float* scale = fixed.scale[token * kWarps + u / 64 / 8];
        float2 sum[4] = {};
#pragma unroll
        for (u32 c = 0; c < kCtas; ++c) {
          add_scaled(sum[0], x[i][c].x, scale[c]);
          add_scaled(sum[1], x[i][c].y, scale[c]);
          add_scaled(sum[2], x[i][c].z, scale[c]);
          add_scaled(sum[3], x[i][c].w, scale[c]);
        }
        reinterpret_cast<uint4*>(room + kRows)[u] =
            make_uint4(bf16_pair(sum[0].x, sum[0].y), bf16_pair(sum[1].x, sum[1].y),
                       bf16_pair(sum[2].x, sum[2].y), bf16_pair(sum[3].x, sum[3].y));
      }
    }
    __syncthreads();
  }

  __device__ __forceinline__ void run() {
    if (threadIdx.x == 0) {
      for (u32 i = 0; i < kWarps * kStages; ++i) {
        mbarrier_init(shared_address(&fixed.full[i / kStages][i % kStages]), 1);
      }
      mbarrier_init_fence();
    }
    dependency_wait();
    attend();
    __syncthreads();  // the ring lies where keys and values were
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    if (elect_one()) {
      for (u32 stage = 0; stage < kStages; ++stage) ask(stage);
    }
    meet(p.arrivals);
    take_attended();
    product<Epilogue::Add, 2048, 64>(p.o);
    meet(p.arrivals);
    take_rows<1024, true>(p.gate_up);
    product<Epilogue::GeGlu, 1024, 512>(p.gate_up);
    meet(p.arrivals);
    take_rows<2048, false>(p.down);
    product<Epilogue::Add, 4096, 64>(p.down);
    meet(p.arrivals);
    take_rows<1024, true>(p.qkv);
    product<Epilogue::Qkv, 1024, 160>(p.qkv);
  }
};

}  // namespace
}  // namespace denoise

extern "C" __global__ void __launch_bounds__(denoise::kThreads, 1)
    denoise_beside(const __grid_constant__ DenoiseBesideParams p) {
  using namespace denoise;
  extern __shared__ __align__(128) unsigned char room[];
  __shared__ __align__(16) Fixed fixed;
  const u32 warp = threadIdx.x / 32;
  Beside body{p,
              room,
              fixed,
              shared_address(room),
              warp,
              threadIdx.x % 32,
              blockIdx.x + kCtas * warp,
              0,
              evict_first_policy(),
              {}};
  body.run();
}
