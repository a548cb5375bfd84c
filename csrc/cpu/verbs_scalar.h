// Verbs of the scalar tier: one lane, portable C++, also the tier of every architecture that is not x86-64.
// The same names with wider registers are in verbs_ymm.h and verbs_zmm.h; the *_impl.h files are written over them.
#pragma once

#include <cstdint>
#include <cstring>

#include "../args.h"

namespace qk {
namespace {

struct ScalarVerbs {
  static constexpr int kLanes = 1;
  using F = float;
  using I = int32_t;

  static uint32_t bits(float v) {
    uint32_t u;
    std::memcpy(&u, &v, 4);
    return u;
  }
  static float from_bits(uint32_t u) {
    float v;
    std::memcpy(&v, &u, 4);
    return v;
  }

  static F set(float v) { return v; }
  static I set_i(int32_t v) { return v; }
  static F mul(F a, F b) { return a * b; }
  static F add(F a, F b) { return a + b; }
  static F sub(F a, F b) { return a - b; }
  static F min(F a, F b) { return a < b ? a : b; }
  static F max(F a, F b) { return a > b ? a : b; }
  static F div(F a, F b) { return a / b; }
  static F select_less(F a, F b, F yes, F no) { return a < b ? yes : no; }
  static I add_i(I a, I b) { return static_cast<I>(static_cast<uint32_t>(a) + static_cast<uint32_t>(b)); }
  static I sub_i(I a, I b) { return static_cast<I>(static_cast<uint32_t>(a) - static_cast<uint32_t>(b)); }
  static I mul_i(I a, I b) { return static_cast<I>(static_cast<uint32_t>(a) * static_cast<uint32_t>(b)); }
  static I max_i(I a, I b) { return a > b ? a : b; }
  static I abs_bits(F v) { return static_cast<I>(bits(v) & 0x7FFFFFFFu); }
  static F to_f(I v) { return static_cast<float>(v); }
  // Round half to even for |v| < 2^22: adding 1.5 * 2^23 leaves no fraction bits.
  static I round_i(F v) {
    constexpr float kMagic = 12582912.0f;
    const float shifted = v + kMagic;
    return static_cast<I>(shifted - kMagic);
  }
  static I as_i(F v) { return static_cast<I>(bits(v)); }
  static F as_f(I v) { return from_bits(static_cast<uint32_t>(v)); }
  static I exponent(I v) { return static_cast<I>(static_cast<uint32_t>(v) << 23); }  // added to the bits: times 2^v
  static F lookup8(const float* table, I index) { return table[index & 7]; }
  static int32_t reduce_max_i(I v) { return v; }
  static float reduce_min(F v) { return v; }
  static float reduce_max(F v) { return v; }
  static float reduce_add(F v) { return v; }
  static F first(F v, int) { return v; }

  static F load_f(const float* p) { return *p; }
  static F load_f_part(const float* p, int) { return *p; }
  static void store_f(float* p, F v) { *p = v; }
  static I load_i(const int32_t* p) { return *p; }
  static void store_i(int32_t* p, I v) { *p = v; }

  // Bits of an element, see verbs_ymm.h; halves with their sign extended.
  template <DType D>
  static constexpr int kRawBytes = D == DType::kF32 ? 4 : 2;
  template <DType D>
  static I load_raw(const void* p) {
    if constexpr (D == DType::kF32) return *static_cast<const int32_t*>(p);
    return *static_cast<const int16_t*>(p);
  }
  template <DType D>
  static void store_raw(void* p, I v) {
    if constexpr (D == DType::kF32)
      *static_cast<int32_t*>(p) = v;
    else
      *static_cast<int16_t*>(p) = static_cast<int16_t>(v);
  }
  template <DType D>
  static I magnitudes(I v) {
    return v & (D == DType::kF32 ? 0x7FFFFFFF : 0x7FFF);
  }
  template <DType D>
  static I max_signed(I a, I b) {
    return max_i(a, b);
  }
  template <DType D>
  static I max_unsigned(I a, I b) {
    return static_cast<uint32_t>(a) > static_cast<uint32_t>(b) ? a : b;
  }

