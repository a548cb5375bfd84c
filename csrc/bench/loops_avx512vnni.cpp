// AVX512-VNNI: a step is twelve chains of the 512-bit vpdpbusd, 64 multiply-accumulates each.
#include <immintrin.h>

#include "ceilings.h"

namespace qk {
namespace {

void int8_zmm(int64_t steps) {
  const __m512i a = _mm512_set1_epi8(3), w = _mm512_set1_epi8(-5);
  __m512i c0 = a, c1 = a, c2 = a, c3 = a, c4 = a, c5 = a, c6 = a, c7 = a, c8 = a, c9 = a, c10 = a, c11 = a;
#define QK_CHAIN(c) __asm__ volatile("vpdpbusd %2, %1, %0" : "+v"(c) : "v"(a), "v"(w))
  for (int64_t i = 0; i < steps; ++i) QK_12_CHAINS(QK_CHAIN)
#undef QK_CHAIN
}

void fp32_zmm(int64_t steps) {
  const __m512 a = _mm512_set1_ps(1.0f), b = _mm512_set1_ps(0.5f);
  __m512 c0 = a, c1 = a, c2 = a, c3 = a, c4 = a, c5 = a, c6 = a, c7 = a, c8 = a, c9 = a, c10 = a, c11 = a;
#define QK_CHAIN(c) __asm__ volatile("vfmadd213ps %2, %1, %0" : "+v"(c) : "v"(b), "v"(a))
  for (int64_t i = 0; i < steps; ++i) QK_12_CHAINS(QK_CHAIN)
#undef QK_CHAIN
}

uint64_t read_zmm(const uint8_t* data, int64_t bytes) {
  __m512i s0 = _mm512_setzero_si512(), s1 = s0, s2 = s0, s3 = s0;
  for (int64_t i = 0; i < bytes; i += 256) {
    s0 = _mm512_add_epi64(s0, _mm512_load_si512(data + i));
    s1 = _mm512_add_epi64(s1, _mm512_load_si512(data + i + 64));
    s2 = _mm512_add_epi64(s2, _mm512_load_si512(data + i + 128));
    s3 = _mm512_add_epi64(s3, _mm512_load_si512(data + i + 192));
  }
  const __m512i s = _mm512_add_epi64(_mm512_add_epi64(s0, s1), _mm512_add_epi64(s2, s3));
  return static_cast<uint64_t>(_mm512_reduce_add_epi64(s));
}

}  // namespace

const LoopTable& loops_avx512vnni() {
  static constexpr LoopTable table{int8_zmm, 12 * 64 * 2, fp32_zmm, 12 * 16 * 2, read_zmm};
  return table;
}

}  // namespace qk
