// Norms of the tier in use against the same sums in plain C++, bit for bit.
#pragma once

#include <random>

#include "../cpu/dispatch.h"
#include "smoke_tools.h"

namespace {

// 64 lanes, element i in lane i mod 64, added by halves; from 4096 elements on, one such sum behind the other.
float sum_in_lanes(const std::vector<float>& terms) {
  float total = 0.0f;
  for (size_t begin = 0; begin < terms.size(); begin += 4096) {
    float lanes[64] = {};
    for (size_t i = begin; i < terms.size() && i < begin + 4096; ++i) lanes[i % 64] += terms[i];
    for (int half = 32; half > 0; half /= 2)
      for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
    total += lanes[0];
  }
  return total;
}

// Row 1 is zeros, row 2 holds a NaN. Rows lie three elements apart.
void check_norm(int64_t m, int64_t k, DType dtype, bool layer, bool affine, int threads, std::mt19937& random) {
  const float eps = 1e-5f, count = static_cast<float>(k);
  const int64_t stride = k + 3;
  std::normal_distribution<float> normal(1.0f, 2.0f);
  const auto values = [&](int64_t size) {
    auto x = buffer<uint8_t>(size * bytes_of(dtype));
    for (int64_t i = 0; i < size; ++i) store(dtype, x.data(), i, normal(random));
    return x;
  };
  auto x = values((m - 1) * stride + k);
  const auto weight = values(k), bias = values(k);
  for (int64_t i = 0; m > 1 && i < k; ++i) store(dtype, x.data(), stride + i, 0.0f);
  if (m > 2) store(dtype, x.data(), 2 * stride + k / 2, std::numeric_limits<float>::quiet_NaN());
  auto y = buffer<uint8_t>(m * k * bytes_of(dtype), 0xAB);
  qk::kernels().norm({x.data(), dtype, m, k, stride, layer, eps, affine ? weight.data() : nullptr,
                      affine && layer ? bias.data() : nullptr, y.data(), threads});
  for (int64_t r = 0; r < m; ++r) {
    std::vector<float> row(static_cast<size_t>(k)), squares(row.size());
    for (int64_t i = 0; i < k; ++i) row[static_cast<size_t>(i)] = load(dtype, x.data(), r * stride + i);
    const float mean = layer ? sum_in_lanes(row) / count : 0.0f;
    for (size_t i = 0; i < row.size(); ++i) row[i] -= mean, squares[i] = row[i] * row[i];
    const float rstd = 1.0f / std::sqrt(sum_in_lanes(squares) / count + eps);
    for (int64_t i = 0; i < k; ++i, ++checks) {
      float expected = row[static_cast<size_t>(i)] * rstd;
      if (affine) expected *= load(dtype, weight.data(), i);
      if (affine && layer) expected += load(dtype, bias.data(), i);
      if (same(dtype, y.data(), r * k + i, expected)) continue;
      char what[192];
      std::snprintf(
          what, sizeof(what), "norm %s m=%lld k=%lld dtype=%d layer=%d row %lld column %lld: got %.9g, not %.9g",
          qk::kernels().isa, static_cast<long long>(m), static_cast<long long>(k), static_cast<int>(dtype), layer,
          static_cast<long long>(r), static_cast<long long>(i), load(dtype, y.data(), r * k + i), expected);
      return fail(what);
    }
  }
}

}  // namespace
