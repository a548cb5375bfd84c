// Tensor maps for the activations, made on the host for one call and passed by value as a __grid_constant__ parameter.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include "host.h"

namespace qk::cuda {

// The driver's encoder, found through the runtime so that the module does not link libcuda and loads without a GPU.
inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  static const auto encoder = [] {
    void* symbol = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &symbol, 12000, cudaEnableDefault, &result),
          "cudaGetDriverEntryPointByVersion");
    if (result != cudaDriverEntryPointSuccess) throw std::runtime_error("cuTensorMapEncodeTiled: not in this driver");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(symbol);
  }();
  return encoder;
}

// Boxes of `box_rows` x 128 bytes of a row-major matrix [rows, columns], 128-byte swizzle, zeros outside. `stride`:
// bytes between rows.
inline CUtensorMap matrix_map(CUtensorMapDataType type, cuuint32_t box_columns, const void* base, int64_t rows,
                              int64_t columns, int64_t stride, uint32_t box_rows) {
  CUtensorMap map;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(stride)};
  const cuuint32_t box[2] = {box_columns, box_rows}, steps[2] = {1, 1};
  const CUresult result = tensor_map_encoder()(&map, type, 2, const_cast<void*>(base), sizes, strides, box, steps,
                                               CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                               CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(static_cast<int>(result)));
  }
  return map;
}
inline CUtensorMap byte_matrix_map(const void* base, int64_t rows, int64_t columns, int64_t stride, uint32_t box_rows) {
  return matrix_map(CU_TENSOR_MAP_DATA_TYPE_UINT8, 128, base, rows, columns, stride, box_rows);
}
inline CUtensorMap word16_matrix_map(const void* base, int64_t rows, int64_t columns, int64_t stride,
                                     uint32_t box_rows) {
  return matrix_map(CU_TENSOR_MAP_DATA_TYPE_UINT16, 64, base, rows, columns, stride, box_rows);
}

}  // namespace qk::cuda
