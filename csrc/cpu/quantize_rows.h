// Quantization of one contiguous granule, written once over the verbs of a tier. This is the contract's rounding:
//
//   symmetric:   absmax = max|x|; scale = absmax / levels; inv = levels / absmax; q = clamp(rne(x * inv), -levels,
//   levels)
//                absmax < 2^-100 counts as zero: scale 1, q 0
//   asymmetric:  hi = max(x, 0); lo = min(x, 0); scale = hi / levels - lo / levels; inv = 1 / scale;
//                zero_point = clamp(rne(-lo * inv), 0, levels); q = clamp(rne(x * inv) + zero_point, 0, levels)
//   a granule that holds NaN or Inf: scale NaN, q 0
//
// With a smoothing vector, x * inv_smooth (one rounding) comes first.
#pragma once

#include <cstring>

#include "../args.h"

namespace qk {
namespace {

constexpr int32_t kInfBits = 0x7F800000;
constexpr float kTinyAbsmax = 0x1p-100f;

// Largest |x| as bits (order of the bits is the order of the values, and NaN lies above infinity), and the range.
struct Stats {
  int32_t abs_bits = 0;
  float lo = 0.0f, hi = 0.0f;

  void merge(const Stats& other) {
    abs_bits = other.abs_bits > abs_bits ? other.abs_bits : abs_bits;
    lo = other.lo < lo ? other.lo : lo;
    hi = other.hi > hi ? other.hi : hi;
  }
  bool finite() const { return abs_bits < kInfBits; }
};

// How to quantize one granule: q = clamp(rne(x * inv), q_lo - zp, q_hi - zp) + zp. inv = 0 makes every q the zero
// point.
struct Params {
  float scale, inv;
  int32_t zero_point;
};

inline float float_from_bits(int32_t bits) {
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}

constexpr int32_t kNanBits = 0x7FC00000;

// Rounds half to even; |v| must be below 2^22.
inline int32_t round_half_even(float v) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23
  const float shifted = v + kMagic;
  return static_cast<int32_t>(shifted - kMagic);
}

// bits: 8 or 4. int4's inverse is 1 / scale (its scale may be rounded to a storage dtype first), int8's levels /
// absmax.
inline Params symmetric_params(const Stats& stats, int bits) {
  if (!stats.finite()) return {float_from_bits(kNanBits), 0.0f, 0};
  const float absmax = float_from_bits(stats.abs_bits);
  if (absmax < kTinyAbsmax) return {1.0f, 0.0f, 0};
  if (bits == 8) return {absmax / 127.0f, 127.0f / absmax, 0};
  const float scale = absmax / 7.0f;
  return {scale, 1.0f / scale, 0};
}

inline Params asymmetric_params(const Stats& stats, int bits) {
  if (!stats.finite()) return {float_from_bits(kNanBits), 0.0f, 0};
  const float levels = bits == 8 ? 255.0f : 15.0f;
  const float scale = bits == 8 ? stats.hi / levels - stats.lo / levels : (stats.hi - stats.lo) / levels;
  const float inv = 1.0f / scale;
  if (stats.hi == stats.lo || !(inv <= 3.402823466e38f)) return {1.0f, 0.0f, 0};
  float zp = -stats.lo * inv;
  zp = zp < levels ? zp : levels;
  return {scale, inv, round_half_even(zp)};
}

// A given scale (and zero point); granules with NaN or Inf are marked all the same.
inline Params static_params(const Stats& stats, float scale, int32_t zero_point) {
  if (!stats.finite()) return {float_from_bits(kNanBits), 0.0f, 0};
  return {scale, 1.0f / scale, zero_point};
}

template <class V, DType D>
struct Granule {
  using F = typename V::F;
  using I = typename V::I;

  static F value(const void* x, const float* smooth, int64_t i) {
    const F v = V::template load<D>(x, i);
    return smooth ? V::mul(v, V::load_f(smooth + i)) : v;
  }
  static F value_part(const void* x, const float* smooth, int64_t i, int n) {
    const F v = V::template load_part<D>(x, i, n);
    return smooth ? V::mul(v, V::load_f_part(smooth + i, n)) : v;
  }

  // Statistics of x[begin, end). The range is left at zero unless asked for.
  template <bool kRange>
  static Stats stats(const void* x, const float* smooth, int64_t begin, int64_t end) {
    constexpr int kW = V::kLanes;
    I m0 = V::set_i(0), m1 = V::set_i(0);
    F lo = V::set(0.0f), hi = V::set(0.0f);
    int64_t i = begin;
    // Not with one lane: the compiler vectorizes the plain loop below just as well, and GCC 12 for AArch64 loses one of
    // two accumulators when it vectorizes this one (bf16, a tail of 4 to 7 pairs).
    for (; kW > 1 && i + 2 * kW <= end; i += 2 * kW) {
      const F a = value(x, smooth, i), b = value(x, smooth, i + kW);
      m0 = V::max_i(m0, V::abs_bits(a));
      m1 = V::max_i(m1, V::abs_bits(b));
      if constexpr (kRange) {
        lo = V::min(lo, V::min(a, b));
        hi = V::max(hi, V::max(a, b));
      }
    }
    for (; i < end; i += kW) {
      const int n = static_cast<int>(end - i < kW ? end - i : kW);
      const F a = value_part(x, smooth, i, n);
      m0 = V::max_i(m0, V::abs_bits(a));
      if constexpr (kRange) {
        lo = V::min(lo, a);
        hi = V::max(hi, a);
      }
    }
    Stats result;
    result.abs_bits = V::reduce_max_i(V::max_i(m0, m1));
    if constexpr (kRange) {
      result.lo = V::reduce_min(lo);
      result.hi = V::reduce_max(hi);
    }
    return result;
  }

