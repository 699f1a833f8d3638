// Checks and times the attention, patchify and embed kernels: random inputs against CUDA-core FP32
// references, poisoned outputs, NaN in every hidden row, 20 repeats bit for bit, times in a graph.
//
// nvcc -O3 -std=c++17 -gencode=arch=compute_90a,code=sm_90a -o attention attention.cu
// ./attention [check] [time] [prefill] [vision]: `prefill` times that alone (BATCH=64: of that
// batch), `vision` checks and times that alone (IMAGES=192: times of so many).
#include "attention_bench.cuh"

#include "../kernels/attention_prefill_sm90.cu"
#include "../kernels/attention_suffix.cu"
#include "../kernels/attention_vision_sm90.cu"
#include "../kernels/embed.cu"
#include "../kernels/patchify.cu"

namespace lab {

// ---- prefix attention --------------------------------------------------------------------------

struct PrefillVariant {
    const char* name;
    const void* kernel;
    u32 split;
    bool walks;  // a CTA goes from row tile to row tile
};
const PrefillVariant kPrefill[] = {
    {"split1", (const void*)attention_prefill_sm90_split1, 1, true},
    {"split2", (const void*)attention_prefill_sm90_split2, 2, false},
};

Launch wide_launch(const PrefillVariant& x, u32 rows, u32 batch) {
    static const u32 sms = [] {
        cudaDeviceProp of;
        CHECK(cudaGetDeviceProperties(&of, 0));
        return u32(of.multiProcessorCount);
    }();
    const u32 tiles = (rows * 8 + prefill::kRows - 1) / prefill::kRows;
    const dim3 grid = x.walks ? dim3(std::min(tiles * batch, sms)) : dim3(tiles * x.split, batch);
    return {x.name, x.kernel, grid, prefill::kThreads, prefill::kSmem, x.split, {}};
}

struct Prefill {
    u32 batch, rows, cache_rows;
    std::vector<u32> lens;  // cameras, prompt of each sample
    Buffer<u32> lengths;
    Random q, k, v;
    Buffer<u16> out;
    Prefill(u32 rows_, std::vector<u32> lens_)
        : batch(lens_.size() / 2), rows(rows_), cache_rows(rows_ + 51), lens(lens_), lengths(lens_),
          q(size_t(batch) * rows * 2048, 0.2f, 1), k(size_t(batch) * cache_rows * 256, 1.f, 2),
          v(size_t(batch) * cache_rows * 256, 1.f, 3), out(size_t(batch) * rows * 2048) {
        for (u32 b = 0; b < batch; ++b) {
            q.spoil(b * rows + length(b), (b + 1) * rows, 2048);
            k.spoil(b * cache_rows + length(b), (b + 1) * cache_rows, 256);
            v.spoil(b * cache_rows + length(b), (b + 1) * cache_rows, 256);
        }
    }
    u32 length(u32 b) const { return lens[2 * b] * 256 + lens[2 * b + 1]; }
    AttentionGenericParams shape(u16* to) const {
        return {q.at, k.at, v.at, to, lengths.at, rows, cache_rows, 8, 1, 256, 2048, 256, 256,
                2048, rows, cache_rows, cache_rows, rows, 1, rows, 0, 256};
    }
    Launch launch(const PrefillVariant& x) {
        Launch l = wide_launch(x, rows, batch);
        l.add(AttentionPrefillParams{out.at, lengths.at, rows, rows, rows, cache_rows, 256,
                                     rows, 0, 0, batch, 0});
        l.add(map_rows(q.at, u64(batch) * rows * 8, prefill::kRows));
        l.add(map_rows(k.at, u64(batch) * cache_rows, prefill::kKeys));
        l.add(map_rows(v.at, u64(batch) * cache_rows, prefill::kKeys));
        return l;
    }
    bool live(size_t i) const { return i / 2048 % rows < length(i / 2048 / rows); }
};

void check_prefill(u32 rows, std::vector<u32> lens, bool generic_too) {
    Prefill p(rows, lens);
    const auto want = expected(p.shape(p.out.at), p.batch, p.out.count);
    const auto live = [&](size_t i) { return p.live(i); };
    char name[96];
    for (const auto& x : kPrefill) {
        p.out.poison();
        Launch l = p.launch(x);
        l.run();
        const auto got = p.out.host();
        bool zeros = true;
        for (size_t i = 0; i < got.size(); ++i) zeros &= live(i) || got[i] == 0;
        const bool same = p.batch > 3 || repeats(l, p.out);
        snprintf(name, sizeof name, "prefill %-11s B %u P %u first len %u%s%s", x.name, p.batch,
                 rows, p.length(0), zeros ? "" : " NOT ZEROED", same ? "" : " NOT STABLE");
        report(name, relative(got, want, live), zeros && same);
    }
    if (!generic_too) return;
    p.out.poison();
    attention_generic<<<dim3((rows + 3) / 4, 8, p.batch), 128, 0, stream>>>(p.shape(p.out.at));
    CHECK(cudaStreamSynchronize(stream));
    snprintf(name, sizeof name, "generic prefix B %u P %u", p.batch, rows);
    report(name, relative(p.out.host(), want, live));
}

// ---- denoise attention -------------------------------------------------------------------------

struct SuffixVariant {
    const char* name;
    const void* kernel;
    u32 tiles, cluster;  // 16-row tiles of a CTA, CTAs that share the keys
};
// The prefill's kernel.
const PrefillVariant kWide[] = {
    {"wide1", (const void*)attention_batch_sm90_split1, 1, false},
    {"wide2", (const void*)attention_batch_sm90_split2, 2, false},
};
const SuffixVariant kSuffix[] = {
    {"r16_c8", (const void*)attention_suffix_r16_c8, 1, 8},
    {"r32_c8", (const void*)attention_suffix_r32_c8, 2, 8},
    {"r80_c8", (const void*)attention_suffix_r80_c8, 5, 8},
};

u32 suffix_smem(u32 tiles, u32 cluster, u32 slots) {
    const u32 rows = 16 * tiles;
    return rows * (592 + 8 * suffix::kWarps + 2 * slots + 8 * cluster) + slots * 528 + 16;
}

struct Suffix {
    u32 batch, rows, h, extra, state, cache_rows;  // extra: suffix keys that are not queries
    std::vector<u32> lens;
    Buffer<u32> lengths;
    Random q, k, v;
    Buffer<u16> out;
    Suffix(u32 rows_, u32 h_, u32 extra_, u32 state_, std::vector<u32> lens_)
        : batch(lens_.size() / 2), rows(rows_), h(h_), extra(extra_), state(state_),
          cache_rows(rows_ + h_ + extra_), lens(lens_), lengths(lens_),
          q(size_t(batch) * h * 2048, 0.2f, 1), k(size_t(batch) * cache_rows * 256, 1.f, 2),
          v(size_t(batch) * cache_rows * 256, 1.f, 3), out(size_t(batch) * h * 2048) {
        for (u32 b = 0; b < batch; ++b) {
            const u32 len = lens[2 * b] * 256 + lens[2 * b + 1];
            k.spoil(b * cache_rows + len, b * cache_rows + rows, 256);
            v.spoil(b * cache_rows + len, b * cache_rows + rows, 256);
        }
    }
    AttentionGenericParams shape(u16* to) const {
        return {q.at, k.at, v.at, to, lengths.at, h, cache_rows, 8, 1, 256, 2048, 256, 256, 2048,
                h, cache_rows, cache_rows, h, 2, rows, state, 256};
    }
    Launch launch(const SuffixVariant& x) {
        const auto share = [&](u32 n) { return (n + x.cluster - 1) / x.cluster; };
        const u32 slots = (share(rows) + share(h + extra) + 15) / 16 * 16, m = 16 * x.tiles;
        Launch l{x.name, x.kernel, dim3(x.cluster, (h * 8 + m - 1) / m, batch), suffix::kThreads,
                 suffix_smem(x.tiles, x.cluster, slots), x.cluster, {}};
        l.add(AttentionSuffixParams{q.at, k.at, v.at, out.at, lengths.at, h, h, h, 2048, 32,
                                    cache_rows, rows, h + extra, 256, slots, state, 1});
        return l;
    }
    Launch launch(const PrefillVariant& x) {
        Launch l = wide_launch(x, h, batch);
        l.add(AttentionPrefillParams{out.at, lengths.at, h, h, h, cache_rows, 256, rows, h + extra,
                                     state, batch, 1});
        l.add(map_rows(q.at, u64(batch) * h * 8, prefill::kRows));
        l.add(map_rows(k.at, u64(batch) * cache_rows, prefill::kKeys));
        l.add(map_rows(v.at, u64(batch) * cache_rows, prefill::kKeys));
        return l;
    }
};

void check_suffix(u32 rows, u32 h, u32 extra, u32 state, std::vector<u32> lens) {
    Suffix s(rows, h, extra, state, lens);
    const auto want = expected(s.shape(s.out.at), s.batch, s.out.count);
    const auto all = [](size_t) { return true; };
    double worst = 0;
    bool same = true;
    std::string bad;
    const auto check = [&](Launch l) {
        s.out.poison();
        l.run();
        const double e = relative(s.out.host(), want, all);
        const bool stable = repeats(l, s.out);
        if (!(e <= kTolerance) || !stable) bad += " " + l.name;
        worst = std::max(worst, e);
        same &= stable;
    };
    for (const auto& x : kSuffix) check(s.launch(x));
    for (const auto& x : kWide) check(s.launch(x));
    s.out.poison();
    attention_generic<<<dim3((h + 3) / 4, 8, s.batch), 128, 0, stream>>>(s.shape(s.out.at));
    CHECK(cudaStreamSynchronize(stream));
    const double e = relative(s.out.host(), want, all);
    if (!(e <= kTolerance)) bad += " generic";
    char name[128];
    snprintf(name, sizeof name, "suffix, all B %u P %u h %u+%u state %u%s%s", s.batch, rows, h,
             extra, state, bad.c_str(), same ? "" : " NOT STABLE");
    report(name, std::max(worst, e), same);
}

// ---- SigLIP attention --------------------------------------------------------------------------

struct Vision {
    u32 images;
    Random qkv;
    Buffer<u16> out;
    explicit Vision(u32 n)
        : images(n), qkv(size_t(n) * 256 * 3456, 0.55f, 4), out(size_t(n) * 256 * 1152) {}
    AttentionGenericParams shape() const {
        return {qkv.at, qkv.at + 1152, qkv.at + 2304, out.at, nullptr, 256, 256, 16, 16, 72, 3456,
                3456, 3456, 1152, 256, 256, 256, 256, 0, 0, 0, 0};
    }
    Launch launch(bool many) {
        const u32 heads = images * 16;
        Launch l{"vision", (const void*)attention_vision_sm90, dim3(2, 16, images), 256,
                 vision::kSmem, 1, {}};
        if (many) {
            int sms;
            CHECK(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, 0));
            l = {"vision, many", (const void*)attention_vision_many_sm90,
                 dim3(std::min<u32>(sms, heads)), vision_many::kRingThreads,
                 vision_many::kRingSmem, 1, {}};
        }
        l.add(AttentionVisionParams{out.at, 1.f, heads});
        const auto map = [&](u16* at, u64 slots, u32 cols, u32 rows) {
            return map_tensor(at, {72, slots, u64(images) * 256}, {144, slots * 144},
                              {cols, 1, rows},
                              cols == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_32B);
        };
        for (u32 cols : {64, 16}) l.add(map(qkv.at, 48, cols, 128));
        if (many)
            for (u32 cols : {64, 16}) l.add(map(out.at, 16, cols, 64));
        return l;
    }
};

