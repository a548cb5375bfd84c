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
#include <type_traits>

#include "../args.h"
#include "../layout.h"
#include "verbs_scalar.h"

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

// Range of q, and what is added to store it (8 for symmetric int4).
struct Levels {
  int32_t lo, hi, offset;
};

inline float float_from_bits(int32_t bits) {
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}

inline int32_t bits_of(float v) {
  int32_t bits;
  std::memcpy(&bits, &v, 4);
  return bits;
}

constexpr int32_t kNanBits = 0x7FC00000;

// The parameters of one granule a lane, in registers of the tier or, with ScalarVerbs, of one granule. bits: 8 or 4.
template <class V>
struct LaneParams {
  using F = typename V::F;
  F scale, inv;
  typename V::I zero_point;

  // int4's inverse is 1 / scale (its scale may be rounded to a storage dtype first), int8's levels / absmax.
  static LaneParams symmetric(F absmax, int bits) {
    const F one = V::set(1.0f), levels = V::set(bits == 8 ? 127.0f : 7.0f), tiny = V::set(kTinyAbsmax);
    const F scale = V::div(absmax, levels), inv = bits == 8 ? V::div(levels, absmax) : V::div(one, scale);
    return {finite(absmax, V::select_less(absmax, tiny, one, scale), kNanBits),
            finite(absmax, V::select_less(absmax, tiny, V::set(0.0f), inv), 0), V::set_i(0)};
  }

  // lo <= 0 <= hi, of which absmax is the larger magnitude unless there is NaN.
  static LaneParams asymmetric(F absmax, F lo, F hi, int bits) {
    const F zero = V::set(0.0f), one = V::set(1.0f), levels = V::set(bits == 8 ? 255.0f : 15.0f);
    const F scale = bits == 8 ? V::sub(V::div(hi, levels), V::div(lo, levels)) : V::div(V::sub(hi, lo), levels);
    const F inv = V::div(one, scale), infinity = V::set(float_from_bits(kInfBits));
    const F usual = V::select_less(inv, infinity, scale, one);  // the inverse overflows where hi = lo, and near there
    const F usual_inv = finite(absmax, V::select_less(inv, infinity, inv, zero), 0);
    const F zero_point = V::mul(V::sub(zero, finite(absmax, lo, 0)), usual_inv);
    return {finite(absmax, usual, kNanBits), usual_inv,
            V::round_i(V::select_less(zero_point, levels, zero_point, levels))};
  }

  static F finite(F absmax, F yes, int32_t no_bits) {
    return V::select_less(absmax, V::set(float_from_bits(kInfBits)), yes, V::set(float_from_bits(no_bits)));
  }
};

inline Params symmetric_params(const Stats& stats, int bits) {
  const auto p = LaneParams<ScalarVerbs>::symmetric(float_from_bits(stats.abs_bits), bits);
  return {p.scale, p.inv, p.zero_point};
}

inline Params asymmetric_params(const Stats& stats, int bits) {
  const auto p = LaneParams<ScalarVerbs>::asymmetric(float_from_bits(stats.abs_bits), stats.lo, stats.hi, bits);
  return {p.scale, p.inv, p.zero_point};
}

// A given scale (and zero point); granules with NaN or Inf are marked all the same.
inline Params static_params(const Stats& stats, float scale, int32_t zero_point) {
  if (!stats.finite()) return {float_from_bits(kNanBits), 0.0f, 0};
  return {scale, 1.0f / scale, zero_point};
}

// bytes[2 i] and bytes[2 i + 1] become one byte, the first in the low nibble; an odd end leaves the high nibble zero.
inline void pack_nibbles(const uint8_t* bytes, int64_t n, uint8_t* out) {
  const int64_t pairs = n / 2;
  for (int64_t i = 0; i < pairs; ++i) out[i] = static_cast<uint8_t>(bytes[2 * i] | bytes[2 * i + 1] << 4);
  if (n % 2) out[pairs] = bytes[n - 1];
}

template <class V, DType D>
struct Granule {
  using F = typename V::F;
  using I = typename V::I;
  static constexpr int kBytes = D == DType::kF32 ? 4 : 2;

  static F value(const void* x, const float* smooth, int64_t i) {
    const F v = V::template load<D>(x, i);
    return smooth ? V::mul(v, V::load_f(smooth + i)) : v;
  }
  static F value_part(const void* x, const float* smooth, int64_t i, int n) {
    const F v = V::template load_part<D>(x, i, n);
    return smooth ? V::mul(v, V::load_f_part(smooth + i, n)) : v;
  }

