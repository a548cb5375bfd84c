// W8A16 for few tokens, mma.sync m16n8k16, sm_80 and up:
//
//   y [M, N] = round(scale_w[n] * sum_k x[m, k] * w[n, k] + bias[n]),  x in bf16 or fp16, w int8, sums in fp32
//
// The weight is streamed once, in slabs of pairs (w8a8.h); at so few tokens nothing else matters. Weights are the
// 16-row operand. With g = lane / 4, t = lane % 4, a lane loads the 16-byte chunk 4h + t (h = 0, 1) of rows g and g + 8
// of a slab: its 16 bytes are k = 64h + 16t .. + 15. The order of k within a product is free as long as both operands
// agree, so product j of a half takes what word j of the chunk holds, straight from registers:
//
//     a[0], a[1]: bytes 0 and 2 of word j of rows g and g + 8;  a[2], a[3]: bytes 1 and 3
//     b0: x at k = 64h + 16t + 2j, 2j + 1;  b1: at 8 + 2j, 9 + 2j
//
// Eight warps of a CTA take every eighth slab of 16 * kBlocks channels and add their sums in shared memory in a fixed
// order: results repeat to the bit. Each warp keeps the weights of two slabs in flight, 64 KB for sixteen warps of an
// SM.
#include <atomic>

#include "epilogue.cuh"
#include "host.h"
#include "operands_w4a16.cuh"
#include "w8a16.h"

namespace qk::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;

// The weights of one slab: 16 bytes of both halves, of rows g and g + 8.
struct Weights {
  uint32_t words[2][2][4];
};

// `row` points at the lane's row g of the slab. Rows 8 further on are a whole atom away; where the weight has none,
// what comes of them is not stored.
__device__ __forceinline__ void load_weights(Weights& w, const int8_t* row, int g, int t, bool present, bool second) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int8_t* at = row + r * kAtomRows * kSlabK + (((4 * h + t) ^ g) << 4);
      const bool there = present && (r == 0 || second);
      const uint4 v = there ? __ldcs(reinterpret_cast<const uint4*>(at)) : make_uint4(0, 0, 0, 0);
      w.words[h][r][0] = v.x, w.words[h][r][1] = v.y, w.words[h][r][2] = v.z, w.words[h][r][3] = v.w;
    }
  }
}

// Eight values of x at `k`, zero beyond `limit`.
__device__ __forceinline__ uint4 load_tokens(const uint16_t* x, int k, int limit) {
  if (k + 8 <= limit) return __ldg(reinterpret_cast<const uint4*>(x + k));
  uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (k + i < limit) words[i / 2] |= uint32_t(__ldg(x + k + i)) << (16 * (i % 2));
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

template <typename T, int kBlocks, int kTokenBlocks>
__global__ void __launch_bounds__(kThreads, kBlocks == 1 ? 2 : 1) gemm_w8a16_kernel(GemmW8A16Args a, Epilogue e) {
  __shared__ float4 sums[kWarps][kBlocks][kTokenBlocks][32];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const int tiles_m = (a.m + 8 * kTokenBlocks - 1) / (8 * kTokenBlocks);  // neighbours share a weight
  const int m0 = blockIdx.x % tiles_m * 8 * kTokenBlocks, n0 = blockIdx.x / tiles_m * 16 * kBlocks;
  const int rows = static_cast<int>(packed_rows(a.n)), count = static_cast<int>(slabs(a.k));
  float acc[kBlocks][kTokenBlocks][4] = {};

  const int8_t* base = a.packed + (int64_t(n0) + g) * kSlabK;
  const int64_t slab_bytes = a.slab_rows * kSlabK;
  const auto fetch = [&](Weights(&w)[kBlocks], int slab) {
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      const int n = n0 + 16 * i;
      load_weights(w[i], base + slab * slab_bytes + i * 16 * kSlabK, g, t, slab < count && n < rows, n + 8 < rows);
    }
  };
  const auto multiply = [&](const Weights(&w)[kBlocks], int slab) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      uint32_t fragment[kBlocks][4][4];
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
        for (int s = 0; s < 4; ++s) {
          const uint32_t low = w[i].words[h][0][s], high = w[i].words[h][1][s];
          fragment[i][s][0] = even_bytes<T>(low), fragment[i][s][1] = even_bytes<T>(high);
          fragment[i][s][2] = even_bytes<T>(low >> 8), fragment[i][s][3] = even_bytes<T>(high >> 8);
        }
      }
      const int k = slab * kSlabK + 64 * h + 16 * t;
