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
  static constexpr int kDepthAlign = 8, kMaxBlockTiles = 16;
  static constexpr int64_t kBlockBytes = 384 << 10;
  struct Session {
    Session() {}
  };

  template <int kRows>
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
        dot4(x0, v, b0);
        dot4(x1, v, b1);
        dot4(x2, v, b2);
        dot4(x3, v, b3);
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

  // steps is even; b is 64-byte aligned.
  static void tile(int rows, const uint8_t* a, int64_t lda, const int8_t* b, int64_t steps, int32_t* c, bool accumulate,
                   bool /*minus128*/) {
    switch (rows) {
      case 1: return tile_rows<1>(a, lda, b, steps, c, accumulate);
      case 2: return tile_rows<2>(a, lda, b, steps, c, accumulate);
      case 3: return tile_rows<3>(a, lda, b, steps, c, accumulate);
      case 4: return tile_rows<4>(a, lda, b, steps, c, accumulate);
      case 5: return tile_rows<5>(a, lda, b, steps, c, accumulate);
      default: return tile_rows<6>(a, lda, b, steps, c, accumulate);
    }
  }
};

}  // namespace
}  // namespace qk
