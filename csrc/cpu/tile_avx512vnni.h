// Micro-kernels of the AVX512-VNNI tier, which the AMX tier uses too where there are few rows.
#pragma once

#include "../layout.h"
#include "ahead.h"
#include "dispatch.h"
#include "verbs_zmm.h"

// c += sum of four u8 x s8 products, per 32-bit lane (VPDPBUSD, not the saturating VPDPBUSDS). Inline assembly over
// accumulators that are variables of their own, and macros rather than lambdas that take references to them: g++ 12
// keeps the accumulators in memory when they stand in an array or are captured, which costs a factor of 2.
#define QK_DOT4(c, u8, s8) asm("vpdpbusd %2, %1, %0" : "+v"(c) : "v"(u8), "v"(s8))

namespace qk {
namespace {

inline __m512i broadcast4(const uint8_t* p) {
  int32_t v;
  __builtin_memcpy(&v, p, 4);
  return _mm512_set1_epi32(v);
}

// 6 x 64 tile: 24 accumulators, 4 weight registers, 1 for the broadcast activations, of 32. A step of 4 k is 10 loads
// for 24 dot products, and 24 chains cover the latency of vpdpbusd (4-5 cycles, up to two a cycle) twice.
struct Avx512Vnni : ZmmVerbs {
  static constexpr const char* kIsa = "avx512vnni";
  static constexpr int kTileM = 6, kTileN = 64, kOffset = 128, kSliceK = 4096;
  static constexpr int kDepthAlign = 8, kMaxBlockTiles = 16, kDirectRows = 4;
  static constexpr bool kFusesGroups = true, kFinishesTiles = true, kJoinsGroups = true, kSumsAreFloats = true;
  static constexpr int64_t kFusedK = 256;
  static constexpr int64_t kOwnRows = 48;
  static constexpr int64_t kBlockBytes = 384 << 10;
  // Codes are unpacked anew for each direct tile: 12 instructions beside 32 dot products, which they hold up on Intel's
  // ports and not on AMD's; and groups are finished through memory. Weights from memory leave time for the former.
  static int64_t direct_rows(int64_t group, bool streams) {
    if (!is_intel()) return 24;
    return group < 64 ? 2 : group >= 128 && streams ? 8 : 4;
  }
  struct Session {
    Session() {}
  };

// One row of a step: four dot products. The unsigned operand is the activations (W8) or the raw codes (W4).
#define QK_ROW(r, address)                                                                                             \
  if constexpr (kRows > r) {                                                                                           \
    const __m512i v = broadcast4((address) + k * kPackK);                                                              \
    if constexpr (kUnsignedWeights) {                                                                                  \
      QK_DOT4(c##r##0, b0, v);                                                                                         \
      QK_DOT4(c##r##1, b1, v);                                                                                         \
      QK_DOT4(c##r##2, b2, v);                                                                                         \
      QK_DOT4(c##r##3, b3, v);                                                                                         \
    } else {                                                                                                           \
      QK_DOT4(c##r##0, v, b0);                                                                                         \
      QK_DOT4(c##r##1, v, b1);                                                                                         \
      QK_DOT4(c##r##2, v, b2);                                                                                         \
      QK_DOT4(c##r##3, v, b3);                                                                                         \
    }                                                                                                                  \
  }
// All steps of six rows, with what they ask for on the way, and something for each of the rows.
#define QK_STEPS()                                                                                                     \
  const uint8_t* a3 = a + 3 * lda;                                                                                     \
  for (int64_t k = 0; k < steps; ++k, b += kBlockN * kPackK) {                                                         \
    const __m512i b0 = _mm512_load_si512(b), b1 = _mm512_load_si512(b + 64), b2 = _mm512_load_si512(b + 128),          \
                  b3 = _mm512_load_si512(b + 192);                                                                     \
    QK_ROW(0, a)                                                                                                       \
    QK_ROW(1, a + lda)                                                                                                 \
    QK_ROW(2, a + 2 * lda)                                                                                             \
    QK_ROW(3, a3)                                                                                                      \
    QK_ROW(4, a3 + lda)                                                                                                \
    QK_ROW(5, a3 + 2 * lda)                                                                                            \
    ask<kLines>(ahead, k);                                                                                             \
  }
#define QK_SIX(what) what(0) what(1) what(2) what(3) what(4) what(5)
#define QK_INIT(r)                                                                                                     \
  __m512i c##r##0 = zero, c##r##1 = zero, c##r##2 = zero, c##r##3 = zero;                                              \
  if (kRows > r && accumulate) {                                                                                       \
    c##r##0 = load_i(c + r * kTileN);                                                                                  \
    c##r##1 = load_i(c + r * kTileN + 16);                                                                             \
    c##r##2 = load_i(c + r * kTileN + 32);                                                                             \
    c##r##3 = load_i(c + r * kTileN + 48);                                                                             \
  }
#define QK_SAVE(r)                                                                                                     \
  if constexpr (kRows > r) {                                                                                           \
    store_i(c + r * kTileN, c##r##0);                                                                                  \
    store_i(c + r * kTileN + 16, c##r##1);                                                                             \
    store_i(c + r * kTileN + 32, c##r##2);                                                                             \
    store_i(c + r * kTileN + 48, c##r##3);                                                                             \
  }

  template <bool kUnsignedWeights, int kRows, int kLines>
  QK_NOINLINE static void tile_rows(const uint8_t* a, int64_t lda, const int8_t* b, int64_t steps, int32_t* c,
                                    bool accumulate, const Ahead& ahead) {
    const __m512i zero = _mm512_setzero_si512();
    QK_SIX(QK_INIT)
    QK_STEPS()
    QK_SIX(QK_SAVE)
  }

  // A tile whose sums become results without a stop in memory: they start at minus the zero point times the sum of the
  // column, and go through the epilogue (linear_w8a8_impl.h) from their registers.
#define QK_BEGIN(r)                                                                                                    \
  __m512i c##r##0 = zero, c##r##1 = zero, c##r##2 = zero, c##r##3 = zero;                                              \
  if constexpr (kRows > r) {                                                                                           \
    if (e.shared) {                                                                                                    \
      c##r##0 = sub_i(zero, load_i(e.shared)), c##r##1 = sub_i(zero, load_i(e.shared + 16));                           \
      c##r##2 = sub_i(zero, load_i(e.shared + 32)), c##r##3 = sub_i(zero, load_i(e.shared + 48));                      \
    } else {                                                                                                           \
      const __m512i minus = set_i(-e.rows[r].zero_point);                                                              \
      c##r##0 = mul_i(minus, load_i(e.colsum)), c##r##1 = mul_i(minus, load_i(e.colsum + 16));                         \
      c##r##2 = mul_i(minus, load_i(e.colsum + 32)), c##r##3 = mul_i(minus, load_i(e.colsum + 48));                    \
    }                                                                                                                  \
  }
#define QK_FINISH_VECTOR(c, j)                                                                                         \
  {                                                                                                                    \
    __m512 v = mul(mul(to_f(c), scale_x), load_f(e.scale + j));                                                        \
    if (e.bias) v = add(v, load_f(e.bias + j));                                                                        \
    store<D>(e.y, at + j, v);                                                                                          \
  }
#define QK_FINISH(r)                                                                                                   \
  if constexpr (kRows > r) {                                                                                           \
    const __m512 scale_x = set(e.rows[r].scale);                                                                       \
    const int64_t at = e.at + r * e.y_stride;                                                                          \
    QK_FINISH_VECTOR(c##r##0, 0)                                                                                       \
    QK_FINISH_VECTOR(c##r##1, 16) QK_FINISH_VECTOR(c##r##2, 32) QK_FINISH_VECTOR(c##r##3, 48)                          \
  }
  template <DType D, int kRows, int kLines, class Epilogue>
  QK_NOINLINE static void finished_rows(const uint8_t* a, int64_t lda, const int8_t* b, int64_t steps,
                                        const Epilogue& e, const Ahead& ahead) {
    constexpr bool kUnsignedWeights = false;
    const __m512i zero = _mm512_setzero_si512();
    QK_SIX(QK_BEGIN)
    QK_STEPS()
    QK_SIX(QK_FINISH)
  }
#undef QK_BEGIN
#undef QK_FINISH
#undef QK_FINISH_VECTOR

  // Rows of a tile that finished_tile serves.
  static constexpr int kFinishedRows = 4;
  template <DType D, class Epilogue>
  static void finished_tile(int rows, const uint8_t* a, int64_t lda, const int8_t* b, int64_t steps, const Epilogue& e,
                            const Ahead& ahead) {
    with_lines(ahead, [&](auto lines) {
      switch (rows) {
        case 4:
          return finished_rows<D, 4, lines()>(a, lda, b, steps, e, ahead);
        case 5:
          return finished_rows<D, 5, lines()>(a, lda, b, steps, e, ahead);
        default:
          return finished_rows<D, 6, lines()>(a, lda, b, steps, e, ahead);
      }
    });
  }

  // As tile, over whole groups of 4-bit weights with one zero point, in turn: total [rows, 64] += float(start + sum) *
  // scale [groups, 64], or int32 all of it; start [groups], lda bytes from row to row, being minus the zero point times
  // the sum of the row's activations.
  //
  // With origin [groups, 64] = kOrigin * scale, start has the bits of kOrigin = 1.5 * 2^23 added. Then the sums are the
  // bits of the floats kOrigin + d without a conversion, |d| being less than 2^22. A scale of 11 bits (fp16) leaves
  // origin exact, so that (kOrigin + d) * scale - origin is d * scale, rounded once: the multiplication's own bits. (Of
  // finite scales, which checks.py sees to.)
#define QK_START(r)                                                                                                    \
  __m512i c##r##0 =                                                                                                    \
      kRows > r ? broadcast4(reinterpret_cast<const uint8_t*>(start + g) + r * lda) : _mm512_setzero_si512(),          \
          c##r##1 = c##r##0, c##r##2 = c##r##0, c##r##3 = c##r##0;
#define QK_TOTAL(r)                                                                                                    \
  if constexpr (kRows > r) {                                                                                           \
    T* t = total + r * kBlockN;                                                                                        \
    const T* s = scale + g * kBlockN;                                                                                  \
    add_group(t, c##r##0, s);                                                                                          \
    add_group(t + 16, c##r##1, s + 16);                                                                                \
    add_group(t + 32, c##r##2, s + 32);                                                                                \
    add_group(t + 48, c##r##3, s + 48);                                                                                \
  }
#define QK_TOTAL_OF_FLOATS(r)                                                                                          \
  if constexpr (kRows > r) {                                                                                           \
    T* t = total + r * kBlockN;                                                                                        \
    add_floats(t, c##r##0, s0, o0);                                                                                    \
    add_floats(t + 16, c##r##1, s1, o1);                                                                               \
    add_floats(t + 32, c##r##2, s2, o2);                                                                               \
    add_floats(t + 48, c##r##3, s3, o3);                                                                               \
  }
  template <int kRows, int kLines, class T>
  QK_NOINLINE static void group_rows(const uint8_t* a, int64_t lda, const int8_t* b, int64_t steps, int64_t groups,
                                     const int32_t* start, const T* scale, const T* origin, T* total, Ahead ahead) {
    constexpr bool kUnsignedWeights = true;
    for (int64_t g = 0; g < groups; ++g, a += steps * kPackK, ahead.at += steps * ahead.stride) {
      asm("" : "+r"(total));  // or g++ would hold totals "in registers" from group to group: on the stack
      QK_SIX(QK_START)
      QK_STEPS()
      if constexpr (std::is_same<T, float>::value) {
        if (origin) {
          const float *s = scale + g * kBlockN, *o = origin + g * kBlockN;
          const F s0 = load_f(s), s1 = load_f(s + 16), s2 = load_f(s + 32), s3 = load_f(s + 48);
          const F o0 = load_f(o), o1 = load_f(o + 16), o2 = load_f(o + 32), o3 = load_f(o + 48);
          QK_SIX(QK_TOTAL_OF_FLOATS)
          continue;
        }
      }
      QK_SIX(QK_TOTAL)
    }
  }
  static void add_floats(float* total, I sum, F scale, F origin) {
    store_f(total, add(load_f(total), _mm512_fmsub_ps(as_f(sum), scale, origin)));
  }
#undef QK_START
#undef QK_TOTAL
#undef QK_TOTAL_OF_FLOATS
#undef QK_SIX
#undef QK_STEPS
#undef QK_ROW
#undef QK_INIT
#undef QK_SAVE

  template <bool kUnsignedWeights>
  static void tile_of(int rows, const uint8_t* a, int64_t lda, const int8_t* b, int64_t steps, int32_t* c,
                      bool accumulate, const Ahead& ahead) {
    with_constants<kTileM>(rows, ahead, [&](auto r, auto lines) {
      tile_rows<kUnsignedWeights, r(), lines()>(a, lda, b, steps, c, accumulate, ahead);
    });
  }
  // b is 64-byte aligned.
  static void tile(int rows, const uint8_t* a, int64_t lda, const int8_t* b, int64_t steps, int32_t* c, bool accumulate,
                   bool /*minus128*/, const Ahead& ahead) {
    tile_of<false>(rows, a, lda, b, steps, c, accumulate, ahead);
  }
  static void tile4(int rows, const uint8_t* a, int64_t lda, const int8_t* b, int64_t steps, int32_t* c,
                    bool accumulate, const Ahead& ahead) {
    tile_of<true>(rows, a, lda, b, steps, c, accumulate, ahead);
  }

  template <class T>
  static void tile4_groups(int rows, const uint8_t* a, int64_t lda, const int8_t* b, int64_t /*columns: always 64*/,
                           int64_t steps, int64_t groups, const int32_t* start, const T* scale, const T* origin,
                           T* total, const Ahead& ahead) {
    with_constants<kTileM>(rows, ahead, [&](auto r, auto lines) {
      group_rows<r(), lines()>(a, lda, b, steps, groups, start, scale, origin, total, ahead);
    });
  }

  // Four column vectors are too few chains for the latency, so odd steps have accumulators of their own. steps is even.
  QK_NOINLINE static void tile_one(const uint8_t* a, const int8_t* b, int64_t steps, int32_t* c, bool /*minus128*/) {
    const __m512i zero = _mm512_setzero_si512();
    __m512i c0 = zero, c1 = zero, c2 = zero, c3 = zero, d0 = zero, d1 = zero, d2 = zero, d3 = zero;
    for (int64_t k = 0; k < steps; k += 2, b += 2 * kBlockN * kPackK) {
      const __m512i v = broadcast4(a + k * kPackK), w = broadcast4(a + k * kPackK + kPackK);
      QK_DOT4(c0, v, _mm512_load_si512(b));
      QK_DOT4(c1, v, _mm512_load_si512(b + 64));
      QK_DOT4(c2, v, _mm512_load_si512(b + 128));
      QK_DOT4(c3, v, _mm512_load_si512(b + 192));
      QK_DOT4(d0, w, _mm512_load_si512(b + 256));
      QK_DOT4(d1, w, _mm512_load_si512(b + 320));
      QK_DOT4(d2, w, _mm512_load_si512(b + 384));
      QK_DOT4(d3, w, _mm512_load_si512(b + 448));
    }
    store_i(c, add_i(c0, d0));
    store_i(c + 16, add_i(c1, d1));
    store_i(c + 32, add_i(c2, d2));
    store_i(c + 48, add_i(c3, d3));
  }

// 16 columns of a line of 8 k: low nibbles are the first four k, high ones the other four. One row alone accumulates
// them apart (into row 1's variables), since four chains are too few.
#define QK_COLUMN(j)                                                                                                   \
  {                                                                                                                    \
    const __m512i w = _mm512_load_si512(packed + 64 * j);                                                              \
    const __m512i low = _mm512_and_si512(w, nibble), high = _mm512_and_si512(_mm512_srli_epi16(w, 4), nibble);         \
    QK_DOT4(c0##j, low, v0);                                                                                           \
    if constexpr (kRows == 1) QK_DOT4(c1##j, high, w0);                                                                \
    if constexpr (kRows > 1) QK_DOT4(c0##j, high, w0);                                                                 \
    if constexpr (kRows > 1) QK_DOT4(c1##j, low, v1);                                                                  \
    if constexpr (kRows > 1) QK_DOT4(c1##j, high, w1);                                                                 \
    if constexpr (kRows > 2) QK_DOT4(c2##j, low, v2);                                                                  \
    if constexpr (kRows > 2) QK_DOT4(c2##j, high, w2);                                                                 \
    if constexpr (kRows > 3) QK_DOT4(c3##j, low, v3);                                                                  \
    if constexpr (kRows > 3) QK_DOT4(c3##j, high, w3);                                                                 \
  }
#define QK_SAVE(r)                                                                                                     \
  store_i(c + r * kBlockN, c##r##0);                                                                                   \
  store_i(c + r * kBlockN + 16, c##r##1);                                                                              \
  store_i(c + r * kBlockN + 32, c##r##2);                                                                              \
  store_i(c + r * kBlockN + 48, c##r##3);

  template <int kRows, int kLines>
  QK_NOINLINE static void direct_rows(const uint8_t* a, int64_t lda, const uint8_t* packed, int64_t lines, int32_t* c,
                                      const Ahead& ahead) {
    const __m512i zero = _mm512_setzero_si512(), nibble = _mm512_set1_epi8(15);
    __m512i c00 = zero, c01 = zero, c02 = zero, c03 = zero, c10 = zero, c11 = zero, c12 = zero, c13 = zero;
    __m512i c20 = zero, c21 = zero, c22 = zero, c23 = zero, c30 = zero, c31 = zero, c32 = zero, c33 = zero;
    __m512i v0, w0, v1 = zero, w1 = zero, v2 = zero, w2 = zero, v3 = zero, w3 = zero;
    for (int64_t l = 0; l < lines; ++l, packed += kBlockN * kPackK, a += 2 * kPackK) {
      v0 = broadcast4(a);
      w0 = broadcast4(a + kPackK);
      if constexpr (kRows > 1) v1 = broadcast4(a + lda), w1 = broadcast4(a + lda + kPackK);
      if constexpr (kRows > 2) v2 = broadcast4(a + 2 * lda), w2 = broadcast4(a + 2 * lda + kPackK);
      if constexpr (kRows > 3) v3 = broadcast4(a + 3 * lda), w3 = broadcast4(a + 3 * lda + kPackK);
      QK_COLUMN(0)
      QK_COLUMN(1)
      QK_COLUMN(2)
      QK_COLUMN(3)
      ask<kLines>(ahead, l);
    }
    if constexpr (kRows == 1) {
      c00 = add_i(c00, c10), c01 = add_i(c01, c11), c02 = add_i(c02, c12), c03 = add_i(c03, c13);
    }
    QK_SAVE(0)
    if constexpr (kRows > 1) {
      QK_SAVE(1)
    }
    if constexpr (kRows > 2) {
      QK_SAVE(2)
    }
    if constexpr (kRows > 3) {
      QK_SAVE(3)
    }
  }
#undef QK_COLUMN
#undef QK_SAVE
  static void tile4_direct(int rows, const uint8_t* a, int64_t lda, const uint8_t* packed, int64_t lines, int32_t* c,
                           const Ahead& ahead) {
    with_constants<kDirectRows>(
        rows, ahead, [&](auto r, auto asked) { direct_rows<r(), asked()>(a, lda, packed, lines, c, ahead); });
  }
};

}  // namespace
}  // namespace qk
