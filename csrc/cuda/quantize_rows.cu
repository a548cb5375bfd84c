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
#include "host.h"
#include "launch.h"
#include "numeric.cuh"
#include "ptx.cuh"

namespace qk::cuda {
namespace {

constexpr int kVector = 8;  // values a thread loads and stores at once
constexpr int kWarps = 32;  // most warps of a CTA of the scalar kernel
constexpr int kMostThreads = 512;  // of the vector kernel

// Bits of the largest |x| (symmetric), or of the largest x and the largest -x, both at least 0 (asymmetric).
struct Extremes {
  uint32_t high = 0, low = 0;

  template <bool kSymmetric>
  __device__ __forceinline__ void add(float v) {
    const uint32_t bits = abs_bits(v);
    if (kSymmetric || __float_as_int(v) >= 0) {
      high = max(high, bits);
    } else {
      low = max(low, bits);
    }
  }
};

// Over the threads that share a row: the warp, or the whole CTA.
template <bool kSymmetric>
__device__ __forceinline__ Extremes reduce(Extremes e) {
  e.high = ptx::warp_max(e.high);
  if (!kSymmetric) e.low = ptx::warp_max(e.low);
  if (blockDim.x == 32) return e;
  __shared__ uint32_t highs[kWarps], lows[kWarps];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  if (lane == 0) {
    highs[warp] = e.high;
    if (!kSymmetric) lows[warp] = e.low;
  }
  __syncthreads();
  e.high = ptx::warp_max(lane < warps ? highs[lane] : 0);
  if (!kSymmetric) e.low = ptx::warp_max(lane < warps ? lows[lane] : 0);
  return e;
}

template <bool kSymmetric>
__device__ __forceinline__ Grid row_grid(const QuantizeRowsArgs& a, const Extremes& e) {
  const uint32_t absmax = max(e.high, e.low);
  if (a.is_static) {
    return static_grid(*a.static_scale, kSymmetric ? 0 : *a.static_zero_point, kSymmetric, absmax, false);
  }
  if (kSymmetric) return symmetric_grid(absmax, false);
  return asymmetric_grid(__uint_as_float(e.high), -__uint_as_float(e.low), absmax, false);
}

// What is added to a code before it is stored as a byte.
template <bool kSymmetric>
__device__ __forceinline__ int32_t stored_shift(const QuantizeRowsArgs& a) {
  return !kSymmetric && a.shifted ? -kZeroShift : 0;
}

template <bool kSymmetric>
__device__ __forceinline__ void store_terms(const QuantizeRowsArgs& a, int64_t row, const Grid& grid) {
  a.scale[row] = grid.scale;
  if (!kSymmetric) a.zero_point[row] = grid.zero;
}

// Eight values as they lie in memory: four words of 16-bit values, eight of fp32.
template <typename T>
struct Vector {
  uint4 words[sizeof(T) / 2];

  __device__ __forceinline__ void load(const T* p) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(T) / 2); ++i) words[i] = reinterpret_cast<const uint4*>(p)[i];
  }
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(T) / 2); ++i) words[i] = make_uint4(0, 0, 0, 0);
  }
  // Forgets that these words were widened before: keeping the floats would take twice the registers.
  __device__ __forceinline__ void forget() {
    uint32_t* w = reinterpret_cast<uint32_t*>(words);
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(T) * 2); ++i) asm volatile("" : "+r"(w[i]));
  }
  __device__ __forceinline__ void widened(float (&v)[kVector]) const {
    const uint32_t* w = reinterpret_cast<const uint32_t*>(words);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if constexpr (sizeof(T) == 4) {
        v[i] = __uint_as_float(w[i]);
      } else {
        const uint16_t half = static_cast<uint16_t>(i % 2 ? w[i / 2] >> 16 : w[i / 2]);
        v[i] = widen(*reinterpret_cast<const T*>(&half));
      }
    }
  }
};

// The eight values at k, smoothed where there are factors (which come from the L1 the second time).
template <bool kSmooth, typename T>
__device__ __forceinline__ void smoothed(const QuantizeRowsArgs& a, const Vector<T>& x, int64_t k,
                                         float (&v)[kVector]) {
  x.widened(v);
  if (kSmooth && k < a.k) {
    const float4* s = reinterpret_cast<const float4*>(a.inv_smooth + k);
    const float4 s0 = __ldg(s), s1 = __ldg(s + 1);
    const float factors[kVector] = {s0.x, s0.y, s0.z, s0.w, s1.x, s1.y, s1.z, s1.w};
#pragma unroll
    for (int j = 0; j < kVector; ++j) v[j] = __fmul_rn(v[j], factors[j]);
  }
}

