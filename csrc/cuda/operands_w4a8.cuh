// The operands of W4A8 products by mma.sync m16n8k32: 4-bit codes as signed bytes, and tokens in shared memory, rows of
// 128 bytes whose 16-byte chunks are swizzled.
//
// A word of eight codes becomes two fragment registers (w4.h):
//
//     ((word & 0x0f0f0f0f | 0x80808080) - zero_point * 0x01010101) ^ 0x80808080       four signed bytes q - zero_point
//
// and where groups have multipliers, which say 128 - multiplier * zero as well (W4Weight::scale):
//
//     ((word & 0x0f0f0f0f) * multiplier + (128 - multiplier * zero) * 0x01010101) ^ 0x80808080
//
// four signed bytes multiplier * (q - zero). No byte of it carries into the next one: what is added to is below
// 256 - 128 + 127, as weights are signed bytes.
#pragma once

#include "ptx.cuh"
#include "w4.h"

namespace qk::cuda {
namespace {

constexpr int kTokenBytes = kW4SlabK;  // of a token in a slab

constexpr uint32_t kOnes = 0x01010101u;

// Four bytes q - zero of the low (high) nibbles of a word; `zeros` is zero * kOnes.
__device__ __forceinline__ uint32_t low_bytes(uint32_t word, uint32_t zeros) {
  return (ptx::and_or(word, 0x0f0f0f0fu, 0x80808080u) - zeros) ^ 0x80808080u;
}
__device__ __forceinline__ uint32_t high_bytes(uint32_t word, uint32_t zeros) { return low_bytes(word >> 4, zeros); }

// Four signed bytes 16 * (q - 8): fewer operations, and sums that are 16 times the true ones.
__device__ __forceinline__ uint32_t high_bytes_sixteenfold(uint32_t word) {
  return ptx::and_xor(word, 0xf0f0f0f0u, 0x80808080u);
}
__device__ __forceinline__ uint32_t low_bytes_sixteenfold(uint32_t word) { return high_bytes_sixteenfold(word << 4); }

// What a group's 16 bits say, as four codes take it.
struct Multiplier {
  uint32_t multiplier, offsets;
};
__device__ __forceinline__ Multiplier multiplier_of(uint32_t factor) {
  return Multiplier{factor & 255u, __byte_perm(factor, 0, 0x1111)};
}
__device__ __forceinline__ uint32_t low_bytes(uint32_t word, const Multiplier& m) {
  return ((word & 0x0f0f0f0fu) * m.multiplier + m.offsets) ^ 0x80808080u;
}
__device__ __forceinline__ uint32_t high_bytes(uint32_t word, const Multiplier& m) { return low_bytes(word >> 4, m); }

// The fragments b of k-step `step` (32 k) for kBlocks times eight tokens, rows of kTokenBytes from `tokens` on.
template <int kBlocks>
__device__ __forceinline__ void load_tokens(uint32_t tokens, int step, int lane, uint32_t (&b)[kBlocks][2]) {
#pragma unroll
  for (int j = 0; j < (kBlocks + 1) / 2; ++j) {
    // Of eight tokens only the first two matrices count, and the others are the same again.
    const int row = 16 * j + (lane & 7) + (kBlocks > 1 ? (lane >> 4) << 3 : 0), chunk = 2 * step + ((lane >> 3) & 1);
    uint32_t r[4];
    ptx::ldmatrix_x4(r, tokens + row * kTokenBytes + ((chunk ^ (row & 7)) << 4));
    b[2 * j][0] = r[0], b[2 * j][1] = r[1];
    if constexpr (kBlocks > 1) b[2 * j + 1][0] = r[2], b[2 * j + 1][1] = r[3];
  }
}

// Starts the copy of 16 bytes of a token's slab, or of zeros where there is no such token.
__device__ __forceinline__ void load_token_chunk(const GemmW4A8Args& a, uint32_t tokens, int row, int chunk, int slab,
                                                 int m0) {
  const int k = slab * kW4SlabK + chunk * 16, bytes = m0 + row < a.m ? max(0, min(16, a.weight.k - k)) : 0;
  ptx::cp_async_16(tokens + row * kTokenBytes + ((chunk ^ (row & 7)) << 4),
                   a.xq + int64_t(min(m0 + row, a.m - 1)) * a.x_stride + (bytes > 0 ? k : 0), bytes);
}

}  // namespace
}  // namespace qk::cuda
