// W8A8 GEMM for many tokens on sm_90a: limited by the tensor cores, and those by the chip's power.
//
// Tokens are the 64-row wgmma operand, channels the n operand. A CTA owns a tile of 128 tokens x kChannels channels,
// two consumer warpgroups of 64 tokens each, and walks K in slabs of 128 bytes through a ring of stages:
//
//        kChannels                       cluster of kCluster = 2: the CTAs take neighbouring token tiles and the same
//      +-----------+                     channels; each fetches half of the weight tile and multicasts it to both, so
//  64  | warps 0-3 |   x K               a weight byte crosses the L2 once for 256 tokens.
//      +-----------+
//  64  | warps 4-7 |                     warp 8: producer, one lane. It runs ahead into the next tile while the
//      +-----------+                     consumers write the last one out. Warps 9-11 only hand their registers over.
//
// A 128 x 256 tile reads 48 bytes of shared-memory fill a cycle at the s8 peak (32 with multicast), half of what a
// 128 x 128 one does. Narrower instances (224, 192, 128) exist for the quantization of waves alone: with 1024 tokens
// and 14336 channels, 512 tiles of 224 channels fill 132 multiprocessors 3.9 times, 448 of 256 only 3.4 times.
//
// The grid is persistent: cluster c takes tiles c, c + clusters, ... in an order that walks the tokens of a group of
// kGroup token tiles before it moves to the next channels, so a wave's operands fit in the L2.
//
// Epilogue: fragment -> fp32 steps -> 16-bit pairs -> stmatrix into 2 KB per warp -> 16-byte stores of whole sectors.
#include "epilogue.cuh"
#include "host.h"
#include "launch.h"
#include "tensor_map.h"
#include "wgmma_s8.cuh"

