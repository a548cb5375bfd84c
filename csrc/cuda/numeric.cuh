// The contract's scalar arithmetic on the device. Every step is an intrinsic that rounds once and is never fused.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "args.h"

namespace qk::cuda {

constexpr float kTiny = 0x1p-100f;  // an absmax below this counts as zero
constexpr uint32_t kInfBits = 0x7f800000u;

__device__ __forceinline__ float nan_value() { return __uint_as_float(0x7fc00000u); }
__device__ __forceinline__ uint32_t abs_bits(float v) { return __float_as_uint(v) & 0x7fffffffu; }

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float widen(__half v) { return __half2float(v); }

template <typename T>
__device__ __forceinline__ T narrow(float v);
template <>
__device__ __forceinline__ float narrow<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}
template <>
__device__ __forceinline__ __half narrow<__half>(float v) {
  return __float2half_rn(v);
}

// What is left of `v` in the type T.
template <typename T>
__device__ __forceinline__ float rounded(float v) {
  return widen(narrow<T>(v));
}

// Two values as 16-bit floats, `lo` in the low half.
__device__ __forceinline__ uint32_t pack_pair(DType dtype, float lo, float hi) {
  if (dtype == DType::kBF16) {
    const __nv_bfloat162 v = __floats2bfloat162_rn(lo, hi);
    return *reinterpret_cast<const uint32_t*>(&v);
  }
  const __half2 v = __floats2half2_rn(lo, hi);
  return *reinterpret_cast<const uint32_t*>(&v);
}
template <typename T>
__device__ __forceinline__ uint32_t pack_pair(float lo, float hi) {
  return pack_pair(std::is_same_v<T, __half> ? DType::kF16 : DType::kBF16, lo, hi);
}

// a / b of finite fp32 values, b != 0, rounded to nearest even like __fdiv_rn, without its out-of-line path for extreme
// operands: that call costs the registers of everything that lives across it.
//
// In fp64 the approximate reciprocal (2^-20) takes two Newton steps to within 2^-52 and the quotient one to within
// 2^-52 of the true one. A quotient of two 24-bit significands keeps 2^-49 (relative) away from every midpoint of two
// fp32 values, denormal ones included, so rounding the fp64 value to fp32 rounds the true one.
__device__ __forceinline__ float divide(float a, float b) {
  const double n = a, d = b;
  double r;
  asm("rcp.approx.ftz.f64 %0, %1;" : "=d"(r) : "d"(d));
  r = __fma_rn(r, __fma_rn(-d, r, 1.0), r);
  r = __fma_rn(r, __fma_rn(-d, r, 1.0), r);
  const double q = __dmul_rn(n, r);
  return __double2float_rn(__fma_rn(r, __fma_rn(-d, q, n), q));
}

// What maps the values of one granule to integers: q = clamp(rne(x * inv), low, high) + zero.
struct Grid {
  float scale, inv;
  float low, high;  // of the integer before the zero point is added
  int32_t zero;
};

// A granule that counts as zero (scale 1) or holds NaN or Inf (scale NaN): the multiplication is skipped by low = high.
__device__ __forceinline__ Grid dead_grid(bool finite, int32_t zero) {
  return Grid{finite ? 1.0f : nan_value(), 0.0f, 0.0f, 0.0f, zero};
}

// levels: 127 for 8 bits, 7 for 4 bits (whose codes are offset by 8 and reach down to -8).
__device__ __forceinline__ Grid symmetric_grid(uint32_t absmax_bits, bool four_bits) {
  const int32_t zero = four_bits ? 8 : 0;
  const float absmax = __uint_as_float(absmax_bits);
  if (absmax_bits >= kInfBits || absmax < kTiny) return dead_grid(absmax_bits < kInfBits, zero);
  if (!four_bits) return Grid{divide(absmax, 127.0f), divide(127.0f, absmax), -127.0f, 127.0f, 0};
  const float scale = divide(absmax, 7.0f);
  return Grid{scale, divide(1.0f, scale), -8.0f, 7.0f, zero};
}

// hi >= 0 and lo <= 0 of the granule; absmax_bits tells NaN and Inf.
__device__ __forceinline__ Grid asymmetric_grid(float hi, float lo, uint32_t absmax_bits, bool four_bits) {
  if (absmax_bits >= kInfBits) return dead_grid(false, 0);
  const float levels = four_bits ? 15.0f : 255.0f;
  const float range = four_bits ? __fsub_rn(hi, lo) : 0.0f;
  // hi - lo of 4-bit codes may overflow to infinity: scale infinite, inv 0.
  const float scale = !four_bits                   ? __fsub_rn(divide(hi, 255.0f), divide(lo, 255.0f))
                      : abs_bits(range) < kInfBits ? divide(range, 15.0f)
                                                   : range;
  const float inv = scale == 0.0f ? __uint_as_float(kInfBits) : abs_bits(scale) < kInfBits ? divide(1.0f, scale) : 0.0f;
  if (abs_bits(inv) >= kInfBits) return dead_grid(true, 0);
  const float zero = fminf(fmaxf(rintf(__fmul_rn(-lo, inv)), 0.0f), levels);
  return Grid{scale, inv, -zero, levels - zero, static_cast<int32_t>(zero)};
}

// A grid from a given scale. `zero_point` counts for asymmetric codes only.
__device__ __forceinline__ Grid static_grid(float scale, int32_t zero_point, bool symmetric, uint32_t absmax_bits,
                                            bool four_bits) {
  const int32_t offset = symmetric && four_bits ? 8 : 0;
  if (absmax_bits >= kInfBits) return dead_grid(false, offset);
  const float inv = divide(1.0f, scale);
  if (symmetric) {
    return Grid{scale, inv, four_bits ? -8.0f : -127.0f, four_bits ? 7.0f : 127.0f, offset};
  }
  const float zero = static_cast<float>(zero_point);
  return Grid{scale, inv, -zero, (four_bits ? 15.0f : 255.0f) - zero, zero_point};
}

// The code of x before the zero point is added, in the lower 22 bits, whose lowest byte is that of the code.
//
// clamp and rounding commute since the bounds are integers. NaN cannot occur in a live granule with a finite inv.
// Adding 1.5 * 2^23 rounds to an integer, ties to even, and leaves it in the low bits: conversions to int run at a
// quarter of the rate of additions.
constexpr float kRound = 12582912.0f;
template <bool kClamp = true>
__device__ __forceinline__ uint32_t code_bits(float x, const Grid& grid) {
  const float v = __fmul_rn(x, grid.inv);
  return __float_as_uint(__fadd_rn(kClamp ? fminf(fmaxf(v, grid.low), grid.high) : v, kRound));
}

__device__ __forceinline__ int32_t to_code(float x, const Grid& grid) {
  return static_cast<int32_t>(code_bits(x, grid) - __float_as_uint(kRound)) + grid.zero;
}

}  // namespace qk::cuda
