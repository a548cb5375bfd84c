// AMX: a step is four tdpbssd of full 16 x 64-byte tiles, 2 x 2 as in the kernel. The process must hold the permission
// for tile state already: the dispatcher of the kernels asks for it while it looks for usable tiers.
#include <immintrin.h>

#include <cstring>

#include "ceilings.h"

namespace qk {
namespace {

// The 64-byte operand of ldtilecfg: palette 1, eight tiles of 16 rows x 64 bytes.
struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes_per_row[16];
  uint8_t rows[16];
};

void int8_tiles(int64_t steps) {
  TileConfig config;
  std::memset(&config, 0, sizeof(config));
  config.palette = 1;
  for (int tile = 0; tile < 8; ++tile) {
    config.bytes_per_row[tile] = 64;
    config.rows[tile] = 16;
  }
  alignas(64) int8_t operands[4 * 1024];
  for (int i = 0; i < 4 * 1024; ++i) operands[i] = static_cast<int8_t>(i * 37 + 11);
  _tile_loadconfig(&config);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, operands, 64);
  _tile_loadd(5, operands + 1024, 64);
  _tile_loadd(6, operands + 2048, 64);
  _tile_loadd(7, operands + 3072, 64);
  for (int64_t i = 0; i < steps; ++i) {
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
    __asm__ volatile("" ::: "memory");
  }
  _tile_release();
}

}  // namespace

const LoopTable& loops_amx() {
  static constexpr LoopTable table{int8_tiles, 4 * 16 * 16 * 64 * 2, nullptr, 0, nullptr};
  return table;
}

}  // namespace qk
