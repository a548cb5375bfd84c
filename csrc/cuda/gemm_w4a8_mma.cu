// y [M, N] = (sum over groups in order of float(d_g) * scale_g (+ min_g * float(sum_g))) * x_scale + bias by mma.sync
// m16n8k32: 4-bit weights, int8 activations. sm_80 on. Equal to the definition bit for bit: d_g is exact in int32, and
// the groups of an output are added by one thread in the order of K, each step rounded once.
//
// Weights are the 16-row operand; how codes become its fragments stands in operands_w4a8.cuh.
//
// Activations with zero points ("shifted") have instances of their own, whose sums shift_w4a8.cuh sets right.
//
// Few tokens ("narrow"): a CTA owns 32 channels x 8 or 16 tokens and its eight warps take the slabs of 128 k in turns,
// so that one CTA per 32 channels is enough to keep the memory busy. Every warp leaves the integers of its blocks (the
// parts of a slab that lie in one group) in shared memory, and after each round of eight slabs every thread adds up its
// own output in order:
//
//     round 0:  warp 0: slab 0   warp 1: slab 1  ...  warp 7: slab 7   | d of all blocks | total += float(d) * scale
//     round 1:  warp 0: slab 8   ...
//
// More tokens ("wide"): 128 channels x 64 or 128 tokens, eight warps as 4 along channels x 2 along tokens, each walking
// all of K with its totals in registers.
#include "shift_w4a8.cuh"
#include "tiles_w4a8.cuh"