  // out[i] = low byte of clamp(rne(x[i] * inv), q_lo - zp, q_hi - zp) + zp + offset, for i in [begin, end).
  // The bounds are integers, so clamping before the rounding is the same as after it, and never overflows the cast.
  //
  // Four vectors at a time are narrowed with saturation to int8 (and flipped to unsigned where need be). Dynamic scales
  // need no other clamp there: |x| <= absmax keeps a symmetric q within 127, and int8 is the range of an asymmetric
  // one.
  static void quantize(const void* x, const float* smooth, int64_t begin, int64_t end, const Params& p, int32_t q_lo,
                       int32_t q_hi, int32_t offset, bool clamps, uint8_t* out) {
    constexpr int kW = V::kLanes;
    const F inv = V::set(p.inv), lo = V::set(static_cast<float>(q_lo - p.zero_point)),
            hi = V::set(static_cast<float>(q_hi - p.zero_point));
    const bool flips = q_hi + offset > 127;
    const I packed_shift = V::set_i(p.zero_point + (flips ? offset - 128 : offset));
    const uint8_t flip = flips ? 0x80 : 0;
    int64_t i = begin;
    if (clamps) {
      const auto level = [&](int64_t at) {
        const F v = V::min(V::max(V::mul(value(x, smooth, at), inv), lo), hi);
        return V::add_i(V::round_i(v), packed_shift);
      };
      for (; i + 4 * kW <= end; i += 4 * kW)
        V::store_packed(out + (i - begin), level(i), level(i + kW), level(i + 2 * kW), level(i + 3 * kW), flip);
    } else {
      const auto level = [&](int64_t at) {
        return V::add_i(V::round_i(V::mul(value(x, smooth, at), inv)), packed_shift);
      };
      for (; i + 4 * kW <= end; i += 4 * kW)
        V::store_packed(out + (i - begin), level(i), level(i + kW), level(i + 2 * kW), level(i + 3 * kW), flip);
    }
    const I shift = V::set_i(p.zero_point + offset);
    for (; i < end; i += kW) {
      const int n = static_cast<int>(end - i < kW ? end - i : kW);
      const F v = V::min(V::max(V::mul(value_part(x, smooth, i, n), inv), lo), hi);
      V::store_low8_part(out + (i - begin), V::add_i(V::round_i(v), shift), n);
    }
  }
};

// Every q of a granule that holds NaN or Inf.
inline void fill(uint8_t* out, int64_t n, int32_t value) {
  std::memset(out, static_cast<uint8_t>(value), static_cast<size_t>(n));
}

struct RowScale {
  float scale;
  int32_t zero_point;  // of the stored activations
};

// Quantizes one row of activations as stored = q + offset for a symmetric q in -127..127, and q - 128 + offset for an
// asymmetric one in 0..255: offset 0 stores int8, offset 128 uint8.
template <class V, DType D>
RowScale quantize_row_of(const ActivationArgs& act, const void* x, int64_t k, int32_t offset, uint8_t* out) {
  using G = Granule<V, D>;
  const bool is_static = act.scale != 0.0f;
  const Stats stats = act.symmetric || is_static ? G::template stats<false>(x, act.inv_smooth, 0, k)
                                                 : G::template stats<true>(x, act.inv_smooth, 0, k);
  const Params params = is_static       ? static_params(stats, act.scale, act.zero_point)
                        : act.symmetric ? symmetric_params(stats, 8)
                                        : asymmetric_params(stats, 8);
  const int32_t lo = act.symmetric ? -127 : 0, hi = act.symmetric ? 127 : 255;
  const int32_t shift = act.symmetric ? offset : offset - 128;
  if (stats.finite())
    G::quantize(x, act.inv_smooth, 0, k, params, lo, hi, shift, is_static, out);
  else
    fill(out, k, shift);
  return {params.scale, (stats.finite() ? params.zero_point : 0) + shift};
}

template <class V>
RowScale quantize_row(const ActivationArgs& act, int64_t row, int64_t k, int32_t offset, uint8_t* out) {
  const int64_t at = row * act.x_stride;
  switch (act.x_dtype) {
    case DType::kF32:
      return quantize_row_of<V, DType::kF32>(act, static_cast<const float*>(act.x) + at, k, offset, out);
    case DType::kBF16:
      return quantize_row_of<V, DType::kBF16>(act, static_cast<const uint16_t*>(act.x) + at, k, offset, out);
    default:
      return quantize_row_of<V, DType::kF16>(act, static_cast<const uint16_t*>(act.x) + at, k, offset, out);
  }
}

}  // namespace
}  // namespace qk
