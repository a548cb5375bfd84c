// Quantize and dequantize at every granularity of csrc/args.h: x seen as [outer, channels, inner], granules per
// channel, or groups of `group` values along inner. Formulas: numeric.cuh.
//
//   granule = `runs` pieces of `length` contiguous values:      per channel   outer pieces of inner values
//                                                               per group     one piece of up to `group` values
//
// Measured scales take two kernels: the first reduces the extremes of every granule with atomicMax on their bits, whose
// order is that of the values (exact, so the order of the atomics does not matter); the second rounds. Granules that
// are whole rows go to quantize_rows, which reads x once. Both kernels spread a granule over several CTAs (blockIdx.y).
#include "host.h"
#include "launch.h"
#include "numeric.cuh"
#include "ptx.cuh"

namespace qk::cuda {
namespace {

constexpr int kThreads = 256;

// Where granules lie. Offsets are 64-bit: a tensor may hold more than 2^31 values, though not as many granules.
struct Granules {
  int64_t count, channels, inner, group;  // group 0: per channel
  int64_t runs;
  uint32_t per_row;  // granules of a row; 1 without groups

  // Values of a piece, and the offset of piece `run` of granule `at`.
  __device__ __forceinline__ int64_t length(int64_t at) const {
    return group ? min(group, inner - static_cast<uint32_t>(at) % per_row * group) : inner;
  }
  __device__ __forceinline__ int64_t offset(int64_t at, int64_t run) const {
    const uint32_t row = static_cast<uint32_t>(at) / per_row, place = static_cast<uint32_t>(at) % per_row;
    return group ? row * inner + place * group : (run * channels + at) * inner;
  }
  // Byte offset of the same piece where two values share a byte and every row of `inner` starts on a byte.
  __device__ __forceinline__ int64_t nibble_offset(int64_t at, int64_t run) const {
    const uint32_t row = static_cast<uint32_t>(at) / per_row, place = static_cast<uint32_t>(at) % per_row;
    const int64_t bytes = (inner + 1) / 2;
    return group ? row * bytes + place * group / 2 : (run * channels + at) * bytes;
  }
};

struct Job {
  Granules granules;
  uint32_t* stats;  // [2 * count]: bits of the largest value and of the largest negated value, from 0
  float* scale;
  int32_t* zero_point;  // nullptr: symmetric
  bool is_static, four_bits;
};

template <typename T>
__global__ void __launch_bounds__(kThreads) extremes_kernel(const T* __restrict__ x, const Job job) {
  __shared__ uint32_t highs[kThreads / 32], lows[kThreads / 32];
  const Granules& g = job.granules;
  for (int64_t at = blockIdx.x; at < g.count; at += gridDim.x) {
    uint32_t high = 0, low = 0;
    const int64_t length = g.length(at), total = g.runs * length;
    for (int64_t i = int64_t(blockIdx.y) * kThreads + threadIdx.x; i < total; i += int64_t(gridDim.y) * kThreads) {
      const int64_t run = g.runs == 1 ? 0 : i / length;
      const float v = widen(x[g.offset(at, run) + (i - run * length)]);
      if (__float_as_int(v) >= 0) {
        high = max(high, abs_bits(v));
      } else {
        low = max(low, abs_bits(v));
      }
    }
    high = ptx::warp_max(high);
    low = ptx::warp_max(low);
    if ((threadIdx.x & 31) == 0) highs[threadIdx.x / 32] = high, lows[threadIdx.x / 32] = low;
    __syncthreads();
    if (threadIdx.x < kThreads / 32) {
      atomicMax(job.stats + 2 * at, highs[threadIdx.x]);
      atomicMax(job.stats + 2 * at + 1, lows[threadIdx.x]);
    }
    __syncthreads();
  }
}

__device__ __forceinline__ Grid grid_of(const Job& job, int64_t at) {
  const uint32_t high = job.stats[2 * at], low = job.stats[2 * at + 1], absmax = max(high, low);
  if (job.is_static) {
    return static_grid(job.scale[at], job.zero_point ? job.zero_point[at] : 0, !job.zero_point, absmax, job.four_bits);
  }
  if (!job.zero_point) return symmetric_grid(absmax, job.four_bits);
  return asymmetric_grid(__uint_as_float(high), -__uint_as_float(low), absmax, job.four_bits);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) round_kernel(const T* __restrict__ x, void* q, const Job job) {
  const Granules& g = job.granules;
  for (int64_t at = blockIdx.x; at < g.count; at += gridDim.x) {
    const Grid grid = grid_of(job, at);
    // A given scale stays, but becomes NaN where the values are not finite: others may still read it, to no effect.
    if (blockIdx.y == 0 && threadIdx.x == 0 && (!job.is_static || isnan(grid.scale))) {
      job.scale[at] = grid.scale;
      if (job.zero_point) job.zero_point[at] = grid.zero;
    }
    const int64_t length = g.length(at), step = int64_t(gridDim.y) * kThreads;
    if (job.four_bits) {
      const int64_t bytes = (length + 1) / 2, total = g.runs * bytes;
      for (int64_t i = int64_t(blockIdx.y) * kThreads + threadIdx.x; i < total; i += step) {
        const int64_t run = g.runs == 1 ? 0 : i / bytes, byte = i - run * bytes;
        const T* from = x + g.offset(at, run) + 2 * byte;
        const int32_t low = to_code(widen(from[0]), grid);
        const int32_t high = 2 * byte + 1 < length ? to_code(widen(from[1]), grid) : 0;
        static_cast<uint8_t*>(q)[g.nibble_offset(at, run) + byte] = static_cast<uint8_t>(low | high << 4);
      }
    } else {
      const int64_t total = g.runs * length;
      for (int64_t i = int64_t(blockIdx.y) * kThreads + threadIdx.x; i < total; i += step) {
        const int64_t run = g.runs == 1 ? 0 : i / length, place = g.offset(at, run) + (i - run * length);
        static_cast<uint8_t*>(q)[place] = static_cast<uint8_t>(to_code(widen(x[place]), grid));
      }
    }
  }
}

// out = scale * float(q - zero_point), rounded once in fp32 and once to the output dtype.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    dequantize_kernel(const void* __restrict__ q, QKind kind, const Granules g, const float* __restrict__ scale,
                      const int32_t* __restrict__ zero_point, T* __restrict__ out) {
  for (int64_t at = blockIdx.x; at < g.count; at += gridDim.x) {
    const float s = scale[at];
    const int32_t zero = zero_point ? zero_point[at] : kind == QKind::kInt4 ? 8 : 0;  // symmetric codes
    const int64_t length = g.length(at), total = g.runs * length;
    for (int64_t i = int64_t(blockIdx.y) * kThreads + threadIdx.x; i < total; i += int64_t(gridDim.y) * kThreads) {
      const int64_t run = g.runs == 1 ? 0 : i / length, inside = i - run * length, place = g.offset(at, run) + inside;
      int32_t code;
      if (kind == QKind::kInt8) {
        code = static_cast<const int8_t*>(q)[place];
      } else if (kind == QKind::kUint8) {
        code = static_cast<const uint8_t*>(q)[place];
      } else {
        const uint8_t pair = static_cast<const uint8_t*>(q)[g.nibble_offset(at, run) + inside / 2];
        code = inside % 2 ? pair >> 4 : pair & 15;
      }
      out[place] = narrow<T>(__fmul_rn(s, __int2float_rn(code - zero)));
    }
  }
}

template <typename A>
Granules granules_of(const A& a) {
  Granules g;
  g.channels = a.channels;
  g.inner = a.inner;
  g.group = a.group;
  g.runs = a.group ? 1 : a.outer;
  const int64_t per_row = a.group ? (a.inner + a.group - 1) / a.group : 1;
  g.count = a.channels * per_row;
  if (g.count > int64_t{0x7fffffff}) {
    throw std::invalid_argument("expected at most 2^31 - 1 granules, got " + std::to_string(g.count));
  }
  g.per_row = static_cast<uint32_t>(per_row);
  return g;
}

// Enough CTAs to fill the chip: granules along x, pieces of one along y.
LaunchShape shape_for(const Granules& g) {
  const int64_t length = g.runs * (g.group ? g.group : g.inner), fill = int64_t(multiprocessors()) * 8;
  const int64_t x = g.count < fill ? g.count : fill, most = (length + kThreads - 1) / kThreads;
  int64_t y = fill / x;
  y = y > most ? most : y;
  LaunchShape shape;
  shape.block = dim3(kThreads);
  shape.grid = dim3(static_cast<unsigned>(x), static_cast<unsigned>(y < 1 ? 1 : y));
  return shape;
}

template <typename T>
void run(const QuantizeArgs& a, uint32_t* stats, cudaStream_t stream) {
  const Granules g = granules_of(a);
  const Job job = {g, stats, a.scale, a.zero_point, a.is_static, a.kind == QKind::kInt4};
  const T* x = static_cast<const T*>(a.x);
  launch(extremes_kernel<T>, shape_for(g), stream, "quantize: extremes", x, job);
  launch(round_kernel<T>, shape_for(g), stream, "quantize: round", x, a.q, job);
}

template <typename T>
void run(const DequantizeArgs& a, cudaStream_t stream) {
  const Granules g = granules_of(a);
  launch(dequantize_kernel<T>, shape_for(g), stream, "dequantize", a.q, a.kind, g, a.scale, a.zero_point,
         static_cast<T*>(a.out));
}

}  // namespace

