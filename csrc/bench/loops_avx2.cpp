// AVX2: a step is ten chains of two vpaddw, vpmaddwd and vpaddd, 32 multiply-accumulates each: int8 operands widened to
// int16, by Winograd's inner product, the fastest exact sequence without VNNI. (vpmaddwd and vpaddd twice, and vpsignb,
// vpmaddubsw, vpmaddwd, vpaddd, are as many instructions for as many products; on Zen 3 they reach 0.8 to 0.9 of it,
// since more of them want the same two pipes.)
#include <immintrin.h>

#include "ceilings.h"

namespace qk {
namespace {

void int8_ymm(int64_t steps) {
  const __m256i a = _mm256_set1_epi16(3), w = _mm256_set1_epi16(-5);
  __m256i s, t;
  __m256i c0 = a, c1 = a, c2 = a, c3 = a, c4 = a, c5 = a, c6 = a, c7 = a, c8 = a, c9 = a;
#define QK_CHAIN(c)                                                                                                    \
  __asm__ volatile("vpaddw %3, %4, %1\n\tvpaddw %4, %3, %2\n\tvpmaddwd %1, %2, %1\n\tvpaddd %1, %0, %0"                \
                   : "+x"(c), "=&x"(s), "=&x"(t)                                                                       \
                   : "x"(a), "x"(w))
  for (int64_t i = 0; i < steps; ++i) QK_10_CHAINS(QK_CHAIN)
#undef QK_CHAIN
}

void fp32_ymm(int64_t steps) {
  const __m256 a = _mm256_set1_ps(1.0f), b = _mm256_set1_ps(0.5f);
  __m256 c0 = a, c1 = a, c2 = a, c3 = a, c4 = a, c5 = a, c6 = a, c7 = a, c8 = a, c9 = a;
#define QK_CHAIN(c) __asm__ volatile("vfmadd213ps %2, %1, %0" : "+x"(c) : "x"(b), "x"(a))
  for (int64_t i = 0; i < steps; ++i) QK_10_CHAINS(QK_CHAIN)
#undef QK_CHAIN
}

uint64_t read_ymm(const uint8_t* data, int64_t bytes) {
  __m256i s0 = _mm256_setzero_si256(), s1 = s0, s2 = s0, s3 = s0;
  for (int64_t i = 0; i < bytes; i += 128) {
    const __m256i* p = reinterpret_cast<const __m256i*>(data + i);
    s0 = _mm256_add_epi64(s0, _mm256_load_si256(p));
    s1 = _mm256_add_epi64(s1, _mm256_load_si256(p + 1));
    s2 = _mm256_add_epi64(s2, _mm256_load_si256(p + 2));
    s3 = _mm256_add_epi64(s3, _mm256_load_si256(p + 3));
  }
  const __m256i s = _mm256_add_epi64(_mm256_add_epi64(s0, s1), _mm256_add_epi64(s2, s3));
  const __m128i t = _mm_add_epi64(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
  return static_cast<uint64_t>(_mm_cvtsi128_si64(t)) + static_cast<uint64_t>(_mm_extract_epi64(t, 1));
}

}  // namespace

const LoopTable& loops_avx2() {
  static constexpr LoopTable table{int8_ymm, 10 * 32 * 2, fp32_ymm, 10 * 8 * 2, read_ymm};
  return table;
}

}  // namespace qk
