#include "ceilings.h"

#include <atomic>
#include <chrono>
#include <cstring>

#include "../cpu/threads.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace qk {
namespace {

double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

std::atomic<uint64_t> sink{0};

#if defined(__SSE2__)
// The best that the x86-64 baseline offers: pmaddwd (8 multiplies, 4 sums) and paddd on eight chains.
void int8_baseline(int64_t steps) {
  const __m128i a = _mm_set1_epi16(3), b = _mm_set1_epi16(5);
  __m128i t;
  __m128i c0 = a, c1 = a, c2 = a, c3 = a, c4 = a, c5 = a, c6 = a, c7 = a;
#define QK_CHAIN(c)                                                                                                    \
  __asm__ volatile("movdqa %2, %1\n\tpmaddwd %3, %1\n\tpaddd %1, %0" : "+x"(c), "=&x"(t) : "x"(a), "x"(b))
  for (int64_t i = 0; i < steps; ++i) QK_8_CHAINS(QK_CHAIN)
#undef QK_CHAIN
}
constexpr int64_t kBaselineOps = 8 * 8 * 2;

void fp32_baseline(int64_t steps) {
  const __m128 a = _mm_set1_ps(0.5f), b = _mm_set1_ps(1.0f);
  __m128 c0 = b, c1 = b, c2 = b, c3 = b, c4 = b, c5 = b, c6 = b, c7 = b;
#define QK_CHAIN(c) __asm__ volatile("mulps %1, %0\n\taddps %2, %0" : "+x"(c) : "x"(a), "x"(b))
  for (int64_t i = 0; i < steps; ++i) QK_8_CHAINS(QK_CHAIN)
#undef QK_CHAIN
}
constexpr int64_t kBaselineFlops = 8 * 4 * 2;
#else
void int8_baseline(int64_t steps) {
  int32_t chain[16];
  for (int j = 0; j < 16; ++j) chain[j] = j;
  for (int64_t i = 0; i < steps; ++i) {
    for (int j = 0; j < 16; ++j) chain[j] = static_cast<int32_t>(static_cast<uint32_t>(chain[j]) * 3u + 5u);
  }
  for (int j = 0; j < 16; ++j) sink += static_cast<uint32_t>(chain[j]);
}
constexpr int64_t kBaselineOps = 16 * 2;

void fp32_baseline(int64_t steps) {
  float chain[16];
  for (int j = 0; j < 16; ++j) chain[j] = static_cast<float>(j);
  for (int64_t i = 0; i < steps; ++i) {
    for (int j = 0; j < 16; ++j) chain[j] = chain[j] * 0.5f + 1.0f;
  }
  for (int j = 0; j < 16; ++j) sink += static_cast<uint64_t>(chain[j]);
}
constexpr int64_t kBaselineFlops = 16 * 2;
#endif

uint64_t read_baseline(const uint8_t* data, int64_t bytes) {
  uint64_t sum[8] = {};
  for (int64_t i = 0; i < bytes; i += 64) {
    uint64_t words[8];
    std::memcpy(words, data + i, 64);
    for (int j = 0; j < 8; ++j) sum[j] += words[j];
  }
  uint64_t total = 0;
  for (int j = 0; j < 8; ++j) total += sum[j];
  return total;
}

}  // namespace

const LoopTable& loops_scalar() {
  static constexpr LoopTable table{int8_baseline, kBaselineOps, fp32_baseline, kBaselineFlops, read_baseline};
  return table;
}

const LoopTable* loops_of(const char* tier) {
  if (std::strcmp(tier, "scalar") == 0) return &loops_scalar();
#ifdef QK_HAVE_AVX2
  if (std::strcmp(tier, "avx2") == 0) return &loops_avx2();
#endif
#ifdef QK_HAVE_AVXVNNI
  if (std::strcmp(tier, "avxvnni") == 0) return &loops_avxvnni();
#endif
#ifdef QK_HAVE_AVX512VNNI
  if (std::strcmp(tier, "avx512vnni") == 0) return &loops_avx512vnni();
#endif
#ifdef QK_HAVE_AMX
  if (std::strcmp(tier, "amx") == 0) return &loops_amx();
#endif
  return nullptr;
}

double time_loop(void (*loop)(int64_t), int64_t steps, int threads) {
  const double start = seconds_now();
  parallel(threads, [&](int, int) { loop(steps); });
  return seconds_now() - start;
}

double time_read(const LoopTable& loops, const uint8_t* data, int64_t bytes, int64_t passes, int threads) {
  constexpr int64_t kStep = 512;
  const double start = seconds_now();
  parallel(threads, [&](int thread, int team) {
    const Range range = share(bytes / kStep, thread, team);
    uint64_t sum = 0;
    for (int64_t pass = 0; pass < passes; ++pass) {
      sum += loops.read(data + range.begin * kStep, (range.end - range.begin) * kStep);
    }
    sink += sum;
  });
  return seconds_now() - start;
}

}  // namespace qk
