// y = x · Wᵀ, then bias and epilogue (portable.cuh): x bf16 rows of a view, W packed bf16 [n, ldw].
// mma.sync m16n8k16 over a cp.async ring; weights are requested before the dependency is met.
//   portable_linear_large: tile 128 × 128 × 32, 4 stages, 256 threads, 80 KB
//   portable_linear_small: tile 16 × 32 × 128, 6 stages, 64 threads, 78 KB (few rows, streams W)
// The reference tier, and the fallback for shapes the Hopper tier does not take.
#include "portable.cuh"

using namespace portable;

struct LinearParams {
    View input;
    u64 weight;     // bf16 or E4M3 [packed_n][ldw], zero beyond k
    u32 rows;
    u32 k;
    u32 packed_n;   // a multiple of 16
    u32 ldw;        // a multiple of 8
    u32 e4m3;       // 1: the weight is E4M3, and x holds such numbers
    u32 pad;
    Output output;
};
static_assert(sizeof(LinearParams) == 32 + 8 + 24 + sizeof(Output), "shared with the host");

static __device__ __forceinline__ u32 shared_address(const void* p) {
    return (u32)__cvta_generic_to_shared(p);
}

// 16 bytes, of which the first `bytes` are read and the rest become zero.
static __device__ __forceinline__ void copy16(u32 to, const void* from, u32 bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes));
}

static __device__ __forceinline__ void load_matrices(u32 (&r)[4], u32 at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at));
}

static __device__ __forceinline__ void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
                 "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <int BM, int BN, int BK, int WM, int WN, int STAGES> struct Tile {
    static constexpr int THREADS = BM / WM * (BN / WN) * 32;
    static constexpr int ROW = BK * 2 + 16;  // bytes; the odd 16 keep ldmatrix free of conflicts
    static constexpr int STAGE = (BM + BN) * ROW;
    static constexpr int PIECES = BK / 8;
    static constexpr int PITCH = BN + 4;  // f32 of a staged row of y
    static_assert(BM * PITCH * 4 <= STAGES * STAGE, "y is staged in the ring");

    static __device__ __forceinline__ void load_w(const LinearParams& p, u8* smem, u32 stage,
                                                  u32 n0, u32 k0) {
        for (int c = threadIdx.x; c < BN * PIECES; c += THREADS) {
            const u32 r = c / PIECES, k = k0 + c % PIECES * 8, n = n0 + r;
            const bool in = n < p.packed_n && k < p.ldw;
            if (p.e4m3) {
                const u8* from = (const u8*)p.weight + (u64)n * p.ldw + k;
                const u32 to = (BM + r) * ROW + c % PIECES * 16;
                u16* target = (u16*)(smem + (stage - shared_address(smem)) + to);
                for (u32 i = 0; i < 8; i++) target[i] = in ? from_e4m3(from[i]) : 0;
                continue;
            }
            const u16* from = (const u16*)p.weight + (in ? (u64)n * p.ldw + k : 0);
            copy16(stage + (BM + r) * ROW + c % PIECES * 16, from, in ? 16 : 0);
        }
    }

    static __device__ __forceinline__ void load_x(const LinearParams& p, u8* smem, u32 stage,
                                                  u32 m0, u32 k0, bool wide) {
        for (int c = threadIdx.x; c < BM * PIECES; c += THREADS) {
            const u32 r = c / PIECES, k = k0 + c % PIECES * 8, m = m0 + r;
            const u32 left = m < p.rows && k < p.k ? min(p.k - k, 8u) : 0;
            const u16* from = (const u16*)p.input.base + (left ? p.input.offset(m) + k : 0);
            const u32 to = r * ROW + c % PIECES * 16;
            if (wide) {
                copy16(stage + to, from, left * 2);
            } else {
                u16* target = (u16*)(smem + (stage - shared_address(smem)) + to);
                for (u32 i = 0; i < 8; i++) target[i] = i < left ? from[i] : 0;
            }
        }
    }

    static __device__ __forceinline__ void run(const LinearParams& p) {
        extern __shared__ __align__(16) u8 smem[];
        constexpr int MT = WM / 16, NT = WN / 8;
        const u32 base = shared_address(smem);
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        const int wm = warp % (BM / WM) * WM, wn = warp / (BM / WM) * WN;
        const u32 m0 = blockIdx.x * BM, n0 = blockIdx.y * BN;
        const u32 steps = (p.k + BK - 1) / BK;
        const bool wide = (p.input.base | (u64)p.input.ld * 2) % 16 == 0;
        float acc[MT][NT][4] = {};

        for (u32 s = 0; s < STAGES - 1 && s < steps; s++)
            load_w(p, smem, base + s * STAGE, n0, s * BK);
        launch_dependents();
        wait_for_predecessors();
        for (u32 s = 0; s < STAGES - 1; s++) {
            if (s < steps) load_x(p, smem, base + s * STAGE, m0, s * BK, wide);
            asm volatile("cp.async.commit_group;");
        }
        for (u32 s = 0; s < steps; s++) {
            asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2));
            __syncthreads();
            const u32 next = s + STAGES - 1;
            if (next < steps) {
                load_w(p, smem, base + next % STAGES * STAGE, n0, next * BK);
                load_x(p, smem, base + next % STAGES * STAGE, m0, next * BK, wide);
            }
            asm volatile("cp.async.commit_group;");
            const u32 x = base + s % STAGES * STAGE + wm * ROW;
            const u32 w = base + s % STAGES * STAGE + (BM + wn) * ROW;
