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
  static constexpr int kDepthAlign = 8, kMaxBlockTiles = 16, kDirectRows = 1;
  static constexpr bool kFusesGroups = false, kPrefetchesSlices = true, kFinishesTiles = false;
  static constexpr int64_t kBlockBytes = 384 << 10;
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

  template <int kRows>
  QK_NOINLINE static void tile4_rows(const uint8_t* a, int64_t lda, const int8_t* b, int64_t steps, int32_t* c,
                                     bool accumulate) {
    __m256i c00, c01, c10, c11, c20, c21, c30, c31;
    const __m256i ones = _mm256_set1_epi16(1), zero = _mm256_setzero_si256();
    if (!accumulate) __builtin_memset(c, 0, sizeof(int32_t) * kRows * kTileN);
    for (int64_t k = 0; k < steps;) {
      const int64_t end = k + kCodeSteps < steps ? k + kCodeSteps : steps;
      c00 = c01 = c10 = c11 = c20 = c21 = c30 = c31 = zero;
      for (; k < end; ++k) {
        const int8_t* bk = b + k * kBlockN * kPackK;
        const __m256i b0 = _mm256_load_si256(reinterpret_cast<const __m256i*>(bk)),
                      b1 = _mm256_load_si256(reinterpret_cast<const __m256i*>(bk + 32));
        const auto row = [&](const uint8_t* ar, __m256i& x0, __m256i& x1) __attribute__((always_inline)) {
          const __m256i v = broadcast4(ar + k * kPackK);
          x0 = _mm256_add_epi16(x0, _mm256_maddubs_epi16(b0, v));
          x1 = _mm256_add_epi16(x1, _mm256_maddubs_epi16(b1, v));
        };
        row(a, c00, c01);
        if constexpr (kRows > 1) row(a + lda, c10, c11);
        if constexpr (kRows > 2) row(a + 2 * lda, c20, c21);
        if constexpr (kRows > 3) row(a + 3 * lda, c30, c31);
      }
      const auto widen = [&](int r, __m256i x0, __m256i x1) {
        store_i(c + r * kTileN, add_i(load_i(c + r * kTileN), _mm256_madd_epi16(x0, ones)));
        store_i(c + r * kTileN + 8, add_i(load_i(c + r * kTileN + 8), _mm256_madd_epi16(x1, ones)));
      };
      widen(0, c00, c01);
      if constexpr (kRows > 1) widen(1, c10, c11);
      if constexpr (kRows > 2) widen(2, c20, c21);
      if constexpr (kRows > 3) widen(3, c30, c31);
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
