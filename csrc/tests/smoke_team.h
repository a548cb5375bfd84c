// Checks of cpu/team.h: every item is done once whoever does it, and a thread that is held up is relieved of its share.
#pragma once

#include <atomic>
#include <chrono>
#include <thread>

#include "../cpu/team.h"
#include "smoke_tools.h"

namespace {

// Rounds of different works in a row, as a product has them; `held` threads of the team are late in every round.
void check_team(int threads, int held, bool large) {
  const std::string name = "team of " + std::to_string(threads) + ", " + std::to_string(held) + " held up";
  const qk::Work works[] = {{1000, 8, large ? 1 << 22 : 1 << 10, 8, 3},
                            {37, 16, 1 << 24, 16, 1},
                            {0, 4, 1 << 24, 4, 4},
                            {threads > 1 ? threads - 1 : 1, 1, 1 << 24, 1, 2},
                            {515, 5, 1 << 21, 20, 5}};
  constexpr int kRounds = 20;
  std::vector<std::atomic<int>> done(kRounds * 1000);
  std::atomic<int> too_long{0};
  qk::parallel_team(threads, [&](qk::Team& team) {
    for (int round = 0; round < kRounds; ++round) {
      const qk::Work& work = works[round % 5];
      if (team.thread() < held) std::this_thread::sleep_for(std::chrono::microseconds(200));
      team.each_piece(work, [&](qk::Range mine, bool more) {
        const bool crosses = mine.begin / work.unit * work.unit + work.most < mine.end;
        if (mine.size() < 1 || (large && team.size() > 1 && crosses) || (more && mine.end >= work.items)) ++too_long;
        for (int64_t i = mine.begin; i < mine.end; ++i) ++done[static_cast<size_t>(round * 1000 + i)];
      });
    }
  });
  for (int round = 0; round < kRounds; ++round) {
    for (int64_t i = 0; i < 1000; ++i, ++checks) {
      const int expected = i < works[round % 5].items ? 1 : 0;
      if (done[static_cast<size_t>(round * 1000 + i)] != expected) return fail(name + ": an item was not done once");
    }
  }
  if (too_long > 0) fail(name + ": a piece is empty, too long or not followed by another");
}

// Thread 0 stays in its first piece until the others have done all the rest.
void check_relief(int threads) {
  const qk::Work work = {320, 4, 1 << 22, 8, 1};
  std::atomic<int64_t> done{0};
  std::atomic<bool> relieved{true};
  qk::parallel_team(threads, [&](qk::Team& team) {
    if (team.size() == 1) return;  // built without OpenMP
    bool first = true;
    team.each_piece(work, [&](qk::Range mine, bool /*more*/) {
      const auto start = std::chrono::steady_clock::now();
      while (team.thread() == 0 && first && done < work.items - mine.size()) {
        if (std::chrono::steady_clock::now() - start > std::chrono::seconds(20)) {
          relieved = false;
          break;
        }
        std::this_thread::yield();
      }
      first = false;
      done += mine.size();
    });
  });
  ++checks;
  if (!relieved) fail("team: nobody took over from a thread that is held up");
}

// Every pair of a superblock and a row tile once; no body crosses a block, or is told of a next superblock behind the
// last one.
void check_tiles(int threads, int64_t superblocks, int64_t tiles, int64_t blocks) {
  const std::string name = "tiles of " + std::to_string(superblocks) + " superblocks, " + std::to_string(tiles) +
                           " tiles, " + std::to_string(blocks) + " blocks, " + std::to_string(threads) + " threads";
  const int64_t k = 1 << 16, width = qk::ceil_div(tiles, blocks);
  std::vector<std::atomic<int>> done(static_cast<size_t>(superblocks * tiles));
  std::atomic<int> wrong{0};
  qk::parallel_team(threads, [&](qk::Team& team) {
    qk::for_tiles(team, superblocks, k, {32 * tiles, tiles, blocks, 16},
                  [&](int64_t superblock, qk::Range range, bool more) {
                    const bool crosses = range.size() < 1 || range.begin / width != (range.end - 1) / width;
                    if (crosses || (more && superblock + 1 >= superblocks)) ++wrong;
                    for (int64_t t = range.begin; t < range.end; ++t)
                      ++done[static_cast<size_t>(superblock * tiles + t)];
                  });
  });
  for (const std::atomic<int>& times : done) {
    ++checks;
    if (times != 1) return fail(name + ": a pair was not done once");
  }
  if (wrong > 0) fail(name + ": a body crosses a block, or goes on behind the last superblock");
}

void check_teams() {
  for (int threads : {1, 2, 3, 8}) {
    for (int64_t superblocks : {1, 3, 64}) {
      for (int64_t tiles : {1, 5, 9, 16}) {
        for (int64_t blocks = 1; blocks <= 4 && blocks <= tiles; ++blocks)
          check_tiles(threads, superblocks, tiles, blocks);
      }
    }
  }
  for (int threads : {1, 2, 3, 8}) {
    for (int held = 0; held < 2; ++held) {
      check_team(threads, held, true);
      check_team(threads, held, false);
    }
    check_relief(threads);
  }
}

}  // namespace