namespace qk::cuda {
namespace {

// Adds the products of 32 k, from `k` on. `blocks`: the warp's blocks of weights in the stage of the slab; `zeros`:
// their zero points, one in every byte.
template <typename S, int kOnesM, int kWeightsN>
__device__ __forceinline__ void multiply_quarter(const uint8_t* blocks, uint32_t tokens, int quarter, int lane, int k,
                                                 int end, const uint32_t (&zeros)[S::kBlocksN][2],
                                                 int32_t (&acc)[S::kBlocksN][S::kBlocksM][4],
                                                 int32_t (&ones)[kOnesM][4], int32_t (&weights)[kWeightsN][4]) {
  uint32_t b[S::kBlocksM][2];
  load_tokens<S::kBlocksM>(tokens, quarter, lane, b);
#pragma unroll
  for (int i = 0; i < S::kBlocksN; ++i) {
    const uint2 v =
        *reinterpret_cast<const uint2*>(blocks + i * kW4BlockBytes + quarter / 2 * 512 + lane * 16 + quarter % 2 * 8);
    const uint32_t f[4] = {low_bytes(v.x, zeros[i][0]), high_bytes(v.x, zeros[i][1]), low_bytes(v.y, zeros[i][0]),
                           high_bytes(v.y, zeros[i][1])};
#pragma unroll
    for (int j = 0; j < S::kBlocksM; ++j) ptx::mma_s8(acc[i][j], f, b[j][0], b[j][1]);
    if constexpr (S::kShifted) add_weights(weights[i], f, k, end, lane);
  }
  if constexpr (S::kKind == W4Kind::kMinimum) {
    const uint32_t f[4] = {kOnes, kOnes, kOnes, kOnes};
#pragma unroll
    for (int j = 0; j < S::kBlocksM; ++j) ptx::mma_s8(ones[j], f, b[j][0], b[j][1]);
  }
}

// ---- Few tokens ----------------------------------------------------------------------------------------------------

template <int kTokens_, W4Kind kKind_, bool kShifted_>
struct Narrow : NarrowTile<kTokens_> {
  using Tile = NarrowTile<kTokens_>;
  static constexpr W4Kind kKind = kKind_;
  static constexpr bool kShifted = kShifted_;
  static constexpr int kStageBytes = Tile::kWeightBytes + kTokens_ * kTokenBytes;  // of a warp
  // Integers of a block: those of the outputs, then the sums of the tokens.
  static constexpr int kBlockInts = Tile::kOutputs + (kKind == W4Kind::kMinimum ? kTokens_ : 0);
  static constexpr int shared_bytes(int row_shift) {
    return kWarps * Tile::kStages * kStageBytes + ((kWarps * kBlockInts * 4) << row_shift);
  }
};

template <typename S>
__global__ void __launch_bounds__(kThreads, 2) narrow_kernel(const Job job) {
  extern __shared__ __align__(128) uint8_t shared[];
  const GemmW4A8Args& a = job.a;
  const W4Weight& w = a.weight;
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
  const int n0 = blockIdx.x * S::kChannels, m0 = blockIdx.y * S::kTokens;
  const int rounds = (job.slabs + kWarps - 1) / kWarps, shift = job.groups.row_shift, block_k = kW4SlabK >> shift;
  uint8_t* own = shared + warp * S::kStages * S::kStageBytes;
  const uint32_t own_address = ptx::smem_u32(own);
  int32_t* ints = reinterpret_cast<int32_t*>(shared + kWarps * S::kStages * S::kStageBytes);

  const auto load_weights = [&](int round) {
    const int slab = min(round * kWarps + warp, job.slabs - 1);  // copied without need where there is none
    load_codes<S::kChannels, 32>(job, own_address + round % S::kStages * S::kStageBytes, slab, n0, lane);
  };
  const auto load_x = [&](int round) {
    const int slab = min(round * kWarps + warp, job.slabs - 1);
    const uint32_t target = own_address + round % S::kStages * S::kStageBytes + S::kWeightBytes;
    load_activations<S::kTokens, 32>(job, target, slab, m0, lane);
  };

  for (int r = 0; r < S::kStages - 1; ++r) {
    if (r < rounds) load_weights(r);
  }
  ptx::grid_dependency_wait();  // the quantizer's rows; weights were there before
  for (int r = 0; r < S::kStages - 1; ++r) {
    if (r < rounds) load_x(r);
    ptx::cp_async_commit();
  }

  [[maybe_unused]] int32_t shifts[S::kShifted ? S::kBlocksM : 1][2];
  if constexpr (S::kShifted) {
#pragma unroll
    for (int j = 0; j < S::kBlocksM; ++j) load_shift(a, m0 + 8 * j + 2 * (lane & 3), shifts[j]);
  }

  const OwnOutputs<S> outputs;
  int32_t d[S::kPerThread] = {}, sum[S::kPerThread] = {};
  float total[S::kPerThread] = {};

  // Scales (and minima) of the next eight blocks from k on: asked for before the products, wanted after them.
  constexpr int kAhead = kWarps;
  float scale[kAhead][S::kPerThread], low[S::kKind == W4Kind::kMinimum ? kAhead : 1][S::kPerThread];
  const auto fetch = [&](int k) {
#pragma unroll
    for (int p = 0; p < kAhead; ++p) {
      const uint32_t group = group_of(job.groups, min(k + p * block_k, w.k - 1));
#pragma unroll
      for (int i = 0; i < S::kPerThread; ++i) {
        const uint32_t at = group * job.groups.pitch + min(n0 + outputs.channel[i], job.groups.width - 1);
        scale[p][i] = group_value(w.scale, w.scale_type, at);
        if constexpr (S::kKind == W4Kind::kMinimum) low[p][i] = group_value(w.minimum, w.scale_type, at);
      }
    }
  };

  for (int round = 0; round < rounds; ++round) {
    fetch((round << shift) * kAhead * block_k);
    ptx::cp_async_wait<S::kStages - 2>();
    __syncwarp();
    const int slab = round * kWarps + warp;
    if (slab < job.slabs) {
      const uint8_t* stage = own + round % S::kStages * S::kStageBytes;
      const uint32_t tokens = ptx::smem_u32(stage + S::kWeightBytes);
      int32_t acc[S::kBlocksN][S::kBlocksM][4] = {}, ones[S::kBlocksM][4] = {};
      [[maybe_unused]] int32_t weights[S::kShifted ? S::kBlocksN : 1][4] = {};
      uint32_t zeros[S::kBlocksN][2];
#pragma unroll
      for (int quarter = 0; quarter < 4; ++quarter) {
        const int mask = (4 >> shift) - 1, k = slab * kW4SlabK + quarter * 32;
        if ((quarter & mask) == 0) {
#pragma unroll
          for (int i = 0; i < S::kBlocksN; ++i) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              uint32_t zero = S::kKind == W4Kind::kMinimum ? 0u : 8u;
              if (S::kKind == W4Kind::kZeroPoint && w.zero_point) {
                const int n = min(n0 + 16 * i + 8 * e + (lane >> 2), job.groups.width - 1);
                const int64_t group = group_of(job.groups, min(k, w.k - 1));
                zero = __ldg(w.zero_point + group * job.groups.pitch + n);
              }
              zeros[i][e] = zero * kOnes;
            }
          }
        }
        multiply_quarter<S>(stage, tokens, quarter, lane, k, w.k, zeros, acc, ones, weights);
        if (((quarter + 1) & mask) == 0) {
          if constexpr (S::kShifted) {
            const int first = slab * kW4SlabK + (quarter & ~mask) * 32, width = max(0, min(block_k, w.k - first));
            take_shift_off(acc, shifts, weights);
            if constexpr (S::kKind == W4Kind::kMinimum) take_shift_off_tokens(ones, shifts, width);
          }
          int32_t* out = ints + ((warp << shift) + (quarter >> (2 - shift))) * S::kBlockInts;
#pragma unroll
          for (int i = 0; i < S::kBlocksN; ++i) {
#pragma unroll
            for (int j = 0; j < S::kBlocksM; ++j) {
              int32_t (&v)[4] = acc[i][j];
              reinterpret_cast<int4*>(out)[(i * S::kBlocksM + j) * 32 + lane] = make_int4(v[0], v[1], v[2], v[3]);
              v[0] = v[1] = v[2] = v[3] = 0;
            }
          }
          if constexpr (S::kKind == W4Kind::kMinimum) {
#pragma unroll
            for (int j = 0; j < S::kBlocksM; ++j) {
              if (lane < 4) {
                reinterpret_cast<int2*>(out + S::kOutputs)[j * 4 + lane] = make_int2(ones[j][0], ones[j][1]);
              }
              ones[j][0] = ones[j][1] = ones[j][2] = ones[j][3] = 0;
            }
          }
        }
      }
    }
    __syncwarp();  // everybody has read the stage that is refilled
    if (round + S::kStages - 1 < rounds) {
      load_weights(round + S::kStages - 1);
      load_x(round + S::kStages - 1);
    }
    ptx::cp_async_commit();
    __syncthreads();
    for (int part = 0; part < 1 << shift; ++part) {
      const int first = (round << shift) * kAhead * block_k + part * kAhead * block_k;
      if (part > 0) fetch(first);
#pragma unroll
      for (int p = 0; p < kAhead; ++p) {
        const int k = first + p * block_k, block = part * kAhead + p;
        if (k >= w.k) break;
        const bool ends = k + block_k >= w.k || group_of(job.groups, k + block_k) != group_of(job.groups, k);
#pragma unroll
        for (int i = 0; i < S::kPerThread; ++i) {
          d[i] += ints[block * S::kBlockInts + tid + i * kThreads];
          if constexpr (S::kKind == W4Kind::kMinimum)
            sum[i] += ints[block * S::kBlockInts + S::kOutputs + outputs.token[i]];
          if (ends) {
            total[i] = __fadd_rn(total[i], __fmul_rn(__int2float_rn(d[i]), scale[p][i]));
            d[i] = 0;
            if constexpr (S::kKind == W4Kind::kMinimum) {
              total[i] = __fadd_rn(total[i], __fmul_rn(low[p][i], __int2float_rn(sum[i])));
              sum[i] = 0;
            }
          }
        }
      }
    }
    __syncthreads();  // the integers may be overwritten
  }
  ptx::grid_launch_dependents();

