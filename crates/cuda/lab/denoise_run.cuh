// The lab's checks and tables (second half of denoise.cu).

float time_list(const std::vector<Launch>& list, cudaStream_t stream, int n = 25) {
  cudaGraphExec_t exec = capture(list, stream);
  const float ms = median_ms(exec, stream, n);
  CHECK(cudaGraphExecDestroy(exec));
  return ms;
}

template <class T>
std::vector<float> host(const T* p, size_t n) {
  std::vector<T> raw(n);
  CHECK(cudaMemcpy(raw.data(), p, n * sizeof(T), cudaMemcpyDeviceToHost));
  std::vector<float> out(n);
  for (size_t i = 0; i < n; ++i) out[i] = (float)raw[i];
  return out;
}

double difference(const std::vector<float>& a, const std::vector<float>& ref) {
  double d = 0, r = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    d += (a[i] - ref[i]) * (double)(a[i] - ref[i]);
    r += ref[i] * (double)ref[i];
    if (!std::isfinite(a[i])) return 1e30;
  }
  return std::sqrt(d / (r + 1e-300));
}

// The loop in plain kernels, one sample; with `check`, every fast kernel of step 0 and the last
// step's first and last layers is run on the reference's inputs and compared.
struct Reference {
  const Model& m;
  const Case& c;
  Arena a;
  double worst[kKinds] = {};

  Reference(const Model& m, const Case& c) : m(m), c(c), a(c) {}

  void linear(const bf16* x, const Weight& w, int n, int k, int norm, const float* table, int first,
              int rows) {
    RefProduct p{x, w.plain, a.y, table, rows, n, k, norm, first};
    ref_product<<<dim3(n / 8, rows), 256>>>(p);
  }

  // Runs a fast kernel on this arena's inputs and returns a copy of `out`, which is put back.
  std::vector<float> probe(const Launch& l, bf16* out, size_t n, bool poison) {
    std::vector<char> saved(n * 2);
    CHECK(cudaMemcpy(saved.data(), out, n * 2, cudaMemcpyDeviceToHost));
    if (poison) CHECK(cudaMemset(out, 0xff, n * 2));
    launch(l, 0, false);
    CHECK(cudaDeviceSynchronize());
    std::vector<float> got = host(out, n);
    CHECK(cudaMemcpy(out, saved.data(), n * 2, cudaMemcpyHostToDevice));
    return got;
  }

  // The same where the kernel may hand its rows on in blocks.
  std::vector<float> probe(const Launch& l, const Loop::Place& to, bf16* plain, const Blocked& b) {
    const DenoiseRows& r = to.rows;
    const int width = b.count / b.step * 32;
    if (to.at == (u16*)plain) return probe(l, plain + r.first * width, r.count * width, true);
    const std::vector<float> raw = probe(l, b.at, b.count, true);
    std::vector<float> got;
    for (u32 i = 0; i < r.count; ++i)
      for (int c = 0; c < width; ++c)
        got.push_back(raw[(r.first + i) * 32 + c / 32 * b.step + c % 32]);
    return got;
  }

  void note(Kind kind, const std::vector<float>& got, const bf16* ref, size_t n) {
    worst[kind] = std::max(worst[kind], difference(got, host(ref, n)));
  }

  void run(const Choice& choice) {
    Loop loop{m, a, c, choice, {}};
    loop.build();
    size_t at = 0;
    CHECK(cudaMemcpy(a.actions, a.noise, a.action_bytes, cudaMemcpyDeviceToDevice));
    for (int s = 0; s < kSteps; ++s) {
      const bool state = s == 0 && !c.pi05;
      const int first = c.pi05 || state ? 0 : 1, rows = c.tokens() - first;
      ++at;
      if (c.pi05) {
        ref_in<<<c.h, 1024>>>(a.actions, m.in_weight, m.in_bias + s * 1024, a.stream, 0, 0);
      } else {
        ref_in<<<c.h, 1024>>>(a.actions, m.in_weight, m.in_bias + s * 1024, a.u, 0, 1);
        if (state) ref_in<<<1, 1024>>>(a.state, m.state_weight, m.state_bias, a.stream, 0, 0);
        linear(a.u, m.mlp, 1024, 1024, 0, nullptr, 0, c.h);
        auto got = probe(loop.list[at++], a.stream + 1024, c.h * 1024, true);
        ref_finish<<<c.h, 256>>>(a.y, a.stream, m.mlp_bias, 1024, 1, 2);
        note(kMlp, got, a.stream + 1024, c.h * 1024);
      }
      for (int l = 0; l < kLayers; ++l, at += 5) layer(l, s, first, rows, state, loop, at);
      ref_out<<<c.h, 32>>>(a.stream, c.pi05 ? m.final_table + s * 3072 : nullptr, m.out_weight,
                           m.out_bias, a.actions, c.pi05 ? 0 : 1);
    }
    CHECK(cudaDeviceSynchronize());
  }

