// Weight-only kernels for bf16 activations on processors with AVX512-BF16 and AVX512-VBMI. Not a tier: the AVX-512
// tiers take these where they can, without smoothing (which leaves bf16) and without a codebook (whose entries are
// fp32).
//
// vdpbf16ps adds two products to each fp32 lane, and treats subnormal inputs and results as zero. 8-bit and 4-bit
// integers are exact in bf16, so both operands are; scales enter the fp32 sums, group by group.
#include "dispatch.h"
#include "linear_wxa16_impl.h"
#include "tiles_wxa16.h"
#include "verbs_zmm.h"

namespace qk {
namespace {

// A unit is a pair of k, and the four k of a packed dword make the pairs (0, 2) and (1, 3): then bytes 0 and 2 of the
// dword, one in each 16-bit half, are a pair as they stand, and bytes 1 and 3 are the other after one shift.
//
// 6 x 64 tile: 24 accumulators, 4 weight registers, 1 for the broadcast pair, of 32.
struct Avx512Bf16 : ZmmVerbs {
  static constexpr int kUnitK = 2, kTileM = 6, kTileVecs = 4, kStreamRows = 6;
  static constexpr bool kStreams = true;
  static constexpr bool kScaledPanel = false, kTables = true, kEmbedsBroadcast = true;
  static constexpr int stream_vecs(int /*rows*/) { return 4; }

  using Raw = __m512i;
  using Value = __m512i;

  // W8: low and high byte of bf16(i) for i = 0..127. W4: bf16(i % 16 - 8) for i = 0..31, in `low0`.
  struct Table {
    __m512i low0, low1, high0, high1;
  };
  template <class W>
  static Table make_table(const float* /*codebook*/) {
    alignas(64) uint8_t low[128] = {}, high[128] = {};
    alignas(64) uint16_t nibble[32];
    for (int i = 0; i < 128; ++i) {
      const uint32_t bits = bits_of(static_cast<float>(i));
      low[i] = static_cast<uint8_t>(bits >> 16);
      high[i] = static_cast<uint8_t>(bits >> 24);
    }
    for (int i = 0; i < 32; ++i) nibble[i] = static_cast<uint16_t>(bits_of(static_cast<float>(i % 16 - 8)) >> 16);
    if constexpr (W::kBits == 4) return {_mm512_load_si512(nibble), set_i(0), set_i(0), set_i(0)};
    return {_mm512_load_si512(low), _mm512_load_si512(low + 64), _mm512_load_si512(high), _mm512_load_si512(high + 64)};
  }
  static uint32_t bits_of(float v) {
    uint32_t u;
    __builtin_memcpy(&u, &v, 4);
    return u;
  }

  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static float reduce_add(F v) { return _mm512_reduce_add_ps(v); }
  static __m512i broadcast(const uint32_t* x) { return _mm512_set1_epi32(static_cast<int32_t>(*x)); }
  static void mac(F& c, __m512i w, __m512i x) { asm("vdpbf16ps %2, %1, %0" : "+v"(c) : "v"(w), "v"(x)); }
  static void mac_at(F& c, __m512i w, const uint32_t* x) {
    asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(c) : "v"(w), "m"(*x));
  }
  static __m512i load_value(const float* p) { return _mm512_load_si512(p); }
  static void store_value(float* p, __m512i v) { _mm512_store_si512(p, v); }
  static Raw load_raw(const uint8_t* p) { return _mm512_load_si512(p); }

  // W4: nibbles at bits 0 and 16 (after a shift) index vpermw, which ignores all but the lowest five bits of a word;
  // its table repeats after 16 entries, so the fifth does not matter. W8: both bytes of bf16(|w|) by vpermi2b, which
  // ignores the top bit of |w|; then the sign. |-128| would be found at index 0: its high byte is put in, its low byte
  // is 0 already.
  template <class W, int u>
  static __m512i decode(Raw raw, const Table& table) {
    if constexpr (W::kBits == 4) {
      constexpr int kShift = u == 0 ? 0 : u == 1 ? 8 : u == 2 ? 4 : 12;
      return _mm512_permutexvar_epi16(_mm512_srli_epi32(raw, kShift), table.low0);
    } else {
      const __m512i magnitude = _mm512_abs_epi8(raw);
      const __m512i low = _mm512_permutex2var_epi8(table.low0, magnitude, table.low1);
      const __m512i unsigned_high = _mm512_permutex2var_epi8(table.high0, magnitude, table.high1);
      const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
      const __m512i signed_high = _mm512_ternarylogic_epi32(unsigned_high, raw, sign, 0xF8);  // a | (b & c)
      const __m512i high = _mm512_mask_blend_epi8(_mm512_cmpeq_epi8_mask(raw, sign), signed_high,
                                                  _mm512_set1_epi8(static_cast<char>(0xC3)));
      if constexpr (u == 0)
        return _mm512_ternarylogic_epi32(_mm512_slli_epi16(high, 8), low, _mm512_set1_epi16(0x00FF), 0xF8);
      else
        return _mm512_ternarylogic_epi32(_mm512_srli_epi16(low, 8), high,
                                         _mm512_set1_epi16(static_cast<int16_t>(0xFF00)), 0xF8);
    }
  }

  template <class W>
  static int64_t stream_max() {
    return W::kBits == 4 ? 64 : 8;
  }
  template <class W>
  static constexpr float stream_bias() {
    return 0.0f;
  }
  template <class W, int u>
  static __m512i stream_decode(Raw raw, const Table& table) {
    return decode<W, u>(raw, table);
  }

  template <DType D, class W>
  static void copy_row(const void* x, const float* /*inv_smooth*/, int64_t k, bool /*stream*/, uint32_t* units) {
    const uint16_t* in = static_cast<const uint16_t*>(x);
    for (int64_t i = 0; i < padded_k(k); i += 32) {
      const int64_t rest = k - i;
      const __mmask32 mask = rest >= 32 ? ~0u : rest > 0 ? (1u << rest) - 1u : 0u;
      const __m512i v = _mm512_maskz_loadu_epi16(mask, in + i);
      constexpr int kOrder = 0xD8;  // 0 2 1 3
      _mm512_storeu_si512(units + i / 2, _mm512_shufflehi_epi16(_mm512_shufflelo_epi16(v, kOrder), kOrder));
    }
  }
};

using Kernels = WeightTiles<Avx512Bf16>;

}  // namespace

const WeightOnlyTable& weight_only_avx512bf16() {
  static constexpr WeightOnlyTable table = {"+bf16", linear_w8a16<Kernels>, linear_w4a16<Kernels>,
                                            linear_wxa16_scratch_bytes};
  return table;
}

}  // namespace qk
