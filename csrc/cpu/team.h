// How a team shares out the pieces of a product.
//
// Threads that do equal work seldom finish together: cores of a hybrid processor differ, two of them may share
// execution units, and a busy machine takes some away for a while. So each thread begins with a contiguous share, whose
// weights come as one stream, and takes piece by piece from its front; one that has run out takes pieces from the back
// of whoever has most left (work stealing, Blumofe and Leiserson 1999). Pieces get smaller towards the end of a share,
// but not so small that what a body does once for each of them, such as unpacking, would count.
//
// What is taken of a thread's share stands in a word of its own, [round | from the front | from the back]. Every call
// of each_piece is a round, the same ones in the same order on every thread, and a word of an earlier round means that
// nothing is taken yet: whoever comes first to a round needs no barrier. One of a later round means that all is taken,
// since nobody leaves a round of pieces before that.
#pragma once

#include "../layout.h"
#include "threads.h"

namespace qk {
namespace {

// A product as equal items in a row. unit: items that had better stay together (the row tiles of a superblock);
// macs: multiply-adds of an item; most: of a piece that is taken, a multiple of unit (a team that does not take turns
// has whole shares); least: no unit is divided into pieces of fewer.
struct Work {
  int64_t items, unit, macs, most, least;
};

class Team {
 public:
  static constexpr int kMostThreads = 256;  // larger teams keep the shares they begin with
  struct alignas(kAlign) Word {
    uint64_t taken;
  };

  Team() : Team(0, 1, nullptr) {}  // one thread alone
  Team(int thread, int size, Word* words) : thread_(thread), size_(size), words_(words) {}

  int thread() const { return thread_; }
  int size() const { return size_; }

  // body(piece, whether this thread goes on right behind it), until no item of the work is left.
  template <class Body>
  void each_piece(const Work& work, const Body& body) {
    ++round_;
    // Where a share is a few pieces, taking turns costs more than it evens out.
    const bool fixed = size_ == 1 || size_ > kMostThreads || work.items > kMostItems * size_ || round_ > kMostRounds ||
                       work.items * static_cast<double>(work.macs) < kPieces * kPieceMacs * size_;
    Piece piece{share(work.items, thread_, size_), false};
    for (bool any = fixed ? piece.items.size() > 0 : next(work, piece); any; any = !fixed && next(work, piece))
      body(piece.items, piece.more);
  }

 private:
  static constexpr int kCountBits = 20;
  static constexpr int64_t kMostItems = (1 << kCountBits) - 1, kMostRounds = (1 << 24) - 1;
  // A microsecond of work and more, beside which taking it costs next to nothing.
  static constexpr int64_t kPieceMacs = 2 << 20, kPieces = 4;

  struct Piece {
    Range items;
    bool more;
  };
  // Of a thread's share in this round.
  struct Taken {
    int64_t front, back;
    bool all;
  };

  Taken taken(uint64_t seen) const {
    const int64_t round = static_cast<int64_t>(seen >> (2 * kCountBits));
    if (round < round_) return {0, 0, false};
    const int64_t counts = static_cast<int64_t>(seen);
    return {counts >> kCountBits & kMostItems, counts & kMostItems, round > round_};
  }

  // What is left of a thread's share.
  Range left(const Work& work, int thread, const Taken& taken) const {
    const Range own = share(work.items, thread, size_);
    return taken.all ? Range{own.end, own.end} : Range{own.begin + taken.front, own.end - taken.back};
  }

  // The next piece for this thread: of its own share, or of another's.
  QK_NOINLINE bool next(const Work& work, Piece& piece) const {
    if (take(work, thread_, false, piece)) return true;
    for (int victim; (victim = richest(work)) >= 0;) {
      if (take(work, victim, true, piece)) return true;
    }
    return false;
  }

