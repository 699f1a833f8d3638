// Lab of the denoise loop: builds the whole loop (10 steps x 18 layers, random weights of the real
// size, 788 prefix keys) as one CUDA graph, checks it against plain CUDA-core kernels and times it.
//   nvcc -O3 -std=c++17 -gencode=arch=compute_90a,code=sm_90a -cudart static -o denoise
//     denoise.cu ../kernels/attention_suffix.cu
// With -DDENOISE_VARIANTS='"FILE"' a file of yours defines other kernels (DENOISE_WIDE_KERNEL) and
// `run_variants`, which studies them beside these.
#include <cudaTypedefs.h>
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "../kernels/denoise_edge.cu"
#include "../kernels/denoise_load.cu"
#include "../kernels/denoise_product.cu"
#include "../kernels/denoise_wide.cu"
#include "denoise_reference.cuh"

// The attention kernel is a translation unit of its own: kernels/attention_suffix.cu.
struct AttentionSuffixParams {
  const unsigned short *q, *k, *v;
  unsigned short* out;
  const unsigned* lengths;
  unsigned queries, q_stride, out_stride, out_width, out_step, cache_rows, prefix_rows;
  unsigned suffix_keys, image_tokens, key_slots, state_row, prefix_ready;
};
static_assert(sizeof(AttentionSuffixParams) == 88, "as in attention_suffix.cu");
extern "C" {
__global__ void attention_suffix_r16_c8(const __grid_constant__ AttentionSuffixParams);
__global__ void attention_suffix_r32_c8(const __grid_constant__ AttentionSuffixParams);
__global__ void attention_suffix_r80_c8(const __grid_constant__ AttentionSuffixParams);
}

using denoise::u16;
using denoise::u32;

