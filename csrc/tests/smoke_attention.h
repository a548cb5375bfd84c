// Attention of the tier in use against double precision, rotary embedding against the bits of the scalar tier.
#pragma once

#include <algorithm>
#include <cstring>
#include <random>

#include "../cpu/dispatch.h"
#include "smoke_tools.h"

namespace {

// Heads side by side in a row of each token, as Linears leave them: q, k, v and y [tokens][heads][size]. `masked`: a
// byte for each query and key; every third row sees nothing. Equal to double precision within the rounding of scores,
// weights and sums (qkernels/_attention.py, with scores below 4).
void check_attention(int64_t queries, int64_t keys, int64_t size, DType dtype, bool masked, bool causal, int threads,
                     std::mt19937& random) {
  const qk::AttentionTable* table = qk::attention_kernels();
  if (table == nullptr) return;
  const int64_t heads = 4, key_heads = 2;
  const auto rows = [&](int64_t tokens, int64_t count) {
    std::normal_distribution<float> normal;
    auto x = buffer<uint8_t>(tokens * count * size * bytes_of(dtype));
    for (int64_t i = 0; i < tokens * count * size; ++i) store(dtype, x.data(), i, normal(random));
    return x;
  };
  const auto q = rows(queries, heads), k = rows(keys, key_heads), v = rows(keys, key_heads);
  auto y = buffer<uint8_t>(queries * heads * size * bytes_of(dtype), 0xAB);
  auto mask = buffer<uint8_t>(queries * keys);
  for (int64_t i = 0; i < queries * keys; ++i) mask[static_cast<size_t>(i)] = i / keys % 3 != 2 && random() % 2;
  // NaN, none of which may reach a result, and a guard behind what the kernel asks for.
  const int64_t room = table->scratch_bytes(size, threads), guard = 64;
  auto scratch = aligned<uint8_t>(room + guard);
  std::memset(scratch.get(), 0xFF, static_cast<size_t>(room + guard));
  const float scale = 1.0f / std::sqrt(static_cast<float>(size));
  const qk::AttentionSteps of_q = {0, size, heads * size}, of_k = {0, size, key_heads * size};
  table->attention({q.data(),
                    k.data(),
                    v.data(),
                    masked ? mask.data() : nullptr,
                    y.data(),
                    dtype,
                    masked ? qk::MaskKind::kBool : qk::MaskKind::kNone,
                    1,
                    heads,
                    key_heads,
                    queries,
                    keys,
                    size,
                    of_q,
                    of_k,
                    of_k,
                    {0, 0, keys},
                    scale,
                    causal,
                    threads,
                    scratch.get()});
  if (std::any_of(scratch.get() + room, scratch.get() + room + guard, [](uint8_t byte) { return byte != 0xFF; }))
    return fail("attention: writes behind its scratch");
  // Weights of 16 bits where tiles multiply them.
  const bool tiles = dtype == DType::kBF16 && !std::strcmp(qk::kernels().isa, "amx");
  const double of_weights = tiles ? 0x1p-15 : 0.0;
  const double unit = dtype == DType::kBF16 ? 0x1p-8 : dtype == DType::kF16 ? 0x1p-11 : 0x1p-24;
  for (int64_t t = 0; t < queries; ++t) {
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t from_k = h / (heads / key_heads) * size;
      std::vector<double> weights(static_cast<size_t>(keys));
      double total = 0.0;
      for (int64_t j = 0; j < keys; ++j) {
        if ((masked && !mask[static_cast<size_t>(t * keys + j)]) || (causal && j > t)) continue;
        double score = 0.0;
        for (int64_t d = 0; d < size; ++d)
          score += static_cast<double>(load(dtype, q.data(), (t * heads + h) * size + d)) *
                   static_cast<double>(load(dtype, k.data(), j * key_heads * size + from_k + d));
        total += weights[static_cast<size_t>(j)] = std::exp(score * static_cast<double>(scale));
      }
      for (int64_t d = 0; d < size; ++d, ++checks) {
        double sum = 0.0, magnitude = 0.0;
        for (int64_t j = 0; j < keys; ++j) {
          const double weight = total > 0.0 ? weights[static_cast<size_t>(j)] / total : 0.0;
          const double value = static_cast<double>(load(dtype, v.data(), j * key_heads * size + from_k + d));
          sum += weight * value;
          magnitude += weight * std::fabs(value);
        }
        const double roundings = static_cast<double>(20 * (size + 8) + 2 * keys + 16);
        const double bound = (0x1p-24 * roundings + of_weights) * magnitude;
        const double got = static_cast<double>(load(dtype, y.data(), (t * heads + h) * size + d));
        if (!(std::fabs(got - sum) <= bound + 1.01 * unit * std::fabs(sum))) {
          char what[144];
          std::snprintf(what, sizeof(what), "attention %s T=%lld L=%lld D=%lld dtype=%d: got %.9g, expected %.9g",
                        qk::kernels().isa, static_cast<long long>(queries), static_cast<long long>(keys),
                        static_cast<long long>(size), static_cast<int>(dtype), got, sum);
          return fail(what);
        }
      }
    }
  }
}

// Two batches that share their angles, heads side by side in a row of each token; which the Python tests compare with
// torch's operators.
void check_rotary(int64_t tokens, int64_t size, DType dtype, int threads, std::mt19937& random) {
  const int64_t batch = 2, heads = 3, key_heads = 1;
  std::normal_distribution<float> normal;
  const auto values = [&](int64_t count) {
    auto x = buffer<uint8_t>(count * bytes_of(dtype));
    for (int64_t i = 0; i < count; ++i) store(dtype, x.data(), i, normal(random));
    return x;
  };
  const int64_t of_q = batch * tokens * heads * size, of_k = batch * tokens * key_heads * size;
  const auto q = values(of_q), k = values(of_k), cos = values(tokens * size), sin = values(tokens * size);
  std::vector<uint8_t> turned[2][2];
  for (int tier = 0; tier < 2; ++tier) {
    turned[tier][0] = buffer<uint8_t>(of_q * bytes_of(dtype), 0xAB);
    turned[tier][1] = buffer<uint8_t>(of_k * bytes_of(dtype), 0xAB);
    (tier ? qk::kernels_scalar() : qk::kernels())
        .rotary({q.data(),
                 k.data(),
                 cos.data(),
                 sin.data(),
                 turned[tier][0].data(),
                 turned[tier][1].data(),
                 dtype,
                 batch,
                 heads,
                 key_heads,
                 tokens,
                 size,
                 {tokens * heads * size, size, heads * size},
                 {tokens * key_heads * size, size, key_heads * size},
                 {0, 0, size},
                 threads});
  }
  checks += of_q + of_k;
  for (int which = 0; which < 2; ++which)
    if (turned[0][which] != turned[1][which])
      return fail(std::string("rotary ") + qk::kernels().isa + " D=" + std::to_string(size));
}

}  // namespace
