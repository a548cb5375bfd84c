// What the weight-only driver (linear_wxa16_impl.h) and the tiers' kernels tell each other.
#pragma once

#include <cstdint>

namespace qk {
namespace {

// Kinds of weights, as template arguments.
struct W8 {
  static constexpr int kBits = 8;
  static constexpr bool kBook = false;
};
struct W4 {
  static constexpr int kBits = 4;  // q - 8, or a table of 16 where the tier decodes through one
  static constexpr bool kBook = false;
};
struct W4Codebook {
  static constexpr int kBits = 4;
  static constexpr bool kBook = true;
};

// How a piece of K enters the sums: c += acc * scale + sums[row * sum_stride] * offset, or c = that.
struct Scaling {
  const float* scale;  // [columns] or nullptr: 1
  const float* offset;  // [columns] or nullptr: 0
  const float* sums;  // of the piece's activations; read only with an offset
  int64_t sum_stride;
  bool begins = false;  // nothing is in c yet; of tiles, since streams find zeros there
};

}  // namespace
}  // namespace qk