  outputs.store(job.e, reinterpret_cast<float*>(ints), n0, m0, [&](int i) {
    const int n = min(n0 + outputs.channel[i], w.n - 1), m = min(m0 + outputs.token[i], a.m - 1);
    const float bias = a.bias ? __ldg(a.bias + n) : -0.0f;
    return __fadd_rn(__fmul_rn(total[i], a.x_scale[m]), bias);
  });
}

// ---- More tokens ---------------------------------------------------------------------------------------------------

template <int kTokens_, W4Kind kKind_, bool kShifted_>
struct Wide : WideTile<kTokens_> {
  using Tile = WideTile<kTokens_>;
  static constexpr W4Kind kKind = kKind_;
  static constexpr bool kShifted = kShifted_;
  static constexpr int kPerSm = kTokens_ == 64 && kKind != W4Kind::kMinimum && !kShifted ? 2 : 1;  // CTAs
  static constexpr int kMostBytes =
      Tile::kStages * (Tile::kWeightBytes + kTokens_ * kTokenBytes + 4 * Tile::kChannels * 8);
  static_assert(kMostBytes <= 99 * 1024, "sm_86 and sm_89 have 99 KB");
};
using Groups = GroupCopies<128, kThreads>;

template <typename S>
__global__ void __launch_bounds__(kThreads, S::kPerSm) wide_kernel(const Job job) {
  extern __shared__ __align__(128) uint8_t shared[];
  const GemmW4A8Args& a = job.a;
  const W4Weight& w = a.weight;
  const uint32_t base = ptx::smem_u32(shared);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warp_n = warp & 3, warp_m = warp >> 2;
  const int n0 = blockIdx.y * S::kChannels, m0 = blockIdx.x * S::kTokens;  // neighbours share weights
  const int channel = warp_n * 32 + (lane >> 2), shift = job.groups.row_shift;
  const Groups groups(w, job.groups);
  int32_t acc[S::kBlocksN][S::kBlocksM][4] = {}, ones[S::kKind == W4Kind::kMinimum ? S::kBlocksM : 1][4] = {};
  float total[S::kBlocksN][S::kBlocksM][4] = {};
  [[maybe_unused]] int32_t weights[S::kShifted ? S::kBlocksN : 1][4] = {}, shifts[S::kShifted ? S::kBlocksM : 1][2];

  // One slab. kShift: the row_shift of the groups, -1: only known at run time; most groups are 128 k or more.
  const auto multiply = [&](auto fixed, const uint8_t* stage, int slab) {
    constexpr int kShift = decltype(fixed)::value;
    const int rows_shift = kShift >= 0 ? kShift : shift;
    const uint32_t tokens = ptx::smem_u32(stage + S::kWeightBytes) + warp_m * (S::kTokens / 2) * kTokenBytes;
    const uint8_t* rows = stage + S::kWeightBytes + S::kTokens * kTokenBytes;
    uint32_t zeros[S::kBlocksN][2];
#pragma unroll
    for (int quarter = 0; quarter < 4; ++quarter) {
      const int mask = (4 >> rows_shift) - 1, k = slab * kW4SlabK + quarter * 32, next = k + 32;
      const uint8_t* row = rows + (quarter >> (2 - rows_shift)) * job.groups.row_bytes;
      if ((quarter & mask) == 0) {
#pragma unroll
        for (int i = 0; i < S::kBlocksN; ++i) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            uint32_t zero = S::kKind == W4Kind::kMinimum ? 0u : 8u;
            if (S::kKind == W4Kind::kZeroPoint && w.zero_point) {
              zero = row[S::kChannels * job.groups.value_bytes + channel + 16 * i + 8 * e];
            }
            zeros[i][e] = zero * kOnes;
          }
        }
      }
      multiply_quarter<S>(stage + warp_n * S::kBlocksN * kW4BlockBytes, tokens, quarter, lane, k, w.k, zeros, acc, ones,
                          weights);
      if (((quarter + 1) & mask) != 0) continue;
      if (slab * kW4SlabK + (quarter & ~mask) * 32 >= w.k) continue;  // nothing but padding
      if (next < w.k && group_of(job.groups, k) == group_of(job.groups, next)) continue;
      if constexpr (S::kShifted) {
        // Steps of no group but a single one are 0, and it begins at 0.
        const int first = group_of(job.groups, k) * job.groups.steps * kW4GroupStep, width = min(next, w.k) - first;
        take_shift_off(acc, shifts, weights);
        if constexpr (S::kKind == W4Kind::kMinimum) take_shift_off_tokens(ones, shifts, width);
      }
#pragma unroll
      for (int i = 0; i < S::kBlocksN; ++i) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float scale = row_value(row, w.scale_type, channel + 16 * i + 8 * e);
          [[maybe_unused]] float low = 0.0f;
          if constexpr (S::kKind == W4Kind::kMinimum) {
            low = row_value(row + S::kChannels * job.groups.value_bytes, w.scale_type, channel + 16 * i + 8 * e);
          }
#pragma unroll
          for (int j = 0; j < S::kBlocksM; ++j) {
#pragma unroll
            for (int c = 2 * e; c < 2 * e + 2; ++c) {
              float& t = total[i][j][c];
              t = __fadd_rn(t, __fmul_rn(__int2float_rn(acc[i][j][c]), scale));
              if constexpr (S::kKind == W4Kind::kMinimum) {
                t = __fadd_rn(t, __fmul_rn(low, __int2float_rn(ones[j][c])));
              }
              acc[i][j][c] = 0;
            }
          }
        }
      }
      if constexpr (S::kKind == W4Kind::kMinimum) {
#pragma unroll
        for (int j = 0; j < S::kBlocksM; ++j) ones[j][0] = ones[j][1] = ones[j][2] = ones[j][3] = 0;
      }
    }
  };

  ptx::grid_dependency_wait();
  if constexpr (S::kShifted) {
#pragma unroll
    for (int j = 0; j < S::kBlocksM; ++j) {
      load_shift(a, m0 + (warp_m * S::kBlocksM + j) * 8 + 2 * (lane & 3), shifts[j]);
    }
  }
  const auto load = [&](uint32_t stage, int slab) {
    load_codes<S::kChannels, kThreads>(job, stage, slab, n0, threadIdx.x);
    const uint32_t tokens = stage + S::kWeightBytes;
    load_activations<S::kTokens, kThreads>(job, tokens, slab, m0, threadIdx.x);
    groups.start(w, job.groups, tokens + S::kTokens * kTokenBytes, slab, n0);
  };
  walk_slabs<S::kStages>(job, base, load, [&](int stage, int slab) {
    if (shift == 0) {
      multiply(std::integral_constant<int, 0>(), shared + stage, slab);
    } else {
      multiply(std::integral_constant<int, -1>(), shared + stage, slab);
    }
  });
  ptx::grid_launch_dependents();
