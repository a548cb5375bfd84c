// AVX2 tier: no dot-product instruction, so vpmaddubsw + vpmaddwd.
#include "activation_impl.h"
#include "dispatch.h"
#include "linear_w4a8_impl.h"
#include "linear_w8a8_impl.h"
#include "quantize_impl.h"
#include "verbs_ymm.h"

namespace qk {
namespace {

// vpmaddubsw multiplies u8 by s8 and adds pairs into int16 with saturation. Activations are stored signed, and the sign
// moves to the weight: |a| * sign(w, a). With |a| <= 128 and |w| <= 127 a pair is at most 2 * 128 * 127 = 32512 <
// 32768, so nothing saturates. (u8 x s8 directly would: 2 * 255 * 127.) A weight of -128 has no negative in int8, so
// such weights, which only foreign checkpoints hold, take the path that widens to 16 bits first.
struct Signed {
  static __m256i dot4(__m256i a, __m256i abs_a, __m256i w, __m256i ones) {
    return _mm256_madd_epi16(_mm256_maddubs_epi16(abs_a, _mm256_sign_epi8(w, a)), ones);
  }
};
struct Widened {
  static __m256i dot4(__m256i a, __m256i /*abs_a*/, __m256i w, __m256i /*ones*/) {
    const __m256i odd = _mm256_madd_epi16(_mm256_srai_epi16(a, 8), _mm256_srai_epi16(w, 8));
    const __m256i even =
        _mm256_madd_epi16(_mm256_srai_epi16(_mm256_slli_epi16(a, 8), 8), _mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8));
    return _mm256_add_epi32(odd, even);
  }
};

// 4-bit codes are the unsigned operand and activations the signed one: a pair is at most 2 * 15 * 128 = 3840, so eight
// of them fit in int16 (30720 < 32768) before they are widened.
constexpr int64_t kCodeSteps = 8;

inline __m256i broadcast4(const uint8_t* p) {
  int32_t v;
  __builtin_memcpy(&v, p, 4);
  return _mm256_set1_epi32(v);
}

// 4 x 16 tile: 8 accumulators, 2 weight registers, a, |a|, ones and a temporary, of 16.
struct Avx2 : YmmVerbs {
  static constexpr const char* kIsa = "avx2";
  static constexpr int kTileM = 4, kTileN = 16, kOffset = 0, kSliceK = 512;
  static constexpr int kDepthAlign = 8, kMaxBlockTiles = 16, kDirectRows = 1, kDirectTiles = 1;
  static constexpr bool kFusesGroups = true, kPrefetchesSlices = true, kFinishesTiles = false, kWidens = true;
  static constexpr int64_t kBlockBytes = 384 << 10, kWideBlockBytes = 1536 << 10;
  static constexpr int kWideTileM = 6, kWideSliceK = 512;
  // Measured on Zen 3. Deep weights come from memory, and widening reads them as one sequential stream.
  static constexpr int64_t wide_rows(int64_t k) { return k < 2048 ? 6 : 2; }
  struct Session {
    Session() {}
  };

  template <class Dot, int kRows>
  QK_NOINLINE static void tile_rows(const uint8_t* a, int64_t lda, const int8_t* b, int64_t steps, int32_t* c,
                                    bool accumulate) {
    __m256i c00, c01, c10, c11, c20, c21, c30, c31;
    const auto init = [&](int r, __m256i& x0, __m256i& x1) {
      x0 = accumulate ? load_i(c + r * kTileN) : _mm256_setzero_si256();
      x1 = accumulate ? load_i(c + r * kTileN + 8) : _mm256_setzero_si256();
    };
    const auto save = [&](int r, __m256i x0, __m256i x1) {
      store_i(c + r * kTileN, x0);
      store_i(c + r * kTileN + 8, x1);
    };
    init(0, c00, c01);
    if constexpr (kRows > 1) init(1, c10, c11);
    if constexpr (kRows > 2) init(2, c20, c21);
    if constexpr (kRows > 3) init(3, c30, c31);
    const __m256i ones = _mm256_set1_epi16(1);
    for (int64_t k = 0; k < steps; ++k) {
      const int8_t* bk = b + k * kBlockN * kPackK;
      const __m256i b0 = _mm256_load_si256(reinterpret_cast<const __m256i*>(bk)),
                    b1 = _mm256_load_si256(reinterpret_cast<const __m256i*>(bk + 32));
      const auto row = [&](const uint8_t* ar, __m256i& x0, __m256i& x1) __attribute__((always_inline)) {
        const __m256i v = broadcast4(ar + k * kPackK), abs_v = _mm256_abs_epi8(v);
        x0 = _mm256_add_epi32(x0, Dot::dot4(v, abs_v, b0, ones));
        x1 = _mm256_add_epi32(x1, Dot::dot4(v, abs_v, b1, ones));
      };
      row(a, c00, c01);
      if constexpr (kRows > 1) row(a + lda, c10, c11);
      if constexpr (kRows > 2) row(a + 2 * lda, c20, c21);
      if constexpr (kRows > 3) row(a + 3 * lda, c30, c31);
    }
    save(0, c00, c01);
    if constexpr (kRows > 1) save(1, c10, c11);
    if constexpr (kRows > 2) save(2, c20, c21);
    if constexpr (kRows > 3) save(3, c30, c31);
  }