  void to_blocks(const bf16* plain, const Blocked& b, int width) {
    if (c.tokens() > 16) return;
    ref_blocks<<<c.tokens(), 256>>>(plain, b.at, width, b.step);
  }

  void layer(int l, int s, int first, int rows, bool state, const Loop& loop, size_t at) {
    const Launch* fast = &loop.list[at];
    const Layer& w = m.layer[l];
    const bool check = (s == 0 || s == kSteps - 1) && (l == 0 || l == kLayers - 1);
    const float *t1 = w.table1 + (c.pi05 ? s : 0) * 3072, *t2 = w.table2 + (c.pi05 ? s : 0) * 3072;
    const int norm = c.pi05 ? 2 : 1;
    std::vector<float> got, got_k, got_v;
    bf16 *k = a.k[l] + (kPrefix + first) * 256, *v = a.v[l] + (kPrefix + first) * 256;
    bf16 *q = a.q + first * 2048, *x = a.stream + first * 1024;
    if (check) {
      ref_sums<<<c.tokens(), 64>>>(a.stream, a.sums, a.middle_sums);
      ref_scale<<<c.tokens(), 1024>>>(a.stream, a.scaled, t1);
      to_blocks(a.scaled, a.scaled_blocks, 1024);
      got = probe(fast[0], q, rows * 2048, true);
      got_k = probe(fast[0], k, rows * 256, true);
      got_v = probe(fast[0], v, rows * 256, true);
    }
    linear(a.stream, w.qkv, 2560, 1024, norm, t1, first, rows);
    ref_rope<<<rows, 256>>>(a.y, a.q, a.k[l], a.v[l], m.rope, first, kPrefix + first,
                            kPrefix + first);
    if (check) {
      note(kQkv, got, q, rows * 2048);
      note(kQkv, got_k, k, rows * 256);
      note(kQkv, got_v, v, rows * 256);
      got = probe(fast[1], loop.attended(state), a.attended, a.attended_blocks);
    }
    ref_attention<<<dim3(rows, 8), 256>>>(a.q, a.k[l], a.v[l], a.attended, first,
                                          kPrefix + c.tokens(), kPrefix, kPrefix, state);
    if (check) {
      note(kAttention, got, a.attended + first * 2048, rows * 2048);
      to_blocks(a.attended, a.attended_blocks, 2048);
      got = probe(fast[2], x, rows * 1024, false);
    }
    linear(a.attended, w.o, 1024, 2048, 0, nullptr, first, rows);
    ref_finish<<<rows, 256>>>(a.y, a.stream, c.pi05 ? t1 + 2048 : nullptr, 1024, first, 0);
    if (check) {
      note(kO, got, x, rows * 1024);
      ref_sums<<<c.tokens(), 64>>>(a.stream, a.sums, a.middle_sums);
      ref_scale<<<c.tokens(), 1024>>>(a.stream, a.scaled, t2);
      to_blocks(a.scaled, a.scaled_blocks, 1024);
      got = probe(fast[3], loop.hidden(state), a.hidden, a.hidden_blocks);
    }
    linear(a.stream, w.gu, 8192, 1024, norm, t2, first, rows);
    ref_finish<<<rows, 256>>>(a.y, a.hidden, nullptr, 4096, first, 1);
    if (check) {
      note(kGateUp, got, a.hidden + first * 4096, rows * 4096);
      to_blocks(a.hidden, a.hidden_blocks, 4096);
      got = probe(fast[4], x, rows * 1024, false);
    }
    linear(a.hidden, w.down, 1024, 4096, 0, nullptr, first, rows);
    ref_finish<<<rows, 256>>>(a.y, a.stream, c.pi05 ? t2 + 2048 : nullptr, 1024, first, 0);
    if (check) note(kDown, got, x, rows * 1024);
  }
};

