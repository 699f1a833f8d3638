// The PTX the attention kernels use, one thin wrapper an instruction, no library headers, so that
// nvcc and NVRTC compile the same text. bf16 travels as raw 16-bit patterns (two in a u32).
#pragma once
#include "elect.cuh"

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

/// The 128 opaque bytes of a CUtensorMap, as CUDA 13 aligns them.
struct alignas(128) AttentionTensorMap {
    u64 opaque[16];
};
static_assert(sizeof(AttentionTensorMap) == 128, "a CUtensorMap has 128 bytes");

namespace ptx {

constexpr float kLog2e = 1.4426950408889634f;

// ---- scalars --------------------------------------------------------------------------------

/// NVRTC has no INFINITY.
__device__ __forceinline__ float infinity() { return __uint_as_float(0x7f800000u); }

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/// Two floats rounded to nearest even into {lo, hi} of one register.
__device__ __forceinline__ u32 pack_bf16(float lo, float hi) {
    u32 d;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(hi), "f"(lo));
    return d;
}

__device__ __forceinline__ float bf16_lo(u32 x) { return __uint_as_float(x << 16); }
__device__ __forceinline__ float bf16_hi(u32 x) { return __uint_as_float(x & 0xffff0000u); }

/// Two floats rounded to half precision into {lo, hi} of one register, and back.
__device__ __forceinline__ u32 pack_half(float lo, float hi) {
    u32 d;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(hi), "f"(lo));
    return d;
}
__device__ __forceinline__ float2 unpack_half(u32 x) {
    float2 y;
    asm("{ .reg .f16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b; }"
        : "=f"(y.x), "=f"(y.y) : "r"(x));
    return y;
}

__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

/// Transposes a 4 × 4 block of registers held by a quad: lane q ends with what lanes 0..3 had in
/// register q. Turns four 4-byte pieces of accumulator fragments into one 16-byte store a lane.
__device__ __forceinline__ void quad_transpose(u32 (&v)[4]) {
    const u32 q = threadIdx.x & 3;
    const bool odd = q & 1, high = q & 2;
    u32 s0 = odd ? v[0] : v[1], s1 = odd ? v[2] : v[3];
    s0 = __shfl_xor_sync(~0u, s0, 1);
    s1 = __shfl_xor_sync(~0u, s1, 1);
    if (odd) { v[0] = s0; v[2] = s1; } else { v[1] = s0; v[3] = s1; }
    s0 = high ? v[0] : v[2];
    s1 = high ? v[1] : v[3];
    s0 = __shfl_xor_sync(~0u, s0, 2);
    s1 = __shfl_xor_sync(~0u, s1, 2);
    if (high) { v[0] = s0; v[1] = s1; } else { v[2] = s0; v[3] = s1; }
}

// ---- dependent launch, clusters ----------------------------------------------------------------

/// Returns when every grid this one depends on has completed and its writes are visible.
__device__ __forceinline__ void griddep_wait() {
    asm volatile("griddepcontrol.wait;" ::: "memory");
}

/// Lets the next grid of the stream start as soon as every CTA has said so.
__device__ __forceinline__ void griddep_launch() {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

__device__ __forceinline__ u32 cluster_rank() {
    u32 r;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
    return r;
}

/// Orders no memory: for peers that only need to know that we got here.
__device__ __forceinline__ void cluster_arrive() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

__device__ __forceinline__ void cluster_wait() {
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ __forceinline__ u32 smem_address(const void* p) {
    return static_cast<u32>(__cvta_generic_to_shared(p));
}

/// The address, in CTA `rank` of the cluster, of what `local` is here.
__device__ __forceinline__ u32 remote_address(u32 local, u32 rank) {
    u32 r;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(local), "r"(rank));
    return r;
}

/// 16 bytes to a remote address, counted by the barrier `bar` of the same CTA.
__device__ __forceinline__ void remote_store(u32 at, u32 bar, const u32 (&x)[4]) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32"
                 " [%0], {%1, %2, %3, %4}, [%5];"
                 :: "r"(at), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(bar) : "memory");
}

__device__ __forceinline__ void remote_store(u32 at, u32 bar, float a, float b, float c, float d) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32"
                 " [%0], {%1, %2, %3, %4}, [%5];"
                 :: "r"(at), "f"(a), "f"(b), "f"(c), "f"(d), "r"(bar) : "memory");
}

