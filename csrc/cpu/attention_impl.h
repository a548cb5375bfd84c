// Attention on the CPU: softmax(scale * q k^T + mask) v of every head, without the [T, L] scores in memory.
//
//   for (batch, head of keys):                     scratch of a thread, floats:
//     for a part of the keys:                        keys    [panels][D][tile]     k^T times scale, tiles of 64 keys
//       pack k and v of the part                     values  [panels][keys][tile]  tiles of 64 features
//       for a block of up to 24 queries:             scores  [24][keys]
//         scores = q @ keys                          sums    [queries][D]
//         scores = exp(scores + mask - largest)
//         sums = sums * exp(before - largest) + scores @ values
//     y = sums / total
//
// This is the online softmax of Milakov and Gimelshein (2018) in the order of FlashAttention (Dao et al. 2022). Both
// products run on one register tile (tiles_attention.h). A part of the keys is as long as leaves its two packed pieces
// 32 KiB each: one of them is in L1 while all queries of a block walk over it, and both stay in L2 for the next block.
// Packing takes a few percent where some dozens of queries share a head of keys, and more than the products where one
// query does.
//
// Work is shared out by blocks of queries, whose results do not depend on who else is computed: any number of threads
// gives the same bits.
#pragma once

#include <cstdint>
#include <limits>

#include "../args.h"
#include "../layout.h"
#include "team.h"
#include "tiles_attention.h"

namespace qk {
namespace {

constexpr int64_t kBlockQueries = 24;  // a multiple of the rows of the larger tiles
constexpr int64_t kLeastBlocks = 4;  // that are worth packing the keys again
constexpr int64_t kSegmentBlocks = 16;  // that share a packed part: their sums stay in L2
constexpr int64_t kPartFloats = 8192;
constexpr int64_t kMostPartKeys = 256;  // 24 KiB of scores
constexpr int64_t kAttentionMacsPerThread = 128 << 10;  // about 2 us

template <class V>
struct AttentionSizes {
  static constexpr int64_t kTile = V::kTileVecs * V::kLanes;

  explicit AttentionSizes(int64_t size) : width(round_up(size, V::kLanes)) {
    const int64_t most = kPartFloats / width < kMostPartKeys ? kPartFloats / width : kMostPartKeys;
    part_keys = most < kTile ? kTile : most / kTile * kTile;
    score_step = part_keys + V::kLanes;  // rows on different cache sets
  }

  int64_t thread_floats() const {
    return part_keys * width * 2 + kBlockQueries * score_step + kSegmentBlocks * kBlockQueries * (width + 2) +
           kBlockQueries * (width + 2) + V::kLanes * width;
  }

  int64_t width;  // of a row of sums or values, padded
  int64_t part_keys;  // most keys of a part
  int64_t score_step;
};

template <class V>
int64_t attention_scratch_bytes(int64_t size, int threads) {
  return 4 * AttentionSizes<V>(size).thread_floats() * threads;
}

template <class V, DType D>
class Attention {
 public:
  explicit Attention(const AttentionArgs& args)
      : p_(args),
        sizes_(args.size),
        blocks_(ceil_div(args.queries, kBlockQueries)),
        key_vecs_(ceil_div(args.keys, V::kLanes)),
        parts_(static_cast<int>(ceil_div(key_vecs_ * V::kLanes, sizes_.part_keys))) {}

  void run() const {
    const int64_t units = p_.batch * p_.heads * blocks_, shared = p_.heads / p_.key_heads * blocks_;
    const int64_t work = 2 * p_.batch * p_.heads * p_.queries * p_.keys * p_.size;
    const int threads = team_for(work, kAttentionMacsPerThread, p_.threads);
    const Work pieces = {units, shared, 2 * p_.queries * p_.keys * p_.size / blocks_, shared, kLeastBlocks};
    parallel_team(threads, [&](Team& team) {
      Scratch scratch(reinterpret_cast<float*>(p_.scratch) + team.thread() * sizes_.thread_floats(), sizes_);
      team.each_piece(pieces, [&](Range mine, bool /*more*/) {
        for (int64_t u = mine.begin; u < mine.end;) {
          int64_t end = (u / shared + 1) * shared;  // of those that read the same keys
          if (end > mine.end) end = mine.end;
          if (end > u + kSegmentBlocks) end = u + kSegmentBlocks;
          segment({u, end}, scratch);
          u = end;
        }
      });
    });
  }

 private:
  using F = typename V::F;
  using Tiles = AttentionTiles<V>;
  using Ends = typename Tiles::Ends;
  static constexpr int64_t kTile = V::kTileVecs * V::kLanes;
  static constexpr float kInfinity = std::numeric_limits<float>::infinity();

