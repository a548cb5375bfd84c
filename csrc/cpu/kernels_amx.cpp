// AMX tier: tdpbssd on 16 x 64-byte tiles; few rows are left to VNNI.
#include "activation_impl.h"
#include "dispatch.h"
#include "linear_w4a8_impl.h"
#include "linear_w8a8_impl.h"
#include "quantize_impl.h"
#include "tile_avx512vnni.h"

namespace qk {
namespace {

// Below this many rows a tile is mostly padding, and VNNI is faster.
constexpr int64_t kMinRows = 16;

struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {};
  uint8_t rows[16] = {};
};

// 32 x 32 tile of the result: tiles 0-3 accumulate, 4-5 hold activations, 6-7 weights. Four loads feed four products:
//
//            tile 6     tile 7          a tile of weights is 16 lines of the packed superblock (row stride 256 bytes),
//   tile 4 | tile 0  |  tile 1 |        64 bytes = 16 columns x 4 k of each
//   tile 5 | tile 2  |  tile 3 |
struct Amx : ZmmVerbs {
  static constexpr const char* kIsa = "amx";
  static constexpr int kTileM = 32, kTileN = 32, kOffset = 0, kSliceK = 4096;
  static constexpr int kDepthAlign = 64, kMaxBlockTiles = 8, kDirectRows = 0, kDirectTiles = 6;
  static constexpr bool kFusesGroups = false, kPrefetchesSlices = false, kFinishesTiles = false, kWidens = false;
  static constexpr int64_t kBlockBytes = 1 << 20;

  struct Session {
    Session() {
      TileConfig config;
      for (int i = 0; i < 8; ++i) {
        config.bytes_per_row[i] = 64;
        config.rows[i] = 16;
      }
      _tile_loadconfig(&config);
    }
    ~Session() { _tile_release(); }
  };

  // Rows past `rows` are computed from whatever lies there and never read; c has room for 16 or 32 rows.
  static void tile(int rows, const uint8_t* a, int64_t lda, const int8_t* b, int64_t steps, int32_t* c, bool accumulate,
                   bool /*minus128*/) {
    constexpr int64_t kLine = kBlockN * kPackK, kPitch = kTileN * sizeof(int32_t);
    if (accumulate) {
      _tile_loadd(0, c, kPitch);
      _tile_loadd(1, c + 16, kPitch);
    } else {
      _tile_zero(0);
      _tile_zero(1);
    }
    if (rows <= 16) {
      for (int64_t k = 0; k < steps; k += 16) {
        _tile_loadd(4, a + k * kPackK, lda);
        _tile_loadd(6, b + k * kLine, kLine);
        _tile_dpbssd(0, 4, 6);
        _tile_loadd(7, b + k * kLine + 64, kLine);
        _tile_dpbssd(1, 4, 7);
      }
    } else {
      int32_t* c2 = c + 16 * kTileN;
      if (accumulate) {
        _tile_loadd(2, c2, kPitch);
        _tile_loadd(3, c2 + 16, kPitch);
      } else {
        _tile_zero(2);
        _tile_zero(3);
      }
      for (int64_t k = 0; k < steps; k += 16) {
        _tile_loadd(6, b + k * kLine, kLine);
        _tile_loadd(4, a + k * kPackK, lda);
        _tile_dpbssd(0, 4, 6);
        _tile_loadd(7, b + k * kLine + 64, kLine);
        _tile_dpbssd(1, 4, 7);
        _tile_loadd(5, a + 16 * lda + k * kPackK, lda);
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
      }
      _tile_stored(2, c2, kPitch);
      _tile_stored(3, c2 + 16, kPitch);
    }
    _tile_stored(0, c, kPitch);
    _tile_stored(1, c + 16, kPitch);
  }

  // The last chunk of a long input may have a single row.
  static void tile_one(const uint8_t* a, const int8_t* b, int64_t steps, int32_t* c, bool minus128) {
    alignas(kAlign) int32_t sums[16 * kTileN];
    for (int64_t half = 0; half < kBlockN; half += kTileN) {
      tile(1, a, row_bytes(0), b + half * kPackK, steps, sums, false, minus128);
      for (int j = 0; j < kTileN; ++j) c[half + j] = sums[j];
    }
  }

  // Codes are below 16, so they are the same bytes signed or unsigned.
  static void tile4(int rows, const uint8_t* a, int64_t lda, const int8_t* b, int64_t steps, int32_t* c,
                    bool accumulate) {
    tile(rows, a, lda, b, steps, c, accumulate, false);
  }
  static void tile4_direct(int, const uint8_t*, int64_t, const uint8_t*, int64_t, int32_t*) {}  // kDirectRows = 0
};

const char* linear_w8a8_by_rows(const LinearW8A8Args* members, int count) {
  return members->m < kMinRows ? linear_w8a8<Avx512Vnni>(members, count) : linear_w8a8<Amx>(members, count);
}

const char* linear_w4a8_by_rows(const LinearW4A8Args& args) {
  return args.m < kMinRows ? linear_w4a8<Avx512Vnni>(args) : linear_w4a8<Amx>(args);
}

}  // namespace

const KernelTable& kernels_amx() {
  static constexpr KernelTable table = {"amx",
                                        linear_w8a8_by_rows,
                                        linear_w8a8_scratch_bytes<Amx>,
                                        linear_w4a8_by_rows,
                                        linear_w4a8_scratch_bytes<Amx>,
                                        quantize<Amx>,
                                        dequantize<Amx>,
                                        embedding<Amx>,
                                        activation<Amx>};
  return table;
}

}  // namespace qk
