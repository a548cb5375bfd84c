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

// Where outputs go; the caller fills in what they are made of.
inline Epilogue make_store(void* y, DType y_dtype, int64_t y_stride, int32_t m, int32_t n) {
  const int64_t size = y_dtype == DType::kF32 ? 4 : 2;
  const auto aligned = [&](int64_t bytes) {
    return reinterpret_cast<uintptr_t>(y) % bytes == 0 && y_stride * size % bytes == 0;
  };
  Epilogue e = {};
  e.y = y, e.y_stride = y_stride, e.m = m, e.n = n, e.y_dtype = y_dtype;
  e.pairs = aligned(2 * size), e.quads = aligned(8), e.vectors = aligned(16);
  return e;
}

inline Epilogue make_epilogue(const GemmW8A8Args& a) {
  Epilogue e = make_store(a.y, a.y_dtype, a.y_stride, a.m, a.n);
  e.x_scale = a.x_scale, e.x_zero_point = a.x_zero_point, e.weight_scale = a.weight_scale;
  e.bias = a.bias, e.colsum = a.colsum;
  return e;
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

// A warp's finished fragment of 16 channels x 8 tokens, rows are channels: v[0], v[1] are channel n0 + g at tokens
// m0 + 2t and m0 + 2t + 1, v[2], v[3] channel n0 + g + 8. 16-bit outputs are transposed in registers (lane: token g,
// channels 2t, 2t + 1 and 8 + 2t, 8 + 2t + 1), then neighbouring lanes swap halves so that each has four channels in a
// row: one store covers whole 32-byte sectors.
__device__ __forceinline__ void store_values(const Epilogue& e, const float (&v)[4], int n0, int m0, int lane) {
  const int g = lane >> 2, t = lane & 3;
  if (e.y_dtype == DType::kF32) {
    store_f32(e, m0 + 2 * t, n0 + g, v[0]);
    store_f32(e, m0 + 2 * t + 1, n0 + g, v[1]);
    store_f32(e, m0 + 2 * t, n0 + g + 8, v[2]);
    store_f32(e, m0 + 2 * t + 1, n0 + g + 8, v[3]);
    return;
  }
  const uint32_t first = ptx::transpose_8x8_b16(pack_pair(e.y_dtype, v[0], v[1]));
  const uint32_t second = ptx::transpose_8x8_b16(pack_pair(e.y_dtype, v[2], v[3]));
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

// The same from int32 sums. `low`, `high` are the terms of the two channels, `even`, `odd` of the two tokens.
__device__ __forceinline__ void store_channels_by_tokens(const Epilogue& e, const int32_t (&d)[4], int n0, int m0,
                                                         const ChannelTerms& low, const ChannelTerms& high,
                                                         const TokenTerms& even, const TokenTerms& odd, int lane) {
  const float v[4] = {finish(d[0], even, low), finish(d[1], odd, low), finish(d[2], even, high),
                      finish(d[3], odd, high)};
  store_values(e, v, n0, m0, lane);
}

}  // namespace qk::cuda
