// Which instance of a W4A16 kernel serves a product: the activations' type and the kind of codes, known when compiled.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "w4.h"

namespace qk::cuda {
namespace {

template <W4Kind kKind>
using KindOf = std::integral_constant<W4Kind, kKind>;

template <typename T, typename Run>
void for_kind(W4Kind kind, const Run& run) {
  switch (kind) {
    case W4Kind::kZeroPoint:
      return run(T{}, KindOf<W4Kind::kZeroPoint>());
    case W4Kind::kMinimum:
      return run(T{}, KindOf<W4Kind::kMinimum>());
    case W4Kind::kCodebook:
      return run(T{}, KindOf<W4Kind::kCodebook>());
  }
}

// run(T{}, KindOf<kind>()) for the arguments' x_dtype and kind.
template <typename Run>
void for_type_and_kind(const GemmW4A16Args& args, const Run& run) {
  if (args.x_dtype == DType::kBF16) return for_kind<__nv_bfloat16>(args.weight.kind, run);
  return for_kind<__half>(args.weight.kind, run);
}

}  // namespace
}  // namespace qk::cuda
