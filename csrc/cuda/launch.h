// Host side of a launch: one entry point per op, every one on the caller's stream, none allocating or synchronising.
// All throw std::runtime_error with CUDA's message when a launch is refused, std::invalid_argument on nonsense.
#pragma once

#include <cuda_runtime.h>

#include "w8a8.h"

namespace qk::cuda {

// Quantization of rows, one granule each:  q [M, K] from x [M, K] * inv_smooth [K].
struct QuantizeRowsArgs {
  const void* x;
  DType x_dtype;
  int64_t m, k;
  int64_t x_stride;  // elements between rows
  int8_t* q;
  int64_t q_stride;  // bytes between rows
  float* scale;  // [M], always written: NaN where a row holds NaN or Inf
  int32_t* zero_point;  // [M], or nullptr: symmetric
  const float* inv_smooth;  // [K] or nullptr
  bool is_static;  // scale and zero point are given, on the device
  const float* static_scale;  // [1]
  const int32_t* static_zero_point;  // [1] or nullptr
  bool shifted;  // asymmetric: store q - kZeroShift as a signed byte instead of q as an unsigned one
  bool dependent;  // the launch may overlap the end of the kernel before it
  bool settled;  // and so may the one after this: what it reads before it waits, no kernel still writes
};

// More rows than these, and products that wait for their codes on all multiprocessors take more from the kernels they
// wait for than they gain (measured on an H200: 1 us gained up to 64 rows, 0.4 lost at 128 and 256).
constexpr int64_t kSettledRows = 64;

// Rows that are computed before they are quantized; `codes` says where they go, its `x`, `x_dtype` and `x_stride` what
// is read first. What is written keeps the dtype of x, what is beside it may have its own. With `y` the rows themselves
// are written, rounded to the dtype of x once, and no codes: of `codes` only x and its kin, m, k, dependent and settled
// count.

// Norms of total = x + residual, rounded to the dtype of x (of x itself where there is no residual):
//   rms:    total * rstd * weight                  rstd = 1 / sqrt(mean(total^2) + eps)
//   layer:  (total - mean) * rstd * weight + bias  rstd = 1 / sqrt(mean((total - mean)^2) + eps)
struct QuantizeNormArgs {
  QuantizeRowsArgs codes;
  void* y;  // [M, K], contiguous, no part of what is read; nullptr: codes
  bool layer;
  float eps;
  const void* residual;  // [M, K] in the dtype of x, or nullptr
  int64_t residual_stride;  // elements between rows
  void* total;  // [M, K], contiguous, no part of x or residual; nullptr exactly where residual is
  const void* weight;  // [K] or nullptr: ones
  const void* bias;  // [K] or nullptr: none; layer only
  bool wide_factors;  // weight and bias are fp32; else they have the dtype of x
};

// activation(x), times `up` where that is given.
enum class Activation : int32_t { kNone = 0, kRelu = 1, kGelu = 2, kGeluTanh = 3, kSilu = 4 };
struct QuantizeActivationArgs {
  QuantizeRowsArgs codes;
  void* y;  // as above
  Activation activation;
  const void* up;  // [M, K] in the dtype of x, or nullptr
  int64_t up_stride;  // elements between rows
};

// Any granularity, as csrc/args.h describes it. `stats` is [2 * granules] zeroed words.
void quantize(const QuantizeArgs& args, uint32_t* stats, cudaStream_t stream);
void dequantize(const DequantizeArgs& args, cudaStream_t stream);
void quantize_rows(const QuantizeRowsArgs& args, cudaStream_t stream);
void quantize_norm(const QuantizeNormArgs& args, cudaStream_t stream);
void quantize_activation(const QuantizeActivationArgs& args, cudaStream_t stream);

// Canonical weight [N, K] to and from slabs of either kind.
void pack_w8(const int8_t* weight, int64_t n, int64_t k, W8Layout layout, int8_t* packed, int32_t* colsum,
             cudaStream_t stream);
void unpack_w8(const int8_t* packed, int64_t n, int64_t k, W8Layout layout, int8_t* weight, cudaStream_t stream);

// dispatch.cu. `capability` is 10 * major + minor.
int device_capability();
int multiprocessors();
W8A8Config select_w8a8(int64_t m, int64_t n, int64_t k, int capability, int sms);
void gemm_w8a8(const GemmW8A8Args& args, const W8A8Config& config, bool dependent, cudaStream_t stream);
bool has_sm90a();  // the sm_90a kernels are compiled in

// Each throws std::invalid_argument for a tile it has no instance of.
void gemm_w8a8_mma(const GemmW8A8Args& args, const W8A8Config& config, bool dependent, cudaStream_t stream);
void gemm_w8a8_stream(const GemmW8A8Args& args, const W8A8Config& config, bool dependent, cudaStream_t stream);
void gemm_w8a8_tiled(const GemmW8A8Args& args, const W8A8Config& config, bool dependent, cudaStream_t stream);

// sm_90a: the rate of the tensor cores alone. `random` holds 48 KB; returns the operations of the launch.
double peak_s8(const void* random, int iterations, int32_t* sink, cudaStream_t stream);

}  // namespace qk::cuda