  static float half_to_float(uint16_t h) {
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, exponent = (h >> 10) & 31u, mantissa = h & 1023u;
    if (exponent == 31) return from_bits(sign | 0x7F800000u | mantissa << 13);
    if (exponent != 0) return from_bits(sign | (exponent + 112) << 23 | mantissa << 13);
    const float subnormal = static_cast<float>(mantissa) * 0x1p-24f;  // exact
    return sign ? -subnormal : subnormal;
  }
  static uint16_t float_to_half(float v) {
    const uint32_t u = bits(v), sign = (u >> 16) & 0x8000u, a = u & 0x7FFFFFFFu;
    if (a > 0x7F800000u) return static_cast<uint16_t>(sign | 0x7E00u);
    if (a >= 0x477FF000u) return static_cast<uint16_t>(sign | 0x7C00u);  // 65520 and above round to infinity
    if (a < 0x38800000u) {  // below 2^-14: subnormal, in units of 2^-24; adding 0.5 rounds to them, half to even
      const uint32_t rounded = bits(from_bits(a) + 0.5f) - bits(0.5f);
      return static_cast<uint16_t>(sign | rounded);
    }
    const uint32_t rounded = a + 0xFFFu + ((a >> 13) & 1u);
    return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
  }
  static uint16_t float_to_bf16(float v) {
    const uint32_t u = bits(v);
    if ((u & 0x7FFFFFFFu) > 0x7F800000u) return static_cast<uint16_t>((u >> 16) | 0x40u);
    return static_cast<uint16_t>((u + 0x7FFFu + ((u >> 16) & 1u)) >> 16);
  }

  template <DType D>
  static F widen(uint16_t h) {
    if constexpr (D == DType::kBF16) return from_bits(static_cast<uint32_t>(h) << 16);
    return half_to_float(h);
  }
  template <DType D>
  static uint16_t narrow(F v) {
    if constexpr (D == DType::kBF16) return float_to_bf16(v);
    return float_to_half(v);
  }
  template <DType D>
  static F load(const void* p, int64_t i) {
    if constexpr (D == DType::kF32) return static_cast<const float*>(p)[i];
    return widen<D>(static_cast<const uint16_t*>(p)[i]);
  }
  template <DType D>
  static F load_part(const void* p, int64_t i, int) {
    return load<D>(p, i);
  }
  template <DType D>
  static void store(void* p, int64_t i, F v) {
    if constexpr (D == DType::kF32)
      static_cast<float*>(p)[i] = v;
    else
      static_cast<uint16_t*>(p)[i] = narrow<D>(v);
  }
  template <DType D>
  static void store_numbers(void* p, int64_t i, F a, F b) {
    store<D>(p, i, a);
    store<D>(p, i + 1, b);
  }
  template <DType D>
  static void store_part(void* p, int64_t i, F v, int) {
    store<D>(p, i, v);
  }

  static void store_low8(uint8_t* p, I v) { *p = static_cast<uint8_t>(v); }
  static void store_low8_part(uint8_t* p, I v, int) { *p = static_cast<uint8_t>(v); }
  // See verbs_ymm.h.
  static I set_words(int32_t v) { return v; }
  static I set_bytes(int32_t v) { return v; }
  template <DType D>
  static void load4(const void* p, int64_t i, F (&v)[4]) {
    for (int vector = 0; vector < 4; ++vector) v[vector] = load<D>(p, i + vector);
  }
  template <DType D>
  static void store_packed(uint8_t* p, I a, I b, I c, I d, I shift, I flip) {
    const I lanes[4] = {a + shift, b + shift, c + shift, d + shift};
    for (int i = 0; i < 4; ++i) {
      const I v = lanes[i] < -128 ? -128 : lanes[i] > 127 ? 127 : lanes[i];
      p[i] = static_cast<uint8_t>(v ^ flip);
    }
  }
  template <DType D>
  static void store_nibbles(uint8_t* p, I a, I b, I c, I d, I shift) {
    const I lanes[4] = {a + shift, b + shift, c + shift, d + shift};
    for (int i = 0; i < 2; ++i) {
      const I low = lanes[2 * i] > 15 ? 15 : lanes[2 * i], high = lanes[2 * i + 1] > 15 ? 15 : lanes[2 * i + 1];
      p[i] = static_cast<uint8_t>(low | high << 4);
    }
  }
  static void unpack_nibbles(const uint8_t* q, uint8_t* codes) {
    for (int i = 0; i < 16; ++i) codes[2 * i] = q[i] & 15, codes[2 * i + 1] = q[i] >> 4;
  }
  static void lookup_nibbles(const uint16_t* table, const uint8_t* q, uint16_t* out) {
    for (int i = 0; i < 16; ++i) out[2 * i] = table[q[i] & 15], out[2 * i + 1] = table[q[i] >> 4];
  }
  static I load_i8(const int8_t* p) { return *p; }
  static I load_u8(const uint8_t* p) { return *p; }
  static I load_i8_part(const int8_t* p, int) { return *p; }
  static I load_u8_part(const uint8_t* p, int) { return *p; }
};

}  // namespace
}  // namespace qk
