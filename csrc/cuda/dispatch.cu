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

// wgmma, few tokens: the smallest n that holds them (128 tokens at most), and K split until the chip is full.
W8A8Config select_stream(int64_t m, int64_t n, int64_t k, int sms) {
  W8A8Config c = {W8A8Kernel::kStream, 8, 1, 1, 0};
  while (c.tile < m && c.tile < 128) c.tile *= 2;
  const int64_t tiles = ceil_div(n, 128) * ceil_div(m, c.tile);
  while (c.split < 8 && tiles * c.split * 2 <= sms && slabs(k) >= c.split * 4) c.split *= 2;
  c.deep = tiles * c.split <= sms ? 1 : 0;
  return c;
}

// wgmma, many tokens: the tile width that leaves the least of the last wave empty; ties go to the widest.
W8A8Config select_tiled(int64_t m, int64_t n, int sms) {
  W8A8Config best = {W8A8Kernel::kTiled, 256, 1, 2, 0};
  int64_t least = 0;
  for (const int tile : {256, 224, 128}) {
    const int64_t clusters = sms / 2, tiles = ceil_div(m, 256) * ceil_div(n, tile);
    // Cost of one cluster: columns of channels it computes, with an eighth more a tile for fill and epilogue, and more
    // shared-memory traffic the narrower the tile.
    const int64_t cost = ceil_div(tiles, clusters) * (tile * 100 + 2400 + (256 - tile) * 10);
    if (least == 0 || cost < least) least = cost, best.tile = tile;
  }
  return best;
}

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
  if (capability == 90 && has_sm90a()) return m <= 256 ? select_stream(m, n, k, sms) : select_tiled(m, n, sms);
  return W8A8Config{W8A8Kernel::kMma, m <= 16 ? 16 : m <= 64 ? 64 : 128, 1, 1, 0};
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
