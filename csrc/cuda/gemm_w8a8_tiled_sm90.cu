// W8A8 GEMM for many tokens on sm_90a: limited by the tensor cores, and those by the chip's power.
//
// Tokens are the 64-row wgmma operand, channels the n operand. A CTA owns a tile of 128 tokens x kChannels channels,
// two consumer warpgroups of 64 tokens each, and walks K in slabs of 128 bytes through a ring of stages:
//
//        kChannels                       cluster of kCluster = 2: the CTAs take neighbouring token tiles and the same
//      +-----------+                     channels; each fetches half of the weight tile and multicasts it to both, so
//  64  | warps 0-3 |   x K               a weight byte crosses the L2 once for 256 tokens.
//      +-----------+
//  64  | warps 4-7 |                     warps 8 and 9 fetch weights and tokens. They run ahead into the next tile
//      +-----------+                     while the consumers write the last one out. Warps 10 and 11 only hand their
//                                        registers over.
//
// At the s8 peak a 128 x 256 tile takes 48 bytes a cycle into shared memory (32 from the L2 with multicast), a 128 x
// 128 one 64. Narrower instances (224, 128) exist for the quantization of waves alone: with 1024 tokens and 14336
// channels, 512 tiles of 224 channels fill 132 multiprocessors 3.9 times, 448 of 256 only 3.4 times.
//
// The grid is persistent: cluster c takes tiles c, c + clusters, ... in an order that walks the tokens of a group of
// kGroup token tiles before it moves to the next channels, so a wave's operands fit in the L2.
//
// Taking turns (kTurns): or each warpgroup owns every other tile, multiplies all its tokens, and writes it out behind
// the other one's products. That takes fewer cycles, and more power for each.
//
// Epilogue otherwise: fragment -> fp32 steps -> 16-bit pairs, which stay in registers (64 of them) while the next
// tile's products run. Stripes of 64 channels then go out (outputs_w8a8_sm90.cuh) at even distances behind the products
// of three quarters of K. Written at once, the tiles of all CTAs, 64 KB each, would come as one burst that the L2 takes
// microseconds to absorb while no tensor core works. (fp32 outputs do not fit beside the sums and are written at once.)
// The warpgroups share nothing in all this and need not arrive together.
#include "host.h"
#include "launch.h"
#include "outputs_w8a8_sm90.cuh"
#include "tensor_map.h"
#include "wgmma.cuh"

