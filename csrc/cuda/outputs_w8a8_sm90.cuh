// Outputs of gemm_w8a8_tiled_sm90.cu: sums of a warp, 16 tokens x a tile's channels, to finished values and to memory.
//
// 16-bit outputs go by stripes of 64 channels through 2 KB of shared memory per warp: stmatrix writes them in the
// 128-byte swizzle of a tensor map, and one lane starts an asynchronous copy of 16 tokens x 128 bytes. Loaded again and
// stored by all lanes instead, they took 1.5 % (in turns) to 3 % of the whole product at K = 4096. Outputs that no such
// copy may write (addresses or rows that are not multiples of 16 bytes) are stored that way, in pairs.
#pragma once

#include <cuda.h>

#include <type_traits>

#include "epilogue.cuh"

namespace qk::cuda {
namespace {

constexpr int kStripe = 64;  // channels staged at once for the store
constexpr int kStripeTokens = 16;
constexpr int kStripeBytes = kStripeTokens * kStripe * 2;  // per warp

// Where a warp's 16 tokens x kChannels channels go: tokens m0 + g and m0 + g + 8 with their terms, channels from n0.
struct Corner {
  int m0, n0;
  TokenTerms upper, lower;
};

// What a sum meets on its way to an output. Beside products each instruction counts: the tensor cores' operands and
// sums pass through the same registers.
enum class Terms { kScales, kBias, kAll };

// f(std::integral_constant<Terms, ...>) for the terms that there are.
template <typename F>
__device__ __forceinline__ void with_terms(const Epilogue& e, const F& f) {
  if (e.x_zero_point) return f(std::integral_constant<Terms, Terms::kAll>());
  if (e.bias) return f(std::integral_constant<Terms, Terms::kBias>());
  return f(std::integral_constant<Terms, Terms::kScales>());
}

// The four values of a lane in block j (8 channels): (upper, even), (upper, odd), (lower, even), (lower, odd).
template <int kChannels, Terms kTerms>
__device__ __forceinline__ void finish_block(const int32_t (&acc)[kChannels / 2], int j, const Corner& at,
                                             const TileTerms<kChannels>& terms, int t, float (&v)[4]) {
  constexpr bool kZero = kTerms == Terms::kAll, kBias = kTerms != Terms::kScales;
  ChannelTerms even, odd;
  terms.template get<kZero, kBias>(8 * j + 2 * t, even, odd);
  v[0] = finish<kZero, kBias>(acc[4 * j], at.upper, even);
  v[1] = finish<kZero, kBias>(acc[4 * j + 1], at.upper, odd);
  v[2] = finish<kZero, kBias>(acc[4 * j + 2], at.lower, even);
  v[3] = finish<kZero, kBias>(acc[4 * j + 3], at.lower, odd);
}

// fp32: a quad of lanes writes the eight channels of a block, one 32-byte sector.
template <int kChannels>
__device__ __forceinline__ void store_f32_tile(const Epilogue& e, const int32_t (&acc)[kChannels / 2], const Corner& at,
                                               const TileTerms<kChannels>& terms, int lane) {
  const int g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int j = 0; j < kChannels / 8; ++j) {
    float v[4];
    finish_block<kChannels, Terms::kAll>(acc, j, at, terms, t, v);
    const int n = at.n0 + 8 * j + 2 * t;
    store_f32(e, at.m0 + g, n, v[0]);
    store_f32(e, at.m0 + g, n + 1, v[1]);
    store_f32(e, at.m0 + g + 8, n, v[2]);
    store_f32(e, at.m0 + g + 8, n + 1, v[3]);
  }
}

// A warp's finished 16-bit outputs, not yet written: words[2j] and words[2j + 1] are lane (g, t)'s channels 8j + 2t and
// 8j + 2t + 1 of tokens m0 + g and m0 + g + 8.
template <int kChannels>
struct Held {
  int m0, n0;
  bool any;
  uint32_t words[kChannels / 4];
};

template <int kChannels, DType kOut, Terms kTerms>
__device__ __forceinline__ void hold(Held<kChannels>& held, const int32_t (&acc)[kChannels / 2], const Corner& at,
                                     const TileTerms<kChannels>& terms, int lane) {
  held.m0 = at.m0, held.n0 = at.n0, held.any = true;
#pragma unroll
  for (int j = 0; j < kChannels / 8; ++j) {
    float v[4];
    finish_block<kChannels, kTerms>(acc, j, at, terms, lane & 3, v);
    held.words[2 * j] = pack_pair(kOut, v[0], v[1]);
    held.words[2 * j + 1] = pack_pair(kOut, v[2], v[3]);
  }
}

// A warp's stripe of 16 tokens x kStripe channels in shared memory: chunk i (8 channels) of row r at place i ^ (r % 8).
// Two blocks of 8 channels, as stmatrix takes them.
__device__ __forceinline__ void put_blocks(uint32_t stripe, int pair, int lane, const uint32_t (&words)[4]) {
  const int row = lane & 15, chunk = 2 * pair + (lane >> 4);  // whose address this lane gives
  ptx::stmatrix_x4(stripe + row * kStripe * 2 + ((chunk ^ (row & 7)) << 4), words[0], words[1], words[2], words[3]);
}

// Outputs as the epilogue's stores see them, and as a tensor of boxes of a stripe's size where e.vectors.
struct Output {
  const Epilogue& e;
  const CUtensorMap* map;
};

// Until the last stripe has been read, nobody writes over it.
__device__ __forceinline__ void claim_stripe(int lane) {
  if (lane == 0) ptx::bulk_wait_read();
  __syncwarp();
}

// And from there to channels n0 ... of tokens m0 ...: one asynchronous copy, which leaves out what lies outside, but by
// 16 bytes: of a row that ends within such a piece it would overwrite what comes next.
__device__ __forceinline__ void write_stripe(const Output& out, int m0, int n0, uint32_t stripe, int lane) {
  const Epilogue& e = out.e;
  if (e.vectors && (e.n % 8 == 0 || n0 + kStripe <= e.n)) {
    ptx::fence_proxy_async();
    __syncwarp();
    if (lane == 0) {
      ptx::tensor_store_2d(out.map, n0, m0, stripe);
      ptx::bulk_commit();
    }
    return;
  }
  __syncwarp();
#pragma unroll 1
  for (int pass = 0; pass < 4; ++pass) {
    const int row = pass * 4 + (lane >> 3), chunk = lane & 7, m = m0 + row, n = n0 + chunk * 8;
    const int4 v = ptx::load_shared(stripe + row * kStripe * 2 + ((chunk ^ (row & 7)) << 4));
    store_pair(e, m, n, v.x);
    store_pair(e, m, n + 2, v.y);
    store_pair(e, m, n + 4, v.z);
    store_pair(e, m, n + 6, v.w);
  }
  __syncwarp();
}

// The stripe of what is held that begins at channel `at`, or earlier, so that it is a whole one (a compile-time value
// after unrolling).
template <int kChannels>
__device__ __forceinline__ void store_stripe(const Output& out, const Held<kChannels>& held, int at, uint32_t stripe,
                                             int lane) {
  const int c = at + kStripe <= kChannels ? at : kChannels - kStripe;
  claim_stripe(lane);
#pragma unroll
  for (int pair = 0; pair < kStripe / 16; ++pair) {
    const uint32_t* w = held.words + (c + 16 * pair) / 4;
    const uint32_t words[4] = {w[0], w[1], w[2], w[3]};
    put_blocks(stripe, pair, lane, words);
  }
  write_stripe(out, held.m0, held.n0 + c, stripe, lane);
}

// A tile whose warpgroup has nothing else to do, stripe by stripe.
template <int kChannels, DType kOut, Terms kTerms>
__device__ __forceinline__ void store_tile(const Output& out, const int32_t (&acc)[kChannels / 2], const Corner& at,
                                           const TileTerms<kChannels>& terms, uint32_t stripe, int lane) {
  static_assert(kChannels % kStripe == 0, "whole stripes");
#pragma unroll
  for (int c = 0; c < kChannels; c += kStripe) {
    claim_stripe(lane);
#pragma unroll
    for (int pair = 0; pair < kStripe / 16; ++pair) {
      uint32_t words[4];
#pragma unroll
      for (int b = 0; b < 2; ++b) {
        float v[4];
        finish_block<kChannels, kTerms>(acc, (c + 16 * pair) / 8 + b, at, terms, lane & 3, v);
        words[2 * b] = pack_pair(kOut, v[0], v[1]);
        words[2 * b + 1] = pack_pair(kOut, v[2], v[3]);
      }
      put_blocks(stripe, pair, lane, words);
    }
    write_stripe(out, at.m0, at.n0 + c, stripe, lane);
  }
}

}  // namespace
}  // namespace qk::cuda
