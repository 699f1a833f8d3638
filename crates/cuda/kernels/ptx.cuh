// Hopper instructions CUDA C++ has no name for, one function each: mbarriers, bulk tensor copies
// (TMA), clusters, warpgroup products (wgmma, see wgmma.cuh), matrix stores, dependent launch.
// Shared-memory addresses are 32-bit (`smem_addr`). Nothing here keeps state or picks a policy.
#pragma once
#include <cstdint>
#include "elect.cuh"

namespace ptx {

// A CUtensorMap as a kernel parameter, without <cuda.h>.
struct alignas(128) TensorMap {
    uint64_t opaque[16];
};
static_assert(sizeof(TensorMap) == 128, "CUtensorMap is 128 bytes");

#define PTX_FN static __device__ __forceinline__

PTX_FN uint32_t smem_addr(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

// ---- dependent launch ------------------------------------------------------------------------

// Returns when every kernel this one depends on has finished and its writes are visible.
PTX_FN void grid_dependency_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
// The same with two numbers, neither negative, made before: the assembler would make them after.
PTX_FN void grid_dependency_wait_with(int a, int b) {
    asm volatile("{\n.reg .pred p;\nsetp.ge.s32 p, %0, 0;\n@p griddepcontrol.wait;\n}" ::"r"(a | b)
                 : "memory");
}
// Lets the next kernel start once every CTA has said so (or has exited).
PTX_FN void grid_launch_dependents() { asm volatile("griddepcontrol.launch_dependents;"); }

// ---- registers and barriers ------------------------------------------------------------------

template <int N> PTX_FN void registers_grow() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N> PTX_FN void registers_shrink() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
// Barrier `id` (1..15) among `threads` threads, a multiple of 32.
PTX_FN void named_barrier(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- mbarriers -------------------------------------------------------------------------------

PTX_FN void mbar_init(uint32_t bar, uint32_t count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}
// Makes initialised mbarriers visible to the copy engine and to the other CTAs of the cluster.
PTX_FN void mbar_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
PTX_FN void mbar_arrive(uint32_t bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}
// One arrival, and `bytes` more to be delivered by copies before the phase completes.
PTX_FN void mbar_arrive_expect(uint32_t bar, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes)
                 : "memory");
}
// Arrival at the same barrier of CTA `rank` of the cluster. Releases nothing to the cluster (that
// costs a fence of the whole GPU): for the end of reads by wgmma, not for published writes.
PTX_FN void mbar_arrive_remote(uint32_t bar, uint32_t rank) {
    asm volatile("{\n.reg .b32 remote;\n"
                 "mapa.shared::cluster.u32 remote, %0, %1;\n"
                 "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(bar),
                 "r"(rank)
                 : "memory");
}
// Waits until the phase of that parity has completed.
PTX_FN void mbar_wait(uint32_t bar, uint32_t parity) {
    asm volatile("{\n.reg .pred done;\n"
                 "again:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@done bra finished;\n"
                 "bra again;\n"
                 "finished:\n}" ::"r"(bar),
                 "r"(parity)
                 : "memory");
}
// The same, acquiring what other CTAs of the cluster stored.
PTX_FN void mbar_wait_cluster(uint32_t bar, uint32_t parity) {
    asm volatile("{\n.reg .pred done;\n"
                 "again:\n"
                 "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
                 "@done bra finished;\n"
                 "bra again;\n"
                 "finished:\n}" ::"r"(bar),
                 "r"(parity)
                 : "memory");
}

// ---- clusters --------------------------------------------------------------------------------

PTX_FN uint32_t cluster_rank() {
    uint32_t r;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
    return r;
}
// Barrier of all threads of all CTAs of the cluster; orders shared-memory accesses among them.
PTX_FN void cluster_arrive() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
// The same without ordering: for barriers that only hold CTAs together.
PTX_FN void cluster_arrive_relaxed() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
PTX_FN void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
// The address of `addr` in the shared memory of CTA `rank`.
PTX_FN uint32_t remote_addr(uint32_t addr, uint32_t rank) {
    uint32_t r;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(addr), "r"(rank));
    return r;
}
// Stores 16 bytes at a `remote_addr`; they count on the mbarrier at `remote_addr` bar of that CTA.
PTX_FN void st_async(uint32_t addr, uint32_t bar, float a, float b, float c, float d) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32"
                 " [%0], {%1, %2, %3, %4}, [%5];" ::"r"(addr),
                 "f"(a), "f"(b), "f"(c), "f"(d), "r"(bar)
                 : "memory");
}

// ---- shared memory ---------------------------------------------------------------------------

