// AVX2's products over operands widened to 16 bits (linear_w8a8_wide.h).
//
// Winograd's inner product (1968) takes half of the multiplications: a0 w0 + a1 w1 is (a0 + w1)(a1 + w0) less the
// products a0 a1 and w0 w1, which each row and each column has once. Sums of two bytes fit in words, so 32 products
// are two vpaddw, one vpmaddwd and one vpaddd; without it they are two vpmaddwd and two vpaddd, and vpmaddwd has half
// of the pipes of an addition. (vpsignb, vpmaddubsw, vpmaddwd and vpaddd have the same count, three of them on those
// pipes.) The operands may as well be sums of two bytes themselves, as Strassen's are.
//
// Within a group of four k, words stand in the order k0 k2, k1 k3: that is what a shift leaves of the bytes of a
// dword, and pairs each word with its partner's place.
#pragma once

#include "ahead.h"
#include "dispatch.h"
#include "linear_w8a8_wide.h"
#include "verbs_ymm.h"

namespace qk {
namespace {

struct WideAvx2 : YmmVerbs {
  static constexpr int kWideTileM = 4, kWideTileN = 16, kWideSliceK = 512;
  static constexpr int64_t kWideBlockBytes = 8 << 20, kWideBlockRows = 256;
  // Measured on Zen 3 and on Emerald Rapids: fewer rows do not earn back the panel.
  static int64_t wide_rows(int64_t k) { return is_intel() ? 17 : k < 2048 ? 9 : 13; }
  // Measured on Zen 3: sums go to memory too often where K is short, rows of seven halves leave L3 where it is long,
  // and few superblocks do not earn them back.
  static constexpr int64_t kStrassenRows = 64, kStrassenK = 576, kStrassenMostK = 8192, kStrassenBlocks = 4;

  static __m256i even_words(__m256i bytes) { return _mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8); }
  static __m256i odd_words(__m256i bytes) { return _mm256_srai_epi16(bytes, 8); }

