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
  static constexpr bool kStreams = true;
  static constexpr bool kScaledPanel = true, kTables = false, kEmbedsBroadcast = false;
  static constexpr int stream_vecs(int rows) { return rows == 1 ? 8 : 2; }

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
  static void mac_at(F& c, F w, const uint32_t* x) { mac(c, w, broadcast(x)); }
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

  // Streams leave a byte or nibble where it is in a 16-bit half of the dword: after masking, it is the unsigned number
  // times 2^shift, and the activation is multiplied by 2^-shift. A mask and a conversion are all the decoding there is.
  template <class W>
  static int64_t stream_max() {
    return 12;
  }
  template <class W>
  static constexpr float stream_bias() {
    return W::kBits == 8 ? 128.0f : W::kBook ? 0.0f : 8.0f;
  }
  template <class W, int u>
  static F stream_decode(Raw raw, const Table& table) {
    if constexpr (W::kBook) return decode<W, u>(raw, table);
    constexpr int kShift = W::kBits == 8 || u < 4 ? 8 * (u % 4) : 8 * (u % 4) + 4, kMask = W::kBits == 8 ? 0xFF : 0xF;
    if (W::kBits == 8) raw = _mm256_xor_si256(raw, set_i(static_cast<int32_t>(0x80808080u)));
    if (kShift >= 16) raw = _mm256_srli_epi32(raw, 16);
    return _mm256_cvtepi32_ps(_mm256_and_si256(raw, set_i(kMask << kShift % 16)));
  }

  template <DType D, class W>
  static void copy_row(const void* x, const float* inv_smooth, int64_t k, bool stream, uint32_t* units) {
    float* out = reinterpret_cast<float*>(units);
    F factor = set(1.0f);
    if (stream && stream_bias<W>() != 0.0f)
      factor = W::kBits == 8 ? _mm256_setr_ps(1, 0x1p-8f, 1, 0x1p-8f, 1, 0x1p-8f, 1, 0x1p-8f)
                             : _mm256_setr_ps(1, 0x1p-8f, 1, 0x1p-8f, 0x1p-4f, 0x1p-12f, 0x1p-4f, 0x1p-12f);
    for (int64_t i = 0; i < padded_k(k); i += kLanes) {
      F v = set(0.0f);
      if (i < k) {
        const int n = static_cast<int>(k - i < kLanes ? k - i : kLanes);
        v = n == kLanes ? load<D>(x, i) : load_part<D>(x, i, n);
        if (inv_smooth) v = mul(v, load_f_part(inv_smooth + i, n));
      }
      store_f(out + i, mul(v, factor));
    }
  }
};

using Kernels = WeightTiles<Avx2>;

}  // namespace

const WeightOnlyTable& weight_only_avx2() {
  static constexpr WeightOnlyTable table = {"", linear_w8a16<Kernels>, linear_w4a16<Kernels>,
                                            linear_wxa16_scratch_bytes};
  return table;
}

}  // namespace qk
