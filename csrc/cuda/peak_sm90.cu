// A ceiling, for the benchmark: wgmma m64n256k32 s8 back to back on random operands that never leave shared memory. Two
// warpgroups a multiprocessor keep the tensor cores busy; on a chip at its power limit this is what the limit allows.
#include "host.h"
#include "launch.h"
#include "wgmma.cuh"

namespace qk::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kOperandBytes = (2 * 64 + 256) * kSlabK;  // 64 rows of A for each warpgroup, 256 rows of B for both
constexpr int kSharedBytes = kOperandBytes + 1024;

__global__ void __launch_bounds__(kThreads, 1)
    peak_kernel(const uint4* __restrict__ random, int iterations, int32_t* __restrict__ sink) {
  extern __shared__ uint8_t shared[];
  const uint32_t base = (ptx::smem_u32(shared) + 1023) / 1024 * 1024;
  uint4* operands = reinterpret_cast<uint4*>(shared + (base - ptx::smem_u32(shared)));
  for (int i = threadIdx.x; i < kOperandBytes / 16; i += kThreads) operands[i] = random[i];
  ptx::fence_proxy_async();
  __syncthreads();
  const uint64_t a = ptx::wgmma_descriptor(base + threadIdx.x / 128 * 64 * kSlabK);
  const uint64_t b = ptx::wgmma_descriptor(base + 128 * kSlabK);
  int32_t acc[128];
#pragma unroll
  for (int i = 0; i < 128; ++i) acc[i] = 0;
  for (int i = 0; i < iterations; ++i) {
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kSlabK / 32; ++k) WgmmaS8<256>::run(acc, a + 2 * k, b + 2 * k, 1);
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>();
  }
  ptx::wgmma_wait<0>();
  int32_t sum = 0;
#pragma unroll
  for (int i = 0; i < 128; ++i) sum ^= acc[i];
  if (sum == 0x13572468) *sink = sum;  // never, but the compiler cannot know
}

}  // namespace

double peak_s8(const void* random, int iterations, int32_t* sink, cudaStream_t stream) {
  static std::atomic<uint64_t> allowed{0};
  allow_shared_memory(reinterpret_cast<const void*>(peak_kernel), kSharedBytes, allowed);
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(multiprocessors()));
  shape.block = dim3(kThreads);
  shape.shared_bytes = kSharedBytes;
  launch(peak_kernel, shape, stream, "peak_s8", static_cast<const uint4*>(random), iterations, sink);
  return 2.0 * 128 * 256 * kSlabK * iterations * multiprocessors();
}

}  // namespace qk::cuda
