// What a tile of products asks for while it multiplies: the weights that come next.
//
// A tile takes its weights from L2, where its first row of tiles would wait for each line to come from memory, and the
// later ones would leave memory idle. So each tile asks for its share of the superblock behind its own.
#pragma once

#include "../layout.h"

namespace qk {
namespace {

// In step k (4 k of 64 columns: four lines), `lines` lines at at + k * stride, apart bytes from one another, into L2.
struct Ahead {
  const int8_t* at = nullptr;
  int64_t stride = 0, apart = 0;
  int lines = 0;  // 0, 1, 2 or 4
};

constexpr int64_t kStepBytes = kBlockN * kPackK;

// The nth of `tiles` tiles of `steps` steps each, which ask for tiles' worth of bytes from `next` on together.
//
// A line that is asked for holds one of the core's few fill buffers (16) until it is there, if the prefetcher of L2 is
// not faster. That one follows a stream in each page by itself: the less there is to multiply, the more streams, each
// of which goes so much slower. Strides of less than a line ask for some lines twice, which costs less than a branch.
inline Ahead ahead_of(const int8_t* next, int64_t nth, int64_t tiles, int64_t steps) {
  const int lines = tiles < 4 ? 4 : tiles < 7 ? 2 : 1;
  const int64_t stride = kStepBytes / (lines * tiles), apart = stride * steps;
  return {next + nth * lines * apart, stride, apart, lines};
}

// A tile alone with its weights, which come from memory: a page ahead of itself in the same stream.
inline Ahead ahead_in_stream(const int8_t* b) { return {b + 4096, kStepBytes, kAlign, 4}; }

}  // namespace
}  // namespace qk