__device__ __forceinline__ void remote_store(u32 at, u32 bar, float a, float b) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32"
                 " [%0], {%1, %2}, [%3];"
                 :: "r"(at), "f"(a), "f"(b), "r"(bar) : "memory");
}

// ---- mbarriers and the copy engine -------------------------------------------------------------

__device__ __forceinline__ void barrier_init(u32 bar, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(bar), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void barrier_init_done() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_expect(u32 bar, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                 :: "r"(bar), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_arrive(u32 bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(bar) : "memory");
}

/// Several arrivals at once.
__device__ __forceinline__ void barrier_arrive(u32 bar, u32 times) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;"
                 :: "r"(bar), "r"(times) : "memory");
}

__device__ __forceinline__ void barrier_wait(u32 bar, u32 parity) {
    u32 done;
    do {
        asm volatile(
            "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
            "selp.u32 %0, 1, 0, p; }"
            : "=r"(done) : "r"(bar), "r"(parity) : "memory");
    } while (!done);
}

/// The same for bytes that other CTAs of the cluster stored.
__device__ __forceinline__ void barrier_wait_cluster(u32 bar, u32 parity) {
    u32 done;
    do {
        asm volatile(
            "{ .reg .pred p;\n"
            "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
            "selp.u32 %0, 1, 0, p; }"
            : "=r"(done) : "r"(bar), "r"(parity) : "memory");
    } while (!done);
}

__device__ __forceinline__ void tma_load(u32 to, const AttentionTensorMap* map, u32 bar, int x,
                                         int y) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%3, %4}], [%2];"
        :: "r"(to), "l"(map), "r"(bar), "r"(x), "r"(y) : "memory");
}

__device__ __forceinline__ void tma_load(u32 to, const AttentionTensorMap* map, u32 bar, int x,
                                         int y, int z) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%3, %4, %5}], [%2];"
        :: "r"(to), "l"(map), "r"(bar), "r"(x), "r"(y), "r"(z) : "memory");
}

/// A box of shared memory out; what lies outside the tensor is left out.
__device__ __forceinline__ void tma_store(const AttentionTensorMap* map, u32 from, int x, int y,
                                          int z) {
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];"
                 :: "l"(map), "r"(from), "r"(x), "r"(y), "r"(z) : "memory");
}

/// Returns when this thread's stores have read shared memory.
__device__ __forceinline__ void tma_store_read() {
    asm volatile("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group.read 0;" ::: "memory");
}

/// Returns when this thread's stores, all of them in groups, are written.
__device__ __forceinline__ void tma_store_done() {
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

__device__ __forceinline__ void tma_prefetch(const AttentionTensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" :: "l"(map) : "memory");
}

/// 16 bytes from L2: never a line that L1 kept from before another kernel wrote it.
__device__ __forceinline__ uint4 load_l2(const void* from) {
    uint4 x;
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(from) : "memory");
    return x;
}

/// 16 bytes from global to shared memory, past L1; `bytes` 0 writes zeros instead.
__device__ __forceinline__ void copy_async(u32 to, const void* from, u32 bytes = 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(to), "l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ void copy_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

/// Returns when all but the `N` newest groups of this thread have landed.
template <int N>
__device__ __forceinline__ void copy_wait() {
    asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory");
}

/// Makes this thread's ordinary shared-memory writes visible to wgmma and the copy engine.
__device__ __forceinline__ void fence_async_proxy() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/// A barrier among `threads` threads, `id` 1..15.
__device__ __forceinline__ void named_barrier(u32 id, u32 threads) {
    asm volatile("bar.sync %0, %1;" :: "r"(id), "r"(threads) : "memory");
}

/// Four (two) 8 × 8 matrices of 16-bit elements, fragments as mma.sync leaves them; lane i gives
/// the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void stmatrix_x4(u32 at, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
                 :: "r"(at), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
__device__ __forceinline__ void stmatrix_x2(u32 at, u32 a, u32 b) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};"
                 :: "r"(at), "r"(a), "r"(b) : "memory");
}

// ---- mma.sync ----------------------------------------------------------------------------------

