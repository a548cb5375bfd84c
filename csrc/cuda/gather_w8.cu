// Rows of an 8-bit table as floats: lookups of an embedding, and slices of a weight on its way to another product.
//
//   out [count, K] = round(scale[row] * table[row, k]),  one rounding to fp32 and one to the dtype of out
//
// A thread widens 16 neighbouring codes; the table is read once, in any of the layouts of w8a8.h.
#undef NDEBUG  // the assertion below is what a caller sees of an id outside the table
#include <cassert>

#include "host.h"
#include "launch.h"
#include "numeric.cuh"
#include "pairs_w8.cuh"
#include "w8a16.h"

namespace qk::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kChunk = 16;  // codes of a thread

template <typename T>
__global__ void __launch_bounds__(kThreads) gather_kernel(GatherW8Args a, bool aligned) {
  const int64_t chunks = (int64_t(a.k) + kChunk - 1) / kChunk, total = a.count * chunks;
  for (int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x; at < total; at += int64_t(gridDim.x) * kThreads) {
    const int64_t i = at / chunks;
    const int c = static_cast<int>(at % chunks), k = c * kChunk;
    int64_t row = a.first + i;
    if (a.ids) row = a.wide_ids ? static_cast<const int64_t*>(a.ids)[i] : static_cast<const int32_t*>(a.ids)[i];
    assert(row >= 0 && row < a.n && "embedding: id outside the table");
    const bool packed = a.layout != W8Layout::kRows;
    const int8_t* source = packed
                               ? a.table + (int64_t(c >> 3) * a.slab_rows + row) * kSlabK + (((c & 7) ^ (row & 7)) << 4)
                               : a.table + row * a.k + k;
    const float scale = __ldg(a.scale + row);
    T* to = static_cast<T*>(a.out) + i * a.k + k;
    union {
      uint4 words;
      int8_t codes[kChunk];
    } q;
    union {
      int4 words[kChunk * sizeof(T) / 16];
      T values[kChunk];
    } out;
    const int left = min(kChunk, a.k - k);
    if (packed || (aligned && left == kChunk)) {  // slabs are padded
      q.words = __ldg(reinterpret_cast<const uint4*>(source));
      if (a.layout == W8Layout::kPairs) q.words = from_pairs(q.words);
    } else {
#pragma unroll
      for (int j = 0; j < kChunk; ++j) q.codes[j] = j < left ? source[j] : int8_t{0};
    }
#pragma unroll
    for (int j = 0; j < kChunk; ++j) out.values[j] = narrow<T>(__fmul_rn(static_cast<float>(q.codes[j]), scale));
    if (aligned && left == kChunk) {
#pragma unroll
      for (int j = 0; j < static_cast<int>(kChunk * sizeof(T) / 16); ++j) {
        reinterpret_cast<int4*>(to)[j] = out.words[j];
      }
    } else {
#pragma unroll
      for (int j = 0; j < kChunk; ++j) {
        if (j < left) to[j] = out.values[j];
      }
    }
  }
}

template <typename T>
void run(const GatherW8Args& a, cudaStream_t stream) {
  const auto is_aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  const int64_t work = a.count * ((int64_t(a.k) + kChunk - 1) / kChunk), most = int64_t(multiprocessors()) * 16;
  const int64_t want = (work + kThreads - 1) / kThreads;
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(want < most ? want : most));
  shape.block = dim3(kThreads);
  const bool aligned = a.k % kChunk == 0 && is_aligned(a.table) && is_aligned(a.out);
  launch(gather_kernel<T>, shape, stream, "gather_w8", a, aligned);
}

}  // namespace

void gather_w8(const GatherW8Args& args, cudaStream_t stream) {
  if (args.count == 0 || args.k == 0) return;
  switch (args.out_dtype) {
    case DType::kF32:
      return run<float>(args, stream);
    case DType::kBF16:
      return run<__nv_bfloat16>(args, stream);
    case DType::kF16:
      return run<__half>(args, stream);
  }
}

}  // namespace qk::cuda
