// W8A8 GEMM for up to a few hundred tokens on sm_90a: limited by how fast the weights stream in.
//
// Weights are the 64-row wgmma operand, tokens the n operand (8..128), so no lane multiplies padding beyond 8 tokens:
//
//   CTA:  channels 128j .. 128j+127,  tokens kTokens*i ..,  part s of K's slabs
//
//   warps 0-3   wgmma m64 n kTokens k32 on channels   0.. 63       warp 8   fetches weights, one lane starts the copies
//   warps 4-7                              channels  64..127       warp 9   fetches tokens, likewise, and their scales
//
// or, where that gives too few CTAs to fetch the weights at the memory's rate, 64 channels, whose slabs the two
// warpgroups take in turns ("phases"): products that add to the same sums wait 80 to 100 cycles for each other.
//
// A stage is 8 or 16 KB of weights (one bulk copy of a contiguous tile, evict-first) and kTokens x 128 bytes of
// activations (tensor map, kept in L2). The first stages' weights are requested before griddepcontrol.wait, so they
// travel while the quantizer that makes the activations still runs: weights are the caller's constants. Two warps
// fetch, since filling all stages takes 3000 cycles, and with one the first tokens would come after the last weights.
//
// Clusters of `split` x `share` CTAs:
//
//   split   K is divided where the channels alone give too few CTAs.
//   share   neighbours in channels need the same tokens: each fetches a part of the tile and multicasts it. At 64
//           tokens and more the L2 would otherwise deliver more activations than weights.
//
// Whoever adds to the same outputs, the parts of a split and the phases of a CTA, are the "units" of a sum, and int32
// sums are exact in any order. Phases alone leave their sums in shared memory side by side. With a split, token block j
// (8 tokens) is owned by part j % split, which receives the sums of all units in its free stages by st.async, counted
// by an mbarrier.
#include "epilogue.cuh"
#include "host.h"
#include "launch.h"
#include "tensor_map.h"
#include "wgmma.cuh"

