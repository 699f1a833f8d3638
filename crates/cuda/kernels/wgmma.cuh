// wgmma.mma_async m64nNk16, bf16 × bf16 → f32, both operands in shared memory and K-major:
// d[64, N] = a[64, 16]·b[N, 16]ᵀ (+ d if `accumulate`). Thread t of the warpgroup holds rows
// 16·(t/32) + (t%32)/4 and + 8, columns 8j + 2·(t%4) and + 1, as d[4j .. 4j+3] = (row, col),
// (row, col+1), (row+8, col), (row+8, col+1).
#pragma once
#include "ptx.cuh"

namespace ptx {

template <int N> struct Wgmma;
// The same of E4M3 operands, m64nNk32: 32 bytes of a row, too.
template <int N> struct WgmmaE4m3;

// Register names and operands of the first j groups of 8 columns.
#define WG_R1 "%0,%1,%2,%3"
#define WG_D1 "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define WG_R2 WG_R1 ",%4,%5,%6,%7"
#define WG_D2 WG_D1, "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
#define WG_R3 WG_R2 ",%8,%9,%10,%11"
#define WG_D3 WG_D2, "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11])
#define WG_R4 WG_R3 ",%12,%13,%14,%15"
#define WG_D4 WG_D3, "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
#define WG_R5 WG_R4 ",%16,%17,%18,%19"
#define WG_D5 WG_D4, "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19])
#define WG_R6 WG_R5 ",%20,%21,%22,%23"
#define WG_D6 WG_D5, "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23])
#define WG_R7 WG_R6 ",%24,%25,%26,%27"
#define WG_D7 WG_D6, "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27])
#define WG_R8 WG_R7 ",%28,%29,%30,%31"
#define WG_D8 WG_D7, "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define WG_R9 WG_R8 ",%32,%33,%34,%35"
#define WG_D9 WG_D8, "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35])
#define WG_R10 WG_R9 ",%36,%37,%38,%39"
#define WG_D10 WG_D9, "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39])
#define WG_R11 WG_R10 ",%40,%41,%42,%43"
#define WG_D11 WG_D10, "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43])
#define WG_R12 WG_R11 ",%44,%45,%46,%47"
#define WG_D12 WG_D11, "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47])
#define WG_R13 WG_R12 ",%48,%49,%50,%51"
#define WG_D13 WG_D12, "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51])
#define WG_R14 WG_R13 ",%52,%53,%54,%55"
#define WG_D14 WG_D13, "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55])
#define WG_R15 WG_R14 ",%56,%57,%58,%59"
#define WG_D15 WG_D14, "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59])
#define WG_R16 WG_R15 ",%60,%61,%62,%63"
#define WG_D16 WG_D15, "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define WG_R17 WG_R16 ",%64,%65,%66,%67"
#define WG_D17 WG_D16, "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67])
#define WG_R18 WG_R17 ",%68,%69,%70,%71"
#define WG_D18 WG_D17, "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71])
#define WG_R19 WG_R18 ",%72,%73,%74,%75"
#define WG_D19 WG_D18, "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75])
#define WG_R20 WG_R19 ",%76,%77,%78,%79"
#define WG_D20 WG_D19, "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79])
#define WG_R21 WG_R20 ",%80,%81,%82,%83"
#define WG_D21 WG_D20, "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83])
#define WG_R22 WG_R21 ",%84,%85,%86,%87"
#define WG_D22 WG_D21, "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87])
#define WG_R23 WG_R22 ",%88,%89,%90,%91"
#define WG_D23 WG_D22, "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91])
#define WG_R24 WG_R23 ",%92,%93,%94,%95"
#define WG_D24 WG_D23, "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95])
#define WG_R25 WG_R24 ",%96,%97,%98,%99"
#define WG_D25 WG_D24, "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99])
#define WG_R26 WG_R25 ",%100,%101,%102,%103"
#define WG_D26 WG_D25, "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103])
#define WG_R27 WG_R26 ",%104,%105,%106,%107"
#define WG_D27 WG_D26, "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107])
#define WG_R28 WG_R27 ",%108,%109,%110,%111"
#define WG_D28 WG_D27, "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111])
#define WG_R29 WG_R28 ",%112,%113,%114,%115"
#define WG_D29 WG_D28, "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115])
#define WG_R30 WG_R29 ",%116,%117,%118,%119"
#define WG_D30 WG_D29, "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119])
#define WG_R31 WG_R30 ",%120,%121,%122,%123"
#define WG_D31 WG_D30, "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123])
#define WG_R32 WG_R31 ",%124,%125,%126,%127"
#define WG_D32 WG_D31, "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])

// N = 8·J; A, B, P are the numbers of the operands after the 4·J accumulators.
#define WGMMA_SHAPE(N, J, A, B, P)                                                              \
    template <> struct Wgmma<N> {                                                               \
        static __device__ __forceinline__ void run(float (&d)[4 * J], uint64_t a, uint64_t b,   \
                                                   int accumulate) {                            \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P ", 0;\n"                       \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" WG_R##J   \
                         "}, %" #A ", %" #B ", p, 1, 1, 0, 0;\n}"                               \
                         : WG_D##J                                                              \
                         : "l"(a), "l"(b), "r"(accumulate));                                    \
        }                                                                                       \
    };

WGMMA_SHAPE(32, 4, 16, 17, 18)
WGMMA_SHAPE(40, 5, 20, 21, 22)
WGMMA_SHAPE(48, 6, 24, 25, 26)
WGMMA_SHAPE(56, 7, 28, 29, 30)
WGMMA_SHAPE(64, 8, 32, 33, 34)
WGMMA_SHAPE(72, 9, 36, 37, 38)
WGMMA_SHAPE(80, 10, 40, 41, 42)
WGMMA_SHAPE(88, 11, 44, 45, 46)
WGMMA_SHAPE(96, 12, 48, 49, 50)
WGMMA_SHAPE(104, 13, 52, 53, 54)
WGMMA_SHAPE(112, 14, 56, 57, 58)
WGMMA_SHAPE(120, 15, 60, 61, 62)
WGMMA_SHAPE(128, 16, 64, 65, 66)
WGMMA_SHAPE(136, 17, 68, 69, 70)
WGMMA_SHAPE(144, 18, 72, 73, 74)
WGMMA_SHAPE(152, 19, 76, 77, 78)
WGMMA_SHAPE(160, 20, 80, 81, 82)
WGMMA_SHAPE(168, 21, 84, 85, 86)
WGMMA_SHAPE(176, 22, 88, 89, 90)
WGMMA_SHAPE(184, 23, 92, 93, 94)
WGMMA_SHAPE(192, 24, 96, 97, 98)
WGMMA_SHAPE(200, 25, 100, 101, 102)
WGMMA_SHAPE(208, 26, 104, 105, 106)
WGMMA_SHAPE(216, 27, 108, 109, 110)
WGMMA_SHAPE(224, 28, 112, 113, 114)
WGMMA_SHAPE(232, 29, 116, 117, 118)
WGMMA_SHAPE(240, 30, 120, 121, 122)
WGMMA_SHAPE(248, 31, 124, 125, 126)
WGMMA_SHAPE(256, 32, 128, 129, 130)

#define WGMMA_E4M3(N, J, A, B, P)                                                               \
    template <> struct WgmmaE4m3<N> {                                                           \
        static __device__ __forceinline__ void run(float (&d)[4 * J], uint64_t a, uint64_t b,   \
                                                   int accumulate) {                            \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P ", 0;\n"                       \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 {" WG_R##J   \
                         "}, %" #A ", %" #B ", p, 1, 1;\n}"                                     \
                         : WG_D##J                                                              \
                         : "l"(a), "l"(b), "r"(accumulate));                                    \
        }                                                                                       \
    };

WGMMA_E4M3(72, 9, 36, 37, 38)
WGMMA_E4M3(104, 13, 52, 53, 54)
WGMMA_E4M3(136, 17, 68, 69, 70)
WGMMA_E4M3(144, 18, 72, 73, 74)
WGMMA_E4M3(168, 21, 84, 85, 86)
WGMMA_E4M3(184, 23, 92, 93, 94)
WGMMA_E4M3(192, 24, 96, 97, 98)
WGMMA_E4M3(200, 25, 100, 101, 102)
WGMMA_E4M3(248, 31, 124, 125, 126)

// The same with a's fragment in registers: as of mma.m16n8k16, rows 16·(t/32) and on.
template <int N> struct WgmmaRegisters;

// N = 8·J; A0 … A3, B, P are the numbers of the operands after the 4·J accumulators.
#define WGMMA_REGISTERS(N, J, A0, A1, A2, A3, B, P)                                             \
    template <> struct WgmmaRegisters<N> {                                                      \
        static __device__ __forceinline__ void run(float (&d)[4 * J], uint4 a, uint64_t b,      \
                                                   int accumulate) {                            \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P ", 0;\n"                       \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" WG_R##J   \
                         "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B ", p, 1, 1, 0;\n}" \
                         : WG_D##J                                                              \
                         : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "l"(b), "r"(accumulate));    \
        }                                                                                       \
    };

WGMMA_REGISTERS(24, 3, 12, 13, 14, 15, 16, 17)
WGMMA_REGISTERS(56, 7, 28, 29, 30, 31, 32, 33)
WGMMA_REGISTERS(88, 11, 44, 45, 46, 47, 48, 49)

}  // namespace ptx
