// AVX2 tier: no dot-product instruction, so vpmaddubsw + vpmaddwd.
#include "activation_impl.h"
#include "dispatch.h"
#include "linear_w4a8_impl.h"
#include "linear_w8a8_pairs.h"
#include "linear_w8a8_wide.h"
#include "norm_impl.h"
#include "quantize_impl.h"
#include "rotary_impl.h"
#include "tile_pairs_avx2.h"
#include "tile_wide_avx2.h"

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

// Bytes of weights between a use and its prefetch where a row or two pass over them once, measured on Zen 3 with
// weights in L3 and in memory: the hardware stops at the end of a page.
constexpr int64_t kRowAhead = 8192;

inline __m256i broadcast4(const uint8_t* p) {
  int32_t v;
  __builtin_memcpy(&v, p, 4);
  return _mm256_set1_epi32(v);
}

// 4 x 16 tile: 8 accumulators, 2 weight registers, a, |a|, ones and a temporary, of 16.
struct Avx2 : WideAvx2 {
  static constexpr const char* kIsa = "avx2";
  static constexpr int kTileM = 4, kTileN = 16, kOffset = 0, kSliceK = 512;
  static constexpr int kDepthAlign = 8, kMaxBlockTiles = 16, kDirectRows = 2;
  static constexpr bool kFusesGroups = true, kFinishesTiles = false, kJoinsGroups = false, kSumsAreFloats = false;
  static constexpr int64_t kFusedK = 256;
  static constexpr int64_t kOwnRows = 96;
  static constexpr int64_t kBlockBytes = 384 << 10;
  static int64_t direct_rows(int64_t /*group*/, bool /*streams*/) { return 2; }
  struct Session {
    Session() {}
  };