  template <class Dot>
  QK_NOINLINE static void tile_one_with(const uint8_t* a, const int8_t* b, int64_t steps, int32_t* c) {
    __m256i c0, c1, c2, c3, c4, c5, c6, c7;
    c0 = c1 = c2 = c3 = c4 = c5 = c6 = c7 = _mm256_setzero_si256();
    const __m256i ones = _mm256_set1_epi16(1);
    for (int64_t k = 0; k < steps; ++k) {
      const __m256i* bk = reinterpret_cast<const __m256i*>(b + k * kBlockN * kPackK);
      const __m256i v = broadcast4(a + k * kPackK), abs_v = _mm256_abs_epi8(v);
      const auto add = [&](__m256i& x, const __m256i* w) __attribute__((always_inline)) {
        x = _mm256_add_epi32(x, Dot::dot4(v, abs_v, _mm256_load_si256(w), ones));
      };
      add(c0, bk);
      add(c1, bk + 1);
      add(c2, bk + 2);
      add(c3, bk + 3);
      add(c4, bk + 4);
      add(c5, bk + 5);
      add(c6, bk + 6);
      add(c7, bk + 7);
    }
    store_i(c, c0);
    store_i(c + 8, c1);
    store_i(c + 16, c2);
    store_i(c + 24, c3);
    store_i(c + 32, c4);
    store_i(c + 40, c5);
    store_i(c + 48, c6);
    store_i(c + 56, c7);
  }

  QK_NOINLINE static void tile_one(const uint8_t* a, const int8_t* b, int64_t steps, int32_t* c, bool minus128) {
    if (minus128)
      tile_one_with<Widened>(a, b, steps, c);
    else
      tile_one_with<Signed>(a, b, steps, c);
  }

  template <class Dot>
  static void tile_with(int rows, const uint8_t* a, int64_t lda, const int8_t* b, int64_t steps, int32_t* c,
                        bool accumulate) {
    switch (rows) {
      case 1:
        return tile_rows<Dot, 1>(a, lda, b, steps, c, accumulate);
      case 2:
        return tile_rows<Dot, 2>(a, lda, b, steps, c, accumulate);
      case 3:
        return tile_rows<Dot, 3>(a, lda, b, steps, c, accumulate);
      default:
        return tile_rows<Dot, 4>(a, lda, b, steps, c, accumulate);
    }
  }

  static void tile(int rows, const uint8_t* a, int64_t lda, const int8_t* b, int64_t steps, int32_t* c, bool accumulate,
                   bool minus128) {
    if (minus128)
      tile_with<Widened>(rows, a, lda, b, steps, c, accumulate);
    else
      tile_with<Signed>(rows, a, lda, b, steps, c, accumulate);
  }

  // ---- widened operands ----------------------------------------------------------------------------------------
  //
  // vpmaddwd over words is 16 products; vpsignb, vpmaddubsw and vpmaddwd are 32, but need the same two pipes of most
  // processors three times, and |a| besides. Within a group of four k, words stand in the order k0 k2, k1 k3: that is
  // what a shift leaves of the bytes of a dword.

  static __m256i even_words(__m256i bytes) { return _mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8); }
  static __m256i odd_words(__m256i bytes) { return _mm256_srai_epi16(bytes, 8); }

