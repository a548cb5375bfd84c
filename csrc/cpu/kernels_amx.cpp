// AMX tier: tdpbssd on 16 x 64-byte tiles; few rows are left to VNNI.
#include "activation_impl.h"
#include "dispatch.h"
#include "linear_w4a8_amx.h"
#include "linear_w8a8_amx.h"
#include "norm_impl.h"
#include "quantize_impl.h"
#include "rotary_impl.h"
#include "tile_avx512vnni.h"

namespace qk {
namespace {

// Below this many rows a tile is mostly padding, and VNNI is faster.
constexpr int64_t kMinRows = 16;

// Blocks, tiles and sessions are those of tiles_amx.h. A block of rows, 1 MiB of activations at most, stays in the 2
// MiB of L2 beside a superblock's weights.
struct Amx : ZmmVerbs {
  static constexpr const char* kIsa = "amx";
  static constexpr int kTileM = 32, kTileN = 32, kOffset = 0, kSliceK = 4096, kMaxBlockTiles = 8;
  static constexpr bool kFusesGroups = false, kSumsAreFloats = false;
  static constexpr int64_t kOwnRows = 0;
  static constexpr int64_t kBlockBytes = 1 << 20;
  using Session = TileSession;

  // sum + four products u8 x s8 in each lane.
  static I dot4(I sum, I u8, I s8) {
    QK_DOT4(sum, u8, s8);
    return sum;
  }
};

const char* linear_w8a8_by_rows(const LinearW8A8Args* members, int count) {
  if (members->m < kMinRows) return linear_w8a8<Avx512Vnni>(members, count);
  LinearW8A8Amx<Amx>(members, count).run();
  return Amx::kIsa;
}

int64_t linear_w8a8_scratch_by_rows(int64_t m, int64_t k, int threads) {
  return m < kMinRows ? linear_w8a8_scratch_bytes<Avx512Vnni>(m, k, threads)
                      : LinearW8A8Amx<Amx>::scratch_bytes(m, k, threads);
}

const char* linear_w4a8_by_rows(const LinearW4A8Args& args) {
  if (args.m < kMinRows) return linear_w4a8<Avx512Vnni>(args);
  if (args.weight_multiplier)
    LinearW4A8Amx<Amx, true>(args).run();
  else
    LinearW4A8Amx<Amx, false>(args).run();
  return Amx::kIsa;
}

int64_t linear_w4a8_scratch_by_rows(int64_t m, int64_t k, int64_t groups, int threads) {
  return m < kMinRows ? linear_w4a8_scratch_bytes<Avx512Vnni>(m, k, groups, threads)
                      : LinearW4A8Amx<Amx, false>::scratch_bytes(m, k, groups, threads);
}

}  // namespace

const KernelTable& kernels_amx() {
  static constexpr KernelTable table = {"amx",
                                        linear_w8a8_by_rows,
                                        linear_w8a8_scratch_by_rows,
                                        linear_w4a8_by_rows,
                                        linear_w4a8_scratch_by_rows,
                                        quantize<Amx>,
                                        dequantize<Amx>,
                                        embedding<Amx>,
                                        activation<Amx>,
                                        norm<Amx>,
                                        rotary<Amx>};
  return table;
}

}  // namespace qk
