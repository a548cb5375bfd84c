// What the W8A8 kernels are told, and the packed weight they read. Plain types, for host and device.
//
// y [M, N] = round(((float(acc) * scale_x[m]) * scale_w[n]) + bias[n]),  acc = sum_k (xq[m, k] - zero[m]) * w[n, k]
//
// Packed weight ("K slabs"): weight [N, K] int8 becomes [ceil(K/128)][round_up(N, 8)][128] bytes, zero-padded, with
// the 16-byte chunk c of row n stored at place c ^ (n % 8):
//
//     slab kb:   row 0   | c0 c1 c2 c3 c4 c5 c6 c7 |   128 bytes = k 128*kb .. 128*kb + 127
//                row 1   | c1 c0 c3 c2 c5 c4 c7 c6 |
//                  ...                                  one atom: 8 rows, 1024 bytes
//                row N-1
//
// That is the 128-byte swizzle wgmma wants of a K-major operand, so a tile of any multiple of 8 rows is one contiguous
// piece of memory: one bulk copy without a tensor map, and free of bank conflicts under ldmatrix.
//
// Weight-only kernels (w8a16.h) read the same slabs with other bytes ("pairs"): q + 128, and within each chunk of 16 k,
// of which word t is bytes 4t .. 4t + 3,
//
//     word t:   k = 2t | 8 + 2t | 2t + 1 | 9 + 2t
//
// so that the word that "ldmatrix" gives lane t is the lane's part of that row in the fragment of mma m16n8k16: word &
// 0x00ff00ff are the codes 2t and 2t + 1, (word >> 8) & 0x00ff00ff those of 8 + 2t and 9 + 2t. Padding is 128, which is
// 0.
//
// Weights that read one input may lie side by side, row after row in slabs of all their rows. From multiples of 8 rows
// on, each is still a weight of this layout, but for the distance of its slabs.
#pragma once

#include <cstdint>

#include "args.h"

#ifdef __CUDACC__
#define QK_HOST_DEVICE __host__ __device__
#else
#define QK_HOST_DEVICE
#endif

namespace qk::cuda {

constexpr int kSlabK = 128;  // bytes of k per slab
constexpr int kAtomRows = 8;  // rows of a swizzle atom

// Activations that asymmetric quantization made hold q - 128 (a signed byte), so that every kernel is s8 x s8.
constexpr int kZeroShift = 128;

// How 8-bit weights lie: as they are, [N, K]; in slabs, as W8A8 reads them; in slabs of pairs.
enum class W8Layout : int32_t { kRows = 0, kSlabs = 1, kPairs = 2 };

struct GemmW8A8Args {
  const int8_t* xq;  // [M, K], 16-byte aligned; q, or q - 128 where x_zero_point is given
  int64_t x_stride;  // bytes between rows, a multiple of 16
  const float* x_scale;  // [M]
  const int32_t* x_zero_point;  // [M], 0..255, or nullptr
  const int8_t* packed;  // K slabs, 128-byte aligned
  int64_t slab_rows;  // from one slab to the next: packed_rows(n), or more
  const int32_t* colsum;  // [N] sum over k of weight[n, k]; read with x_zero_point only
  const float* weight_scale;  // [N]
  const float* bias;  // [N] or nullptr
  int32_t m, n, k;
  void* y;
  int64_t y_stride;  // elements between rows
  DType y_dtype;
};

// Which kernel runs, with what tile. `tile` is tokens per tile for kStream and kMma, channels per tile for kTiled.
enum class W8A8Kernel : int32_t {
  kMma = 0,  // mma.sync m16n8k32, sm_80 and up
  kStream = 1,  // wgmma, weights as the 64-row operand; K split over a cluster; sm_90a
  kTiled = 2,  // wgmma, tokens as the 64-row operand; persistent; sm_90a
};
struct W8A8Config {
  W8A8Kernel kernel;
  int32_t tile;
  int32_t split;  // kStream: CTAs that share the sum over K
  int32_t share;  // CTAs that share a tile by multicast: of tokens for kStream, of weights for kTiled
  // kStream: 1 fills an SM's shared memory with stages, 0 leaves room for a second CTA. kTiled: 1 lets the warpgroups
  // take tiles in turns.
  int32_t deep;
  int32_t channels;  // kStream: of a CTA's tile, 64 or 128
};

QK_HOST_DEVICE constexpr int64_t packed_rows(int64_t n) { return (n + kAtomRows - 1) / kAtomRows * kAtomRows; }
QK_HOST_DEVICE constexpr int64_t slabs(int64_t k) { return (k + kSlabK - 1) / kSlabK; }
constexpr int64_t packed_w8_bytes(int64_t n, int64_t k) { return slabs(k) * packed_rows(n) * kSlabK; }
// Bytes between the rows of quantized activations: what a tensor map asks for.
QK_HOST_DEVICE constexpr int64_t activation_stride(int64_t k) { return (k + 15) / 16 * 16; }

}  // namespace qk::cuda
