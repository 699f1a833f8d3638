// Checks and times every instance of gemm_sm90.cu at π0's vision and prefill shapes, and of
// gemm_loop_sm90.cu at those of its loop of many rows, of gemm_e4m3_sm90.cu at fp8's, standalone:
// nvcc -O3 -std=c++17 -gencode=arch=compute_90a,code=sm_90a -o gemm gemm.cu
// ./gemm table | check [1 part-of-case-or-instance] | time [batch] [case] [prefix] [instance]: the
// instances; relative L2 against a plain f32 product, poisoned outputs,
// odd row counts, bit-equal repeats; microseconds per launch inside a graph with dependent launch
// and weights that are cold in L2. IDLE=microseconds of pause between replays keeps the card's
// power limit out of it, SUSTAIN=seconds of replays without one lets it settle. With -DGEMM_TRACE
// `time` prints where a CTA's clocks go, and ./gemm chain what lies between two products: layers of
// vision's and of the prefill's in a row, and how long after the last CTA in front has ended.
#include <cudaTypedefs.h>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <algorithm>
#include <string>
#include <unistd.h>
#include <vector>
#include <cuda_runtime.h>
#ifdef GEMM_TRACE
struct Stamp {
    long long clock, ns;
};
constexpr int STAMPS = 10, STAMPED = 256 * 132;
__device__ Stamp stamps[STAMPED][STAMPS];
// A chain's launches have numbers, in a parameter of the loop's products.
static __device__ __forceinline__ void stamp(unsigned launch, int i) {
    Stamp at;
    asm volatile("mov.u64 %0, %%clock64;" : "=l"(at.clock));
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(at.ns));
    stamps[launch * 132 + blockIdx.x][i] = at;
}
#define GEMM_MARK(i) if (threadIdx.x == 128) stamp(p.first_position, i)
#define GEMM_MARK_PRODUCER(i) stamp(p.first_position, i)
#endif
#include "../kernels/gemm_sm90.cu"
#include "../kernels/gemm_loop_sm90.cu"
#include "../kernels/gemm_e4m3_sm90.cu"
#include "gemm_reference.cuh"
#include "power.cuh"