namespace qk::cuda {
namespace {

constexpr int kAlignment = 1024;  // of a swizzle atom
constexpr int kMaxCluster = 8;
constexpr int kBoxRows = 32;  // of tokens, where the last tile is not full
constexpr int kConsumers = 256;  // threads: two warpgroups
constexpr int kConsumerWarps = kConsumers / 32;
constexpr int kWeightWarp = kConsumerWarps;  // and the next one fetches tokens
constexpr int kThreads = kConsumers + 64;

QK_HOST_DEVICE constexpr int most_blocks(int tokens, int split) { return (tokens / 8 + split - 1) / split; }
// What an owner receives, in the stages: [its block][unit] fragments of 8 tokens, four bytes for each sum.
QK_HOST_DEVICE constexpr int received_bytes(int channels, int tokens, int split) {
  return split == 1 ? 0 : most_blocks(tokens, split) * split * (128 / channels) * 8 * channels * 4;
}
// Of the stages, all that sums need: those fragments and then their sums as a tile, or a tile for each phase.
template <int kChannels>
constexpr int sums_bytes(int tokens, int split) {
  const int of_tokens = kTilePitch<kChannels> * 4;
  return split == 1 ? 128 / kChannels * tokens * of_tokens
                    : received_bytes(kChannels, tokens, split) + most_blocks(tokens, split) * 8 * of_tokens;
}
constexpr int larger(int a, int b) { return a > b ? a : b; }

template <int kChannels_, int kTokens_, int kStages_, int kPerSm_>
struct Shape {
  static constexpr int kChannels = kChannels_, kTokens = kTokens_, kStages = kStages_, kPerSm = kPerSm_;
  static constexpr int kPhases = 128 / kChannels;
  static constexpr int kMembers = kConsumers / kPhases;  // threads that hold the sums of a unit
  static constexpr int kReleases = kConsumerWarps / kPhases;  // warps that read a stage
  static constexpr int kWeightBytes = kChannels * kSlabK;
  static constexpr int kBlocks = kTokens / 8;
  static constexpr int kBlockBytes = kMembers * 16;  // sums of 8 tokens x kChannels channels, [member] int4
  static constexpr int kTokenBytes = kTokens * kSlabK;
  static constexpr int kStageBytes = kWeightBytes + kTokenBytes;
  static constexpr int kPlaneBytes = kTokens * kTilePitch<kChannels> * 4;
  static constexpr int kAreaBytes = larger(kStages * kStageBytes, sums_bytes<kChannels>(kTokens, 2));
  static constexpr int kSharedBytes = kAreaBytes + kAlignment;
  // An SM has 228 KB; each CTA costs 1 KB and the barriers besides.
  static constexpr int kTermBytes = kTokens * static_cast<int>(sizeof(TokenTerms)) + sizeof(TileTerms<kChannels>);
  static_assert(kPerSm * (kSharedBytes + 1024 + 2 * kStages * 8 + 8 + kTermBytes) <= 228 * 1024, "shared memory");
};

// Tokens are copied in boxes of `box_rows`, and a box without any is left out: copies that only fill with zeros take
// longer than others.
struct Clusters {
  int split, share, box_rows;
};

template <typename S>
__global__ void __launch_bounds__(kThreads, S::kPerSm)
    gemm_stream_kernel(const __grid_constant__ CUtensorMap x_map, const GemmW8A8Args a, const Epilogue e,
                       const Clusters c) {
  extern __shared__ uint8_t shared[];
  __shared__ __align__(8) uint64_t full_barriers[S::kStages], empty_barriers[S::kStages], sums_barrier;
  __shared__ TokenTerms token_terms[S::kTokens];
  __shared__ TileTerms<S::kChannels> channel_terms;
  const uint32_t base = (ptx::smem_u32(shared) + kAlignment - 1) / kAlignment * kAlignment;
  const uint32_t full = ptx::smem_u32(full_barriers), empty = ptx::smem_u32(empty_barriers);
  const uint32_t received = ptx::smem_u32(&sums_barrier);
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  // The rank of CTA (part, member) in its cluster is part + split * member.
  const int part = blockIdx.x, member = blockIdx.y % c.share, units = c.split * S::kPhases;
  const bool clustered = c.split * c.share > 1;
  const int n0 = blockIdx.y * S::kChannels, m0 = blockIdx.z * S::kTokens;
  const int slab_count = static_cast<int>(slabs(a.k));
  const int first = slab_count * part / c.split, count = slab_count * (part + 1) / c.split - first;
  const int blocks_used = (min(S::kTokens, a.m - m0) + 7) / 8, owned = (blocks_used - part + c.split - 1) / c.split;

  if (threadIdx.x == 0) {
    for (int s = 0; s < S::kStages; ++s) {
      ptx::mbarrier_init(full + 8 * s, 1);
      ptx::mbarrier_init(empty + 8 * s, S::kReleases * c.share);  // everybody who reads what this CTA multicasts
    }
    ptx::mbarrier_init(received, 1);
    ptx::fence_mbarrier_init();
    if (c.split > 1) ptx::mbarrier_arrive_expect_tx(received, owned * units * S::kBlockBytes);
  }
  __syncthreads();
  if (clustered) ptx::cluster_arrive_relaxed();

  if (warp >= kConsumerWarps) {
    const int ahead = min(count, S::kStages), tokens_used = min(S::kTokens, a.m - m0);
    const int token_bytes = ((tokens_used + c.box_rows - 1) & -c.box_rows) * kSlabK;  // box_rows is a power of two
    const auto wait_empty = [&](int i) { ptx::mbarrier_wait(empty + 8 * (i % S::kStages), (i / S::kStages - 1) & 1); };
    if (warp == kWeightWarp) {
      const uint32_t weight_bytes =
          max(0, min(S::kChannels, static_cast<int>(packed_rows(a.n)) - n0)) * kSlabK;  // 0: beyond the last channel
      const auto load = [&](int i) {
        const int s = i % S::kStages;
        ptx::mbarrier_arrive_expect_tx(full + 8 * s, weight_bytes + token_bytes);
        if (weight_bytes > 0) {
          ptx::bulk_load(base + s * S::kStageBytes, a.packed + ((first + i) * a.slab_rows + n0) * kSlabK, weight_bytes,
                         full + 8 * s, ptx::kEvictFirst);
        }
      };
      if (lane == 0) {
        for (int i = 0; i < ahead; ++i) load(i);
      }
      __syncwarp();
      if (clustered) ptx::cluster_wait();
      if (lane == 0) {
        // The next kernel fills its stages where there is room, and memory is never idle. Where two CTAs share a
        // multiprocessor, or copies of tokens come to as much as weights, it would take from what this one still needs.
        const int early = S::kPerSm == 1 && S::kTokens <= 64 ? max(ahead, count / 2) : count;
        int i = ahead;
        for (; i < early; ++i) {
          wait_empty(i);
          load(i);
        }
        ptx::grid_launch_dependents();
        for (; i < count; ++i) {
          wait_empty(i);
          load(i);
        }
      }
    } else {
      const int slice = S::kTokens / c.share;  // tokens this CTA fetches, a lane for each box
      const int own = member * slice + lane * c.box_rows;
      const bool fetches = lane * c.box_rows < slice && own < tokens_used;
      uint32_t mask = 0;
      for (int j = 0; j < c.share; ++j) mask |= 1u << (part + c.split * j);
      const auto load = [&](int i) {
        const int s = i % S::kStages;
        const uint32_t target = base + s * S::kStageBytes + S::kWeightBytes + own * kSlabK;
        if (c.share > 1) {
          ptx::tensor_load_2d_multicast(target, &x_map, (first + i) * kSlabK, m0 + own, full + 8 * s,
                                        static_cast<uint16_t>(mask), ptx::kEvictLast);
        } else {
          ptx::tensor_load_2d(target, &x_map, (first + i) * kSlabK, m0 + own, full + 8 * s, ptx::kEvictLast);
        }
      };
      if (lane == 0) ptx::prefetch_tensor_map(&x_map);
      __syncwarp();
      if (clustered) ptx::cluster_wait();  // the barriers a multicast completes on exist everywhere
      ptx::grid_dependency_wait();
      if (fetches) {
        for (int i = 0; i < ahead; ++i) load(i);
      }
      __syncwarp();
      for (int m = lane; m < S::kTokens; m += 32) token_terms[m] = load_token(e, m0 + m);
      ptx::named_barrier_arrive(1, kConsumers + 32);
      if (fetches) {
        for (int i = ahead; i < count; ++i) {
          wait_empty(i);
          load(i);
        }
      }
    }
    __syncwarp();
    if (c.split > 1) {
      ptx::cluster_arrive_relaxed();
      ptx::cluster_wait();
    }
    return;
  }

  // Consumers.
  const int group = warp >> 2, phase = S::kPhases > 1 ? group : 0;  // of 64 channels, or of a slab
  const int row = (S::kPhases > 1 ? warp & 3 : warp) * 16;  // first of this warp's 16 channels in the tile
  if (threadIdx.x < S::kChannels) channel_terms.put(threadIdx.x, load_channel(e, n0 + threadIdx.x));
  int32_t acc[S::kTokens / 2];
#pragma unroll
  for (int i = 0; i < S::kTokens / 2; ++i) acc[i] = 0;
  if (clustered) ptx::cluster_wait();
  for (int i = phase; i < count; i += S::kPhases) {
    const int s = i % S::kStages;
    ptx::mbarrier_wait(full + 8 * s, (i / S::kStages) & 1);
    const uint32_t stage = base + s * S::kStageBytes;
    const uint64_t weights = ptx::wgmma_descriptor(stage + (S::kPhases > 1 ? 0 : group * 64 * kSlabK));
    const uint64_t tokens = ptx::wgmma_descriptor(stage + S::kWeightBytes);
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kSlabK / 32; ++k) WgmmaS8<S::kTokens>::run(acc, weights + 2 * k, tokens + 2 * k, 1);
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>();  // the previous slab's products are done: its stage is free
    // Only arrivals that a producer waits for, so none is under way when its target has left.
    const int previous = i - S::kPhases;
    if (previous >= 0 && previous + S::kStages < count) {
      const uint32_t barrier = empty + 8 * (previous % S::kStages);
      if (c.share == 1) {
        if (lane == 0) ptx::mbarrier_arrive(barrier);
      } else if (lane < c.share) {
        ptx::mbarrier_arrive_cluster(barrier, part + c.split * lane);
      }
    }
  }
  ptx::wgmma_wait<0>();

