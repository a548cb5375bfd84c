// Activations with zero points in W4A8 products by mma.sync, where groups have float scales. They hold
// stored = q - 128, and int32 sums stay exact:
//
//     sum (q - zero_x) (w - zero_w) = sum stored (w - zero_w) - (zero_x - 128) sum (w - zero_w)
//
// The last sum comes from the fragments of the weights times ones (no ones beyond K, where codes are padding): one
// product more for each fragment, and nothing that layers would have to keep. g = lane / 4 and t = lane % 4 as in
// ptx.cuh.
#pragma once

#include "operands_w4a8.cuh"
#include "w8a8.h"

namespace qk::cuda {
namespace {

// What zero_x - 128 is for the two tokens of a lane's columns, or zeros where there is no token.
__device__ __forceinline__ void load_shift(const GemmW4A8Args& a, int m, int32_t (&shift)[2]) {
#pragma unroll
  for (int e = 0; e < 2; ++e) shift[e] = m + e < a.m ? a.x_zero_point[m + e] - kZeroShift : 0;
}

// Ones for the four k from `k` on, as far as there are weights.
__device__ __forceinline__ uint32_t ones_below(int k, int end) {
  const int left = end - k;
  return left >= 4 ? kOnes : left <= 0 ? 0u : kOnes >> (8 * (4 - left));
}

// The sums of weights over the 32 k from `k` on, added to those of a fragment: the same in every column.
__device__ __forceinline__ void add_weights(int32_t (&sums)[4], const uint32_t (&f)[4], int k, int end, int lane) {
  const int own = k + 4 * (lane & 3);
  ptx::mma_s8(sums, f, ones_below(own, end), ones_below(own + 16, end));
}

// Takes off what the shift added to the sums of a block, of a group or of all K; `weights` begin anew.
template <int kBlocksN, int kBlocksM>
__device__ __forceinline__ void take_shift_off(int32_t (&acc)[kBlocksN][kBlocksM][4],
                                               const int32_t (&shifts)[kBlocksM][2], int32_t (&weights)[kBlocksN][4]) {
#pragma unroll
  for (int i = 0; i < kBlocksN; ++i) {
#pragma unroll
    for (int j = 0; j < kBlocksM; ++j) {
#pragma unroll
      for (int c = 0; c < 4; ++c) acc[i][j][c] -= shifts[j][c & 1] * weights[i][c];
    }
    weights[i][0] = weights[i][1] = weights[i][2] = weights[i][3] = 0;
  }
}

// The same of the sums of tokens over a block or group of `width` k.
template <int kBlocksM>
__device__ __forceinline__ void take_shift_off_tokens(int32_t (&sums)[kBlocksM][4],
                                                      const int32_t (&shifts)[kBlocksM][2], int width) {
#pragma unroll
  for (int j = 0; j < kBlocksM; ++j) {
#pragma unroll
    for (int c = 0; c < 4; ++c) sums[j][c] -= shifts[j][c & 1] * width;
  }
}

}  // namespace
}  // namespace qk::cuda