  // bytes: a multiple of 64, of int8. The words may overlap what has been read.
  static void widen_row(const uint8_t* in, int64_t bytes, uint8_t* out) {
    for (int64_t i = 0; i < bytes; i += 32) {
      const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + i));
      const __m256i even = even_words(v), odd = odd_words(v);
      const __m256i low = _mm256_unpacklo_epi32(even, odd), high = _mm256_unpackhi_epi32(even, odd);
      __m256i* to = reinterpret_cast<__m256i*>(out + 2 * i);
      _mm256_storeu_si256(to, _mm256_permute2x128_si256(low, high, 0x20));
      _mm256_storeu_si256(to + 1, _mm256_permute2x128_si256(low, high, 0x31));
    }
  }

  // panel [64 / 16 columns][steps][k0 k2 of 16 columns, k1 k3 of 16 columns]: a column tile's part stays in L1.
  QK_NOINLINE static void widen_panel(const int8_t* b, int64_t steps, int16_t* panel) {
    for (int64_t k = 0; k < steps; ++k) {
      for (int64_t j = 0; j < kBlockN / kTileN; ++j) {
        const __m256i* in = reinterpret_cast<const __m256i*>(b + (k * kBlockN + j * kTileN) * kPackK);
        const __m256i b0 = _mm256_load_si256(in), b1 = _mm256_load_si256(in + 1);
        __m256i* out = reinterpret_cast<__m256i*>(panel + (j * steps + k) * kTileN * kPackK);
        _mm256_store_si256(out, even_words(b0));
        _mm256_store_si256(out + 1, even_words(b1));
        _mm256_store_si256(out + 2, odd_words(b0));
        _mm256_store_si256(out + 3, odd_words(b1));
      }
    }
  }

  // 6 x 16 tile: 12 accumulators, 2 weight registers, the broadcast activations and a temporary, of 16.
  template <int kRows>
  QK_NOINLINE static void wide_rows(const uint8_t* a, int64_t lda, const int16_t* panel, int64_t steps, int32_t* c,
                                    bool accumulate) {
    __m256i c00, c01, c10, c11, c20, c21, c30, c31, c40, c41, c50, c51;
    const auto init = [&](int r, __m256i& x0, __m256i& x1) {
      x0 = accumulate ? load_i(c + r * kTileN) : _mm256_setzero_si256();
      x1 = accumulate ? load_i(c + r * kTileN + 8) : _mm256_setzero_si256();
    };
    init(0, c00, c01);
    if constexpr (kRows > 1) init(1, c10, c11);
    if constexpr (kRows > 2) init(2, c20, c21);
    if constexpr (kRows > 3) init(3, c30, c31);
    if constexpr (kRows > 4) init(4, c40, c41);
    if constexpr (kRows > 5) init(5, c50, c51);
    const uint8_t* a3 = a + 3 * lda;  // two bases reach six rows without arithmetic
    const __m256i* b = reinterpret_cast<const __m256i*>(panel);
    for (const __m256i* end = b + 4 * steps; b < end; b += 4, a += 8, a3 += 8) {
      const auto pairs = [&](int at) __attribute__((always_inline)) {
        const __m256i b0 = _mm256_load_si256(b + at / 2), b1 = _mm256_load_si256(b + at / 2 + 1);
        // By hand: left to itself, g++ 12 keeps half of the accumulators on the stack.
        const auto row = [&](const uint8_t* ar, __m256i& x0, __m256i& x1) __attribute__((always_inline)) {
          __m256i v, t;
          __asm__(
              "vpbroadcastd %4, %2\n\t"
              "vpmaddwd %2, %5, %3\n\t"
              "vpmaddwd %2, %6, %2\n\t"
              "vpaddd %3, %0, %0\n\t"
              "vpaddd %2, %1, %1"
              : "+x"(x0), "+x"(x1), "=&x"(v), "=&x"(t)
              : "m"(*reinterpret_cast<const int32_t*>(ar + at)), "x"(b0), "x"(b1));
        };
        row(a, c00, c01);
        if constexpr (kRows > 1) row(a + lda, c10, c11);
        if constexpr (kRows > 2) row(a + 2 * lda, c20, c21);
        if constexpr (kRows > 3) row(a3, c30, c31);
        if constexpr (kRows > 4) row(a3 + lda, c40, c41);
        if constexpr (kRows > 5) row(a3 + 2 * lda, c50, c51);
      };
      pairs(0);
      pairs(4);
    }
    const auto save = [&](int r, __m256i x0, __m256i x1) {
      store_i(c + r * kTileN, x0);
      store_i(c + r * kTileN + 8, x1);
    };
    save(0, c00, c01);
    if constexpr (kRows > 1) save(1, c10, c11);
    if constexpr (kRows > 2) save(2, c20, c21);
    if constexpr (kRows > 3) save(3, c30, c31);
    if constexpr (kRows > 4) save(4, c40, c41);
    if constexpr (kRows > 5) save(5, c50, c51);
  }
  static void wide_tile(int rows, const uint8_t* a, int64_t lda, const int16_t* panel, int64_t steps, int32_t* c,
                        bool accumulate) {
    switch (rows) {
      case 1:
        return wide_rows<1>(a, lda, panel, steps, c, accumulate);
      case 2:
        return wide_rows<2>(a, lda, panel, steps, c, accumulate);
      case 3:
        return wide_rows<3>(a, lda, panel, steps, c, accumulate);
      case 4:
        return wide_rows<4>(a, lda, panel, steps, c, accumulate);
      case 5:
        return wide_rows<5>(a, lda, panel, steps, c, accumulate);
      default:
        return wide_rows<6>(a, lda, panel, steps, c, accumulate);
    }
  }

  // The words of kCodeSteps steps at a time, to finish(row, half, first k of the piece, words).
  template <int kRows, class Finish>
  __attribute__((always_inline)) static void code_words(const uint8_t* a, int64_t lda, const int8_t* b, int64_t steps,
                                                        const Finish& finish) {
    const uint8_t* a2 = a + 2 * lda;
    for (int64_t k = 0; k < steps; k += kCodeSteps) {
      const int8_t* end = b + (steps - k < kCodeSteps ? steps - k : kCodeSteps) * kBlockN * kPackK;
      __m256i c00, c01, c10, c11, c20, c21, c30, c31;
      c00 = c01 = c10 = c11 = c20 = c21 = c30 = c31 = _mm256_setzero_si256();
#pragma GCC unroll 4
      for (; b < end; b += kBlockN * kPackK, a += kPackK, a2 += kPackK) {
        const __m256i b0 = _mm256_load_si256(reinterpret_cast<const __m256i*>(b)),
                      b1 = _mm256_load_si256(reinterpret_cast<const __m256i*>(b + 32));
        // By hand, as in wide_rows.
        const auto row = [&](const uint8_t* ar, __m256i& x0, __m256i& x1) __attribute__((always_inline)) {
          __m256i v, t;
          __asm__(
              "vpbroadcastd %4, %2\n\t"
              "vpmaddubsw %2, %5, %3\n\t"
              "vpmaddubsw %2, %6, %2\n\t"
              "vpaddw %3, %0, %0\n\t"
              "vpaddw %2, %1, %1"
              : "+x"(x0), "+x"(x1), "=&x"(v), "=&x"(t)
              : "m"(*reinterpret_cast<const int32_t*>(ar)), "x"(b0), "x"(b1));
        };
        row(a, c00, c01);
        if constexpr (kRows > 1) row(a + lda, c10, c11);
        if constexpr (kRows > 2) row(a2, c20, c21);
        if constexpr (kRows > 3) row(a2 + lda, c30, c31);
      }
      const auto both = [&](int r, __m256i x0, __m256i x1) __attribute__((always_inline)) {
        finish(r, 0, k, x0);
        finish(r, 8, k, x1);
      };
      both(0, c00, c01);
      if constexpr (kRows > 1) both(1, c10, c11);
      if constexpr (kRows > 2) both(2, c20, c21);
      if constexpr (kRows > 3) both(3, c30, c31);
    }
  }

  template <int kRows>
  QK_NOINLINE static void tile4_rows(const uint8_t* a, int64_t lda, const int8_t* b, int64_t steps, int32_t* c,
                                     bool accumulate) {
    const __m256i ones = _mm256_set1_epi16(1);
    if (!accumulate) __builtin_memset(c, 0, sizeof(int32_t) * kRows * kTileN);
    code_words<kRows>(a, lda, b, steps, [&](int r, int half, int64_t, __m256i words) __attribute__((always_inline)) {
      int32_t* to = c + r * kTileN + half;
      store_i(to, add_i(load_i(to), _mm256_madd_epi16(words, ones)));
    });
  }

  // One group and 16 columns: totals [rows, 64] += float(start + sum) * scale.
  template <int kRows>
  QK_NOINLINE static void tile4_group_rows(const uint8_t* a, int64_t lda, const int8_t* b, int64_t steps,
                                           const int32_t* start, const float* scale, float* totals) {
    const __m256i ones = _mm256_set1_epi16(1);
    alignas(32) int32_t c[kRows * kTileN];
    code_words<kRows>(a, lda, b, steps, [&](int r, int half, int64_t k, __m256i words) __attribute__((always_inline)) {
      int32_t* sum = c + r * kTileN + half;
      const __m256i s = add_i(k == 0 ? set_i(start[r]) : load_i(sum), _mm256_madd_epi16(words, ones));
      if (k + kCodeSteps < steps) return store_i(sum, s);
      float* total = totals + r * kBlockN + half;
      store_f(total, add(load_f(total), mul(to_f(s), load_f(scale + half))));
    });
  }
  static void tile4_group(int rows, const uint8_t* a, int64_t lda, const int8_t* panel, int64_t columns, int64_t steps,
                          const int32_t* start, const float* scale, float* totals) {
    for (int j = 0; j < columns; j += kTileN) {
      const int8_t* b = panel + j * kPackK;
      switch (rows) {
        case 1:
          tile4_group_rows<1>(a, lda, b, steps, start, scale + j, totals + j);
          break;
        case 2:
          tile4_group_rows<2>(a, lda, b, steps, start, scale + j, totals + j);
          break;
        case 3:
          tile4_group_rows<3>(a, lda, b, steps, start, scale + j, totals + j);
          break;
        default:
          tile4_group_rows<4>(a, lda, b, steps, start, scale + j, totals + j);
          break;
      }
    }
  }
  static void tile4(int rows, const uint8_t* a, int64_t lda, const int8_t* b, int64_t steps, int32_t* c,
                    bool accumulate) {
    switch (rows) {
      case 1:
        return tile4_rows<1>(a, lda, b, steps, c, accumulate);
      case 2:
        return tile4_rows<2>(a, lda, b, steps, c, accumulate);
      case 3:
        return tile4_rows<3>(a, lda, b, steps, c, accumulate);
      default:
        return tile4_rows<4>(a, lda, b, steps, c, accumulate);
    }
  }

  QK_NOINLINE static void tile4_direct(int /*rows: 1*/, const uint8_t* a, int64_t /*lda*/, const uint8_t* packed,
                                       int64_t lines, int32_t* c) {
    const __m256i nibble = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1), zero = _mm256_setzero_si256();
    __builtin_memset(c, 0, sizeof(int32_t) * kBlockN);
    for (int64_t l = 0; l < lines;) {
      const int64_t end = l + kCodeSteps / 2 < lines ? l + kCodeSteps / 2 : lines;
      __m256i c0 = zero, c1 = zero, c2 = zero, c3 = zero, c4 = zero, c5 = zero, c6 = zero, c7 = zero;
      for (; l < end; ++l) {
        const __m256i* line = reinterpret_cast<const __m256i*>(packed + l * kBlockN * kPackK);
        const __m256i v = broadcast4(a + l * 2 * kPackK), u = broadcast4(a + l * 2 * kPackK + kPackK);
        const auto column = [&](int j, __m256i& x) __attribute__((always_inline)) {
          const __m256i w = _mm256_load_si256(line + j);
          const __m256i low = _mm256_and_si256(w, nibble), high = _mm256_and_si256(_mm256_srli_epi16(w, 4), nibble);
          x = _mm256_add_epi16(x, _mm256_add_epi16(_mm256_maddubs_epi16(low, v), _mm256_maddubs_epi16(high, u)));
        };
        column(0, c0);
        column(1, c1);
        column(2, c2);
        column(3, c3);
        column(4, c4);
        column(5, c5);
        column(6, c6);
        column(7, c7);
      }
      const auto widen = [&](int j, __m256i x) { store_i(c + j, add_i(load_i(c + j), _mm256_madd_epi16(x, ones))); };
      widen(0, c0);
      widen(8, c1);
      widen(16, c2);
      widen(24, c3);
      widen(32, c4);
      widen(40, c5);
      widen(48, c6);
      widen(56, c7);
    }
  }
};

}  // namespace

const KernelTable& kernels_avx2() {
  static constexpr KernelTable table = {"avx2",
                                        linear_w8a8<Avx2>,
                                        linear_w8a8_scratch_bytes<Avx2>,
                                        linear_w4a8<Avx2>,
                                        linear_w4a8_scratch_bytes<Avx2>,
                                        quantize<Avx2>,
                                        dequantize<Avx2>,
                                        embedding<Avx2>,
                                        activation<Avx2>};
  return table;
}

}  // namespace qk