void check_vision(u32 images) {
    Vision x(images);
    const auto want = expected(x.shape(), images, x.out.count);
    for (const bool many : {false, true}) {
        x.out.poison();
        Launch l = x.launch(many);
        l.run();
        const double e = relative(x.out.host(), want, [](size_t) { return true; });
        report(l.name + ", images " + std::to_string(images), e, repeats(l, x.out));
    }
    x.out.poison();
    attention_generic<<<dim3(64, 16, images), 128, 0, stream>>>(x.shape());
    CHECK(cudaStreamSynchronize(stream));
    report("generic 16 x 72, images " + std::to_string(images),
           relative(x.out.host(), want, [](size_t) { return true; }));
}

// ---- patchify, embed ---------------------------------------------------------------------------

void check_patchify(u32 images, u32 side, u32 patch, u32 stride) {
    std::vector<u8> pixels(size_t(images) * side * side * 3);
    u32 x = 1;
    for (auto& p : pixels) p = (x = x * 1664525 + 1013904223) >> 24;
    Buffer<u8> in(pixels);
    const u32 n = side / patch;
    Buffer<u16> out(size_t(images) * n * n * stride);
    out.poison();
    Launch l{"patchify", (const void*)patchify, dim3(n, images), 256,
             (patch * side * 3 + 15) / 16 * 16, 1, {}};
    l.add(PatchifyParams{in.at, out.at, side, patch, stride, 0});
    l.run();
    const auto got = out.host();
    size_t wrong = 0;
    for (size_t i = 0; i < got.size(); ++i) {
        const u32 k = i % stride, token = i / stride % (n * n), image = i / stride / (n * n);
        const u32 line = patch * 3, y = token / n * patch + k / line;
        const size_t at = (size_t(image) * side + y) * side * 3 + token % n * line + k % line;
        wrong += value(got[i]) != (k < line * patch ? float(pixels[at]) - 128.f : 0.f);
    }
    char name[64];
    snprintf(name, sizeof name, "patchify %u x %u / %u to %u", images, side, patch, stride);
    report(name, double(wrong));
    if (side == 224) printf("  patchify %u images: %.2f us\n", images, l.microseconds());
}

