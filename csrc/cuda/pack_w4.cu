// Canonical 4-bit codes [N, ceil(K/2)] to and from fragment slabs (w4.h), and the float weight they stand for.
//
// Packing: one warp per block of 16 channels x 128 k, which are 64 bytes of each of 16 canonical rows. The block passes
// through shared memory, so that both sides of the copy are whole 32-byte sectors. The nibble that an odd K leaves over
// is kept like a code: activations are zero there.
#include <type_traits>

#include "groups_w4.cuh"
#include "host.h"
#include "launch_w4.h"
#include "numeric.cuh"

namespace qk::cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kRowBytes = kW4SlabK / 2;
constexpr int kPitch = kRowBytes + 4;  // bytes between rows in shared memory: one bank further each

struct Place {
  int row, k;
};
// Where nibble i of word s of a lane lies in its half of a block.
__device__ __forceinline__ Place place_of(W4Order order, int lane, int s, int i) {
  const int g = lane >> 2, t = lane & 3;
  if (order == W4Order::kHalf) return Place{g + 8 * (i & 1), 16 * s + 8 * ((i >> 1) & 1) + 2 * t + (i >> 2)};
  return Place{g + 8 * (i & 1), 16 * s + 4 * t + (i >> 1)};
}

__device__ __forceinline__ uint32_t nibble_at(const uint8_t* rows, int row, int k) {
  return (rows[row * kPitch + (k >> 1)] >> ((k & 1) * 4)) & 15u;
}

// A warp's block: its number in the packed weight, its channels and slab.
struct Block {
  int64_t at, row0, k0;
};
__device__ __forceinline__ bool block_of(int64_t n, int64_t k, Block& b) {
  b.at = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (b.at >= w4_blocks(n) * w4_slabs(k)) return false;
  b.row0 = b.at % w4_blocks(n) * kW4Rows, b.k0 = b.at / w4_blocks(n) * kW4SlabK;
  return true;
}

__global__ void __launch_bounds__(kThreads)
    pack_kernel(const uint8_t* __restrict__ weight, int64_t n, int64_t k, W4Order order, uint8_t* __restrict__ packed) {
  __shared__ uint8_t shared[kWarps][kW4Rows * kPitch];
  Block b;
  if (!block_of(n, k, b)) return;
  uint8_t* rows = shared[threadIdx.x / 32];
  const int lane = threadIdx.x & 31;
  const int64_t width = (k + 1) / 2;
  const bool words = width % 4 == 0 && reinterpret_cast<uintptr_t>(weight) % 4 == 0;
  for (int at = lane; at < kW4Rows * kRowBytes / 4; at += 32) {
    const int row = at / (kRowBytes / 4), byte = at % (kRowBytes / 4) * 4;
    const int64_t first = b.k0 / 2 + byte;
    uint32_t word = 0;
    if (b.row0 + row < n) {
      const uint8_t* source = weight + (b.row0 + row) * width + first;
      if (words && first + 4 <= width) {
        word = *reinterpret_cast<const uint32_t*>(source);
      } else {
        for (int i = 0; i < 4; ++i) word |= first + i < width ? uint32_t(source[i]) << (8 * i) : 0u;
      }
    }
    *reinterpret_cast<uint32_t*>(rows + row * kPitch + byte) = word;
  }
  __syncwarp();
  uint4* target = reinterpret_cast<uint4*>(packed + b.at * kW4BlockBytes);
  for (int half = 0; half < 2; ++half) {
    uint32_t words_out[4];
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      words_out[s] = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const Place p = place_of(order, lane, s, i);
        words_out[s] |= nibble_at(rows, p.row, half * 64 + p.k) << (4 * i);
      }
    }
    target[half * 32 + lane] = make_uint4(words_out[0], words_out[1], words_out[2], words_out[3]);
  }
}

// The codes of a warp's block as bytes [16][128], in shared memory.
constexpr int kCodePitch = kW4SlabK + 4;
__device__ __forceinline__ void unpack_block(const uint8_t* packed, W4Order order, const Block& b, uint8_t* codes) {
  const int lane = threadIdx.x & 31;
  const uint4* source = reinterpret_cast<const uint4*>(packed + b.at * kW4BlockBytes);
  for (int half = 0; half < 2; ++half) {
    const uint4 v = __ldg(source + half * 32 + lane);
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int s = 0; s < 4; ++s) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const Place p = place_of(order, lane, s, i);
        codes[p.row * kCodePitch + half * 64 + p.k] = (words[s] >> (4 * i)) & 15u;
      }
    }
  }
  __syncwarp();
}