  struct Scratch {
    Scratch(float* at, const AttentionSizes<V>& sizes)
        : keys(at),
          values(keys + sizes.part_keys * sizes.width),
          scores(values + sizes.part_keys * sizes.width),
          sums(scores + kBlockQueries * sizes.score_step),
          queries(sums + kSegmentBlocks * kBlockQueries * sizes.width),
          staged(queries + kBlockQueries * sizes.width),
          factor(staged + V::kLanes * sizes.width),
          scale(factor + kBlockQueries),
          largest(scale + kBlockQueries),
          total(largest + kSegmentBlocks * kBlockQueries) {}
    float *keys, *values, *scores, *sums;
    float* queries;  // of a block, widened, where they are not fp32
    float* staged;  // kLanes keys, widened and padded
    float *factor, *scale;  // [24] of the sums before, of the sums at the end
    float *largest, *total;  // of each query of a segment
  };

  // Queries [begin, end) of a head.
  struct Block {
    int64_t batch, head;
    Range rows;
  };
  Block block_of(int64_t unit) const {
    const int64_t head = unit / blocks_;
    return {head / p_.heads, head % p_.heads,
            share(p_.queries, static_cast<int>(unit % blocks_), static_cast<int>(blocks_))};
  }

  // Behind the last key that any of them may see.
  int64_t keys_end(const Block& block) const {
    return p_.causal && block.rows.end < p_.keys ? block.rows.end : p_.keys;
  }

  static int64_t at(const AttentionSteps& step, int64_t batch, int64_t head, int64_t token) {
    return batch * step.batch + head * step.head + token * step.token;
  }

  void segment(Range units, const Scratch& scratch) const {
    const Block first = block_of(units.begin);
    int64_t most = 0;
    for (int64_t u = units.begin; u < units.end; ++u)
      if (const int64_t end = keys_end(block_of(u)); end > most) most = end;
    const int64_t key_head = first.head / (p_.heads / p_.key_heads);
    for (int part = 0; part < parts_; ++part) {
      const Range vecs = share(key_vecs_, part, parts_);
      const Range keys = {vecs.begin * V::kLanes, vecs.end * V::kLanes < p_.keys ? vecs.end * V::kLanes : p_.keys};
      if (keys.begin >= most) break;
      pack_keys(at(p_.k_step, first.batch, key_head, 0), keys, scratch);
      pack_values(at(p_.v_step, first.batch, key_head, 0), keys, scratch);
      for (int64_t u = units.begin; u < units.end; ++u) {
        const Block block = block_of(u);
        if (keys.begin < keys_end(block)) attend(block, keys, (u - units.begin) * kBlockQueries, scratch);
      }
    }
  }

  // ---- packing -----------------------------------------------------------------------------------------------

  // Elements [at, at + size) of a tensor, widened; zeros up to a whole vector.
  void widen_row(const void* from, int64_t at, float* to) const {
    for (int64_t i = 0; i < p_.size; i += V::kLanes) V::store_f(to + i, load_lanes(from, at + i, p_.size - i));
  }
  static F load_lanes(const void* from, int64_t at, int64_t n) {
    return n < V::kLanes ? V::template load_part<D>(from, at, static_cast<int>(n)) : V::template load<D>(from, at);
  }

  void pack_keys(int64_t from, Range keys, const Scratch& scratch) const {
    const int64_t count = keys.size(), vecs = ceil_div(count, V::kLanes);
    const F scale = V::set(p_.scale);
    for (int64_t j = 0; j < vecs; ++j) {
      const int64_t panel = j / V::kTileVecs * V::kTileVecs;
      const int64_t step = (vecs - panel < V::kTileVecs ? vecs - panel : V::kTileVecs) * V::kLanes;
      float* to = scratch.keys + panel * V::kLanes * p_.size + (j - panel) * V::kLanes;
      const int64_t first = keys.begin + j * V::kLanes;
      const float* rows;
      int64_t row_step;
      if (D == DType::kF32 && p_.size % 4 == 0 && first + V::kLanes <= keys.end) {
        rows = static_cast<const float*>(p_.k) + from + first * p_.k_step.token;
        row_step = p_.k_step.token;
      } else {
        for (int64_t i = 0; i < V::kLanes; ++i) {
          float* row = scratch.staged + i * sizes_.width;
          if (first + i < keys.end)
            widen_row(p_.k, from + (first + i) * p_.k_step.token, row);
          else
            for (int64_t d = 0; d < sizes_.width; d += V::kLanes) V::store_f(row + d, V::set(0.0f));
        }
        rows = scratch.staged;
        row_step = sizes_.width;
      }
      for (int64_t d = 0; d < p_.size; d += 4) {
        F columns[4];
        V::columns4(rows + d, row_step, columns);
        for (int64_t i = 0; i < 4 && d + i < p_.size; ++i) V::store_f(to + (d + i) * step, V::mul(columns[i], scale));
      }
    }
  }