namespace qk::cuda {
namespace {

constexpr int kTokens = 128;
constexpr int kConsumers = 256;
constexpr int kThreads = kConsumers + 128;  // the producer's warpgroup: setmaxnreg works on whole ones
constexpr int kConsumerWarps = kConsumers / 32;
constexpr int kTokenBytes = kTokens * kSlabK;
constexpr int kAlignment = 1024;
constexpr int kTurnBarrier = 3;  // and the next one: a warpgroup's turn
constexpr int kBoxRows = 32;  // of tokens, where the last tile is not full
constexpr int kGroup = 16;  // token tiles walked before the next channels
// Registers per thread: 168 at launch (64 K over 384 threads), then moved from the producer to the consumers.
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;

// kTurns_: each warpgroup takes whole tiles, every other one of the CTA's.
template <int kChannels_, int kStages_, int kCluster_, bool kTurns_ = false>
struct Shape {
  static constexpr int kChannels = kChannels_, kStages = kStages_, kCluster = kCluster_;
  static constexpr bool kTurns = kTurns_;
  static constexpr int kReleases = kTurns ? kConsumerWarps / 2 : kConsumerWarps;  // warps that read a stage
  static constexpr int kWeightBytes = kChannels * kSlabK;
  static constexpr int kStageBytes = kTokenBytes + kWeightBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes + kConsumerWarps * kStripeBytes + kAlignment;
  static constexpr int kTermBytes = 2 * kChannels * static_cast<int>(sizeof(ChannelTerms));
  static constexpr int kPart = kChannels / kCluster;  // channels one CTA of the cluster fetches
  static_assert(kPart % kAtomRows == 0, "whole swizzle atoms");
  static_assert(kSharedBytes + kTermBytes + 2 * kStages * 8 <= 227 * 1024, "shared memory");
};

// Tiles of the output, in clusters of kCluster token tiles. Tokens are copied in boxes of `box_rows`, and a box without
// any is left out: copies that only fill with zeros take longer than others.
struct Tiles {
  int rows, columns;  // cluster tiles along tokens, tiles along channels
  int box_rows;
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

template <typename S, DType kOut>
__global__ void __launch_bounds__(kThreads, 1)
    gemm_tiled_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap y_map,
                      const GemmW8A8Args a, const Epilogue e, const Tiles tiles) {
  extern __shared__ uint8_t shared[];
  __shared__ __align__(8) uint64_t full_barriers[S::kStages], empty_barriers[S::kStages];
  __shared__ __align__(8) TileTerms<S::kChannels> all_terms[2];  // of each warpgroup
  const uint32_t base = (ptx::smem_u32(shared) + kAlignment - 1) / kAlignment * kAlignment;
  const uint32_t full = ptx::smem_u32(full_barriers), empty = ptx::smem_u32(empty_barriers);
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const int rank = S::kCluster > 1 ? static_cast<int>(ptx::cluster_rank()) : 0;
  const int step = gridDim.x / S::kCluster;
  const int tile_count = tiles.rows * tiles.columns, slab_count = static_cast<int>(slabs(a.k));

  if (threadIdx.x == 0) {
    for (int s = 0; s < S::kStages; ++s) {
      ptx::mbarrier_init(full + 8 * s, 1);
      ptx::mbarrier_init(empty + 8 * s, S::kReleases * S::kCluster);  // both CTAs read what either fetches
    }
    ptx::fence_mbarrier_init();
  }
  if constexpr (S::kCluster > 1) {
    ptx::cluster_arrive_relaxed();
    ptx::cluster_wait();
  } else {
    __syncthreads();
  }

  if (warp >= kConsumerWarps) {
    ptx::registers_decrease<kProducerRegisters>();
    int stage = 0;
    uint32_t parity = 1;  // of an empty barrier nobody has used: its "previous" phase counts as complete
    const auto advance = [&] {
      if (++stage == S::kStages) stage = 0, parity ^= 1;
    };
    if (warp == kConsumerWarps && ptx::elect_one()) {
      const int rows = static_cast<int>(packed_rows(a.n));
      const int64_t slab_bytes = a.slab_rows * kSlabK;
#pragma unroll 1
      for (int at = ptx::block_x() / S::kCluster; at < tile_count; at += step) {
        const Place place = place_of<S::kCluster>(at, tiles);
        // Rows of this weight tile that exist, those of them this CTA fetches for the cluster, and tokens in whole
        // boxes.
        const int n0 = place.column * S::kChannels, inside = min(S::kChannels, rows - n0);
        const int own = min(S::kPart, inside - rank * S::kPart);
        const int tokens = max(0, min(kTokens, a.m - (place.row * S::kCluster + rank) * kTokens));
        const uint32_t bytes = (((tokens + tiles.box_rows - 1) & -tiles.box_rows) + inside) * kSlabK;
        const uint32_t target = base + kTokenBytes + rank * S::kPart * kSlabK;
        const int8_t* source = a.packed + (n0 + rank * S::kPart) * kSlabK;
        // The first stages' weights, the caller's constants, are on their way before the activations are there.
#pragma unroll 1
        for (int kb = 0; kb < slab_count; ++kb, source += slab_bytes, advance()) {
          const uint32_t bar = full + 8 * stage;
          ptx::mbarrier_wait(empty + 8 * stage, parity);
          ptx::mbarrier_arrive_expect_tx(bar, bytes);
          if (own <= 0) continue;
          if constexpr (S::kCluster > 1) {
            ptx::bulk_load_multicast(target + stage * S::kStageBytes, source, own * kSlabK, bar, (1 << S::kCluster) - 1,
                                     ptx::kEvictNormal);
          } else {
            ptx::bulk_load(target + stage * S::kStageBytes, source, own * kSlabK, bar, ptx::kEvictNormal);
          }
        }
      }
      ptx::grid_launch_dependents();
      // Stay until the last arrivals of the other CTA are here.
      for (int s = 0; s < S::kStages; ++s, advance()) ptx::mbarrier_wait(empty + 8 * stage, parity);
    } else if (warp == kConsumerWarps + 1 && lane * tiles.box_rows < kTokens) {  // a lane for each box of tokens
      if (lane == 0) ptx::prefetch_tensor_map(&x_map);
      ptx::grid_dependency_wait();
      const int row = lane * tiles.box_rows;
#pragma unroll 1
      for (int at = ptx::block_x() / S::kCluster; at < tile_count; at += step) {
        const int m = (place_of<S::kCluster>(at, tiles).row * S::kCluster + rank) * kTokens + row;
#pragma unroll 1
        for (int kb = 0; kb < slab_count; ++kb, advance()) {
          if (m >= a.m) continue;
          ptx::mbarrier_wait(empty + 8 * stage, parity);
          ptx::tensor_load_2d(base + stage * S::kStageBytes + row * kSlabK, &x_map, kb * kSlabK, m, full + 8 * stage,
                              ptx::kEvictNormal);
        }
      }
    }
    __syncwarp();
  } else {
    ptx::registers_increase<kConsumerRegisters>();
    const int group = static_cast<int>(ptx::uniform(warp >> 2)), member = threadIdx.x & 127;
    TileTerms<S::kChannels>& terms = all_terms[group];
    const uint32_t stripe = base + S::kStages * S::kStageBytes + warp * kStripeBytes;
    const auto release = [&](int s) {
      if (lane < S::kCluster) ptx::mbarrier_arrive_cluster(empty + 8 * s, lane);
    };
    const Output out{e, &y_map};
    int stage = 0;
    uint32_t parity = 0;
    ptx::grid_dependency_wait();
    if constexpr (S::kTurns) {
      const auto skip = [&](int count) {
        stage += count;
        parity ^= (stage / S::kStages) & 1, stage %= S::kStages;
      };
      skip(group * slab_count);  // the other one's
      for (int at = ptx::block_x() / S::kCluster + group * step; at < tile_count; at += 2 * step) {
        int32_t acc[2][S::kChannels / 2];
        int previous = 0;
        // Not before the other one has seen its last stage full: a parity tells only two phases of a barrier apart.
        if (at >= step) ptx::named_barrier(kTurnBarrier + group, kConsumers);
#pragma unroll 1
        for (int kb = 0; kb < slab_count; ++kb) {
          const uint32_t tile = ptx::uniform(base + stage * S::kStageBytes);
          ptx::mbarrier_wait(full + 8 * stage, parity);
          const uint64_t tokens[2] = {ptx::wgmma_descriptor(tile), ptx::wgmma_descriptor(tile + 64 * kSlabK)};
          const uint64_t weights = ptx::wgmma_descriptor(tile + kTokenBytes);
          ptx::wgmma_fence();
#pragma unroll
          for (int k = 0; k < kSlabK / 32; ++k) {
            WgmmaS8<S::kChannels>::run(acc[0], tokens[0] + 2 * k, weights + 2 * k, kb + k);
            WgmmaS8<S::kChannels>::run(acc[1], tokens[1] + 2 * k, weights + 2 * k, kb + k);
          }
          ptx::wgmma_commit();
          ptx::wgmma_wait<1>();
          if (kb > 0) release(previous);
          previous = stage;
          if (++stage == S::kStages) stage = 0, parity ^= 1;
        }
        ptx::named_barrier_arrive(kTurnBarrier + 1 - group, kConsumers);
        ptx::wgmma_wait<0>();
        release(previous);
        skip(slab_count);

        // Behind the other warpgroup's products, all of it.
        const Place place = place_of<S::kCluster>(at, tiles);
        const int m0 = (place.row * S::kCluster + rank) * kTokens + (warp & 3) * 16;
        Corner corner;
        corner.n0 = place.column * S::kChannels;
        for (int n = member; n < S::kChannels; n += 128) terms.put(n, load_channel(e, corner.n0 + n));
        ptx::named_barrier(1 + group, 128);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          corner.m0 = m0 + half * 64;
          corner.upper = load_token(e, corner.m0 + (lane >> 2));
          corner.lower = load_token(e, corner.m0 + (lane >> 2) + 8);
          if constexpr (kOut == DType::kF32) {
            store_f32_tile<S::kChannels>(e, acc[half], corner, terms, lane);
          } else {
            with_terms(e, [&](auto kind) {
              store_tile<S::kChannels, kOut, kind.value>(out, acc[half], corner, terms, stripe, lane);
            });
          }
        }
        ptx::named_barrier(1 + group, 128);
      }
      if (lane == 0) ptx::bulk_wait_read();
      return;
    }
    Held<S::kChannels> held;
    held.any = false;
    constexpr int kStripes = (S::kChannels + kStripe - 1) / kStripe;
    const int apart = max(1, slab_count * 3 / (4 * kStripes));  // slabs between stores
    for (int at = ptx::block_x() / S::kCluster; at < tile_count; at += step) {
      int32_t acc[S::kChannels / 2];
      int previous = 0;
      const auto multiply = [&](int kb) {
        const uint32_t tile = ptx::uniform(base + stage * S::kStageBytes);
        ptx::mbarrier_wait(full + 8 * stage, parity);
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
      };
      int kb = 0;
      if constexpr (kOut != DType::kF32) {
        // What the last tile left goes out behind this one's products.
#pragma unroll
        for (int c = 0; c < S::kChannels; c += kStripe) {
#pragma unroll 1
          for (int i = 0; i < apart && kb < slab_count; ++i) multiply(kb++);
          if (held.any) store_stripe<S::kChannels>(out, held, c, stripe, lane);
        }
      }
      // Where the tile lies and its scales: here, behind products, whom divisions and loads delay at a tile's begin for
      // 900 cycles.
      const Place place = place_of<S::kCluster>(at, tiles);
      Corner corner;
      corner.m0 = (place.row * S::kCluster + rank) * kTokens + warp * 16, corner.n0 = place.column * S::kChannels;
      corner.upper = load_token(e, corner.m0 + (lane >> 2)), corner.lower = load_token(e, corner.m0 + (lane >> 2) + 8);
      ChannelTerms own[S::kChannels > 128 ? 2 : 1];
#pragma unroll
      for (int i = 0; i * 128 < S::kChannels; ++i) own[i] = load_channel(e, corner.n0 + i * 128 + member);
      while (kb < slab_count) multiply(kb++);
      ptx::wgmma_wait<0>();
      release(previous);

#pragma unroll
      for (int i = 0; i * 128 < S::kChannels; ++i) {
        if (i * 128 + member < S::kChannels) terms.put(i * 128 + member, own[i]);
      }
      ptx::named_barrier(1 + group, 128);
      if constexpr (kOut == DType::kF32) {
        store_f32_tile<S::kChannels>(e, acc, corner, terms, lane);
      } else {
        with_terms(e, [&](auto kind) { hold<S::kChannels, kOut, kind.value>(held, acc, corner, terms, lane); });
      }
      ptx::named_barrier(1 + group, 128);  // nobody writes the next tile's terms over these
    }
    if constexpr (kOut != DType::kF32) {
#pragma unroll
      for (int c = 0; c < S::kChannels; c += kStripe) store_stripe<S::kChannels>(out, held, c, stripe, lane);
      if (lane == 0) ptx::bulk_wait_read();
    }
  }
}

template <typename S, DType kOut>
void run_typed(const GemmW8A8Args& args, bool dependent, cudaStream_t stream) {
  static std::atomic<uint64_t> allowed{0};
  allow_shared_memory(reinterpret_cast<const void*>(gemm_tiled_kernel<S, kOut>), S::kSharedBytes, allowed);
  Tiles tiles;
  tiles.box_rows = args.m % kTokens == 0 ? kTokens : kBoxRows;
  const CUtensorMap map =
      byte_matrix_map(args.xq, args.m, args.k, args.x_stride, static_cast<uint32_t>(tiles.box_rows));
  tiles.rows = static_cast<int>(blocks(args.m, kTokens * S::kCluster));
  tiles.columns = static_cast<int>(blocks(args.n, S::kChannels));
  const int clusters = multiprocessors() / S::kCluster, count = tiles.rows * tiles.columns;
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>((count < clusters ? count : clusters) * S::kCluster));
  shape.block = dim3(kThreads);
  shape.shared_bytes = S::kSharedBytes;
  shape.cluster_x = S::kCluster;
  shape.dependent = dependent;
  const Epilogue e = make_epilogue(args);
  const CUtensorMap outputs = kOut != DType::kF32 && e.vectors
                                  ? word16_matrix_map(args.y, args.m, args.n, args.y_stride * 2, kStripeTokens)
                                  : map;  // which nobody reads
  launch(gemm_tiled_kernel<S, kOut>, shape, stream, "gemm_w8a8_tiled", map, outputs, args, e, tiles);
}