__global__ void __launch_bounds__(kThreads) unpack_kernel(const uint8_t* __restrict__ packed, int64_t n, int64_t k,
                                                          W4Order order, uint8_t* __restrict__ weight) {
  __shared__ uint8_t shared[kWarps][kW4Rows * kCodePitch];
  Block b;
  if (!block_of(n, k, b)) return;
  uint8_t* codes = shared[threadIdx.x / 32];
  unpack_block(packed, order, b, codes);
  const int64_t width = (k + 1) / 2;
  for (int at = threadIdx.x & 31; at < kW4Rows * kRowBytes; at += 32) {
    const int row = at / kRowBytes, byte = at % kRowBytes;
    const int64_t first = b.k0 / 2 + byte;
    if (b.row0 + row < n && first < width) {
      const uint8_t* pair = codes + row * kCodePitch + 2 * byte;
      weight[(b.row0 + row) * width + first] = static_cast<uint8_t>(pair[0] | pair[1] << 4);
    }
  }
}

// The value of a code as the definition has it, each step rounded once.
struct GroupTerms {
  float scale, minimum;
  int zero, multiplier;  // zero is taken off after the multiplication
};
template <bool kMultiplier = true>  // there may be multipliers
__device__ __forceinline__ GroupTerms load_group(const W4Weight& w, int64_t at) {
  if (kMultiplier && w.kind == W4Kind::kMultiplier) {
    const int word = __ldg(static_cast<const uint16_t*>(w.scale) + at);
    return GroupTerms{__ldg(w.channel_scale + at % (int64_t(w.blocks) * kW4Rows)), 0.0f, 128 - (word >> 8), word & 255};
  }
  return GroupTerms{group_value(w.scale, w.scale_type, at),
                    w.kind == W4Kind::kMinimum ? group_value(w.minimum, w.scale_type, at) : 0.0f,
                    w.zero_point ? w.zero_point[at] : 8, 1};
}
__device__ __forceinline__ float value_of(const W4Weight& w, const GroupTerms& t, int q) {
  if (w.kind == W4Kind::kCodebook) return __fmul_rn(__ldg(w.codebook + q), t.scale);
  if (w.kind == W4Kind::kMinimum) return __fadd_rn(__fmul_rn(static_cast<float>(q), t.scale), t.minimum);
  return __fmul_rn(static_cast<float>(q * t.multiplier - t.zero), t.scale);
}

// A warp's block of the rows asked for; false: none left.
__device__ __forceinline__ bool asked_block(const W4Weight& w, int64_t first_row, int64_t rows, Block& b) {
  const int64_t index = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32, wide = w4_blocks(rows);
  if (index >= wide * w4_slabs(w.k)) return false;
  const int64_t slab = index / wide;
  b.row0 = first_row + index % wide * kW4Rows, b.k0 = slab * kW4SlabK;
  b.at = slab * w.blocks + b.row0 / kW4Rows;
  return true;
}

// Any order of codes, any K.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    dequantize_kernel(const W4Weight w, int64_t first_row, int64_t rows, T* __restrict__ out) {
  __shared__ uint8_t shared[kWarps][kW4Rows * kCodePitch];
  Block b;
  if (!asked_block(w, first_row, rows, b)) return;
  uint8_t* codes = shared[threadIdx.x / 32];
  unpack_block(w.packed, w.order, b, codes);
  const int64_t pitch = int64_t(w.blocks) * kW4Rows, last = first_row + rows < w.n ? first_row + rows : w.n;
  for (int i = threadIdx.x & 31; i < kW4SlabK; i += 32) {
    const int k = static_cast<int>(b.k0) + i;
    if (k >= w.k) break;
    for (int row = 0; row < kW4Rows && b.row0 + row < last; ++row) {
      const GroupTerms terms = load_group(w, (k / w.group) * pitch + b.row0 + row);
      out[(b.row0 + row - first_row) * w.k + k] = narrow<T>(value_of(w, terms, codes[row * kCodePitch + i]));
    }
  }
}

__device__ __forceinline__ uint32_t subtract_bf16(uint32_t a, uint32_t b) {
  const __nv_bfloat162 r = __hsub2(*reinterpret_cast<__nv_bfloat162*>(&a), *reinterpret_cast<__nv_bfloat162*>(&b));
  return *reinterpret_cast<const uint32_t*>(&r);
}