  void pack_values(int64_t from, Range keys, const Scratch& scratch) const {
    const int64_t count = keys.size();
    for (int64_t panel = 0; panel < sizes_.width; panel += kTile) {
      const int64_t width = sizes_.width - panel < kTile ? sizes_.width - panel : kTile;
      float* to = scratch.values + panel * count;
      int64_t row = from + keys.begin * p_.v_step.token + panel;
      for (int64_t i = 0; i < count; ++i, to += width, row += p_.v_step.token)
        for (int64_t d = 0; d < width; d += V::kLanes)
          V::store_f(to + d, load_lanes(p_.v, row + d, p_.size - panel - d));
    }
  }

  // ---- one block of queries over one part of the keys ------------------------------------------------------------

  void attend(const Block& block, Range keys, int64_t index, const Scratch& scratch) const {
    const int64_t count = keys.size(), rows = block.rows.size();
    const int64_t last = keys_end(block) - keys.begin, seen = last < count ? last : count;
    const int64_t vecs = ceil_div(seen, V::kLanes), packed_vecs = ceil_div(count, V::kLanes);
    const bool first = keys.begin == 0;
    int64_t step = p_.q_step.token;
    const float* q = queries_of(block, scratch, &step);
    for (int64_t panel = 0; panel < vecs; panel += V::kTileVecs) {
      const int64_t packed = packed_vecs - panel < V::kTileVecs ? packed_vecs - panel : V::kTileVecs;
      const int64_t used = vecs - panel < packed ? vecs - panel : packed;
      Tiles::product(rows, used, q, step, scratch.keys + panel * V::kLanes * p_.size, packed * V::kLanes, p_.size,
                     Ends{}, scratch.scores + panel * V::kLanes, sizes_.score_step);
    }
    switch (p_.mask_kind) {
      case MaskKind::kNone:
        weigh<MaskKind::kNone>(block, keys.begin, seen, first, index, scratch);
        break;
      case MaskKind::kBool:
        weigh<MaskKind::kBool>(block, keys.begin, seen, first, index, scratch);
        break;
      default:
        weigh<MaskKind::kAdded>(block, keys.begin, seen, first, index, scratch);
        break;
    }
    const bool ends = keys.end >= keys_end(block);
    if (ends)
      for (int64_t r = 0; r < rows; ++r) {
        const float total = scratch.total[index + r];
        scratch.scale[r] = total == 0.0f ? 0.0f : 1.0f / total;
      }
    // The last part gives the output, past the sums where they need no conversion.
    float *sums = scratch.sums + index * sizes_.width, *to = sums;
    int64_t to_step = sizes_.width;
    const int64_t y = ((block.batch * p_.queries + block.rows.begin) * p_.heads + block.head) * p_.size;
    const bool direct = ends && D == DType::kF32 && p_.size == sizes_.width;
    if (direct) {
      to = static_cast<float*>(p_.y) + y;
      to_step = p_.heads * p_.size;
    }
    for (int64_t panel = 0; panel < sizes_.width; panel += kTile) {
      const int64_t width = sizes_.width - panel < kTile ? sizes_.width - panel : kTile;
      Tiles::product(rows, width / V::kLanes, scratch.scores, sizes_.score_step, scratch.values + panel * count, width,
                     seen,
                     Ends{first ? nullptr : scratch.factor, sums + panel, sizes_.width, ends ? scratch.scale : nullptr},
                     to + panel, to_step);
    }
    if (ends && !direct) convert(sums, rows, y);
  }

  const float* queries_of(const Block& block, const Scratch& scratch, int64_t* step) const {
    const int64_t from = at(p_.q_step, block.batch, block.head, block.rows.begin);
    if (D == DType::kF32) return static_cast<const float*>(p_.q) + from;
    for (int64_t r = 0; r < block.rows.size(); ++r)
      widen_row(p_.q, from + r * p_.q_step.token, scratch.queries + r * sizes_.width);
    *step = sizes_.width;
    return scratch.queries;
  }

