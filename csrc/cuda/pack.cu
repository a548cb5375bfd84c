// Canonical int8 weights [N, K] to and from K slabs (w8a8.h), and their sums over k. Exact: bytes are moved, and of
// pairs offset. Packing is limited by memory: one thread per 16-byte chunk, neighbouring threads on neighbouring
// chunks.
#include "host.h"
#include "launch.h"
#include "pairs_w8.cuh"

namespace qk::cuda {
namespace {

constexpr int kThreads = 256;

// 16 bytes; of less, the first ones, and zeros. `whole` says that all are there and aligned.
union Chunk {
  uint4 words;
  int8_t bytes[16];
};
__device__ __forceinline__ uint4 load_chunk(const int8_t* from, int64_t bytes, bool whole) {
  Chunk chunk = {make_uint4(0, 0, 0, 0)};
  if (whole) {
    chunk.words = __ldg(reinterpret_cast<const uint4*>(from));
  } else {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      if (i < bytes) chunk.bytes[i] = from[i];
    }
  }
  return chunk.words;
}
__device__ __forceinline__ void store_chunk(int8_t* to, uint4 v, int64_t bytes, bool whole) {
  if (whole) {
    *reinterpret_cast<uint4*>(to) = v;
  } else {
    const Chunk chunk = {v};
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      if (i < bytes) to[i] = chunk.bytes[i];
    }
  }
}

// Chunk `at` of the packed weight: where it lies there, and its row and k.
struct Place {
  int64_t packed, row, k;
};
__device__ __forceinline__ Place place_of(int64_t at, int64_t rows) {
  const int64_t line = at >> 3, row = line % rows;
  const int chunk = static_cast<int>(at & 7);
  return Place{(line << 7) + ((chunk ^ static_cast<int>(row & 7)) << 4), row, (line / rows) * kSlabK + chunk * 16};
}

__global__ void __launch_bounds__(kThreads) pack_kernel(const int8_t* __restrict__ weight, int64_t n, int64_t k,
                                                        bool pairs, int8_t* __restrict__ packed, bool aligned) {
  const int64_t rows = packed_rows(n), count = slabs(k) * rows * 8;
  for (int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x; at < count; at += int64_t(gridDim.x) * kThreads) {
    const Place p = place_of(at, rows);
    const int64_t bytes = p.row < n ? k - p.k : 0;
    const uint4 v = load_chunk(weight + p.row * k + p.k, bytes, aligned && bytes >= 16);
    *reinterpret_cast<uint4*>(packed + p.packed) = pairs ? to_pairs(v) : v;
  }
}

__global__ void __launch_bounds__(kThreads) unpack_kernel(const int8_t* __restrict__ packed, int64_t n, int64_t k,
                                                          bool pairs, int8_t* __restrict__ weight, bool aligned) {
  const int64_t rows = packed_rows(n), count = slabs(k) * rows * 8;
  for (int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x; at < count; at += int64_t(gridDim.x) * kThreads) {
    const Place p = place_of(at, rows);
    if (p.row < n && p.k < k) {
      const uint4 v = __ldg(reinterpret_cast<const uint4*>(packed + p.packed));
      store_chunk(weight + p.row * k + p.k, pairs ? from_pairs(v) : v, k - p.k, aligned && k - p.k >= 16);
    }
  }
}

// One warp per row of the packed weight; the padding adds zero.
__global__ void __launch_bounds__(kThreads)
    colsum_kernel(const int8_t* __restrict__ packed, int64_t n, int64_t k, bool pairs, int32_t* __restrict__ colsum) {
  const int64_t row = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (row >= n) return;
  const int lane = threadIdx.x & 31;
  const int64_t words = slabs(k) * (kSlabK / 4), rows = packed_rows(n);
  int32_t sum = 0;
  for (int64_t w = lane; w < words; w += 32) {
    const int64_t at = ((w / 32) * rows + row) * kSlabK + (w % 32) * 4;
    const uint32_t word = *reinterpret_cast<const uint32_t*>(packed + at) ^ (pairs ? kPairsOffset : 0u);
    sum = __dp4a(static_cast<int32_t>(word), 0x01010101, sum);
  }
  for (int offset = 16; offset > 0; offset >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  if (lane == 0) colsum[row] = sum;
}

unsigned grid_for(int64_t count) {
  const int64_t most = int64_t(multiprocessors()) * 16;
  const int64_t want = (count + kThreads - 1) / kThreads;
  return static_cast<unsigned>(want < most ? want : most);
}

bool is_aligned(const void* p, int64_t k) { return reinterpret_cast<uintptr_t>(p) % 16 == 0 && k % 16 == 0; }

bool is_pairs(const char* name, W8Layout layout) {
  if (layout == W8Layout::kRows) throw std::invalid_argument(std::string(name) + ": expected a layout of slabs");
  return layout == W8Layout::kPairs;
}

}  // namespace

void pack_w8(const int8_t* weight, int64_t n, int64_t k, W8Layout layout, int8_t* packed, int32_t* colsum,
             cudaStream_t stream) {
  const bool pairs = is_pairs("pack_w8", layout);
  LaunchShape shape;
  shape.block = dim3(kThreads);
  shape.grid = dim3(grid_for(slabs(k) * packed_rows(n) * 8));
  launch(pack_kernel, shape, stream, "pack_w8", weight, n, k, pairs, packed, is_aligned(weight, k));
  shape.grid = dim3(blocks(n, kThreads / 32));
  launch(colsum_kernel, shape, stream, "pack_w8 colsum", packed, n, k, pairs, colsum);
}

void unpack_w8(const int8_t* packed, int64_t n, int64_t k, W8Layout layout, int8_t* weight, cudaStream_t stream) {
  const bool pairs = is_pairs("unpack_w8", layout);
  LaunchShape shape;
  shape.block = dim3(kThreads);
  shape.grid = dim3(grid_for(slabs(k) * packed_rows(n) * 8));
  launch(unpack_kernel, shape, stream, "unpack_w8", packed, n, k, pairs, weight, is_aligned(weight, k));
}

}  // namespace qk::cuda
