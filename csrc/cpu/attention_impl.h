// Attention on the CPU: softmax(scale * q k^T + mask) v of every head, without the [T, L] scores in memory.
//
//   for (batch, head of keys):                     scratch of a thread:
//     for a part of the keys:
//       pack k and v of the part                     both, as the products need them
//       for a block of queries:
//         scores = q @ keys                          [queries of a block][keys of a part]
//         weights = exp(scores + mask - largest)
//         sums = sums * exp(before - largest) + weights @ values        [queries of a segment][D]
//     y = sums / total
//
// This is the online softmax of Milakov and Gimelshein (2018) in the order of FlashAttention (Dao et al. 2022). Both
// products, and what they read, are a class of its own: of vectors (attention_vectors.h) or of tiles
// (attention_tiles.h). Packing takes a few percent where some dozens of queries share a head of keys, and more than the
// products where one query does.
//
// Work is shared out by blocks of queries, whose results do not depend on who else is computed: any number of threads
// gives the same bits.
#pragma once

#include <cstdint>
#include <limits>

#include "../args.h"
#include "../layout.h"
#include "store_row.h"
#include "team.h"
#include "unroll.h"

namespace qk {
namespace {

constexpr int64_t kLeastBlocks = 4;  // that are worth packing the keys again
constexpr int64_t kSegmentBlocks = 16;  // that share a packed part: their sums stay in L2
constexpr int64_t kAttentionMacsPerThread = 128 << 10;  // about 2 us

// The verbs of a tier that attention adds to those of verbs_*.h:
//   fma(a, b, c)               a * b + c, rounded once
//   reduce_add(v)              sum of the lanes
//   broadcast(p)               one float in every lane
//   columns4(rows, step, out)  kLanes rows of four floats each, `step` apart, as four vectors
//   kTileVecs, tile_rows(n)    vectors of columns in the largest register tile; rows of a tile of n vectors

// exp(x) for x <= 0; zero below -126.5 ln(2), so that next to no weight is a subnormal number, whose products are slow.
// With n = round(x / ln(2)) in the low bits of x / ln(2) + 1.5 * 2^23, the rest is in [-1/2, 1/2], where a polynomial
// of degree 5 has a relative error of 1.6e-7 with its roundings. The bits of 2^n for n = -127 are those of zero, which
// is where -inf ends. NaN stays NaN: as the second operand of max, and as a factor, since adding n to the exponent's
// bits could make a number of it.
template <class V>
QK_INLINE inline typename V::F exp_of(typename V::F x) {
  using F = typename V::F;
  constexpr float kPowers[] = {0x1.5bba14p-10f, 0x1.3cea88p-7f, 0x1.c6b752p-5f, 0x1.ebf9bcp-3f, 0x1.62e42ap-1f, 1.0f};
  constexpr float kShift = 0x1.8p23f + 127.0f;  // the exponent's bias comes with it
  const F per_ln2 = V::set(0x1.715476p0f), shift = V::set(kShift);
  x = V::max(V::set(-88.0f), x);
  const F shifted = V::fma(x, per_ln2, shift);
  const F rest = V::fma(x, per_ln2, V::sub(shift, shifted));
  F power = V::set(kPowers[0]);
  unroll<5>([&](auto i) QK_INLINE { power = V::fma(power, rest, V::set(kPowers[i.value + 1])); });
  return V::mul(power, V::as_f(V::exponent(V::as_i(shifted))));
}

// Where a token of a head begins, in elements.
inline int64_t element_of(const AttentionSteps& step, int64_t batch, int64_t head, int64_t token) {
  return batch * step.batch + head * step.head + token * step.token;
}

// The lanes of a vector from element `at` of a tensor on, widened; zeros behind the n that are there.
template <class V, DType D>
typename V::F load_lanes(const void* from, int64_t at, int64_t n) {
  return n < V::kLanes ? V::template load_part<D>(from, at, static_cast<int>(n)) : V::template load<D>(from, at);
}

// Queries [begin, end) of a head.
struct QueryBlock {
  int64_t batch, head;
  Range rows;
};

// What rows of weights @ values are added to, and where they go: to the sums, or times scale to the output.
struct AttentionSums {
  const float* factor;  // of what the sums are; nullptr: there is nothing yet
  float* sums;
  int64_t step;  // floats between rows of sums
  const float* scale;  // nullptr: more keys follow
  int64_t y;  // element of the output where the first row begins
  int64_t y_step;
};

// Scratch bytes of a thread: a segment's and a block's, and those of the products.
template <class Products>
int64_t attention_thread_bytes(int64_t size) {
  const typename Products::Sizes sizes(size);
  const int64_t rows = kSegmentBlocks * Products::kQueries;
  return round_up(4 * (rows * (sizes.width + 2) + 2 * Products::kQueries), kAlign) + Products::bytes(sizes);
}

// Products provide:
//   kQueries, kWeightVecs       queries of a block at most; vectors of weights that are put down together
//   kScaled                     whether scores come times scale already
//   Sizes(size), bytes(sizes)   padded width of sums and most keys of a part, by D; their scratch
//   pack(batch, head, keys)     a part of the keys and values
//   scores(block, seen)         of a block and the first keys of the part, to row(r)
//   put_weights(at, weights)    in place of scores
//   sums(rows, seen, sums)      weights @ values
template <class V, DType D, class Products>
class Attention {
 public:
  explicit Attention(const AttentionArgs& args)
      : p_(args),
        sizes_(args.size),
        blocks_(ceil_div(args.queries, Products::kQueries)),
        key_vecs_(ceil_div(args.keys, V::kLanes)),
        parts_(static_cast<int>(ceil_div(key_vecs_ * V::kLanes, sizes_.part_keys))) {}

