// Which kernel runs: architecture and shape selection, nothing else.
#include <atomic>

#include "host.h"
#include "launch.h"

namespace qk::cuda {
namespace {

// One attribute of the current device, asked once per device (a query takes microseconds).
int attribute(cudaDeviceAttr which, std::atomic<int> (&known)[64]) {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  std::atomic<int>& slot = known[device & 63];
  int value = slot.load(std::memory_order_relaxed);
  if (value == 0 || device >= 64) {
    check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
    slot.store(value, std::memory_order_relaxed);
  }
  return value;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// wgmma, few tokens (all measured on an H200): tiles of 64 channels where one wave holds them all, else of 128; the
// smallest n that holds the tokens, 64 of them twice rather than 128 once where that too is one wave and K is not long.
// K is split until two fifths of the multiprocessors have a CTA, and further if each then still walks 48 slabs: a
// cluster starts and meets later than a CTA alone. With more CTAs than fit one to a multiprocessor, the activations'
// share of the L2 traffic counts, and neighbours share it.
W8A8Config select_stream(int64_t m, int64_t n, int64_t k, int sms) {
  W8A8Config c = {W8A8Kernel::kStream, 8, 1, 1, 1, 64};
  while (c.tile < m && c.tile < 64) c.tile *= 2;
  const int64_t columns = ceil_div(n, 64);
  const bool long_k = slabs(k) >= 64;
  if (m > 64 && (columns * ceil_div(m, 64) > sms || (long_k && m <= 256))) c.tile = 128;
  // Two tiles of 128 tokens over a long K: halves of K rather than halves of the channels fetch them once.
  if (columns * ceil_div(m, c.tile) > sms || (c.tile == 128 && m > 128 && long_k)) c.channels = 128;
  const int64_t tiles = ceil_div(n, c.channels) * ceil_div(m, c.tile);
  if (tiles > sms) {
    c.deep = c.tile > 16 ? 1 : 0;
    c.share = c.tile >= 64 ? 4 : 1;
    return c;
  }
  while (c.split < 8 && tiles * c.split * 2 <= sms) {
    const int64_t least = tiles * c.split * 5 >= sms * 2 && c.channels == 64 ? 48 : 4;
    if (slabs(k) < least * c.split * 2) break;
    c.split *= 2;
  }
  return c;
}

// wgmma, many tokens: the instance with the least time by a model of the chip it is made for, in nanoseconds: `slab`
// for each slab of a wave of tiles, `power` for each slab of the tiles that a multiprocessor has on the average (the
// clock is what the power limit leaves, so that those without work speed the others up), `wave` for each wave, and
// `once`. Fitted to what an H200 takes in its steady state, each instance alone for a while, over 58 problems of 256 to
// 4096 tokens: within 4 to 5 %, and what is chosen 0.5 % slower on the average than the best instance.
W8A8Config select_tiled(int64_t m, int64_t n, int64_t k, int sms) {
  struct Instance {
    int tile, share, turns;
    double slab, power, wave, once;
  };
  static constexpr Instance kInstances[] = {{256, 1, 0, 499, 241, 1163, 2076}, {256, 2, 0, 484, 256, 1095, 2231},
                                            {224, 2, 0, 417, 233, 1165, 2126}, {128, 1, 0, 211, 195, 762, 1840},
                                            {128, 2, 0, 218, 188, 759, 1843},  {128, 2, 1, 223, 171, 489, 2739}};
  W8A8Config best = {W8A8Kernel::kTiled, 0, 1, 0, 0, 0};
  double least = 0;
  for (const Instance& i : kInstances) {
    const int64_t tiles = ceil_div(m, 128 * i.share) * ceil_div(n, i.tile);
    const double waves = static_cast<double>(ceil_div(tiles, sms / i.share));
    const double mean = static_cast<double>(tiles * i.share) / sms;
    const double cost = static_cast<double>(slabs(k)) * (waves * i.slab + mean * i.power) + waves * i.wave + i.once;
    if (best.tile == 0 || cost < least) least = cost, best.tile = i.tile, best.share = i.share, best.deep = i.turns;
  }
  return best;
}

// Up to 128 tokens stream, and more while one wave holds their tiles of 64 channels.
bool streams(int64_t m, int64_t n, int sms) { return m <= 128 || ceil_div(n, 64) * ceil_div(m, 128) <= sms; }

}  // namespace

int device_capability() {
  static std::atomic<int> major[64], minor[64];
  return 10 * attribute(cudaDevAttrComputeCapabilityMajor, major) + attribute(cudaDevAttrComputeCapabilityMinor, minor);
}

int multiprocessors() {
  static std::atomic<int> known[64];
  return attribute(cudaDevAttrMultiProcessorCount, known);
}

bool has_sm90a() {
#ifdef QK_CUDA_SM90A
  return true;
#else
  return false;
#endif
}

W8A8Config select_w8a8(int64_t m, int64_t n, int64_t k, int capability, int sms) {
  if (capability == 90 && has_sm90a()) {
    return streams(m, n, sms) ? select_stream(m, n, k, sms) : select_tiled(m, n, k, sms);
  }
  return W8A8Config{W8A8Kernel::kMma, m <= 16 ? 16 : m <= 64 ? 64 : 128, 1, 1, 0, 0};
}

void gemm_w8a8(const GemmW8A8Args& args, const W8A8Config& config, bool dependent, cudaStream_t stream) {
  if (args.m == 0 || args.n == 0) return;
  switch (config.kernel) {
    case W8A8Kernel::kMma:
      return gemm_w8a8_mma(args, config, dependent, stream);
#ifdef QK_CUDA_SM90A
    case W8A8Kernel::kStream:
      return gemm_w8a8_stream(args, config, dependent, stream);
    case W8A8Kernel::kTiled:
      return gemm_w8a8_tiled(args, config, dependent, stream);
#else
    default:
      break;
#endif
  }
  throw std::invalid_argument("gemm_w8a8: kernel " + std::to_string(static_cast<int>(config.kernel)) +
                              " is not in this build");
}

}  // namespace qk::cuda