  // Every stage of every CTA has been read.
  if (c.split > 1) {
    ptx::cluster_arrive_relaxed();
    ptx::cluster_wait();
  } else {
    ptx::named_barrier(2, kConsumers);
  }
  uint32_t tile = base;
  if (c.split == 1) {
#pragma unroll
    for (int j = 0; j < S::kBlocks; ++j) {
      const int32_t d[4] = {acc[4 * j], acc[4 * j + 1], acc[4 * j + 2], acc[4 * j + 3]};
      put_fragment<S::kChannels>(tile + phase * S::kPlaneBytes, row, 8 * j, lane, d);
    }
  } else {
    const uint32_t mine = base + (threadIdx.x % S::kMembers) * 16;
    uint32_t place = mine + (part * S::kPhases + phase) * S::kBlockBytes;
    int owner = 0;
#pragma unroll
    for (int j = 0; j < S::kBlocks; ++j) {
      if (j < blocks_used) {
        ptx::store_async_cluster(place, received, owner + c.split * member, acc[4 * j], acc[4 * j + 1], acc[4 * j + 2],
                                 acc[4 * j + 3]);
      }
      if (++owner == c.split) owner = 0, place += units * S::kBlockBytes;
    }
    tile += received_bytes(S::kChannels, S::kTokens, c.split);
    if (owned > 0) ptx::mbarrier_wait(received, 0);
#pragma unroll 1
    for (int i = phase; i < owned; i += S::kPhases) {
      int32_t d[4] = {0, 0, 0, 0};
      uint32_t from = mine + i * units * S::kBlockBytes;
#pragma unroll 1
      for (int u = 0; u < units; ++u, from += S::kBlockBytes) {
        const int4 v = ptx::load_shared(from);
        d[0] += v.x, d[1] += v.y, d[2] += v.z, d[3] += v.w;
      }
      put_fragment<S::kChannels>(tile, row, 8 * i, lane, d);
    }
  }
  ptx::named_barrier(1, kConsumers + 32);  // the tokens' terms are there, and the sums

