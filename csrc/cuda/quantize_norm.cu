// Normalization and quantization of rows in one pass, with the addition of a residual before it; or without the
// quantization:
//
//   total[m, k] = round(x[m, k] + residual[m, k])                      written where there is a residual
//   rms:    y = (total * rstd) * weight                                rstd = 1 / sqrt(mean(total^2) + eps)
//   layer:  y = ((total - mean) * rstd) * weight + bias                rstd = 1 / sqrt(mean((total - mean)^2) + eps)
//   y' = y * inv_smooth; scale, zero point and codes of y' as in quantize_rows; or y, rounded to the dtype of x
//
// A row is read once and stays in registers in fp32 (rows.cuh). Sums run over every fourth value of a thread,
// over the four, over the lanes of a warp and over the warps: at most 22 roundings deep, so rstd is within 2^-20 of the
// true one (2^-18 for rows longer than 16,384 or not aligned, which are read again and whose threads add up to
// K / 1024 values in turn). A sum of squares that is not finite in fp32 makes the row one of NaN.
//
// Limit: 3 bytes of traffic per 16-bit value, 7 with a residual; 4 and 8 where y is written.
#include "rows.cuh"

namespace qk::cuda {
namespace {

// Shared memory of one call of row_sum().
using Place = float4[kWarps / 4];

// Sum over the threads that share a row. Every thread adds up the warps' sums: a tree of shuffles would take longer.
__device__ __forceinline__ float row_sum(float v, Place& place) {
  v = warp_sum(v);
  if (blockDim.x == 32) return v;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  float* of_warps = reinterpret_cast<float*>(place);
  if (lane == 0) of_warps[warp] = v;
  if (threadIdx.x >= warps && threadIdx.x < kWarps) of_warps[threadIdx.x] = 0.0f;
  __syncthreads();
  v = 0.0f;
#pragma unroll 2
  for (int i = 0; 4 * i < warps; ++i) {
    v = __fadd_rn(v, __fadd_rn(__fadd_rn(place[i].x, place[i].y), __fadd_rn(place[i].z, place[i].w)));
  }
  return v;
}

// The sum of a thread's values, or of their squares: four at a time, so that none waits for the one before it.
struct Sums {
  float of[4] = {};
  __device__ __forceinline__ void add(const float (&v)[kVector]) {
#pragma unroll
    for (int j = 0; j < kVector; ++j) of[j % 4] = __fadd_rn(of[j % 4], v[j]);
  }
  __device__ __forceinline__ void add_squares(const float (&v)[kVector]) {
#pragma unroll
    for (int j = 0; j < kVector; ++j) of[j % 4] = __fmaf_rn(v[j], v[j], of[j % 4]);
  }
  __device__ __forceinline__ float total() const { return __fadd_rn(__fadd_rn(of[0], of[1]), __fadd_rn(of[2], of[3])); }
};

// 1 / sqrt(mean + eps) of a sum of squares; NaN where the sum left fp32. `each`: 1 / K.
__device__ __forceinline__ float reciprocal_deviation(float squares, float each, float eps) {
  if (abs_bits(squares) >= kInfBits) return nan_value();
  return __frsqrt_rn(__fadd_rn(__fmul_rn(squares, each), eps));
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

// Whether registers are held down to those of two CTAs of kMostThreads: the more rows a multiprocessor holds, the more
// bytes are under way. Not where ptxas would spill them.
template <typename T, int kVectors, bool kLayer>
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kTwice = false;
#else
constexpr bool kTwice = kVectors == 4 && sizeof(T) == 2 && !kLayer;
#endif

// blockDim.x threads share a row, blockDim.y rows share a CTA (1 unless blockDim.x is a warp). What a thread does for
// its row alone, sums, quotients and barriers, takes about as long as eight values do: many rows have four vectors a
// thread, few as many threads as they have vectors.
template <typename T, int kVectors, bool kLayer>
__global__ void __launch_bounds__(kVectors <= 2 ? kManyThreads : kMostThreads, kTwice<T, kVectors, kLayer> ? 2 : 1)
    quantize_norm_kernel(const QuantizeNormArgs n) {
  __shared__ Place squares_of, sums_of;
  const QuantizeRowsArgs& a = n.codes;
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  const int step = blockDim.x * kVector, start = threadIdx.x * kVector, length = static_cast<int>(a.k);
  if (kVectors <= 2 && a.settled && row < a.m) ask_ahead<T, kVectors>(n, row, step, start);
  begin_rows(a);
  if (row >= a.m) return;
  const auto inside = [&](int i) { return i * step + start < length; };
  // What lies beyond the row is 0 throughout.
  const auto load = [&](Vector<T>& to, const void* from, int i) {
    if (inside(i)) {
      to.load(static_cast<const T*>(from) + (i * step + start));
    } else {
      to.clear();
    }
  };
  const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
  // The weight is read with x or, where its registers are needed, before a thread's sum of squares goes to the others:
  // behind that it would be a second wait for memory.
  constexpr bool kEarly = kVectors * sizeof(T) <= 4, kBefore = kEarly || (sizeof(T) == 2 && !kLayer);
  Vector<T> raw[kVectors], weight[kVectors];
  const bool narrow_weight = n.weight && (sizeof(T) == 4 || !n.wide_factors);
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    load(raw[i], x, i);
    if (kEarly && narrow_weight) load(weight[i], n.weight, i);
  }
  Row<kVectors> v;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) raw[i].widened(v[i]);
  if (n.residual) {
    const T* residual = static_cast<const T*>(n.residual) + row * n.residual_stride;
    T* total = static_cast<T*>(n.total) + row * a.k;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) load(raw[i], residual, i);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      float r[kVector];
      raw[i].widened(r);
#pragma unroll
      for (int j = 0; j < kVector; ++j) v[i][j] = __fadd_rn(v[i][j], r[j]);
      raw[i].narrow(v[i]);
      if (inside(i)) raw[i].store(total + (i * step + start));
      raw[i].widened(v[i]);
    }
  }
  const float each = __frcp_rn(static_cast<float>(length));
  if (kLayer) {
    Sums sums;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) sums.add(v[i]);
    const float mean = __fmul_rn(row_sum(sums.total(), sums_of), each);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (!inside(i)) continue;
