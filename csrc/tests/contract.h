// The contract of W8A8, W4A8 and quantize, written down once more in the plainest C++: what smoke.cpp compares with.
// Independent of the kernels' own headers on purpose; slow on purpose.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace contract {

inline float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t bits_of_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float from_bf16(uint16_t half) { return float_of_bits(static_cast<uint32_t>(half) << 16); }

inline uint16_t to_bf16(float value) {
  if (std::isnan(value)) return 0x7FC0;
  const uint32_t bits = bits_of_float(value);
  return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

inline float from_f16(uint16_t half) {
  const int exponent = (half >> 10) & 31, mantissa = half & 1023;
  float value;
  if (exponent == 31)
    value = mantissa ? std::numeric_limits<float>::quiet_NaN() : std::numeric_limits<float>::infinity();
  else if (exponent == 0)
    value = std::ldexp(static_cast<float>(mantissa), -24);
  else
    value = std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25);
  return half & 0x8000 ? -value : value;
}

inline uint16_t to_f16(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  if (std::isnan(value)) return static_cast<uint16_t>(sign | 0x7E00);
  const double magnitude = std::fabs(static_cast<double>(value));
  if (magnitude == 0.0) return sign;
  if (magnitude >= 65520.0) return static_cast<uint16_t>(sign | 0x7C00);
  int exponent;
  std::frexp(magnitude, &exponent);                         // magnitude = f * 2^exponent, f in [0.5, 1)
  const int unit = exponent - 11 < -24 ? -24 : exponent - 11;  // exponent of the last bit
  const int64_t steps = std::llrint(std::ldexp(magnitude, -unit));  // exact, then half to even
  // A normal number has 1024..2048 steps; carrying into the next exponent falls out of the addition.
  return static_cast<uint16_t>(sign | (unit == -24 ? steps : ((unit + 24) << 10) + steps));
}

struct Row {
  float scale = 1.0f;
  int32_t zero_point = 0;
  std::vector<int32_t> q;
};

inline int32_t round_clamped(float value, int32_t zero_point, int32_t lo, int32_t hi) {
  const float rounded = std::nearbyint(value);
  // Beyond these the clamp decides, and the conversion to an integer would be undefined.
  const float bounded = rounded < -1e6f ? -1e6f : rounded > 1e6f ? 1e6f : rounded;
  const int32_t q = static_cast<int32_t>(bounded) + zero_point;
  return q < lo ? lo : q > hi ? hi : q;
}

// One granule of 8-bit values. `given_scale` 0 means dynamic.
inline Row quantize(const std::vector<float>& x, bool symmetric, float given_scale, int32_t given_zero_point) {
  Row row;
  row.q.assign(x.size(), 0);
  float absmax = 0.0f, lo = 0.0f, hi = 0.0f;
  bool finite = true;
  for (float value : x) {
    finite = finite && std::isfinite(value);
    absmax = std::fmax(absmax, std::fabs(value));
    lo = std::fmin(lo, value);
    hi = std::fmax(hi, value);
  }
  if (!finite) {
    row.scale = std::numeric_limits<float>::quiet_NaN();
    return row;
  }
  float inverse;
  if (given_scale != 0.0f) {
    row.scale = given_scale;
    row.zero_point = symmetric ? 0 : given_zero_point;
    inverse = 1.0f / given_scale;
  } else if (symmetric) {
    if (absmax < std::ldexp(1.0f, -100)) return row;
    row.scale = absmax / 127.0f;
    inverse = 127.0f / absmax;
  } else {
    const float scale = hi / 255.0f - lo / 255.0f;
    inverse = 1.0f / scale;
    if (hi == lo || !std::isfinite(inverse)) return row;
    row.scale = scale;
    row.zero_point = round_clamped(-lo * inverse, 0, 0, 255);
  }
  for (size_t i = 0; i < x.size(); ++i) {
    row.q[i] = round_clamped(x[i] * inverse, row.zero_point, symmetric ? -127 : 0, symmetric ? 127 : 255);
  }
  return row;
}

// One element of y: the int32 sum, then one rounding per step.
inline float linear(const Row& x, const int8_t* weight, float weight_scale, const float* bias) {
  int64_t sum = 0, column = 0;
  for (size_t i = 0; i < x.q.size(); ++i) {
    sum += static_cast<int64_t>(x.q[i]) * weight[i];
    column += weight[i];
  }
  volatile float y = static_cast<float>(static_cast<int32_t>(sum - x.zero_point * column));
  y = y * x.scale;
  y = y * weight_scale;
  if (bias != nullptr) y = y + *bias;
  return y;
}

// One output channel's groups of `size` codes: w = scale * (q - zero_point), or scale * q + minimum.
struct Groups {
  int64_t size;
  bool has_minimum;
  std::vector<float> scale, minimum;
  std::vector<int32_t> zero_point;
};

// One element of y over int4 codes: the groups in order, multiply and add apart.
inline float linear(const Row& x, const uint8_t* codes, const Groups& groups, const float* bias) {
  volatile float total = 0.0f;
  for (size_t g = 0; g < groups.scale.size(); ++g) {
    int64_t sum = 0, activations = 0;
    const size_t begin = g * static_cast<size_t>(groups.size);
    for (size_t i = begin; i < begin + static_cast<size_t>(groups.size) && i < x.q.size(); ++i) {
      const int64_t a = x.q[i] - x.zero_point;
      sum += a * codes[i];
      activations += a;
    }
    volatile float term = static_cast<float>(static_cast<int32_t>(sum - groups.zero_point[g] * activations));
    term = term * groups.scale[g];
    total = total + term;
    if (groups.has_minimum) {
      term = static_cast<float>(static_cast<int32_t>(activations));
      term = groups.minimum[g] * term;
      total = total + term;
    }
  }
  total = total * x.scale;
  if (bias != nullptr) total = total + *bias;
  return total;
}

}  // namespace contract