  // A piece of a thread's share, if anything is left there.
  bool take(const Work& work, int thread, bool from_back, Piece& piece) const {
    uint64_t* const word = &words_[thread].taken;
    uint64_t seen = __atomic_load_n(word, __ATOMIC_RELAXED);
    for (;;) {
      const Taken now = taken(seen);
      const Range items = left(work, thread, now);
      if (items.size() <= 0) return false;
      const int64_t size = piece_size(work, items, from_back);
      piece = from_back ? Piece{{items.end - size, items.end}, false}
                        : Piece{{items.begin, items.begin + size}, size < items.size()};
      const int64_t front = now.front + (from_back ? 0 : size), back = now.back + (from_back ? size : 0);
      const uint64_t then = static_cast<uint64_t>(round_ << (2 * kCountBits) | front << kCountBits | back);
      // Order does not matter: what pieces work on was complete before the round.
      if (__atomic_compare_exchange_n(word, &seen, then, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) return true;
    }
  }

  // Of a piece at one end of what is left: half of it, cut where a unit ends if it reaches there.
  static int64_t piece_size(const Work& work, Range left, bool from_back) {
    const int64_t enough = ceil_div(kPieceMacs, work.macs < 1 ? 1 : work.macs);
    const int64_t least = enough < work.least ? work.least : enough, half = ceil_div(left.size(), 2);
    // Items up to where the unit at that end ends.
    const int64_t unit = from_back ? (left.end - 1) % work.unit + 1 : work.unit - left.begin % work.unit;
    int64_t size = half < least ? least : half;
    if (size > unit + work.most - work.unit) size = unit + work.most - work.unit;
    if (size >= unit)
      size = unit + (size - unit) / work.unit * work.unit;
    else if (unit - size < least)
      size = unit;
    return size < left.size() ? size : left.size();
  }

  // The thread with most left, -1: nobody has anything.
  int richest(const Work& work) const {
    int best = -1;
    int64_t most = 0;
    for (int thread = 0; thread < size_; ++thread) {
      const int64_t size = left(work, thread, taken(__atomic_load_n(&words_[thread].taken, __ATOMIC_RELAXED))).size();
      if (size > most) most = size, best = thread;
    }
    return best;
  }

  int thread_, size_;
  Word* words_;
  int64_t round_ = 0;
};

// Runs body(team) on up to `threads` threads.
template <class Body>
void parallel_team(int threads, const Body& body) {
  Team::Word words[Team::kMostThreads];
  for (int i = 0; i < threads && i < Team::kMostThreads; ++i) words[i].taken = 0;
  parallel(threads, [&](int thread, int size) {
    Team team(thread, size, words);
    body(team);
  });
}

// Runs body(piece) on up to `threads` threads, until no item is left.
template <class Body>
void parallel_pieces(int threads, const Work& work, const Body& body) {
  parallel_team(threads, [&](Team& team) { team.each_piece(work, [&](Range piece, bool /*more*/) { body(piece); }); });
}

// Multiply-adds of `rows` rows and a superblock. Few rows wait for the weights, as if they were more.
inline int64_t superblock_macs(int64_t rows, int64_t k) { return (rows < 16 ? 16 : rows) * kBlockN * padded_k(k); }

// Items of so many elements each that are read, converted and written.
inline Work conversion(int64_t items, int64_t elements) {
  constexpr int64_t kMacsPerElement = 256;  // that take as long
  return {items, 1, elements * kMacsPerElement, items < 1 ? 1 : items, 1};
}

// team_for so many elements that are read, converted and written.
inline int threads_for(int64_t elements, int threads) { return team_for(elements, 16 << 10, threads); }

// A product's rows, in tiles, the blocks of tiles that stay in a cache, and how many rows are worth what a body does
// once for all of a superblock's that it is given.
struct RowTiles {
  int64_t rows, tiles, blocks, least_rows;
};
constexpr int64_t kPanelRows = 16;  // where that is a panel of weights, unpacked or copied

// The (superblock, row tile) pairs of a product in a row: block behind block, and in each of them superblock behind
// superblock. So a thread's share has few of the blocks. Were each block shared out by itself, all threads would read
// every row, and who writes the next rows there would have to take each line back from all of their caches.
class TilePairs {
 public:
  TilePairs(int64_t superblocks, const RowTiles& all)
      : superblocks_(superblocks), all_(all), width_(ceil_div(all.tiles, all.blocks)) {}

  // As work, of which a piece has `most` superblocks.
  Work work(int64_t k, int64_t most) const {
    return {superblocks_ * all_.tiles, width_, superblock_macs(all_.rows, k) / all_.tiles, most * width_,
            ceil_div(all_.least_rows * all_.tiles, all_.rows)};
  }

  // Those of one superblock and block from pair `begin` on, before `end`.
  struct Run {
    int64_t superblock;
    Range tiles;
    bool ends_superblock;
  };
  Run run(int64_t begin, int64_t end) const {
    const int64_t block = begin / (superblocks_ * width_) * width_, left = all_.tiles - block;
    const int64_t width = left < width_ ? left : width_, within = begin - superblocks_ * block;
    const int64_t superblock = within / width, first = within % width;
    const int64_t last = width - first < end - begin ? width : first + (end - begin);
    return {superblock, {block + first, block + last}, last == width};
  }

 private:
  const int64_t superblocks_;
  const RowTiles all_;
  const int64_t width_;  // tiles of a block; the last one has what is left
};

// Shares them out: body(superblock, row tiles, whether the next superblock of the block comes next).
template <class Body>
void for_tiles(Team& team, int64_t superblocks, int64_t k, const RowTiles& all, const Body& body) {
  const TilePairs pairs(superblocks, all);
  team.each_piece(pairs.work(k, 1), [&](Range mine, bool more) {
    for (int64_t u = mine.begin; u < mine.end;) {
      const TilePairs::Run run = pairs.run(u, mine.end);
      u += run.tiles.size();
      const bool ends_block = run.ends_superblock && run.superblock + 1 == superblocks;
      body(run.superblock, run.tiles, !ends_block && (u < mine.end || (more && run.ends_superblock)));
    }
  });
}

}  // namespace
}  // namespace qk
