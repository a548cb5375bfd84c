// Normalization and quantization of rows in one pass, with the addition of a residual before it; or without the
// quantization:
//
//   total[m, k] = round(x[m, k] + residual[m, k])                      written where there is a residual
//   rms:    y = (total * rstd) * weight                                rstd = 1 / sqrt(mean(total^2) + eps)
//   layer:  y = ((total - mean) * rstd) * weight + bias                rstd = 1 / sqrt(mean((total - mean)^2) + eps)
//   y' = y * inv_smooth; scale, zero point and codes of y' as in quantize_rows; or y, rounded to the dtype of x
//
// A row is read once and stays in registers in fp32 (rows.cuh). Sums run over pairs within a vector of 8, over the
// vectors of a thread, over the lanes of a warp and over the warps: at most 16 roundings deep, so rstd is within 2^-20
// of the true one (2^-18 for rows longer than 16,384 or not aligned, which are read again and whose threads add up to
// K / 1024 values in turn). A sum of squares that is not finite in fp32 makes the row one of NaN.
//
// Limit: 3 bytes of traffic per 16-bit value, 7 with a residual; 4 and 8 where y is written.
#include "rows.cuh"

namespace qk::cuda {
namespace {

// Sum over the threads that share a row. `place` is shared memory for one value a warp, used by one call alone.
__device__ __forceinline__ float row_sum(float v, float* place) {
  v = warp_sum(v);
  if (blockDim.x == 32) return v;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  if (lane == 0) place[warp] = v;
  __syncthreads();
  return warp_sum(lane < warps ? place[lane] : 0.0f);
}

// By pairs.
__device__ __forceinline__ float sum_of_eight(const float (&v)[kVector]) {
  return __fadd_rn(__fadd_rn(__fadd_rn(v[0], v[1]), __fadd_rn(v[2], v[3])),
                   __fadd_rn(__fadd_rn(v[4], v[5]), __fadd_rn(v[6], v[7])));
}

// 1 / sqrt(mean + eps) of a sum of squares; NaN where the sum left fp32.
__device__ __forceinline__ float reciprocal_deviation(float squares, int64_t k, float eps) {
  if (abs_bits(squares) >= kInfBits) return nan_value();
  return __frsqrt_rn(__fadd_rn(divide(squares, static_cast<float>(k)), eps));
}

// Eight values of weight or bias at k.
template <typename T>
__device__ __forceinline__ void load_parameters(const void* p, bool wide, int64_t k, float (&v)[kVector]) {
  if (wide) return load_factors(static_cast<const float*>(p) + k, v);
  Vector<T> raw;
  raw.load(static_cast<const T*>(p) + k);
  raw.widened(v);
}

// Asks for what a thread will read beside x: while a product that follows fetches its weights, memory takes
// microseconds to answer. Few rows alone wait for that.
template <typename T, int kVectors>
__device__ __forceinline__ void ask_ahead(const QuantizeNormArgs& n, int64_t row, int step, int start) {
  const auto ask = [&](const void* p, int64_t at, int64_t bytes) {
    if (p) ptx::prefetch_l2(static_cast<const uint8_t*>(p) + at * bytes);
  };
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int k = i * step + start;
    if (k >= n.codes.k) return;
    const int64_t bytes = n.wide_factors ? 4 : sizeof(T);
    ask(n.weight, k, bytes);
    ask(n.bias, k, bytes);
    ask(n.residual, row * n.residual_stride + k, sizeof(T));
  }
}

template <typename T, int kVectors, bool kLayer>
__global__ void __launch_bounds__(kManyThreads) quantize_norm_kernel(const QuantizeNormArgs n) {
  __shared__ float squares_of[kWarps], sums_of[kWarps];
  const QuantizeRowsArgs& a = n.codes;
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  const int step = blockDim.x * kVector, start = threadIdx.x * kVector;
  if (a.settled && row < a.m) ask_ahead<T, kVectors>(n, row, step, start);
  begin_rows(a);
  if (row >= a.m) return;
  const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
  // Read together with x, where there are registers: behind the sum of squares it would be a second wait for memory.
  Vector<T> weight[kVectors];
  const bool with_weight = kVectors * sizeof(T) <= 4 && n.weight && n.wide_factors == (sizeof(T) == 4);
  Row<kVectors> v;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int k = i * step + start;
    Vector<T> raw;
    if (k < a.k) {
      raw.load(x + k);
      if (with_weight) weight[i].load(static_cast<const T*>(n.weight) + k);
    } else {
      raw.clear();
    }
    raw.widened(v[i]);
  }
  if (n.residual) {
    const T* residual = static_cast<const T*>(n.residual) + row * n.residual_stride;
    T* total = static_cast<T*>(n.total) + row * a.k;
    Vector<T> raw[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (i * step + start < a.k) raw[i].load(residual + i * step + start);
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int k = i * step + start;
      if (k >= a.k) break;
      float r[kVector];
      raw[i].widened(r);
#pragma unroll
      for (int j = 0; j < kVector; ++j) v[i][j] = rounded<T>(__fadd_rn(v[i][j], r[j]));
      store_values(total + k, v[i]);
    }
  }
  if (kLayer) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) sum = __fadd_rn(sum, sum_of_eight(v[i]));
    const float mean = divide(row_sum(sum, sums_of), static_cast<float>(a.k));
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (i * step + start >= a.k) break;
#pragma unroll
      for (int j = 0; j < kVector; ++j) v[i][j] = __fsub_rn(v[i][j], mean);
    }
  }
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    float s[kVector];
#pragma unroll
    for (int j = 0; j < kVector; ++j) s[j] = __fmul_rn(v[i][j], v[i][j]);
    squares = __fadd_rn(squares, sum_of_eight(s));
  }
  const float rstd = reciprocal_deviation(row_sum(squares, squares_of), a.k, n.eps);
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int k = i * step + start;
    if (k >= a.k) break;