#define CHECK(call)                                                                            \
  do {                                                                                         \
    cudaError_t e_ = (call);                                                                   \
    if (e_ != cudaSuccess) {                                                                   \
      printf("%s:%d %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(e_));             \
      exit(1);                                                                                 \
    }                                                                                          \
  } while (0)

constexpr int kLayers = 18, kSteps = 10, kPrefix = 788, kPrompt = 20;

template <class T>
T* device(size_t n) {
  T* p;
  CHECK(cudaMalloc(&p, n * sizeof(T)));
  CHECK(cudaMemset(p, 0, n * sizeof(T)));
  return p;
}

struct Weight {
  bf16* plain;
  uint4* packed;
};

Weight make_weight(size_t outputs, size_t inputs, u32 kind, unsigned seed, float scale) {
  Weight w{device<bf16>(outputs * inputs), device<uint4>(outputs * inputs / 8)};
  fill_bf16<<<1024, 256>>>(w.plain, outputs * inputs, seed, scale);
  denoise_pack<<<outputs * inputs / 8 / 256, 256>>>((u16*)w.plain, w.packed, outputs, inputs,
                                                    kind);
  return w;
}

float* make_f32(size_t n, unsigned seed, float scale, float offset = 0.0f) {
  float* p = device<float>(n);
  fill_f32<<<256, 256>>>(p, n, seed, scale, offset);
  return p;
}

struct Layer {
  Weight qkv, o, gu, down;
  float *table1, *table2;  // [steps][3072]: scale, shift, gate; pi0: the first step's scale alone
  float *bias1, *bias2;    // [steps][2560], [steps][8192]
};

struct Model {
  Layer layer[kLayers];
  Weight mlp;
  float *mlp_bias, *in_weight, *in_bias, *out_weight, *out_bias, *state_weight, *state_bias;
  float* final_table;
  float2* rope;

  Model() {
    unsigned seed = 1;
    for (Layer& l : layer) {
      l.qkv = make_weight(2560, 1024, 0, seed++, 1 / 32.0f);
      // 1/16 of the softmax scale is folded into q.
      fill_bf16<<<1024, 256>>>(l.qkv.plain, 2048 * 1024, seed++, 1 / 512.0f);
      denoise_pack<<<2560 * 1024 / 8 / 256, 256>>>((u16*)l.qkv.plain, l.qkv.packed, 2560, 1024, 0);
      l.o = make_weight(1024, 2048, 0, seed++, 0.1f);
      l.gu = make_weight(8192, 1024, 1, seed++, 1 / 32.0f);
      l.down = make_weight(1024, 4096, 0, seed++, 1 / 64.0f);
      for (float** t : {&l.table1, &l.table2}) *t = make_table(seed);
      l.bias1 = device<float>(kSteps * 2560);
      l.bias2 = device<float>(kSteps * 8192);
      denoise_fold_shift<<<dim3(160, kSteps), 32>>>(l.qkv.packed, l.table1, l.bias1, 2560, 1024, 0);
      denoise_fold_shift<<<dim3(512, kSteps), 32>>>(l.gu.packed, l.table2, l.bias2, 8192, 1024, 1);
    }
    mlp = make_weight(1024, 1024, 0, seed++, 1 / 32.0f);
    mlp_bias = make_f32(1024, seed++, 0.1f);
    in_weight = make_f32(32 * 1024, seed++, 0.18f);
    in_bias = make_f32(kSteps * 1024, seed++, 0.3f);
    out_weight = make_f32(32 * 1024, seed++, 0.1f / 32);
    out_bias = make_f32(32, seed++, 0.01f);
    state_weight = make_f32(32 * 1024, seed++, 0.18f);
    state_bias = make_f32(1024, seed++, 0.1f);
    final_table = make_table(seed);
    std::vector<float2> r(2048 * 128);
    for (int p = 0; p < 2048; ++p)
      for (int j = 0; j < 128; ++j) {
        const double a = p * pow(10000.0, -2.0 * j / 256);
        r[p * 128 + j] = make_float2((float)cos(a), (float)sin(a));
      }
    rope = device<float2>(r.size());
    CHECK(cudaMemcpy(rope, r.data(), r.size() * 8, cudaMemcpyHostToDevice));
    CHECK(cudaDeviceSynchronize());
  }

  float* make_table(unsigned& seed) {
    float* t = make_f32(kSteps * 3072, seed++, 0.2f);
    for (int s = 0; s < kSteps; ++s) {
      fill_f32<<<8, 256>>>(t + s * 3072, 1024, seed++, 0.2f, 1.0f);
      fill_f32<<<8, 256>>>(t + s * 3072 + 2048, 1024, seed++, 0.3f, 0.3f);
    }
    return t;
  }
};

struct Case {
  bool pi05;
  int h, samples;
  int tokens() const { return pi05 ? h : h + 1; }  // suffix keys and stream rows of a sample
};

// A matrix in blocks of 32 columns, as the few-row products read it. The room of a row before it
// puts row 1, where π0's loop begins, at a cache line.
struct Blocked {
  bf16* at;
  u32 step;
  size_t count;

  Blocked(int width, u32 before) {
    step = 16 * 32;
    count = (size_t)step * width / 32;
    at = device<bf16>(count + before * 32) + before * 32;
  }
  DenoiseRows rows(DenoiseRows r) const {
    r.width = 32, r.step = step;
    return r;
  }
};

// Everything a run writes.
struct Arena {
  bf16 *stream, *scaled, *q, *attended, *hidden, *u, *k[kLayers], *v[kLayers];
  Blocked scaled_blocks, attended_blocks, hidden_blocks;
  float *sums, *middle_sums;
  float *actions, *noise, *state, *y;
  u32* lengths;
  size_t action_bytes;

  explicit Arena(const Case& c)
      : scaled_blocks(1024, !c.pi05), attended_blocks(2048, !c.pi05), hidden_blocks(4096, !c.pi05) {
    const size_t rows = (size_t)c.samples * c.tokens();
    stream = device<bf16>(rows * 1024);
    scaled = device<bf16>(rows * 1024);
    q = device<bf16>(rows * 2048);
    attended = device<bf16>(rows * 2048);
    hidden = device<bf16>(rows * 4096);
    u = device<bf16>(rows * 1024);
    const size_t cache = (size_t)(kPrefix + c.tokens()) * 256;
    sums = device<float>(rows * 64);
    middle_sums = device<float>(rows * 64);
    for (int l = 0; l < kLayers; ++l) {
      k[l] = device<bf16>(cache * c.samples);
      v[l] = device<bf16>(cache * c.samples);
      for (int s = 0; s < c.samples; ++s) {  // every sample alike
        fill_bf16<<<64, 256>>>(k[l] + s * cache, kPrefix * 256, 1000 + l, 1.0f);
        fill_bf16<<<64, 256>>>(v[l] + s * cache, kPrefix * 256, 2000 + l, 1.0f);
      }
    }
    action_bytes = (size_t)c.samples * c.h * 32 * 4;
    actions = device<float>(action_bytes / 4);
    noise = device<float>(action_bytes / 4);
    state = device<float>(c.samples * 32);
    for (int s = 0; s < c.samples; ++s) {
      fill_f32<<<8, 256>>>(noise + s * c.h * 32, c.h * 32, 77, 1.0f, 0.0f);
      fill_f32<<<1, 32>>>(state + s * 32, 32, 78, 1.0f, 0.0f);
    }
    y = device<float>(rows * 8192);
    lengths = device<u32>(2 * c.samples);
    std::vector<u32> n;
    for (int s = 0; s < c.samples; ++s) n.insert(n.end(), {3, kPrompt});
    CHECK(cudaMemcpy(lengths, n.data(), n.size() * 4, cudaMemcpyHostToDevice));
    CHECK(cudaDeviceSynchronize());
  }
};

enum Kind { kQkv, kAttention, kO, kGateUp, kDown, kMlp, kEdge, kKinds };
const char* kKindNames[] = {"qkv", "attention", "o", "gate_up", "down", "mlp_out", "edge"};

struct Launch {
  const void* fn;
  dim3 grid;
  int threads, cluster;
  size_t smem;
  std::vector<char> params;
  Kind kind;
  ptx::TensorMap map = {};
};

PFN_cuTensorMapEncodeTiled_v12000 encode_tiled;

// All rows of a product's input, 64 columns at a time.
ptx::TensorMap rows_map(const DenoiseProductParams& p) {
  ptx::TensorMap map;
  const DenoiseRows& r = p.input_rows;
  const cuuint64_t dims[] = {r.width, r.count, p.rows / r.count};
  const cuuint64_t strides[] = {r.width * 2ull, r.stride * r.width * 2ull};
  const cuuint32_t box[] = {64, r.count, p.rows / r.count}, steps[] = {1, 1, 1};
  const CUresult e = encode_tiled((CUtensorMap*)&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3,
                                  (void*)(p.input + (size_t)r.first * r.width), dims, strides, box,
                                  steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                  CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (e != CUDA_SUCCESS) printf("cuTensorMapEncodeTiled: %d\n", e), exit(1);
  return map;
}

struct Shape {  // of a product kernel
  const char* name;
  const void* fn;
  int mt, kc, cl, nt;
  int threads, smem;  // of a wide kernel, else 0
};
#define SHAPE(fn, mt, kc, cl) Shape{#fn, (const void*)fn, mt, kc, cl, 2, 0, 0}
template <class T>
Shape wide_shape(const char* name, const void* fn, int k, int cl, int nt) {
  return {name, fn, 4, k / cl, cl, nt, T::kBlock, (int)T::kSmem};
}
#define WIDE(fn, ctas, e, k, cl, nt, stages)                                                    \
  wide_shape<denoise::Wide<denoise::Epilogue::e, k, cl, nt, stages>>(#fn, (const void*)fn, k, cl, \
                                                                     nt),
const Shape wide_shapes[] = {DENOISE_WIDE(WIDE)};

Shape wide(const std::string& name) {
  for (const Shape& s : wide_shapes)
    if (name == s.name) return s;
  printf("no kernel %s\n", name.c_str());
  exit(1);
}

struct Choice {
  Shape qkv, o, gu, down, mlp;
  unsigned attention = 1;  // tiles of 16 rows (one per query head and token) of a CTA
};

template <class P>
std::vector<char> bytes_of(const P& p) {
  return std::vector<char>((const char*)&p, (const char*)&p + sizeof p);
}

Launch product_launch(const Shape& s, DenoiseProductParams p, int outputs, Kind kind) {
  const size_t smem = s.threads ? s.smem : (size_t)s.mt * s.kc * 32;
  if ((int)p.rows > s.nt * 8) printf("%s: too many rows\n", s.name), exit(1);
  CHECK(cudaFuncSetAttribute(s.fn, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)smem));
  p.depth = kind == kGateUp || kind == kDown ? 4 : kind == kQkv ? 3 : 2;
  const dim3 grid(outputs / 16 / s.mt * s.cl);
  Launch l{s.fn, grid, s.threads ? s.threads : denoise::kBlock, s.cl, smem, bytes_of(p), kind};
  if (s.threads) l.map = rows_map(p);
  return l;
}

struct Loop {
  const Model& m;
  const Arena& a;
  const Case& c;
  const Choice& choice;
  std::vector<Launch> list;

  DenoiseRows view(int width, bool state) const {
    const u32 n = c.tokens(), first = c.pi05 || state ? 0 : 1;
    return {n, first, n - first, (u32)width, 32};
  }

  // Where few-row kernels hand rows on.
  struct Place {
    u16* at;
    DenoiseRows rows;
  };
  Place place(bf16* plain, const Blocked& blocks, int width, bool state) const {
    const DenoiseRows rows = view(width, state);
    const bool few = choice.qkv.threads == 0;
    return few ? Place{(u16*)blocks.at, blocks.rows(rows)} : Place{(u16*)plain, rows};
  }
  Place scaled(bool state) const { return place(a.scaled, a.scaled_blocks, 1024, state); }
  Place attended(bool state) const { return place(a.attended, a.attended_blocks, 2048, state); }
  Place hidden(bool state) const { return place(a.hidden, a.hidden_blocks, 4096, state); }
  u32 rows(bool state) const { return c.samples * (state ? c.tokens() : c.h); }

  // Scale of a norm: adaptive or learned.
  const float* scale(const float* table, int step) const {
    return table + (c.pi05 ? step : 0) * 3072;
  }

  void edge(int step) {
    DenoiseEdgeParams p = {};
    if (step > 0) {
      p.stream = (u16*)a.stream;
      if (c.pi05) {
        p.norm_scale = m.final_table + (step - 1) * 3072;
        p.norm_shift = p.norm_scale + 1024;
      }
    }
    p.out_weight = m.out_weight, p.out_bias = m.out_bias, p.actions = a.actions;
    if (step < kSteps) p.in_weight = m.in_weight, p.in_bias = m.in_bias + step * 1024;
    p.out = c.pi05 ? (u16*)a.stream : (u16*)a.u;
    const bool state = step == 0 && !c.pi05;
    if (state) p.state = a.state;
    p.state_weight = m.state_weight, p.state_bias = m.state_bias, p.state_out = (u16*)a.stream;
    p.sums = a.sums;
    if (step < kSteps) {
      const Place to = scaled(state);
      p.scaled = to.at, p.scaled_width = to.rows.width, p.scaled_step = to.rows.step;
      p.next_scale = scale(m.layer[0].table1, step);
    }
    p.stream_rows = view(1024, false);
    p.out_rows = c.pi05 ? view(1024, false) : DenoiseRows{(u32)c.h, 0, (u32)c.h, 1024, 32};
    p.state_rows = {(u32)c.tokens(), 0, 1, 1024, 32};
    p.rows = c.samples * c.h, p.samples = c.samples, p.silu = !c.pi05;
    list.push_back({(const void*)denoise_edge, dim3(p.rows + (state ? c.samples : 0)), 1024, 1, 0,
                    bytes_of(p), kEdge});
    if (!c.pi05 && step < kSteps) {
      DenoiseProductParams q = {};
      q.weight = m.mlp.packed, q.input = (u16*)a.u, q.out = (u16*)a.stream, q.bias = m.mlp_bias;
      q.out_sums = a.sums, q.scaled = scaled(false).at, q.scaled_rows = scaled(false).rows;
      q.next_scale = scale(m.layer[0].table1, step);
      q.input_rows = p.out_rows, q.out_rows = view(1024, false), q.rows = p.rows;
      list.push_back(product_launch(choice.mlp, q, 1024, kMlp));
    }
  }

  // The state token's row 0 lies before the rows of the view in every step but the first.
  void attention(int l, bool state) {
    const DenoiseRows rows = view(2048, state);
    AttentionSuffixParams t = {};
    const Place out = attended(state);
    t.q = (u16*)a.q + rows.first * 2048, t.out = out.at + rows.first * out.rows.width;
    t.out_width = out.rows.width, t.out_step = out.rows.step;
    t.k = (u16*)a.k[l], t.v = (u16*)a.v[l], t.lengths = a.lengths;
    t.queries = rows.count, t.q_stride = t.out_stride = rows.stride;
    t.cache_rows = kPrefix + c.tokens(), t.prefix_rows = kPrefix, t.suffix_keys = c.tokens();
    t.image_tokens = 256, t.state_row = state, t.prefix_ready = 1;
    t.key_slots = ((kPrefix + 7) / 8 + (t.suffix_keys + 7) / 8 + 15) / 16 * 16;
    const u32 tiles = choice.attention, rows_16 = 16 * tiles;
    const size_t smem = rows_16 * (656 + 2 * t.key_slots + 64) + t.key_slots * 528 + 16;
    const void* fn = tiles == 1   ? (const void*)attention_suffix_r16_c8
                     : tiles == 2 ? (const void*)attention_suffix_r32_c8
                                  : (const void*)attention_suffix_r80_c8;
    CHECK(cudaFuncSetAttribute(fn, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)smem));
    const dim3 grid(8, (t.queries * 8 + rows_16 - 1) / rows_16, c.samples);
    list.push_back({fn, grid, 256, 8, smem, bytes_of(t), kAttention});
  }

  void layer(int l, int step, bool state) {
    const Layer& w = m.layer[l];
    DenoiseProductParams p = {};
    p.rows = rows(state), p.image_tokens = 256, p.first_position = state || c.pi05 ? 0 : 1;
    p.lengths = a.lengths, p.rope = m.rope;
    p.weight = w.qkv.packed, p.input = scaled(state).at, p.out = (u16*)a.q;
    p.input_sums = a.sums;
    p.k = (u16*)a.k[l], p.v = (u16*)a.v[l];
    p.input_rows = scaled(state).rows, p.out_rows = view(2048, state);
    p.cache_rows = p.out_rows;
    p.cache_rows.stride = kPrefix + c.tokens(), p.cache_rows.first += kPrefix;
    p.cache_rows.width = 256;
    if (c.pi05) p.bias = w.bias1 + step * 2560;
    list.push_back(product_launch(choice.qkv, p, 2560, kQkv));

    attention(l, state);

    DenoiseProductParams o = {};
    o.rows = p.rows, o.weight = w.o.packed, o.input = attended(state).at;
    o.old = (u16*)a.stream, o.out = (u16*)a.stream, o.out_sums = a.middle_sums;
    o.input_rows = attended(state).rows, o.out_rows = view(1024, state);
    if (c.pi05) o.gate = w.table1 + step * 3072 + 2048;
    o.scaled = scaled(state).at, o.scaled_rows = scaled(state).rows;
    o.next_scale = scale(w.table2, step);
    list.push_back(product_launch(choice.o, o, 1024, kO));

    DenoiseProductParams g = {};
    g.input_sums = a.middle_sums;
    g.rows = p.rows, g.weight = w.gu.packed, g.input = scaled(state).at, g.out = hidden(state).at;
    g.input_rows = scaled(state).rows, g.out_rows = hidden(state).rows;
    if (c.pi05) g.bias = w.bias2 + step * 8192;
    list.push_back(product_launch(choice.gu, g, 8192, kGateUp));

    DenoiseProductParams d = {};
    d.rows = p.rows, d.weight = w.down.packed, d.input = hidden(state).at;
    d.old = (u16*)a.stream, d.out = (u16*)a.stream, d.out_sums = a.sums;
    d.input_rows = hidden(state).rows, d.out_rows = view(1024, state);
    if (c.pi05) d.gate = w.table2 + step * 3072 + 2048;
    if (l + 1 < kLayers) {
      d.scaled = scaled(state).at, d.scaled_rows = scaled(state).rows;
      d.next_scale = scale(m.layer[l + 1].table1, step);
    }
    list.push_back(product_launch(choice.down, d, 1024, kDown));
  }

  void build() {
    for (int s = 0; s < kSteps; ++s) {
      edge(s);
      for (int l = 0; l < kLayers; ++l) layer(l, s, s == 0 && !c.pi05);
    }
    edge(kSteps);
  }
};

void launch(const Launch& l, cudaStream_t stream, bool dependent) {
  cudaLaunchAttribute at[2];
  int n = 0;
  if (dependent) {
    at[n].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    at[n++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (l.cluster > 1) {
    at[n].id = cudaLaunchAttributeClusterDimension;
    at[n].val.clusterDim.x = l.cluster;
    at[n].val.clusterDim.y = at[n].val.clusterDim.z = 1;
    ++n;
  }
  cudaLaunchConfig_t cfg = {};
  cfg.gridDim = l.grid, cfg.blockDim = dim3(l.threads), cfg.dynamicSmemBytes = l.smem;
  cfg.stream = stream, cfg.attrs = at, cfg.numAttrs = n;
  void* args[] = {(void*)l.params.data(), (void*)&l.map};
  CHECK(cudaLaunchKernelExC(&cfg, l.fn, args));
}

cudaGraphExec_t capture(const std::vector<Launch>& list, cudaStream_t stream) {
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  bool first = true;
  for (const Launch& l : list) launch(l, stream, !first), first = false;
  CHECK(cudaStreamEndCapture(stream, &graph));
  CHECK(cudaGraphInstantiate(&exec, graph, 0));
  CHECK(cudaGraphDestroy(graph));
  return exec;
}

float median_ms(cudaGraphExec_t exec, cudaStream_t stream, int n = 25) {
  cudaEvent_t e0, e1;
  CHECK(cudaEventCreate(&e0));
  CHECK(cudaEventCreate(&e1));
  std::vector<float> t;
  for (int i = 0; i < n + 3; ++i) {
    CHECK(cudaEventRecord(e0, stream));
    CHECK(cudaGraphLaunch(exec, stream));
    CHECK(cudaEventRecord(e1, stream));
    CHECK(cudaEventSynchronize(e1));
    float ms;
    CHECK(cudaEventElapsedTime(&ms, e0, e1));
    if (i >= 3) t.push_back(ms);
  }
  std::sort(t.begin(), t.end());
  return t[t.size() / 2];
}

#include "denoise_run.cuh"
