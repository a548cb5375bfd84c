// What a tile of products asks for while it multiplies: the weights that come next.
//
// A tile takes its weights from L2, where its first row of tiles would wait for each line to come from memory, and the
// later ones would leave memory idle. So each tile asks for its share of what lies behind the bytes it reads.
#pragma once

#include <type_traits>

#include "../layout.h"

namespace qk {
namespace {

// Weights of more bytes are taken to come from memory; with fewer, which a cache may hold, few rows lose more by asking
// ahead than they can gain.
constexpr int64_t kUncachedBytes = 8 << 20;

// In each step, `lines` lines from at + step * stride on, apart bytes from one another, into L2.
struct Ahead {
  const uint8_t* at = nullptr;
  int64_t stride = 0, apart = 0;
  int lines = 0;  // 0, 1, 2 or 4
};

// What a tile does in a step.
template <int kLines>
QK_INLINE inline void ask(const Ahead& ahead, int64_t step) {
  for (int i = 0; i < kLines; ++i) __builtin_prefetch(ahead.at + step * ahead.stride + i * ahead.apart, 0, 2);
}

// call(lines), a constant.
template <class Call>
void with_lines(const Ahead& ahead, const Call& call) {
  switch (ahead.lines) {
    case 0:
      return call(std::integral_constant<int, 0>{});
    case 1:
      return call(std::integral_constant<int, 1>{});
    case 2:
      return call(std::integral_constant<int, 2>{});
    default:
      return call(std::integral_constant<int, 4>{});
  }
}

// call(rows, lines), constants: those of a tile, at most kMost, and what it asks for in a step.
template <int kMost, class Call>
void with_constants(int rows, const Ahead& ahead, const Call& call) {
  if constexpr (kMost > 1) {
    if (rows < kMost) return with_constants<kMost - 1>(rows, ahead, call);
  }
  with_lines(ahead, [&](auto lines) { call(std::integral_constant<int, kMost>{}, lines); });
}

// Shares `bytes` bytes behind the weights that `tiles` tiles read together among their steps. A step of one tile reads
// step_bytes.
//
// A line that is asked for holds one of the core's few fill buffers (16) until it is there, if the prefetcher of L2 is
// not faster. That one follows a stream in each page by itself: the less there is to multiply, the more streams, each
// of which goes so much slower. Strides of less than a line ask for some lines twice, which costs less than a branch.
class LookAhead {
 public:
  LookAhead(const void* next, int64_t bytes, int64_t tiles, int64_t step_bytes)
      : next_(static_cast<const uint8_t*>(next)),
        lines_(tiles < 4   ? 4
               : tiles < 7 ? 2
                           : 1),
        apart_(bytes / lines_),
        share_((step_bytes << kShareBits) / (lines_ * tiles)),
        stride_(ceil_div(step_bytes, lines_ * tiles)) {}

  // For the nth of the tiles, `steps` steps over weights that begin `done` bytes behind the first ones.
  Ahead of(int64_t done, int64_t nth, int64_t steps) const {
    return {next_ + done / lines_ + (nth * steps * share_ >> kShareBits), stride_, apart_, lines_};
  }

 private:
  static constexpr int kShareBits = 16;  // a step's share in whole bytes would leave out up to half of them all
  const uint8_t* next_;
  int lines_;
  int64_t apart_, share_, stride_;
};

// A tile alone with its weights, which come from memory: a page ahead of itself in the same stream.
inline Ahead ahead_in_stream(const void* weights) {
  return {static_cast<const uint8_t*>(weights) + 4096, kBlockN * kPackK, kAlign, 4};
}

}  // namespace
}  // namespace qk
