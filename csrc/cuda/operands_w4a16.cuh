// Codes as pairs of 16-bit floats. Of 4 bits: per word of eight (w4.h, kHalf) and register r of its fragment
//
//     (word >> 4r) & 0x000f000f | 0x43004300      two bf16 of 128 + q        (fp16: 0x6400, 1024 + q)
//     - (128 + zero_point)                        exact: q - zero_point      (one packed subtraction)
#pragma once

#include "numeric.cuh"
#include "ptx.cuh"

namespace qk::cuda {
namespace {

// 128 (or 1024), which codes are or-ed into, and 1, as pairs.
template <typename T>
struct Pairs;
template <>
struct Pairs<__nv_bfloat16> {
  static constexpr uint32_t kBase = 0x43004300u, kOnes = 0x3f803f80u;
  static constexpr DType kType = DType::kBF16;
};
template <>
struct Pairs<__half> {
  static constexpr uint32_t kBase = 0x64006400u, kOnes = 0x3c003c00u;
  static constexpr DType kType = DType::kF16;
};

__device__ __forceinline__ uint32_t subtract(__nv_bfloat16, uint32_t a, uint32_t b) {
  const __nv_bfloat162 r = __hsub2(*reinterpret_cast<__nv_bfloat162*>(&a), *reinterpret_cast<__nv_bfloat162*>(&b));
  return *reinterpret_cast<const uint32_t*>(&r);
}
__device__ __forceinline__ uint32_t subtract(__half, uint32_t a, uint32_t b) {
  const __half2 r = __hsub2(*reinterpret_cast<__half2*>(&a), *reinterpret_cast<__half2*>(&b));
  return *reinterpret_cast<const uint32_t*>(&r);
}

// What is subtracted from a pair of codes with the base or-ed in.
template <typename T>
__device__ __forceinline__ uint32_t pair_offset(uint32_t zero_point) {
  return Pairs<T>::kBase | zero_point | zero_point << 16;
}

// The pair r of a word; a codebook's comes from a table of all 256 pairs of its entries.
template <typename T>
__device__ __forceinline__ uint32_t pair_of(uint32_t word, int r, uint32_t offset) {
  return subtract(T(), ptx::and_or(word >> (4 * r), 0x000f000fu, Pairs<T>::kBase), offset);
}
__device__ __forceinline__ uint32_t pair_of(uint32_t word, int r, const uint32_t* book) {
  const uint32_t two = (word >> (4 * r)) & 0x000f000fu;
  return book[(two | two >> 12) & 0xffu];
}

// The same by fewer and cheaper instructions, for wgmma: while tensor cores are busy, a multiprocessor has a logic
// operation or a packed sum of bf16 every five cycles, and a packed product and sum of 16-bit floats takes half of what
// those take. Codes of channel g (even r) and of channel g + 8 (odd r) are read from where they are in the lower byte
// of each half, or in that of the word shifted by 8:
//
//     even:  base | q                       base + q               * 1 - (base + zero_point)
//     odd:   fp16: base | q << 4            1024 + 16 q            * 1/16 - (64 + zero_point)
//            bf16: q << 4, and nothing else q * 2^-129             * 2^127 - zero_point / 4
//
// bf16 has seven bits behind the point, of which q << 4 needs one more. But exponents of zero, subnormal numbers, and
// of one have the same step, so that the bit beyond counts as the others do. No factor makes more of 2^-129 than a
// quarter: those codes come out as (q - zero_point) / 4, and the scale of their channel makes up for it (kOddUnit). All
// exact.
template <typename T>
struct Nibbles;
template <>
struct Nibbles<__nv_bfloat16> {
  static constexpr uint32_t kFactor = 0x3f803f80u, kZero = 0xc300c300u, kEight = 0xc308c308u;
  static constexpr uint32_t kOddBase = 0, kOddFactor = 0x7f007f00u, kOddZero = 0, kOddEight = 0xc000c000u;
  static constexpr uint32_t kOddScale = 0xbe80be80u, kOddShift = 0x42004200u;  // -1/4 and 32
  static constexpr float kOddUnit = 4.0f;
};
template <>
struct Nibbles<__half> {
  static constexpr uint32_t kFactor = 0x3c003c00u, kZero = 0xe400e400u, kEight = 0xe408e408u;
  static constexpr uint32_t kOddBase = kZero ^ 0x80008000u, kOddFactor = 0x2c002c00u;
  static constexpr uint32_t kOddZero = 0xd400d400u, kOddEight = 0xd480d480u;
  static constexpr uint32_t kOddScale = 0xbc00bc00u, kOddShift = 0x63806380u;  // -1 and 960
  static constexpr float kOddUnit = 1.0f;
};

// a * b + c, rounded once.
__device__ __forceinline__ uint32_t multiply_add(__nv_bfloat16, uint32_t a, uint32_t b, uint32_t c) {
  const __nv_bfloat162 r =
      __hfma2(*reinterpret_cast<const __nv_bfloat162*>(&a), *reinterpret_cast<const __nv_bfloat162*>(&b),
              *reinterpret_cast<const __nv_bfloat162*>(&c));
  return *reinterpret_cast<const uint32_t*>(&r);
}
__device__ __forceinline__ uint32_t multiply_add(__half, uint32_t a, uint32_t b, uint32_t c) {
  const __half2 r = __hfma2(*reinterpret_cast<const __half2*>(&a), *reinterpret_cast<const __half2*>(&b),
                            *reinterpret_cast<const __half2*>(&c));
  return *reinterpret_cast<const uint32_t*>(&r);
}

// What is added to such a pair, worked out for any zero point below 128: kZero and kOddZero for 0, kEight and kOddEight
// for 8.
template <typename T>
__device__ __forceinline__ uint32_t nibble_offset(int odd, uint32_t zero_point) {
  const uint32_t even = pair_offset<T>(zero_point);
  return odd ? multiply_add(T(), even, Nibbles<T>::kOddScale, Nibbles<T>::kOddShift) : even ^ 0x80008000u;
}

// The pair r of a word; zeros where factor and offset are.
template <typename T>
__device__ __forceinline__ uint32_t pair_of_nibbles(uint32_t word, int r, uint32_t factor, uint32_t offset) {
  const uint32_t bytes = r < 2 ? word : word >> 8;
  return multiply_add(
      T(),
      r & 1 ? ptx::and_or(bytes, 0x00f000f0u, Nibbles<T>::kOddBase) : ptx::and_or(bytes, 0x000f000fu, Pairs<T>::kBase),
      factor, offset);
}

// Codes of 8 bits, offset by 128, in pairs of bytes (w8a8.h, kPairs):
//
//     fp16: base | q     1024 + q      * 1     - 1152        q - 128
//     bf16: q            q * 2^-133    * 2^127 - 2           (q - 128) / 64: a subnormal number, or one of the exponent
//                                                            above, whose step is the same
//
// Exact; the epilogue makes up for the 64 (kUnit).
template <typename T>
struct OffsetBytes;
template <>
struct OffsetBytes<__nv_bfloat16> {
  static constexpr uint32_t kBase = 0, kFactor = 0x7f007f00u, kZero = 0xc000c000u;
  static constexpr float kUnit = 64.0f;
};
template <>
struct OffsetBytes<__half> {
  static constexpr uint32_t kBase = 0x64006400u, kFactor = 0x3c003c00u, kZero = 0xe480e480u;
  static constexpr float kUnit = 1.0f;
};

// Bytes 0 and 2 of a word.
template <typename T>
__device__ __forceinline__ uint32_t even_bytes(uint32_t word) {
  using O = OffsetBytes<T>;
  return multiply_add(T(), ptx::and_or(word, 0x00ff00ffu, O::kBase), O::kFactor, O::kZero);
}

// Fills that table by `threads` threads of a block.
template <typename T>
__device__ __forceinline__ void fill_book(uint32_t* book, const float* codebook, int threads) {
  for (int i = threadIdx.x; i < 256; i += threads) {
    book[i] = pack_pair(Pairs<T>::kType, __ldg(codebook + (i & 15)), __ldg(codebook + (i >> 4)));
  }
}

}  // namespace
}  // namespace qk::cuda
