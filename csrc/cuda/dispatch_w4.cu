// Which kernel runs a product of 4-bit weights: architecture and shape selection, nothing else.
#include "host.h"
#include "launch.h"
#include "launch_w4.h"

namespace qk::cuda {
namespace {

constexpr int kChannels = 128;  // of a tile

// wgmma. Sums that CTAs share through memory cost some 4 us, so they pay only where less than half of the chip would
// have work; and with few tokens phases serve instead (measured on an H100). Phases need the groups of 8-bit
// activations to lie within a slab (`within`).
W4Plan plan_wgmma(bool bytes, int64_t m, int64_t n, int64_t k, W4Kind kind, bool within, int sms) {
  W4Plan plan = {};
  plan.kernel = W4Kernel::kWgmma;
  const bool minimum = kind == W4Kind::kMinimum;
  const int most = minimum ? 64 : 128;
  for (plan.tokens = 8; plan.tokens < m && plan.tokens < most;) plan.tokens *= 2;
  plan.phases = 1;
  if (kind == W4Kind::kZeroPoint && w4_slabs(k) >= 8 && (within || !bytes)) {
    // Tiles of 16 tokens fetch the weights from the L2 again and again.
    const int64_t narrow = blocks(n, w4_channels(4));
    if (plan.tokens <= 16 ? narrow <= sms : plan.tokens <= 64 && narrow * 3 <= sms * 2) {
      plan.phases = 4;
      if (plan.tokens > 16) plan.tokens = 16;
    }
  }
  const int size = w4_cluster(bytes, plan.tokens, plan.phases);
  const int64_t tiles = int64_t(blocks(m, plan.tokens)) * blocks(n, w4_channels(plan.phases) * size);
  const int64_t slots = int64_t(sms) * w4_per_sm(bytes, plan.tokens, minimum, plan.phases) / size;
  const int64_t waves = (tiles + slots - 1) / slots;
  // Half of the multiprocessors in a single wave, half of the places in the last of several.
  const bool enough = waves == 1 ? tiles * size * 2 >= sms : tiles * 2 > waves * slots;
  if (bytes || plan.phases > 1 || enough) {
    plan.ctas = static_cast<int32_t>(tiles < slots ? tiles : slots);
    return plan;
  }
  plan.ctas = static_cast<int32_t>(slots);
  plan.counters = (tiles - w4_whole_tiles(tiles, plan.ctas)) * size * 2;
  plan.partial_floats = int64_t(2) * plan.ctas * size * kChannels * plan.tokens;
  return plan;
}

}  // namespace

W4Plan plan_w4a16(int64_t m, int64_t n, int64_t k, W4Kind kind, int capability, int sms) {
  if (capability == 90 && has_sm90a()) return plan_wgmma(false, m, n, k, kind, true, sms);
  W4Plan plan = {};
  plan.kernel = W4Kernel::kMma;
  plan.tokens = m <= 8                                ? 8
                : m <= 16                             ? 16
                : m <= 32 || kind == W4Kind::kMinimum ? 32
                                                      : 64;  // the sums of tokens need registers too
  const int64_t tiles = int64_t(blocks(m, plan.tokens)) * blocks(n, kChannels), most = int64_t(sms) * 2;
  if (tiles <= most) {
    // The same number of CTAs for each tile: none has to end one tile and begin another.
    const int64_t split = most / tiles, worth = (w4_slabs(k) + 3) / 4;  // of four slabs or more
    plan.ctas = static_cast<int32_t>(tiles * (split < worth ? split : worth));
  } else {
    plan.ctas = static_cast<int32_t>(most);
  }
  plan.counters = tiles;
  plan.partial_floats = int64_t(plan.ctas) * 2 * kChannels * plan.tokens;
  return plan;
}

// mma.sync, measured on an H100: a wide CTA needs as long for a slab as the chip for some 630 narrow ones; and 128
// tokens beat twice 64 as soon as three quarters of the multiprocessors have a CTA.
W4Plan plan_w4a8(int64_t m, int64_t n, int64_t k, int64_t group, W4Kind kind, int capability, int sms) {
  const bool within = group < k && kW4SlabK % group == 0;
  if (capability == 90 && has_sm90a()) return plan_wgmma(true, m, n, k, kind, within, sms);
  W4Plan plan = {};
  plan.kernel = W4Kernel::kMma;
  plan.tokens = m <= 8                                                              ? 8
                : m <= 16 || int64_t(blocks(n, 32)) * blocks(m, 16) * 4 <= sms * 19 ? 16
                : m > 64 && int64_t(blocks(m, 128)) * blocks(n, 128) * 4 >= sms * 3 ? 128
                                                                                    : 64;
  return plan;
}

void gemm_w4a16(const GemmW4A16Args& args, const W4Plan& plan, bool dependent, cudaStream_t stream) {
  if (args.m == 0) return;
  if (plan.kernel == W4Kernel::kMma) return gemm_w4a16_mma(args, plan, dependent, stream);
#ifdef QK_CUDA_SM90A
  return gemm_w4a16_sm90(args, plan, dependent, stream);
#else
  throw std::invalid_argument("gemm_w4a16: the wgmma kernel is not in this build");
#endif
}

void gemm_w4a8(const GemmW4A8Args& args, const W4Plan& plan, bool dependent, cudaStream_t stream) {
  if (args.m == 0) return;
  if (plan.kernel == W4Kernel::kMma) return gemm_w4a8_mma(args, plan.tokens, dependent, stream);
#ifdef QK_CUDA_SM90A
  return gemm_w4a8_sm90(args, plan, dependent, stream);
#else
  throw std::invalid_argument("gemm_w4a8: the wgmma kernel is not in this build");
#endif
}

}  // namespace qk::cuda
