// Launches for 8-bit weights under floating-point activations, which read slabs of pairs (w8a8.h), and for tables of
// 8-bit rows, in any layout, so that one resident table serves its lookups and a head of either kind; rules as in
// launch.h.
#pragma once

#include <cuda_runtime.h>

#include "w4.h"
#include "w8a8.h"

namespace qk::cuda {

// y [M, N] = round(sum_k x[m, k] * w[n, k] * scale_w[n] + bias[n]), 16-bit x, fp32 sums.
struct GemmW8A16Args {
  const void* x;
  DType x_dtype;  // kBF16 or kF16
  int64_t x_stride;  // elements between rows, a multiple of 8; x is 16-byte aligned
  const int8_t* packed;  // slabs of pairs, 128-byte aligned
  int64_t slab_rows;  // from one slab to the next: packed_rows(n), or more
  const float* weight_scale;  // [N]
  const float* bias;  // [N] or nullptr
  int32_t m, n, k;
  void* y;
  DType y_dtype;
  int64_t y_stride;
  int32_t* counters;  // as W4Plan says
  float* partials;
};

// The instances of kWgmma.
constexpr bool w8a16_has_tile(int tokens, int phases) {
  if (phases == 2) return tokens == 8 || tokens == 16 || tokens == 64;
  return !(tokens == 8 && phases == 4) && tokens != 96 && w4_has_tile(false, W4Kind::kZeroPoint, tokens, phases);
}

// Plans as those of 4-bit weights. kMma: `phases` is the blocks of 16 channels of a CTA, 1 or 2.
W4Plan plan_w8a16(int64_t m, int64_t n, int64_t k, int capability, int sms);
void gemm_w8a16(const GemmW8A16Args& args, const W4Plan& plan, bool dependent, cudaStream_t stream);
void gemm_w8a16_mma(const GemmW8A16Args& args, int32_t blocks, cudaStream_t stream);
void gemm_w8a16_sm90(const GemmW8A16Args& args, const W4Plan& plan, bool dependent, cudaStream_t stream);

// out [count, K] = round(scale[row] * table[row, :]), row = ids[i], or first + i where ids is nullptr. Ids outside the
// table stop the kernel with an assertion, as torch's own lookups do.
struct GatherW8Args {
  const int8_t* table;  // slabs are 128-byte aligned
  W8Layout layout;
  int64_t slab_rows;  // of slabs: as above
  const float* scale;  // [N]
  int32_t n, k;
  const void* ids;  // int32 or int64 [count], or nullptr
  bool wide_ids;
  int64_t first, count;
  void* out;
  DType out_dtype;
};
void gather_w8(const GatherW8Args& args, cudaStream_t stream);

}  // namespace qk::cuda
