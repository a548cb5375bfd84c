// Micro-kernels of the AVX512-VNNI tier, which the AMX tier uses too where there are few rows.
#pragma once

#include "../layout.h"
#include "verbs_zmm.h"

namespace qk {
namespace {

// c += sum of four u8 x s8 products, per 32-bit lane (VPDPBUSD, not the saturating VPDPBUSDS). Inline assembly with
// every accumulator a variable of its own: g++ 12 spills and copies the accumulators when they stand in an array and
// the intrinsic is used, which costs a factor of 2.5.
inline void dot4(__m512i& c, __m512i u8, __m512i s8) { asm("vpdpbusd %2, %1, %0" : "+v"(c) : "v"(u8), "v"(s8)); }

// Which operand of the instruction the weights are: signed bytes (W8, activations offset to unsigned), or unsigned 4-bit
// codes (W4, activations signed).
struct SignedWeights {
  static void dot(__m512i& c, __m512i a, __m512i w) { dot4(c, a, w); }
};
struct UnsignedWeights {
  static void dot(__m512i& c, __m512i a, __m512i w) { dot4(c, w, a); }
};

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
  static constexpr int64_t kBlockBytes = 384 << 10;
  struct Session {
    Session() {}
  };

  template <class W, int kRows>
  static void tile_rows(const uint8_t* a, int64_t lda, const int8_t* b, int64_t steps, int32_t* c, bool accumulate) {
    __m512i c00, c01, c02, c03, c10, c11, c12, c13, c20, c21, c22, c23;
    __m512i c30, c31, c32, c33, c40, c41, c42, c43, c50, c51, c52, c53;
    const auto init = [&](int r, __m512i& x0, __m512i& x1, __m512i& x2, __m512i& x3) {
      const __m512i zero = _mm512_setzero_si512();
      x0 = accumulate ? load_i(c + r * kTileN) : zero;
      x1 = accumulate ? load_i(c + r * kTileN + 16) : zero;
      x2 = accumulate ? load_i(c + r * kTileN + 32) : zero;
      x3 = accumulate ? load_i(c + r * kTileN + 48) : zero;
    };
    const auto save = [&](int r, __m512i x0, __m512i x1, __m512i x2, __m512i x3) {
      store_i(c + r * kTileN, x0);
      store_i(c + r * kTileN + 16, x1);
      store_i(c + r * kTileN + 32, x2);
      store_i(c + r * kTileN + 48, x3);
    };
    init(0, c00, c01, c02, c03);
    if constexpr (kRows > 1) init(1, c10, c11, c12, c13);
    if constexpr (kRows > 2) init(2, c20, c21, c22, c23);
    if constexpr (kRows > 3) init(3, c30, c31, c32, c33);
    if constexpr (kRows > 4) init(4, c40, c41, c42, c43);
    if constexpr (kRows > 5) init(5, c50, c51, c52, c53);
    const uint8_t* a3 = a + 3 * lda;
    const auto step = [&](int64_t k) __attribute__((always_inline)) {
      const int8_t* bk = b + k * kBlockN * kPackK;
      const __m512i b0 = _mm512_load_si512(bk), b1 = _mm512_load_si512(bk + 64), b2 = _mm512_load_si512(bk + 128),
                    b3 = _mm512_load_si512(bk + 192);
      const auto row = [&](const uint8_t* ar, __m512i& x0, __m512i& x1, __m512i& x2,
                           __m512i& x3) __attribute__((always_inline)) {
        const __m512i v = broadcast4(ar + k * kPackK);
        W::dot(x0, v, b0);
        W::dot(x1, v, b1);
        W::dot(x2, v, b2);
        W::dot(x3, v, b3);
      };
      row(a, c00, c01, c02, c03);
      if constexpr (kRows > 1) row(a + lda, c10, c11, c12, c13);
      if constexpr (kRows > 2) row(a + 2 * lda, c20, c21, c22, c23);
      if constexpr (kRows > 3) row(a3, c30, c31, c32, c33);
      if constexpr (kRows > 4) row(a3 + lda, c40, c41, c42, c43);
      if constexpr (kRows > 5) row(a3 + 2 * lda, c50, c51, c52, c53);
    };
    for (int64_t k = 0; k < steps; k += 2) {
      step(k);
      step(k + 1);
    }
    save(0, c00, c01, c02, c03);
    if constexpr (kRows > 1) save(1, c10, c11, c12, c13);
    if constexpr (kRows > 2) save(2, c20, c21, c22, c23);
    if constexpr (kRows > 3) save(3, c30, c31, c32, c33);
    if constexpr (kRows > 4) save(4, c40, c41, c42, c43);
    if constexpr (kRows > 5) save(5, c50, c51, c52, c53);
  }

  // Four column vectors are too few chains for the latency, so odd steps have accumulators of their own.
  static void tile_one(const uint8_t* a, const int8_t* b, int64_t steps, int32_t* c, bool /*minus128*/) {
    const __m512i zero = _mm512_setzero_si512();
    __m512i c0 = zero, c1 = zero, c2 = zero, c3 = zero, d0 = zero, d1 = zero, d2 = zero, d3 = zero;
    for (int64_t k = 0; k < steps; k += 2) {
      const int8_t* bk = b + k * kBlockN * kPackK;
      const __m512i v = broadcast4(a + k * kPackK), w = broadcast4(a + k * kPackK + kPackK);
      dot4(c0, v, _mm512_load_si512(bk));
      dot4(c1, v, _mm512_load_si512(bk + 64));
      dot4(c2, v, _mm512_load_si512(bk + 128));
      dot4(c3, v, _mm512_load_si512(bk + 192));
      dot4(d0, w, _mm512_load_si512(bk + 256));
      dot4(d1, w, _mm512_load_si512(bk + 320));
      dot4(d2, w, _mm512_load_si512(bk + 384));
      dot4(d3, w, _mm512_load_si512(bk + 448));
    }
    store_i(c, add_i(c0, d0));
    store_i(c + 16, add_i(c1, d1));
    store_i(c + 32, add_i(c2, d2));
    store_i(c + 48, add_i(c3, d3));
  }