  void run() const {
    const int64_t units = p_.batch * p_.heads * blocks_, shared = p_.heads / p_.key_heads * blocks_;
    const int64_t work = 2 * p_.batch * p_.heads * p_.queries * p_.keys * p_.size;
    const int threads = team_for(work, kAttentionMacsPerThread, p_.threads);
    const Work pieces = {units, shared, 2 * p_.queries * p_.keys * p_.size / blocks_, shared, kLeastBlocks};
    parallel_team(threads, [&](Team& team) {
      Scratch scratch(p_, p_.scratch + team.thread() * attention_thread_bytes<Products>(p_.size), sizes_);
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
  static constexpr int64_t kQueries = Products::kQueries;
  static constexpr float kInfinity = std::numeric_limits<float>::infinity();

  struct Scratch {
    Scratch(const AttentionArgs& args, uint8_t* at, const typename Products::Sizes& sizes)
        : sums(reinterpret_cast<float*>(at)),
          factor(sums + kSegmentBlocks * kQueries * sizes.width),
          scale(factor + kQueries),
          largest(scale + kQueries),
          total(largest + kSegmentBlocks * kQueries),
          products(args, sizes, at + round_up(4 * (total + kSegmentBlocks * kQueries - sums), kAlign)) {}
    float* sums;
    float *factor, *scale;  // of each query of a block: of the sums before, of the sums at the end
    float *largest, *total;  // of each query of a segment
    Products products;
  };

  QueryBlock block_of(int64_t unit) const {
    const int64_t head = unit / blocks_;
    return {head / p_.heads, head % p_.heads,
            share(p_.queries, static_cast<int>(unit % blocks_), static_cast<int>(blocks_))};
  }

  // Behind the last key that any of them may see.
  int64_t keys_end(const QueryBlock& block) const {
    return p_.causal && block.rows.end < p_.keys ? block.rows.end : p_.keys;
  }

  // Units that read the same keys.
  void segment(Range units, Scratch& scratch) const {
    const QueryBlock first = block_of(units.begin);
    int64_t most = 0;
    for (int64_t u = units.begin; u < units.end; ++u)
      if (const int64_t end = keys_end(block_of(u)); end > most) most = end;
    const int64_t key_head = first.head / (p_.heads / p_.key_heads);
    for (int part = 0; part < parts_; ++part) {
      const Range vecs = share(key_vecs_, part, parts_);
      const Range keys = {vecs.begin * V::kLanes, vecs.end * V::kLanes < p_.keys ? vecs.end * V::kLanes : p_.keys};
      if (keys.begin >= most) break;
      scratch.products.pack(first.batch, key_head, keys);
      for (int64_t u = units.begin; u < units.end; ++u) {
        const QueryBlock block = block_of(u);
        if (keys.begin < keys_end(block)) attend(block, keys, (u - units.begin) * kQueries, scratch);
      }
    }
  }

  // One block of queries over one part of the keys.
  void attend(const QueryBlock& block, Range keys, int64_t index, Scratch& scratch) const {
    const int64_t last = keys_end(block) - keys.begin, seen = last < keys.size() ? last : keys.size();
    const bool first = keys.begin == 0, ends = last <= keys.size();
    scratch.products.scores(block, seen);
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
    if (ends)
      for (int64_t r = 0; r < block.rows.size(); ++r) {
        const float total = scratch.total[index + r];
        scratch.scale[r] = total == 0.0f ? 0.0f : 1.0f / total;
      }
    scratch.products.sums(
        block.rows.size(), seen,
        {first ? nullptr : scratch.factor, scratch.sums + index * sizes_.width, sizes_.width,
         ends ? scratch.scale : nullptr,
         ((block.batch * p_.queries + block.rows.begin) * p_.heads + block.head) * p_.size, p_.heads * p_.size});
  }

  // Scores to weights relative to the largest score so far, and what becomes of the sums before.
  template <MaskKind kMask>
  void weigh(const QueryBlock& block, int64_t first_key, int64_t seen, bool first, int64_t index,
             Scratch& scratch) const {
    constexpr int kVecs = Products::kWeightVecs;
    const int64_t vecs = round_up(ceil_div(seen, V::kLanes), kVecs), rows = block.rows.size();
    float *largest = scratch.largest + index, *total = scratch.total + index;
    alignas(kAlign) float before[kQueries];
    // Two loops over the rows: the processor looks ahead far enough for the next rows of either, not for both at once.
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = block.rows.begin + r, own = p_.causal ? row + 1 - first_key : seen;
      const int64_t mask = element_of(p_.mask_step, block.batch, block.head, row) + first_key;
      const int64_t visible = own < 0 ? 0 : own < seen ? own : seen;
      const F lanes = masked<kMask>(scratch.products.row(r), visible, vecs, mask);
      before[r] = first ? -kInfinity : largest[r];
      largest[r] = V::reduce_max(V::max(lanes, V::set(before[r])));
    }
    for (int64_t r = 0; r < rows; ++r) {
      float* scores = scratch.products.row(r);
      const F reference = V::set(largest[r] == -kInfinity ? 0.0f : largest[r]);  // no key was seen: no weight but zero
      F sum = V::set(0.0f);
      for (int64_t j = 0; j < vecs; j += kVecs) {
        F weights[kVecs];
        unroll<kVecs>([&](auto i) QK_INLINE {
          weights[i.value] = exp_of<V>(V::sub(V::load_f(scores + (j + i.value) * V::kLanes), reference));
          sum = V::add(sum, weights[i.value]);
        });
        Products::put_weights(scores + j * V::kLanes, weights);
      }
      const float added = V::reduce_add(sum);
      if (first) {
        total[r] = added;
        continue;
      }
      alignas(kAlign) float factor[V::kLanes];
      V::store_f(factor, exp_of<V>(V::sub(V::set(before[r]), reference)));
      scratch.factor[r] = factor[0];
      total[r] = total[r] * factor[0] + added;
    }
  }

  // Adds the mask to a row of scores, times scale where keys were not packed so, and -inf to those of keys that are not
  // visible; returns the largest of each lane.
  template <MaskKind kMask>
  F masked(float* scores, int64_t visible, int64_t vecs, int64_t mask) const {
    const F scale = V::set(p_.scale);
    F largest = V::set(-kInfinity);
    const int64_t whole = visible / V::kLanes;
    for (int64_t j = 0; j < whole; ++j) {
      float* s = scores + j * V::kLanes;
      F score = V::load_f(s);
      if constexpr (!Products::kScaled) score = V::mul(score, scale);
      if constexpr (kMask != MaskKind::kNone) score = see<kMask>(score, mask + j * V::kLanes, V::kLanes);
      if constexpr (kMask != MaskKind::kNone || !Products::kScaled) V::store_f(s, score);
      largest = V::max(largest, score);
    }
    for (int64_t j = whole; j < vecs; ++j) {
      float* s = scores + j * V::kLanes;
      const int lanes = j == whole ? static_cast<int>(visible % V::kLanes) : 0;
      F score = V::load_f(s);
      if constexpr (!Products::kScaled) score = V::mul(score, scale);
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
      return V::add(score, load_lanes<V, D>(p_.mask, at, n));
    }
  }

  static constexpr float kLaneNumbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

  const AttentionArgs& p_;
  const typename Products::Sizes sizes_;
  const int64_t blocks_, key_vecs_;
  const int parts_;
};

}  // namespace
}  // namespace qk
