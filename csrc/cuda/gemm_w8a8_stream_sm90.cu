// W8A8 GEMM for up to a few hundred tokens on sm_90a: limited by how fast the weights stream in.
//
// Weights are the 64-row wgmma operand, tokens the n operand (8..128), so no lane multiplies padding beyond 8 tokens:
//
//   CTA:  channels 128j .. 128j+127,  tokens kTokens*i ..,  part s of K's slabs
//
//   warps 0-3   wgmma m64 n kTokens k32 on channels   0.. 63       warp 8   producer: one lane starts the copies
//   warps 4-7                              channels  64..127
//
// A stage is 16 KB of weights (one bulk copy of a contiguous tile, evict-first) and kTokens x 128 bytes of activations
// (tensor map, kept in L2). The first stages' weights are requested before griddepcontrol.wait, so they travel while
// the quantizer that makes the activations still runs: weights are the caller's constants.
//
// Clusters of `split` x `share` CTAs:
//
//   split   K is divided where the channels alone give too few CTAs. When all are through their part, the CTA that owns
//           token block j (8 tokens; owner j % split) receives the int32 sums of the others by st.async into its free
//           stages, counted by an mbarrier, and writes the block. int32 sums are exact in any order.
//   share   neighbours in channels need the same tokens: each fetches a part of the tile and multicasts it. At 64
//   tokens
//           and more the L2 would otherwise deliver more activations than weights.
//
// The producer's idle lanes bring the tokens' scales to shared memory, so that the epilogue waits for nothing.
#include "epilogue.cuh"
#include "host.h"
#include "launch.h"
#include "tensor_map.h"
#include "wgmma.cuh"

