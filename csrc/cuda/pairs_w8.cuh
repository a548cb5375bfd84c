// A chunk of 16 codes to and from the order of pairs (w8a8.h).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace qk::cuda {
namespace {

constexpr uint32_t kPairsOffset = 0x80808080u;

__device__ __forceinline__ uint4 to_pairs(uint4 v) {
  return make_uint4(__byte_perm(v.x, v.z, 0x5140) ^ kPairsOffset, __byte_perm(v.x, v.z, 0x7362) ^ kPairsOffset,
                    __byte_perm(v.y, v.w, 0x5140) ^ kPairsOffset, __byte_perm(v.y, v.w, 0x7362) ^ kPairsOffset);
}
__device__ __forceinline__ uint4 from_pairs(uint4 v) {
  return make_uint4(__byte_perm(v.x, v.y, 0x6420) ^ kPairsOffset, __byte_perm(v.z, v.w, 0x6420) ^ kPairsOffset,
                    __byte_perm(v.x, v.y, 0x7531) ^ kPairsOffset, __byte_perm(v.z, v.w, 0x7531) ^ kPairsOffset);
}

}  // namespace
}  // namespace qk::cuda