#pragma unroll
      for (int j = 0; j < kTokenBlocks; ++j) {
        // Tokens that are not there: any row does, its outputs are not stored.
        const int token = min(m0 + 8 * j + g, a.m - 1);
        const uint16_t* x = static_cast<const uint16_t*>(a.x) + token * a.x_stride;
        const uint4 first = load_tokens(x, k, a.k), second = load_tokens(x, k + 8, a.k);
        const uint32_t b0[4] = {first.x, first.y, first.z, first.w};
        const uint32_t b1[4] = {second.x, second.y, second.z, second.w};
#pragma unroll
        for (int s = 0; s < 4; ++s) {
#pragma unroll
          for (int i = 0; i < kBlocks; ++i) ptx::mma_16(T(), acc[i][j], fragment[i][s], b0[s], b1[s]);
        }
      }
    }
  };

  Weights even[kBlocks], odd[kBlocks];
  fetch(even, warp);
  fetch(odd, warp + kWarps);
  for (int slab = warp; slab < count; slab += 2 * kWarps) {
    multiply(even, slab);
    fetch(even, slab + 2 * kWarps);
    if (slab + kWarps < count) multiply(odd, slab + kWarps);
    fetch(odd, slab + 3 * kWarps);
  }

#pragma unroll
  for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
    for (int j = 0; j < kTokenBlocks; ++j) {
      const float (&d)[4] = acc[i][j];
      sums[warp][i][j][lane] = make_float4(d[0], d[1], d[2], d[3]);
    }
  }
  __syncthreads();
  for (int block = warp; block < kBlocks * kTokenBlocks; block += kWarps) {
    const int i = block / kTokenBlocks, j = block % kTokenBlocks, n = n0 + 16 * i;
    float v[4] = {};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float4 part = sums[w][i][j][lane];
      v[0] += part.x, v[1] += part.y, v[2] += part.z, v[3] += part.w;
    }
    const ChannelTerms low = load_channel(e, n + g), high = load_channel(e, n + g + 8);
    store_blocks<1>(e, n, m0 + 8 * j, lane, [&](int, float (&y)[4]) {
      constexpr float kUnit = OffsetBytes<T>::kUnit;
      y[0] = v[0] * low.scale * kUnit + low.bias, y[1] = v[1] * low.scale * kUnit + low.bias;
      y[2] = v[2] * high.scale * kUnit + high.bias, y[3] = v[3] * high.scale * kUnit + high.bias;
    });
  }
}

template <typename T, int kBlocks, int kTokenBlocks>
void run(const GemmW8A16Args& args, cudaStream_t stream) {
  Epilogue e = make_store(args.y, args.y_dtype, args.y_stride, args.m, args.n);
  e.weight_scale = args.weight_scale, e.bias = args.bias;
  LaunchShape shape;
  shape.grid = dim3(blocks(args.n, 16 * kBlocks) * blocks(args.m, 8 * kTokenBlocks));
  shape.block = dim3(kThreads);
  launch(gemm_w8a16_kernel<T, kBlocks, kTokenBlocks>, shape, stream, "gemm_w8a16", args, e);
}

template <typename T, int kBlocks>
void run_tokens(const GemmW8A16Args& args, cudaStream_t stream) {
  if (args.m <= 8) return run<T, kBlocks, 1>(args, stream);
  if (args.m <= 16) return run<T, kBlocks, 2>(args, stream);
  return run<T, kBlocks, 4>(args, stream);
}

template <typename T>
void run_blocks(const GemmW8A16Args& args, int32_t blocks, cudaStream_t stream) {
  return blocks == 1 ? run_tokens<T, 1>(args, stream) : run_tokens<T, 2>(args, stream);
}

}  // namespace

void gemm_w8a16_mma(const GemmW8A16Args& args, int32_t blocks, cudaStream_t stream) {
  if ((blocks != 1 && blocks != 2) || args.x_dtype == DType::kF32) {
    throw std::invalid_argument("gemm_w8a16_mma: expected 16-bit activations and 1 or 2 blocks, got dtype " +
                                std::to_string(static_cast<int>(args.x_dtype)) + " and " + std::to_string(blocks));
  }
  return args.x_dtype == DType::kBF16 ? run_blocks<__nv_bfloat16>(args, blocks, stream)
                                      : run_blocks<__half>(args, blocks, stream);
}

}  // namespace qk::cuda