namespace qk::cuda {
namespace {

constexpr int kChannels = 128;
constexpr int kConsumers = 256;  // threads: two warpgroups
constexpr int kThreads = kConsumers + 32;
constexpr int kConsumerWarps = kConsumers / 32;
constexpr int kWeightBytes = kChannels * kSlabK;
constexpr int kAlignment = 1024;  // of a swizzle atom
constexpr int kBlockBytes = kConsumers * 16;  // sums of 8 tokens x 128 channels, [thread] int4
constexpr int kMaxCluster = 8;

template <int kTokens_, int kStages_, int kPerSm_>
struct Shape {
  static constexpr int kTokens = kTokens_, kStages = kStages_, kPerSm = kPerSm_;
  static constexpr int kBlocks = kTokens / 8;
  static constexpr int kTokenBytes = kTokens * kSlabK;
  static constexpr int kStageBytes = kWeightBytes + kTokenBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes + kAlignment;
  static_assert(kStages * kStageBytes >= (kBlocks + kMaxCluster) * kBlockBytes, "received sums reuse the stages");
  // An SM has 228 KB; each CTA costs 1 KB and the barriers besides.
  static_assert(kPerSm * (kSharedBytes + 1024 + 2 * kStages * 8 + 8 + kTokens * 8) <= 228 * 1024, "shared memory");
};

struct Clusters {
  int split, share;
};

template <typename S>
__global__ void __launch_bounds__(kThreads, S::kPerSm)
    gemm_stream_kernel(const __grid_constant__ CUtensorMap x_map, const GemmW8A8Args a, const Epilogue e,
                       const Clusters c) {
  extern __shared__ uint8_t shared[];
  __shared__ __align__(8) uint64_t full_barriers[S::kStages], empty_barriers[S::kStages], sums_barrier;
  __shared__ TokenTerms token_terms[S::kTokens];
  const uint32_t base = (ptx::smem_u32(shared) + kAlignment - 1) / kAlignment * kAlignment;
  const uint32_t full = ptx::smem_u32(full_barriers), empty = ptx::smem_u32(empty_barriers);
  const uint32_t sums = ptx::smem_u32(&sums_barrier);
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  // The rank of CTA (part, member) in its cluster is part + split * member.
  const int part = blockIdx.x, member = blockIdx.y % c.share;
  const bool clustered = c.split * c.share > 1;
  const int n0 = blockIdx.y * kChannels, m0 = blockIdx.z * S::kTokens;
  const int slab_count = static_cast<int>(slabs(a.k));
  const int first = slab_count * part / c.split, count = slab_count * (part + 1) / c.split - first;
  const int blocks_used = (min(S::kTokens, a.m - m0) + 7) / 8;

  if (threadIdx.x == 0) {
    for (int s = 0; s < S::kStages; ++s) {
      ptx::mbarrier_init(full + 8 * s, 1);
      ptx::mbarrier_init(empty + 8 * s, kConsumerWarps * c.share);  // everybody who reads what this CTA multicasts
    }
    ptx::mbarrier_init(sums, 1);
    ptx::fence_mbarrier_init();
    const int owned = (blocks_used - part + c.split - 1) / c.split;
    if (c.split > 1 && owned > 0) ptx::mbarrier_arrive_expect_tx(sums, owned * (c.split - 1) * kBlockBytes);
  }
  __syncthreads();
  if (clustered) ptx::cluster_arrive_relaxed();

  if (warp == kConsumerWarps) {
    const bool leader = lane == 0;
    const uint32_t weight_bytes =
        max(0, min(kChannels, static_cast<int>(packed_rows(a.n)) - n0)) * kSlabK;  // 0: beyond the last channel
    const int ahead = min(count, S::kStages);
    const auto load_weights = [&](int i) {
      const int s = i % S::kStages;
      ptx::mbarrier_arrive_expect_tx(full + 8 * s, weight_bytes + S::kTokenBytes);
      if (weight_bytes > 0) {
        ptx::bulk_load(base + s * S::kStageBytes, a.packed + ((first + i) * a.slab_rows + n0) * kSlabK, weight_bytes,
                       full + 8 * s, ptx::kEvictFirst);
      }
    };
    const int slice = S::kTokens / c.share;  // tokens this CTA fetches
    uint32_t mask = 0;
    for (int j = 0; j < c.share; ++j) mask |= 1u << (part + c.split * j);
    const auto load_tokens = [&](int i) {
      const int s = i % S::kStages;
      const uint32_t target = base + s * S::kStageBytes + kWeightBytes + member * slice * kSlabK;
      if (c.share > 1) {
        ptx::tensor_load_2d_multicast(target, &x_map, (first + i) * kSlabK, m0 + member * slice, full + 8 * s,
                                      static_cast<uint16_t>(mask), ptx::kEvictLast);
      } else {
        ptx::tensor_load_2d(target, &x_map, (first + i) * kSlabK, m0, full + 8 * s, ptx::kEvictLast);
      }
    };
    if (leader) {
      ptx::prefetch_tensor_map(&x_map);
      for (int i = 0; i < ahead; ++i) load_weights(i);
    }
    __syncwarp();
    if (clustered) ptx::cluster_wait();  // the barriers a multicast completes on exist everywhere
    ptx::grid_dependency_wait();
    if (leader) {
      for (int i = 0; i < ahead; ++i) load_tokens(i);
    }
    __syncwarp();
    for (int m = lane; m < S::kTokens; m += 32) token_terms[m] = load_token(e, m0 + m);
    ptx::named_barrier_arrive(1, kThreads);
    if (leader) {
      for (int i = ahead; i < count; ++i) {
        ptx::mbarrier_wait(empty + 8 * (i % S::kStages), (i / S::kStages - 1) & 1);
        load_weights(i);
        load_tokens(i);
      }
      ptx::grid_launch_dependents();
    }
    __syncwarp();
    if (c.split > 1) {
      ptx::cluster_arrive_relaxed();
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
  if (clustered) ptx::cluster_wait();
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
    // Only arrivals that a producer waits for, so none is under way when its target has left.
    if (i > 0 && i - 1 + S::kStages < count) {
      const uint32_t barrier = empty + 8 * ((i - 1) % S::kStages);
      if (c.share == 1) {
        if (lane == 0) ptx::mbarrier_arrive(barrier);
      } else if (lane < c.share) {
        ptx::mbarrier_arrive_cluster(barrier, part + c.split * lane);
      }
    }
  }
  ptx::wgmma_wait<0>();

  const uint32_t mine = base + threadIdx.x * 16;
  if (c.split > 1) {
    ptx::cluster_arrive_relaxed();  // every stage of every CTA has been read
    ptx::cluster_wait();
    // Owner j % split receives block j of CTA `part` in place [j / split][part].
    uint32_t place = mine + part * kBlockBytes;
    int owner = 0;
#pragma unroll
    for (int j = 0; j < S::kBlocks; ++j) {
      if (j < blocks_used && owner != part) {
        ptx::store_async_cluster(place, sums, owner + c.split * member, acc[4 * j], acc[4 * j + 1], acc[4 * j + 2],
                                 acc[4 * j + 3]);
      }
      if (++owner == c.split) owner = 0, place += c.split * kBlockBytes;
    }
    if (part < blocks_used) ptx::mbarrier_wait(sums, 0);
  }
  ptx::grid_dependency_wait();
  ptx::named_barrier(1, kThreads);  // the tokens' terms are there
  uint32_t place = mine;
  int owner = 0;
#pragma unroll
  for (int j = 0; j < S::kBlocks; ++j) {
    if (j < blocks_used && owner == part) {
      int32_t d[4] = {acc[4 * j], acc[4 * j + 1], acc[4 * j + 2], acc[4 * j + 3]};
      for (int r = 0; r < c.split; ++r) {
        if (r != part) {
          const int4 v = ptx::load_shared(place + r * kBlockBytes);
          d[0] += v.x, d[1] += v.y, d[2] += v.z, d[3] += v.w;
        }
      }
      const int token = 8 * j + 2 * (lane & 3);
      store_channels_by_tokens(e, d, n, m0 + 8 * j, low, high, token_terms[token], token_terms[token + 1], lane);
    }
    if (++owner == c.split) owner = 0, place += c.split * kBlockBytes;
  }
}

template <typename S>
void run(const GemmW8A8Args& args, const W8A8Config& c, bool dependent, cudaStream_t stream) {
  static std::atomic<uint64_t> allowed{0};
  allow_shared_memory(reinterpret_cast<const void*>(gemm_stream_kernel<S>), S::kSharedBytes, allowed);
  const CUtensorMap map =
      byte_matrix_map(args.xq, args.m, args.k, args.x_stride, static_cast<uint32_t>(S::kTokens / c.share));
  LaunchShape shape;
  shape.grid =
      dim3(static_cast<unsigned>(c.split), blocks(args.n, kChannels * c.share) * c.share, blocks(args.m, S::kTokens));
  shape.block = dim3(kThreads);
  shape.shared_bytes = S::kSharedBytes;
  shape.cluster_x = c.split;
  shape.cluster_y = c.share;
  shape.dependent = dependent;
  launch(gemm_stream_kernel<S>, shape, stream, "gemm_w8a8_stream", map, args, make_epilogue(args),
         Clusters{c.split, c.share});
}

}  // namespace

void gemm_w8a8_stream(const GemmW8A8Args& args, const W8A8Config& c, bool dependent, cudaStream_t stream) {
  const bool shares = c.share == 1 || c.share == 2 || c.share == 4 || c.share == 8;
  if (c.split < 1 || !shares || c.split * c.share > kMaxCluster || c.tile / 8 < c.share) {
    throw std::invalid_argument("stream kernel: expected clusters of at most 8 CTAs and 8 tokens a CTA, got split " +
                                std::to_string(c.split) + ", share " + std::to_string(c.share) + ", tile " +
                                std::to_string(c.tile));
  }
  // The instances: tokens, stages, CTAs per multiprocessor.
  switch (c.tile * 2 + (c.deep ? 1 : 0)) {
    case 8 * 2:
      return run<Shape<8, 6, 2>>(args, c, dependent, stream);
    case 8 * 2 + 1:
      return run<Shape<8, 12, 1>>(args, c, dependent, stream);
    case 16 * 2:
      return run<Shape<16, 6, 2>>(args, c, dependent, stream);
    case 16 * 2 + 1:
      return run<Shape<16, 12, 1>>(args, c, dependent, stream);
    case 32 * 2:
      return run<Shape<32, 5, 2>>(args, c, dependent, stream);
    case 32 * 2 + 1:
      return run<Shape<32, 10, 1>>(args, c, dependent, stream);
    case 64 * 2:
      return run<Shape<64, 4, 2>>(args, c, dependent, stream);
    case 64 * 2 + 1:
      return run<Shape<64, 9, 1>>(args, c, dependent, stream);
    case 128 * 2:
      return run<Shape<128, 3, 2>>(args, c, dependent, stream);
    case 128 * 2 + 1:
      return run<Shape<128, 6, 1>>(args, c, dependent, stream);
    default:
      throw std::invalid_argument("stream kernel: no instance with " + std::to_string(c.tile) + " tokens" +
                                  (c.deep ? ", deep" : ""));
  }
}

}  // namespace qk::cuda
