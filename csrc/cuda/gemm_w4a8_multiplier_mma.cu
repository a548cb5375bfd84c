// y [M, N] = float(d) * x_scale * channel_scale + bias by mma.sync m16n8k32, each step rounded once: 4-bit weights
// whose groups have multipliers, int8 activations, d = sum over k of multiplier * (q - zero) * a. sm_80 on. Equal to
// the product of the 8-bit weights multiplier * (q - zero) bit for bit, since integers add up in any order.
//
// Weights are the 16-row operand; how codes and multipliers become its fragments stands in operands_w4a8.cuh. The
// products of all of K add to the same sums: nothing happens at the end of a group, but that other multipliers meet the
// codes after it. A slab has as many rows of them as groups_w4.cuh says, one for each 128, 64 or 32 k.
//
// Activations with zero points hold stored = q - 128, and the totals are set right once, at the end, by the sums of
// weights over all K that come with them (GemmW4A8Args::channel_sum): d = sum stored * w - (zero_x - 128) * sum w. No
// sum overflows for K up to 65,536: those of stored activations, and of weights times a shift, are at most
// 128 * 120 * K < 2^30, and their difference is at most 255 * 120 * K < 2^31.
//
// Tiles are those of tiles_w4a8.cuh. Few tokens ("narrow"): warps run over slabs without waiting for one another, and
// their sums meet in shared memory at the end.
//
//     warp 0: slab 0, 8, ...   warp 1: slab 1, 9, ...  ...  warp 7: slab 7, 15, ...
//
// More tokens ("wide"): each warp walks all of K. A single set of sums leaves registers for two CTAs to an SM.
#include "tiles_w4a8.cuh"

