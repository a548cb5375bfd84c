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

// wgmma, few tokens: the smallest n that holds them (128 at most, 64 if twice as many CTAs still fit). K is split where
// there are fewer CTAs than half the multiprocessors, by 2 if that will do: clusters of 4 and 8 start and meet
// measurably later. With more CTAs than fit one to a multiprocessor, the activations' share of the L2 traffic counts,
// and neighbours share it.
W8A8Config select_stream(int64_t m, int64_t n, int64_t k, int sms) {
  W8A8Config c = {W8A8Kernel::kStream, 8, 1, 1, 1, 128};
  while (c.tile < m && c.tile < 128) c.tile *= 2;
  // Two tiles of tokens and two halves of K.
  if (c.tile == 128 && m <= 128 && ceil_div(n, 128) * 4 <= sms) c.tile = 64;
  const int64_t tiles = ceil_div(n, 128) * ceil_div(m, c.tile);
  while (c.split < 8 && tiles * c.split * 2 <= sms && slabs(k) >= c.split * 4) {
    if (c.split >= 2 && tiles * c.split * 2 > sms * 2 / 3) break;
    c.split *= 2;
  }
  if (tiles > sms) {
    c.deep = c.tile > 8 ? 1 : 0;
    c.share = c.tile >= 64 ? 4 : 1;
  }
  return c;
}

// wgmma, many tokens: the instance with the least time by a model of the chip it is made for, in nanoseconds per slab
// and per tile of one CTA (measured on an H200). Narrow tiles pay where they fill the last wave.
W8A8Config select_tiled(int64_t m, int64_t n, int64_t k, int sms) {
  struct Instance {
    int tile, share;
    int64_t slab, tile_overhead;
  };
  const int wide_share = m >= 4096 ? 2 : 1;
  const Instance instances[] = {{256, wide_share, 645, 2200}, {224, 2, 575, 2000}, {128, 1, 335, 1500}};
  W8A8Config best = {W8A8Kernel::kTiled, 0, 1, 0, 0, 0};
  int64_t least = 0;
  for (const Instance& i : instances) {
    const int64_t tiles = ceil_div(m, 128 * i.share) * ceil_div(n, i.tile);
    const int64_t cost = ceil_div(tiles, sms / i.share) * (slabs(k) * i.slab + i.tile_overhead);
    if (best.tile == 0 || cost < least) least = cost, best.tile = i.tile, best.share = i.share;
  }
  return best;
}

// Up to 64 tokens stream. Up to 128 do unless tiles of 128 x 128 fill the chip just once, and up to 256 where they
// would leave half of it idle for a long K.
bool streams(int64_t m, int64_t n, int64_t k, int sms) {
  const int64_t columns = ceil_div(n, 128);
  if (m <= 64) return true;
  if (m <= 128) return columns * 2 <= sms || columns > sms;
  return m <= 256 && columns * 4 <= sms && slabs(k) > 32;
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
  if (capability == 90 && has_sm90a()) {
    return streams(m, n, k, sms) ? select_stream(m, n, k, sms) : select_tiled(m, n, k, sms);
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