#pragma unroll
  for (int i = 0; i < S::kBlocksN; ++i) {
    const int n = n0 + (warp_n * S::kBlocksN + i) * 16, low_n = n + (lane >> 2);
    const float low = a.bias && low_n < w.n ? __ldg(a.bias + low_n) : -0.0f;
    const float high = a.bias && low_n + 8 < w.n ? __ldg(a.bias + low_n + 8) : -0.0f;
    const int m = m0 + warp_m * S::kBlocksM * 8;
    store_blocks<S::kBlocksM>(job.e, n, m, lane, [&](int j, float (&v)[4]) {
      const int even = m + 8 * j + 2 * (lane & 3);
      const float scale[2] = {even < a.m ? a.x_scale[even] : 0.0f, even + 1 < a.m ? a.x_scale[even + 1] : 0.0f};
#pragma unroll
      for (int c = 0; c < 4; ++c) v[c] = __fadd_rn(__fmul_rn(total[i][j][c], scale[c & 1]), c < 2 ? low : high);
    });
  }
}

// ---- Launches ------------------------------------------------------------------------------------------------------

template <typename S>
void run_wide(const GemmW4A8Args& args, cudaStream_t stream) {
  launch_wide<S>(wide_kernel<S>, make_job<S>(args), stream, "gemm_w4a8 wide");
}

