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

// a * factor - b for factors of one and, where b is zero too, of zero: exact.
__device__ __forceinline__ uint32_t times_less(__nv_bfloat16, uint32_t a, uint32_t factor, uint32_t b) {
  const uint32_t c = b ^ 0x80008000u;
  const __nv_bfloat162 r =
      __hfma2(*reinterpret_cast<const __nv_bfloat162*>(&a), *reinterpret_cast<const __nv_bfloat162*>(&factor),
              *reinterpret_cast<const __nv_bfloat162*>(&c));
  return *reinterpret_cast<const uint32_t*>(&r);
}
__device__ __forceinline__ uint32_t times_less(__half, uint32_t a, uint32_t factor, uint32_t b) {
  const uint32_t c = b ^ 0x80008000u;
  const __half2 r = __hfma2(*reinterpret_cast<const __half2*>(&a), *reinterpret_cast<const __half2*>(&factor),
                            *reinterpret_cast<const __half2*>(&c));
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
// The same, or zeros where factor and offset are.
template <typename T>
__device__ __forceinline__ uint32_t pair_of(uint32_t word, int r, uint32_t factor, uint32_t offset) {
  return times_less(T(), ptx::and_or(word >> (4 * r), 0x000f000fu, Pairs<T>::kBase), factor, offset);
}
__device__ __forceinline__ uint32_t pair_of(uint32_t word, int r, const uint32_t* book) {
  const uint32_t two = (word >> (4 * r)) & 0x000f000fu;
  return book[(two | two >> 12) & 0xffu];
}

// Two signed bytes. bf16: 0x43 over seven bits is 128 + their value, and 0x4380 is 256, so the sign bit chooses what is
// subtracted. fp16: 0x64 over eight bits is 1024 + their value, here offset by 128. Exact.
__device__ __forceinline__ uint32_t pair_of_bytes(__nv_bfloat16, uint32_t bytes) {
  const uint32_t wide = __byte_perm(bytes, 0x43434343u, 0x4140);
  return subtract(__nv_bfloat16(), wide & 0xff7fff7fu, wide & 0xff80ff80u);
}
__device__ __forceinline__ uint32_t pair_of_bytes(__half, uint32_t bytes) {
  return subtract(__half(), __byte_perm(bytes ^ 0x8080u, 0x64646464u, 0x4140), 0x64806480u);
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