namespace qk::cuda {
namespace {

constexpr int kFactorBytes = 2;  // of what W4Weight::scale says of a group
constexpr int kMostRows = 4;  // of them in a slab

// Starts the copies of the rows of a slab for kChannels channels from n0 on; channels that do not exist get the values
// of others. `thread`: of as many as there are pieces of 16 bytes, or more.
template <int kChannels>
__device__ __forceinline__ void load_factors(const Job& job, uint32_t target, int slab, int n0, int thread) {
  constexpr int kPieceChannels = 16 / kFactorBytes, kPieces = kChannels / kPieceChannels;  // of a row
  const GroupRows& r = job.groups;
  if (thread >= kPieces << r.row_shift) return;
  const W4Weight& w = job.a.weight;
  const int k = slab * kW4SlabK + thread / kPieces * (kW4SlabK >> r.row_shift);
  const int64_t group = group_of(r, min(k, w.k - 1));
  const int channel = min(n0 + thread % kPieces * kPieceChannels, r.width - kPieceChannels);
  ptx::cp_async_16(target + thread * 16,
                   static_cast<const uint8_t*>(w.scale) + (group * r.pitch + channel) * kFactorBytes, 16);
}

// Adds the products of a slab. `codes`: the warp's blocks; `factors`: those of the first channel of its first row;
// kOneRow: there is only that row.
template <typename S, bool kOneRow>
__device__ __forceinline__ void multiply_slab(const Job& job, const uint8_t* codes, uint32_t tokens,
                                              const uint8_t* factors, int lane,
                                              int32_t (&acc)[S::kBlocksN][S::kBlocksM][4]) {
  Multiplier m[S::kBlocksN][2];
  uint4 half[S::kBlocksN];
#pragma unroll
  for (int quarter = 0; quarter < 4; ++quarter) {
    uint32_t f[S::kBlocksN][4];
#pragma unroll
    for (int i = 0; i < S::kBlocksN; ++i) {
      if (quarter == 0 || !kOneRow) {
        const int row = kOneRow ? 0 : quarter >> (2 - job.groups.row_shift);
        const uint8_t* at = factors + (row * S::kChannels + i * kW4Rows + (lane >> 2)) * kFactorBytes;
        m[i][0] = multiplier_of(*reinterpret_cast<const uint16_t*>(at));
        m[i][1] = multiplier_of(*reinterpret_cast<const uint16_t*>(at + 8 * kFactorBytes));
      }
      if (quarter % 2 == 0) {
        half[i] = *reinterpret_cast<const uint4*>(codes + i * kW4BlockBytes + quarter / 2 * 512 + lane * 16);
      }
      const uint32_t first = quarter % 2 ? half[i].z : half[i].x, second = quarter % 2 ? half[i].w : half[i].y;
      f[i][0] = low_bytes(first, m[i][0]), f[i][1] = high_bytes(first, m[i][1]);
      f[i][2] = low_bytes(second, m[i][0]), f[i][3] = high_bytes(second, m[i][1]);
    }
    constexpr int kAtOnce = S::kBlocksM < 2 ? 1 : 2;  // blocks of tokens in registers: what one ldmatrix brings
#pragma unroll
    for (int first = 0; first < S::kBlocksM; first += kAtOnce) {
      uint32_t b[kAtOnce][2];
      load_tokens<kAtOnce>(tokens + first * 8 * kTokenBytes, quarter, lane, b);
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
#pragma unroll
        for (int i = 0; i < S::kBlocksN; ++i) ptx::mma_s8(acc[i][first + j], f[i], b[j][0], b[j][1]);
      }
    }
  }
}

// ---- Few tokens ----------------------------------------------------------------------------------------------------

template <int kTokens_>
struct Narrow : NarrowTile<kTokens_> {
  using Tile = NarrowTile<kTokens_>;
  static constexpr int kTokensAt = Tile::kWeightBytes, kFactorsAt = kTokensAt + kTokens_ * kTokenBytes;  // in a stage
  static constexpr int kStageBytes = kFactorsAt + kMostRows * Tile::kChannels * kFactorBytes;  // of a warp
  static constexpr int kSharedBytes = kWarps * Tile::kStages * kStageBytes;
  static_assert(kSharedBytes <= 99 * 1024, "sm_86 and sm_89 have 99 KB");
  static_assert((kWarps + 1) * Tile::kOutputs * 4 <= kSharedBytes, "sums of all warps, and outputs");
};

template <typename S>
__global__ void __launch_bounds__(kThreads, 2) narrow_kernel(const Job job) {
  extern __shared__ __align__(128) uint8_t shared[];
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
  const int n0 = blockIdx.x * S::kChannels, m0 = blockIdx.y * S::kTokens;
  const int count = (job.slabs - warp + kWarps - 1) / kWarps;  // slabs of this warp
  const uint8_t* own = shared + warp * S::kStages * S::kStageBytes;
  const uint32_t own_address = ptx::smem_u32(own);

  const auto load_weights = [&](int turn) {
    const uint32_t stage = own_address + turn % S::kStages * S::kStageBytes;
    load_codes<S::kChannels, 32>(job, stage, turn * kWarps + warp, n0, lane);
    load_factors<S::kChannels>(job, stage + S::kFactorsAt, turn * kWarps + warp, n0, lane);
  };
  const auto load_x = [&](int turn) {
    const uint32_t stage = own_address + turn % S::kStages * S::kStageBytes;
    load_activations<S::kTokens, 32>(job, stage + S::kTokensAt, turn * kWarps + warp, m0, lane);
  };

  for (int t = 0; t < S::kStages - 1; ++t) {
    if (t < count) load_weights(t);
  }
  const OwnOutputs<S> outputs;
  ChannelTerms of_channel[S::kPerThread];  // wanted at the end, and far away; as those of tokens
#pragma unroll
  for (int i = 0; i < S::kPerThread; ++i) of_channel[i] = load_channel(job.e, n0 + outputs.channel[i]);
  ptx::grid_dependency_wait();  // the quantizer's rows; weights were there before
  for (int t = 0; t < S::kStages - 1; ++t) {
    if (t < count) load_x(t);
    ptx::cp_async_commit();
  }
  TokenTerms of_token[S::kPerThread];
#pragma unroll
  for (int i = 0; i < S::kPerThread; ++i) of_token[i] = load_token(job.e, m0 + outputs.token[i]);

  int32_t acc[S::kBlocksN][S::kBlocksM][4] = {};
  for (int turn = 0; turn < count; ++turn) {
    ptx::cp_async_wait<S::kStages - 2>();
    __syncwarp();  // the slab has landed for all lanes, and all are done with the stage refilled below
    if (turn + S::kStages - 1 < count) {
      load_weights(turn + S::kStages - 1);
      load_x(turn + S::kStages - 1);
    }
    ptx::cp_async_commit();
    const int stage = turn % S::kStages * S::kStageBytes;
    multiply_slab<S, false>(job, own + stage, own_address + stage + S::kTokensAt, own + stage + S::kFactorsAt, lane,
                            acc);
  }
  ptx::grid_launch_dependents();
  __syncthreads();  // all stages have been read
  int32_t* sums = reinterpret_cast<int32_t*>(shared);
#pragma unroll
  for (int i = 0; i < S::kBlocksN; ++i) {
#pragma unroll
    for (int j = 0; j < S::kBlocksM; ++j) {
      const int32_t (&v)[4] = acc[i][j];
      reinterpret_cast<int4*>(sums + warp * S::kOutputs)[(i * S::kBlocksM + j) * 32 + lane] =
          make_int4(v[0], v[1], v[2], v[3]);
    }
  }
  __syncthreads();
  outputs.store(job.e, reinterpret_cast<float*>(sums + kWarps * S::kOutputs), n0, m0, [&](int i) {
    int32_t d = 0;
#pragma unroll
    for (int other = 0; other < kWarps; ++other) d += sums[other * S::kOutputs + tid + i * kThreads];
    return finish(d, of_token[i], of_channel[i]);
  });
}

// ---- More tokens ---------------------------------------------------------------------------------------------------

template <int kTokens_>
struct Wide : WideTile<kTokens_> {
  using Tile = WideTile<kTokens_>;
  static constexpr int kTokensAt = Tile::kWeightBytes, kFactorsAt = kTokensAt + kTokens_ * kTokenBytes;  // in a stage
  static constexpr int kMostBytes = Tile::kStages * (kFactorsAt + kMostRows * Tile::kChannels * kFactorBytes);
  static_assert(kMostBytes <= 99 * 1024, "sm_86 and sm_89 have 99 KB");
};

template <typename S>
__global__ void __launch_bounds__(kThreads, 2) wide_kernel(const Job job) {
  extern __shared__ __align__(128) uint8_t shared[];
  const uint32_t base = ptx::smem_u32(shared);
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, warp_n = warp & 3, warp_m = warp >> 2;
  const int n0 = blockIdx.y * S::kChannels, m0 = blockIdx.x * S::kTokens;  // neighbours share weights
  int32_t acc[S::kBlocksN][S::kBlocksM][4] = {};

  const auto load = [&](uint32_t stage, int slab) {
    load_codes<S::kChannels, kThreads>(job, stage, slab, n0, tid);
    load_activations<S::kTokens, kThreads>(job, stage + S::kTokensAt, slab, m0, tid);
    // A few threads' addresses, found out anew: the loop has no registers to keep them in.
    load_factors<S::kChannels>(job, stage + S::kFactorsAt, slab, n0, static_cast<int>(ptx::keep(tid)));
  };
  const auto multiply = [&](int stage, int) {
    const uint8_t* codes = shared + stage + warp_n * S::kBlocksN * kW4BlockBytes;
    const uint8_t* factors = shared + stage + S::kFactorsAt + warp_n * S::kBlocksN * kW4Rows * kFactorBytes;
    const uint32_t tokens = base + stage + S::kTokensAt + warp_m * (S::kTokens / 2) * kTokenBytes;
    if (job.groups.row_shift == 0) {
      multiply_slab<S, true>(job, codes, tokens, factors, lane, acc);
    } else {
      multiply_slab<S, false>(job, codes, tokens, factors, lane, acc);
    }
  };
  ptx::grid_dependency_wait();
  walk_slabs<S::kStages>(job, base, load, multiply);
  ptx::grid_launch_dependents();

  const int m = m0 + warp_m * S::kBlocksM * 8;
#pragma unroll
  for (int i = 0; i < S::kBlocksN; ++i) {
    const int n = n0 + (warp_n * S::kBlocksN + i) * 16;
    const ChannelTerms low = load_channel(job.e, n + (lane >> 2)), high = load_channel(job.e, n + (lane >> 2) + 8);
    store_blocks<S::kBlocksM>(job.e, n, m, lane, [&](int j, float (&v)[4]) {
      const int even = m + 8 * j + 2 * (lane & 3);
      finish_channels_by_tokens(acc[i][j], low, high, load_token(job.e, even), load_token(job.e, even + 1), v);
    });
  }
}

}  // namespace

// ---- Launches ------------------------------------------------------------------------------------------------------

void gemm_w4a8_multiplier_mma(const GemmW4A8Args& args, int32_t tokens, bool dependent, cudaStream_t stream) {
  constexpr const char* kName = "gemm_w4a8_multiplier_mma";
  with_tile(kName, tokens, [&](auto tile) {
    constexpr int kTokens = decltype(tile)::value;
    constexpr bool kFew = kTokens <= 16;
    using S = typename std::conditional<kFew, Narrow<kTokens>, Wide<kTokens>>::type;
    Job job = make_job<S>(args);
    job.e.x_scale = args.x_scale, job.e.x_zero_point = args.x_zero_point, job.e.colsum = args.channel_sum;
    job.e.weight_scale = args.weight.channel_scale, job.e.bias = args.bias;
    if constexpr (kFew) {
      static std::atomic<uint64_t> allowed{0};
      allow_shared_memory(reinterpret_cast<const void*>(narrow_kernel<S>), S::kSharedBytes, allowed);
      launch_narrow<S>(narrow_kernel<S>, job, S::kSharedBytes, dependent, stream, kName);
    } else {
      launch_wide<S>(wide_kernel<S>, job, stream, kName);
    }
  });
}

}  // namespace qk::cuda
