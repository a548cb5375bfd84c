// From int32 sums to the output, each step rounded once:
//
//   y[m, n] = round(((float(acc - (zero[m] - 128) * colsum[n]) * scale_x[m]) * scale_w[n]) + bias[n])
//
// The two orientations of a fragment (rows are channels, or rows are tokens) share the arithmetic below; g = lane / 4
// and t = lane % 4 throughout.
#pragma once

#include "numeric.cuh"
#include "ptx.cuh"
#include "w8a8.h"

namespace qk::cuda {

// The part of GemmW8A8Args the epilogue needs, with what the host worked out about alignment.
struct Epilogue {
  const float* x_scale;
  const int32_t* x_zero_point;  // nullptr: symmetric
  const float* weight_scale;
  const float* bias;  // nullptr: -0 is added, which changes nothing (+0 would lose the sign of -0)
  const int32_t* colsum;
  void* y;
  int64_t y_stride;
  int32_t m, n;
  DType y_dtype;
  bool pairs;  // two neighbouring outputs may be stored at once
  bool quads;  // four of 16 bits may
  bool vectors;  // 16 aligned bytes of outputs may be stored at once
};

inline Epilogue make_epilogue(const GemmW8A8Args& a) {
  const int64_t size = a.y_dtype == DType::kF32 ? 4 : 2;
  const auto aligned = [&](int64_t bytes) {
    return reinterpret_cast<uintptr_t>(a.y) % bytes == 0 && a.y_stride * size % bytes == 0;
  };
  return Epilogue{a.x_scale, a.x_zero_point, a.weight_scale,    a.bias,     a.colsum,   a.y, a.y_stride, a.m,
                  a.n,       a.y_dtype,      aligned(2 * size), aligned(8), aligned(16)};
}

struct ChannelTerms {
  float scale, bias;
  int32_t colsum;
};
struct TokenTerms {
  float scale;
  int32_t zero;  // of the stored signed byte
};

__device__ __forceinline__ ChannelTerms load_channel(const Epilogue& e, int n) {
  ChannelTerms c = {0.0f, -0.0f, 0};
  if (n < e.n) {
    c.scale = __ldg(e.weight_scale + n);
    if (e.bias) c.bias = __ldg(e.bias + n);
    if (e.x_zero_point) c.colsum = __ldg(e.colsum + n);
  }
  return c;
}

// Plain loads: the kernel before this one may have written them, so they must stay behind grid_dependency_wait.
__device__ __forceinline__ TokenTerms load_token(const Epilogue& e, int m) {
  TokenTerms t = {0.0f, 0};
  if (m < e.m) {
    t.scale = *(e.x_scale + m);
    if (e.x_zero_point) t.zero = *(e.x_zero_point + m) - kZeroShift;
  }
  return t;
}

// Without kZero the caller vouches that there are no zero points.
template <bool kZero = true>
__device__ __forceinline__ float finish(int32_t acc, const TokenTerms& t, const ChannelTerms& c) {
  if (kZero) acc -= t.zero * c.colsum;
  return __fadd_rn(__fmul_rn(__fmul_rn(__int2float_rn(acc), t.scale), c.scale), c.bias);
}

// One 16-bit output of a packed pair, as its bits.
__device__ __forceinline__ void store_u16(const Epilogue& e, int64_t at, uint32_t bits) {
  static_cast<uint16_t*>(e.y)[at] = static_cast<uint16_t>(bits);
}

// Two neighbouring 16-bit outputs y[m, n], y[m, n + 1].
__device__ __forceinline__ void store_pair(const Epilogue& e, int m, int n, uint32_t pair) {
  if (m >= e.m) return;
  const int64_t at = int64_t(m) * e.y_stride + n;
  if (e.pairs && n + 1 < e.n) {
    *reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(e.y) + at) = pair;
  } else {
    if (n < e.n) store_u16(e, at, pair);
    if (n + 1 < e.n) store_u16(e, at + 1, pair >> 16);
  }
}

__device__ __forceinline__ void store_f32(const Epilogue& e, int m, int n, float v) {
  if (m < e.m && n < e.n) static_cast<float*>(e.y)[int64_t(m) * e.y_stride + n] = v;
}

// A warp's fragment of 16 channels x 8 tokens, rows are channels: d[0], d[1] are channel n0 + g at tokens m0 + 2t and
// m0 + 2t + 1, d[2], d[3] channel n0 + g + 8. `low`, `high` are the terms of these two channels, `even`, `odd` of the
// two tokens. 16-bit outputs are transposed in registers (lane: token g, channels 2t, 2t + 1 and 8 + 2t, 8 + 2t + 1),
// then neighbouring lanes swap halves so that each has four channels in a row: one store covers whole 32-byte sectors.
__device__ __forceinline__ void store_channels_by_tokens(const Epilogue& e, const int32_t (&d)[4], int n0, int m0,
                                                         const ChannelTerms& low, const ChannelTerms& high,
                                                         const TokenTerms& even, const TokenTerms& odd, int lane) {
  const int g = lane >> 2, t = lane & 3;
  const float v0 = finish(d[0], even, low), v1 = finish(d[1], odd, low);
  const float v2 = finish(d[2], even, high), v3 = finish(d[3], odd, high);
  if (e.y_dtype == DType::kF32) {
    store_f32(e, m0 + 2 * t, n0 + g, v0);
    store_f32(e, m0 + 2 * t + 1, n0 + g, v1);
    store_f32(e, m0 + 2 * t, n0 + g + 8, v2);
    store_f32(e, m0 + 2 * t + 1, n0 + g + 8, v3);
    return;
  }
  const uint32_t first = ptx::transpose_8x8_b16(pack_pair(e.y_dtype, v0, v1));
  const uint32_t second = ptx::transpose_8x8_b16(pack_pair(e.y_dtype, v2, v3));
  if (e.quads && n0 + 16 <= e.n) {
    const bool upper = t & 1;  // takes the second eight channels
    const uint32_t got = __shfl_xor_sync(0xffffffffu, upper ? first : second, 1);
    const uint2 four = upper ? make_uint2(got, second) : make_uint2(first, got);
    const int m = m0 + g, n = n0 + (upper ? 8 + 2 * (t - 1) : 2 * t);
    if (m < e.m) *reinterpret_cast<uint2*>(static_cast<uint16_t*>(e.y) + int64_t(m) * e.y_stride + n) = four;
  } else {
    store_pair(e, m0 + g, n0 + 2 * t, first);
    store_pair(e, m0 + g, n0 + 8 + 2 * t, second);
  }
}

}  // namespace qk::cuda