void check_embed(u32 rows, u32 width, u32 parts, std::vector<u32> lens) {
    const u32 batch = lens.size() / 2, vocab = 1000, slots = 200;
    Random table(size_t(vocab) * width, 0.05f, 9);
    std::vector<u32> ids(batch * slots);
    for (u32 i = 0; i < ids.size(); ++i) ids[i] = i * 7919 % vocab;
    Buffer<u32> tokens(ids), lengths(lens);
    Buffer<u16> stream_rows(size_t(batch) * rows * width);
    Buffer<float2> stats(size_t(batch) * rows * parts);
    stream_rows.poison();
    stats.poison();
    const float scale = std::sqrt(float(width));
    Launch l{"embed", (const void*)embed, dim3(rows, batch), 256, 0, 1, {}};
    l.add(EmbedParams{tokens.at, lengths.at, table.at, stream_rows.at, nullptr, nullptr, stats.at,
                      vocab, width, slots, rows, 256, parts, scale, 0});
    l.run();
    const auto got = stream_rows.host(), source = table.host();
    const auto sums = stats.host();
    double wrong = 0;
    for (size_t r = 0; r < size_t(batch) * rows; ++r) {
        const u32 b = r / rows, i = r % rows, first = lens[2 * b] * 256;
        double s = 0, s2 = 0;
        for (u32 c = 0; c < width; ++c) {
            const u16 x = got[r * width + c];
            if (i < first) { wrong += x != 0xffff; continue; }
            float want = 0.f;
            if (i - first < lens[2 * b + 1])
                want = value(source[ids[b * slots + i - first] * size_t(width) + c]) * scale;
            wrong += !(std::fabs(value(x) - want) <= std::fabs(want) * 0.0040);
            s += value(x);
            s2 += double(value(x)) * value(x);
        }
        if (i < first) continue;
        const float2* sum = &sums[r * parts];
        wrong += !(std::fabs(sum->x - s) < 1e-2) + !(std::fabs(sum->y - s2) <= 1e-4 * s2);
        for (u32 t = 1; t < parts; ++t) wrong += sum[t].x != 0 || sum[t].y != 0;
    }
    report("embed B " + std::to_string(batch) + " width " + std::to_string(width), wrong);
    if (batch == 1) printf("  embed P %u: %.2f us\n", rows, l.microseconds());
}