  template <class Dot, int kRows, int kLines>
  QK_NOINLINE static void tile_rows(const uint8_t* a, int64_t lda, const int8_t* b, int64_t steps, int32_t* c,
                                    bool accumulate, const Ahead& ahead) {
    __m256i c00, c01, c10, c11, c20, c21, c30, c31;
    start_sums<kRows>(c, accumulate, c00, c01, c10, c11, c20, c21, c30, c31);
    const __m256i ones = _mm256_set1_epi16(1);
    for (int64_t k = 0; k < steps; ++k) {
      const int8_t* bk = b + k * kBlockN * kPackK;
      const __m256i b0 = _mm256_load_si256(reinterpret_cast<const __m256i*>(bk)),
                    b1 = _mm256_load_si256(reinterpret_cast<const __m256i*>(bk + 32));
      ask<kLines>(ahead, k);
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
    store_sums<kRows>(c, c00, c01, c10, c11, c20, c21, c30, c31);
  }

  template <class Dot>
  QK_NOINLINE static void tile_one_with(const uint8_t* a, const int8_t* b, int64_t steps, int32_t* c) {
    __m256i c0, c1, c2, c3, c4, c5, c6, c7;
    c0 = c1 = c2 = c3 = c4 = c5 = c6 = c7 = _mm256_setzero_si256();
    const __m256i ones = _mm256_set1_epi16(1);
    for (int64_t k = 0; k < steps; ++k) {
      const __m256i* bk = reinterpret_cast<const __m256i*>(b + k * kBlockN * kPackK);
      const __m256i v = broadcast4(a + k * kPackK), abs_v = _mm256_abs_epi8(v);
      for (int64_t i = 0; i < kBlockN * kPackK; i += kAlign)
        __builtin_prefetch(reinterpret_cast<const int8_t*>(bk) + kRowAhead + i);
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
    store_run(c, c0, c1, c2, c3, c4, c5, c6, c7);
  }

  QK_NOINLINE static void tile_one(const uint8_t* a, const int8_t* b, int64_t steps, int32_t* c, bool minus128) {
    if (minus128)
      tile_one_with<Widened>(a, b, steps, c);
    else
      tile_one_with<Signed>(a, b, steps, c);
  }

  template <class Dot>
  static void tile_with(int rows, const uint8_t* a, int64_t lda, const int8_t* b, int64_t steps, int32_t* c,
                        bool accumulate, const Ahead& ahead) {
    with_constants<kTileM>(
        rows, ahead, [&](auto r, auto lines) { tile_rows<Dot, r(), lines()>(a, lda, b, steps, c, accumulate, ahead); });
  }

  static void tile(int rows, const uint8_t* a, int64_t lda, const int8_t* b, int64_t steps, int32_t* c, bool accumulate,
                   bool minus128, const Ahead& ahead) {
    if (minus128)
      tile_with<Widened>(rows, a, lda, b, steps, c, accumulate, ahead);
    else
      tile_with<Signed>(rows, a, lda, b, steps, c, accumulate, ahead);
  }

  // The words of kCodeSteps steps at a time, to finish(row, half, first k of the piece, words).
  template <int kRows, int kLines, class Finish>
  __attribute__((always_inline)) static void code_words(const uint8_t* a, int64_t lda, const int8_t* b, int64_t steps,
                                                        const Ahead& ahead, const Finish& finish) {
    const uint8_t* a2 = a + 2 * lda;
    for (int64_t k = 0; k < steps; k += kCodeSteps) {
      // Four steps' share is a line at most, since there are four tiles at least.
      ask<kLines>(ahead, k);
      ask<kLines>(ahead, k + kCodeSteps / 2);
      const int8_t* end = b + (steps - k < kCodeSteps ? steps - k : kCodeSteps) * kBlockN * kPackK;
      __m256i c00, c01, c10, c11, c20, c21, c30, c31;
      c00 = c01 = c10 = c11 = c20 = c21 = c30 = c31 = _mm256_setzero_si256();
#pragma GCC unroll 4
      for (; b < end; b += kBlockN * kPackK, a += kPackK, a2 += kPackK) {
        const __m256i b0 = _mm256_load_si256(reinterpret_cast<const __m256i*>(b)),
                      b1 = _mm256_load_si256(reinterpret_cast<const __m256i*>(b + 32));
        // By hand, as in tile_wide_avx2.h.
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

  template <int kRows, int kLines>
  QK_NOINLINE static void tile4_rows(const uint8_t* a, int64_t lda, const int8_t* b, int64_t steps, int32_t* c,
                                     bool accumulate, const Ahead& ahead) {
    const __m256i ones = _mm256_set1_epi16(1);
    if (!accumulate) __builtin_memset(c, 0, sizeof(int32_t) * kRows * kTileN);
    code_words<kRows, kLines>(a, lda, b, steps, ahead,
                              [&](int r, int half, int64_t, __m256i words) __attribute__((always_inline)) {
                                int32_t* to = c + r * kTileN + half;
                                store_i(to, add_i(load_i(to), _mm256_madd_epi16(words, ones)));
                              });
  }

  // One group and 16 columns: totals [rows, 64] += float(start + sum) * scale, or int32 all of it.
  template <int kRows, int kLines, class T>
  QK_NOINLINE static void tile4_group_rows(const uint8_t* a, int64_t lda, const int8_t* b, int64_t steps,
                                           const int32_t* start, const T* scale, T* totals, const Ahead& ahead) {
    const __m256i ones = _mm256_set1_epi16(1);
    alignas(32) int32_t c[kRows * kTileN];
    code_words<kRows, kLines>(
        a, lda, b, steps, ahead, [&](int r, int half, int64_t k, __m256i words) __attribute__((always_inline)) {
          int32_t* sum = c + r * kTileN + half;
          const __m256i s = add_i(k == 0 ? set_i(start[r]) : load_i(sum), _mm256_madd_epi16(words, ones));
          if (k + kCodeSteps < steps) return store_i(sum, s);
          add_group(totals + r * kBlockN + half, s, scale + half);
        });
  }
  template <class T>
  static void tile4_groups(int rows, const uint8_t* a, int64_t lda, const int8_t* panel, int64_t columns, int64_t steps,
                           int64_t groups, const int32_t* start, const T* scale, const T* /*origin*/, T* totals,
                           Ahead ahead) {
    with_constants<kTileM>(rows, ahead, [&](auto r, auto lines) {
      for (; groups > 0; --groups, ++start, a += steps * kPackK, panel += steps * kBlockN * kPackK, scale += kBlockN) {
        int32_t starts[kTileM];
        for (int i = 0; i < r(); ++i)
          __builtin_memcpy(starts + i, reinterpret_cast<const uint8_t*>(start) + i * lda, 4);
        for (int j = 0; j < columns; j += kTileN, ahead.at += steps * ahead.stride)
          tile4_group_rows<r(), lines()>(a, lda, panel + j * kPackK, steps, starts, scale + j, totals + j, ahead);
      }
    });
  }
  static void tile4(int rows, const uint8_t* a, int64_t lda, const int8_t* b, int64_t steps, int32_t* c,
                    bool accumulate, const Ahead& ahead) {
    with_constants<kTileM>(
        rows, ahead, [&](auto r, auto lines) { tile4_rows<r(), lines()>(a, lda, b, steps, c, accumulate, ahead); });
  }

  template <int kLines>
  QK_NOINLINE static void direct_one(const uint8_t* a, const uint8_t* packed, int64_t lines, int32_t* c,
                                     const Ahead& ahead) {
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
        // Where nothing is asked for, the weights are few: L3 may hold them.
        for (int j = 0; kLines == 0 && j < kBlockN * kPackK; j += kAlign)
          __builtin_prefetch(packed + l * kBlockN * kPackK + kRowAhead + j);
        ask<kLines>(ahead, l);
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

  // Two rows, 16 columns at a time: a group's lines stay in L1 meanwhile. From three rows on a panel is as fast.
  QK_NOINLINE static void direct_two(const uint8_t* a, int64_t lda, const uint8_t* packed, int64_t lines, int32_t* c) {
    const __m256i nibble = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    __builtin_memset(c, 0, sizeof(int32_t) * 2 * kBlockN);
    for (int j = 0; j < kBlockN; j += kTileN) {
      const uint8_t *x = a, *w = packed + j * kPackK;
      for (int64_t l = 0; l < lines; l += kCodeSteps / 2) {
        const uint8_t* end = w + (lines - l < kCodeSteps / 2 ? lines - l : kCodeSteps / 2) * kBlockN * kPackK;
        __m256i c00, c01, c10, c11;
        c00 = c01 = c10 = c11 = _mm256_setzero_si256();
        for (; w < end; w += kBlockN * kPackK, x += 2 * kPackK) {
          __builtin_prefetch(w + kRowAhead);
          const __m256i w0 = _mm256_load_si256(reinterpret_cast<const __m256i*>(w)),
                        w1 = _mm256_load_si256(reinterpret_cast<const __m256i*>(w + 32));
          const __m256i low0 = _mm256_and_si256(w0, nibble), low1 = _mm256_and_si256(w1, nibble),
                        high0 = _mm256_and_si256(_mm256_srli_epi16(w0, 4), nibble),
                        high1 = _mm256_and_si256(_mm256_srli_epi16(w1, 4), nibble);
          const auto row = [&](const uint8_t* xr, __m256i& x0, __m256i& x1) __attribute__((always_inline)) {
            const __m256i v = broadcast4(xr), u = broadcast4(xr + kPackK);
            x0 = _mm256_add_epi16(x0, _mm256_maddubs_epi16(low0, v));
            x1 = _mm256_add_epi16(x1, _mm256_maddubs_epi16(low1, v));
            x0 = _mm256_add_epi16(x0, _mm256_maddubs_epi16(high0, u));
            x1 = _mm256_add_epi16(x1, _mm256_maddubs_epi16(high1, u));
          };
          row(x, c00, c01);
          row(x + lda, c10, c11);
        }
        const auto widen = [&](int r, __m256i x0, __m256i x1) __attribute__((always_inline)) {
          int32_t* sum = c + r * kBlockN + j;
          store_i(sum, add_i(load_i(sum), _mm256_madd_epi16(x0, ones)));
          store_i(sum + 8, add_i(load_i(sum + 8), _mm256_madd_epi16(x1, ones)));
        };
        widen(0, c00, c01);
        widen(1, c10, c11);
      }
    }
  }
  static void tile4_direct(int rows, const uint8_t* a, int64_t lda, const uint8_t* packed, int64_t lines, int32_t* c,
                           const Ahead& ahead) {
    if (rows > 1) return direct_two(a, lda, packed, lines, c);
    with_lines(ahead, [&](auto asked) { direct_one<asked()>(a, packed, lines, c, ahead); });
  }
};

const char* linear_w8a8_by_rows(const LinearW8A8Args* members, int count) {
  using Pairs = LinearW8A8Pairs<PairsAvx2>;
  using Wide = LinearW8A8Wide<Avx2>;
  if (Pairs::serves(members->m, members->k) && Pairs::suits(members, count))
    Pairs(members, count).run();
  else if (Wide::serves(members->m, members->k))
    Wide(members, count).run();
  else
    linear_w8a8<Avx2>(members, count);
  return Avx2::kIsa;
}

int64_t linear_w8a8_scratch_by_rows(int64_t m, int64_t k, int threads) {
  const int64_t wide = LinearW8A8Wide<Avx2>::serves(m, k) ? LinearW8A8Wide<Avx2>::scratch_bytes(m, k, threads)
                                                          : linear_w8a8_scratch_bytes<Avx2>(m, k, threads);
  if (!LinearW8A8Pairs<PairsAvx2>::serves(m, k)) return wide;
  const int64_t pairs = LinearW8A8Pairs<PairsAvx2>::scratch_bytes(m, k, threads);
  return pairs > wide ? pairs : wide;
}

}  // namespace

const KernelTable& kernels_avx2() {
  static constexpr KernelTable table = {"avx2",
                                        linear_w8a8_by_rows,
                                        linear_w8a8_scratch_by_rows,
                                        linear_w4a8<Avx2>,
                                        linear_w4a8_scratch_bytes<Avx2>,
                                        quantize<Avx2>,
                                        dequantize<Avx2>,
                                        embedding<Avx2>,
                                        activation<Avx2>,
                                        norm<Avx2>,
                                        rotary<Avx2>};
  return table;
}

}  // namespace qk
