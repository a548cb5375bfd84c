// wgmma.mma_async m64nNkK with K-major operands (PTX ISA, "wgmma.mma_async"): b from shared memory, a from shared
// memory or from registers.
//
// d[4j], d[4j+1]: row 16w + g, columns 8j + 2t, 8j + 2t + 1;  d[4j+2], d[4j+3]: row 16w + g + 8
// with w the warp of the warpgroup, g = lane/4, t = lane%4: per warp the fragment of mma.sync, and so is an `a` in
// registers (ptx.cuh: mma_s8, mma_16).
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
#define QK_N0_47 QK_N0_31 "," QK_N32_47
#define QK_N0_63 QK_N0_47 "," QK_N48_63
#define QK_N0_95 QK_N0_63 "," QK_N64_79 "," QK_N80_95

#define QK_D4(c, i) c(d[i]), c(d[(i) + 1]), c(d[(i) + 2]), c(d[(i) + 3])
#define QK_D16(c, i) QK_D4(c, i), QK_D4(c, (i) + 4), QK_D4(c, (i) + 8), QK_D4(c, (i) + 12)
#define QK_D32(c, i) QK_D16(c, i), QK_D16(c, (i) + 16)
#define QK_D64(c, i) QK_D32(c, i), QK_D32(c, (i) + 32)

// ---- Both operands in shared memory, s8 x s8 -> s32 ----------------------------------------------------------------

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

QK_WGMMA(8, QK_N0_3, "%4", "%5", "%6", QK_D4("+r", 0))
QK_WGMMA(16, QK_N0_3 "," QK_N4_7, "%8", "%9", "%10", QK_D4("+r", 0), QK_D4("+r", 4))
QK_WGMMA(32, QK_N0_15, "%16", "%17", "%18", QK_D16("+r", 0))
QK_WGMMA(64, QK_N0_31, "%32", "%33", "%34", QK_D32("+r", 0))
QK_WGMMA(128, QK_N0_63, "%64", "%65", "%66", QK_D64("+r", 0))
QK_WGMMA(224, QK_N0_95 "," QK_N96_111, "%112", "%113", "%114", QK_D64("+r", 0), QK_D32("+r", 64), QK_D16("+r", 96))
QK_WGMMA(256, QK_N0_95 "," QK_N96_111 "," QK_N112_127, "%128", "%129", "%130", QK_D64("+r", 0), QK_D64("+r", 64))

// ---- a in registers ------------------------------------------------------------------------------------------------

// T: of an element; Sum: of d; types: as the instruction spells them; tail: immediate operands, which only floats have.
#define QK_WGMMA_REGISTERS(T, Sum, N, K, types, tail, numbers, A0, A1, A2, A3, B, P, ...)                              \
  template <>                                                                                                          \
  struct WgmmaRegisters<T, N> {                                                                                        \
    static __device__ __forceinline__ void run(Sum (&d)[N / 2], const uint32_t* a, uint64_t b, int accumulate) {       \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P                                                               \
                   ", 0;\n"                                                                                            \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k" #K "." types " {" numbers "}, {" A0 "," A1 "," A2 "," A3 \
                   "}, " B ", p" tail ";\n}"                                                                           \
                   : __VA_ARGS__                                                                                       \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));                             \
    }                                                                                                                  \
  };
#define QK_WGMMA_TYPES(N, D, numbers, A0, A1, A2, A3, B, P)                                                            \
  QK_WGMMA_REGISTERS(int8_t, int32_t, N, 32, "s32.s8.s8", "", numbers, A0, A1, A2, A3, B, P, D("+r"))                  \
  QK_WGMMA_REGISTERS(__nv_bfloat16, float, N, 16, "f32.bf16.bf16", ", 1, 1, 0", numbers, A0, A1, A2, A3, B, P,         \
                     D("+f"))                                                                                          \
  QK_WGMMA_REGISTERS(__half, float, N, 16, "f32.f16.f16", ", 1, 1, 0", numbers, A0, A1, A2, A3, B, P, D("+f"))
#define QK_SUMS_8(c) QK_D4(c, 0)
#define QK_SUMS_16(c) QK_D4(c, 0), QK_D4(c, 4)
#define QK_SUMS_32(c) QK_D16(c, 0)
#define QK_SUMS_64(c) QK_D32(c, 0)
#define QK_SUMS_96(c) QK_D32(c, 0), QK_D16(c, 32)
#define QK_SUMS_128(c) QK_D64(c, 0)
#define QK_SUMS_192(c) QK_D64(c, 0), QK_D32(c, 64)
#define QK_SUMS_256(c) QK_D64(c, 0), QK_D64(c, 64)

// The same with the four registers of a fragment `a`: 32 k of int8_t, 16 k of 16-bit floats. They must keep their
// values until the products are done.
template <typename T, int kN>
struct WgmmaRegisters;

QK_WGMMA_TYPES(8, QK_SUMS_8, QK_N0_3, "%4", "%5", "%6", "%7", "%8", "%9")
QK_WGMMA_TYPES(16, QK_SUMS_16, QK_N0_3 "," QK_N4_7, "%8", "%9", "%10", "%11", "%12", "%13")
QK_WGMMA_TYPES(32, QK_SUMS_32, QK_N0_15, "%16", "%17", "%18", "%19", "%20", "%21")
QK_WGMMA_TYPES(64, QK_SUMS_64, QK_N0_31, "%32", "%33", "%34", "%35", "%36", "%37")
QK_WGMMA_TYPES(96, QK_SUMS_96, QK_N0_47, "%48", "%49", "%50", "%51", "%52", "%53")
QK_WGMMA_TYPES(128, QK_SUMS_128, QK_N0_63, "%64", "%65", "%66", "%67", "%68", "%69")
QK_WGMMA_TYPES(192, QK_SUMS_192, QK_N0_95, "%96", "%97", "%98", "%99", "%100", "%101")
QK_WGMMA_TYPES(256, QK_SUMS_256, QK_N0_95 "," QK_N96_111 "," QK_N112_127, "%128", "%129", "%130", "%131", "%132",
               "%133")

#undef QK_SUMS_256
#undef QK_SUMS_192
#undef QK_SUMS_128
#undef QK_SUMS_96
#undef QK_SUMS_64
#undef QK_SUMS_32
#undef QK_SUMS_16
#undef QK_SUMS_8
#undef QK_WGMMA_TYPES
#undef QK_WGMMA_REGISTERS
#undef QK_WGMMA
#undef QK_D64
#undef QK_D32
#undef QK_D16
#undef QK_D4
#undef QK_N0_95
#undef QK_N0_63
#undef QK_N0_47
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
