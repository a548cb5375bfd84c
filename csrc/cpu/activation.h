// What follows a Linear on one vector of floats: functions and the residual; written once over the verbs of a tier.
//
// Every step is rounded once and no two are fused, so that the tiers agree to the bit. With u = 2^-24 |x|, and y the
// exact value (measured over all floats of [-100, 100], see tests/test_activation.py):
//
//   gelu       x Phi(x)                                            |error| <= 4 u
//   gelu_tanh  x / (1 + exp(-2 sqrt(2 / pi) (x + 0.044715 x^3)))   |error| <= 4 u
//   silu       x / (1 + exp(-x))                                   |error| <= 4 u
//   relu       max(x, 0)                                           exact
//
// NaN stays NaN.
#pragma once

#include "../args.h"
#include "../layout.h"

namespace qk {
namespace {

template <class V>
struct Activations {
  using F = typename V::F;
  using I = typename V::I;

  static F clamp(F x, float lo, float hi) { return V::max(V::min(x, V::set(hi)), V::set(lo)); }

  // c[n - 1] + t (c[n - 2] + t (...)): highest power first.
  template <int n>
  static F horner(const float (&c)[n], F t) {
    F r = V::set(c[0]);
    for (int i = 1; i < n; ++i) r = V::add(V::mul(r, t), V::set(c[i]));
    return r;
  }

  // exp(x), x clamped to [-86, 88] so that neither the power of two nor the product leaves the normal numbers. The
  // argument is reduced to |r| <= ln(2) / 2 by a ln(2) in two parts, of which n times the first is exact; then
  // a polynomial of degree 6 whose largest relative error is 3.1e-9.
  static F exp(F x) {
    constexpr float kPowers[] = {
        0x1.6a23cep-10f, 0x1.123a2p-7f, 0x1.5558f2p-5f, 0x1.555492p-3f, 0x1.fffffcp-2f, 1.0f, 1.0f};
    x = clamp(x, -86.0f, 88.0f);
    const I n = V::round_i(V::mul(x, V::set(1.44269504f)));
    const F f = V::to_f(n);
    F r = V::sub(x, V::mul(f, V::set(0x1.62ep-1f)));  // ln(2), its first 12 bits
    r = V::sub(r, V::mul(f, V::set(0x1.0bfbe8p-15f)));  // the rest
    return V::as_f(V::add_i(V::as_i(horner(kPowers, r)), V::exponent(n)));
  }

  // Phi(x) - 1/2 = x P(x^2) / Q(x^2) on |x| <= 5.6, where it is 1/2 to within 2^-26: a rational fit of degrees 6 and 4
  // whose largest error is 2.4e-8.
  static F gelu(F x) {
    constexpr float kP[] = {0x1.db1612p-34f, -0x1.79ea3p-26f, 0x1.c3395cp-19f, 0x1.7eb6b2p-13f,
                            0x1.2ca8f2p-8f,  0x1.300b6cp-5f,  0x1.988448p-2f};
    constexpr float kQ[] = {0x1.15e624p-14f, 0x1.f27f32p-10f, 0x1.e80926p-6f, 0x1.09ee0ep-2f, 1.0f};
    const F c = clamp(x, -5.6f, 5.6f), t = V::mul(c, c);
    const F phi = V::add(V::div(V::mul(c, horner(kP, t)), horner(kQ, t)), V::set(0.5f));
    return V::mul(x, V::max(phi, V::set(0.0f)));
  }

  static F logistic(F x, F u) { return V::div(x, V::add(V::set(1.0f), exp(V::sub(V::set(0.0f), u)))); }
  static F silu(F x) { return logistic(x, x); }

  static F gelu_tanh(F x) {
    const F c = clamp(x, -12.0f, 12.0f);  // the cube of more would overflow; the exponential is at its end by then
    const F cubic = V::add(c, V::mul(V::mul(V::mul(c, c), c), V::set(0.044715f)));
    return logistic(x, V::mul(cubic, V::set(1.59576912f)));
  }

  static F relu(F x) { return V::max(V::set(0.0f), x); }  // in this order NaN, the second operand, is what remains

  static F apply(Activation function, F x) {
    switch (function) {
      case Activation::kGelu:
        return gelu(x);
      case Activation::kGeluTanh:
        return gelu_tanh(x);
      case Activation::kSilu:
        return silu(x);
      case Activation::kRelu:
        return relu(x);
      default:
        return x;
    }
  }
};

// Asks for columns [column, column + columns) of rows [row, row + rows) of a residual, if there is one, elements of 2
// or 4 bytes: a tile touches a few columns of every row, which no hardware prefetcher follows.
inline void prefetch_residual(const ResidualArgs& residual, DType dtype, int64_t row, int64_t rows, int64_t column,
                              int64_t columns) {
  if (!residual.rows) return;
  const int64_t bytes = dtype == DType::kF32 ? 4 : 2;
  for (int64_t r = row; r < row + rows; ++r) {
    const char* from = static_cast<const char*>(residual.rows) + (r * residual.stride + column) * bytes;
    for (int64_t i = 0; i < columns * bytes; i += kAlign) __builtin_prefetch(from + i);
  }
}

// v plus lanes [at, at + n) of a residual of dtype D.
template <class V, DType D>
typename V::F plus_residual(const ResidualArgs& residual, int64_t at, int n, typename V::F v) {
  return V::add(
      v, n == V::kLanes ? V::template load<D>(residual.rows, at) : V::template load_part<D>(residual.rows, at, n));
}

}  // namespace
}  // namespace qk
