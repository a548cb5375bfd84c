// Canonical int8 weights [N, K] to and from K slabs (w8a8.h), and their sums over k. Exact copies: no arithmetic on
// the weights. Packing is limited by memory: one thread per 16-byte chunk, neighbouring threads on neighbouring chunks.
#include "host.h"
#include "launch.h"

namespace qk::cuda {
namespace {

constexpr int kThreads = 256;

// Copies 0..16 bytes; `whole` says that all 16 are there and both addresses are aligned.
__device__ __forceinline__ void copy_chunk(int8_t* dst, const int8_t* src, int64_t bytes, bool whole, bool zero_tail) {
  if (whole) {
    *reinterpret_cast<int4*>(dst) = __ldg(reinterpret_cast<const int4*>(src));
    return;
  }
  for (int i = 0; i < 16; ++i) {
    if (i < bytes) {
      dst[i] = src[i];
    } else if (zero_tail) {
      dst[i] = 0;
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

__global__ void __launch_bounds__(kThreads)
    pack_kernel(const int8_t* __restrict__ weight, int64_t n, int64_t k, int8_t* __restrict__ packed, bool aligned) {
  const int64_t rows = packed_rows(n), count = slabs(k) * rows * 8;
  for (int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x; at < count; at += int64_t(gridDim.x) * kThreads) {
    const Place p = place_of(at, rows);
    const int64_t bytes = p.row < n ? k - p.k : 0;
    copy_chunk(packed + p.packed, weight + p.row * k + p.k, bytes, aligned && bytes >= 16, true);
  }
}

__global__ void __launch_bounds__(kThreads)
    unpack_kernel(const int8_t* __restrict__ packed, int64_t n, int64_t k, int8_t* __restrict__ weight, bool aligned) {
  const int64_t rows = packed_rows(n), count = slabs(k) * rows * 8;
  for (int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x; at < count; at += int64_t(gridDim.x) * kThreads) {
    const Place p = place_of(at, rows);
    if (p.row < n && p.k < k) {
      copy_chunk(weight + p.row * k + p.k, packed + p.packed, k - p.k, aligned && k - p.k >= 16, false);
    }
  }
}

// One warp per row of the packed weight; the padding adds zero.
__global__ void __launch_bounds__(kThreads)
    colsum_kernel(const int8_t* __restrict__ packed, int64_t n, int64_t k, int32_t* __restrict__ colsum) {
  const int64_t row = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (row >= n) return;
  const int lane = threadIdx.x & 31;
  const int64_t words = slabs(k) * (kSlabK / 4), rows = packed_rows(n);
  int32_t sum = 0;
  for (int64_t w = lane; w < words; w += 32) {
    const int64_t at = ((w / 32) * rows + row) * kSlabK + (w % 32) * 4;
    sum = __dp4a(*reinterpret_cast<const int32_t*>(packed + at), 0x01010101, sum);
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

}  // namespace

void pack_w8(const int8_t* weight, int64_t n, int64_t k, int8_t* packed, int32_t* colsum, cudaStream_t stream) {
  LaunchShape shape;
  shape.block = dim3(kThreads);
  shape.grid = dim3(grid_for(slabs(k) * packed_rows(n) * 8));
  launch(pack_kernel, shape, stream, "pack_w8", weight, n, k, packed, is_aligned(weight, k));
  shape.grid = dim3(blocks(n, kThreads / 32));
  launch(colsum_kernel, shape, stream, "pack_w8 colsum", packed, n, k, colsum);
}

void unpack_w8(const int8_t* packed, int64_t n, int64_t k, int8_t* weight, cudaStream_t stream) {
  LaunchShape shape;
  shape.block = dim3(kThreads);
  shape.grid = dim3(grid_for(slabs(k) * packed_rows(n) * 8));
  launch(unpack_kernel, shape, stream, "unpack_w8", packed, n, k, weight, is_aligned(weight, k));
}

}  // namespace qk::cuda
