// What the attention lab stands on: device buffers, random numbers, the FP32 reference,
// launches with clusters and dependence, graph timing, repeat and late-predecessor checks.
// SUSTAIN=seconds in the environment: times are taken at the power limit, after half of them.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "../kernels/attention_ptx.cuh"
#include "attention_generic.cuh"
#include "power.cuh"

#define CHECK(call)                                                                            \
    do {                                                                                       \
        const cudaError_t e_ = (call);                                                         \
        if (e_ != cudaSuccess) {                                                               \
            printf("line %d: %s: %s\n", __LINE__, #call, cudaGetErrorString(e_));              \
            exit(2);                                                                           \
        }                                                                                      \
    } while (0)

namespace lab {

constexpr double kTolerance = 5e-3;  // relative L2, bf16 weights and outputs
int failures = 0;
cudaStream_t stream;

// ---- memory ------------------------------------------------------------------------------------

template <class T>
struct Buffer {
    T* at = nullptr;
    size_t count = 0;
    explicit Buffer(size_t n) : count(n) { CHECK(cudaMalloc(&at, (n + 1) * sizeof(T))); }
    explicit Buffer(const std::vector<T>& x) : Buffer(x.size()) {
        CHECK(cudaMemcpy(at, x.data(), count * sizeof(T), cudaMemcpyHostToDevice));
    }
    Buffer(const Buffer&) = delete;
    ~Buffer() { cudaFree(at); }
    void poison() { CHECK(cudaMemset(at, 0xff, count * sizeof(T))); }
    std::vector<T> host() const {
        std::vector<T> x(count);
        CHECK(cudaMemcpy(x.data(), at, count * sizeof(T), cudaMemcpyDeviceToHost));
        return x;
    }
};

/// About normal numbers of the given deviation, a function of (seed, index).
__global__ void fill(u16* x, size_t n, float deviation, u32 seed) {
    for (size_t i = blockIdx.x * 256ull + threadIdx.x; i < n; i += gridDim.x * 256ull) {
        float sum = 0.f;
        for (u32 k = 0; k < 4; ++k) {
            u64 h = (i * 4 + k + 1) * 0x9e3779b97f4a7c15ull + seed * 0xd1342543de82ef95ull;
            h = (h ^ (h >> 30)) * 0xbf58476d1ce4e5b9ull;
            h = (h ^ (h >> 27)) * 0x94d049bb133111ebull;
            sum += static_cast<float>((h ^ (h >> 31)) >> 40) * (1.f / 16777216.f) - 0.5f;
        }
        x[i] = static_cast<u16>(ptx::pack_bf16(sum * 1.7320508f * deviation, 0.f));
    }
}

struct Random : Buffer<u16> {
    Random(size_t n, float deviation, u32 seed) : Buffer<u16>(n) {
        fill<<<256, 256>>>(at, n, deviation, seed);
        CHECK(cudaDeviceSynchronize());
    }
    /// NaN into rows [first, last) of width `width`.
    void spoil(size_t first, size_t last, size_t width) {
        CHECK(cudaMemset(at + first * width, 0xff, (last - first) * width * 2));
    }
};

// ---- reference ---------------------------------------------------------------------------------

/// Two passes over the scores in shared memory, FP32 throughout, one CTA a row and head.
__global__ void reference(AttentionGenericParams p, float* out) {
    extern __shared__ float score[];
    __shared__ float total;
    const u32 query = blockIdx.x, head = blockIdx.y, group = blockIdx.z, d = p.head_dim;
    const u32 kv = p.kv_heads == 1 ? 0 : head * d;
    const u32* lengths = p.lengths + 2 * group;
    const u32 len = p.mask ? lengths[0] * p.image_tokens + lengths[1] : 0;
    const u16* v = p.v + size_t(group) * p.v_stride * p.v_pitch + kv;
    const u16* q = p.q + (size_t(group) * p.q_stride + query) * p.q_pitch + head * d;
    for (u32 s = threadIdx.x; s < p.keys; s += blockDim.x) {
        bool seen = p.mask == 0 || s < len;
        if (p.mask == 2 && s >= p.prefix_rows)
            seen = !(p.state_row && query == 0) || s == p.prefix_rows;
        float x = 0.f;
        const u16* k = p.k + (size_t(group) * p.k_stride + s) * p.k_pitch + kv;
        if (seen)
            for (u32 i = 0; i < d; ++i) x += ptx::bf16_lo(q[i]) * ptx::bf16_lo(k[i]);
        score[s] = seen ? x : -INFINITY;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        float max = -INFINITY, sum = 0.f;
        for (u32 s = 0; s < p.keys; ++s) max = fmaxf(max, score[s]);
        for (u32 s = 0; s < p.keys; ++s) sum += score[s] = expf(score[s] - max);
        total = sum;
    }
    __syncthreads();
    for (u32 i = threadIdx.x; i < d; i += blockDim.x) {
        float x = 0.f;
        for (u32 s = 0; s < p.keys; ++s)
            if (score[s] > 0.f) x += score[s] * ptx::bf16_lo(v[size_t(s) * p.v_pitch + i]);
        out[(size_t(group) * p.out_stride + query) * p.out_pitch + head * d + i] = x / total;
    }
}

std::vector<float> expected(const AttentionGenericParams& p, u32 groups, size_t count) {
    Buffer<float> out(count);
    CHECK(cudaMemset(out.at, 0, count * 4));
    const dim3 grid(p.queries, p.heads, groups);
    reference<<<grid, 128, p.keys * 4>>>(p, out.at);
    CHECK(cudaDeviceSynchronize());
    return out.host();
}

float value(u16 x) {
    const u32 bits = u32(x) << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

/// Relative L2 over the elements `keep` picks; NaN anywhere there is a failure.
double relative(const std::vector<u16>& got, const std::vector<float>& want,
                const std::function<bool(size_t)>& keep) {
    double error = 0, norm = 0;
    for (size_t i = 0; i < got.size(); ++i) {
        if (!keep(i)) continue;
        const double x = value(got[i]), y = want[i];
        if (!std::isfinite(x)) return INFINITY;
        error += (x - y) * (x - y);
        norm += y * y;
    }
    return std::sqrt(error / std::max(norm, 1e-30));
}

void report(const std::string& name, double error, bool ok = true) {
    const bool fine = ok && error <= kTolerance;
    if (!fine) ++failures;
    printf("%-58s %9.2e %s\n", name.c_str(), error, fine ? "ok" : "FAIL");
}

// ---- launches ----------------------------------------------------------------------------------

/// The clock of multiprocessor 0.
__global__ void read_clock(long long* at) {
    u32 sm;
    asm volatile("mov.u32 %0, %%smid;" : "=r"(sm));
    if (sm == 0) *at = clock64();
}

/// Milliseconds of a graph replayed for `seconds` without a pause, the mean of the second half.
double sustained(cudaGraphExec_t graph, double seconds) {
    Buffer<long long> clocks(2);
    const double begin = now();
    double half = 0, joules = 0;
    long replays = 0;
    for (double t = 0; t < seconds; t = now() - begin) {
        if (half == 0 && t > seconds / 2) {
            half = now(), joules = nvml().joules(), replays = 0;
            read_clock<<<1024, 32, 0, stream>>>(clocks.at);
        }
        for (int i = 0; i < 4; ++i) CHECK(cudaGraphLaunch(graph, stream));
        CHECK(cudaStreamSynchronize(stream));
        replays += 4;
    }
    const double took = now() - half;
    read_clock<<<1024, 32, 0, stream>>>(clocks.at + 1);
    CHECK(cudaStreamSynchronize(stream));
    const auto at = clocks.host();
    printf(" [%.0f W, %.0f MHz]", (nvml().joules() - joules) / took, (at[1] - at[0]) / took * 1e-6);
    return took * 1e3 / replays;
}

struct Launch {
    std::string name;
    const void* kernel;
    dim3 grid;
    u32 threads, smem, cluster;
    std::vector<std::vector<u8>> args;

    template <class T>
    void add(const T& x) {
        args.emplace_back(sizeof(T));
        memcpy(args.back().data(), &x, sizeof(T));
    }

    void go(bool dependent = false) {
        cudaLaunchAttribute attributes[2];
        cudaLaunchConfig_t config = {grid, dim3(threads), smem, stream, attributes, 0};
        if (cluster > 1) {
            attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
            attributes[config.numAttrs].val.clusterDim = {cluster, 1, 1};
            ++config.numAttrs;
        }
        if (dependent) {
            attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
            attributes[config.numAttrs].val.programmaticStreamSerializationAllowed = 1;
            ++config.numAttrs;
        }
        std::vector<void*> pointers;
        for (auto& a : args) pointers.push_back(a.data());
        CHECK(cudaLaunchKernelExC(&config, kernel, pointers.data()));
    }

    void prepare() {
        CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem));
        if (cluster > 8)
            CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
    }

    void run() {
        prepare();
        go();
        CHECK(cudaGetLastError());
        CHECK(cudaStreamSynchronize(stream));
    }

    /// Microseconds of one launch in a chain of 20 dependent ones, replayed as a graph.
    double microseconds() {
        prepare();
        cudaGraph_t graph;
        cudaGraphExec_t exec;
        CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
        for (int i = 0; i < 20; ++i) go(true);
        CHECK(cudaStreamEndCapture(stream, &graph));
        CHECK(cudaGraphInstantiate(&exec, graph, 0));
        cudaEvent_t begin, end;
        CHECK(cudaEventCreate(&begin));
        CHECK(cudaEventCreate(&end));
        std::vector<float> times;
        for (int i = 0; i < 25; ++i) {
            CHECK(cudaEventRecord(begin, stream));
            CHECK(cudaGraphLaunch(exec, stream));
            CHECK(cudaEventRecord(end, stream));
            CHECK(cudaEventSynchronize(end));
            float ms;
            CHECK(cudaEventElapsedTime(&ms, begin, end));
            if (i >= 5) times.push_back(ms);
        }
        if (const char* seconds = getenv("SUSTAIN"))
            times.assign(1, sustained(exec, atof(seconds)));
        std::sort(times.begin(), times.end());
        CHECK(cudaGraphExecDestroy(exec));
        CHECK(cudaGraphDestroy(graph));
        CHECK(cudaEventDestroy(begin));
        CHECK(cudaEventDestroy(end));
        return times[times.size() / 2] * 1000. / 20.;
    }
};

/// Twenty more runs give the same bits.
bool repeats(Launch& launch, Buffer<u16>& out) {
    const std::vector<u16> first = out.host();
    for (int i = 0; i < 20; ++i) {
        out.poison();
        launch.go(i % 2);
        CHECK(cudaStreamSynchronize(stream));
        if (out.host() != first) return false;
    }
    return true;
}

/// A bf16 tensor, innermost dimension first; strides in bytes of all but the innermost.
AttentionTensorMap map_tensor(void* at, std::vector<cuuint64_t> dims,
                              std::vector<cuuint64_t> strides, std::vector<cuuint32_t> box,
                              CUtensorMapSwizzle swizzle) {
    static decltype(&cuTensorMapEncodeTiled) encode = nullptr;
    if (!encode) {
        cudaDriverEntryPointQueryResult found;
        CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled",
                                               reinterpret_cast<void**>(&encode), 12000,
                                               cudaEnableDefault, &found));
    }
    CUtensorMap map;
    const std::vector<cuuint32_t> steps(dims.size(), 1);
    const CUresult r = encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, dims.size(), at, dims.data(),
                              strides.data(), box.data(), steps.data(),
                              CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                              CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                              CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (r != CUDA_SUCCESS) printf("cuTensorMapEncodeTiled: %d\n", r), exit(2);
    AttentionTensorMap out;
    memcpy(&out, &map, sizeof out);
    return out;
}