// Checks one choice of kernels in one case, then times it whole and with kinds left out.
void study(const Model& m, const Case& c, const Choice& choice, Reference& ref, int replays,
           bool table, cudaStream_t stream) {
  Arena a(c);
  Loop loop{m, a, c, choice, {}};
  loop.build();
  cudaGraphExec_t exec = capture(loop.list, stream);
  std::vector<float> first;
  int bad = 0;
  double error = 0;
  for (int i = 0; i < replays; ++i) {
    CHECK(cudaMemcpyAsync(a.actions, a.noise, a.action_bytes, cudaMemcpyDeviceToDevice, stream));
    CHECK(cudaGraphLaunch(exec, stream));
    CHECK(cudaStreamSynchronize(stream));
    std::vector<float> got = host(a.actions, a.action_bytes / 4);
    if (i == 0) {
      first = got;
      const size_t n = (size_t)c.h * 32;
      for (int s = 0; s < c.samples; ++s) {
        std::vector<float> one(got.begin() + s * n, got.begin() + (s + 1) * n);
        error = std::max(error, difference(one, host(ref.a.actions, n)));
        bad += memcmp(one.data(), got.data(), n * 4) != 0;  // samples are alike
      }
    }
    bad += memcmp(first.data(), got.data(), a.action_bytes) != 0;
  }
  CHECK(cudaGraphExecDestroy(exec));
  printf("%s h=%d B=%d [%s %s %s %s]: loop %.3f ms, error %.2e, %d of %d replays differ\n",
         c.pi05 ? "pi05" : "pi0", c.h, c.samples, choice.qkv.name, choice.o.name, choice.gu.name,
         choice.down.name, time_list(loop.list, stream), error, bad, replays);
  fflush(stdout);
  if (!table) return;
  const float whole = time_list(loop.list, stream);
  for (int k = 0; k < kKinds; ++k) {
    std::vector<Launch> without, only;
    for (const Launch& l : loop.list) (l.kind == k ? only : without).push_back(l);
    if (only.empty()) continue;
    const float w = time_list(without, stream, 11), o = time_list(only, stream, 11);
    printf("  %-10s x%-4zu by difference %.2f us, alone %.2f us\n", kKindNames[k], only.size(),
           (whole - w) * 1e3 / only.size(), o * 1e3 / only.size());
  }
}

void print_worst(const Reference& r) {
  printf("%s h=%d kernel errors:", r.c.pi05 ? "pi05" : "pi0", r.c.h);
  for (int k = 0; k < kEdge; ++k) printf(" %s %.1e", kKindNames[k], r.worst[k]);
  printf("\n");
  fflush(stdout);
}

const Choice rows_16{SHAPE(denoise_qkv_16, 1, 1024, 1), SHAPE(denoise_o_16, 1, 1024, 2),
                     SHAPE(denoise_gate_up_16, 2, 1024, 1), SHAPE(denoise_down_16, 1, 1024, 4),
                     SHAPE(denoise_mlp_out_16, 1, 1024, 1)};

// The narrowest kernels that take the rows, and the attention the host would choose.
Choice choice_for(const Case& c) {
  const int rows = c.samples * c.tokens(), heads = (c.tokens() * 8 + 15) / 16 * c.samples;
  Choice choice = rows_16;
  for (const char* width : {"24", "56", "88"}) {
    if (rows <= 16 || rows > atoi(width)) continue;
    const std::string w = width;
    choice = {wide("denoise_qkv_" + w), wide("denoise_o_" + w), wide("denoise_gate_up_" + w),
              wide("denoise_down_" + w), wide("denoise_mlp_out_" + w)};
    break;
  }
  choice.attention = heads <= 28 ? 1 : heads <= 96 ? 2 : 5;
  return choice;
}

#ifdef DENOISE_VARIANTS
#include DENOISE_VARIANTS
#else
void run_variants(const Model&, cudaStream_t, const Case&, Reference&) {}
#endif
void run_cases(const Model& m, cudaStream_t stream) {
  const Case cases[] = {{false, 10, 1}, {true, 10, 1}, {false, 50, 1}, {true, 50, 1}};
  for (const Case& c : cases) {
    Reference ref(m, c);
    ref.run(choice_for(c));
    print_worst(ref);
    study(m, c, choice_for(c), ref, c.h == 10 ? 200 : 50, true, stream);
    run_variants(m, stream, c, ref);
    Case batch = c;
    for (const int samples : {2, 4, 8}) {
      batch.samples = samples;
      if (samples * c.tokens() > 88) break;
      study(m, batch, choice_for(batch), ref, 3, true, stream);
    }
  }
}

int main() {
  cudaDeviceProp prop;
  CHECK(cudaGetDeviceProperties(&prop, 0));
  printf("%s, %d SMs\n", prop.name, prop.multiProcessorCount);
  cudaStream_t stream;
  CHECK(cudaStreamCreate(&stream));
  cudaDriverEntryPointQueryResult found;
  CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", (void**)&encode_tiled, 12000,
                                         cudaEnableDefault, &found));
  Model m;
  run_cases(m, stream);
  CHECK(cudaDeviceSynchronize());
  return 0;
}