void quantize(const QuantizeArgs& a, uint32_t* stats, cudaStream_t stream) {
  if (a.outer == 0 || a.channels == 0 || a.inner == 0) return;
  if (a.kind == QKind::kInt4 && a.group % 2) {
    throw std::invalid_argument("group: two 4-bit values share a byte, expected an even size, got " +
                                std::to_string(a.group));
  }
  const int64_t row = a.group ? a.group : a.inner;
  if (a.outer == 1 && !a.is_static && a.kind != QKind::kInt4 && a.inner % row == 0) {
    QuantizeRowsArgs rows = {};
    rows.x = a.x, rows.x_dtype = a.x_dtype;
    rows.m = a.channels * (a.inner / row), rows.k = row, rows.x_stride = row;
    rows.q = static_cast<int8_t*>(a.q), rows.q_stride = row;
    rows.scale = a.scale, rows.zero_point = a.symmetric ? nullptr : a.zero_point;
    if (rows.m >= multiprocessors()) return quantize_rows(rows, stream);  // else one CTA a row is too few
  }
  QuantizeArgs args = a;
  if (a.symmetric) args.zero_point = nullptr;
  switch (a.x_dtype) {
    case DType::kF32:
      return run<float>(args, stats, stream);
    case DType::kBF16:
      return run<__nv_bfloat16>(args, stats, stream);
    case DType::kF16:
      return run<__half>(args, stats, stream);
  }
  throw std::invalid_argument("quantize: expected dtype 0, 1 or 2");
}

void dequantize(const DequantizeArgs& a, cudaStream_t stream) {
  if (a.outer == 0 || a.channels == 0 || a.inner == 0) return;
  switch (a.out_dtype) {
    case DType::kF32:
      return run<float>(a, stream);
    case DType::kBF16:
      return run<__nv_bfloat16>(a, stream);
    case DType::kF16:
      return run<__half>(a, stream);
  }
  throw std::invalid_argument("dequantize: expected dtype 0, 1 or 2");
}

}  // namespace qk::cuda
