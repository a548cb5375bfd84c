// Which kernel runs a product of 4-bit weights, or of 8-bit ones under floating-point activations: architecture and
// shape selection, nothing else.
#include "host.h"
#include "launch.h"
#include "launch_w4.h"
#include "w8a16.h"

namespace qk::cuda {
namespace {

constexpr int kChannels = 128;  // of a tile

// wgmma: what a tile costs, in microseconds on an H200: a slab in each wave of tiles, a launch, and sums that CTAs
// share through memory, where they may; and what each wave after the first adds, above all where phases meet at the end
// of a tile before they begin another. Those of 96 tokens are put between those of 64 and 128.
struct Tile {
  int tokens, phases;
  double slab, launch, sharing, wave = 0;
};
constexpr Tile kHalfTiles[] = {{16, 4, 0.17, 3.2, 0, 3}, {32, 4, 0.165, 2.7, 0, 3}, {32, 2, 0.31, 3, 0, 3},
                               {64, 2, 0.25, 2.9, 0, 3}, {128, 2, 0.44, 1.1, 0, 3}, {32, 1, 0.37, 2.8, 3},
                               {64, 1, 0.48, 2, 3.4},    {96, 1, 0.626, 1.3, 4.5},  {128, 1, 0.76, 0.6, 5.7},
                               {192, 1, 1.05, 0, 7.8},   {256, 1, 1.3, 0, 9.4}};
constexpr Tile kByteTiles[] = {{16, 4, 0.198, 1.84, 0},
                               {32, 4, 0.247, 2.34, 0},
                               {32, 1, 0.308, 3.18, 0},
                               {64, 1, 0.412, 3.59, 0},
                               {128, 1, 0.623, 4.5, 0}};
constexpr Tile kByteCodeTiles[] = {
    {16, 2, 0.2, 0.69, 0, 2.81},  {16, 4, 0.217, 0.31, 0, 1}, {32, 4, 0.28, 0.17, 0, 1.72},
    {64, 2, 0.302, 0.34, 0, 2.6}, {32, 1, 0.509, 0, 3},       {64, 1, 0.595, 1, 3.5},
    {128, 1, 0.785, 0.9, 5.7},    {192, 1, 1.145, 0, 7.8},    {256, 1, 1.48, 0.1, 9.3}};
constexpr Tile kMultiplierTiles[] = {{32, 1, 0.299, 2.4, 0, 1},    {32, 2, 0.237, 2.9, 0, 7.5},
                                     {32, 4, 0.135, 2.4, 0, 4.5},  {64, 1, 0.323, 2.9, 0, 2.1},
                                     {64, 2, 0.257, 3.9, 0, 7.5},  {64, 4, 0.145, 2.5, 0, 5.1},
                                     {128, 1, 0.397, 4.3, 0, 2.3}, {128, 2, 0.219, 2.5, 0, 5.4},
                                     {192, 1, 0.56, 4, 0},         {256, 1, 0.712, 4, 0}};  // from 192 on, on an H100
// Of a row that does not exist, in each slab of several tiles that phases share. With multipliers, tiles of CTAs
// without a cluster cost as much with such rows as without (14336 x 4096 at 129 and 192 rows by 64 tokens: 40.3
// and 40.4).
constexpr double kMissing = 0.0017;
constexpr double kBehind = 7;  // microseconds from a head to what is behind it
constexpr double kBeside = 0.75;  // of the cost of two waves: that of two CTAs on each multiprocessor
constexpr int kFew = 16;  // tokens, whose tiles wait for weights alone

// What a product is made of.
struct Operands {
  bool bytes;  // activations
  int bits;  // of a code
};
constexpr Operands kIntegers = {true, 4};

// Tiles of a product, and how many of them run at a time.
struct Waves {
  int64_t tiles, slots;
  int cluster;
  int64_t count() const { return (tiles + slots - 1) / slots; }
};

Waves waves_of(const W4Plan& plan, Operands of, int64_t m, int64_t n, W4Kind kind, int sms) {
  Waves w;
  w.cluster = w4_cluster(of.bytes, plan.tokens, plan.phases);
  w.tiles =
      int64_t(blocks(m, plan.tokens)) * blocks(n, w4_channels(of.bytes, of.bits, plan.tokens, plan.phases) * w.cluster);
  w.slots = int64_t(sms) * w4_per_sm(of.bytes, of.bits, plan.tokens, kind, plan.phases) / w.cluster;
  return w;
}

W4Plan finished(W4Plan plan, const Waves& w, bool shared) {
  plan.kernel = W4Kernel::kWgmma;
  plan.ctas = static_cast<int32_t>(!shared && w.tiles < w.slots ? w.tiles : w.slots);
  if (shared) {
    plan.counters = int64_t(2) * plan.ctas * w.cluster;  // a flag for each warpgroup
    plan.partial_floats = int64_t(plan.ctas) * w.cluster * kChannels * plan.tokens;
  }
  return plan;
}

// What `tiles` of `width` * 64 channels take, in twentieths of a slab of 64: two on each multiprocessor at a time, and
// four slabs until the next ones are under way; one on each takes little more than half of what two take.
int64_t cost_of_waves(int64_t tiles, int width, int64_t slabs, int sms) {
  const int64_t at_once = 2 * int64_t(sms), rest = tiles % at_once, each = width * slabs + 4;
  return each * (20 * (tiles / at_once) + (rest == 0 ? 0 : rest <= sms ? 11 : 20));
}

// Floats by 4-bit codes: four phases of 64 channels while two such tiles for each multiprocessor are enough, since
// there is often room for the next product's first CTAs then (4096 x 14336 at one row on an H200: 9.2 us, 9.8 by two
// phases of 128). Beyond that two phases of 128, fewer tiles that wait for others to end, and tokens that come half as
// often: while all run at a time (w4_is_even), of up to 8 rows and K of less than 72 slabs, or of more than 12 blocks
// of channels a multiprocessor (one row of 4096 x 22016 15.4 -> 13.5 us, of 4096 x 28672 18.6 -> 16.1). Otherwise such
// tiles have few warps to hide what a slab waits for, and a second wave of the others costs less (8192 x 17920 at 16
// rows 28.1 us, 34.0 by two phases). Of more tiles, whatever waits less (4096 x 128256 at one row 73.2 -> 64.0).
int phases_of_few(int64_t m, int64_t n, int64_t k, int sms) {
  const int64_t narrow = blocks(n, 64), slabs = w4_slabs(k), each = blocks(blocks(n, kW4Rows), sms);
  if (narrow <= 2 * int64_t(sms)) return 4;
  if (w4_is_even(n, sms)) return each > 12 || (m <= 8 && slabs < 72) ? 2 : 4;
  return cost_of_waves(blocks(n, kChannels), 2, slabs, sms) < cost_of_waves(narrow, 1, slabs, sms) ? 2 : 4;
}

// Few tokens: the narrowest tiles that one wave serves, of 32 channels to a multiprocessor (8 phases), or of 64, as
// many as fit at a time; integers, whose phases wait for one another, in tiles of 64 only while each has a
// multiprocessor. Tiles are shared, at some 3 us, where less than half of the chip would have work. With
// multipliers, four phases where their tiles are nearly one for each multiprocessor, and one where tiles of 64 channels
// would not all run at a time (4096 x 28672 at one row on an H200: 15.8 us, 18.6 by two phases). Floats by 8-bit codes
// have four only where K is long enough to give each its share; they have no such tile of 8 tokens, and take that
// of 16.
W4Plan plan_few(Operands of, int64_t m, int64_t n, int64_t k, W4Kind kind, bool phases, int sms) {
  W4Plan plan = {};
  plan.tokens = m <= 8 ? 8 : kFew;
  const int64_t narrow = blocks(n, 64);
  if (!phases) {
    plan.phases = 1;
  } else if (blocks(n, w4_channels(of.bytes, of.bits, plan.tokens, 8)) <= sms) {
    plan.phases = 8;
  } else if (kind == W4Kind::kMultiplier) {
    plan.phases = narrow <= sms && narrow * 4 > int64_t(sms) * 3 ? 4 : narrow <= 2 * int64_t(sms) ? 2 : 1;
  } else if (of.bytes) {
    plan.phases = narrow <= sms ? 4 : 1;
  } else if (of.bits == 4) {
    plan.phases = phases_of_few(m, n, k, sms);
  } else if (narrow <= sms && narrow * 3 > int64_t(sms) * 2 && w4_slabs(k) >= 32) {
    plan.tokens = kFew, plan.phases = 4;
  } else {
    plan.phases = narrow <= 4 * int64_t(sms) ? 2 : 1;
  }
  const Waves w = waves_of(plan, of, m, n, kind, sms);
  // Half of the multiprocessors in a single wave, half of the places in the last of several.
  const bool enough = w.count() == 1 ? w.tiles * w.cluster * 2 >= sms : w.tiles * 2 > w.count() * w.slots;
  return finished(plan, w, !of.bytes && plan.phases == 1 && !enough);
}

struct Costed {
  W4Plan plan;
  double cost;
};

// The cheapest of the tiles that `has` admits.
template <size_t kCount, typename Has>
Costed cheapest(const Tile (&tiles)[kCount], Operands of, int64_t m, int64_t n, int64_t k, W4Kind kind, int sms,
                const Has& has) {
  W4Plan best = {};
  double least = 0.0;
  const auto consider = [&](const Tile& tile, bool shared) {
    W4Plan plan = {};
    plan.tokens = tile.tokens, plan.phases = tile.phases;
    const Waves w = waves_of(plan, of, m, n, kind, sms);
    if (shared && w.tiles % w.slots == 0) return;
    const int64_t at_once = sms / w.cluster, full = (w.tiles + at_once - 1) / at_once;
    const double beside = w.slots > at_once && full > 1 ? kBeside : 1.0;
    const double waves = shared ? double(w.tiles) / double(w.slots) : double(full) * beside;
    const bool counts =
        tile.phases > 1 && tile.wave > 0.0 && m > tile.tokens && (kind != W4Kind::kMultiplier || w.cluster > 1);
    const int64_t missing = counts ? int64_t(blocks(m, tile.tokens)) * tile.tokens - m : 0;
    const double cost = (waves * tile.slab + double(missing) * kMissing) * double(w4_slabs(k)) + tile.launch +
                        (shared ? tile.sharing : double(full - 1) * tile.wave);
    if (least == 0.0 || cost < least) least = cost, best = finished(plan, w, shared);
  };
  for (const Tile& tile : tiles) {
    if (!has(tile)) continue;
    consider(tile, false);
    if (tile.sharing > 0.0) consider(tile, true);
  }
  return {best, least};
}

// Of multipliers, whose tiles are not shared, in one launch or two: wide tiles whose last wave would be far from full
// leave its channels to narrower ones.
template <typename Has>
W4Plan plan_multipliers(int64_t m, int64_t n, int64_t k, int sms, const Has& has) {
  constexpr W4Kind kKind = W4Kind::kMultiplier;
  Costed best = cheapest(kMultiplierTiles, kIntegers, m, n, k, kKind, sms, has);
  for (const Tile& tile : kMultiplierTiles) {
    // A head of 65 to 128 rows has tiles of 128, and of more rows wider ones.
    if (tile.phases > 1 || tile.tokens < 128 || m <= 64 || (tile.tokens > 128) != (m > 128)) continue;
    W4Plan head = {};
    head.tokens = tile.tokens, head.phases = 1;
    const Waves w = waves_of(head, kIntegers, m, n, kKind, sms);
    const int64_t down = blocks(m, tile.tokens), full = w.tiles / w.slots, columns = full * w.slots / down;
    const int64_t channels = columns * w4_channels(kIntegers.bytes, kIntegers.bits, tile.tokens, 1) * w.cluster;
    if (columns == 0 || channels >= n) continue;
    Costed rest = cheapest(kMultiplierTiles, kIntegers, m, n - channels, k, kKind, sms, has);
    rest.cost += double(full) * tile.slab * double(w4_slabs(k)) + kBehind;
    if (rest.cost >= best.cost) continue;
    rest.plan.head_channels = static_cast<int32_t>(channels), rest.plan.head_tokens = tile.tokens;
    best = rest;
  }
  return best.plan;
}

// Phases need the groups of 8-bit activations to lie within a slab (`within`).
W4Plan plan_wgmma(bool bytes, int64_t m, int64_t n, int64_t k, W4Kind kind, bool within, int sms) {
  const Operands of = {bytes, 4};
  const bool whole = kind == W4Kind::kMultiplier;  // sums of whole rows
  const bool phases = (kind == W4Kind::kZeroPoint || whole) && w4_slabs(k) >= 8 && (within || whole || !bytes);
  if (m <= kFew) return plan_few(of, m, n, k, kind, phases, sms);
  const auto has = [&](const Tile& tile) {
    // Several tiles of 32 cost less than one of 64 only where no phases share them.
    if (whole && tile.phases > 1 && tile.tokens < 64 && m > tile.tokens) return false;
    return (phases || tile.phases == 1) && w4_has_tile(bytes, kind, tile.tokens, tile.phases);
  };
  if (whole) return plan_multipliers(m, n, k, sms, has);
  return (bytes ? cheapest(kByteTiles, of, m, n, k, kind, sms, has) : cheapest(kHalfTiles, of, m, n, k, kind, sms, has))
      .plan;
}

#ifdef QK_CUDA_SM90A

// What a product keeps of its head alone, or of what is behind it; `first` channels, a multiple of kW4Rows.
GemmW4A8Args head_of(GemmW4A8Args a, int32_t first) {
  a.weight.n = first;
  return a;
}
GemmW4A8Args rest_of(GemmW4A8Args a, int32_t first) {
  W4Weight& w = a.weight;
  w.n -= first;
  w.packed += int64_t(first) / kW4Rows * kW4BlockBytes;
  w.scale = static_cast<const uint16_t*>(w.scale) + first;  // multipliers
  w.channel_scale += first;
  if (a.channel_sum) a.channel_sum += first;
  if (a.bias) a.bias += first;
  a.y = static_cast<uint8_t*>(a.y) + int64_t(first) * (a.y_dtype == DType::kF32 ? 4 : 2);
  a.follows = true;
  return a;
}

// In two launches where the plan has a head. Its tiles are whole, in full waves.
void run_multipliers(const GemmW4A8Args& args, const W4Plan& plan, bool dependent, cudaStream_t stream) {
  const int32_t first = plan.head_channels;
  if (first == 0) return gemm_w4a8_multiplier_sm90(args, plan, dependent, stream);
  if (first >= args.weight.n) throw std::invalid_argument("plan: expected a head of fewer channels than there are");
  W4Plan head = {};
  head.tokens = plan.head_tokens, head.phases = 1;
  head = finished(head, waves_of(head, kIntegers, args.m, first, args.weight.kind, multiprocessors()), false);
  gemm_w4a8_multiplier_sm90(head_of(args, first), head, dependent, stream);
  gemm_w4a8_multiplier_sm90(rest_of(args, first), plan, true, stream);
}

#endif

void check_no_head(const W4Plan& plan) {
  if (plan.head_channels > 0) {
    throw std::invalid_argument("plan: expected no head, which the wgmma kernel of multipliers alone has, got " +
                                std::to_string(plan.head_channels) + " channels");
  }
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

// mma.sync, measured on an H100 with float scales: a wide CTA needs as long for a slab as the chip for some 630 narrow
// ones; and 128 tokens beat twice 64 as soon as three quarters of the multiprocessors have a CTA.
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

// mma.sync: wide blocks halve how often activations are read, where they leave enough CTAs: one to a multiprocessor
// where there are many tokens, else four.
W4Plan plan_w8a16(int64_t m, int64_t n, int64_t k, int capability, int sms) {
  W4Plan plan = {};
  if (capability != 90 || !has_sm90a()) {
    plan.kernel = W4Kernel::kMma;
    plan.tokens = m <= 8 ? 8 : m <= 16 ? 16 : 32;
    plan.phases = n >= int64_t(m > 8 ? 32 : 128) * sms ? 2 : 1;
    return plan;
  }
  const bool phases = w4_slabs(k) >= 8;
  const Operands of = {false, 8};
  if (m <= kFew) return plan_few(of, m, n, k, W4Kind::kZeroPoint, phases, sms);
  const auto has = [&](const Tile& tile) {
    return (phases || tile.phases == 1) && w8a16_has_tile(tile.tokens, tile.phases);
  };
  return cheapest(kByteCodeTiles, of, m, n, k, W4Kind::kZeroPoint, sms, has).plan;
}

void gemm_w4a16(const GemmW4A16Args& args, const W4Plan& plan, bool dependent, cudaStream_t stream) {
  check_no_head(plan);
  if (args.m == 0) return;
  if (plan.kernel == W4Kernel::kMma) return gemm_w4a16_mma(args, plan, dependent, stream);
#ifdef QK_CUDA_SM90A
  return gemm_w4a16_sm90(args, plan, dependent, stream);
#else
  throw std::invalid_argument("gemm_w4a16: the wgmma kernel is not in this build");
#endif
}

void gemm_w8a16(const GemmW8A16Args& args, const W4Plan& plan, bool dependent, cudaStream_t stream) {
  check_no_head(plan);
  if (args.m == 0 || args.n == 0) return;
  if (plan.kernel == W4Kernel::kMma) return gemm_w8a16_mma(args, plan.phases, stream);
#ifdef QK_CUDA_SM90A
  return gemm_w8a16_sm90(args, plan, dependent, stream);
#else
  throw std::invalid_argument("gemm_w8a16: the wgmma kernel is not in this build");
#endif
}

void gemm_w4a8(const GemmW4A8Args& args, const W4Plan& plan, bool dependent, cudaStream_t stream) {
  const bool multiplier = args.weight.kind == W4Kind::kMultiplier;
  if (!multiplier || plan.kernel == W4Kernel::kMma) check_no_head(plan);
  if (args.m == 0) return;
  if (plan.kernel == W4Kernel::kMma) {
    if (multiplier) return gemm_w4a8_multiplier_mma(args, plan.tokens, dependent, stream);
    return gemm_w4a8_mma(args, plan.tokens, dependent, stream);
  }
#ifdef QK_CUDA_SM90A
  return multiplier ? run_multipliers(args, plan, dependent, stream) : gemm_w4a8_sm90(args, plan, dependent, stream);
#else
  throw std::invalid_argument("gemm_w4a8: the wgmma kernel is not in this build");
#endif
}

}  // namespace qk::cuda