#pragma unroll
      for (int j = 0; j < kVector; ++j) v[i][j] = __fsub_rn(v[i][j], mean);
    }
  }
  Sums squares;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) squares.add_squares(v[i]);
  if (kBefore && !kEarly && narrow_weight) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) load(weight[i], n.weight, i);
  }
  const float rstd = reciprocal_deviation(row_sum(squares.total(), squares_of), each, n.eps);
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
#pragma unroll
    for (int j = 0; j < kVector; ++j) v[i][j] = __fmul_rn(v[i][j], rstd);
  }
  // v[i][j] = apply(v[i][j], p[k]), of what `read` has read already or of p itself.
  const auto with = [&](const auto& read, const void* p, const auto& apply) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      float w[kVector] = {};
      if constexpr (!std::is_null_pointer_v<std::decay_t<decltype(read)>>) {
        read[i].widened(w);
      } else if (inside(i)) {
        load_parameters<T>(p, n.wide_factors, i * step + start, w);
      }
#pragma unroll
      for (int j = 0; j < kVector; ++j) v[i][j] = apply(v[i][j], w[j]);
    }
  };
  const auto multiply = [](float a, float b) { return __fmul_rn(a, b); };
  if (kBefore && narrow_weight) {
    with(weight, nullptr, multiply);
  } else if (n.weight) {
    with(nullptr, n.weight, multiply);
  }
  if (kLayer && n.bias) with(nullptr, n.bias, [](float a, float b) { return __fadd_rn(a, b); });
  finish_row<T, kVectors>(a, n.y, row, v);
}

// Any length, any alignment; the row is read several times.
template <typename T, bool kLayer>
__global__ void __launch_bounds__(1024) quantize_norm_scalar_kernel(const QuantizeNormArgs n) {
  __shared__ Place squares_of, sums_of;
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
  const float each = __frcp_rn(static_cast<float>(a.k));
  const float mean = kLayer ? __fmul_rn(sum, each) : 0.0f;
  if (kLayer) {
    sum = 0.0f;
    for (int64_t k = threadIdx.x; k < a.k; k += blockDim.x) {
      const float v = __fsub_rn(total(k), mean);
      sum = __fadd_rn(sum, __fmul_rn(v, v));
    }
    sum = row_sum(sum, squares_of);
  }
  const float rstd = reciprocal_deviation(sum, each, n.eps);
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
  if (take_four(n.codes)) {
    const LaunchShape shape = shape_of_vectors(n.codes, 4, kMostThreads).launch;
    return launch(quantize_norm_kernel<T, 4, kLayer>, shape, stream, name, n);
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
