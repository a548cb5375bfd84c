// Loops over registers, unrolled by templates: g++ 12 keeps an array in registers only where every index is a constant
// when it first looks.
#pragma once

#include "../layout.h"

namespace qk {
namespace {

template <int kValue>
struct Int {
  static constexpr int value = kValue;
};

template <int kCount, int kAt = 0, class Body>
QK_INLINE inline void unroll(const Body& body) {
  if constexpr (kAt < kCount) {
    body(Int<kAt>());
    unroll<kCount, kAt + 1>(body);
  }
}

}  // namespace
}  // namespace qk