  template <class W>
  static void tile_of(int rows, const uint8_t* a, int64_t lda, const int8_t* b, int64_t steps, int32_t* c, bool accumulate) {
    switch (rows) {
      case 1: return tile_rows<W, 1>(a, lda, b, steps, c, accumulate);
      case 2: return tile_rows<W, 2>(a, lda, b, steps, c, accumulate);
      case 3: return tile_rows<W, 3>(a, lda, b, steps, c, accumulate);
      case 4: return tile_rows<W, 4>(a, lda, b, steps, c, accumulate);
      case 5: return tile_rows<W, 5>(a, lda, b, steps, c, accumulate);
      default: return tile_rows<W, 6>(a, lda, b, steps, c, accumulate);
    }
  }

  // steps is even; b is 64-byte aligned.
  static void tile(int rows, const uint8_t* a, int64_t lda, const int8_t* b, int64_t steps, int32_t* c, bool accumulate,
                   bool /*minus128*/) {
    tile_of<SignedWeights>(rows, a, lda, b, steps, c, accumulate);
  }
  static void tile4(int rows, const uint8_t* a, int64_t lda, const int8_t* b, int64_t steps, int32_t* c, bool accumulate) {
    tile_of<UnsignedWeights>(rows, a, lda, b, steps, c, accumulate);
  }

  // A line of 8 k: the low nibbles of its 256 bytes are the first four k, the high ones the other four.
  template <int kRows>
  static void direct_rows(const uint8_t* a, int64_t lda, const uint8_t* packed, int64_t lines, int32_t* c) {
    const __m512i zero = _mm512_setzero_si512(), nibble = _mm512_set1_epi8(15);
    __m512i c00 = zero, c01 = zero, c02 = zero, c03 = zero, c10 = zero, c11 = zero, c12 = zero, c13 = zero;
    __m512i c20 = zero, c21 = zero, c22 = zero, c23 = zero, c30 = zero, c31 = zero, c32 = zero, c33 = zero;
    for (int64_t l = 0; l < lines; ++l) {
      const uint8_t *line = packed + l * kBlockN * kPackK, *x = a + l * 2 * kPackK;
      const auto column = [&](int j, __m512i& x0, __m512i& x1, __m512i& x2, __m512i& x3) __attribute__((always_inline)) {
        const __m512i w = _mm512_load_si512(line + 64 * j);
        const __m512i low = _mm512_and_si512(w, nibble), high = _mm512_and_si512(_mm512_srli_epi16(w, 4), nibble);
        dot4(x0, low, broadcast4(x));
        if constexpr (kRows > 1) dot4(x1, low, broadcast4(x + lda));
        if constexpr (kRows > 2) dot4(x2, low, broadcast4(x + 2 * lda));
        if constexpr (kRows > 3) dot4(x3, low, broadcast4(x + 3 * lda));
        dot4(kRows == 1 ? x1 : x0, high, broadcast4(x + kPackK));  // one row: a second chain hides the latency
        if constexpr (kRows > 1) dot4(x1, high, broadcast4(x + lda + kPackK));
        if constexpr (kRows > 2) dot4(x2, high, broadcast4(x + 2 * lda + kPackK));
        if constexpr (kRows > 3) dot4(x3, high, broadcast4(x + 3 * lda + kPackK));
      };
      column(0, c00, c10, c20, c30);
      column(1, c01, c11, c21, c31);
      column(2, c02, c12, c22, c32);
      column(3, c03, c13, c23, c33);
    }
    const auto save = [&](int r, __m512i x0, __m512i x1, __m512i x2, __m512i x3) {
      store_i(c + r * kBlockN, x0);
      store_i(c + r * kBlockN + 16, x1);
      store_i(c + r * kBlockN + 32, x2);
      store_i(c + r * kBlockN + 48, x3);
    };
    if constexpr (kRows == 1) {
      save(0, add_i(c00, c10), add_i(c01, c11), add_i(c02, c12), add_i(c03, c13));
    } else {
      save(0, c00, c01, c02, c03);
      save(1, c10, c11, c12, c13);
      if constexpr (kRows > 2) save(2, c20, c21, c22, c23);
      if constexpr (kRows > 3) save(3, c30, c31, c32, c33);
    }
  }
  static void tile4_direct(int rows, const uint8_t* a, int64_t lda, const uint8_t* packed, int64_t lines, int32_t* c) {
    switch (rows) {
      case 1: return direct_rows<1>(a, lda, packed, lines, c);
      case 2: return direct_rows<2>(a, lda, packed, lines, c);
      case 3: return direct_rows<3>(a, lda, packed, lines, c);
      default: return direct_rows<4>(a, lda, packed, lines, c);
    }
  }
};

}  // namespace
}  // namespace qk