namespace qk::cuda {
namespace {

constexpr int kTokens = 128;
constexpr int kConsumers = 256;
constexpr int kThreads = kConsumers + 128;  // the producer's warpgroup: setmaxnreg works on whole ones
constexpr int kConsumerWarps = kConsumers / 32;
constexpr int kTokenBytes = kTokens * kSlabK;
constexpr int kAlignment = 1024;
constexpr int kGroup = 16;  // token tiles walked before the next channels
constexpr int kStripe = 64;  // channels staged at once for the store
constexpr int kStripeBytes = 16 * kStripe * 2;  // per warp: 16 tokens
// Registers per thread: 168 at launch (64 K over 384 threads), then moved from the producer to the consumers.
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;

template <int kChannels_, int kStages_, int kCluster_>
struct Shape {
  static constexpr int kChannels = kChannels_, kStages = kStages_, kCluster = kCluster_;
  static constexpr int kWeightBytes = kChannels * kSlabK;
  static constexpr int kStageBytes = kTokenBytes + kWeightBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes + kConsumerWarps * kStripeBytes + kAlignment;
  static constexpr int kPart = kChannels / kCluster;  // channels one CTA of the cluster fetches
  static_assert(kPart % kAtomRows == 0, "whole swizzle atoms");
  static_assert(kSharedBytes + 2 * kStages * 8 <= 227 * 1024, "shared memory");
};

// Tiles of the output, in clusters of kCluster token tiles.
struct Tiles {
  int rows, columns;  // cluster tiles along tokens, tiles along channels
};

struct Place {
  int row, column;
};

// Tile `at` in the order described above; the last group may be shorter.
template <int kCluster>
__device__ __forceinline__ Place place_of(int at, const Tiles& tiles) {
  constexpr int kRows = kGroup / kCluster;
  const int per_group = kRows * tiles.columns, group = at / per_group, first = group * kRows;
  const int rows = min(kRows, tiles.rows - first), inside = at - group * per_group;
  return Place{first + inside % rows, inside / rows};
}

// Writes a warp's 16 tokens x kChannels channels. `stripe` is this warp's staging memory.
template <int kChannels>
__device__ __forceinline__ void store_tile(const Epilogue& e, const int32_t (&acc)[kChannels / 2], int m0, int n0,
                                           uint32_t stripe, int lane) {
  const int g = lane >> 2, t = lane & 3;
  const TokenTerms upper = load_token(e, m0 + g), lower = load_token(e, m0 + g + 8);
  // stmatrix: lane l addresses row l % 16 of the stripe, chunk (8 channels) l / 16 of a pair of chunks.
  const int put_row = lane & 15, put_chunk = lane >> 4;
  const int get_row = lane >> 3, get_chunk = lane & 7;
#pragma unroll
  for (int c = 0; c < kChannels; c += kStripe) {
    if (n0 + c >= e.n) break;
#pragma unroll
    for (int pair = 0; pair < kStripe / 16; ++pair) {
      if (c + 16 * pair >= kChannels) break;
      uint32_t words[4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int j = (c + 16 * pair) / 8 + half, n = n0 + 8 * j + 2 * t;
        const ChannelTerms even = load_channel(e, n), odd = load_channel(e, n + 1);
        const float v0 = finish(acc[4 * j], upper, even, e), v1 = finish(acc[4 * j + 1], upper, odd, e);
        const float v2 = finish(acc[4 * j + 2], lower, even, e), v3 = finish(acc[4 * j + 3], lower, odd, e);
        if (e.y_dtype == DType::kF32) {
          store_f32(e, m0 + g, n, v0);
          store_f32(e, m0 + g, n + 1, v1);
          store_f32(e, m0 + g + 8, n, v2);
          store_f32(e, m0 + g + 8, n + 1, v3);
        }
        words[2 * half] = pack_pair(e.y_dtype, v0, v1);
        words[2 * half + 1] = pack_pair(e.y_dtype, v2, v3);
      }
      const int chunk = 2 * pair + put_chunk;
      ptx::stmatrix_x4(stripe + put_row * kStripe * 2 + ((chunk ^ (put_row & 7)) << 4), words[0], words[1], words[2],
                       words[3]);
    }
    if (e.y_dtype == DType::kF32) continue;
    __syncwarp();
#pragma unroll
    for (int pass = 0; pass < 4; ++pass) {
      const int row = pass * 4 + get_row, m = m0 + row, n = n0 + c + get_chunk * 8;
      uint32_t v[4];
      asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                   : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                   : "r"(stripe + row * kStripe * 2 + ((get_chunk ^ (row & 7)) << 4))
                   : "memory");
      if (c + get_chunk * 8 < kChannels && m < e.m) {
        if (e.vectors && n + 8 <= e.n) {
          *reinterpret_cast<uint4*>(static_cast<uint16_t*>(e.y) + int64_t(m) * e.y_stride + n) =
              make_uint4(v[0], v[1], v[2], v[3]);
        } else {
#pragma unroll
          for (int i = 0; i < 4; ++i) store_pair(e, m, n + 2 * i, v[i]);
        }
      }
    }
    __syncwarp();
  }
}

template <typename S>
__global__ void __launch_bounds__(kThreads, 1)
    gemm_tiled_kernel(const __grid_constant__ CUtensorMap x_map, const GemmW8A8Args a, const Epilogue e,
                      const Tiles tiles) {
  extern __shared__ uint8_t shared[];
  __shared__ __align__(8) uint64_t full_barriers[S::kStages], empty_barriers[S::kStages];
  const uint32_t base = (ptx::smem_u32(shared) + kAlignment - 1) / kAlignment * kAlignment;
  const uint32_t full = ptx::smem_u32(full_barriers), empty = ptx::smem_u32(empty_barriers);
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const int rank = S::kCluster > 1 ? static_cast<int>(ptx::cluster_rank()) : 0;
  const int first = blockIdx.x / S::kCluster, step = gridDim.x / S::kCluster;
  const int tile_count = tiles.rows * tiles.columns, slab_count = static_cast<int>(slabs(a.k));

  if (threadIdx.x == 0) {
    for (int s = 0; s < S::kStages; ++s) {
      ptx::mbarrier_init(full + 8 * s, 1);
      ptx::mbarrier_init(empty + 8 * s, kConsumerWarps * S::kCluster);  // both CTAs read what either fetches
    }
    ptx::fence_mbarrier_init();
  }
  if constexpr (S::kCluster > 1) {
    ptx::cluster_arrive();
    ptx::cluster_wait();
  } else {
    __syncthreads();
  }
  ptx::grid_dependency_wait();

  if (warp >= kConsumerWarps) {
    ptx::registers_decrease<kProducerRegisters>();
    if (warp == kConsumerWarps && ptx::elect_one()) {
      ptx::prefetch_tensor_map(&x_map);
      const int64_t rows = packed_rows(a.n);
      int stage = 0;
      uint32_t parity = 1;  // of an empty barrier nobody has used: its "previous" phase counts as complete
      for (int at = first; at < tile_count; at += step) {
        const Place place = place_of<S::kCluster>(at, tiles);
        const int m0 = (place.row * S::kCluster + rank) * kTokens, n0 = place.column * S::kChannels;
        // Rows of this weight tile that exist, and those of them this CTA fetches for the cluster.
        const int inside = min(S::kChannels, static_cast<int>(rows) - n0);
        const int own = max(0, min(S::kPart, inside - rank * S::kPart));
        const int8_t* weights = a.packed + (int64_t(n0) + rank * S::kPart) * kSlabK;
        for (int kb = 0; kb < slab_count; ++kb) {
          ptx::mbarrier_wait_cluster(empty + 8 * stage, parity);
          const uint32_t barrier = full + 8 * stage, tokens = base + stage * S::kStageBytes;
          const uint32_t target = tokens + kTokenBytes + rank * S::kPart * kSlabK;
          ptx::mbarrier_arrive_expect_tx(barrier, kTokenBytes + inside * kSlabK);
          ptx::tensor_load_2d(tokens, &x_map, kb * kSlabK, m0, barrier, ptx::kEvictLast);
          if (own > 0) {
            const int8_t* source = weights + int64_t(kb) * rows * kSlabK;
            if constexpr (S::kCluster > 1) {
              ptx::bulk_load_multicast(target, source, own * kSlabK, barrier, (1 << S::kCluster) - 1, ptx::kEvictLast);
            } else {
              ptx::bulk_load(target, source, own * kSlabK, barrier, ptx::kEvictLast);
            }
          }
          if (++stage == S::kStages) stage = 0, parity ^= 1;
        }
      }
      ptx::grid_launch_dependents();
    }
    __syncwarp();
  } else {
    ptx::registers_increase<kConsumerRegisters>();
    const int group = warp >> 2;
    const uint32_t stripe = base + S::kStages * S::kStageBytes + warp * kStripeBytes;
    const auto release = [&](int s) {
      if (lane < S::kCluster) ptx::mbarrier_arrive_cluster(empty + 8 * s, lane);
    };
    int stage = 0;
    uint32_t parity = 0;
    for (int at = first; at < tile_count; at += step) {
      const Place place = place_of<S::kCluster>(at, tiles);
      int32_t acc[S::kChannels / 2];
      int previous = 0;
      for (int kb = 0; kb < slab_count; ++kb) {
        ptx::mbarrier_wait(full + 8 * stage, parity);
        const uint32_t tile = base + stage * S::kStageBytes;
        const uint64_t tokens = ptx::wgmma_descriptor(tile + group * 64 * kSlabK);
        const uint64_t weights = ptx::wgmma_descriptor(tile + kTokenBytes);
        ptx::wgmma_fence();
#pragma unroll
        for (int k = 0; k < kSlabK / 32; ++k) {
          WgmmaS8<S::kChannels>::run(acc, tokens + 2 * k, weights + 2 * k, kb + k);
        }
        ptx::wgmma_commit();
        ptx::wgmma_wait<1>();  // the previous slab's products are done: its stage is free
        if (kb > 0) release(previous);
        previous = stage;
        if (++stage == S::kStages) stage = 0, parity ^= 1;
      }
      ptx::wgmma_wait<0>();
      release(previous);
      const int m0 = (place.row * S::kCluster + rank) * kTokens + warp * 16, n0 = place.column * S::kChannels;
      if (m0 < a.m) store_tile<S::kChannels>(e, acc, m0, n0, stripe, lane);
    }
  }
  if constexpr (S::kCluster > 1) {  // a CTA's barriers must outlive the other's last arrivals
    ptx::cluster_arrive();
    ptx::cluster_wait();
  }
}

template <typename S>
void run(const GemmW8A8Args& args, bool dependent, cudaStream_t stream) {
  static std::atomic<uint64_t> allowed{0};
  allow_shared_memory(reinterpret_cast<const void*>(gemm_tiled_kernel<S>), S::kSharedBytes, allowed);
  const CUtensorMap map = byte_matrix_map(args.xq, args.m, args.k, args.x_stride, kTokens);
  Tiles tiles;
  tiles.rows = static_cast<int>(blocks(args.m, kTokens * S::kCluster));
  tiles.columns = static_cast<int>(blocks(args.n, S::kChannels));
  const int clusters = multiprocessors() / S::kCluster, count = tiles.rows * tiles.columns;
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>((count < clusters ? count : clusters) * S::kCluster));
  shape.block = dim3(kThreads);
  shape.shared_bytes = S::kSharedBytes;
  shape.cluster = S::kCluster;
  shape.dependent = dependent;
  launch(gemm_tiled_kernel<S>, shape, stream, "gemm_w8a8_tiled", map, args, make_epilogue(args), tiles);
}

}  // namespace

void gemm_w8a8_tiled(const GemmW8A8Args& args, const W8A8Config& c, bool dependent, cudaStream_t stream) {
  // The instances: channels, stages, cluster.
  switch (c.tile * 4 + c.split) {
    case 128 * 4 + 1:
      return run<Shape<128, 6, 1>>(args, dependent, stream);
    case 128 * 4 + 2:
      return run<Shape<128, 6, 2>>(args, dependent, stream);
    case 192 * 4 + 2:
      return run<Shape<192, 5, 2>>(args, dependent, stream);
    case 224 * 4 + 2:
      return run<Shape<224, 4, 2>>(args, dependent, stream);
    case 256 * 4 + 1:
      return run<Shape<256, 4, 1>>(args, dependent, stream);
    case 256 * 4 + 2:
      return run<Shape<256, 4, 2>>(args, dependent, stream);
    default:
      throw std::invalid_argument("tiled kernel: no instance with " + std::to_string(c.tile) +
                                  " channels in clusters of " + std::to_string(c.split));
  }
}

}  // namespace qk::cuda
