// Codes of products that add to one sum (kOneSum in tile_w4_sm90.cuh), on their way from shared memory to wgmma
// fragments: read half a slab ahead, since nothing else covers the time that takes. 8-bit codes; or 4-bit ones whose
// groups have multipliers (operands_w4a8.cuh).
#pragma once

#include "tile_w4_sm90.cuh"

namespace qk::cuda {
namespace {

// 8-bit codes of four steps of a slab. "ldmatrix" gives a lane the words of two steps that wgmma's register operand
// wants of it (w8a8.h, kPairs): of rows g and g + 8 of one chunk, then of the next. What swizzles chunks is in the
// lane's address, to which a chunk's number is added by XOR.
template <typename S>
struct EarlyBytes {
  uint32_t words[2][4];  // of steps 4i and 4i + 1, and of the two after them
  __device__ __forceinline__ void load_two(const Thread& t, const uint8_t* packed, int step) {
    ptx::ldmatrix_x4(words[step / 2 % 2], (ptx::smem_u32(packed) + t.codes) ^ (step << 4));
  }
  template <bool>
  __device__ __forceinline__ void load(const Job&, const Thread& t, const uint8_t* packed, int half) {
#pragma unroll
    for (int s = 0; s < S::kSteps / 2; s += 2) load_two(t, packed, S::kSteps / 2 * half + s);
  }
  // The fragments of those steps.
  __device__ __forceinline__ void unpack_two(int step, uint32_t* f) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t word = words[step / 2 % 2][i];
      uint32_t* to = f + i / 2 * 4 + i % 2;
      to[0] = even_bytes<typename S::T>(word), to[2] = even_bytes<typename S::T>(word >> 8);
    }
  }
  template <bool>
  __device__ __forceinline__ void unpack(uint32_t (&f)[S::kFragments]) const {
#pragma unroll
    for (int s = 0; s < S::kSteps / 2; s += 2) unpack_two(s, f + 4 * s);
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
  __device__ __forceinline__ void unpack(uint32_t (&f)[S::kFragments]) const {
    unpack_step<kOneRow>(0, f);
    unpack_step<kOneRow>(1, f + 4);
  }
};

template <typename S>
using EarlyCodes = typename std::conditional<S::kBits == 8, EarlyBytes<S>, EarlyMultiples<S>>::type;

}  // namespace
}  // namespace qk::cuda