  // Takes a register of elements into two of maxima, by their bits, without widening: of magnitudes, or with a range of
  // what lies above zero and of what lies below. Zero is the least of all; elements may be seen twice. See verbs_ymm.h.
  template <bool kRange>
  QK_INLINE static void see(const char* at, I& most, I& least) {
    const I v = V::template load_raw<D>(at);
    if constexpr (kRange) {
      most = V::template max_signed<D>(most, v);
      least = V::template max_unsigned<D>(least, v);
    } else {
      most = V::template max_signed<D>(most, V::template magnitudes<D>(v));
    }
  }

  // The same of kSize elements, whole registers of them, into maxima of their own.
  template <bool kRange, int kSize>
  QK_INLINE static void see_all(const char* x, I& most, I& least) {
    constexpr int kRegister = V::template kRawBytes<D>;
    static_assert(kSize * kBytes % kRegister == 0, "see_all: a part of a register");
    most = least = V::set_i(0);
    for (int i = 0; i < kSize * kBytes; i += kRegister) see<kRange>(x + i, most, least);
  }

  // Statistics of x[begin, end). The range is left at zero unless asked for.
  template <bool kRange>
  static Stats stats(const void* x, const float* smooth, int64_t begin, int64_t end) {
    if constexpr (V::kLanes > 1) {
      if (!smooth) return stats_of_bits<kRange>(static_cast<const char*>(x) + begin * kBytes, end - begin);
    }
    return stats_of_values<kRange>(x, smooth, begin, end);
  }

  // How four vectors of levels are stored: as nibbles, or as int8 whose top bit is flipped where levels go beyond it.
  // What is added to them is their zero point, their offset and `shift`.
  template <bool kNibbles>
  struct Store {
    explicit Store(const Levels& levels)
        : shift(!kNibbles && levels.hi + levels.offset > 127 ? -128 : 0), flip_(V::set_bytes(shift)) {}
    template <DType kOrder>
    QK_INLINE void put(uint8_t* out, I a, I b, I c, I d, I words) const {
      if constexpr (kNibbles)
        V::template store_nibbles<kOrder>(out, a, b, c, d, words);
      else
        V::template store_packed<kOrder>(out, a, b, c, d, words, flip_);
    }
    const int32_t shift;

   private:
    const I flip_;
  };

  // out[i] = low byte of clamp(rne(x[i] * inv), q_lo - zp, q_hi - zp) + zp + offset, for i in [begin, end); with
  // kNibbles two of them a byte. The bounds are integers, so clamping before the rounding is the same as after it, and
  // never overflows the cast.
  //
  // Four vectors at a time are narrowed with saturation to int8 (and flipped to unsigned where need be), or to 0..15.
  // Dynamic scales need no other clamp there: |x| <= absmax keeps a symmetric q within its levels, and int8 or 0..15 is
  // the range of an asymmetric one. What lies `ahead` elements behind x is asked for in advance.
  template <bool kNibbles, bool kClamps>
  QK_INLINE static void quantize(const void* x, const float* smooth, int64_t begin, int64_t end, const Params& p,
                                 const Levels& levels, int64_t ahead, uint8_t* out) {
    constexpr int kW = V::kLanes, kStep = 4 * kW;
    const F inv = V::set(p.inv);
    const int32_t shift = p.zero_point + levels.offset;
    const Store<kNibbles> store(levels);
    const I packed_shift = V::set_words(shift + store.shift);
    const auto clamp = [&](F v) {
      const F lo = V::set(static_cast<float>(levels.lo - p.zero_point)),
              hi = V::set(static_cast<float>(levels.hi - p.zero_point));
      return V::min(V::max(v, lo), hi);
    };
    int64_t i = begin;
    const auto steps = [&](auto is_smooth) QK_INLINE {
      constexpr bool kSmooth = decltype(is_smooth)::value;
      constexpr DType kOrder = kSmooth ? DType::kF32 : D;
      for (; i + kStep <= end; i += kStep) {
        if (ahead) {
          const char* next = static_cast<const char*>(x) + (i + ahead) * kBytes;
          for (int line = 0; line < kStep * kBytes; line += kAlign) __builtin_prefetch(next + line, 0, 2);
        }
        F v[4];
        if constexpr (kSmooth)
          for (int j = 0; j < 4; ++j) v[j] = value(x, smooth, i + j * kW);
        else
          V::template load4<D>(x, i, v);
        const auto level = [&](int j) QK_INLINE {
          const F scaled = V::mul(v[j], inv);
          return V::round_i(kClamps ? clamp(scaled) : scaled);
        };
        store.template put<kOrder>(out + (i - begin) / (kNibbles ? 2 : 1), level(0), level(1), level(2), level(3),
                                   packed_shift);
      }
    };
    if (smooth)
      steps(std::true_type());
    else
      steps(std::false_type());
    if (i == end) return;
    uint8_t stage[kStep];
    const int64_t done = i, rest = end - i;
    uint8_t* to = kNibbles ? stage : out + (done - begin);
    const auto stored = [&](F v) { return V::add_i(V::round_i(clamp(V::mul(v, inv))), V::set_i(shift)); };
    for (int vectors = 0; vectors < 3 && i + kW <= end; ++vectors, i += kW)
      V::store_low8(to + (i - done), stored(value(x, smooth, i)));
    if (i < end) {
      const int n = static_cast<int>(end - i);
      V::store_low8_part(to + (i - done), stored(value_part(x, smooth, i, n)), n);
    }
    if constexpr (kNibbles) pack_nibbles(stage, rest, out + (done - begin) / 2);
  }