/// A predecessor that lets its dependents start at once and writes its output late.
__global__ void late_copy(const u16* from, u16* to, size_t n) {
    ptx::griddep_launch();
    for (int i = 0; i < 40; ++i) __nanosleep(500);
    for (size_t i = blockIdx.x * 256ull + threadIdx.x; i < n; i += gridDim.x * 256ull)
        to[i] = from[i];
}

/// Elements [first, first + n) of an input, written late by a predecessor, give the same output.
void check_dependent(const char* name, Launch l, u16* input, size_t n, Buffer<u16>& out) {
    l.run();
    const auto want = out.host();
    Buffer<u16> copy(n);
    bool same = true;
    for (int i = 0; i < 10; ++i) {
        if (i == 0) CHECK(cudaMemcpy(copy.at, input, n * 2, cudaMemcpyDeviceToDevice));
        CHECK(cudaMemset(input, 0xff, n * 2));
        out.poison();
        CHECK(cudaDeviceSynchronize());
        late_copy<<<16, 256, 0, stream>>>(copy.at, input, n);
        l.go(true);
        CHECK(cudaStreamSynchronize(stream));
        same &= out.host() == want;
    }
    report(std::string("dependent launch, ") + name, 0, same);
}

AttentionTensorMap map_rows(void* at, u64 rows, u32 box_rows) {
    return map_tensor(at, {256, rows}, {512}, {64, box_rows}, CU_TENSOR_MAP_SWIZZLE_128B);
}

}  // namespace lab
