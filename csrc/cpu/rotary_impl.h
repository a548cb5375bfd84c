// Rotary embedding of queries and keys, written once over the verbs of a tier. Every product and every sum is rounded
// to the dtype, as where each is an operator of its own; all heads of a token share its angles.
#pragma once

#include "../args.h"
#include "team.h"

namespace qk {
namespace {

template <class V, DType D>
class RotaryRows {
 public:
  explicit RotaryRows(const RotaryArgs& args) : p_(args) {}

  // Tokens as they lie in the outputs: batch behind batch.
  void run(Range tokens) const {
    for (int64_t token = tokens.begin; token < tokens.end; ++token) {
      const int64_t b = token / p_.tokens, t = token % p_.tokens;
      for (int64_t i = 0; i < p_.size / 2; i += kW) columns(token, b, t, i);
    }
  }

 private:
  using F = typename V::F;
  static constexpr int64_t kW = V::kLanes;

  // Features [i, i + kW) of both halves of every head.
  void columns(int64_t token, int64_t b, int64_t t, int64_t i) const {
    const int64_t half = p_.size / 2, angle = b * p_.angle_step.batch + t * p_.angle_step.token + i;
    const int n = static_cast<int>(half - i < kW ? half - i : kW);
    const F cos_low = load(p_.cos, angle, n), cos_high = load(p_.cos, angle + half, n);
    const F sin_low = load(p_.sin, angle, n), sin_high = load(p_.sin, angle + half, n);
    const auto turn = [&](const void* x, const AttentionSteps& step, int64_t heads, void* y) QK_INLINE {
      int64_t from = b * step.batch + t * step.token + i, to = token * heads * p_.size + i;
      for (int64_t h = 0; h < heads; ++h, from += step.head, to += p_.size) {
        const F low = load(x, from, n), high = load(x, from + half, n);
        store(y, to, V::sub(times(low, cos_low), times(high, sin_low)), n);
        store(y, to + half, V::add(times(high, cos_high), times(low, sin_high)), n);
      }
    };
    turn(p_.q, p_.q_step, p_.heads, p_.q_out);
    turn(p_.k, p_.k_step, p_.key_heads, p_.k_out);
  }

  static F times(F a, F b) {
    const F product = V::mul(a, b);
    if constexpr (D == DType::kF32) return product;
    return V::template widen<D>(V::template narrow<D>(product));
  }
  static F load(const void* from, int64_t at, int n) {
    return n == kW ? V::template load<D>(from, at) : V::template load_part<D>(from, at, n);
  }
  static void store(void* to, int64_t at, F v, int n) {
    if (n == kW)
      V::template store<D>(to, at, v);
    else
      V::template store_part<D>(to, at, v, n);
  }

  const RotaryArgs p_;
};

template <class V>
void rotary(const RotaryArgs& p) {
  const int64_t tokens = p.batch * p.tokens, elements = (p.heads + p.key_heads) * p.size;
  parallel_pieces(threads_for(tokens * elements, p.threads), conversion(tokens, elements), [&](Range mine) {
    switch (p.dtype) {
      case DType::kF32:
        return RotaryRows<V, DType::kF32>(p).run(mine);
      case DType::kBF16:
        return RotaryRows<V, DType::kBF16>(p).run(mine);
      default:
        return RotaryRows<V, DType::kF16>(p).run(mine);
    }
  });
}

}  // namespace
}  // namespace qk