// ---- dependent launch ---------------------------------------------------------------------------

void check_dependence() {
    Prefill p(788, {3, 20});
    for (const auto& x : kPrefill) {
        check_dependent("prefill q", p.launch(x), p.q.at, p.q.count, p.out);
        check_dependent("prefill v", p.launch(x), p.v.at, p.v.count, p.out);
    }
    Suffix s(788, 11, 0, 1, {3, 20});
    for (const auto& x : kWide) {
        const size_t n = size_t(s.h) * 256;
        check_dependent("suffix q, wide", s.launch(x), s.q.at, s.q.count, s.out);
        check_dependent("suffix own k, wide", s.launch(x), s.k.at + size_t(788) * 256, n, s.out);
        check_dependent("suffix own v, wide", s.launch(x), s.v.at + size_t(788) * 256, n, s.out);
        Launch first = s.launch(x);
        reinterpret_cast<AttentionPrefillParams*>(first.args[0].data())->prefix_ready = 0;
        check_dependent("suffix, prefix k, wide", first, s.k.at, s.k.count, s.out);
        check_dependent("suffix, prefix v, wide", first, s.v.at, s.v.count, s.out);
    }
    for (const auto& x : kSuffix) {
        const size_t n = size_t(s.h) * 256;
        check_dependent("suffix q", s.launch(x), s.q.at, s.q.count, s.out);
        check_dependent("suffix own k", s.launch(x), s.k.at + size_t(788) * 256, n, s.out);
        check_dependent("suffix own v", s.launch(x), s.v.at + size_t(788) * 256, n, s.out);
        Launch first = s.launch(x);  // the first step: the whole cache is new
        reinterpret_cast<AttentionSuffixParams*>(first.args[0].data())->prefix_ready = 0;
        check_dependent("suffix, prefix k", first, s.k.at, s.k.count, s.out);
    }
}

