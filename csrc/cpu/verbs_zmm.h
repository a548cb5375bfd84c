// Verbs over 512-bit registers (AVX-512 F, BW, DQ, VL), shared by the AVX512-VNNI and AMX tiers.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "../args.h"
#include "verbs_ymm.h"

namespace qk {
namespace {

struct ZmmVerbs {
  static constexpr int kLanes = 16;
  using F = __m512;
  using I = __m512i;

  static F set(float v) { return _mm512_set1_ps(v); }
  static I set_i(int32_t v) { return _mm512_set1_epi32(v); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  // a < b ? yes : no, and no where either is NaN.
  static F select_less(F a, F b, F yes, F no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
  }
  static I add_i(I a, I b) { return _mm512_add_epi32(a, b); }
  static I sub_i(I a, I b) { return _mm512_sub_epi32(a, b); }
  static I mul_i(I a, I b) { return _mm512_mullo_epi32(a, b); }
  static I max_i(I a, I b) { return _mm512_max_epi32(a, b); }
  static I abs_bits(F v) { return _mm512_and_si512(_mm512_castps_si512(v), set_i(0x7FFFFFFF)); }
  static F to_f(I v) { return _mm512_cvtepi32_ps(v); }
  static I round_i(F v) { return _mm512_cvtps_epi32(v); }  // half to even: FpEnvironment sets MXCSR
  static I as_i(F v) { return _mm512_castps_si512(v); }
  static F as_f(I v) { return _mm512_castsi512_ps(v); }
  static I exponent(I v) { return _mm512_slli_epi32(v, 23); }  // added to the bits of a float: times 2^v
  static F lookup8(const float* table, I index) {
    return _mm512_permutexvar_ps(index, _mm512_broadcast_f32x8(_mm256_loadu_ps(table)));
  }
  static int32_t reduce_max_i(I v) { return _mm512_reduce_max_epi32(v); }
  static float reduce_min(F v) { return _mm512_reduce_min_ps(v); }
  static float reduce_max(F v) { return _mm512_reduce_max_ps(v); }
  static float reduce_add(F v) {
    return YmmVerbs::reduce_add(_mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)));
  }