__device__ __forceinline__ uint32_t pack_bytes(int32_t a, int32_t b, int32_t c, int32_t d) {
  return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}

// blockDim.x threads share a row, blockDim.y rows share a CTA (1 unless blockDim.x is a warp). The row stays in
// registers as it came, half the registers of its floats: the more threads a multiprocessor holds, the more loads are
// under way while others wait at their barrier or write.
template <typename T, int kVectors, bool kSymmetric, bool kSmooth>
__global__ void __launch_bounds__(kMostThreads, kVectors <= 4 && !(kSmooth && kVectors == 4) ? 2 : 1)
    quantize_rows_kernel(const QuantizeRowsArgs a) {
  ptx::grid_dependency_wait();
  ptx::grid_launch_dependents();
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
  const int32_t shift = stored_shift<kSymmetric>(a);
  int8_t* q = a.q + row * a.q_stride;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int k = i * step + start;
    if (k >= a.k) break;
    float v[kVector];
    raw[i].forget();
    smoothed<kSmooth>(a, raw[i], k, v);
    int32_t code[kVector];
#pragma unroll
    for (int j = 0; j < kVector; ++j) code[j] = to_code(v[j], grid) + shift;
    *reinterpret_cast<uint2*>(q + k) =
        make_uint2(pack_bytes(code[0], code[1], code[2], code[3]), pack_bytes(code[4], code[5], code[6], code[7]));
  }
}

template <typename T>
__device__ __forceinline__ float load_scalar(const QuantizeRowsArgs& a, const T* x, int64_t k) {
  const float v = widen(x[k]);
  return a.inv_smooth ? __fmul_rn(v, a.inv_smooth[k]) : v;
}

// Any length, any alignment; the row is read twice.
template <typename T, bool kSymmetric>
__global__ void __launch_bounds__(1024) quantize_rows_scalar_kernel(const QuantizeRowsArgs a) {
  ptx::grid_dependency_wait();
  ptx::grid_launch_dependents();
  const int64_t row = blockIdx.x;
  const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
  Extremes extremes;
  for (int64_t k = threadIdx.x; k < a.k; k += blockDim.x) extremes.template add<kSymmetric>(load_scalar(a, x, k));
  const Grid grid = row_grid<kSymmetric>(a, reduce<kSymmetric>(extremes));
  if (threadIdx.x == 0) store_terms<kSymmetric>(a, row, grid);
  const int32_t shift = stored_shift<kSymmetric>(a);
  for (int64_t k = threadIdx.x; k < a.k; k += blockDim.x) {
    a.q[row * a.q_stride + k] = static_cast<int8_t>(to_code(load_scalar(a, x, k), grid) + shift);
  }
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
  const auto aligned = [](const void* p, int64_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; };
  const bool vectors = a.k % kVector == 0 && a.x_stride % kVector == 0 && a.q_stride % kVector == 0 &&
                       aligned(a.x, 16) && aligned(a.q, kVector) && aligned(a.inv_smooth, 16) &&
                       a.k <= kMostThreads * 8 * kVector;
  LaunchShape shape;
  shape.dependent = a.dependent;
  if (!vectors) {
    shape.grid = dim3(static_cast<unsigned>(a.m));
    shape.block = dim3(a.k <= 1024 ? 128 : a.k <= 8192 ? 256 : 1024);
    return launch(quantize_rows_scalar_kernel<T, kSymmetric>, shape, stream, "quantize_rows", a);
  }
  // Few rows: as many threads as there are vectors, for the shortest latency. Many rows: four vectors in flight a
  // thread.
  const int64_t per_row = a.k / kVector;
  const int wanted = a.m <= 2 * multiprocessors() ? 1 : 4;
  int64_t threads = (per_row + wanted - 1) / wanted;
  threads = threads <= 32 ? 32 : threads >= kMostThreads ? kMostThreads : (threads + 31) / 32 * 32;
  const int64_t each = (per_row + threads - 1) / threads;
  const int rows = threads == 32 ? 4 : 1;
  shape.block = dim3(static_cast<unsigned>(threads), rows);
  shape.grid = dim3(blocks(a.m, rows));
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
  switch (args.x_dtype) {
    case DType::kF32:
      return run<float>(args, stream);
    case DType::kBF16:
      return run<__nv_bfloat16>(args, stream);
    case DType::kF16:
      return run<__half>(args, stream);
  }
  throw std::invalid_argument("quantize_rows: expected dtype 0, 1 or 2");
}

}  // namespace qk::cuda
