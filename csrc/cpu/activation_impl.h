// y = f(x) element by element, where the Linear before it could not apply f itself.
#pragma once

#include "../args.h"
#include "activation.h"
#include "team.h"

namespace qk {
namespace {

template <class V, DType X, DType Y>
void activation_range(const ActivationFunctionArgs& p, Range range) {
  constexpr int64_t kW = V::kLanes;
  for (int64_t i = range.begin; i < range.end; i += kW) {
    const int n = static_cast<int>(range.end - i < kW ? range.end - i : kW);
    if (n == kW) {
      V::template store<Y>(p.y, i, Activations<V>::apply(p.function, V::template load<X>(p.x, i)));
    } else {
      V::template store_part<Y>(p.y, i, Activations<V>::apply(p.function, V::template load_part<X>(p.x, i, n)), n);
    }
  }
}

template <class V, DType X>
void activation_from(const ActivationFunctionArgs& p, Range range) {
  switch (p.y_dtype) {
    case DType::kF32:
      return activation_range<V, X, DType::kF32>(p, range);
    case DType::kBF16:
      return activation_range<V, X, DType::kBF16>(p, range);
    default:
      return activation_range<V, X, DType::kF16>(p, range);
  }
}

// y may be x where the dtypes are the same.
template <class V>
void activation(const ActivationFunctionArgs& p) {
  const Work lines = conversion(ceil_div(p.count, kAlign), kAlign);
  parallel_pieces(threads_for(p.count, p.threads), lines, [&](Range of) {
    const Range range{of.begin * kAlign, of.end * kAlign < p.count ? of.end * kAlign : p.count};
    switch (p.x_dtype) {
      case DType::kF32:
        return activation_from<V, DType::kF32>(p, range);
      case DType::kBF16:
        return activation_from<V, DType::kBF16>(p, range);
      default:
        return activation_from<V, DType::kF16>(p, range);
    }
  });
}

}  // namespace
}  // namespace qk
