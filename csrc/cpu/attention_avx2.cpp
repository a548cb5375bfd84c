// Attention of the tiers with 256-bit registers (AVX2 + FMA + F16C).
#include "attention_vectors.h"
#include "dispatch.h"
#include "verbs_ymm.h"

namespace qk {
namespace {

// 6 x 16 tile: 12 accumulators, 2 vectors of the right side and a broadcast, of 16 registers.
struct Avx2 : YmmVerbs {
  static constexpr int kTileVecs = 2;
  static constexpr int tile_rows(int vecs) { return vecs < 2 ? 8 : 6; }

  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F broadcast(const float* p) { return _mm256_broadcast_ss(p); }

  // Lane l of part i holds row 4 l + i, so that a transposition inside of lanes leaves the rows in order.
  QK_INLINE static void columns4(const float* rows, int64_t step, F (&out)[4]) {
    F part[4];
    unroll<4>([&](auto i) QK_INLINE {
      const float* row = rows + i.value * step;
      part[i.value] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(row)), _mm_loadu_ps(row + 4 * step), 1);
    });
    const F low = _mm256_unpacklo_ps(part[0], part[1]), high = _mm256_unpackhi_ps(part[0], part[1]);
    const F low2 = _mm256_unpacklo_ps(part[2], part[3]), high2 = _mm256_unpackhi_ps(part[2], part[3]);
    out[0] = _mm256_shuffle_ps(low, low2, 0x44);
    out[1] = _mm256_shuffle_ps(low, low2, 0xEE);
    out[2] = _mm256_shuffle_ps(high, high2, 0x44);
    out[3] = _mm256_shuffle_ps(high, high2, 0xEE);
  }
};

}  // namespace

const AttentionTable& attention_avx2() {
  static constexpr AttentionTable table = {attention<Avx2>, attention_scratch_bytes<Avx2>, true};
  return table;
}

}  // namespace qk
