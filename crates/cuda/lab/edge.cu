// Checks and times denoise_edge_many beside denoise_edge, which the whole loop's lab (denoise.cu)
// checks: equal inputs, poisoned outputs, odd rows, bit-equal repeats; and microseconds of a launch
// in a graph of dependent ones.
//   nvcc -O3 -std=c++17 -gencode=arch=compute_90a,code=sm_90a -cudart static -o edge edge.cu
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../kernels/denoise_edge.cu"

using denoise::u16;
using denoise::u32;

#define CHECK(call)                                                                   \
  do {                                                                                \
    cudaError_t e_ = (call);                                                          \
    if (e_ != cudaSuccess)                                                            \
      printf("line %d %s: %s\n", __LINE__, #call, cudaGetErrorString(e_)), exit(1);   \
  } while (0)

constexpr int kMaxRows = 3328, kSamples = 320;

float random_value() {
  float sum = 0;
  for (int i = 0; i < 4; ++i) sum += rand() / (float)RAND_MAX - 0.5f;
  return sum * 1.7f;
}
u16 rounded(float v) {
  u32 bits;
  memcpy(&bits, &v, 4);
  return (u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
float value(u16 v) {
  const u32 bits = (u32)v << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

template <class T>
struct Array {
  T* at;
  std::vector<T> host;
  explicit Array(size_t n) : host(n) { CHECK(cudaMalloc(&at, n * sizeof(T))); }
  void push() { CHECK(cudaMemcpy(at, host.data(), host.size() * sizeof(T), cudaMemcpyDefault)); }
  void poison() { CHECK(cudaMemset(at, 0xff, host.size() * sizeof(T))); }
  std::vector<T> pull() const {
    std::vector<T> out(host.size());
    CHECK(cudaMemcpy(out.data(), at, out.size() * sizeof(T), cudaMemcpyDefault));
    return out;
  }
};
Array<float> floats(size_t n, float scale) {
  Array<float> a(n);
  for (float& v : a.host) v = random_value() * scale;
  a.push();
  return a;
}

// One kind of edge: the family's, and the place in the loop.
struct Kind {
  const char* name;
  bool pi05, out, in, state;
};
const Kind kKinds[] = {
    {"pi0 first", false, false, true, true},   {"pi0 between", false, true, true, false},
    {"pi0 last", false, true, false, false},   {"pi05 first", true, false, true, false},
    {"pi05 between", true, true, true, false},
};

struct Lab {
  Array<u16> stream{kMaxRows * 1024}, fresh{kMaxRows * 1024}, mixed{kMaxRows * 1024};
  Array<u16> scaled{kMaxRows * 1024};
  Array<float> out_weight = floats(32 * 1024, 0.03f), out_bias = floats(32, 0.1f);
  Array<float> in_weight = floats(32 * 1024, 0.2f), in_bias = floats(1024, 0.1f);
  Array<float> state_weight = floats(32 * 1024, 0.2f), state_bias = floats(1024, 0.1f);
  Array<float> norm = floats(2048, 0.3f), next = floats(1024, 1.f);
  Array<float> states = floats(kSamples * 32, 1.f), actions = floats(kMaxRows * 32, 1.f);
  Array<float> sums{kMaxRows * 64};
  Array<float2> stats{kMaxRows * 16};

  Lab() {
    for (u16& v : stream.host) v = rounded(random_value());
    stream.push();
    for (int i = 0; i < 1024; ++i) norm.host[i] += 1.f;
    norm.push();
  }

  DenoiseEdgeParams params(const Kind& k, int samples, int h) {
    DenoiseEdgeParams p = {};
    const u32 state = k.state ? 1 : 0, count = h + state;
    if (k.out) p.stream = stream.at;
    if (k.pi05 && k.out) p.norm_scale = norm.at, p.norm_shift = norm.at + 1024;
    p.out_weight = out_weight.at, p.out_bias = out_bias.at, p.actions = actions.at;
    if (k.in) p.in_weight = in_weight.at;
    p.in_bias = in_bias.at, p.silu = !k.pi05;
    p.out = k.pi05 ? fresh.at : mixed.at;
    if (k.state) p.state = states.at;
    p.state_weight = state_weight.at, p.state_bias = state_bias.at, p.state_out = fresh.at;
    p.next_scale = next.at, p.scaled = scaled.at, p.scaled_width = 1024, p.scaled_step = 32;
    p.sums = sums.at, p.stats = stats.at;
    p.stream_rows = p.out_rows = {(u32)h, 0, (u32)h, 1024, 32};
    p.state_rows = {count, 0, 1, 1024, 32};
    p.rows = samples * h, p.samples = samples;
    p.share = std::min(16u, (p.rows + 131) / 132);
    return p;
  }

  static void launch(const DenoiseEdgeParams& p, bool many, cudaStream_t s) {
    cudaLaunchAttribute attr[1];
    attr[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attr[0].val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    const u32 share = many ? p.share : 1, states = p.state ? p.samples : 0;
    config.gridDim = (p.rows + share - 1) / share + (states + share - 1) / share;
    config.blockDim = 1024, config.stream = s, config.attrs = attr, config.numAttrs = 1;
    void* args[] = {(void*)&p};
    const void* fn = many ? (const void*)denoise_edge_many : (const void*)denoise_edge;
    CHECK(cudaLaunchKernelExC(&config, fn, args));
  }

  struct Result {
    std::vector<float> actions, sums;
    std::vector<u16> fresh, mixed, scaled;
    std::vector<float2> stats;
  };
  Result run(const DenoiseEdgeParams& p, bool many) {
    actions.push();
    fresh.poison(), mixed.poison(), scaled.poison(), sums.poison(), stats.poison();
    launch(p, many, 0);
    CHECK(cudaDeviceSynchronize());
    return {actions.pull(), sums.pull(), fresh.pull(), mixed.pull(), scaled.pull(), stats.pull()};
  }

  // ‖a − b‖ / ‖b‖ where either is written; infinite where only one is.
  static double off(const std::vector<u16>& a, const std::vector<u16>& b) {
    double error = 0, norm = 0;
    for (size_t i = 0; i < a.size(); ++i) {
      if (a[i] == 0xffff && b[i] == 0xffff) continue;
      const double d = value(a[i]) - value(b[i]);
      error += d == d ? d * d : 1e30, norm += (double)value(b[i]) * value(b[i]);
    }
    return norm > 0 ? sqrt(error / norm) : error;
  }

  static size_t written(const std::vector<u16>& a) {
    return a.size() - std::count(a.begin(), a.end(), (u16)0xffff);
  }

  bool check(const Kind& k, int samples, int h) {
    const DenoiseEdgeParams p = params(k, samples, h);
    const Result want = run(p, false), got = run(p, true), again = run(p, true);
    double error = 0, norm = 0, stat_error = 0, stat_norm = 0;
    for (size_t i = 0; i < want.actions.size(); ++i) {
      error += pow(want.actions[i] - got.actions[i], 2), norm += pow(want.actions[i], 2);
    }
    // Of 64 features the squares are those of four sixteens, and the sum is of what was stored.
    for (size_t i = 0; i < got.stats.size(); ++i) {
      const float* four = &want.sums[i * 4];
      if (std::isnan(four[0]) && std::isnan(got.stats[i].y)) continue;
      double sum = 0, squares = 0;
      for (int e = 0; e < 64; ++e) sum += value(got.fresh[i * 64 + e]);
      for (int e = 0; e < 4; ++e) squares += four[e];
      const double x = got.stats[i].x - sum, y = got.stats[i].y - squares;
      stat_error += x == x && y == y ? x * x + y * y : 1e30, stat_norm += squares * squares;
    }
    const double actions_off = sqrt(error / norm), fresh_off = off(got.fresh, want.fresh);
    const double mixed_off = off(got.mixed, want.mixed), scaled_off = off(got.scaled, want.scaled);
    const double stats_off = stat_norm > 0 ? sqrt(stat_error / stat_norm) : stat_error;
    const auto same = [](const auto& a, const auto& b) {
      return !memcmp(a.data(), b.data(), a.size() * sizeof a[0]);
    };
    const bool bits = same(got.actions, again.actions) && same(got.fresh, again.fresh) &&
                      same(got.mixed, again.mixed) && same(got.stats, again.stats);
    const size_t rows = k.in ? samples * h : 0, states = k.state ? samples : 0;
    const bool all = written(got.fresh) == ((k.pi05 ? rows : 0) + states) * 1024 &&
                     written(got.mixed) == (k.pi05 ? 0 : rows) * 1024;
    // Where a sum falls on the other side of a rounding the bf16 differ by 2^-8 at most.
    const bool ok = actions_off < 1e-6 && fresh_off < 1e-3 && mixed_off < 1e-3 &&
                    scaled_off < 1e-3 && stats_off < 1e-3 && bits && all;
    printf("%s%-13s %3d x %2d: actions %.1e, stream %.1e, mixed %.1e, scaled %.1e, stats %.1e, "
           "repeats %s\n", ok ? "" : "FAIL ", k.name, samples, h, actions_off, fresh_off,
           mixed_off, scaled_off, stats_off, bits ? "equal" : "differ");
    return ok;
  }

  float time(const Kind& k, int samples, int h, bool many) {
    const DenoiseEdgeParams p = params(k, samples, h);
    constexpr int kLaunches = 50;
    cudaStream_t s;
    cudaGraph_t g;
    cudaGraphExec_t e;
    cudaEvent_t t0, t1;
    CHECK(cudaStreamCreate(&s));
    CHECK(cudaEventCreate(&t0));
    CHECK(cudaEventCreate(&t1));
    CHECK(cudaStreamBeginCapture(s, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < kLaunches; ++i) launch(p, many, s);
    CHECK(cudaStreamEndCapture(s, &g));
    CHECK(cudaGraphInstantiate(&e, g, 0));
    std::vector<float> us;
    for (int i = 0; i < 12; ++i) {
      CHECK(cudaEventRecord(t0, s));
      CHECK(cudaGraphLaunch(e, s));
      CHECK(cudaEventRecord(t1, s));
      CHECK(cudaStreamSynchronize(s));
      float ms;
      CHECK(cudaEventElapsedTime(&ms, t0, t1));
      us.push_back(ms * 1e3f / kLaunches);
    }
    std::sort(us.begin() + 2, us.end());
    return us[7];
  }
};

int main() {
  Lab lab;
  int bad = 0;
  const int shapes[][2] = {{1, 10}, {3, 7}, {24, 10}, {64, 10}, {61, 11}, {16, 50}, {64, 50}};
  for (const Kind& k : kKinds)
    for (auto [samples, h] : shapes) bad += !lab.check(k, samples, h);
  for (const Kind& k : kKinds)
    for (auto [samples, h] : shapes)
      printf("%-13s %3d x %2d: many %6.2f us, one a row %6.2f us\n", k.name, samples, h,
             lab.time(k, samples, h, true), lab.time(k, samples, h, false));
  printf("%d bad\n", bad);
  return bad != 0;
}
