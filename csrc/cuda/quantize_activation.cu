// An activation, the product with a second tensor, and quantization of rows in one pass: what stands before the last
// Linear of a feed-forward block. Or without the quantization.
//
//   y[m, k] = activation(x[m, k]) * up[m, k]                           SiLU, GELU (erf, tanh), ReLU; up may be absent
//   y' = y * inv_smooth; scale, zero point and codes of y' as in quantize_rows; or y, rounded to the dtype of x
//
// Both inputs are read once; products stay in registers in fp32 (rows.cuh). SiLU and the GELU by tanh are x / (1 +
// exp(-z)), with z = x and z = 2 sqrt(2 / pi) (x + 0.044715 x^3); the other GELU is x / 2 (1 + erf(x / sqrt 2)). Each
// is within 2^-21 |x| of the true value.
//
// Limit: 3 bytes of traffic per 16-bit value, 5 with a second tensor; 4 and 6 where y is written.
#include "rows.cuh"

namespace qk::cuda {
namespace {

// 1 / (1 + e^-z), its two functions within 2 ulp. What is flushed to zero is lost beside the 1 in any case.
__device__ __forceinline__ float sigmoid(float z) {
  return ptx::reciprocal(__fadd_rn(1.0f, ptx::exp2(__fmul_rn(z, -1.44269504f))));
}

// x / 2 (1 + erf(x / sqrt 2)) = (x + |x|) / 2 - |x| erfc(|x| / sqrt 2) / 2: half of erfc is 2^p, p a polynomial fitted
// for the smallest largest error of that power, 0.31 * 2^-21 in all with what is rounded. Beyond 8 it is nothing in
// fp32.
__device__ __forceinline__ float gelu(float x) {
  constexpr float kPolynomial[] = {1.9201383e-05f, -0.0006588079f, 0.007754978f, -0.052966118f,
                                   -0.45905983f,   -1.1511222f,    -0.9999997f};
  const float at = fminf(fabsf(x), 8.0f);
  float p = kPolynomial[0];
#pragma unroll
  for (int i = 1; i < 7; ++i) p = __fmaf_rn(p, at, kPolynomial[i]);
  return __fmaf_rn(-at, ptx::exp2(p), __fmaf_rn(0.5f, x, __fmul_rn(0.5f, fabsf(x))));
}

template <Activation kKind>
__device__ __forceinline__ float activated(float x) {
  if constexpr (kKind == Activation::kRelu) {
    return x < 0.0f ? 0.0f : x;  // NaN stays
  } else if constexpr (kKind == Activation::kGelu) {
    return gelu(x);
  } else if constexpr (kKind == Activation::kGeluTanh) {
    const float cube = __fmul_rn(__fmul_rn(x, x), x);
    return __fmul_rn(x, sigmoid(__fmul_rn(1.59576912f, __fadd_rn(x, __fmul_rn(0.044715f, cube)))));
  } else if constexpr (kKind == Activation::kSilu) {
    return __fmul_rn(x, sigmoid(x));
  } else {
    return x;
  }
}

// run(std::integral_constant<Activation, kind>()): asked once for some values, not at each.
template <typename Run>
__device__ __forceinline__ void for_activation(Activation kind, const Run& run) {
  switch (kind) {
    case Activation::kRelu:
      return run(std::integral_constant<Activation, Activation::kRelu>());
    case Activation::kGelu:
      return run(std::integral_constant<Activation, Activation::kGelu>());
    case Activation::kGeluTanh:
      return run(std::integral_constant<Activation, Activation::kGeluTanh>());
    case Activation::kSilu:
      return run(std::integral_constant<Activation, Activation::kSilu>());
    default:
      return run(std::integral_constant<Activation, Activation::kNone>());
  }
}

template <typename T, int kVectors, bool kGated>
__global__ void __launch_bounds__(kVectors <= 2 ? kManyThreads : kMostThreads, kVectors == 4 && sizeof(T) == 2 ? 2 : 1)
    quantize_activation_kernel(const QuantizeActivationArgs n) {
  begin_rows(n.codes);
  const QuantizeRowsArgs& a = n.codes;
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= a.m) return;
  const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
  const T* up = static_cast<const T*>(n.up) + row * n.up_stride;
  const int step = blockDim.x * kVector, start = threadIdx.x * kVector;
  Row<kVectors> v;
  Vector<T> gates[kVectors], ups[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int k = i * step + start;
    gates[i].clear();
    ups[i].clear();
    if (k < a.k) {
      gates[i].load(x + k);
      if (kGated) ups[i].load(up + k);
    }
  }
  constexpr int kAtOnce = kVectors <= 4 ? kVectors : 1;  // eight would take more registers than there are
#pragma unroll
  for (int first = 0; first < kVectors; first += kAtOnce) {
    for_activation(n.activation, [&](auto kind) {
#pragma unroll
      for (int i = first; i < first + kAtOnce; ++i) {
        gates[i].widened(v[i]);
#pragma unroll
        for (int j = 0; j < kVector; ++j) v[i][j] = activated<decltype(kind)::value>(v[i][j]);
        if (kGated) {
          float u[kVector];
          ups[i].widened(u);
#pragma unroll
          for (int j = 0; j < kVector; ++j) v[i][j] = __fmul_rn(v[i][j], u[j]);
        }
      }
    });
  }
  finish_row<T, kVectors>(a, n.y, row, v);
}

// Any length, any alignment; the row is read and computed twice.
template <typename T, bool kGated>
__global__ void __launch_bounds__(1024) quantize_activation_scalar_kernel(const QuantizeActivationArgs n) {
  begin_rows(n.codes);
  const int64_t row = blockIdx.x;
  const T* x = static_cast<const T*>(n.codes.x) + row * n.codes.x_stride;
  const T* up = static_cast<const T*>(n.up) + row * n.up_stride;
  for_activation(n.activation, [&](auto kind) {
    finish_row_again<T>(n.codes, n.y, row, [&](int64_t k) {
      const float v = activated<decltype(kind)::value>(widen(x[k]));
      return kGated ? __fmul_rn(v, widen(up[k])) : v;
    });
  });
}

// Values that are not quantized need no CTA that sees a whole row: few rows become more and shorter ones, so that more
// multiprocessors load them.
QuantizeActivationArgs in_pieces(QuantizeActivationArgs n) {
  QuantizeRowsArgs& a = n.codes;
  const bool contiguous = a.m == 1 || (a.x_stride == a.k && (!n.up || n.up_stride == a.k));
  if (!n.y || !contiguous || a.m >= multiprocessors()) return n;
  for (const int64_t piece : {1024, 512, 256}) {
    if (a.k % piece) continue;
    a.m *= a.k / piece;
    a.k = a.x_stride = n.up_stride = piece;
    break;
  }
  return n;
}

template <typename T, bool kGated>
void run(const QuantizeActivationArgs& n, cudaStream_t stream) {
  const char* name = "quantize_activation";
  constexpr int64_t kShort = kManyThreads * 2 * kVector;
  constexpr int64_t kLongest = sizeof(T) == 2 ? kMostThreads * 8 * kVector : kShort;  // fp32 takes twice the registers
  if (!vectors_fit(n.codes, kLongest) || n.up_stride % kVector || !aligned_to(n.up, 16) || !aligned_to(n.y, 16)) {
    return launch(quantize_activation_scalar_kernel<T, kGated>, shape_of_scalars(n.codes), stream, name, n);
  }
  if constexpr (kLongest > kShort) {
    if (n.codes.k > kShort) {
      const LaunchShape shape = shape_of_vectors(n.codes, 8, kMostThreads).launch;
      return launch(quantize_activation_kernel<T, 8, kGated>, shape, stream, name, n);
    }
  }
  if (take_four(n.codes)) {
    const LaunchShape shape = shape_of_vectors(n.codes, 4, kMostThreads).launch;
    return launch(quantize_activation_kernel<T, 4, kGated>, shape, stream, name, n);
  }
  const auto [shape, each] = shape_of_vectors(n.codes, 2, kManyThreads);
  if (each <= 1) return launch(quantize_activation_kernel<T, 1, kGated>, shape, stream, name, n);
  return launch(quantize_activation_kernel<T, 2, kGated>, shape, stream, name, n);
}

template <typename T>
void run(const QuantizeActivationArgs& n, cudaStream_t stream) {
  return n.up ? run<T, true>(in_pieces(n), stream) : run<T, false>(in_pieces(n), stream);
}

}  // namespace

void quantize_activation(const QuantizeActivationArgs& args, cudaStream_t stream) {
  if (args.codes.m == 0) return;
  for_type(args.codes.x_dtype, "quantize_activation", [&](auto type) { run<decltype(type)>(args, stream); });
}

}  // namespace qk::cuda
