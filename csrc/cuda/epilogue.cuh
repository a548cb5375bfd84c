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
  int32_t zero;  // 0..255
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

// Plain loads: the kernel before this one may have written them, so they must stay behind grid_dependency_wait. Nothing
// is computed from them here, where it would wait for them.
__device__ __forceinline__ TokenTerms load_token(const Epilogue& e, int m) {
  TokenTerms t = {0.0f, 0};
  if (m < e.m) {
    t.scale = *(e.x_scale + m);
    if (e.x_zero_point) t.zero = *(e.x_zero_point + m);
  }
  return t;
}

__device__ __forceinline__ float scaled(int32_t acc, float of_token, float of_channel) {
  return __fmul_rn(__fmul_rn(__int2float_rn(acc), of_token), of_channel);
}

// Without kZero the caller vouches that there are no zero points, without kBias that there is no bias; with them and
// without those, `colsum` is zero and `bias` -0.
template <bool kZero = true, bool kBias = true>
__device__ __forceinline__ float finish(int32_t acc, const TokenTerms& t, const ChannelTerms& c) {
  if (kZero) acc -= (t.zero - kZeroShift) * c.colsum;
  const float v = scaled(acc, t.scale, c.scale);
  return kBias ? __fadd_rn(v, c.bias) : v;
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
// channels 2t, 2t + 1 and 8 + 2t, 8 + 2t + 1).
struct PairsOfToken {
  uint32_t first, second;
};
__device__ __forceinline__ PairsOfToken transpose_values(DType out, const float (&v)[4]) {
  return {ptx::transpose_8x8_b16(pack_pair(out, v[0], v[1])), ptx::transpose_8x8_b16(pack_pair(out, v[2], v[3]))};
}

__device__ __forceinline__ void store_values(const Epilogue& e, const float (&v)[4], int n0, int m0, int lane) {
  const int g = lane >> 2, t = lane & 3;
  if (e.y_dtype == DType::kF32) {
    store_f32(e, m0 + 2 * t, n0 + g, v[0]);
    store_f32(e, m0 + 2 * t + 1, n0 + g, v[1]);
    store_f32(e, m0 + 2 * t, n0 + g + 8, v[2]);
    store_f32(e, m0 + 2 * t + 1, n0 + g + 8, v[3]);
    return;
  }
  const PairsOfToken p = transpose_values(e.y_dtype, v);
  store_pair(e, m0 + g, n0 + 2 * t, p.first);
  store_pair(e, m0 + g, n0 + 8 + 2 * t, p.second);
}

// kBlocks such fragments of 16-bit outputs, one below the other, of channels that all exist where quads may be stored:
// neighbouring lanes swap halves, so that each has four channels in a row and one store covers whole 32-byte sectors.
// No decision is left inside and one address walks down, since a tile's end is limited by fetching its instructions.
template <int kBlocks, DType kOut, typename Values>
__device__ __forceinline__ void store_quads(const Epilogue& e, int n0, int m0, int lane, const Values& values) {
  const int g = lane >> 2, t = lane & 3;
  const bool upper = t & 1;  // takes the second eight channels
  uint16_t* to = static_cast<uint16_t*>(e.y) + int64_t(m0 + g) * e.y_stride + n0 + (upper ? 8 + 2 * (t - 1) : 2 * t);
  const int left = e.m - m0 - g;
#pragma unroll
  for (int j = 0; j < kBlocks; ++j, to += 8 * e.y_stride) {
    float v[4];
    values(j, v);
    const PairsOfToken p = transpose_values(kOut, v);
    const uint32_t got = __shfl_xor_sync(0xffffffffu, upper ? p.first : p.second, 1);
    const uint2 four = upper ? make_uint2(got, p.second) : make_uint2(p.first, got);
    if (8 * j < left) *reinterpret_cast<uint2*>(to) = four;
  }
}

// kBlocks fragments, one below the other: values(j, v) makes the j-th, tokens m0 + 8j and on.
template <int kBlocks, typename Values>
__device__ __forceinline__ void store_blocks(const Epilogue& e, int n0, int m0, int lane, const Values& values) {
  if (e.quads && n0 + 16 <= e.n && e.y_dtype == DType::kBF16) {
    store_quads<kBlocks, DType::kBF16>(e, n0, m0, lane, values);
  } else if (e.quads && n0 + 16 <= e.n && e.y_dtype == DType::kF16) {
    store_quads<kBlocks, DType::kF16>(e, n0, m0, lane, values);
  } else {
#pragma unroll
    for (int j = 0; j < kBlocks; ++j) {
      float v[4];
      values(j, v);
      store_values(e, v, n0, m0 + 8 * j, lane);
    }
  }
}

// From int32 sums. `low`, `high` are the terms of the two channels, `even`, `odd` of the two tokens.
template <bool kZero = true>
__device__ __forceinline__ void finish_channels_by_tokens(const int32_t (&d)[4], const ChannelTerms& low,
                                                          const ChannelTerms& high, const TokenTerms& even,
                                                          const TokenTerms& odd, float (&v)[4]) {
  v[0] = finish<kZero>(d[0], even, low), v[1] = finish<kZero>(d[1], odd, low);
  v[2] = finish<kZero>(d[2], even, high), v[3] = finish<kZero>(d[3], odd, high);
}

// The terms of a tile's channels, by kind: those of neighbours are read at once.
template <int kChannels>
struct TileTerms {
  alignas(16) float scale[kChannels];
  float bias[kChannels];
  int32_t colsum[kChannels];

  __device__ __forceinline__ void put(int n, const ChannelTerms& c) {
    scale[n] = c.scale, bias[n] = c.bias, colsum[n] = c.colsum;
  }
  // Channels n and n + 1, n even.
  template <bool kZero, bool kBias = true>
  __device__ __forceinline__ void get(int n, ChannelTerms& even, ChannelTerms& odd) const {
    const float2 s = *reinterpret_cast<const float2*>(scale + n);
    even.scale = s.x, odd.scale = s.y;
    if (kBias) {
      const float2 b = *reinterpret_cast<const float2*>(bias + n);
      even.bias = b.x, odd.bias = b.y;
    }
    if (kZero) {
      const int2 c = *reinterpret_cast<const int2*>(colsum + n);
      even.colsum = c.x, odd.colsum = c.y;
    }
  }
};

// ---- A tile through shared memory -----------------------------------------------------------------------------------
//
// What runs once for a tile is short of instructions, not of arithmetic: fetching unrolled code that nobody has run yet
// takes some 500 cycles for a block of 8 tokens. So sums go to shared memory as [token][channel] words, and all threads
// walk over runs of eight channels in one small loop.

// Words from a token to the next: the four tokens of a lane's quad fall on different banks.
template <int kChannels>
constexpr int kTilePitch = kChannels + 4;

// A warp's fragment of 16 channels (from `row`) x 8 tokens (from `token`), rows are channels, to the tile at `tile`.
template <int kChannels>
__device__ __forceinline__ void put_fragment(uint32_t tile, int row, int token, int lane, const int32_t (&d)[4]) {
  constexpr int kStep = kTilePitch<kChannels> * 4;
  const uint32_t at = tile + (token + 2 * (lane & 3)) * kStep + (row + (lane >> 2)) * 4;
  ptx::store_shared(at, d[0]);
  ptx::store_shared(at + kStep, d[1]);
  ptx::store_shared(at + 32, d[2]);
  ptx::store_shared(at + kStep + 32, d[3]);
}

// Eight words of a token of the tile, from channel n on, a multiple of 8.
template <int kChannels>
__device__ __forceinline__ void get_run(uint32_t tile, int token, int n, int32_t (&d)[8]) {
  const uint32_t at = tile + (token * kTilePitch<kChannels> + n) * 4;
  const int4 low = ptx::load_shared(at), high = ptx::load_shared(at + 16);
  d[0] = low.x, d[1] = low.y, d[2] = low.z, d[3] = low.w;
  d[4] = high.x, d[5] = high.y, d[6] = high.z, d[7] = high.w;
}

// From int32 sums to the outputs of a token and channels n to n + 7 of the tile; terms that there are not cost no
// instruction.
template <int kChannels>
__device__ __forceinline__ void finish_run(const Epilogue& e, int32_t (&d)[8], const TokenTerms& t,
                                           const TileTerms<kChannels>& terms, int n, float (&v)[8]) {
  if (e.x_zero_point) {
    const int32_t zero = t.zero - kZeroShift;
#pragma unroll
    for (int i = 0; i < 8; ++i) d[i] -= zero * terms.colsum[n + i];
  }
#pragma unroll
  for (int i = 0; i < 8; i += 4) {
    const float4 scale = *reinterpret_cast<const float4*>(terms.scale + n + i);
    v[i] = scaled(d[i], t.scale, scale.x), v[i + 1] = scaled(d[i + 1], t.scale, scale.y);
    v[i + 2] = scaled(d[i + 2], t.scale, scale.z), v[i + 3] = scaled(d[i + 3], t.scale, scale.w);
  }
  if (e.bias) {
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = __fadd_rn(v[i], terms.bias[n + i]);
  }
}

// y[m, n..n+7], as far as they exist.
__device__ __forceinline__ void store_run(const Epilogue& e, int m, int n, const float (&v)[8]) {
  if (m >= e.m || n >= e.n) return;
  const int64_t at = int64_t(m) * e.y_stride + n;
  const bool whole = e.vectors && n + 8 <= e.n;
  if (e.y_dtype == DType::kF32) {
    float* y = static_cast<float*>(e.y) + at;
    if (whole) {
      *reinterpret_cast<float4*>(y) = make_float4(v[0], v[1], v[2], v[3]);
      *reinterpret_cast<float4*>(y + 4) = make_float4(v[4], v[5], v[6], v[7]);
      return;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (n + i < e.n) y[i] = v[i];
    }
    return;
  }
  uint32_t pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) pairs[i] = pack_pair(e.y_dtype, v[2 * i], v[2 * i + 1]);
  if (whole) {
    *reinterpret_cast<uint4*>(static_cast<uint16_t*>(e.y) + at) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (n + 2 * i < e.n) store_u16(e, at + 2 * i, pairs[i]);
    if (n + 2 * i + 1 < e.n) store_u16(e, at + 2 * i + 1, pairs[i] >> 16);
  }
}

}  // namespace qk::cuda
