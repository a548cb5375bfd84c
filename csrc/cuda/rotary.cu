// Rotary embedding of queries and keys: what takes ten launches by the parts. Each product and each sum is rounded to
// the dtype, as those launches do, so that the results are equal to the bit.
//
// One CTA per token; a thread takes eight features of the first half of a head and the eight they turn with.
#include "attention.h"
#include "rows.cuh"

namespace qk::cuda {
namespace {

constexpr int kMostThreads = 256;

// a * cos +- b * sin; negating a product is exact, so the sign may go to the sum.
template <typename T, bool kFirst>
__device__ __forceinline__ float turned(float own, float other, float cos, float sin) {
  const float straight = rounded<T>(__fmul_rn(own, cos)), across = rounded<T>(__fmul_rn(other, sin));
  return kFirst ? __fsub_rn(straight, across) : __fadd_rn(straight, across);
}

struct Place {
  const void* x;
  void* y;
  int head;
  HeadStrides x_at, y_at;
};

__device__ __forceinline__ Place place_of(const RotaryArgs& a, int head) {
  if (head < a.heads) return {a.q, a.q_out, head, a.q_at, a.q_out_at};
  return {a.k, a.k_out, head - a.heads, a.k_at, a.k_out_at};
}

template <typename T, bool kVectors>
__global__ void __launch_bounds__(kMostThreads) rotary_kernel(const RotaryArgs a) {
  ptx::grid_dependency_wait();
  ptx::grid_launch_dependents();
  const int batch = blockIdx.x / a.tokens, token = blockIdx.x % a.tokens, half = a.size / 2;
  const int each = kVectors ? kVector : 1, pieces = half / each, items = (a.heads + a.key_heads) * pieces;
  const int64_t angle = batch * a.angles.batch + token * a.angles.token;
  const T* cos = static_cast<const T*>(a.cos) + angle;
  const T* sin = static_cast<const T*>(a.sin) + angle;
  for (int item = blockIdx.y * blockDim.x + threadIdx.x; item < items; item += gridDim.y * blockDim.x) {
    const Place p = place_of(a, item / pieces);
    const int i = item % pieces * each;
    const T* x = static_cast<const T*>(p.x) + batch * p.x_at.batch + p.head * p.x_at.head + token * p.x_at.token + i;
    T* y = static_cast<T*>(p.y) + batch * p.y_at.batch + p.head * p.y_at.head + token * p.y_at.token + i;
    if constexpr (kVectors) {
      Vector<T> words[6];
      words[0].load(x), words[1].load(x + half);
      words[2].load(cos + i), words[3].load(cos + i + half), words[4].load(sin + i), words[5].load(sin + i + half);
      float low[kVector], high[kVector], c[2][kVector], s[2][kVector];
      words[0].widened(low), words[1].widened(high);
      words[2].widened(c[0]), words[3].widened(c[1]), words[4].widened(s[0]), words[5].widened(s[1]);
      float first[kVector], second[kVector];
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        first[j] = turned<T, true>(low[j], high[j], c[0][j], s[0][j]);
        second[j] = turned<T, false>(high[j], low[j], c[1][j], s[1][j]);
      }
      store_values(y, first);
      store_values(y + half, second);
    } else {
      const float low = widen(x[0]), high = widen(x[half]);
      y[0] = narrow<T>(turned<T, true>(low, high, widen(cos[i]), widen(sin[i])));
      y[half] = narrow<T>(turned<T, false>(high, low, widen(cos[i + half]), widen(sin[i + half])));
    }
  }
}

bool in_vectors(const HeadStrides& at) {
  return at.batch % kVector == 0 && at.head % kVector == 0 && at.token % kVector == 0;
}

template <typename T>
void run(const RotaryArgs& a, cudaStream_t stream) {
  bool vectors = a.size % (2 * kVector) == 0;
  for (const void* p : {a.q, a.k, a.cos, a.sin, static_cast<const void*>(a.q_out), static_cast<const void*>(a.k_out)}) {
    vectors = vectors && aligned_to(p, 16);
  }
  for (const HeadStrides& at : {a.q_at, a.k_at, a.q_out_at, a.k_out_at}) vectors = vectors && in_vectors(at);
  vectors = vectors && a.angles.batch % kVector == 0 && a.angles.token % kVector == 0;
  const int64_t items = int64_t(a.heads + a.key_heads) * (a.size / 2) / (vectors ? kVector : 1);
  LaunchShape shape;
  shape.block = dim3(static_cast<unsigned>(std::min<int64_t>(kMostThreads, (items + 31) / 32 * 32)));
  // few tokens: over more multiprocessors
  const unsigned spread = int64_t(a.batch) * a.tokens < 128 ? blocks(items, shape.block.x) : 1;
  shape.grid = dim3(static_cast<unsigned>(a.batch * a.tokens), std::min(spread, 16u));
  shape.dependent = a.dependent;
  if (vectors) return launch(rotary_kernel<T, true>, shape, stream, "rotary", a);
  return launch(rotary_kernel<T, false>, shape, stream, "rotary", a);
}

}  // namespace

void rotary(const RotaryArgs& args, cudaStream_t stream) {
  if (args.batch == 0 || args.tokens == 0 || args.heads + args.key_heads == 0 || args.size == 0) return;
  for_type(args.dtype, "rotary", [&](auto type) { run<decltype(type)>(args, stream); });
}

}  // namespace qk::cuda