// ---- tables ------------------------------------------------------------------------------------

void check_vision() {
    for (u32 n : {1, 3, 8, 29}) check_vision(n);
    Vision v(3);
    for (const bool many : {false, true})
        check_dependent("vision", v.launch(many), v.qkv.at, v.qkv.count, v.out);
}

void check_all() {
    check_patchify(3, 224, 14, 640);
    check_patchify(5, 42, 14, 592);
    check_embed(788, 2048, 16, {3, 20});
    check_embed(968, 64, 1, {3, 1, 1, 200, 2, 16});
    check_vision();
    check_prefill(788, {3, 20}, true);
    check_prefill(968, {3, 200}, false);
    check_prefill(524, {2, 12}, false);
    check_prefill(968, {1, 1, 3, 16}, true);
    check_prefill(788, {1, 1}, false);
    check_prefill(788, {0, 5, 0, 81}, false);
    check_prefill(968, {3, 16, 1, 1, 2, 200}, false);
    check_prefill(788, {3, 20, 1, 1, 2, 16, 3, 20, 1, 20, 3, 0, 2, 1, 3, 19}, false);
    for (u32 h : {1, 10, 11, 15, 16, 50, 51, 64}) {
        check_suffix(788, h, 0, h % 2, {3, 20});
        check_suffix(788, h, 1, 0, {3, 20});
    }
    check_suffix(968, 50, 0, 1, {3, 200});
    check_suffix(968, 51, 0, 1, {1, 1, 3, 200});
    check_suffix(968, 10, 1, 0, {1, 1, 3, 16, 2, 20});
    check_dependence();
    check_suffix(788, 11, 0, 1, {3, 20, 1, 1, 2, 16, 3, 20, 1, 20, 3, 1, 2, 1, 3, 19});
}

