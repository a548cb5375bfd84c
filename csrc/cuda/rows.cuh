// Rows that become 8-bit codes, or stay floats: what the kernels that keep a row in registers share.
//
//     one CTA per row (blockDim.y = 1), or one warp per row (blockDim.x = 32, several rows to a CTA)
//     thread t holds kVectors vectors of 8 values; vector i lies at k = (i * blockDim.x + t) * 8
//
// so a warp reads 512 contiguous bytes of 16-bit values and writes 256.
#pragma once

#include "host.h"
#include "launch.h"
#include "numeric.cuh"
#include "ptx.cuh"

namespace qk::cuda {

constexpr int kVector = 8;  // values a thread loads and stores at once
constexpr int kWarps = 32;  // most warps of a CTA
constexpr int kMostThreads = 512;  // of a CTA that keeps a row of up to 8 vectors a thread
constexpr int kManyThreads = 1024;  // of one that keeps up to 2: half the registers each

// How a kernel over rows begins. The product that follows fetches weights before it waits for the codes: as soon as
// this launch runs, or, where the kernel before may still be writing weights, once that one is complete.
__device__ __forceinline__ void begin_rows(const QuantizeRowsArgs& a) {
  if (a.settled) ptx::grid_launch_dependents();
  ptx::grid_dependency_wait();
  ptx::grid_launch_dependents();
}

// The same in every lane; a tree, so that the order of the additions is fixed.
__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int offset = 16; offset; offset /= 2) v = __fadd_rn(v, __shfl_xor_sync(0xffffffffu, v, offset));
  return v;
}

// The largest |x| (symmetric), or the largest x and the largest -x, both at least 0 (asymmetric); NaN where there is
// one.
struct Extremes {
  float high = 0.0f, low = 0.0f;

  template <bool kSymmetric>
  __device__ __forceinline__ void add(float v) {
    high = ptx::max_nan(high, kSymmetric ? fabsf(v) : v);
    if (!kSymmetric) low = ptx::max_nan(low, -v);
  }
};

// Of values that are at least 0, whose bits have their order, with Inf and NaN on top.
__device__ __forceinline__ float warp_max(float v) { return __uint_as_float(ptx::warp_max(__float_as_uint(v))); }

// Over the threads that share a row: the warp, or the whole CTA. Once in a kernel.
template <bool kSymmetric>
__device__ __forceinline__ Extremes reduce(Extremes e) {
  e.high = warp_max(e.high);
  if (!kSymmetric) e.low = warp_max(e.low);
  if (blockDim.x == 32) return e;
  __shared__ float highs[kWarps], lows[kWarps];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  if (lane == 0) {
    highs[warp] = e.high;
    if (!kSymmetric) lows[warp] = e.low;
  }
  __syncthreads();
  e.high = warp_max(lane < warps ? highs[lane] : 0.0f);
  if (!kSymmetric) e.low = warp_max(lane < warps ? lows[lane] : 0.0f);
  return e;
}

template <bool kSymmetric>
__device__ __forceinline__ Grid row_grid(const QuantizeRowsArgs& a, const Extremes& e) {
  const uint32_t absmax = max(__float_as_uint(e.high), __float_as_uint(e.low));
  if (a.is_static) {
    return static_grid(*a.static_scale, kSymmetric ? 0 : *a.static_zero_point, kSymmetric, absmax, false);
  }
  if (kSymmetric) return symmetric_grid(absmax, false);
  return asymmetric_grid(e.high, -e.low, absmax, false);
}

// The lowest bytes.
__device__ __forceinline__ uint32_t pack_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}

// Whether a row's grid clamps: no value of a row times its own 127 / absmax comes near 127.5, but a dead row's codes
// are 0 whatever it holds.
template <bool kSymmetric>
__device__ __forceinline__ bool clamps(const QuantizeRowsArgs& a, const Grid& grid) {
  return !kSymmetric || a.is_static || grid.low == grid.high;
}

// What is added to a code before it is stored as a byte.
template <bool kSymmetric>
__device__ __forceinline__ int32_t stored_shift(const QuantizeRowsArgs& a, const Grid& grid) {
  return kSymmetric ? 0 : grid.zero - (a.shifted ? kZeroShift : 0);
}

