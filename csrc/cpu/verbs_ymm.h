// Verbs over 256-bit registers (AVX2 + F16C), shared by the AVX2 and AVX-VNNI tiers.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "../args.h"
#include "../layout.h"

namespace qk {
namespace {

struct YmmVerbs {
  static constexpr int kLanes = 8;
  using F = __m256;
  using I = __m256i;

  // call(row, left, right) for the first kRows pairs of registers, those of a tile's rows.
  template <int kRows, int kRow = 0, class Call, class... Rest>
  QK_INLINE static void each_row(const Call& call, I& left, I& right, Rest&... rest) {
    call(kRow, left, right);
    if constexpr (kRow + 1 < kRows) each_row<kRows, kRow + 1>(call, rest...);
  }
  // The sums of such a tile, 16 columns: what c holds, or zeros; and to c.
  template <int kRows, class... Sums>
  QK_INLINE static void start_sums(const int32_t* c, bool accumulate, Sums&... sums) {
    const auto start = [&](int r, I& left, I& right) QK_INLINE {
      left = accumulate ? load_i(c + 16 * r) : set_i(0);
      right = accumulate ? load_i(c + 16 * r + 8) : set_i(0);
    };
    each_row<kRows>(start, sums...);
  }
  template <int kRows, class... Sums>
  QK_INLINE static void store_sums(int32_t* c, Sums&... sums) {
    each_row<kRows>([&](int r, I left, I right) QK_INLINE { store_run(c + 16 * r, left, right); }, sums...);
  }

  static F set(float v) { return _mm256_set1_ps(v); }
  static I set_i(int32_t v) { return _mm256_set1_epi32(v); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  // a < b ? yes : no, and no where either is NaN.
  static F select_less(F a, F b, F yes, F no) { return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
  static I add_i(I a, I b) { return _mm256_add_epi32(a, b); }
  static I sub_i(I a, I b) { return _mm256_sub_epi32(a, b); }
  static I mul_i(I a, I b) { return _mm256_mullo_epi32(a, b); }
  static I max_i(I a, I b) { return _mm256_max_epi32(a, b); }
  static I abs_bits(F v) { return _mm256_and_si256(_mm256_castps_si256(v), set_i(0x7FFFFFFF)); }
  static F to_f(I v) { return _mm256_cvtepi32_ps(v); }
  static I round_i(F v) { return _mm256_cvtps_epi32(v); }  // half to even: FpEnvironment sets MXCSR
  static I as_i(F v) { return _mm256_castps_si256(v); }
  static F as_f(I v) { return _mm256_castsi256_ps(v); }
  static I exponent(I v) { return _mm256_slli_epi32(v, 23); }  // added to the bits of a float: times 2^v

  // Of a table of eight, those that the lowest three bits of each lane count.
  static F lookup8(const float* table, I index) { return _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), index); }