// 16-bit values of codes in kHalf order, K a multiple of 8: what stands before every product of many rows. The two
// codes of a fragment register are neighbours along k, so a lane writes pairs; shared memory makes whole rows of them.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    dequantize_half_kernel(const W4Weight w, int64_t first_row, int64_t rows, T* __restrict__ out) {
  constexpr int kPairPitch = kW4SlabK / 2 + 4;  // words between rows: four banks further each
  constexpr DType kType = std::is_same<T, __half>::value ? DType::kF16 : DType::kBF16;
  __shared__ __align__(16) uint32_t shared[kWarps][kW4Rows * kPairPitch];
  Block b;
  if (!asked_block(w, first_row, rows, b)) return;
  uint32_t* tile = shared[threadIdx.x / 32];
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const int64_t pitch = int64_t(w.blocks) * kW4Rows;
  const uint4* source = reinterpret_cast<const uint4*>(w.packed + b.at * kW4BlockBytes);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint4 v = __ldg(source + half * 32 + lane);
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int part = 0; part < 2; ++part) {  // 32 k, which lie in one group
      const int k = min(static_cast<int>(b.k0) + half * 64 + part * kW4GroupStep, w.k - 1);
      const int64_t at = (k / w.group) * pitch + b.row0 + g;
      const GroupTerms terms[2] = {load_group<false>(w, at), load_group<false>(w, at + 8)};
#pragma unroll
      for (int s = 2 * part; s < 2 * part + 2; ++s) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const GroupTerms& term = terms[r & 1];
          const uint32_t two = (words[s] >> (4 * r)) & 0x000f000fu;
          float lo, hi;
          if (w.kind == W4Kind::kZeroPoint) {
            // 128 + q less 128 + zero in bfloat16 is exact, and half of the work of two conversions.
            const uint32_t pair = subtract_bf16(two | 0x43004300u, 0x43004300u + term.zero * 0x00010001u);
            lo = __fmul_rn(__uint_as_float(pair << 16), term.scale);
            hi = __fmul_rn(__uint_as_float(pair & 0xffff0000u), term.scale);
          } else {
            lo = value_of(w, term, two & 15u), hi = value_of(w, term, two >> 16);
          }
          tile[(g + 8 * (r & 1)) * kPairPitch + half * 32 + 8 * s + 4 * (r >> 1) + t] = pack_pair(kType, lo, hi);
        }
      }
    }
  }
  __syncwarp();
  const int64_t last = first_row + rows < w.n ? first_row + rows : w.n;
#pragma unroll
  for (int i = 0; i < kW4Rows * 16 / 32; ++i) {
    const int at = i * 32 + lane, row = at >> 4, chunk = at & 15;
    const int64_t k = b.k0 + chunk * 8;
    if (b.row0 + row < last && k < w.k) {
      *reinterpret_cast<uint4*>(out + (b.row0 + row - first_row) * w.k + k) =
          *reinterpret_cast<const uint4*>(tile + row * kPairPitch + chunk * 4);
    }
  }
}

template <typename T>
void run_dequantize(const W4Weight& w, int64_t first_row, int64_t rows, void* out, cudaStream_t stream) {
  LaunchShape shape;
  shape.block = dim3(kThreads);
  shape.grid = dim3(blocks(w4_blocks(rows) * w4_slabs(w.k), kWarps));
  if constexpr (sizeof(T) == 2) {
    if (w.order == W4Order::kHalf && w.k % 8 == 0 && reinterpret_cast<uintptr_t>(out) % 16 == 0) {
      return launch(dequantize_half_kernel<T>, shape, stream, "dequantize_w4", w, first_row, rows,
                    static_cast<T*>(out));
    }
  }
  launch(dequantize_kernel<T>, shape, stream, "dequantize_w4", w, first_row, rows, static_cast<T*>(out));
}

}  // namespace

void pack_w4(const uint8_t* weight, int64_t n, int64_t k, W4Order order, uint8_t* packed, cudaStream_t stream) {
  LaunchShape shape;
  shape.block = dim3(kThreads);
  shape.grid = dim3(blocks(w4_blocks(n) * w4_slabs(k), kWarps));
  launch(pack_kernel, shape, stream, "pack_w4", weight, n, k, order, packed);
}

void unpack_w4(const uint8_t* packed, int64_t n, int64_t k, W4Order order, uint8_t* weight, cudaStream_t stream) {
  LaunchShape shape;
  shape.block = dim3(kThreads);
  shape.grid = dim3(blocks(w4_blocks(n) * w4_slabs(k), kWarps));
  launch(unpack_kernel, shape, stream, "unpack_w4", packed, n, k, order, weight);
}

void dequantize_w4(const W4Weight& weight, int64_t first_row, int64_t rows, void* out, DType out_dtype,
                   cudaStream_t stream) {
  if (rows == 0) return;
  switch (out_dtype) {
    case DType::kF32:
      return run_dequantize<float>(weight, first_row, rows, out, stream);
    case DType::kBF16:
      return run_dequantize<__nv_bfloat16>(weight, first_row, rows, out, stream);
    case DType::kF16:
      return run_dequantize<__half>(weight, first_row, rows, out, stream);
  }
}

}  // namespace qk::cuda