  // Words of 32 k, even ones and odd ones, and what the sums of their row or columns have too much.
  struct Words {
    __m256i even, odd;
    __m256i less(__m256i less) const { return _mm256_sub_epi32(less, _mm256_madd_epi16(even, odd)); }
    Words operator+(Words o) const { return {_mm256_add_epi16(even, o.even), _mm256_add_epi16(odd, o.odd)}; }
    Words operator-(Words o) const { return {_mm256_sub_epi16(even, o.even), _mm256_sub_epi16(odd, o.odd)}; }
  };
  static Words words_of(const void* bytes) {
    const __m256i v = _mm256_loadu_si256(static_cast<const __m256i*>(bytes));
    return {even_words(v), odd_words(v)};
  }
  // A row's, side by side with those of the other rows of its tile.
  static void store_words(Words w, uint8_t* out) {
    const __m256d low = _mm256_castsi256_pd(_mm256_unpacklo_epi32(w.even, w.odd)),
                  high = _mm256_castsi256_pd(_mm256_unpackhi_epi32(w.even, w.odd));
    double* to = reinterpret_cast<double*>(out);
    const auto store = [&](int at, __m128d two) {
      _mm_storel_pd(to + at * kWideTileM, two);
      _mm_storeh_pd(to + (at + 1) * kWideTileM, two);
    };
    store(0, _mm256_castpd256_pd128(low));
    store(2, _mm256_castpd256_pd128(high));
    store(4, _mm256_extractf128_pd(low, 1));
    store(6, _mm256_extractf128_pd(high, 1));
  }
  static int32_t total_of(__m256i v) {
    __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4E));
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xB1));
    return _mm_cvtsi128_si32(sum);
  }

  // A row of a tile: in [k], k a multiple of 64, int8, to out [k / 4][4 rows][k0 k2 k1 k3], whose first row's place is
  // given. Side by side, the rows of a tile come from L2 as one stream (1.12 cycles for 32 products rather than 1.24).
  // Returns minus the sum of the products of the row's own pairs.
  static int32_t widen_row(const uint8_t* in, int64_t k, uint8_t* out) {
    __m256i less = _mm256_setzero_si256();
    for (int64_t i = 0; i < k; i += 32) {
      const Words w = words_of(in + i);
      less = w.less(less);
      store_words(w, out + i * kWideTileM * 2);
    }
    return total_of(less);
  }

  // A row of the upper four and its fellow of the lower four: both halves of a slice of theirs, half (a multiple of 32)
  // k each, to what the seven products take, out [7][half / 4][4 rows][k0 k2 k1 k3]. less [7]: as above, added to.
  QK_NOINLINE static void widen_couple(const uint8_t* upper, const uint8_t* lower, int64_t half, uint8_t* out,
                                       int32_t* less) {
    __m256i l0, l1, l2, l3, l4, l5, l6;
    l0 = l1 = l2 = l3 = l4 = l5 = l6 = _mm256_setzero_si256();
    const int64_t pitch = half * kWideTileM * 2;
    for (int64_t i = 0; i < half; i += 32, out += 32 * kWideTileM * 2) {
      const Words a11 = words_of(upper + i), a12 = words_of(upper + half + i), a21 = words_of(lower + i),
                  a22 = words_of(lower + half + i);
      const auto put = [&](int product, Words w, __m256i& l) QK_INLINE {
        l = w.less(l);
        store_words(w, out + product * pitch);
      };
      put(0, a11 + a22, l0);
      put(1, a21 + a22, l1);
      put(2, a11, l2);
      put(3, a22, l3);
      put(4, a11 + a12, l4);
      put(5, a21 - a11, l5);
      put(6, a12 - a22, l6);
    }
    const __m256i all[] = {l0, l1, l2, l3, l4, l5, l6};
    for (int i = 0; i < kProducts; ++i) less[i] += total_of(all[i]);
  }

  // 16 columns of a slice of weights, or first plus sign times second, to panel [steps][k0 k2 of 16 columns, k1 k3 of
  // 16 columns]. less [16]: minus the sum of the products of each column's own pairs.
  QK_NOINLINE static void widen_columns(const int8_t* first, const int8_t* second, int sign, int64_t steps,
                                        int16_t* panel, int32_t* less) {
    if (sign == 0) return combine_columns<0>(first, second, steps, panel, less);
    if (sign > 0) return combine_columns<1>(first, second, steps, panel, less);
    combine_columns<-1>(first, second, steps, panel, less);
  }
  template <int kSign>
  static void combine_columns(const int8_t* first, const int8_t* second, int64_t steps, int16_t* panel, int32_t* less) {
    __m256i c0, c1;
    c0 = c1 = _mm256_setzero_si256();
    for (int64_t k = 0; k < steps; ++k, panel += kWideTileN * kPackK) {
      const auto half = [&](int i, __m256i& c) QK_INLINE {
        const int64_t at = k * kBlockN * kPackK + i * 32;
        Words w = words_of(first + at);
        if constexpr (kSign > 0) w = w + words_of(second + at);
        if constexpr (kSign < 0) w = w - words_of(second + at);
        c = w.less(c);
        __m256i* out = reinterpret_cast<__m256i*>(panel) + i;
        _mm256_store_si256(out, w.even);
        _mm256_store_si256(out + 2, w.odd);
      };
      half(0, c0);
      half(1, c1);
    }
    store_run(less, c0, c1);
  }

  // 4 x 16 tile: 8 accumulators, 4 weight registers and 4 for sums of activations and weights, of 16. More rows would
  // have to read weights again and again, and two such loads in a cycle are all there are. steps: an even number.
  // row_less: of the tile's rows; nullptr: counted before.
  template <int kRows, int kLines>
  QK_NOINLINE static void wide_tile_rows(const uint8_t* a, const int16_t* panel, int64_t steps, const int32_t* less,
                                         const int32_t* row_less, const Sink& sink, const Sink& second,
                                         const Ahead& ahead) {
    __m256i c00, c01, c10, c11, c20, c21, c30, c31;
    const auto init = [&](int r, __m256i& x0, __m256i& x1) {
      const __m256i own = set_i(row_less ? row_less[r] : 0);
      x0 = add_i(load_i(less), own);
      x1 = add_i(load_i(less + 8), own);
    };
    each_row<kRows>(init, c00, c01, c10, c11, c20, c21, c30, c31);
    const __m256i* b = reinterpret_cast<const __m256i*>(panel);
    for (int64_t k = 0; k < steps; k += 2, b += 8, a += 16 * kWideTileM) {
      const auto step = [&](int at) __attribute__((always_inline)) {
        const __m256i even0 = _mm256_load_si256(b + 4 * at), even1 = _mm256_load_si256(b + 4 * at + 1),
                      odd0 = _mm256_load_si256(b + 4 * at + 2), odd1 = _mm256_load_si256(b + 4 * at + 3);
        // By hand: left to itself, g++ 12 keeps half of the accumulators on the stack.
        const auto row = [&](int r, __m256i& x0, __m256i& x1) __attribute__((always_inline)) {
          const int32_t* words = reinterpret_cast<const int32_t*>(a + 8 * (at * kWideTileM + r));
          __m256i even, odd, s, t;
          __asm__(
              "vpbroadcastd %6, %2\n\t"
              "vpbroadcastd %7, %3\n\t"
              "vpaddw %10, %2, %4\n\t"
              "vpaddw %8, %3, %5\n\t"
              "vpaddw %11, %2, %2\n\t"
              "vpaddw %9, %3, %3\n\t"
              "vpmaddwd %4, %5, %4\n\t"
              "vpmaddwd %2, %3, %2\n\t"
              "vpaddd %4, %0, %0\n\t"
              "vpaddd %2, %1, %1"
              : "+x"(x0), "+x"(x1), "=&x"(even), "=&x"(odd), "=&x"(s), "=&x"(t)
              : "m"(words[0]), "m"(words[1]), "x"(even0), "x"(even1), "x"(odd0), "x"(odd1));
        };
        each_row<kRows>(row, c00, c01, c10, c11, c20, c21, c30, c31);
      };
      step(0);
      step(1);
      ask<kLines>(ahead, k);
    }
    const auto put = [&](const Sink& s) {
      if (!s.c) return;
      if (s.sign == 0) return store_sums<kRows>(s.c, c00, c01, c10, c11, c20, c21, c30, c31);
      const auto one = [&](int r, __m256i& x0, __m256i& x1) {
        int32_t* c = s.c + r * kWideTileN;
        const __m256i y0 = load_i(c), y1 = load_i(c + 8);
        store_i(c, s.sign > 0 ? add_i(y0, x0) : sub_i(y0, x0));
        store_i(c + 8, s.sign > 0 ? add_i(y1, x1) : sub_i(y1, x1));
      };
      each_row<kRows>(one, c00, c01, c10, c11, c20, c21, c30, c31);
    };
    put(sink);
    put(second);
  }
  static void wide_tile(int rows, const uint8_t* a, const int16_t* panel, int64_t steps, const int32_t* less,
                        const int32_t* row_less, const Sink& sink, const Sink& second, const Ahead& ahead) {
    with_constants<kWideTileM>(rows, ahead, [&](auto r, auto lines) {
      wide_tile_rows<r(), lines()>(a, panel, steps, less, row_less, sink, second, ahead);
    });
  }
};

}  // namespace
}  // namespace qk
