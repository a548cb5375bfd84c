// W8A8 GEMM for up to a few hundred tokens on sm_90a: limited by how fast the weights stream in.
//
// Weights are the 64-row wgmma operand, tokens the n operand (8..256), so no lane multiplies padding beyond 8 tokens:
//
//   CTA (s, j, i) of cluster (j, i):  channels 128j .. 128j+127,  tokens kTokens*i ..,  slabs of K's s-th part
//
//   warps 0-3   wgmma m64 n kTokens k32 on channels   0.. 63       warp 8   producer: one lane starts the copies
//   warps 4-7                              channels  64..127
//
// A stage is 16 KB of weights (one bulk copy of a contiguous tile, evict-first) and kTokens x 128 bytes of activations
// (tensor map, kept in L2). The first stages' weights are requested before griddepcontrol.wait, so they travel while
// the quantizer that makes the activations still runs: weights are the caller's constants.
//
// K is split over the `split` CTAs of a cluster where the channels alone give too few CTAs. Each leaves its int32 sums
// in its shared memory as [token block][thread] int4; after a cluster barrier CTA r adds up and writes token blocks
// r, r + split, ... reading the others through distributed shared memory. int32 sums are exact in any order.
#include "epilogue.cuh"
#include "host.h"
#include "launch.h"
#include "tensor_map.h"
#include "wgmma_s8.cuh"