// Eight codes.
template <bool kClamp>
__device__ __forceinline__ void store_codes(int8_t* q, const float (&v)[kVector], const Grid& grid, int32_t shift) {
  uint32_t code[kVector];
#pragma unroll
  for (int j = 0; j < kVector; ++j) code[j] = code_bits<kClamp>(v[j], grid) + shift;
  *reinterpret_cast<uint2*>(q) =
      make_uint2(pack_bytes(code[0], code[1], code[2], code[3]), pack_bytes(code[4], code[5], code[6], code[7]));
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
      } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        v[i] = __uint_as_float(i % 2 ? w[i / 2] & 0xffff0000u : w[i / 2] << 16);
      } else {
        const uint16_t half = static_cast<uint16_t>(i % 2 ? w[i / 2] >> 16 : w[i / 2]);
        v[i] = widen(*reinterpret_cast<const T*>(&half));
      }
    }
  }
  // Eight values, each rounded once.
  __device__ __forceinline__ void narrow(const float (&v)[kVector]) {
    uint32_t* w = reinterpret_cast<uint32_t*>(words);
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(T) * 2); ++i) {
      if constexpr (sizeof(T) == 4) {
        w[i] = __float_as_uint(v[i]);
      } else {
        w[i] = pack_pair<T>(v[2 * i], v[2 * i + 1]);
      }
    }
  }
  __device__ __forceinline__ void store(T* p) const {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(T) / 2); ++i) reinterpret_cast<uint4*>(p)[i] = words[i];
  }
};

// Eight values at `p`, aligned, each rounded once.
template <typename T>
__device__ __forceinline__ void store_values(T* p, const float (&v)[kVector]) {
  Vector<T> out;
  out.narrow(v);
  out.store(p);
}

// Eight fp32 values at `p`, by way of the read-only cache.
__device__ __forceinline__ void load_factors(const float* p, float (&v)[kVector]) {
  const float4 a = __ldg(reinterpret_cast<const float4*>(p)), b = __ldg(reinterpret_cast<const float4*>(p) + 1);
  v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
}

// ---- Rows that were computed: fp32 values in registers to codes, or to the type of x -------------------------------

// The fp32 values of a row, vector i of thread t as drawn above; what lies beyond K is 0.
template <int kVectors>
using Row = float[kVectors][kVector];

template <bool kSymmetric, int kVectors>
__device__ __forceinline__ void store_row(const QuantizeRowsArgs& a, int64_t row, const Row<kVectors>& v) {
  Extremes extremes;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
#pragma unroll
    for (int j = 0; j < kVector; ++j) extremes.template add<kSymmetric>(v[i][j]);
  }
  const Grid grid = row_grid<kSymmetric>(a, reduce<kSymmetric>(extremes));
  if (threadIdx.x == 0) store_terms<kSymmetric>(a, row, grid);
  const int32_t shift = stored_shift<kSymmetric>(a, grid);
  int8_t* q = a.q + row * a.q_stride;
  const auto store = [&](auto clamp) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int k = (i * blockDim.x + threadIdx.x) * kVector;
      if (k < a.k) store_codes<decltype(clamp)::value>(q + k, v[i], grid, shift);
    }
  };
  clamps<kSymmetric>(a, grid) ? store(std::true_type()) : store(std::false_type());
}

// v * inv_smooth, then scale, zero point and codes of the row.
template <int kVectors>
__device__ __forceinline__ void quantize_row(const QuantizeRowsArgs& a, int64_t row, Row<kVectors>& v) {
  if (a.inv_smooth) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int k = (i * blockDim.x + threadIdx.x) * kVector;
      if (k >= a.k) break;
      float factors[kVector];
      load_factors(a.inv_smooth + k, factors);
#pragma unroll
      for (int j = 0; j < kVector; ++j) v[i][j] = __fmul_rn(v[i][j], factors[j]);
    }
  }
  if (a.zero_point) {
    store_row<false, kVectors>(a, row, v);
  } else {
    store_row<true, kVectors>(a, row, v);
  }
}

// The same for a row that does not fit into registers or is not aligned: `value(k)` is asked for each value twice.
template <bool kSymmetric, typename Value>
__device__ __forceinline__ void store_row_again(const QuantizeRowsArgs& a, int64_t row, const Value& value) {
  const auto smoothed = [&](int64_t k) {
    const float v = value(k);
    return a.inv_smooth ? __fmul_rn(v, a.inv_smooth[k]) : v;
  };
  Extremes extremes;
  for (int64_t k = threadIdx.x; k < a.k; k += blockDim.x) extremes.template add<kSymmetric>(smoothed(k));
  const Grid grid = row_grid<kSymmetric>(a, reduce<kSymmetric>(extremes));
  if (threadIdx.x == 0) store_terms<kSymmetric>(a, row, grid);
  const int32_t shift = stored_shift<kSymmetric>(a, grid);
  for (int64_t k = threadIdx.x; k < a.k; k += blockDim.x) {
    a.q[row * a.q_stride + k] = static_cast<int8_t>(code_bits(smoothed(k), grid) + shift);
  }
}