template <typename S>
void run_narrow(const GemmW4A8Args& args, bool dependent, cudaStream_t stream) {
  const Job job = make_job<S>(args);
  static const int limit = shared_memory_limit();
  const int shared_bytes = S::shared_bytes(job.groups.row_shift);
  // Blocks of 32 k are too many for the shared memory of sm_86 and sm_89.
  if (shared_bytes > limit) return run_wide<Wide<64, S::kKind, S::kShifted>>(args, stream);
  static std::atomic<uint64_t> allowed{0};
  allow_shared_memory(reinterpret_cast<const void*>(narrow_kernel<S>), static_cast<size_t>(limit), allowed);
  launch_narrow<S>(narrow_kernel<S>, job, shared_bytes, dependent, stream, "gemm_w4a8 narrow");
}

template <W4Kind kKind, bool kShifted>
void run_tokens(const GemmW4A8Args& args, int32_t tokens, bool dependent, cudaStream_t stream) {
  with_tile("gemm_w4a8", tokens, [&](auto tile) {
    constexpr int kTokens = decltype(tile)::value;
    if constexpr (kTokens <= 16) {
      run_narrow<Narrow<kTokens, kKind, kShifted>>(args, dependent, stream);
    } else {
      run_wide<Wide<kTokens, kKind, kShifted>>(args, stream);
    }
  });
}

template <W4Kind kKind>
void run_kind(const GemmW4A8Args& args, int32_t tokens, bool dependent, cudaStream_t stream) {
  if (args.x_zero_point) return run_tokens<kKind, true>(args, tokens, dependent, stream);
  return run_tokens<kKind, false>(args, tokens, dependent, stream);
}

}  // namespace

void gemm_w4a8_mma(const GemmW4A8Args& args, int32_t tokens, bool dependent, cudaStream_t stream) {
  if (args.weight.kind == W4Kind::kMinimum) return run_kind<W4Kind::kMinimum>(args, tokens, dependent, stream);
  return run_kind<W4Kind::kZeroPoint>(args, tokens, dependent, stream);
}

}  // namespace qk::cuda
