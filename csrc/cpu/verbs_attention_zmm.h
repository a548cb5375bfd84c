// What attention (attention_impl.h) adds to the verbs of 512-bit registers.
#pragma once

#include "unroll.h"
#include "verbs_zmm.h"

namespace qk {
namespace {

// Tiles of 24 accumulators: 6 x 64, 8 x 48, 12 x 32; with 4 vectors of the right side and a broadcast, of 32 registers.
struct ZmmAttentionVerbs : ZmmVerbs {
  static constexpr int kTileVecs = 4;
  static constexpr int tile_rows(int vecs) { return vecs < 2 ? 12 : 24 / vecs; }

  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F broadcast(const float* p) { return set(*p); }

  // Lane l of part i holds row 4 l + i, so that a transposition inside of lanes leaves the rows in order.
  QK_INLINE static void columns4(const float* rows, int64_t step, F (&out)[4]) {
    F part[4];
    unroll<4>([&](auto i) QK_INLINE {
      const float* row = rows + i.value * step;
      F v = _mm512_castps128_ps512(_mm_loadu_ps(row));
      v = _mm512_mask_broadcast_f32x4(v, 0x00F0, _mm_loadu_ps(row + 4 * step));
      v = _mm512_mask_broadcast_f32x4(v, 0x0F00, _mm_loadu_ps(row + 8 * step));
      part[i.value] = _mm512_mask_broadcast_f32x4(v, 0xF000, _mm_loadu_ps(row + 12 * step));
    });
    const F low = _mm512_unpacklo_ps(part[0], part[1]), high = _mm512_unpackhi_ps(part[0], part[1]);
    const F low2 = _mm512_unpacklo_ps(part[2], part[3]), high2 = _mm512_unpackhi_ps(part[2], part[3]);
    out[0] = _mm512_shuffle_ps(low, low2, 0x44);
    out[1] = _mm512_shuffle_ps(low, low2, 0xEE);
    out[2] = _mm512_shuffle_ps(high, high2, 0x44);
    out[3] = _mm512_shuffle_ps(high, high2, 0xEE);
  }
};

}  // namespace
}  // namespace qk
