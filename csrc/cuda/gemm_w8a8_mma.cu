// W8A8 GEMM by mma.sync m16n8k32 with a cp.async pipeline: sm_80, sm_86, sm_89 and, by PTX, whatever comes after.
//
// Weights are the 16-row operand A, tokens the 8-column operand B, so one fragment order serves every batch size. A CTA
// of 8 warps owns kChannels x kTokens outputs and walks K in slabs of 128 bytes:
//
//            kTokens                         warps: kWarpsN along channels, kWarpsM along tokens, kWarpsK along k.
//          +---------+                       With kWarpsK = 4 each warp multiplies one k32 step of a slab and the sums
//  kChan-  | warp    |   x  K in slabs       meet in shared memory (int32, exact in any order): that gives narrow tiles
//   nels   | tile    |                       enough CTAs to fill the chip without splitting K across CTAs.
//          +---------+
//
// Both tiles lie in shared memory as rows of 128 bytes with chunk c at place c ^ (row % 8) (w8a8.h): ldmatrix reads
// eight rows of one chunk column from eight different bank groups. Stages: three to eight, at most 96 KB (sm_86/89).
// Source of the fragment layouts: PTX ISA, "Matrix Fragments for mma.m16n8k32".
#include "epilogue.cuh"
#include "host.h"
#include "launch.h"

namespace qk::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRow = kSlabK;  // bytes of a tile row

template <int kTokens_, int kChannels_, int kWarpsM_, int kWarpsN_, int kWarpsK_, int kStages_>
struct Shape {
  static constexpr int kTokens = kTokens_, kChannels = kChannels_, kStages = kStages_;
  static constexpr int kWarpsM = kWarpsM_, kWarpsN = kWarpsN_, kWarpsK = kWarpsK_;
  static constexpr int kBlocksN = kChannels / kWarpsN / 16;  // m16 blocks of a warp, along channels
  static constexpr int kBlocksM = kTokens / kWarpsM / 8;  // n8 blocks of a warp, along tokens
  static constexpr int kStageBytes = (kTokens + kChannels) * kRow;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  static_assert(kWarpsM * kWarpsN * kWarpsK * 32 == kThreads, "eight warps");
  static_assert(kBlocksM % 2 == 0, "tokens are loaded sixteen at a time");
  static_assert(kSharedBytes <= 99 * 1024, "sm_86 and sm_89 have 99 KB");
};
using Small = Shape<16, 64, 1, 2, 4, 8>;
using Medium = Shape<64, 128, 2, 4, 1, 4>;
using Large = Shape<128, 128, 4, 2, 1, 3>;

// Chunk address inside a tile of 128-byte rows.
__device__ __forceinline__ uint32_t chunk_at(uint32_t tile, int row, int chunk) {
  return tile + row * kRow + ((chunk ^ (row & 7)) << 4);
}

// Starts the copies of slab `kb` into one stage. Rows and k outside the matrices arrive as zero.
template <typename S>
__device__ __forceinline__ void load_slab(const GemmW8A8Args& a, uint32_t stage, int kb, int m0, int n0, int rows_n) {
  const int tid = threadIdx.x;
  // Weights: the tile is contiguous and already swizzled.
  const int8_t* w = a.packed + (kb * a.slab_rows + n0) * kSlabK;
#pragma unroll
  for (int i = 0; i < S::kChannels * 8 / kThreads; ++i) {
    const int at = i * kThreads + tid;
    const bool inside = (at >> 3) < rows_n;
    ptx::cp_async_16(stage + at * 16, inside ? w + at * 16 : a.packed, inside ? 16 : 0);
  }
  const uint32_t tile = stage + S::kChannels * kRow;
#pragma unroll
  for (int i = 0; i < (S::kTokens * 8 + kThreads - 1) / kThreads; ++i) {
    const int at = i * kThreads + tid, row = at >> 3, chunk = at & 7;
    if (S::kTokens * 8 % kThreads == 0 || row < S::kTokens) {
      const int k = kb * kSlabK + chunk * 16, m = m0 + row;
      const int bytes = m < a.m ? max(0, min(16, a.k - k)) : 0;
      ptx::cp_async_16(chunk_at(tile, row, chunk), bytes > 0 ? a.xq + int64_t(m) * a.x_stride + k : a.xq, bytes);
    }
  }
}

