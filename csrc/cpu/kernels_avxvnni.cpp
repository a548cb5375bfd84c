// AVX-VNNI tier: vpdpbusd on 256-bit registers, VEX encoded (client processors without AVX-512).
#include "activation_impl.h"
#include "dispatch.h"
#include "linear_w4a8_impl.h"
#include "linear_w8a8_impl.h"
#include "norm_impl.h"
#include "quantize_impl.h"
#include "rotary_impl.h"
#include "verbs_ymm.h"

namespace qk {
namespace {

// See kernels_avx512vnni.cpp for why this is assembly over separate variables.
inline void dot4(__m256i& c, __m256i u8, __m256i s8) {
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(c) : "x"(u8), "x"(s8));
}

// The weights as the signed operand (W8) or, as raw 4-bit codes, the unsigned one (W4).
struct SignedWeights {
  static void dot(__m256i& c, __m256i a, __m256i w) { dot4(c, a, w); }
};
struct UnsignedWeights {
  static void dot(__m256i& c, __m256i a, __m256i w) { dot4(c, w, a); }
};

inline __m256i broadcast4(const uint8_t* p) {
  int32_t v;
  __builtin_memcpy(&v, p, 4);
  return _mm256_set1_epi32(v);
}

// 6 x 16 tile: 12 accumulators, 2 weight registers, 1 for the broadcast activations, of 16.
struct AvxVnni : YmmVerbs {
  static constexpr const char* kIsa = "avxvnni";
  static constexpr int kTileM = 6, kTileN = 16, kOffset = 128, kSliceK = 1024;
  static constexpr int kDepthAlign = 8, kMaxBlockTiles = 16, kDirectRows = 1;
  static constexpr bool kFusesGroups = true, kFinishesTiles = false, kJoinsGroups = true, kSumsAreFloats = true;
  static constexpr int64_t kFusedK = 256;
  static constexpr int64_t kOwnRows = 96;
  static constexpr int64_t kBlockBytes = 384 << 10;
  // Rows that go without a panel finish their groups through memory. Measured on Emerald Rapids.
  static int64_t direct_rows(int64_t group, bool streams) { return group < 64 ? 1 : group < 128 ? 2 : streams ? 4 : 3; }
  struct Session {
    Session() {}
  };

  template <class W, int kRows, int kLines>
  QK_INLINE static void all_steps(const uint8_t* a, int64_t lda, const int8_t* b, int64_t steps, const Ahead& ahead,
                                  __m256i& c00, __m256i& c01, __m256i& c10, __m256i& c11, __m256i& c20, __m256i& c21,
                                  __m256i& c30, __m256i& c31, __m256i& c40, __m256i& c41, __m256i& c50, __m256i& c51) {
    const uint8_t* a3 = a + 3 * lda;
    for (int64_t k = 0; k < steps; ++k) {
      const int8_t* bk = b + k * kBlockN * kPackK;
      const __m256i b0 = _mm256_load_si256(reinterpret_cast<const __m256i*>(bk)),
                    b1 = _mm256_load_si256(reinterpret_cast<const __m256i*>(bk + 32));
      const auto row = [&](const uint8_t* ar, __m256i& x0, __m256i& x1) __attribute__((always_inline)) {
        const __m256i v = broadcast4(ar + k * kPackK);
        W::dot(x0, v, b0);
        W::dot(x1, v, b1);
      };
      row(a, c00, c01);
      if constexpr (kRows > 1) row(a + lda, c10, c11);
      if constexpr (kRows > 2) row(a + 2 * lda, c20, c21);
      if constexpr (kRows > 3) row(a3, c30, c31);
      if constexpr (kRows > 4) row(a3 + lda, c40, c41);
      if constexpr (kRows > 5) row(a3 + 2 * lda, c50, c51);
      ask<kLines>(ahead, k);
    }
  }