  static int32_t reduce_max_i(I v) {
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4E));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0xB1));
    return _mm_cvtsi128_si32(m);
  }
  static float reduce_min(F v) {
    __m128 m = _mm_min_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    m = _mm_min_ps(m, _mm_movehl_ps(m, m));
    m = _mm_min_ss(m, _mm_shuffle_ps(m, m, 1));
    return _mm_cvtss_f32(m);
  }
  static float reduce_max(F v) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    m = _mm_max_ss(m, _mm_shuffle_ps(m, m, 1));
    return _mm_cvtss_f32(m);
  }

  // Halves are added to one another until one lane is left.
  static float reduce_add(F v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
  }

  // Bits of a register of elements, eight floats or sixteen halves. The order of magnitudes is theirs as integers, NaN
  // above infinity; unsigned, anything with a sign lies above everything without, and signed, below.
  template <DType D>
  static constexpr int kRawBytes = 32;
  template <DType D>
  static I load_raw(const void* p) {
    return load_i(static_cast<const int32_t*>(p));
  }
  template <DType D>
  static void store_raw(void* p, I v) {
    store_i(static_cast<int32_t*>(p), v);
  }
  template <DType D>
  static I magnitudes(I v) {
    return _mm256_and_si256(v, D == DType::kF32 ? set_i(0x7FFFFFFF) : _mm256_set1_epi16(0x7FFF));
  }
  template <DType D>
  static I max_signed(I a, I b) {
    return D == DType::kF32 ? _mm256_max_epi32(a, b) : _mm256_max_epi16(a, b);
  }
  template <DType D>
  static I max_unsigned(I a, I b) {
    return D == DType::kF32 ? _mm256_max_epu32(a, b) : _mm256_max_epu16(a, b);
  }
  // The largest as an unsigned integer, as a float.
  template <DType D>
  static float reduce_unsigned(I v) {
    const __m128i low = _mm256_castsi256_si128(v), high = _mm256_extracti128_si256(v, 1);
    if constexpr (D == DType::kF32) {
      __m128i m = _mm_max_epu32(low, high);
      m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0x4E));
      m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0xB1));
      return _mm_cvtss_f32(_mm_castsi128_ps(m));
    } else {
      const __m128i ones = _mm_set1_epi32(-1);
      const __m128i m = _mm_xor_si128(_mm_minpos_epu16(_mm_xor_si128(_mm_max_epu16(low, high), ones)), ones);
      if constexpr (D == DType::kF16) return _mm_cvtss_f32(_mm_cvtph_ps(m));
      return _mm_cvtss_f32(_mm_castsi128_ps(_mm_slli_epi32(m, 16)));
    }
  }

  // The same of each of eight registers: two of them become one by turns, their halves side by side.
  template <DType D>
  static F reduce_each_unsigned(const I* v) {
    const auto by_64 = [](I a, I b) {
      return max_unsigned<D>(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
    };
    const auto by_32 = [](I a, I b) {
      return max_unsigned<D>(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
    };
    if constexpr (D == DType::kF32) {
      const I a = by_64(by_32(v[0], v[1]), by_32(v[2], v[3])), b = by_64(by_32(v[4], v[5]), by_32(v[6], v[7]));
      return as_f(max_unsigned<D>(_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31)));
    } else {
      const auto by_16 = [](I a, I b) {
        return max_unsigned<D>(_mm256_unpacklo_epi16(a, b), _mm256_unpackhi_epi16(a, b));
      };
      const I all = by_64(by_32(by_16(v[0], v[1]), by_16(v[2], v[3])), by_32(by_16(v[4], v[5]), by_16(v[6], v[7])));
      return widen<D>(_mm_max_epu16(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1)));
    }
  }

  // Lanes below n.
  static I mask(int n) { return _mm256_cmpgt_epi32(set_i(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)); }
  static F first(F v, int n) { return _mm256_and_ps(v, as_f(mask(n))); }  // zero in the others
  static F load_f(const float* p) { return _mm256_loadu_ps(p); }
  static F load_f_part(const float* p, int n) { return _mm256_maskload_ps(p, mask(n)); }
  static void store_f(float* p, F v) { _mm256_storeu_ps(p, v); }
  static I load_i(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static void store_i(int32_t* p, I v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  // total += float(sum) * scale, or total += sum * multiplier.
  static void add_group(float* total, I sum, const float* scale) {
    store_f(total, add(load_f(total), mul(to_f(sum), load_f(scale))));
  }
  static void add_group(int32_t* total, I sum, const int32_t* multiplier) {
    store_i(total, add_i(load_i(total), mul_i(sum, load_i(multiplier))));
  }
  // One behind the other.
  template <class... Vectors>
  static void store_run(int32_t* p, Vectors... v) {
    ((store_i(p, v), p += 8), ...);
  }

  template <DType D>
  static F widen(__m128i h) {
    if constexpr (D == DType::kF16) return _mm256_cvtph_ps(h);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
  }
  template <DType D>
  static F load(const void* p, int64_t i) {
    if constexpr (D == DType::kF32) return _mm256_loadu_ps(static_cast<const float*>(p) + i);
    return widen<D>(_mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(p) + i)));
  }
  template <DType D>
  static F load_part(const void* p, int64_t i, int n) {
    if constexpr (D == DType::kF32) return load_f_part(static_cast<const float*>(p) + i, n);
    alignas(16) uint16_t lanes[8] = {};
    std::memcpy(lanes, static_cast<const uint16_t*>(p) + i, static_cast<size_t>(n) * 2);
    return widen<D>(_mm_load_si128(reinterpret_cast<const __m128i*>(lanes)));
  }

  // Rounded by integer arithmetic: the conversion instruction of AVX512-BF16 would flush subnormal numbers.
  static I rounded_bf16(F v) {
    const I u = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), set_i(1));
    return _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, set_i(0x7FFF))), 16);
  }
  static __m128i narrow_bf16(F v) {
    const I quiet = _mm256_srli_epi32(_mm256_or_si256(_mm256_castps_si256(v), set_i(0x400000)), 16);
    const I is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const I high = _mm256_blendv_epi8(rounded_bf16(v), quiet, is_nan);
    const I packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
    return _mm256_castsi256_si128(packed);
  }
  template <DType D>
  static __m128i narrow(F v) {
    if constexpr (D == DType::kF16) return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
    return narrow_bf16(v);
  }
  template <DType D>
  static void store(void* p, int64_t i, F v) {
    if constexpr (D == DType::kF32)
      _mm256_storeu_ps(static_cast<float*>(p) + i, v);
    else
      _mm_storeu_si128(reinterpret_cast<__m128i*>(static_cast<uint16_t*>(p) + i), narrow<D>(v));
  }
  // Two vectors, neither with a NaN.
  template <DType D>
  static void store_numbers(void* p, int64_t i, F a, F b) {
    if constexpr (D == DType::kBF16) {
      const I pairs = _mm256_packus_epi32(rounded_bf16(a), rounded_bf16(b));  // interleaved by 128 bits
      store_i(reinterpret_cast<int32_t*>(static_cast<uint16_t*>(p) + i), _mm256_permute4x64_epi64(pairs, 0xD8));
    } else {
      store<D>(p, i, a);
      store<D>(p, i + 8, b);
    }
  }
  template <DType D>
  static void store_part(void* p, int64_t i, F v, int n) {
    if constexpr (D == DType::kF32) {
      _mm256_maskstore_ps(static_cast<float*>(p) + i, mask(n), v);
    } else {
      alignas(16) uint16_t lanes[8];
      _mm_store_si128(reinterpret_cast<__m128i*>(lanes), narrow<D>(v));
      std::memcpy(static_cast<uint16_t*>(p) + i, lanes, static_cast<size_t>(n) * 2);
    }
  }

  // The low byte of each lane.
  static int64_t low8(I v) {
    const I order = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0, 4, 8, 12, -1, -1,
                                     -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
    const I bytes = _mm256_shuffle_epi8(v, order);
    const __m128i both = _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
    return _mm_cvtsi128_si64(both);
  }
  static void store_low8(uint8_t* p, I v) {
    const int64_t bytes = low8(v);
    std::memcpy(p, &bytes, 8);
  }
  static void store_low8_part(uint8_t* p, I v, int n) {
    const int64_t bytes = low8(v);
    std::memcpy(p, &bytes, static_cast<size_t>(n));
  }
  static I set_words(int32_t v) { return _mm256_set1_epi16(static_cast<int16_t>(v)); }
  static I set_bytes(int32_t v) { return _mm256_set1_epi8(static_cast<char>(v)); }
  // Words of two vectors, saturated, plus shift, words too; interleaved by 128 bits.
  static I words(I a, I b, I shift) { return _mm256_add_epi16(_mm256_packs_epi32(a, b), shift); }
  // Four vectors of elements from i on, in an order that stores of the same D undo: halves are widened where they lie,
  // the even ones of sixteen and the odd ones, which spares bf16 two shuffles a vector.
  template <DType D>
  static void load4(const void* p, int64_t i, F (&v)[4]) {
    if constexpr (D == DType::kBF16) {
      for (int pair = 0; pair < 4; pair += 2) {
        const I halves = load_raw<D>(static_cast<const uint16_t*>(p) + i + 8 * pair);
        v[pair] = as_f(_mm256_slli_epi32(halves, 16));
        v[pair + 1] = as_f(_mm256_and_si256(halves, set_i(static_cast<int32_t>(0xFFFF0000))));
      }
    } else {
      for (int vector = 0; vector < 4; ++vector) v[vector] = load<D>(p, i + 8 * vector);
    }
  }
  // 32 lanes of four vectors, in the order of load4<D>, plus shift (words) as int8, saturated; every bit of flip
  // (bytes) is inverted. Neither the lanes' values nor the shift may be beyond 2^14.
  template <DType D>
  static void store_packed(uint8_t* p, I a, I b, I c, I d, I shift, I flip) {
    const I bytes = _mm256_packs_epi16(words(a, b, shift), words(c, d, shift));
    if constexpr (D == DType::kBF16) {
      const I order = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15));
      const I sorted = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(bytes, order), 0xD8);
      store_i(reinterpret_cast<int32_t*>(p), _mm256_xor_si256(sorted, flip));
    } else {
      const I sorted = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
      store_i(reinterpret_cast<int32_t*>(p), _mm256_xor_si256(sorted, flip));
    }
  }
  // The same with values from 0 on, of which those above 15 become 15, as 16 bytes: the even lane in the low nibble.
  template <DType D>
  static void store_nibbles(uint8_t* p, I a, I b, I c, I d, I shift) {
    I pairs;  // low + 16 * high
    __m128i order;
    if constexpr (D == DType::kBF16) {
      const I most = _mm256_set1_epi16(15);
      const I even = _mm256_min_epi16(words(a, c, shift), most), odd = _mm256_min_epi16(words(b, d, shift), most);
      pairs = _mm256_or_si256(even, _mm256_slli_epi16(odd, 4));
      order = _mm_setr_epi8(0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 12, 13, 14, 15);
    } else {
      const I bytes =
          _mm256_min_epu8(_mm256_packus_epi16(words(a, b, shift), words(c, d, shift)), _mm256_set1_epi8(15));
      pairs = _mm256_maddubs_epi16(bytes, _mm256_set1_epi16(0x1001));
      order = _mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15);
    }
    const __m128i packed = _mm_packus_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_shuffle_epi8(packed, order));
  }
  // The values that 32 codes of 4 bits, the even one in the low nibble, stand for: 16 halves.
  static void lookup_nibbles(const uint16_t* table, const uint8_t* q, uint16_t* out) {
    const __m128i split = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
    const __m128i* halves = reinterpret_cast<const __m128i*>(table);
    const __m128i a = _mm_shuffle_epi8(_mm_loadu_si128(halves), split);
    const __m128i b = _mm_shuffle_epi8(_mm_loadu_si128(halves + 1), split);
    const I low = _mm256_broadcastsi128_si256(_mm_unpacklo_epi64(a, b)),
            high = _mm256_broadcastsi128_si256(_mm_unpackhi_epi64(a, b)), codes = split_nibbles(q);
    const I l = _mm256_shuffle_epi8(low, codes), h = _mm256_shuffle_epi8(high, codes);
    const I first = _mm256_unpacklo_epi8(l, h), second = _mm256_unpackhi_epi8(l, h);  // of each 128 bits of codes
    store_i(reinterpret_cast<int32_t*>(out), _mm256_permute2x128_si256(first, second, 0x20));
    store_i(reinterpret_cast<int32_t*>(out + 16), _mm256_permute2x128_si256(first, second, 0x31));
  }
  // 16 bytes to 32 codes.
  static I split_nibbles(const uint8_t* q) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(q)), mask = _mm_set1_epi8(15);
    const __m128i low = _mm_and_si128(bytes, mask), high = _mm_and_si128(_mm_srli_epi16(bytes, 4), mask);
    return _mm256_set_m128i(_mm_unpackhi_epi8(low, high), _mm_unpacklo_epi8(low, high));
  }
  static void unpack_nibbles(const uint8_t* q, uint8_t* codes) {
    store_i(reinterpret_cast<int32_t*>(codes), split_nibbles(q));
  }
  static __m128i load_bytes(const void* p, int n) {
    int64_t bytes = 0;
    std::memcpy(&bytes, p, static_cast<size_t>(n));
    return _mm_cvtsi64_si128(bytes);
  }
  static I load_i8(const int8_t* p) { return _mm256_cvtepi8_epi32(load_bytes(p, 8)); }
  static I load_u8(const uint8_t* p) { return _mm256_cvtepu8_epi32(load_bytes(p, 8)); }
  static I load_i8_part(const int8_t* p, int n) { return _mm256_cvtepi8_epi32(load_bytes(p, n)); }
  static I load_u8_part(const uint8_t* p, int n) { return _mm256_cvtepu8_epi32(load_bytes(p, n)); }
};

}  // namespace
}  // namespace qk
