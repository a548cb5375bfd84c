// quantize and dequantize of whole tensors at every granularity; see args.h for how a tensor is seen.
//
//   rows      outer = 1: a granule is contiguous (per token, per channel of the first axis, per group, per tensor)
//   columns   outer > 1: a granule is strided (per channel of any other axis); columns of a block are done side by side
#pragma once

#include "../args.h"
#include "dequantize_impl.h"
#include "quantize_columns.h"
#include "quantize_tensor.h"

namespace qk {
namespace {

template <class V>
void quantize(const QuantizeArgs& args) {
  switch (args.x_dtype) {
    case DType::kF32:
      return Quantize<V, DType::kF32>(args).run();
    case DType::kBF16:
      return Quantize<V, DType::kBF16>(args).run();
    default:
      return Quantize<V, DType::kF16>(args).run();
  }
}

}  // namespace
}  // namespace qk
