// Per-token quantization, the step before every W8A8 GEMM:
//
//   x'[m, k] = float(x[m, k]) * inv_smooth[k]          (one rounding; left out without smoothing)
//   scale[m], zero_point[m] from the row (or given), q[m, k] = clamp(rne(x' * inv) + zero_point)
//
// A row is read once and stays in registers: a thread holds kVectors vectors of 8 values, 8 * blockDim.x values apart,
// so a warp reads 512 contiguous bytes of 16-bit values and writes 256. The maximum runs over the bits of |x|, whose
// order as unsigned integers is the order of the values with Inf and NaN on top: one redux.sync per warp finds the
// scale and the rows that must become NaN. Short rows go several to a CTA, one warp each. Rows that are too long for
// registers, or not aligned, take a scalar kernel that reads them twice.
//
// Limit: 3 bytes of traffic per 16-bit value; the kernel has one block-wide barrier between its reads and its writes,
// and covers it with the other CTAs of the multiprocessor.
#include "rows.cuh"

namespace qk::cuda {
namespace {

// The eight values at k, smoothed where there are factors (which come from the L1 the second time).
template <bool kSmooth, typename T>
__device__ __forceinline__ void smoothed(const QuantizeRowsArgs& a, const Vector<T>& x, int64_t k,
                                         float (&v)[kVector]) {
  x.widened(v);
  if (kSmooth && k < a.k) {
    float factors[kVector];
    load_factors(a.inv_smooth + k, factors);
#pragma unroll
    for (int j = 0; j < kVector; ++j) v[j] = __fmul_rn(v[j], factors[j]);
  }
}

// blockDim.x threads share a row, blockDim.y rows share a CTA (1 unless blockDim.x is a warp). The row stays in
// registers as it came, half the registers of its floats: the more threads a multiprocessor holds, the more loads are
// under way while others wait at their barrier or write.
template <typename T, int kVectors, bool kSymmetric, bool kSmooth>
__global__ void __launch_bounds__(kMostThreads, kVectors <= 4 && !(kSmooth && kVectors == 4) ? 2 : 1)
    quantize_rows_kernel(const QuantizeRowsArgs a) {
  begin_rows(a);
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= a.m) return;
  const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
  const int step = blockDim.x * kVector, start = threadIdx.x * kVector;
  Vector<T> raw[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int k = i * step + start;
    if (k < a.k) {
      raw[i].load(x + k);
    } else {
      raw[i].clear();
    }
  }
  Extremes extremes;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    float v[kVector];
    smoothed<kSmooth>(a, raw[i], i * step + start, v);
#pragma unroll
    for (int j = 0; j < kVector; ++j) extremes.template add<kSymmetric>(v[j]);
  }
  const Grid grid = row_grid<kSymmetric>(a, reduce<kSymmetric>(extremes));
  if (threadIdx.x == 0) store_terms<kSymmetric>(a, row, grid);
  const int32_t shift = stored_shift<kSymmetric>(a, grid);
  int8_t* q = a.q + row * a.q_stride;
  const auto store = [&](auto clamp) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int k = i * step + start;
      if (k >= a.k) break;
      float v[kVector];
      raw[i].forget();
      smoothed<kSmooth>(a, raw[i], k, v);
      store_codes<decltype(clamp)::value>(q + k, v, grid, shift);
    }
  };
  clamps<kSymmetric>(a, grid) ? store(std::true_type()) : store(std::false_type());
}

// Any length, any alignment; the row is read twice.
template <typename T, bool kSymmetric>
__global__ void __launch_bounds__(1024) quantize_rows_scalar_kernel(const QuantizeRowsArgs a) {
  begin_rows(a);
  const int64_t row = blockIdx.x;
  const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
  store_row_again<kSymmetric>(a, row, [&](int64_t k) { return widen(x[k]); });
}

template <typename T, bool kSymmetric, bool kSmooth>
void run_vectors(const QuantizeRowsArgs& a, int64_t each, const LaunchShape& shape, cudaStream_t stream) {
  const char* name = "quantize_rows";
  if (each <= 1) return launch(quantize_rows_kernel<T, 1, kSymmetric, kSmooth>, shape, stream, name, a);
  if (each <= 2) return launch(quantize_rows_kernel<T, 2, kSymmetric, kSmooth>, shape, stream, name, a);
  if (each <= 4) return launch(quantize_rows_kernel<T, 4, kSymmetric, kSmooth>, shape, stream, name, a);
  return launch(quantize_rows_kernel<T, 8, kSymmetric, kSmooth>, shape, stream, name, a);
}

template <typename T, bool kSymmetric>
void run(const QuantizeRowsArgs& a, cudaStream_t stream) {
  if (!vectors_fit(a, kMostThreads * 8 * kVector)) {
    return launch(quantize_rows_scalar_kernel<T, kSymmetric>, shape_of_scalars(a), stream, "quantize_rows", a);
  }
  const auto [shape, each] = shape_of_vectors(a, 4, kMostThreads);
  return a.inv_smooth ? run_vectors<T, kSymmetric, true>(a, each, shape, stream)
                      : run_vectors<T, kSymmetric, false>(a, each, shape, stream);
}

template <typename T>
void run(const QuantizeRowsArgs& a, cudaStream_t stream) {
  return a.zero_point ? run<T, false>(a, stream) : run<T, true>(a, stream);
}

}  // namespace

void quantize_rows(const QuantizeRowsArgs& args, cudaStream_t stream) {
  if (args.m == 0) return;
  for_type(args.x_dtype, "quantize_rows", [&](auto type) { run<decltype(type)>(args, stream); });
}

}  // namespace qk::cuda
