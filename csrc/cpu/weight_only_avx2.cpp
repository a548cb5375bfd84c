// Weight-only kernels of the tiers with 256-bit registers (AVX2 + FMA + F16C).
#include "dispatch.h"
#include "linear_wxa16_impl.h"
#include "tiles_wxa16.h"
#include "verbs_ymm.h"

namespace qk {
namespace {

// 6 x 16 tile: 12 accumulators, 2 weight registers, 1 for the broadcast activation, of 16.
struct Avx2 : YmmVerbs {
  static constexpr int kUnitK = 1, kTileM = 6, kTileVecs = 2, kStreamRows = 4;
  static constexpr bool kScaledPanel = true, kTables = false;
  static constexpr int stream_vecs(int rows) { return rows == 1 ? 8 : rows < 4 ? 4 : 2; }

  using Raw = __m256i;
  using Value = F;
  struct Table {
    F low, high;  // entries 0..7 and 8..15
  };
  template <class W>
  static Table make_table(const float* codebook) {
    if (!codebook) return {set(0.0f), set(0.0f)};
    return {load_f(codebook), load_f(codebook + 8)};
  }

  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static float reduce_add(F v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
  }
  static F broadcast(const uint32_t* x) { return _mm256_broadcast_ss(reinterpret_cast<const float*>(x)); }
  static void mac(F& c, F w, F x) { c = _mm256_fmadd_ps(w, x, c); }
  static F load_value(const float* p) { return _mm256_load_ps(p); }
  static void store_value(float* p, F v) { _mm256_store_ps(p, v); }
  static Raw load_raw(const uint8_t* p) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(p)); }

  // Byte u, sign extended; nibble u moved to the top of the lane and arithmetically back, which makes q ^ 8 (that is, q
  // with its zero in the middle) the signed q - 8; or looked up by its low three bits in two half tables, the fourth
  // bit choosing between them.
  template <class W, int u>
  static F decode(Raw raw, const Table& table) {
    if constexpr (W::kBits == 8) {
      return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(raw, 24 - 8 * u), 24));
    } else {
      constexpr int kShift = u < 4 ? 8 * u : 8 * (u - 4) + 4;
      if constexpr (W::kBook) {
        const I index = _mm256_srli_epi32(raw, kShift);
        const F low = _mm256_permutevar8x32_ps(table.low, index), high = _mm256_permutevar8x32_ps(table.high, index);
        return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(raw, 28 - kShift)));
      } else {
        const I centred = _mm256_xor_si256(raw, set_i(static_cast<int32_t>(0x88888888u)));
        return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(centred, 28 - kShift), 28));
      }
    }
  }

  template <DType D>
  static void copy_row(const void* x, const float* inv_smooth, int64_t k, uint32_t* units) {
    float* out = reinterpret_cast<float*>(units);
    for (int64_t i = 0; i < padded_k(k); i += kLanes) {
      F v = set(0.0f);
      if (i < k) {
        const int n = static_cast<int>(k - i < kLanes ? k - i : kLanes);
        v = n == kLanes ? load<D>(x, i) : load_part<D>(x, i, n);
        if (inv_smooth) v = mul(v, load_f_part(inv_smooth + i, n));
      }
      store_f(out + i, v);
    }
  }
};

using Kernels = WeightTiles<Avx2>;

}  // namespace

const WeightOnlyTable& weight_only_avx2() {
  static constexpr WeightOnlyTable table = {"", linear_w8a16<Kernels>, linear_w4a16<Kernels>, linear_wxa16_scratch_bytes};
  return table;
}

}  // namespace qk