  constexpr int kRuns = S::kChannels / 8;
  const int runs = owned * 8 * kRuns;
#pragma unroll 1
  for (int at = threadIdx.x; at < runs; at += kConsumers) {
    const int token = at / kRuns, n = at % kRuns * 8;  // of the tile
    const int of_block = (token / 8 * c.split + part) * 8 + token % 8;
    int32_t d[8];
    get_run<S::kChannels>(tile, token, n, d);
    if (S::kPhases > 1 && c.split == 1) {
      int32_t other[8];
      get_run<S::kChannels>(tile + S::kPlaneBytes, token, n, other);
#pragma unroll
      for (int i = 0; i < 8; ++i) d[i] += other[i];
    }
    float v[8];
    finish_run(e, d, token_terms[of_block], channel_terms, n, v);
    store_run(e, m0 + of_block, n0 + n, v);
  }
}

template <typename S>
void run(const GemmW8A8Args& args, const W8A8Config& c, bool dependent, cudaStream_t stream) {
  if (sums_bytes<S::kChannels>(S::kTokens, c.split) > S::kAreaBytes) {
    throw std::invalid_argument("stream kernel: no room for the sums of a split by " + std::to_string(c.split));
  }
  static std::atomic<uint64_t> allowed{0};
  allow_shared_memory(reinterpret_cast<const void*>(gemm_stream_kernel<S>), S::kSharedBytes, allowed);
  const int slice = S::kTokens / c.share, box_rows = args.m % S::kTokens == 0 || slice <= kBoxRows ? slice : kBoxRows;
  const CUtensorMap map = byte_matrix_map(args.xq, args.m, args.k, args.x_stride, static_cast<uint32_t>(box_rows));
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(c.split), blocks(args.n, S::kChannels * c.share) * c.share,
                    blocks(args.m, S::kTokens));
  shape.block = dim3(kThreads);
  shape.shared_bytes = S::kSharedBytes;
  shape.cluster_x = c.split;
  shape.cluster_y = c.share;
  shape.dependent = dependent;
  launch(gemm_stream_kernel<S>, shape, stream, "gemm_w8a8_stream", map, args, make_epilogue(args),
         Clusters{c.split, c.share, box_rows});
}

template <int kChannels, int kTokens>
void run_tokens(const GemmW8A8Args& args, const W8A8Config& c, bool dependent, cudaStream_t stream) {
  // Stages for all of a multiprocessor's shared memory, or for half of it.
  constexpr int kBytes = (kChannels + kTokens) * kSlabK, kDeep = 220 * 1024 / kBytes, kShallow = 108 * 1024 / kBytes;
  if (c.deep) return run<Shape<kChannels, kTokens, kDeep, 1>>(args, c, dependent, stream);
  return run<Shape<kChannels, kTokens, kShallow, 2>>(args, c, dependent, stream);
}

template <int kChannels>
void run_channels(const GemmW8A8Args& args, const W8A8Config& c, bool dependent, cudaStream_t stream) {
  switch (c.tile) {
    case 8:
      return run_tokens<kChannels, 8>(args, c, dependent, stream);
    case 16:
      return run_tokens<kChannels, 16>(args, c, dependent, stream);
    case 32:
      return run_tokens<kChannels, 32>(args, c, dependent, stream);
    case 64:
      return run_tokens<kChannels, 64>(args, c, dependent, stream);
    case 128:
      return run_tokens<kChannels, 128>(args, c, dependent, stream);
    default:
      throw std::invalid_argument("stream kernel: no instance with " + std::to_string(c.tile) + " tokens");
  }
}

}  // namespace

void gemm_w8a8_stream(const GemmW8A8Args& args, const W8A8Config& c, bool dependent, cudaStream_t stream) {
  const bool shares = c.share == 1 || c.share == 2 || c.share == 4 || c.share == 8;
  if (c.split < 1 || !shares || c.split * c.share > kMaxCluster || c.tile / 8 < c.share) {
    throw std::invalid_argument("stream kernel: expected clusters of at most 8 CTAs and 8 tokens a CTA, got split " +
                                std::to_string(c.split) + ", share " + std::to_string(c.share) + ", tile " +
                                std::to_string(c.tile));
  }
  switch (c.channels) {
    case 64:
      return run_channels<64>(args, c, dependent, stream);
    case 128:
      return run_channels<128>(args, c, dependent, stream);
    default:
      throw std::invalid_argument("stream kernel: no instance with " + std::to_string(c.channels) + " channels");
  }
}

}  // namespace qk::cuda