  template <class W, int kRows, int kLines>
  QK_NOINLINE static void tile_rows(const uint8_t* a, int64_t lda, const int8_t* b, int64_t steps, int32_t* c,
                                    bool accumulate, const Ahead& ahead) {
    __m256i c00, c01, c10, c11, c20, c21, c30, c31, c40, c41, c50, c51;
    start_sums<kRows>(c, accumulate, c00, c01, c10, c11, c20, c21, c30, c31, c40, c41, c50, c51);
    all_steps<W, kRows, kLines>(a, lda, b, steps, ahead, c00, c01, c10, c11, c20, c21, c30, c31, c40, c41, c50, c51);
    store_sums<kRows>(c, c00, c01, c10, c11, c20, c21, c30, c31, c40, c41, c50, c51);
  }

  QK_NOINLINE static void tile_one(const uint8_t* a, const int8_t* b, int64_t steps, int32_t* c, bool /*minus128*/) {
    __m256i c0, c1, c2, c3, c4, c5, c6, c7;
    c0 = c1 = c2 = c3 = c4 = c5 = c6 = c7 = _mm256_setzero_si256();
    for (int64_t k = 0; k < steps; ++k) {
      const __m256i* bk = reinterpret_cast<const __m256i*>(b + k * kBlockN * kPackK);
      const __m256i v = broadcast4(a + k * kPackK);
      dot4(c0, v, _mm256_load_si256(bk));
      dot4(c1, v, _mm256_load_si256(bk + 1));
      dot4(c2, v, _mm256_load_si256(bk + 2));
      dot4(c3, v, _mm256_load_si256(bk + 3));
      dot4(c4, v, _mm256_load_si256(bk + 4));
      dot4(c5, v, _mm256_load_si256(bk + 5));
      dot4(c6, v, _mm256_load_si256(bk + 6));
      dot4(c7, v, _mm256_load_si256(bk + 7));
    }
    store_run(c, c0, c1, c2, c3, c4, c5, c6, c7);
  }

  template <class W>
  static void tile_of(int rows, const uint8_t* a, int64_t lda, const int8_t* b, int64_t steps, int32_t* c,
                      bool accumulate, const Ahead& ahead) {
    with_constants<kTileM>(
        rows, ahead, [&](auto r, auto lines) { tile_rows<W, r(), lines()>(a, lda, b, steps, c, accumulate, ahead); });
  }

  static void tile(int rows, const uint8_t* a, int64_t lda, const int8_t* b, int64_t steps, int32_t* c, bool accumulate,
                   bool /*minus128*/, const Ahead& ahead) {
    tile_of<SignedWeights>(rows, a, lda, b, steps, c, accumulate, ahead);
  }
  static void tile4(int rows, const uint8_t* a, int64_t lda, const int8_t* b, int64_t steps, int32_t* c,
                    bool accumulate, const Ahead& ahead) {
    tile_of<UnsignedWeights>(rows, a, lda, b, steps, c, accumulate, ahead);
  }