std::vector<u32> same_lengths(u32 batch, u32 cameras, u32 prompt) {
    std::vector<u32> x;
    for (u32 b = 0; b < batch; ++b) x.insert(x.end(), {cameras, prompt});
    return x;
}

void time_vision() {
    const char* only = getenv("IMAGES");
    for (u32 images : {3, 6, 9, 12, 24, 48, 192}) {
        if (only && images != u32(atoi(only))) continue;
        Vision x(images);
        printf("vision %3u images:", images);
        printf(" %.2f", x.launch(false).microseconds());
        printf("  many %.2f\n", x.launch(true).microseconds());
    }
}

void time_prefill() {
    struct { u32 batch, cameras, prompt; } prefixes[] = {
        {1, 3, 20}, {1, 3, 200}, {1, 2, 12}, {2, 3, 20}, {8, 3, 20}, {32, 3, 20}, {64, 3, 20}};
    const char* only = getenv("BATCH");
    for (auto& s : prefixes) {
        if (only && s.batch != u32(atoi(only))) continue;
        const u32 rows = s.cameras * 256 + s.prompt;
        Prefill p(rows, same_lengths(s.batch, s.cameras, s.prompt));
        const double flop = 4. * rows * 8 * rows * 256 * s.batch;
        printf("prefill B %2u P %u:", s.batch, rows);
        for (const auto& x : kPrefill) {
            const double us = p.launch(x).microseconds();
            printf("  %s %.2f (%.0f)", x.name, us, flop / us * 1e-6);
        }
        printf("\n");
    }
}

void time_suffix() {
    struct { u32 batch, prompt, h, extra; } suffixes[] = {
        {1, 20, 10, 0}, {1, 20, 10, 1}, {1, 20, 11, 0}, {1, 20, 50, 0}, {1, 20, 50, 1},
        {1, 200, 50, 0}, {2, 20, 10, 1},  {8, 20, 10, 1}, {8, 20, 50, 1}, {64, 20, 10, 1},
        {64, 20, 50, 1}};
    for (auto& s : suffixes) {
        Suffix x(768 + s.prompt, s.h, s.extra, 0, same_lengths(s.batch, 3, s.prompt));
        printf("suffix B %2u P %u h %u+%u:", s.batch, 768 + s.prompt, s.h, s.extra);
        for (const auto& v : kSuffix) printf("  %s %.2f", v.name, x.launch(v).microseconds());
        for (const auto& v : kWide) printf("  %s %.2f", v.name, x.launch(v).microseconds());
        printf("\n");
    }
}

}  // namespace lab

int main(int argc, char** argv) {
    setvbuf(stdout, nullptr, _IOLBF, 0);
    CHECK(cudaStreamCreate(&lab::stream));
    const auto asked = [&](const char* what) {
        for (int i = 1; i < argc; ++i)
            if (!strcmp(argv[i], what)) return true;
        return argc == 1;
    };
    if (asked("check")) lab::check_all();
    if (asked("vision") && !asked("check") && !getenv("IMAGES")) lab::check_vision();
    if (asked("time") || asked("prefill") || asked("vision"))
        printf("\nmicroseconds a launch, chain of 20 with dependent launch in a graph\n");
    if (asked("time") || asked("vision")) lab::time_vision();
    if (asked("time") || asked("prefill")) lab::time_prefill();
    if (asked("time")) lab::time_suffix();
    printf("failures: %d\n", lab::failures);
    return lab::failures != 0;
}
