// Launches for 4-bit weights; rules as in launch.h.
#pragma once

#include <cuda_runtime.h>

#include "w4.h"

namespace qk::cuda {

// Canonical codes [N, ceil(K/2)] to and from fragment slabs.
void pack_w4(const uint8_t* weight, int64_t n, int64_t k, W4Order order, uint8_t* packed, cudaStream_t stream);
void unpack_w4(const uint8_t* packed, int64_t n, int64_t k, W4Order order, uint8_t* weight, cudaStream_t stream);

// out [rows, K] = the float weight of channels first_row .. first_row + rows - 1, first_row a multiple of 16.
void dequantize_w4(const W4Weight& weight, int64_t first_row, int64_t rows, void* out, DType out_dtype,
                   cudaStream_t stream);

// dispatch_w4.cu. Plans name kernels of this build that run on `capability`.
W4Plan plan_w4a16(int64_t m, int64_t n, int64_t k, W4Kind kind, int capability, int sms);
W4Plan plan_w4a8(int64_t m, int64_t n, int64_t k, int64_t group, W4Kind kind, int capability, int sms);
void gemm_w4a16(const GemmW4A16Args& args, const W4Plan& plan, bool dependent, cudaStream_t stream);
void gemm_w4a8(const GemmW4A8Args& args, const W4Plan& plan, bool dependent, cudaStream_t stream);

// Each throws std::invalid_argument for a tile it has no instance of. W4A16: 8, 16, 32 or 64 tokens. W4A8: 8 or 16 (K
// is walked by eight warps at once), 64 or 128 (one warp walks all of K).
void gemm_w4a16_mma(const GemmW4A16Args& args, const W4Plan& plan, bool dependent, cudaStream_t stream);
void gemm_w4a8_mma(const GemmW4A8Args& args, int32_t tokens, bool dependent, cudaStream_t stream);
void gemm_w4a8_multiplier_mma(const GemmW4A8Args& args, int32_t tokens, bool dependent, cudaStream_t stream);
// 8, 16, 32, 64 or, without minima, 128 tokens; of 16-bit activations, or with multipliers, 192 and 256; of 16-bit
// activations without minima 96 (w4_has_tile).
void gemm_w4a16_sm90(const GemmW4A16Args& args, const W4Plan& plan, bool dependent, cudaStream_t stream);
void gemm_w4a8_sm90(const GemmW4A8Args& args, const W4Plan& plan, bool dependent, cudaStream_t stream);
void gemm_w4a8_multiplier_sm90(const GemmW4A8Args& args, const W4Plan& plan, bool dependent, cudaStream_t stream);

}  // namespace qk::cuda