namespace qk::cuda {
namespace {

constexpr int kChannels = 128;
constexpr int kConsumers = 256;  // threads: two warpgroups
constexpr int kThreads = kConsumers + 32;
constexpr int kConsumerWarps = kConsumers / 32;
constexpr int kWeightBytes = kChannels * kSlabK;
constexpr int kAlignment = 1024;  // of a swizzle atom

template <int kTokens_, int kStages_, int kPerSm_>
struct Shape {
  static constexpr int kTokens = kTokens_, kStages = kStages_, kPerSm = kPerSm_;
  static constexpr int kTokenBytes = kTokens * kSlabK;
  static constexpr int kStageBytes = kWeightBytes + kTokenBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes + kAlignment;
  static_assert(kStages * kStageBytes >= kConsumers * kTokens * 2, "the sums of a split reuse the stages");
  // An SM has 228 KB; each CTA costs 1 KB and the barriers besides.
  static_assert(kPerSm * (kSharedBytes + 1024 + 2 * kStages * 8) <= 228 * 1024, "shared memory");
};

template <typename S>
__global__ void __launch_bounds__(kThreads, S::kPerSm)
    gemm_stream_kernel(const __grid_constant__ CUtensorMap x_map, const GemmW8A8Args a, const Epilogue e, int split) {
  extern __shared__ uint8_t shared[];
  __shared__ __align__(8) uint64_t full_barriers[S::kStages], empty_barriers[S::kStages];
  const uint32_t base = (ptx::smem_u32(shared) + kAlignment - 1) / kAlignment * kAlignment;
  const uint32_t full = ptx::smem_u32(full_barriers), empty = ptx::smem_u32(empty_barriers);
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const int part = blockIdx.x;  // of K; gridDim.x is one cluster
  const int n0 = blockIdx.y * kChannels, m0 = blockIdx.z * S::kTokens;
  const int slab_count = static_cast<int>(slabs(a.k));
  const int first = slab_count * part / split, count = slab_count * (part + 1) / split - first;

  if (threadIdx.x == 0) {
    for (int s = 0; s < S::kStages; ++s) {
      ptx::mbarrier_init(full + 8 * s, 1);
      ptx::mbarrier_init(empty + 8 * s, kConsumerWarps);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();

  if (warp == kConsumerWarps) {
    if (ptx::elect_one()) {
      ptx::prefetch_tensor_map(&x_map);
      const int64_t rows = packed_rows(a.n);
      const uint32_t weight_bytes = static_cast<uint32_t>(min(int64_t(kChannels), rows - n0)) * kSlabK;
      const int8_t* weights = a.packed + (int64_t(first) * rows + n0) * kSlabK;
      const auto load_weights = [&](int i) {
        const int s = i % S::kStages;
        ptx::mbarrier_arrive_expect_tx(full + 8 * s, weight_bytes + S::kTokenBytes);
        ptx::bulk_load(base + s * S::kStageBytes, weights + i * rows * kSlabK, weight_bytes, full + 8 * s,
                       ptx::kEvictFirst);
      };
      const auto load_tokens = [&](int i) {
        const int s = i % S::kStages;
        ptx::tensor_load_2d(base + s * S::kStageBytes + kWeightBytes, &x_map, (first + i) * kSlabK, m0, full + 8 * s,
                            ptx::kEvictLast);
      };
      const int ahead = min(count, S::kStages);
      for (int i = 0; i < ahead; ++i) load_weights(i);
      ptx::grid_dependency_wait();
      for (int i = 0; i < ahead; ++i) load_tokens(i);
      for (int i = ahead; i < count; ++i) {
        ptx::mbarrier_wait(empty + 8 * (i % S::kStages), (i / S::kStages - 1) & 1);
        load_weights(i);
        load_tokens(i);
      }
      ptx::grid_launch_dependents();
    }
    __syncwarp();
    if (split > 1) {
      ptx::cluster_arrive();
      ptx::cluster_wait();
      ptx::cluster_arrive();
      ptx::cluster_wait();
    }
    return;
  }

  // Consumers.
  const int group = warp >> 2;  // warpgroup
  const int n = n0 + warp * 16;  // first of the 16 channels whose sums this warp holds
  const ChannelTerms low = load_channel(e, n + (lane >> 2)), high = load_channel(e, n + (lane >> 2) + 8);
  int32_t acc[S::kTokens / 2];
#pragma unroll
  for (int i = 0; i < S::kTokens / 2; ++i) acc[i] = 0;
  for (int i = 0; i < count; ++i) {
    const int s = i % S::kStages;
    ptx::mbarrier_wait(full + 8 * s, (i / S::kStages) & 1);
    const uint32_t stage = base + s * S::kStageBytes;
    const uint64_t weights = ptx::wgmma_descriptor(stage + group * 64 * kSlabK);
    const uint64_t tokens = ptx::wgmma_descriptor(stage + kWeightBytes);
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kSlabK / 32; ++k) WgmmaS8<S::kTokens>::run(acc, weights + 2 * k, tokens + 2 * k, 1);
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>();  // the previous slab's products are done: its stage is free
    if (i > 0 && lane == 0) ptx::mbarrier_arrive(empty + 8 * ((i - 1) % S::kStages));
  }
  ptx::wgmma_wait<0>();
  ptx::grid_dependency_wait();

  if (split == 1) {
#pragma unroll
    for (int j = 0; j < S::kTokens / 8; ++j) {
      const int32_t d[4] = {acc[4 * j], acc[4 * j + 1], acc[4 * j + 2], acc[4 * j + 3]};
      store_channels_by_tokens(e, d, n, m0 + 8 * j, low, high, lane);
    }
    return;
  }
  ptx::named_barrier(1, kConsumers);  // both warpgroups are done with the stages
  const uint32_t mine = base + threadIdx.x * 16;
#pragma unroll
  for (int j = 0; j < S::kTokens / 8; ++j) {
    asm volatile("st.shared.v4.s32 [%0], {%1,%2,%3,%4};" ::"r"(mine + j * kConsumers * 16), "r"(acc[4 * j]),
                 "r"(acc[4 * j + 1]), "r"(acc[4 * j + 2]), "r"(acc[4 * j + 3])
                 : "memory");
  }
  ptx::cluster_arrive();
  ptx::cluster_wait();
  for (int j = part; j < S::kTokens / 8 && m0 + 8 * j < a.m; j += split) {
    int32_t d[4] = {0, 0, 0, 0};
#pragma unroll 4
    for (int r = 0; r < split; ++r) {
      const int4 v = ptx::load_cluster(mine + j * kConsumers * 16, r);
      d[0] += v.x, d[1] += v.y, d[2] += v.z, d[3] += v.w;
    }
    store_channels_by_tokens(e, d, n, m0 + 8 * j, low, high, lane);
  }
  ptx::cluster_arrive();  // nobody leaves while its sums are being read
  ptx::cluster_wait();
}

template <typename S>
void run(const GemmW8A8Args& args, int split, bool dependent, cudaStream_t stream) {
  static std::atomic<uint64_t> allowed{0};
  allow_shared_memory(reinterpret_cast<const void*>(gemm_stream_kernel<S>), S::kSharedBytes, allowed);
  const CUtensorMap map = byte_matrix_map(args.xq, args.m, args.k, args.x_stride, S::kTokens);
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(split), blocks(args.n, kChannels), blocks(args.m, S::kTokens));
  shape.block = dim3(kThreads);
  shape.shared_bytes = S::kSharedBytes;
  shape.cluster = split;
  shape.dependent = dependent;
  launch(gemm_stream_kernel<S>, shape, stream, "gemm_w8a8_stream", map, args, make_epilogue(args), split);
}

}  // namespace

void gemm_w8a8_stream(const GemmW8A8Args& args, const W8A8Config& c, bool dependent, cudaStream_t stream) {
  if (c.split < 1 || c.split > 8) {
    throw std::invalid_argument("stream kernel: expected a split of 1..8, got " + std::to_string(c.split));
  }
  // The instances: tokens, stages, CTAs per multiprocessor.
  switch (c.tile * 2 + (c.deep ? 1 : 0)) {
    case 8 * 2:
      return run<Shape<8, 6, 2>>(args, c.split, dependent, stream);
    case 8 * 2 + 1:
      return run<Shape<8, 12, 1>>(args, c.split, dependent, stream);
    case 16 * 2:
      return run<Shape<16, 6, 2>>(args, c.split, dependent, stream);
    case 16 * 2 + 1:
      return run<Shape<16, 12, 1>>(args, c.split, dependent, stream);
    case 32 * 2:
      return run<Shape<32, 5, 2>>(args, c.split, dependent, stream);
    case 32 * 2 + 1:
      return run<Shape<32, 10, 1>>(args, c.split, dependent, stream);
    case 64 * 2:
      return run<Shape<64, 4, 2>>(args, c.split, dependent, stream);
    case 64 * 2 + 1:
      return run<Shape<64, 9, 1>>(args, c.split, dependent, stream);
    case 128 * 2:
      return run<Shape<128, 3, 2>>(args, c.split, dependent, stream);
    case 128 * 2 + 1:
      return run<Shape<128, 6, 1>>(args, c.split, dependent, stream);
    case 256 * 2 + 1:
      return run<Shape<256, 4, 1>>(args, c.split, dependent, stream);
    default:
      throw std::invalid_argument("stream kernel: no instance with " + std::to_string(c.tile) + " tokens" +
                                  (c.deep ? ", deep" : ""));
  }
}

}  // namespace qk::cuda
