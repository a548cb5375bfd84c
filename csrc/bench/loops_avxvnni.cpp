// AVX-VNNI: a step is twelve chains of the VEX-encoded vpdpbusd, 32 multiply-accumulates each.
#include <immintrin.h>

#include "ceilings.h"

namespace qk {
namespace {

void int8_ymm(int64_t steps) {
  const __m256i a = _mm256_set1_epi8(3), w = _mm256_set1_epi8(-5);
  __m256i c0 = a, c1 = a, c2 = a, c3 = a, c4 = a, c5 = a, c6 = a, c7 = a, c8 = a, c9 = a, c10 = a, c11 = a;
#define QK_CHAIN(c) __asm__ volatile("%{vex%} vpdpbusd %2, %1, %0" : "+x"(c) : "x"(a), "x"(w))
  for (int64_t i = 0; i < steps; ++i) QK_12_CHAINS(QK_CHAIN)
#undef QK_CHAIN
}

}  // namespace

const LoopTable& loops_avxvnni() {
  static constexpr LoopTable table{int8_ymm, 12 * 32 * 2, nullptr, 0, nullptr};
  return table;
}

}  // namespace qk