#define CHECK(e)                                                                       \
    do {                                                                               \
        cudaError_t err = (e);                                                         \
        if (err != cudaSuccess) {                                                      \
            printf("line %d: %s: %s\n", __LINE__, #e, cudaGetErrorString(err));        \
            exit(1);                                                                   \
        }                                                                              \
    } while (0)

struct Instance {
    const char* name;
    const void* kernel;
    int bm, bn, cluster, cn, ck, smem, shares, threads;
    gemm::Epilogue epilogue;
    bool of_loop, upright, e4m3;
};
template <class T> static Instance instance(const char* name, const void* kernel) {
    return {name,    kernel,  T::BM, T::BN,      T::CLUSTER, T::CN,
            T::CK,   T::SMEM, T::CM, T::THREADS, T::EPI, T::OF_LOOP, T::UPRIGHT, T::E4M3};
}
#define GEMM_ROW(NAME, C, MI, BN, STAGES, CM, CN, CK, TURNS, EPI)                         \
    instance<gemm::Tile<C, MI, BN, STAGES, CM, CN, CK, TURNS, gemm::EPI>>(#NAME, (const void*)NAME),
static const Instance INSTANCES[] = {GEMM_INSTANCES(GEMM_ROW) GEMM_LOOP_INSTANCES(GEMM_ROW)
                                         GEMM_E4M3_INSTANCES(GEMM_ROW)};

struct Case {
    const char* name;
    int n, k;
    gemm::Epilogue epilogue;
    Norm norm;
    bool bias, stats;
    int rows_per_sample;  // at batch 1; 0: a prefix
    int out_stride;       // rows per sample of the output; 0: contiguous
    int q_cols;
    int x_cols = 0;  // 0: k
    bool of_loop = false, e4m3 = false;
    bool takes(const Instance& in) const {
        return in.epilogue == epilogue && in.of_loop == of_loop && in.e4m3 == e4m3 &&
               !(in.upright && (stats || out_stride != 0));
    }
    int columns() const { return x_cols ? x_cols : k; }
    int bytes() const { return e4m3 ? 1 : 2; }  // of an operand's element
};
static const Case CASES[] = {
    {"vision.patch", 1152, 640, gemm::STORE_POSITION, NONE, true, true, 768, 0, 0},
    {"vision.qkv", 3456, 1152, gemm::STORE, LAYER, true, false, 768, 0, 0},
    {"vision.out", 1152, 1152, gemm::ADD, NONE, true, true, 768, 0, 0},
    {"vision.fc1", 4304, 1152, gemm::GELU, LAYER, true, false, 768, 0, 0},
    {"vision.fc2", 1152, 4304, gemm::ADD, NONE, true, true, 768, 0, 0},
    {"vision.projector", 2048, 1152, gemm::STORE, LAYER, true, true, 768, 788, 0},
    {"prefill.qkv", 2560, 2048, gemm::ROPE, RMS, false, false, 0, 0, 2048},
    {"prefill.kv", 512, 2048, gemm::ROPE, RMS, false, false, 0, 0, 0},
    {"prefill.out", 2048, 2048, gemm::ADD, NONE, false, true, 0, 0, 0},
    {"prefill.up", 32768, 2048, gemm::GEGLU, RMS, false, false, 0, 0, 0},
    {"prefill.down", 2048, 16384, gemm::ADD, NONE, false, true, 0, 0, 0},
    {"loop.qkv", 2560, 1024, gemm::ROPE, RMS, true, false, 0, 0, 2048, 0, true},
    {"loop.out", 1024, 2048, gemm::ADD, NONE, false, true, 0, 0, 0, 0, true},
    {"loop.up", 8192, 1024, gemm::GEGLU, RMS, true, false, 0, 0, 0, 0, true},
    {"loop.down", 1024, 4096, gemm::ADD, NONE, false, true, 0, 0, 0, 0, true},
    {"loop.mlp", 1024, 2048, gemm::STORE, NONE, true, true, 0, 61, 0, 1024, true},
    {"fp8.up", 32768, 2048, gemm::GEGLU, NONE, false, false, 0, 0, 0, 0, false, true},
    {"fp8.down", 2048, 16384, gemm::ADD, NONE, false, true, 0, 0, 0, 0, false, true},
};

// ---- host ------------------------------------------------------------------------------------

static PFN_cuTensorMapEncodeTiled_v12000 encode_tiled;
// Whether rows begin at cache lines, as the host lays them out: timings, not checks.
static bool padded = false;

// Box of 128 bytes × `box` rows of a row-major matrix, of bf16 unless elements have one byte.
static ptx::TensorMap tensor_map(const bf16* base, int rows, int cols, int ld, int box,
                                 int bytes = 2) {
    ptx::TensorMap map;
    cuuint64_t dims[2] = {(cuuint64_t)cols, (cuuint64_t)rows};
    cuuint64_t strides[1] = {(cuuint64_t)ld * bytes};
    cuuint32_t boxes[2] = {128u / bytes, (cuuint32_t)box}, steps[2] = {1, 1};
    const CUresult r = encode_tiled((CUtensorMap*)&map,
                                    bytes == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8
                                               : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                                    2, (void*)base, dims, strides, boxes, steps,
                                    CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                    CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                    CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (r != CUDA_SUCCESS) printf("cuTensorMapEncodeTiled: %d\n", r), exit(1);
    return map;
}

template <class T> static T* device(size_t n) {
    void* p;
    CHECK(cudaMalloc(&p, n * sizeof(T) + 4096));
    return (T*)p;
}

// Multiplies E4M3 weights, so that they are in its range.
constexpr float E4M3_WEIGHTS = 32;

// Buffers shared by all cases, large enough for the largest.
struct Arena {
    size_t pool = 320u << 20;  // bytes of weights
    size_t max_rows;
    bf16 *w, *x, *out, *scaled, *k, *v, *before;
    float *bias, *colsum, *table, *xn, *y;
    float2 *stats_in, *stats_out, *stats_ref, *turns, *factors;
    double* sums;
    int* count;
    uint2* lengths;
    explicit Arena(size_t rows, bool checks) : max_rows(rows + 256) {
        w = device<bf16>(pool / 2);
        x = device<bf16>(max_rows * 16384);
        out = device<bf16>(max_rows * 16384);
        scaled = device<bf16>(max_rows * 2048);
        before = device<bf16>(checks ? max_rows * 16384 : 1);
        k = device<bf16>(max_rows * 256), v = device<bf16>(max_rows * 256);
        bias = device<float>(32768), colsum = device<float>(32768);
        table = device<float>(max_rows * 1152);
        xn = device<float>(checks ? max_rows * 16384 : 1);
        y = device<float>(checks ? max_rows * 32768 : 1);
        stats_in = device<float2>(max_rows * 32), stats_out = device<float2>(max_rows * 32);
        stats_ref = device<float2>(max_rows * 32);
        turns = device<float2>(128), factors = device<float2>(max_rows);
        // Of each row others, and neighbours' differ.
        std::vector<float2> by(max_rows);
        const float e4m3 = 2 / E4M3_WEIGHTS;
        for (size_t i = 0; i < max_rows; i++)
            by[i] = make_float2(e4m3 / (1 << i % 3), e4m3 / (1 << i / 2 % 2));
        const size_t bytes = max_rows * sizeof(float2);
        CHECK(cudaMemcpy(factors, by.data(), bytes, cudaMemcpyHostToDevice));
        sums = device<double>(2), count = device<int>(1);
        std::vector<uint2> real(max_rows);
        for (size_t i = 0; i < max_rows; i++) real[i] = make_uint2(i % 3 + 1, 20 - i % 7);
        lengths = device<uint2>(max_rows);
        CHECK(cudaMemcpy(lengths, real.data(), max_rows * sizeof(uint2), cudaMemcpyHostToDevice));
        float2 host[128];
        for (int j = 0; j < 128; j++) {
            const double t = pow(10000.0, -j / 128.0) / 6.283185307179586476925;
            host[j].x = (float)t;
            host[j].y = (float)(t - host[j].x);
        }
        CHECK(cudaMemcpy(turns, host, sizeof host, cudaMemcpyHostToDevice));
        fill_f32<<<64, 256>>>(bias, 32768, 0.5f, 11);
        fill_f32<<<512, 256>>>(table, max_rows * 1152, 1.f, 12);
    }
};

static int active_clusters(const Instance& in) {
    static std::vector<std::pair<const void*, int>> known;
    for (auto& k : known)
        if (k.first == in.kernel) return k.second;
    CHECK(cudaFuncSetAttribute(in.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, in.smem));
    cudaLaunchAttribute attr[1];
    attr[0].id = cudaLaunchAttributeClusterDimension;
    attr[0].val.clusterDim.x = in.cluster, attr[0].val.clusterDim.y = attr[0].val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = in.cluster * 132;
    config.blockDim = in.threads;
    config.dynamicSmemBytes = in.smem;
    config.attrs = attr, config.numAttrs = 1;
    int n = 0;
    CHECK(cudaOccupancyMaxActiveClusters(&n, in.kernel, &config));
    known.push_back({in.kernel, n});
    return n;
}

struct Launch {
    Instance in;
    ptx::TensorMap w, x, out;
    GemmParams p;
    int tiles, grid;
};

static Launch prepare(const Instance& in, const Case& c, Arena& a, int rows, int per_sample,
                      const bf16* w) {
    Launch l;
    l.in = in;
    memset(&l.p, 0, sizeof l.p);
    GemmParams& p = l.p;
    p.scale = 1.f;
    p.bias = c.bias ? a.bias : nullptr;
    p.colsum = c.norm == LAYER ? a.colsum : nullptr;
    p.stats_in = c.e4m3 ? a.factors : c.norm == NONE ? nullptr : a.stats_in;
    p.stats_out = c.stats ? a.stats_out : nullptr;
    p.aux = c.epilogue == gemm::ROPE ? (const void*)a.turns : a.table;
    if (c.epilogue == gemm::ADD && !c.of_loop) p.aux = nullptr;
    if (c.of_loop) p.lengths = a.lengths, p.image_tokens = 256, p.first_position = 1;
    p.x_cols = c.columns();
    p.out = a.out, p.out_k = a.k, p.out_v = a.v;
    if (c.stats) p.scaled = a.scaled, p.next_scale = a.bias;  // as the writers of a stream leave it
    p.rows = rows, p.n = c.n, p.k = c.k;
    p.slots_in = p.x_cols / 64, p.inv_width = 1.f / p.x_cols;
    p.period = c.epilogue == gemm::STORE_POSITION ? 256 : per_sample;
    p.out_stride = c.out_stride ? c.out_stride : p.period;
    p.out_ld = c.epilogue == gemm::ROPE ? c.q_cols : c.epilogue == gemm::GEGLU ? c.n / 2 : c.n;
    p.q_cols = c.q_cols;
    p.kv_stride = per_sample + 11, p.kv_ld = 256;
    p.group = std::max(1, 8 / in.cn);
    const auto pitched = [](int cols) { return padded ? (cols + 63) / 64 * 64 : cols; };
    if (c.epilogue == gemm::GELU) p.out_ld = pitched(c.n);
    const int pitch = pitched(c.k);
    l.w = tensor_map(w, c.n, c.k, pitch, in.upright ? in.bn : in.bm, c.bytes());
    l.x = tensor_map(a.x, rows, p.x_cols, c.x_cols ? c.x_cols : pitch,
                     in.upright ? in.bm : in.bn, c.bytes());
    l.out = l.x;
    const int width = c.epilogue == gemm::GEGLU  ? c.n / 2
                      : c.epilogue == gemm::ROPE ? c.q_cols
                                                 : c.n;
    const int box = (in.bn / 8 + in.ck - 1) / in.ck * 8;
    if (width > 0) l.out = tensor_map(a.out, rows, width, p.out_ld, box);
    const int m = in.bm * in.shares, n = in.bn * in.cn;
    const int on_m = in.upright ? rows : c.n, on_n = in.upright ? c.n : rows;
    l.tiles = ((on_m + m - 1) / m) * ((on_n + n - 1) / n);
    l.grid = in.cluster * (in.ck > 1 ? l.tiles : std::min(l.tiles, active_clusters(in)));
    return l;
}

static void launch(Launch& l, cudaStream_t stream) {
    cudaLaunchAttribute attr[1];
    attr[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attr[0].val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = l.grid, config.blockDim = l.in.threads;
    config.dynamicSmemBytes = l.in.smem, config.stream = stream;
    config.attrs = attr, config.numAttrs = 1;
    void* args[] = {&l.w, &l.x, &l.out, &l.p};
    CHECK(cudaLaunchKernelExC(&config, l.in.kernel, args));
}

static bool check(const Instance& in, const Case& c, Arena& a, int rows, int per_sample) {
    const size_t out_bytes = a.max_rows * 16384ull * 2, small = a.max_rows * 512ull;
    Launch l = prepare(in, c, a, rows, per_sample, a.w);
    fill<<<512, 256>>>(a.w, (size_t)c.n * c.k, 1.f / sqrtf(c.k), 0.3f / c.k, rows);
    fill<<<512, 256>>>(a.x, (size_t)rows * c.columns(), 1.5f, 0.4f, rows + 1);
    if (c.e4m3) {
        auto bytes = [](bf16* p) { return (__nv_fp8_e4m3*)p; };
        const float scale = E4M3_WEIGHTS / sqrtf(c.k);
        fill_e4m3<<<512, 256>>>(bytes(a.w), (size_t)c.n * c.k, scale, rows);
        fill_e4m3<<<512, 256>>>(bytes(a.x), (size_t)rows * c.k, 1.5f, rows + 1);
    }
    sum_columns<<<c.n, 32>>>(a.w, a.colsum, c.k);
    if (c.norm != NONE) slab_stats<<<rows, 32>>>(a.x, a.stats_in, c.columns(), c.columns());
    const size_t samples = rows / per_sample;
    const size_t buffer = samples * std::max(per_sample, c.out_stride) + rows + 64;
    const size_t out_used = std::min(out_bytes, buffer * l.p.out_ld * 2);
    auto poison = [&] {
        CHECK(cudaMemset(a.out, 0xFF, out_used));
        CHECK(cudaMemset(a.k, 0xFF, small));
        CHECK(cudaMemset(a.v, 0xFF, small));
        CHECK(cudaMemset(a.stats_out, 0xFF, a.max_rows * 32 * 8));
        CHECK(cudaMemset(a.scaled, 0xFF, a.max_rows * 2048 * 2));
        if (c.epilogue == gemm::ADD) fill<<<512, 256>>>(a.out, (size_t)rows * c.n, 1.f, 0.f, 77);
    };
    poison();
    CHECK(cudaMemcpy(a.before, a.out, out_used, cudaMemcpyDeviceToDevice));
    launch(l, 0);
    CHECK(cudaDeviceSynchronize());
    reference_norm<<<rows, 256>>>(a.x, a.xn, c.columns(), c.k, c.norm, c.e4m3);
    reference_product<<<dim3((c.n + 31) / 32, (rows + 31) / 32), dim3(32, 8)>>>(
        a.xn, a.w, l.p.bias, a.y, rows, c.n, c.k, c.e4m3);
    CHECK(cudaMemset(a.sums, 0, 16));
    reference_compare<<<512, 256>>>(a.y, a.before, l.p, c.epilogue, c.e4m3, a.sums);
    double sums[2];
    CHECK(cudaMemcpy(sums, a.sums, 16, cudaMemcpyDeviceToHost));
    const double error = sqrt(sums[0] / sums[1]);
    // Words outside the rows written must still be poison: count the words that changed.
    auto different = [&](const void* p, const void* q, size_t bytes) {
        int n;
        CHECK(cudaMemset(a.count, 0, 4));
        count_different<<<512, 256>>>((const uint32_t*)p, (const uint32_t*)q, bytes / 4, a.count);
        CHECK(cudaMemcpy(&n, a.count, 4, cudaMemcpyDeviceToHost));
        return n;
    };
    const long width = l.p.out_ld;
    const bool counted = c.epilogue != gemm::ADD && width != 0;
    const long changed = counted ? different(a.out, a.before, out_used) : 0;
    const bool coarse = c.e4m3 && c.epilogue == gemm::GEGLU;  // E4M3 goes out as well
    const long strays = std::max(0L, changed - (long)rows * width / (coarse ? 4 : 2));
    double stat_error = 0;
    if (c.stats) {  // recompute from what was stored
        const int last = rows - 1;
        const int buffer_rows = last / l.p.period * l.p.out_stride + last % l.p.period + 1;
        slab_stats<<<buffer_rows, 32>>>(a.out, a.stats_ref, c.n, c.n);
        std::vector<float> got(buffer_rows * (c.n / 32)), want(got.size());
        CHECK(cudaMemcpy(got.data(), a.stats_out, got.size() * 4, cudaMemcpyDeviceToHost));
        CHECK(cudaMemcpy(want.data(), a.stats_ref, got.size() * 4, cudaMemcpyDeviceToHost));
        double e = 0, s = 0;
        for (size_t i = 0; i < got.size(); i++) {
            if ((i / (c.n / 32)) % l.p.out_stride >= l.p.period) continue;
            const double d = got[i] - want[i];
            e += d == d ? d * d : 1e30, s += (double)want[i] * want[i];
        }
        stat_error = sqrt(e / s);
    }
    if (c.stats) {
        int n;
        CHECK(cudaMemset(a.count, 0, 4));
        count_unscaled<<<512, 256>>>(l.p, a.count);
        CHECK(cudaMemcpy(&n, a.count, 4, cudaMemcpyDeviceToHost));
        if (n) stat_error = 1;
    }
    // Repeats give the same bits.
    int moved = 0;
    CHECK(cudaMemcpy(a.xn, a.out, out_used, cudaMemcpyDeviceToDevice));
    bf16* k0 = (bf16*)a.y;
    CHECK(cudaMemcpy(k0, a.k, small, cudaMemcpyDeviceToDevice));
    for (int i = 0; i < 20; i++) {
        poison();
        launch(l, 0);
        moved += different(a.out, a.xn, out_used) + different(a.k, k0, small);
    }
    CHECK(cudaDeviceSynchronize());
    const bool near = error <= (coarse ? 3e-2 : 4e-3) && stat_error < 1e-5;
    const bool ok = near && strays == 0 && moved == 0;
    if (!ok)
        printf("FAIL ");
    if (!ok || getenv("VERBOSE"))
        printf("%-18s %-34s rows %5d: error %.2e, strays %ld, moved %d, stats %.1e\n", c.name,
               in.name, rows, error, strays, moved, stat_error);
    return ok;
}

#ifdef GEMM_TRACE
static const Stamp (*read_stamps())[STAMPS] {
    static Stamp host[STAMPED][STAMPS];
    CHECK(cudaMemcpyFromSymbol(host, stamps, sizeof host));
    return host;
}

// Layers of four products each, as a whole replay has them at batch 1, but for attention.
static void chain(Arena& a, const char* const (&products)[4][2], int rows) {
    constexpr int LAYERS = 20;
    std::vector<Launch> ls;
    size_t at = 0;
    for (int i = 0; i < 4 * LAYERS; i++) {
        const Case* c = CASES;
        while (strcmp(c->name, products[i % 4][0])) c++;
        const Instance* in = INSTANCES;
        while (strcmp(in->name, products[i % 4][1])) in++;
        const size_t bytes = (size_t)c->n * ((c->k + 63) / 64 * 64) * 2;
        if (at + bytes > a.pool) at = 0;
        ls.push_back(prepare(*in, *c, a, rows, rows, a.w + at / 2));
        ls.back().p.first_position = i;
        at += bytes;
    }
    cudaStream_t s;
    CHECK(cudaStreamCreate(&s));
    cudaGraph_t g;
    cudaGraphExec_t e;
    CHECK(cudaStreamBeginCapture(s, cudaStreamCaptureModeThreadLocal));
    for (Launch& l : ls) launch(l, s);
    CHECK(cudaStreamEndCapture(s, &g));
    CHECK(cudaGraphInstantiate(&e, g, 0));
    static const struct {
        const char* what;
        int mark;
    } EVENTS[] = {{"starts", 0}, {"may go on", 8}, {"asks", 9}, {"has a stage", 3},
                  {"products done", 4}, {"ends", 7}};
    double sums[4][6][2] = {};
    constexpr int REPLAYS = 24, WARM = 6;
    for (int r = 0; r < WARM + REPLAYS; r++) {
        usleep(20000);
        CHECK(cudaGraphLaunch(e, s));
        CHECK(cudaStreamSynchronize(s));
        if (r < WARM) continue;
        const auto* all = read_stamps();
        for (int i = 1; i < 4 * LAYERS; i++) {
            long long before = 0;
            for (int b = 0; b < ls[i - 1].grid; b++)
                before = std::max(before, all[(i - 1) * 132 + b][7].ns);
            for (int j = 0; j < 6; j++) {
                std::vector<long long> ns;
                for (int b = 0; b < ls[i].grid; b++)
                    ns.push_back(all[i * 132 + b][EVENTS[j].mark].ns - before);
                std::sort(ns.begin(), ns.end());
                sums[i % 4][j][0] += ns[ns.size() / 2], sums[i % 4][j][1] += ns.back();
            }
        }
    }
    printf("us after the last CTA in front has ended: median CTA, last CTA (of consumers, the "
           "first)\n");
    for (int k = 0; k < 4; k++) {
        printf("%-14s", products[k][0]);
        const double n = REPLAYS * (k == 0 ? LAYERS - 1 : LAYERS) * 1e3;
        for (int j = 0; j < 6; j++)
            printf(" %s %.2f %.2f%s", EVENTS[j].what, sums[k][j][0] / n, sums[k][j][1] / n,
                   j < 5 ? "," : "\n");
    }
    CHECK(cudaGraphExecDestroy(e));
    CHECK(cudaGraphDestroy(g));
    CHECK(cudaStreamDestroy(s));
}
#endif

static double time_us(const Instance& in, const Case& c, Arena& a, int rows, int per_sample) {
    const size_t w_bytes = (size_t)c.n * ((c.k + 63) / 64 * 64) * c.bytes();
    const int copies = (int)std::clamp<size_t>(a.pool / w_bytes, 2, 24);
    // IDLE=microseconds: short bursts with pauses, so that the card's power limit stays out of it.
    const int idle = getenv("IDLE") ? atoi(getenv("IDLE")) : 0;
    const int launches = rows > 20000 || idle ? 4 : copies * std::max(1, 24 / copies);
    std::vector<Launch> ls;
    for (int i = 0; i < copies; i++)
        ls.push_back(prepare(in, c, a, rows, per_sample, a.w + i * (w_bytes / 2)));
    cudaStream_t s;
    CHECK(cudaStreamCreate(&s));
    cudaGraph_t g;
    cudaGraphExec_t e;
    CHECK(cudaStreamBeginCapture(s, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < launches; i++) launch(ls[i % copies], s);
    CHECK(cudaStreamEndCapture(s, &g));
    CHECK(cudaGraphInstantiate(&e, g, 0));
    cudaEvent_t t0, t1;
    CHECK(cudaEventCreate(&t0));
    CHECK(cudaEventCreate(&t1));
    std::vector<float> ms;
    for (int i = 0; i < (rows > 5000 ? 4 : 12); i++) {
        if (idle) usleep(idle);
        CHECK(cudaEventRecord(t0, s));
        CHECK(cudaGraphLaunch(e, s));
        CHECK(cudaEventRecord(t1, s));
        CHECK(cudaStreamSynchronize(s));
        float t;
        CHECK(cudaEventElapsedTime(&t, t0, t1));
        if (i >= 2) ms.push_back(t);
    }
    // SUSTAIN=seconds: the graph again and again, as long as it takes the card to its power limit
    // and the limit to settle; the mean of the second half, and its energy.
    if (const char* seconds = getenv("SUSTAIN")) {
        const double until = atof(seconds), begin = now();
        const int at_once = std::max(2, (int)(20 / ms.back()));
        double half = 0, joules = 0;
        unsigned clock_mhz = 0;
        long replays = 0;
        for (double t = 0; t < until; t = now() - begin) {
            if (half == 0 && t > until / 2) half = now(), joules = nvml().joules(), replays = 0;
            for (int i = 0; i < at_once; i++) CHECK(cudaGraphLaunch(e, s));
            if (half != 0) clock_mhz = nvml().clock();
            CHECK(cudaStreamSynchronize(s));
            replays += at_once;
        }
        const double took = now() - half;
        joules = nvml().joules() - joules;
        printf("   %.0f W, %u MHz, %.3f mJ a launch\n", joules / took, clock_mhz,
               joules * 1e3 / replays / launches);
        ms.assign(1, took * 1e3 / replays);
    }
    std::sort(ms.begin(), ms.end());
#ifdef GEMM_TRACE
    const Stamp(*of)[STAMPS] = read_stamps() + ls[0].p.first_position * 132;
    double sum[8] = {}, clk = 0, ns = 0;
    long long met = 1ll << 62, end = 0, first_end = 1ll << 62;
    for (int b = 0; b < ls[0].grid; b++) {
        for (int i = 1; i < 8; i++)
            sum[i] += (double)(of[b][i].clock - of[b][i - 1].clock) / ls[0].grid;
        clk += of[b][7].clock - of[b][0].clock, ns += of[b][7].ns - of[b][0].ns;
        met = std::min(met, of[b][2].ns);
        end = std::max(end, of[b][7].ns), first_end = std::min(first_end, of[b][7].ns);
    }
    printf("   clk init %.0f depwait %.0f firstload %.0f main %.0f reduce %.0f epilogue %.0f "
           "end %.0f | "
           "GHz %.2f | dep met to first end %.2f, to last end %.2f us\n", sum[1], sum[2], sum[3],
           sum[4], sum[5], sum[6], sum[7], clk / ns, (first_end - met) * 1e-3, (end - met) * 1e-3);
#endif
    CHECK(cudaGraphExecDestroy(e));
    CHECK(cudaGraphDestroy(g));
    CHECK(cudaStreamDestroy(s));
    return ms[ms.size() / 2] * 1e3 / launches;
}

int main(int argc, char** argv) {
    const std::string mode = argc > 1 ? argv[1] : "check";
    const int batch = argc > 2 ? atoi(argv[2]) : 1;
    const char* filter = argc > 3 ? argv[3] : "";
    const int prefix = argc > 4 ? atoi(argv[4]) : 788;
    cudaDriverEntryPointQueryResult found;
    CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", (void**)&encode_tiled, 12000,
                                           cudaEnableDefault, &found));
    const char* only = argc > 5 ? argv[5] : "";  // part of an instance's name
    int bad = 0, done = 0;
    setvbuf(stdout, nullptr, _IOLBF, 4096);
    for (const Instance& in : INSTANCES) active_clusters(in);
    if (mode == "table") {  // for the host twin
        for (const Instance& in : INSTANCES)
            printf("%-34s threads %3d cluster %d smem %6d boxes w %3d x %3d old %3d clusters %3d\n",
                   in.name, in.threads, in.cluster, in.smem, in.bm, in.bn,
                   in.epilogue == gemm::ADD ? (in.bn / 8 + in.ck - 1) / in.ck * 8 : 0,
                   active_clusters(in));
        return 0;
    }
#ifndef GEMM_TRACE
    if (mode == "chain") return printf("chain needs stamps: compile with -DGEMM_TRACE\n"), 2;
#endif
    if (mode == "check") {
        Arena a(1936, true);
        const int prefix_rows[] = {1, 17, 788, 968, 1576}, image_rows[] = {1, 17, 768, 512, 1536};
        const int loop_rows[] = {10, 17, 640, 704, 1632}, loop_samples[] = {10, 17, 10, 11, 51};
        for (const Case& c : CASES)
            for (const Instance& in : INSTANCES) {
                if (!c.takes(in)) continue;
                if (*filter && !strstr(c.name, filter) && !strstr(in.name, filter)) continue;
                for (int i = getenv("QUICK") ? 2 : 0; i < (getenv("QUICK") ? 4 : 5); i++) {
                    int rows = c.rows_per_sample ? image_rows[i] : prefix_rows[i];
                    const int usual = c.rows_per_sample ? 768 : 788;
                    int per_sample = i == 4 ? rows / 2 : i == 3 ? rows : usual;
                    if (c.of_loop) rows = loop_rows[i], per_sample = loop_samples[i];
                    bad += !check(in, c, a, rows, per_sample), done++;
                }
            }
        printf("%d checks, %d bad\n", done, bad);
        return bad != 0;
    }
    padded = !getenv("PACKED");
    Arena a((size_t)batch * (prefix > 788 ? prefix : 788), false);
    fill<<<1024, 256>>>(a.w, a.pool / 2, 0.03f, 0.f, 1);
    fill<<<1024, 256>>>(a.x, a.max_rows * 16384, 1.f, 0.f, 2);
    fill<<<1024, 256>>>(a.out, a.max_rows * 16384, 1.f, 0.f, 3);
    slab_stats<<<a.max_rows, 32>>>(a.x, a.stats_in, 2048, 2048);
#ifdef GEMM_TRACE
    if (mode == "chain") {
        chain(a, {{"vision.qkv", "gemm_store_u128x160_x2"}, {"vision.out", "gemm_add_128x64"},
                  {"vision.fc1", "gemm_gelu_u128x200_x2"},
                  {"vision.fc2", "gemm_add_128x128_w2_k2"}}, 768);
        chain(a, {{"prefill.qkv", "gemm_rope_128x136_w2"},
                  {"prefill.out", "gemm_add_128x104_w2"},
                  {"prefill.up", "gemm_geglu_128x200_t_x2"},
                  {"prefill.down", "gemm_add_128x200_k2"}}, 788);
        return 0;
    }
#endif
    for (const Case& c : CASES) {
        if (*filter && !strstr(c.name, filter)) continue;
        const int images = getenv("IMAGES") ? atoi(getenv("IMAGES")) : 3;
        const int action_rows = getenv("HORIZON") ? atoi(getenv("HORIZON")) : 10;
        const int per_prefix = c.of_loop ? action_rows : prefix;
        const int per_sample = c.rows_per_sample ? 256 * images : per_prefix;
        const int rows = batch * per_sample;
        if (c.e4m3) {  // these cases come last
            fill_e4m3<<<1024, 256>>>((__nv_fp8_e4m3*)a.w, a.pool, 1.f, 1);
            fill_e4m3<<<1024, 256>>>((__nv_fp8_e4m3*)a.x, a.max_rows * 16384, 1.f, 2);
        }
        for (const Instance& in : INSTANCES) {
            if (!c.takes(in) || !strstr(in.name, only)) continue;
            const double us = time_us(in, c, a, rows, per_sample);
            const double flop = 2.0 * rows * c.n * c.k;
            const Launch l = prepare(in, c, a, rows, per_sample, a.w);
            printf("%-17s %6d rows %-32s grid %3d/%d tiles %4d: %8.2f us %4.0f TFLOP/s\n", c.name,
                   rows, in.name, l.grid, l.in.cluster, l.tiles * l.in.cluster, us,
                   flop / us * 1e-6);
        }
    }
    return 0;
}