template <typename Value>
__device__ __forceinline__ void quantize_row_again(const QuantizeRowsArgs& a, int64_t row, const Value& value) {
  if (a.zero_point) {
    store_row_again<false>(a, row, value);
  } else {
    store_row_again<true>(a, row, value);
  }
}

// The end of a kernel that computes rows: themselves at `y` where that is given, else their codes.
template <typename T, int kVectors>
__device__ __forceinline__ void finish_row(const QuantizeRowsArgs& a, void* y, int64_t row, Row<kVectors>& v) {
  if (!y) return quantize_row<kVectors>(a, row, v);
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int k = (i * blockDim.x + threadIdx.x) * kVector;
    if (k >= a.k) break;
    store_values(static_cast<T*>(y) + row * a.k + k, v[i]);
  }
}

template <typename T, typename Value>
__device__ __forceinline__ void finish_row_again(const QuantizeRowsArgs& a, void* y, int64_t row, const Value& value) {
  if (!y) return quantize_row_again(a, row, value);
  T* out = static_cast<T*>(y) + row * a.k;
  for (int64_t k = threadIdx.x; k < a.k; k += blockDim.x) out[k] = narrow<T>(value(k));
}

// ---- Launches ------------------------------------------------------------------------------------------------------

inline bool aligned_to(const void* p, int64_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

// Whether a kernel that keeps rows of up to `longest` values in registers can take these codes; the caller asks the
// same of its other inputs.
inline bool vectors_fit(const QuantizeRowsArgs& a, int64_t longest) {
  return a.k % kVector == 0 && a.x_stride % kVector == 0 && a.q_stride % kVector == 0 && aligned_to(a.x, 16) &&
         aligned_to(a.q, kVector) && aligned_to(a.inv_smooth, 16) && a.k <= longest;
}

// run(T{}) for the type of the rows.
template <typename Run>
void for_type(DType dtype, const char* name, const Run& run) {
  switch (dtype) {
    case DType::kF32:
      return run(float{});
    case DType::kBF16:
      return run(__nv_bfloat16{});
    case DType::kF16:
      return run(__half{});
  }
  throw std::invalid_argument(std::string(name) + ": expected dtype 0, 1 or 2");
}

// Rows beside which none of the latencies of a single one counts.
inline bool many_rows(const QuantizeRowsArgs& a) { return a.m > 2 * multiprocessors(); }

// Whether rows take four vectors a thread: many, of more than two a lane where a warp has the row.
inline bool take_four(const QuantizeRowsArgs& a) { return many_rows(a) && a.k > 2 * 32 * kVector; }

struct RowShape {
  LaunchShape launch;
  int64_t each;  // vectors of a thread, rounded up
};

// Few rows: as many threads as there are vectors, for the shortest latency. Many rows: `wanted` vectors in flight a
// thread. More than `most_threads` threads there never are.
inline RowShape shape_of_vectors(const QuantizeRowsArgs& a, int64_t wanted, int64_t most_threads) {
  const int64_t per_row = a.k / kVector;
  if (!many_rows(a)) wanted = 1;
  int64_t threads = (per_row + wanted - 1) / wanted;
  threads = threads <= 32 ? 32 : threads >= most_threads ? most_threads : (threads + 31) / 32 * 32;
  const int rows = threads == 32 ? 4 : 1;
  RowShape shape;
  shape.each = (per_row + threads - 1) / threads;
  shape.launch.dependent = a.dependent;
  shape.launch.block = dim3(static_cast<unsigned>(threads), rows);
  shape.launch.grid = dim3(blocks(a.m, rows));
  return shape;
}

inline LaunchShape shape_of_scalars(const QuantizeRowsArgs& a) {
  LaunchShape shape;
  shape.dependent = a.dependent;
  shape.grid = dim3(static_cast<unsigned>(a.m));
  shape.block = dim3(a.k <= 1024 ? 128 : a.k <= 8192 ? 256 : 1024);
  return shape;
}

}  // namespace qk::cuda
