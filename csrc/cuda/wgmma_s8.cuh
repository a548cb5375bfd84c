// wgmma.mma_async m64nNk32, s8 x s8 -> s32, both operands K-major in shared memory (PTX ISA, "wgmma.mma_async").
//
// d[4j], d[4j+1]: row 16w + g, columns 8j + 2t, 8j + 2t + 1;  d[4j+2], d[4j+3]: row 16w + g + 8
// with w the warp of the warpgroup, g = lane/4, t = lane%4: per warp the fragment of mma.sync m16n8k32.
//
// The operand lists are spelled by the macros below since inline assembly takes only literal text.
#pragma once

#include "ptx.cuh"

namespace qk::cuda {

#define QK_N0_3 "%0,%1,%2,%3"
#define QK_N4_7 "%4,%5,%6,%7"
#define QK_N8_15 "%8,%9,%10,%11,%12,%13,%14,%15"
#define QK_N16_31 "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define QK_N32_47 "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define QK_N48_63 "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define QK_N64_79 "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79"
#define QK_N80_95 "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define QK_N96_111 "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111"
#define QK_N112_127 "%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define QK_N0_15 QK_N0_3 "," QK_N4_7 "," QK_N8_15
#define QK_N0_31 QK_N0_15 "," QK_N16_31
#define QK_N0_63 QK_N0_31 "," QK_N32_47 "," QK_N48_63
#define QK_N0_95 QK_N0_63 "," QK_N64_79 "," QK_N80_95

#define QK_D4(i) "+r"(d[i]), "+r"(d[(i) + 1]), "+r"(d[(i) + 2]), "+r"(d[(i) + 3])
#define QK_D16(i) QK_D4(i), QK_D4((i) + 4), QK_D4((i) + 8), QK_D4((i) + 12)
#define QK_D32(i) QK_D16(i), QK_D16((i) + 16)
#define QK_D64(i) QK_D32(i), QK_D32((i) + 32)

// numbers: text of the accumulator operands; A, B, P: operand numbers that follow them; ...: the operands.
#define QK_WGMMA(N, numbers, A, B, P, ...)                                                                             \
  template <>                                                                                                          \
  struct WgmmaS8<N> {                                                                                                  \
    static __device__ __forceinline__ void run(int32_t (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {          \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P                                                               \
                   ", 0;\n"                                                                                            \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k32.s32.s8.s8 {" numbers "}, " A ", " B ", p;\n}"           \
                   : __VA_ARGS__                                                                                       \
                   : "l"(a), "l"(b), "r"(accumulate));                                                                 \
    }                                                                                                                  \
  };

// d = a * b (+ d where accumulate != 0). Asynchronous: fence before the first, commit and wait after the last.
template <int kN>
struct WgmmaS8;

QK_WGMMA(8, QK_N0_3, "%4", "%5", "%6", QK_D4(0))
QK_WGMMA(16, QK_N0_3 "," QK_N4_7, "%8", "%9", "%10", QK_D4(0), QK_D4(4))
QK_WGMMA(32, QK_N0_15, "%16", "%17", "%18", QK_D16(0))
QK_WGMMA(64, QK_N0_31, "%32", "%33", "%34", QK_D32(0))
QK_WGMMA(128, QK_N0_63, "%64", "%65", "%66", QK_D64(0))
QK_WGMMA(224, QK_N0_95 "," QK_N96_111, "%112", "%113", "%114", QK_D64(0), QK_D32(64), QK_D16(96))
QK_WGMMA(256, QK_N0_95 "," QK_N96_111 "," QK_N112_127, "%128", "%129", "%130", QK_D64(0), QK_D64(64))

#undef QK_WGMMA
#undef QK_D64
#undef QK_D32
#undef QK_D16
#undef QK_D4
#undef QK_N0_95
#undef QK_N0_63
#undef QK_N0_31
#undef QK_N0_15
#undef QK_N112_127
#undef QK_N96_111
#undef QK_N80_95
#undef QK_N64_79
#undef QK_N48_63
#undef QK_N32_47
#undef QK_N16_31
#undef QK_N8_15
#undef QK_N4_7
#undef QK_N0_3

}  // namespace qk::cuda