  // Bits of a register of elements, see verbs_ymm.h.
  template <DType D>
  static constexpr int kRawBytes = 64;
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
    return _mm512_and_si512(v, D == DType::kF32 ? set_i(0x7FFFFFFF) : _mm512_set1_epi16(0x7FFF));
  }
  template <DType D>
  static I max_signed(I a, I b) {
    return D == DType::kF32 ? _mm512_max_epi32(a, b) : _mm512_max_epi16(a, b);
  }
  template <DType D>
  static I max_unsigned(I a, I b) {
    return D == DType::kF32 ? _mm512_max_epu32(a, b) : _mm512_max_epu16(a, b);
  }
  template <DType D>
  static float reduce_unsigned(I v) {
    if constexpr (D == DType::kF32) {
      return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(static_cast<int>(_mm512_reduce_max_epu32(v)))));
    } else {
      const __m256i half = _mm256_max_epu16(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
      const __m128i most = _mm_max_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
      const __m128i ones = _mm_set1_epi32(-1);
      const __m128i m = _mm_xor_si128(_mm_minpos_epu16(_mm_xor_si128(most, ones)), ones);
      if constexpr (D == DType::kF16) return _mm_cvtss_f32(_mm_cvtph_ps(m));
      return _mm_cvtss_f32(_mm_castsi128_ps(_mm_slli_epi32(m, 16)));
    }
  }

  // The same of each of sixteen registers, whose halves need no more room.
  template <DType D>
  static F reduce_each_unsigned(const I* v) {
    __m256i half[16];
    for (int i = 0; i < 16; ++i)
      half[i] = YmmVerbs::max_unsigned<D>(_mm512_castsi512_si256(v[i]), _mm512_extracti64x4_epi64(v[i], 1));
    const F low = _mm512_castps256_ps512(YmmVerbs::reduce_each_unsigned<D>(half));
    return _mm512_insertf32x8(low, YmmVerbs::reduce_each_unsigned<D>(half + 8), 1);
  }

  static __mmask16 mask(int n) { return static_cast<__mmask16>((1u << n) - 1u); }  // lanes below n
  static F first(F v, int n) { return _mm512_maskz_mov_ps(mask(n), v); }
  static F load_f(const float* p) { return _mm512_loadu_ps(p); }
  static F load_f_part(const float* p, int n) { return _mm512_maskz_loadu_ps(mask(n), p); }
  static void store_f(float* p, F v) { _mm512_storeu_ps(p, v); }
  static I load_i(const int32_t* p) { return _mm512_loadu_si512(p); }
  static void store_i(int32_t* p, I v) { _mm512_storeu_si512(p, v); }
  // total += float(sum) * scale, or total += sum * multiplier.
  static void add_group(float* total, I sum, const float* scale) {
    store_f(total, add(load_f(total), mul(to_f(sum), load_f(scale))));
  }
  static void add_group(int32_t* total, I sum, const int32_t* multiplier) {
    store_i(total, add_i(load_i(total), mul_i(sum, load_i(multiplier))));
  }

  template <DType D>
  static F widen(__m256i h) {
    if constexpr (D == DType::kF16) return _mm512_cvtph_ps(h);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
  }
  template <DType D>
  static F load(const void* p, int64_t i) {
    if constexpr (D == DType::kF32) return _mm512_loadu_ps(static_cast<const float*>(p) + i);
    return widen<D>(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(p) + i)));
  }
  template <DType D>
  static F load_part(const void* p, int64_t i, int n) {
    if constexpr (D == DType::kF32) return load_f_part(static_cast<const float*>(p) + i, n);
    return widen<D>(_mm256_maskz_loadu_epi16(mask(n), static_cast<const uint16_t*>(p) + i));
  }

  // Rounded by integer arithmetic: the conversion instruction of AVX512-BF16 would flush subnormal numbers.
  static __m256i narrow_bf16(F v) {
    const I u = _mm512_castps_si512(v);
    const I odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), set_i(1));
    const I rounded = _mm512_add_epi32(u, _mm512_add_epi32(odd, set_i(0x7FFF)));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const I chosen = _mm512_mask_or_epi32(rounded, is_nan, u, set_i(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(chosen, 16));
  }
  template <DType D>
  static __m256i narrow(F v) {
    if constexpr (D == DType::kF16) return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
    return narrow_bf16(v);
  }
  template <DType D>
  static void store(void* p, int64_t i, F v) {
    if constexpr (D == DType::kF32)
      _mm512_storeu_ps(static_cast<float*>(p) + i, v);
    else
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(static_cast<uint16_t*>(p) + i), narrow<D>(v));
  }
  // Lanes [i, i + 32), whole lines, past the caches. Other threads see them after a fence.
  template <DType D>
  static void stream(void* p, int64_t i, F a, F b) {
    if constexpr (D == DType::kF32) {
      _mm512_stream_ps(static_cast<float*>(p) + i, a);
      _mm512_stream_ps(static_cast<float*>(p) + i + 16, b);
    } else {
      const I both = _mm512_inserti64x4(_mm512_castsi256_si512(narrow<D>(a)), narrow<D>(b), 1);
      _mm512_stream_si512(reinterpret_cast<I*>(static_cast<uint16_t*>(p) + i), both);
    }
  }
  static void stream_fence() { _mm_sfence(); }
  template <DType D>
  static void store_numbers(void* p, int64_t i, F a, F b) {
    store<D>(p, i, a);
    store<D>(p, i + 16, b);
  }
  template <DType D>
  static void store_part(void* p, int64_t i, F v, int n) {
    if constexpr (D == DType::kF32)
      _mm512_mask_storeu_ps(static_cast<float*>(p) + i, mask(n), v);
    else
      _mm256_mask_storeu_epi16(static_cast<uint16_t*>(p) + i, mask(n), narrow<D>(v));
  }

  // The low byte of each lane.
  static void store_low8(uint8_t* p, I v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(v)); }
  static void store_low8_part(uint8_t* p, I v, int n) { _mm512_mask_cvtepi32_storeu_epi8(p, mask(n), v); }
  static I set_words(int32_t v) { return _mm512_set1_epi16(static_cast<int16_t>(v)); }
  static I set_bytes(int32_t v) { return _mm512_set1_epi8(static_cast<char>(v)); }
  // Words of two vectors, saturated, plus shift, words too; interleaved by 128 bits.
  static I words(I a, I b, I shift) { return _mm512_add_epi16(_mm512_packs_epi32(a, b), shift); }
  // See verbs_ymm.h.
  template <DType D>
  static void load4(const void* p, int64_t i, F (&v)[4]) {
    for (int vector = 0; vector < 4; ++vector) v[vector] = load<D>(p, i + 16 * vector);
  }
  // 64 lanes of four vectors, see verbs_ymm.h.
  static I bytes_order() { return _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15); }
  template <DType D>
  static void store_packed(uint8_t* p, I a, I b, I c, I d, I shift, I flip) {
    const I bytes = _mm512_packs_epi16(words(a, b, shift), words(c, d, shift));
    const I sorted = _mm512_permutexvar_epi32(bytes_order(), bytes);
    _mm512_storeu_si512(p, _mm512_xor_si512(sorted, flip));
  }
  template <DType D>
  static void store_nibbles(uint8_t* p, I a, I b, I c, I d, I shift) {
    const I bytes = _mm512_min_epu8(_mm512_packus_epi16(words(a, b, shift), words(c, d, shift)), _mm512_set1_epi8(15));
    const I pairs = _mm512_maddubs_epi16(_mm512_permutexvar_epi32(bytes_order(), bytes), _mm512_set1_epi16(0x1001));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi16_epi8(pairs));
  }
  static void lookup_nibbles(const uint16_t* table, const uint8_t* q, uint16_t* out) {
    YmmVerbs::lookup_nibbles(table, q, out);
  }
  static void unpack_nibbles(const uint8_t* q, uint8_t* codes) { YmmVerbs::unpack_nibbles(q, codes); }
  static I load_i8(const int8_t* p) {
    return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static I load_u8(const uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static I load_i8_part(const int8_t* p, int n) { return _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask(n), p)); }
  static I load_u8_part(const uint8_t* p, int n) { return _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask(n), p)); }
};

}  // namespace
}  // namespace qk
