// Weight-only kernels of the tiers with 512-bit registers.
#include "dispatch.h"
#include "linear_wxa16_impl.h"
#include "tiles_wxa16.h"
#include "verbs_zmm.h"

namespace qk {
namespace {

// 12 x 32 tile: 24 accumulators, 2 weight registers, 1 for the broadcast activation, of 32. 256 k of 32 columns are
// 32 KiB, which an L1 of 48 keeps; those of a 6 x 64 tile came from L2.
struct Avx512 : ZmmVerbs {
  static constexpr int kUnitK = 1, kTileM = 12, kTileVecs = 2, kStreamRows = 6;
  static constexpr bool kStreams = true;
  static constexpr bool kScaledPanel = true, kTables = true, kEmbedsBroadcast = true;
  static constexpr int stream_vecs(int /*rows*/) { return 4; }

  using Raw = __m512i;
  using Value = F;
  struct Table {
    F value;
  };
  template <class W>
  static Table make_table(const float* codebook) {
    if (codebook) return {load_f(codebook)};
    return {_mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7)};
  }

  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static float reduce_add(F v) { return _mm512_reduce_add_ps(v); }
  static F broadcast(const uint32_t* x) {
    float v;
    __builtin_memcpy(&v, x, 4);
    return set(v);
  }
  static void mac(F& c, F w, F x) { c = _mm512_fmadd_ps(w, x, c); }
  static void mac_at(F& c, F w, const uint32_t* x) { mac(c, w, broadcast(x)); }
  static F load_value(const float* p) { return _mm512_load_ps(p); }
  static void store_value(float* p, F v) { _mm512_store_ps(p, v); }
  static Raw load_raw(const uint8_t* p) { return _mm512_load_si512(p); }

  // Byte u, sign extended; nibble u as the index of vpermps, which ignores all bits but the lowest four.
  template <class W, int u>
  static F decode(Raw raw, const Table& table) {
    if constexpr (W::kBits == 8) {
      return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(raw, 24 - 8 * u), 24));
    } else {
      constexpr int kShift = u < 4 ? 8 * u : 8 * (u - 4) + 4;
      return _mm512_permutexvar_ps(_mm512_srli_epi32(raw, kShift), table.value);
    }
  }

  // Streams of 8-bit weights leave a byte where it is in a 16-bit half of the dword: after masking, it is the unsigned
  // number times 1 or 2^8, and the activation is multiplied by 1 or 2^-8. Shifts would crowd the ports that have them.
  // Decoding takes two instructions beside six multiply-adds, on the same ports where is_intel().
  template <class W>
  static int64_t stream_max() {
    return is_intel() ? 24 : 64;
  }
  template <class W>
  static constexpr float stream_bias() {
    return W::kBits == 8 ? 128.0f : 0.0f;
  }
  template <class W, int u>
  static F stream_decode(Raw raw, const Table& table) {
    if constexpr (W::kBits == 4) return decode<W, u>(raw, table);
    raw = _mm512_xor_si512(raw, set_i(static_cast<int32_t>(0x80808080u)));
    if (u >= 2) raw = _mm512_srli_epi32(raw, 16);
    return _mm512_cvtepi32_ps(_mm512_and_si512(raw, set_i(u % 2 ? 0xFF00 : 0xFF)));
  }

  template <DType D, class W>
  static void copy_row(const void* x, const float* inv_smooth, int64_t k, bool stream, uint32_t* units) {
    float* out = reinterpret_cast<float*>(units);
    F factor = set(1.0f);
    if (stream && stream_bias<W>() != 0.0f) factor = _mm512_mask_blend_ps(0xAAAA, factor, set(0x1p-8f));
    for (int64_t i = 0; i < padded_k(k); i += kLanes) {
      F v = set(0.0f);
      if (i < k) {
        const int n = static_cast<int>(k - i < kLanes ? k - i : kLanes);
        v = load_part<D>(x, i, n);
        if (inv_smooth) v = mul(v, load_f_part(inv_smooth + i, n));
      }
      store_f(out + i, mul(v, factor));
    }
  }
};

using Kernels = WeightTiles<Avx512>;

}  // namespace

const WeightOnlyTable& weight_only_avx512() {
  static constexpr WeightOnlyTable table = {"", linear_w8a16<Kernels>, linear_w4a16<Kernels>,
                                            linear_wxa16_scratch_bytes};
  return table;
}

}  // namespace qk
