// AVX-VNNI tier: vpdpbusd on 256-bit registers, VEX encoded (client processors without AVX-512).
#include "dispatch.h"
#include "linear_w8a8_impl.h"
#include "quantize_impl.h"
#include "verbs_ymm.h"

namespace qk {
namespace {

// See kernels_avx512vnni.cpp for why this is assembly over separate variables.
inline void dot4(__m256i& c, __m256i u8, __m256i s8) { asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(c) : "x"(u8), "x"(s8)); }

inline __m256i broadcast4(const uint8_t* p) {
  int32_t v;
  __builtin_memcpy(&v, p, 4);
  return _mm256_set1_epi32(v);
}

// 6 x 16 tile: 12 accumulators, 2 weight registers, 1 for the broadcast activations, of 16.
struct AvxVnni : YmmVerbs {
  static constexpr const char* kIsa = "avxvnni";
  static constexpr int kTileM = 6, kTileN = 16, kOffset = 128, kSliceK = 1024;
  static constexpr int kDepthAlign = 8, kMaxBlockTiles = 16;
  static constexpr int64_t kBlockBytes = 384 << 10;
  struct Session {
    Session() {}
  };

  template <int kRows>
  static void tile_rows(const uint8_t* a, int64_t lda, const int8_t* b, int64_t steps, int32_t* c, bool accumulate) {
    __m256i c00, c01, c10, c11, c20, c21, c30, c31, c40, c41, c50, c51;
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
    if constexpr (kRows > 4) init(4, c40, c41);
    if constexpr (kRows > 5) init(5, c50, c51);
    const uint8_t* a3 = a + 3 * lda;
    for (int64_t k = 0; k < steps; ++k) {
      const int8_t* bk = b + k * kBlockN * kPackK;
      const __m256i b0 = _mm256_load_si256(reinterpret_cast<const __m256i*>(bk)),
                    b1 = _mm256_load_si256(reinterpret_cast<const __m256i*>(bk + 32));
      const auto row = [&](const uint8_t* ar, __m256i& x0, __m256i& x1) __attribute__((always_inline)) {
        const __m256i v = broadcast4(ar + k * kPackK);
        dot4(x0, v, b0);
        dot4(x1, v, b1);
      };
      row(a, c00, c01);
      if constexpr (kRows > 1) row(a + lda, c10, c11);
      if constexpr (kRows > 2) row(a + 2 * lda, c20, c21);
      if constexpr (kRows > 3) row(a3, c30, c31);
      if constexpr (kRows > 4) row(a3 + lda, c40, c41);
      if constexpr (kRows > 5) row(a3 + 2 * lda, c50, c51);
    }
    save(0, c00, c01);
    if constexpr (kRows > 1) save(1, c10, c11);
    if constexpr (kRows > 2) save(2, c20, c21);
    if constexpr (kRows > 3) save(3, c30, c31);
    if constexpr (kRows > 4) save(4, c40, c41);
    if constexpr (kRows > 5) save(5, c50, c51);
  }

  static void tile_one(const uint8_t* a, const int8_t* b, int64_t steps, int32_t* c, bool /*minus128*/) {
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
    store_i(c, c0);
    store_i(c + 8, c1);
    store_i(c + 16, c2);
    store_i(c + 24, c3);
    store_i(c + 32, c4);
    store_i(c + 40, c5);
    store_i(c + 48, c6);
    store_i(c + 56, c7);
  }

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

const KernelTable& kernels_avxvnni() {
  static constexpr KernelTable table = {"avxvnni", linear_w8a8<AvxVnni>, linear_w8a8_scratch_bytes<AvxVnni>, quantize<AvxVnni>,
                                        dequantize<AvxVnni>};
  return table;
}

}  // namespace qk