__device__ __forceinline__ void ldmatrix_x4(u32 (&r)[4], u32 at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(u32 (&r)[4], u32 at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}

/// d[16, 8] += A[16, 16] · B[16, 8]
__device__ __forceinline__ void mma(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0,
                                    u32 b1) {
    asm(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3},"
        " {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// ---- wgmma -------------------------------------------------------------------------------------

/// Shared-memory layouts a wgmma descriptor can name.
enum Swizzle : u32 { kSwizzle128 = 1, kSwizzle32 = 3 };

/// A matrix descriptor, distances in bytes: `stride` from one group of 8 rows (K-major) or of 8 k
/// (N-major) to the next, `leading` from one block of columns as wide as the swizzle to the next
/// (N-major; unused by K-major).
__device__ __forceinline__ u64 wgmma_descriptor(u32 address, u32 leading, u32 stride,
                                                Swizzle swizzle) {
    return static_cast<u64>((address & 0x3ffff) >> 4) | (static_cast<u64>(leading >> 4) << 16) |
           (static_cast<u64>(stride >> 4) << 32) | (static_cast<u64>(swizzle) << 62);
}

__device__ __forceinline__ void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int N>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(N) : "memory");
}

/// Keeps the compiler from moving reads or writes of accumulators across the point.
template <int N>
__device__ __forceinline__ void wgmma_touch(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i]) :: "memory");
}

#define PIR_F4(a, i) "+f"(a[i]), "+f"(a[i + 1]), "+f"(a[i + 2]), "+f"(a[i + 3])
#define PIR_F16(a, i) PIR_F4(a, i), PIR_F4(a, i + 4), PIR_F4(a, i + 8), PIR_F4(a, i + 12)
#define PIR_F64(a, i) PIR_F16(a, i), PIR_F16(a, i + 16), PIR_F16(a, i + 32), PIR_F16(a, i + 48)

/// d[64, 80] (+)= A[64, 16] · B[16, 80], both from shared memory, both K-major.
__device__ __forceinline__ void wgmma_ss(float (&d)[40], u64 a, u64 b, u32 accumulate) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %42, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n80k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, "
        "%12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "
        "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "
        "%36, %37, %38, %39"
        "}, %40, %41, p, 1, 1, 0, 0; }"
        : PIR_F16(d, 0), PIR_F16(d, 16), PIR_F4(d, 32), PIR_F4(d, 36)
        : "l"(a), "l"(b), "r"(accumulate));
}

/// d[64, 128] (+)= A[64, 16] · B[16, 128], both from shared memory, both K-major.
__device__ __forceinline__ void wgmma_ss(float (&d)[64], u64 a, u64 b, u32 accumulate) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, "
        "%12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "
        "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "
        "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, "
        "%60, %61, %62, %63"
        "}, %64, %65, p, 1, 1, 0, 0; }"
        : PIR_F64(d, 0)
        : "l"(a), "l"(b), "r"(accumulate));
}

/// d[64, 256] (+)= A[64, 16] · B[16, 256]: A from registers, B N-major in shared memory.
__device__ __forceinline__ void wgmma_rs(float (&d)[128], const u32* a, u64 b,
                                         u32 accumulate) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %133, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, "
        "%12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "
        "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "
        "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, "
        "%60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, "
        "%72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, "
        "%84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
        "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, "
        "%108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, "
        "%120, %121, %122, %123, %124, %125, %126, %127"
        "}, {%128, %129, %130, %131}, %132, p, 1, 1, 1; }"
        : PIR_F64(d, 0), PIR_F64(d, 64)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
}

/// d[64, 72] (+)= A[64, 16] · B[16, 72]: A from registers, B N-major in shared memory.
__device__ __forceinline__ void wgmma_rs(float (&d)[36], const u32* a, u64 b,
                                         u32 accumulate) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %41, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n72k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, "
        "%12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "
        "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35"
        "}, {%36, %37, %38, %39}, %40, p, 1, 1, 1; }"
        : PIR_F16(d, 0), PIR_F16(d, 16), PIR_F4(d, 32)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
}

/// d[64, 64] (+)= A[64, 16] · B[16, 64]: A from registers, B N-major in shared memory. The first 32
/// of d.
__device__ __forceinline__ void wgmma_rs_64(float* d, const u32* a, u64 b, u32 accumulate) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, "
        "%12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "
        "%24, %25, %26, %27, %28, %29, %30, %31"
        "}, {%32, %33, %34, %35}, %36, p, 1, 1, 1; }"
        : PIR_F16(d, 0), PIR_F16(d, 16)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
}

/// The same of 8 columns: the first 4 of d.
__device__ __forceinline__ void wgmma_rs_8(float* d, const u32* a, u64 b, u32 accumulate) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %9, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3},"
        " {%4, %5, %6, %7}, %8, p, 1, 1, 1; }"
        : PIR_F4(d, 0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
}

#undef PIR_F4
#undef PIR_F16
#undef PIR_F64

}  // namespace ptx