template <typename S>
void run(const GemmW8A8Args& args, bool dependent, cudaStream_t stream) {
  switch (args.y_dtype) {
    case DType::kF32:  // in turns they would need more registers than there are
      return run_typed<Shape<S::kChannels, S::kStages, S::kCluster>, DType::kF32>(args, dependent, stream);
    case DType::kBF16:
      return run_typed<S, DType::kBF16>(args, dependent, stream);
    case DType::kF16:
      return run_typed<S, DType::kF16>(args, dependent, stream);
  }
}

}  // namespace

void gemm_w8a8_tiled(const GemmW8A8Args& args, const W8A8Config& c, bool dependent, cudaStream_t stream) {
  // The instances: channels, stages, cluster.
  switch (c.tile * 4 + c.share) {
    case 128 * 4 + 1:
      return run<Shape<128, 6, 1>>(args, dependent, stream);
    case 128 * 4 + 2:
      if (c.deep) return run<Shape<128, 6, 2, true>>(args, dependent, stream);
      return run<Shape<128, 6, 2>>(args, dependent, stream);
    case 224 * 4 + 2:
      return run<Shape<224, 4, 2>>(args, dependent, stream);
    case 256 * 4 + 1:
      return run<Shape<256, 4, 1>>(args, dependent, stream);
    case 256 * 4 + 2:
      return run<Shape<256, 4, 2>>(args, dependent, stream);
    default:
      throw std::invalid_argument("tiled kernel: no instance with " + std::to_string(c.tile) +
                                  " channels in clusters of " + std::to_string(c.share));
  }
}

}  // namespace qk::cuda
