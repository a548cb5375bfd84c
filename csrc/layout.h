// Packed weight layouts. No intrinsics here.
//
// W8: weight [N, K] int8 becomes [N/64][K/4][64 columns][4 k] bytes, zero-padded to multiples of 64 in both.
//
//   superblock nb (64 output columns), one 256-byte line per group of four k:
//
//            column 0      column 1            column 63
//     k4=0 | k0 k1 k2 k3 | k0 k1 k2 k3 | ... | k0 k1 k2 k3 |   256 bytes
//     k4=1 | k4 k5 k6 k7 | k4 k5 k6 k7 | ... | k4 k5 k6 k7 |
//      ...
//
// One zmm register is 16 columns x 4 k, the operand of vpdpbusd; a ymm register is half of that; 16 lines of a
// 64-byte slice are one AMX B tile (row stride 256 bytes). At M = 1 a superblock is one sequential stream.
//
// W4: codes 0..15 become [N/64][K/8][64 columns][4 bytes], zero-padded likewise. A byte holds two k of its column:
//
//              column 0                               column 1
//     line 0 | k4:k0  k5:k1  k6:k2  k7:k3         |   ...             256 bytes for 8 k; high nibble : low nibble
//
// so that one load, a mask and a shift give two lines of the W8 layout. What belongs to a group (scale, zero point,
// minimum) becomes [N/64][groups][64 columns], padded with zeros.
#pragma once

#include <cstdint>

// Micro-kernels stay functions of their own: inlined into the blocked loops, their accumulators are spilled to make
// room for what the loops keep in registers (a factor of 2 at six rows, g++ 12).
#define QK_NOINLINE __attribute__((noinline))
// Loops over a few elements whose number the caller knows must become part of it.
#define QK_INLINE __attribute__((always_inline))

namespace qk {

constexpr int64_t kBlockN = 64;  // columns of a superblock
constexpr int64_t kBlockK = 64;  // K is padded to this
constexpr int64_t kPackK = 4;  // consecutive k of one column that lie together
constexpr int64_t kMaxK = 65536;  // int32 sums of u8 x s8 are exact up to here
constexpr int64_t kAlign = 64;  // bytes

// Internal linkage: a linker must not share copies of these between files compiled for different ISAs.
namespace {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

constexpr int64_t padded_k(int64_t k) { return round_up(k, kBlockK); }
constexpr int64_t packed_w8_bytes(int64_t n, int64_t k) { return round_up(n, kBlockN) * padded_k(k); }

constexpr int64_t packed_w4_bytes(int64_t n, int64_t k) { return round_up(n, kBlockN) * padded_k(k) / 2; }
constexpr int64_t packed_group_elements(int64_t n, int64_t groups) { return round_up(n, kBlockN) * groups; }

}  // namespace

}  // namespace qk
