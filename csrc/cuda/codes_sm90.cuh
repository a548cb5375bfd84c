// Codes of products that add to one sum (kOneSum in tile_w4_sm90.cuh), on their way from shared memory to wgmma
// fragments: read half a slab ahead, since nothing else covers the time that takes. 8-bit codes; or 4-bit ones whose
// groups have multipliers (operands_w4a8.cuh).
#pragma once

#include "tile_w4_sm90.cuh"

namespace qk::cuda {
namespace {

// Two of this thread's 8-bit codes: those of register r of the fragment of step s of a slab. The 16 k of a step are one
// chunk of a row, which the number of the row in its atom swizzles: the same for both rows, and added to the thread's
// offset by XOR.
__device__ __forceinline__ uint32_t load_bytes(const Thread& t, const uint8_t* packed, int s, int r) {
  const uint8_t* at = packed + (t.codes ^ (s << 4)) + (r & 1) * kAtomRows * kSlabK + (r >> 1) * 8;
  return *reinterpret_cast<const uint16_t*>(at);
}
// Of half a slab, those that are read early.
template <typename S>
struct EarlyBytes {
  uint32_t codes[S::kEarlySteps > 0 ? S::kEarlySteps : 1][4];
  template <bool>
  __device__ __forceinline__ void load(const Job&, const Thread& t, const uint8_t* packed, int half) {
#pragma unroll
    for (int s = 0; s < S::kEarlySteps; ++s) {
#pragma unroll
      for (int r = 0; r < 4; ++r) codes[s][r] = load_bytes(t, packed, S::kSteps / 2 * half + s, r);
    }
  }
  // All of it as fragments.
  template <bool>
  __device__ __forceinline__ void unpack(const Thread& t, const uint8_t* packed, int half,
                                         uint32_t (&f)[S::kFragments]) const {
#pragma unroll
    for (int s = 0; s < S::kSteps / 2; ++s) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        f[4 * s + r] = pair_of_bytes(
            typename S::T(), s < S::kEarlySteps ? codes[s][r] : load_bytes(t, packed, S::kSteps / 2 * half + s, r));
      }
    }
  }
};

// 4-bit codes of half a slab and, for each of the thread's channels, what W4Weight::scale holds: of each 32 k of it, or
// (kOneRow) of all of it, where groups have 128 k or more.
template <typename S>
struct EarlyMultiples {
  uint4 codes;
  uint32_t factors[2][2];
  template <bool kOneRow>
  __device__ __forceinline__ void load(const Job& job, const Thread& t, const uint8_t* packed, int half) {
    codes = load_codes(t, packed, half);
    const uint8_t* rows = packed + S::kChannels * S::kCodeBytes + t.channel * 2;
#pragma unroll
    for (int part = 0; part < (kOneRow ? 1 : 2); ++part) {
      const uint8_t* row = kOneRow ? rows : rows + ((2 * half + part) >> (2 - job.groups.row_shift)) * S::kChannels * 2;
#pragma unroll
      for (int e = 0; e < 2; ++e) factors[part][e] = *reinterpret_cast<const uint16_t*>(row + 16 * e);
    }
  }
  // The fragment of step `part` of the half.
  template <bool kOneRow>
  __device__ __forceinline__ void unpack_step(int part, uint32_t* f) const {
    const uint32_t words[2] = {part ? codes.z : codes.x, part ? codes.w : codes.y};
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const Multiplier m = multiplier_of(factors[kOneRow ? 0 : part][e]);
#pragma unroll
      for (int i = 0; i < 2; ++i) f[2 * i + e] = e ? high_bytes(words[i], m) : low_bytes(words[i], m);
    }
  }
  template <bool kOneRow>
  __device__ __forceinline__ void unpack(const Thread&, const uint8_t*, int, uint32_t (&f)[S::kFragments]) const {
    unpack_step<kOneRow>(0, f);
    unpack_step<kOneRow>(1, f + 4);
  }
};

template <typename S>
using EarlyCodes = typename std::conditional<S::kBits == 8, EarlyBytes<S>, EarlyMultiples<S>>::type;

}  // namespace
}  // namespace qk::cuda