#pragma unroll
    for (int j = 0; j < kVector; ++j) v[i][j] = __fmul_rn(v[i][j], rstd);
    if (n.weight) {
      float w[kVector];
      if (with_weight) {
        weight[i].widened(w);
      } else {
        load_parameters<T>(n.weight, n.wide_factors, k, w);
      }
#pragma unroll
      for (int j = 0; j < kVector; ++j) v[i][j] = __fmul_rn(v[i][j], w[j]);
    }
    if (kLayer && n.bias) {
      float b[kVector];
      load_parameters<T>(n.bias, n.wide_factors, k, b);
#pragma unroll
      for (int j = 0; j < kVector; ++j) v[i][j] = __fadd_rn(v[i][j], b[j]);
    }
  }
  finish_row<T, kVectors>(a, n.y, row, v);
}

// Any length, any alignment; the row is read several times.
template <typename T, bool kLayer>
__global__ void __launch_bounds__(1024) quantize_norm_scalar_kernel(const QuantizeNormArgs n) {
  __shared__ float squares_of[kWarps], sums_of[kWarps];
  begin_rows(n.codes);
  const QuantizeRowsArgs& a = n.codes;
  const int64_t row = blockIdx.x;
  const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
  const T* residual = static_cast<const T*>(n.residual) + row * n.residual_stride;
  const auto total = [&](int64_t k) {
    return n.residual ? rounded<T>(__fadd_rn(widen(x[k]), widen(residual[k]))) : widen(x[k]);
  };
  float sum = 0.0f;
  for (int64_t k = threadIdx.x; k < a.k; k += blockDim.x) {
    const float v = total(k);
    sum = __fadd_rn(sum, kLayer ? v : __fmul_rn(v, v));
    if (n.residual) static_cast<T*>(n.total)[row * a.k + k] = narrow<T>(v);
  }
  sum = row_sum(sum, sums_of);
  const float mean = kLayer ? divide(sum, static_cast<float>(a.k)) : 0.0f;
  if (kLayer) {
    sum = 0.0f;
    for (int64_t k = threadIdx.x; k < a.k; k += blockDim.x) {
      const float v = __fsub_rn(total(k), mean);
      sum = __fadd_rn(sum, __fmul_rn(v, v));
    }
    sum = row_sum(sum, squares_of);
  }
  const float rstd = reciprocal_deviation(sum, a.k, n.eps);
  const auto parameter = [&](const void* p, int64_t k) {
    return n.wide_factors ? static_cast<const float*>(p)[k] : widen(static_cast<const T*>(p)[k]);
  };
  finish_row_again<T>(a, n.y, row, [&](int64_t k) {
    float v = total(k);
    if (kLayer) v = __fsub_rn(v, mean);
    v = __fmul_rn(v, rstd);
    if (n.weight) v = __fmul_rn(v, parameter(n.weight, k));
    if (kLayer && n.bias) v = __fadd_rn(v, parameter(n.bias, k));
    return v;
  });
}

template <typename T, bool kLayer>
void run(const QuantizeNormArgs& n, cudaStream_t stream) {
  const char* name = "quantize_norm";
  const bool vectors = vectors_fit(n.codes, kManyThreads * 2 * kVector) && n.residual_stride % kVector == 0 &&
                       aligned_to(n.residual, 16) && aligned_to(n.total, 16) && aligned_to(n.weight, 16) &&
                       aligned_to(n.bias, 16) && aligned_to(n.y, 16);
  if (!vectors) {
    return launch(quantize_norm_scalar_kernel<T, kLayer>, shape_of_scalars(n.codes), stream, name, n);
  }
  const auto [shape, each] = shape_of_vectors(n.codes, 2, kManyThreads);
  if (each <= 1) return launch(quantize_norm_kernel<T, 1, kLayer>, shape, stream, name, n);
  return launch(quantize_norm_kernel<T, 2, kLayer>, shape, stream, name, n);
}

template <typename T>
void run(const QuantizeNormArgs& n, cudaStream_t stream) {
  return n.layer ? run<T, true>(n, stream) : run<T, false>(n, stream);
}

}  // namespace

void quantize_norm(const QuantizeNormArgs& args, cudaStream_t stream) {
  if (args.codes.m == 0) return;
  for_type(args.codes.x_dtype, "quantize_norm", [&](auto type) { run<decltype(type)>(args, stream); });
}

}  // namespace qk::cuda
