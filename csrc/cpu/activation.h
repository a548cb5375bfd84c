// What follows a Linear on one vector of floats: functions and the residual; written once over the verbs of a tier.
//
// Every step is rounded once and no two are fused, so that the tiers agree to the bit. With u = 2^-24 |x|, and y the
// exact value (measured over floats of [-100, 100], see tests/test_epilogues.py):
//
//   gelu       x Phi(x)                                            |error| <= 2 u
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

  // max(x, 0) - |x| (1 - Phi(|x|)). The last factor is about 2^-26 at 5.6 and stays that; up to there it is one of
  // eight polynomials, around the multiples of 3/4, whose largest error is 1.9e-8: no division, which keeps one of
  // two ports of 512-bit registers for 16 cycles.
  static F gelu(F x) {
    alignas(kAlign) static constexpr float kPowers[7][8] = {
        {0.0f, 0x1.132d98p-11f, -0x1.c2a128p-14f, -0x1.6e2b0ep-13f, 0x1.222322p-16f, 0x1.8b4a66p-16f, 0x1.151a1ap-18f,
         0x1.38fbfp-22f},
        {-0x1.2d4a84p-9f, 0x1.049f5ep-16f, 0x1.649f16p-10f, 0x1.055fe8p-13f, -0x1.0e76c2p-12f, -0x1.5ba212p-14f,
         -0x1.4861f8p-17f, -0x1.225dbcp-21f},
        {0.0f, -0x1.db74fap-8f, -0x1.f8040ap-10f, 0x1.fcf3aep-10f, 0x1.13cf9p-10f, 0x1.946b84p-13f, 0x1.11e90ep-16f,
         0x1.76751p-21f},
        {0x1.cb7166p-6f, 0x1.2f9fep-7f, -0x1.74e102p-7f, -0x1.2924eap-7f, -0x1.46d554p-9f, -0x1.535968p-12f,
         -0x1.69c2f6p-16f, -0x1.9a5b2cp-21f},
        {0.0f, 0x1.042e9ap-4f, 0x1.bf9d18p-5f, 0x1.4913bap-6f, 0x1.ea1fa2p-9f, 0x1.85f14p-12f, 0x1.536cbap-16f,
         0x1.476a6ap-21f},
        {-0x1.32632cp-2f, -0x1.ce8c18p-3f, -0x1.8de0eap-4f, -0x1.860412p-6f, -0x1.b3aa76p-9f, -0x1.154cbp-12f,
         -0x1.9251b4p-17f, -0x1.4cb1ep-22f},
        {0x1p-1f, 0x1.d022p-3f, 0x1.11a46ep-4f, 0x1.90924ep-7f, 0x1.61de24p-10f, 0x1.72d956p-14f, 0x1.c80684p-19f,
         0x1.469e82p-24f}};
    constexpr float kWhole = 0x1.8p23f;  // beside it a float has no fraction, and its lowest bits count
    const F a = V::min(V::as_f(V::abs_bits(x)), V::set(5.6f)), t = V::mul(a, V::set(4.0f / 3.0f));
    const F near = V::add(t, V::set(kWhole)), r = V::sub(t, V::sub(near, V::set(kWhole))), r2 = V::mul(r, r);
    const auto line = [&](int power) QK_INLINE {
      const F low = V::lookup8(kPowers[6 - power], V::as_i(near));
      return V::add(V::mul(V::lookup8(kPowers[5 - power], V::as_i(near)), r), low);
    };
    F tail = V::add(V::mul(V::lookup8(kPowers[0], V::as_i(near)), r2), line(4));
    tail = V::add(V::mul(tail, r2), line(2));
    tail = V::add(V::mul(tail, r2), line(0));
    return V::sub(V::max(V::set(0.0f), x), V::mul(a, tail));
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