  // Scores to weights relative to the largest score so far, and what becomes of the sums before.
  template <MaskKind kMask>
  void weigh(const Block& block, int64_t first_key, int64_t seen, bool first, int64_t index,
             const Scratch& scratch) const {
    const int64_t vecs = ceil_div(seen, V::kLanes), rows = block.rows.size();
    float *largest = scratch.largest + index, *total = scratch.total + index;
    alignas(kAlign) float before[kBlockQueries];
    // Two loops over the rows: the processor looks ahead far enough for the next rows of either, not for both at once.
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = block.rows.begin + r, own = p_.causal ? row + 1 - first_key : seen;
      const int64_t mask = at(p_.mask_step, block.batch, block.head, row) + first_key;
      const int64_t visible = own < 0 ? 0 : own < seen ? own : seen;
      const F lanes = masked<kMask>(scratch.scores + r * sizes_.score_step, visible, vecs, mask);
      before[r] = first ? -kInfinity : largest[r];
      largest[r] = V::reduce_max(V::max(lanes, V::set(before[r])));
    }
    for (int64_t r = 0; r < rows; ++r) {
      float* scores = scratch.scores + r * sizes_.score_step;
      const F reference = V::set(largest[r] == -kInfinity ? 0.0f : largest[r]);  // no key was seen: no weight but zero
      F sum = V::set(0.0f);
      for (int64_t j = 0; j < vecs; ++j) {
        const F weight = Tiles::exp(V::sub(V::load_f(scores + j * V::kLanes), reference));
        V::store_f(scores + j * V::kLanes, weight);
        sum = V::add(sum, weight);
      }
      const float added = V::reduce_add(sum);
      if (first) {
        total[r] = added;
        continue;
      }
      alignas(kAlign) float factor[V::kLanes];
      V::store_f(factor, Tiles::exp(V::sub(V::set(before[r]), reference)));
      scratch.factor[r] = factor[0];
      total[r] = total[r] * factor[0] + added;
    }
  }

  // Adds the mask to a row of scores, and -inf to those of keys that are not visible; returns the largest of each lane.
  template <MaskKind kMask>
  F masked(float* scores, int64_t visible, int64_t vecs, int64_t mask) const {
    F largest = V::set(-kInfinity);
    const int64_t whole = visible / V::kLanes;
    for (int64_t j = 0; j < whole; ++j) {
      float* s = scores + j * V::kLanes;
      F score = V::load_f(s);
      if constexpr (kMask != MaskKind::kNone) {
        score = see<kMask>(score, mask + j * V::kLanes, V::kLanes);
        V::store_f(s, score);
      }
      largest = V::max(largest, score);
    }
    for (int64_t j = whole; j < vecs; ++j) {
      float* s = scores + j * V::kLanes;
      const int lanes = j == whole ? static_cast<int>(visible % V::kLanes) : 0;
      F score = V::load_f(s);
      if (kMask != MaskKind::kNone && lanes) score = see<kMask>(score, mask + j * V::kLanes, lanes);
      score = V::select_less(V::load_f(kLaneNumbers), V::set(static_cast<float>(lanes)), score, V::set(-kInfinity));
      V::store_f(s, score);
      largest = V::max(largest, score);
    }
    return largest;
  }

  // A score and elements [at, at + n) of the mask.
  template <MaskKind kMask>
  F see(F score, int64_t at, int n) const {
    if constexpr (kMask == MaskKind::kBool) {
      const uint8_t* bytes = static_cast<const uint8_t*>(p_.mask) + at;
      const F seen = V::to_f(n < V::kLanes ? V::load_u8_part(bytes, n) : V::load_u8(bytes));
      return V::select_less(V::set(0.0f), seen, score, V::set(-kInfinity));
    } else {
      return V::add(score, load_lanes(p_.mask, at, n));
    }
  }

  // Rows of sums to elements [y, y + size) of the output and so on.
  void convert(const float* sums, int64_t rows, int64_t y) const {
    for (int64_t r = 0; r < rows; ++r, sums += sizes_.width, y += p_.heads * p_.size) {
      for (int64_t d = 0; d < p_.size; d += V::kLanes) {
        if (p_.size - d < V::kLanes)
          V::template store_part<D>(p_.y, y + d, V::load_f(sums + d), static_cast<int>(p_.size - d));
        else
          V::template store<D>(p_.y, y + d, V::load_f(sums + d));
      }
    }
  }

  static constexpr float kLaneNumbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

  const AttentionArgs& p_;
  const AttentionSizes<V> sizes_;
  const int64_t blocks_, key_vecs_;
  const int parts_;
};

template <class V>
void attention(const AttentionArgs& args) {
  switch (args.dtype) {
    case DType::kF32:
      return Attention<V, DType::kF32>(args).run();
    case DType::kBF16:
      return Attention<V, DType::kBF16>(args).run();
    default:
      return Attention<V, DType::kF16>(args).run();
  }
}

}  // namespace
}  // namespace qk