 private:
  template <bool kRange>
  QK_INLINE static Stats stats_of_bits(const char* x, int64_t n) {
    constexpr int kRegister = V::template kRawBytes<D>;
    const int64_t bytes = n * kBytes;
    I most0 = V::set_i(0), most1 = V::set_i(0), least0 = V::set_i(0), least1 = V::set_i(0);
    int64_t i = 0;
    for (; i + 2 * kRegister <= bytes; i += 2 * kRegister) {
      see<kRange>(x + i, most0, least0);
      see<kRange>(x + i + kRegister, most1, least1);
    }
    if (i + kRegister <= bytes) {
      see<kRange>(x + i, most0, least0);
      i += kRegister;
    }
    if (i < bytes && bytes >= kRegister) {
      see<kRange>(x + bytes - kRegister, most1, least1);
    } else if (i < bytes) {
      alignas(kAlign) char part[kRegister] = {};
      std::memcpy(part, x, static_cast<size_t>(bytes) % kRegister);
      see<kRange>(part, most1, least1);
    }
    Stats result;
    const float most = V::template reduce_unsigned<D>(V::template max_signed<D>(most0, most1));
    result.abs_bits = bits_of(most);
    if constexpr (kRange) {
      result.hi = most;
      const float least = V::template reduce_unsigned<D>(V::template max_unsigned<D>(least0, least1));
      const int32_t magnitude = bits_of(least) & 0x7FFFFFFF;
      result.abs_bits = result.abs_bits > magnitude ? result.abs_bits : magnitude;
      result.lo = least < 0.0f ? least : 0.0f;
    }
    return result;
  }

  template <bool kRange>
  static Stats stats_of_values(const void* x, const float* smooth, int64_t begin, int64_t end) {
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
// asymmetric one in 0..255: offset 0 stores int8, offset 128 uint8. ahead: elements from x to what is asked for, or 0.
template <class V, DType D>
RowScale quantize_row_of(const ActivationArgs& act, const void* x, int64_t k, int32_t offset, int64_t ahead,
                         uint8_t* out) {
  using G = Granule<V, D>;
  const bool is_static = act.scale != 0.0f;
  const Stats stats = act.symmetric || is_static ? G::template stats<false>(x, act.inv_smooth, 0, k)
                                                 : G::template stats<true>(x, act.inv_smooth, 0, k);
  const Params params = is_static       ? static_params(stats, act.scale, act.zero_point)
                        : act.symmetric ? symmetric_params(stats, 8)
                                        : asymmetric_params(stats, 8);
  const int32_t shift = act.symmetric ? offset : offset - 128;
  const Levels levels = act.symmetric ? Levels{-127, 127, shift} : Levels{0, 255, shift};
  if (stats.finite() && is_static)
    G::template quantize<false, true>(x, act.inv_smooth, 0, k, params, levels, ahead, out);
  else if (stats.finite())
    G::template quantize<false, false>(x, act.inv_smooth, 0, k, params, levels, ahead, out);
  else
    fill(out, k, shift);
  return {params.scale, (stats.finite() ? params.zero_point : 0) + shift};
}

// Row `row` of `rows`; the next one is asked for meanwhile.
template <class V>
RowScale quantize_row(const ActivationArgs& act, int64_t row, int64_t rows, int64_t k, int32_t offset, uint8_t* out) {
  const int64_t at = row * act.x_stride, ahead = row + 1 < rows ? act.x_stride : 0;
  switch (act.x_dtype) {
    case DType::kF32:
      return quantize_row_of<V, DType::kF32>(act, static_cast<const float*>(act.x) + at, k, offset, ahead, out);
    case DType::kBF16:
      return quantize_row_of<V, DType::kBF16>(act, static_cast<const uint16_t*>(act.x) + at, k, offset, ahead, out);
    default:
      return quantize_row_of<V, DType::kF16>(act, static_cast<const uint16_t*>(act.x) + at, k, offset, ahead, out);
  }
}

}  // namespace
}  // namespace qk