#pragma unroll
            for (int k = 0; k < BK; k += 16) {
                u32 a[MT][4], b[NT / 2][4];
#pragma unroll
                for (int i = 0; i < MT; i++)
                    load_matrices(a[i], x + (i * 16 + lane % 16) * ROW + k * 2 + lane / 16 * 16);
#pragma unroll
                for (int i = 0; i < NT / 2; i++)
                    load_matrices(b[i], w + (i * 16 + lane / 16 * 8 + lane % 8) * ROW + k * 2 +
                                            lane / 8 % 2 * 16);
#pragma unroll
                for (int i = 0; i < MT; i++)
#pragma unroll
                    for (int j = 0; j < NT; j++)
                        multiply(acc[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
            }
        }
        // Through shared memory, so that the epilogue runs along columns and is compiled once.
        asm volatile("cp.async.wait_group 0;");
        __syncthreads();
        float* y = (float*)smem;
#pragma unroll
        for (int i = 0; i < MT; i++)
#pragma unroll
            for (int j = 0; j < NT; j++)
#pragma unroll
                for (int c = 0; c < 4; c++)
                    y[(wm + i * 16 + lane / 4 + c / 2 * 8) * PITCH + wn + j * 8 + lane % 4 * 2 +
                      c % 2] = acc[i][j][c];
        __syncthreads();
        if (p.output.epilogue == GEGLU || p.output.epilogue == ROPE) {
#pragma unroll 1
            for (u32 e = threadIdx.x; e < BM * BN / 2; e += THREADS) {
                const u32 r = e / (BN / 2), i = e % (BN / 2), c = i / 8 * 16 + i % 8;
                if (m0 + r < p.rows && n0 + c < p.packed_n)
                    finish_pair(p.output, m0 + r, n0 + c, y[r * PITCH + c], y[r * PITCH + c + 8]);
            }
        } else {
#pragma unroll 1
            for (u32 e = threadIdx.x; e < BM * BN; e += THREADS) {
                const u32 r = e / BN, c = e % BN;
                if (m0 + r < p.rows && n0 + c < p.output.n)
                    finish(p.output, m0 + r, n0 + c, y[r * PITCH + c]);
            }
        }
    }
};

extern "C" __global__ void __launch_bounds__(256, 1)
portable_linear_large(const __grid_constant__ LinearParams p) {
    Tile<128, 128, 32, 64, 32, 4>::run(p);
}

extern "C" __global__ void __launch_bounds__(64)
portable_linear_small(const __grid_constant__ LinearParams p) {
    Tile<16, 32, 128, 16, 16, 6>::run(p);
}