PTX_FN void st_shared(uint32_t addr, float v) {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(addr), "f"(v) : "memory");
}
PTX_FN void st_shared(uint32_t addr, float2 v) {
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(addr), "f"(v.x), "f"(v.y) : "memory");
}
PTX_FN float4 ld_shared_f4(uint32_t addr) {
    float4 v;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"(addr)
                 : "memory");
    return v;
}
PTX_FN float2 ld_shared_f2(uint32_t addr) {
    float2 v;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(addr) : "memory");
    return v;
}
// 16 bytes at once, whatever else the compiler would make of them.
PTX_FN void st_global_u4(void* to, uint4 v) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x), "r"(v.y),
                 "r"(v.z), "r"(v.w)
                 : "memory");
}
PTX_FN uint4 ld_shared_u4(uint32_t addr) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(addr)
                 : "memory");
    return v;
}
// Four (two) 8×8 matrices of 16-bit elements, each transposed on its way: lane i gives the address
// of column i%8 of matrix i/8 and holds, of each, elements [lane/4][2·(lane%4)] and the next.
PTX_FN void store_matrix_trans_x4(uint32_t addr, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                     addr),
                 "r"(a), "r"(b), "r"(c), "r"(d)
                 : "memory");
}
PTX_FN void store_matrix_trans_x2(uint32_t addr, uint32_t a, uint32_t b) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(addr),
                 "r"(a), "r"(b)
                 : "memory");
}
// The same without the transposition.
PTX_FN void store_matrix_x4(uint32_t addr, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(addr),
                 "r"(a), "r"(b), "r"(c), "r"(d)
                 : "memory");
}
PTX_FN void store_matrix_x2(uint32_t addr, uint32_t a, uint32_t b) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(addr), "r"(a),
                 "r"(b)
                 : "memory");
}
// The inverse loads of those that transpose.
PTX_FN uint4 load_matrix_trans_x4(uint32_t addr) {
    uint4 v;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(addr)
                 : "memory");
    return v;
}
PTX_FN uint2 load_matrix_trans_x2(uint32_t addr) {
    uint2 v;
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(v.x), "=r"(v.y)
                 : "r"(addr)
                 : "memory");
    return v;
}
// Orders this thread's ordinary accesses to shared memory before later ones of the copy engine and
// the tensor cores.
PTX_FN void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- bulk tensor copies ----------------------------------------------------------------------

PTX_FN void prefetch_tensor_map(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
// Box at column x, row y of a matrix into shared memory; its bytes count on mbarrier `bar`.
PTX_FN void tma_load(uint32_t dst, const TensorMap* map, int x, int y, uint32_t bar) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
                 " [%0], [%1, {%2, %3}], [%4];" ::"r"(dst),
                 "l"(map), "r"(x), "r"(y), "r"(bar)
                 : "memory");
}
// The same of three axes.
PTX_FN void tma_load_3d(uint32_t dst, const TensorMap* map, int x, int y, int z, uint32_t bar) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
                 " [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(dst),
                 "l"(map), "r"(x), "r"(y), "r"(z), "r"(bar)
                 : "memory");
}
// The same box into the same place of every CTA in `mask`, each counting on its own `bar`.
PTX_FN void tma_load_multicast(uint32_t dst, const TensorMap* map, int x, int y, uint32_t bar,
                               uint16_t mask) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
                 ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(dst),
                 "l"(map), "r"(x), "r"(y), "r"(bar), "h"(mask)
                 : "memory");
}

// The way back: a box of shared memory to column x, row y, as far as the matrix goes.
PTX_FN void tma_store(const TensorMap* map, int x, int y, uint32_t src) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];\n"
                 "cp.async.bulk.commit_group;" ::"l"(map),
                 "r"(x), "r"(y), "r"(src)
                 : "memory");
}
// Returns when this thread's stores have read their shared memory.
PTX_FN void tma_stores_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

// ---- warpgroup products ----------------------------------------------------------------------

// Descriptor of a K-major operand in shared memory with 128-byte rows in the 128-byte swizzle
// (what a TMA box of 64 bf16 columns leaves): 8-row groups follow each other every 1024 bytes.
// Add 2 for the next 16 columns, 64 for the next 8 rows.
PTX_FN uint64_t wgmma_descriptor(uint32_t addr) {
    return (uint64_t)((addr & 0x3FFFF) >> 4) | (1ull << 16) | (64ull << 32) | (1ull << 62);
}
PTX_FN void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
PTX_FN void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> PTX_FN void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// ---- arithmetic ------------------------------------------------------------------------------

PTX_FN float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
PTX_FN float rcp_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// Relative error at most 2^-11.
PTX_FN float tanh_approx(float x) {
    float y;
    asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// Two floats rounded to bf16, `lo` in the low half.
PTX_FN uint32_t pack_bf16(float lo, float hi) {
    uint32_t r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
}
PTX_FN float bf16_lo(uint32_t v) { return __uint_as_float(v << 16); }
PTX_FN float bf16_hi(uint32_t v) { return __uint_as_float(v & 0xFFFF0000u); }

// Four floats as E4M3, nearest, at most ±448.
PTX_FN uint32_t pack_e4m3(float a, float b, float c, float d) {
    uint32_t r;
    asm("{\n.reg .b16 low, high;\ncvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
        "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\nmov.b32 %0, {low, high};\n}"
        : "=r"(r)
        : "f"(a), "f"(b), "f"(c), "f"(d));
    return r;
}
// Eight bf16.
PTX_FN uint2 pack_e4m3(uint4 v) {
    return make_uint2(pack_e4m3(bf16_lo(v.x), bf16_hi(v.x), bf16_lo(v.y), bf16_hi(v.y)),
                      pack_e4m3(bf16_lo(v.z), bf16_hi(v.z), bf16_lo(v.w), bf16_hi(v.w)));
}

}  // namespace ptx