template <typename S>
__global__ void __launch_bounds__(kThreads) gemm_mma_kernel(const GemmW8A8Args a, const Epilogue e) {
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t base = ptx::smem_u32(shared);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int warp_k = warp % S::kWarpsK, warp_n = warp / S::kWarpsK % S::kWarpsN,
            warp_m = warp / S::kWarpsK / S::kWarpsN;
  const int m0 = blockIdx.y * S::kTokens, n0 = blockIdx.x * S::kChannels;
  const int rows_n = min(S::kChannels, static_cast<int>(packed_rows(a.n)) - n0);
  const int slab_count = static_cast<int>(slabs(a.k));

  int32_t acc[S::kBlocksN][S::kBlocksM][4] = {};
  ptx::grid_dependency_wait();
#pragma unroll
  for (int s = 0; s < S::kStages - 1; ++s) {
    if (s < slab_count) load_slab<S>(a, base + s * S::kStageBytes, s, m0, n0, rows_n);
    ptx::cp_async_commit();
  }
  // Rows this lane addresses for ldmatrix: A is four matrices (rows, rows + 8) x (chunk, chunk + 1); B is two pairs of
  // (chunk, chunk + 1) for two blocks of eight tokens.
  const int a_row = warp_n * S::kBlocksN * 16 + (lane & 15), a_chunk = lane >> 4;
  const int b_row = warp_m * S::kBlocksM * 8 + (lane & 7) + ((lane >> 4) << 3), b_chunk = (lane >> 3) & 1;
  TokenTerms even[S::kBlocksM], odd[S::kBlocksM];  // wanted at the end, and far away
#pragma unroll
  for (int j = 0; j < S::kBlocksM; ++j) {
    const int m = m0 + (warp_m * S::kBlocksM + j) * 8 + 2 * (lane & 3);
    even[j] = load_token(e, m);
    odd[j] = load_token(e, m + 1);
  }
  for (int kb = 0; kb < slab_count; ++kb) {
    ptx::cp_async_wait<S::kStages - 2>();
    __syncthreads();  // slab kb has landed for everybody, and everybody is done with the stage refilled below
    const int next = kb + S::kStages - 1;
    if (next < slab_count) load_slab<S>(a, base + next % S::kStages * S::kStageBytes, next, m0, n0, rows_n);
    ptx::cp_async_commit();
    const uint32_t weights = base + kb % S::kStages * S::kStageBytes, tokens = weights + S::kChannels * kRow;
#pragma unroll
    for (int step = 0; step < 4 / S::kWarpsK; ++step) {
      const int chunk = 2 * (step * S::kWarpsK + warp_k);  // of the 32 bytes this step multiplies
      uint32_t b[S::kBlocksM / 2][4];
#pragma unroll
      for (int j = 0; j < S::kBlocksM / 2; ++j) {
        ptx::ldmatrix_x4(b[j], chunk_at(tokens, b_row + 16 * j, chunk + b_chunk));
      }
#pragma unroll
      for (int i = 0; i < S::kBlocksN; ++i) {
        uint32_t fragment[4];
        ptx::ldmatrix_x4(fragment, chunk_at(weights, a_row + 16 * i, chunk + a_chunk));
#pragma unroll
        for (int j = 0; j < S::kBlocksM; ++j)
          ptx::mma_s8(acc[i][j], fragment, b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
      }
    }
  }
  ptx::grid_launch_dependents();

  if constexpr (S::kWarpsK > 1) {
    // Sum over the warps that share this tile. Each leaves its sums as [block][lane] int4; the first one adds them up.
    ptx::cp_async_wait<0>();
    __syncthreads();
    constexpr int kBlocks = S::kBlocksN * S::kBlocksM;
    int4* sums = reinterpret_cast<int4*>(shared);
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      const int32_t (&d)[4] = acc[b / S::kBlocksM][b % S::kBlocksM];
      sums[(warp * kBlocks + b) * 32 + lane] = make_int4(d[0], d[1], d[2], d[3]);
    }
    __syncthreads();
    if (warp_k != 0) return;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      int32_t (&d)[4] = acc[b / S::kBlocksM][b % S::kBlocksM];
#pragma unroll
      for (int w = 1; w < S::kWarpsK; ++w) {
        const int4 v = sums[((warp + w) * kBlocks + b) * 32 + lane];
        d[0] += v.x, d[1] += v.y, d[2] += v.z, d[3] += v.w;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < S::kBlocksN; ++i) {
    const int n = n0 + (warp_n * S::kBlocksN + i) * 16;
    const ChannelTerms low = load_channel(e, n + (lane >> 2)), high = load_channel(e, n + (lane >> 2) + 8);
    store_blocks<S::kBlocksM>(e, n, m0 + warp_m * S::kBlocksM * 8, lane, [&](int j, float (&v)[4]) {
      finish_channels_by_tokens(acc[i][j], low, high, even[j], odd[j], v);
    });
  }
}

template <typename S>
void run(const GemmW8A8Args& args, bool dependent, cudaStream_t stream) {
  static std::atomic<uint64_t> allowed{0};
  allow_shared_memory(reinterpret_cast<const void*>(gemm_mma_kernel<S>), S::kSharedBytes, allowed);
  LaunchShape shape;
  shape.grid = dim3(blocks(args.n, S::kChannels), blocks(args.m, S::kTokens));
  shape.block = dim3(kThreads);
  shape.shared_bytes = S::kSharedBytes;
  shape.dependent = dependent;
  launch(gemm_mma_kernel<S>, shape, stream, "gemm_w8a8_mma", args, make_epilogue(args));
}

}  // namespace

void gemm_w8a8_mma(const GemmW8A8Args& args, const W8A8Config& config, bool dependent, cudaStream_t stream) {
  switch (config.tile) {
    case Small::kTokens:
      return run<Small>(args, dependent, stream);
    case Medium::kTokens:
      return run<Medium>(args, dependent, stream);
    case Large::kTokens:
      return run<Large>(args, dependent, stream);
    default:
      throw std::invalid_argument("mma kernel: expected a tile of 16, 64 or 128 tokens, got " +
                                  std::to_string(config.tile));
  }
}

}  // namespace qk::cuda