  // As tile4, over whole groups of 4-bit weights with one zero point: see tile_avx512vnni.h.
  template <int kRows, int kLines, class T>
  QK_NOINLINE static void group_rows(const uint8_t* a, int64_t lda, const int8_t* b, int64_t steps, int64_t groups,
                                     const int32_t* start, const T* scale, const T* origin, T* total, Ahead ahead) {
    for (int64_t g = 0; g < groups; ++g, a += steps * kPackK, b += steps * kBlockN * kPackK, ++start, scale += kBlockN,
                 ahead.at += steps * ahead.stride) {
      asm("" : "+r"(total));  // or g++ would hold totals "in registers" from group to group: on the stack
      __m256i c00, c01, c10, c11, c20, c21, c30, c31, c40, c41, c50, c51;
      const auto init = [&](int r, __m256i& x0, __m256i& x1)
                            QK_INLINE { x0 = x1 = broadcast4(reinterpret_cast<const uint8_t*>(start) + r * lda); };
      each_row<kRows>(init, c00, c01, c10, c11, c20, c21, c30, c31, c40, c41, c50, c51);
      all_steps<UnsignedWeights, kRows, kLines>(a, lda, b, steps, ahead, c00, c01, c10, c11, c20, c21, c30, c31, c40,
                                                c41, c50, c51);
      const auto rows = [&](const auto& finish) QK_INLINE {
        each_row<kRows>(finish, c00, c01, c10, c11, c20, c21, c30, c31, c40, c41, c50, c51);
      };
      if constexpr (std::is_same<T, float>::value) {
        if (origin) {
          const F s0 = load_f(scale), s1 = load_f(scale + 8), o0 = load_f(origin), o1 = load_f(origin + 8);
          origin += kBlockN;
          rows([&](int r, __m256i x0, __m256i x1) QK_INLINE {
            float* t = total + r * kBlockN;
            store_f(t, add(load_f(t), _mm256_fmsub_ps(as_f(x0), s0, o0)));
            store_f(t + 8, add(load_f(t + 8), _mm256_fmsub_ps(as_f(x1), s1, o1)));
          });
          continue;
        }
      }
      rows([&](int r, __m256i x0, __m256i x1) QK_INLINE {
        add_group(total + r * kBlockN, x0, scale);
        add_group(total + r * kBlockN + 8, x1, scale + 8);
      });
    }
  }
  template <class T>
  static void tile4_groups(int rows, const uint8_t* a, int64_t lda, const int8_t* b, int64_t columns, int64_t steps,
                           int64_t groups, const int32_t* start, const T* scale, const T* origin, T* total,
                           Ahead ahead) {
    with_constants<kTileM>(rows, ahead, [&](auto r, auto lines) {
      for (int j = 0; j < columns; j += kTileN, ahead.at += groups * steps * ahead.stride)
        group_rows<r(), lines()>(a, lda, b + j * kPackK, steps, groups, start, scale + j, origin ? origin + j : nullptr,
                                 total + j, ahead);
    });
  }

  static void tile4_direct(int /*rows: 1*/, const uint8_t* a, int64_t /*lda*/, const uint8_t* packed, int64_t lines,
                           int32_t* c, const Ahead& ahead) {
    with_lines(ahead, [&](auto asked) { direct_row<asked()>(a, packed, lines, c, ahead); });
  }
  template <int kLines>
  QK_NOINLINE static void direct_row(const uint8_t* a, const uint8_t* packed, int64_t lines, int32_t* c,
                                     const Ahead& ahead) {
    const __m256i nibble = _mm256_set1_epi8(15);
    __m256i c0, c1, c2, c3, c4, c5, c6, c7;
    c0 = c1 = c2 = c3 = c4 = c5 = c6 = c7 = _mm256_setzero_si256();
    for (int64_t l = 0; l < lines; ++l) {
      const __m256i* line = reinterpret_cast<const __m256i*>(packed + l * kBlockN * kPackK);
      const __m256i v = broadcast4(a + l * 2 * kPackK), u = broadcast4(a + l * 2 * kPackK + kPackK);
      const auto column = [&](int j, __m256i& x) __attribute__((always_inline)) {
        const __m256i w = _mm256_load_si256(line + j);
        dot4(x, _mm256_and_si256(w, nibble), v);
        dot4(x, _mm256_and_si256(_mm256_srli_epi16(w, 4), nibble), u);
      };
      column(0, c0);
      column(1, c1);
      column(2, c2);
      column(3, c3);
      column(4, c4);
      column(5, c5);
      column(6, c6);
      column(7, c7);
      ask<kLines>(ahead, l);
    }
    store_run(c, c0, c1, c2, c3, c4, c5, c6, c7);
  }
};

}  // namespace

const KernelTable& kernels_avxvnni() {
  static constexpr KernelTable table = {"avxvnni",
                                        linear_w8a8<AvxVnni>,
                                        linear_w8a8_scratch_bytes<AvxVnni>,
                                        linear_w4a8<AvxVnni>,
                                        linear_w4a8_scratch_bytes<AvxVnni>,
                                        quantize<AvxVnni>,
                                        dequantize<AvxVnni>,
                                        embedding<AvxVnni>,
                                        activation<AvxVnni>,
                                        norm<AvxVnni>,
                                        rotary<AvxVnni>};
  return table;
}

}  // namespace qk
