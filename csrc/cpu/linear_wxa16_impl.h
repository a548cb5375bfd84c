// Weight-only Linear, W8A16 and W4A16: y [M, N] = x [M, K] @ w [N, K]^T + bias, then a function, with w = scale * (q -
// zero_point) and so on (LinearWxA16Args in args.h), x in fp32, bf16 or fp16.
//
// Sums are fp32, multiply-adds fused. No operand is narrowed: fp16 is widened, integers of 8 or 4 bits are exact in
// fp32 and in bf16, and the bf16 dot product only ever meets bf16 activations. K is never split between threads and the
// order of the additions depends on M, K, group and tier alone, so results repeat to the bit with any number of
// threads.
//
// A tier V provides, over the verbs of verbs_*.h:
//   kUnitK                      consecutive k in one 32-bit lane of an activation: 1 (fp32) or 2 (a bf16 pair)
//   kTileM, kTileN              rows and columns of the register tile; kTileN divides the 64 of a superblock
//   kStreamRows                 rows that a decoded register of weights serves
//   kStreams                    whether it has stream
//   stream_max<W>()             rows up to which decoding anew for each kStreamRows of them beats a panel, measured
//   kScaledPanel                whether a decoded panel holds weights (fp32), or integers, scaled later (bf16)
//   kTables                     whether decoding looks 4-bit values up in a table anyway: a codebook costs nothing
//   copy_row<D, W>(...)         a row of x as units of kUnitK; for streams, times what stream_bias says
//   stream_bias<W>()            what streams see too much in a weight: W8 as q + bias, W4 as q - 8 + bias
//   make_table<W>(codebook)     operand of the decoders
//   stream<W>(rows, ...)        c [rows, 64] += (x @ q^T) * scale + sums * offset, over the lines of a piece of K
//   panel<W>(...)               decodes one piece of K for the tiles
//   tile(rows, ...)             c [rows, kTileN] += (x @ panel) [* scale + sums * offset], or = where a sum begins
//
// M <= stream_max decodes weights in registers and never stores them, one sequential stream for each thread:
//
//   superblock of 64 columns: piece of K (one group, or 256 k): row tile: column part: line of the packed weight
//
// Larger M decodes each slice of a superblock once for many rows:
//
//   chunk of rows (their copies <= kCopyBytes): block of row tiles: kGroup superblocks (their sums stay in L2)
//     slice of K (the rows' part stays in L2): superblock: column tile (its part of the panel stays in L1) x row tile
//
// The (superblock, row tile) pairs of a block are shared out (team.h). Within a group, 4-bit values count as q - 8;
// what is left of a zero point or minimum is an offset per group and column, times the sum of that group's activations.
// An infinite activation may therefore give NaN where separate products would give an infinity. Sums are scaled late,
// so they overflow from |x| = 2^128 / (255 K) on. Streams may keep activations times 2^-12: exact down to 2^-114.
#pragma once

#include <cstring>

#include "../args.h"
#include "../layout.h"
#include "activation.h"
#include "team.h"
#include "weights_wxa16.h"

namespace qk {
namespace {

constexpr int64_t kCopyBytes = 16 << 20;  // activations copied at a time
constexpr int64_t kBlockRows = 288;  // rows that share one decoded panel: 72 KiB of sums
constexpr int kGroup = 4;  // superblocks that a slice of the rows serves before the next one: 640 KiB with all of them
constexpr int64_t kSliceDepth = 256;  // k of a panel: 64 KiB in fp32
constexpr int64_t kUnitPad = 16;  // units; keeps rows of a power-of-two K from falling on one cache set
constexpr int64_t kMacsPerThread = 64 << 10;  // below this, another thread costs more than it saves
constexpr int64_t kMaxSegments = kSliceDepth / 8 + 1;
constexpr int64_t kRedundantRows =
    4;  // up to this many, each thread copies the rows for itself and no barrier is needed

// Per row: K units (or half as many), then the sums of the activations of groups, or of slices where those are shorter.
inline int64_t row_units(int64_t k, int64_t group) {
  return padded_k(k) + kUnitPad + round_up(ceil_div(k, group < kSliceDepth ? group : kSliceDepth), kUnitPad);
}

inline int64_t copied_rows(int64_t m, int64_t k, int64_t group) {
  int64_t rows = kCopyBytes / (4 * row_units(k, group)) / 12 * 12;
  rows = rows < 96 ? 96 : rows;
  return m < rows ? m : rows;
}

inline int64_t thread_floats(int64_t m) { return (kSliceDepth + kGroup * (m < kBlockRows ? m : kBlockRows)) * kBlockN; }

inline int64_t linear_wxa16_scratch_bytes(int64_t m, int64_t k, int64_t group, int threads) {
  const int64_t copies = m <= kRedundantRows ? threads : 1;
  return 4 * (copies * copied_rows(m, k, group) * row_units(k, group) + threads * thread_floats(m));
}

template <class V, class W>
class LinearWxA16 {
 public:
  explicit LinearWxA16(const LinearWxA16Args& args)
      : p_(args),
        group_(W::kBits == 8              ? kSliceDepth
               : args.group_size < args.k ? args.group_size
               : args.k < 1               ? 1
                                          : args.k),
        groups_(ceil_div(args.k, group_)),
        stride_(row_units(args.k, group_)),
        streams_(args.m <= V::template stream_max<W>()),
        bias_(streams_ ? V::template stream_bias<W>() : 0.0f),
        has_offset_(args.weight_zero_point || args.weight_min || bias_ != 0.0f),
        table_(V::template make_table<W>(args.codebook)) {}

  void run() const {
    if (p_.m == 0 || p_.n == 0) return;
    const int threads = team_for(p_.m * round_up(p_.n, kBlockN) * padded_k(p_.k), kMacsPerThread, p_.threads);
    const int64_t chunk = copied_rows(p_.m, p_.k, group_);
    const bool redundant = p_.m <= kRedundantRows;
    uint32_t* const copies = reinterpret_cast<uint32_t*>(p_.scratch);
    float* const work_areas = reinterpret_cast<float*>(copies + (redundant ? threads : 1) * chunk * stride_);
    parallel_team(threads, [&](Team& team) {
      uint32_t* x = copies + (redundant ? team.thread() * chunk * stride_ : 0);
      float* area = work_areas + team.thread() * thread_floats(p_.m);
      for (int64_t row = 0; row < p_.m; row += chunk) {
        const int64_t rows = p_.m - row < chunk ? p_.m - row : chunk;
        if (redundant) {
          copy_rows(row, {0, rows}, x);
        } else {
          team.each_piece(conversion(rows, p_.k), [&](Range mine, bool /*more*/) { copy_rows(row, mine, x); });
          barrier(team.size());
        }
        if (streams_)
          stream_product(rows, x, area, team);
        else
          product(row, rows, x, area, team);
        if (row + chunk < p_.m) barrier(team.size());  // the next chunk overwrites x
      }
    });
  }

 private:
  static constexpr int64_t kLineK = W::kBits == 4 ? 8 : 4;  // k of a 256-byte line
  static constexpr int64_t kLineBytes = kBlockN * 4;
  static constexpr int64_t kLineUnits = kLineK / V::kUnitK;

  // Rows of a range of tiles: tiles differ by one row at most.
  static Range rows_of(Range range, int64_t rows, int64_t tiles) {
    return {range.begin * rows / tiles, range.end * rows / tiles};
  }

  const uint8_t* line(int64_t nb, int64_t k) const {
    return p_.packed + (nb * (padded_k(p_.k) / kLineK) + k / kLineK) * kLineBytes;
  }

  // ---- activations -------------------------------------------------------------------------------------------

  void copy_rows(int64_t row, Range range, uint32_t* x) const {
    for (int64_t r = range.begin; r < range.end; ++r) {
      uint32_t* units = x + r * stride_;
      const int64_t from = (row + r) * p_.x_stride;
      switch (p_.x_dtype) {
        case DType::kF32:
          copy_row<DType::kF32>(static_cast<const float*>(p_.x) + from, units);
          break;
        case DType::kBF16:
          copy_row<DType::kBF16>(static_cast<const uint16_t*>(p_.x) + from, units);
          break;
        default:
          copy_row<DType::kF16>(static_cast<const uint16_t*>(p_.x) + from, units);
          break;
      }
    }
  }

  template <DType D>
  void copy_row(const void* x, uint32_t* units) const {
    // Padding becomes zero units, so the weights there do not matter.
    V::template copy_row<D, W>(x, p_.inv_smooth, p_.k, streams_, units);
    if (!has_offset_) return;
    float* sums = group_sums(units);
    for (int64_t g = 0; g < groups_; ++g) {
      const int64_t end = (g + 1) * group_ < p_.k ? (g + 1) * group_ : p_.k;
      auto sum = V::set(0.0f);
      for (int64_t k = g * group_; k < end; k += V::kLanes) {
        const int n = static_cast<int>(end - k < V::kLanes ? end - k : V::kLanes);
        auto v = n == V::kLanes ? V::template load<D>(x, k) : V::template load_part<D>(x, k, n);
        if (p_.inv_smooth) v = V::mul(v, V::load_f_part(p_.inv_smooth + k, n));
        sum = V::add(sum, v);
      }
      sums[g] = V::reduce_add(sum);
    }
  }

  float* group_sums(uint32_t* units) const { return reinterpret_cast<float*>(units + padded_k(p_.k) + kUnitPad); }
  const float* group_sums(const uint32_t* units) const {
    return reinterpret_cast<const float*>(units + padded_k(p_.k) + kUnitPad);
  }

  // ---- scales ------------------------------------------------------------------------------------------------

  // scale and offset of the 64 columns for one group, so that w = (q - 8 + bias) * scale + offset.
  void group_params(int64_t nb, int64_t g, float* scale, float* offset) const {
    const int64_t at = (nb * groups_ + g) * kBlockN;
    if (p_.scale_type == ScaleType::kF32)
      group_params<DType::kF32>(at, scale, offset);
    else
      group_params<DType::kF16>(at, scale, offset);
  }

  template <DType D>
  void group_params(int64_t at, float* scale, float* offset) const {
    const auto zero = V::set_i(8 - static_cast<int32_t>(bias_));
    for (int i = 0; i < kBlockN; i += V::kLanes) {
      const auto s = V::template load<D>(p_.weight_scale, at + i);
      V::store_f(scale + i, s);
      if (p_.weight_zero_point)
        V::store_f(offset + i, V::mul(s, V::to_f(V::sub_i(zero, V::load_u8(p_.weight_zero_point + at + i)))));
      else if (p_.weight_min)
        V::store_f(offset + i, V::add(V::template load<D>(p_.weight_min, at + i), V::mul(s, V::to_f(zero))));
      else if (bias_ != 0.0f)
        V::store_f(offset + i, V::mul(s, V::set(-bias_)));
    }
  }

  // ---- few rows ----------------------------------------------------------------------------------------------

  void stream_product(int64_t rows, const uint32_t* x, float* area, Team& team) const {
    if constexpr (V::kStreams) {
      const int64_t tiles = ceil_div(rows, V::kStreamRows);
      for_tiles(team, ceil_div(p_.n, kBlockN), p_.k, {rows, tiles, 1, 1},
                [&](int64_t nb, Range range, bool /*more*/) { stream_superblock(nb, rows, tiles, range, x, area); });
    }
  }

  void stream_superblock(int64_t nb, int64_t rows, int64_t tiles, Range range, const uint32_t* x, float* c) const {
    if constexpr (V::kStreams) {
      alignas(kAlign) float scale[kBlockN], offset[kBlockN];
      const Range mine = rows_of(range, rows, tiles);
      std::memset(c, 0, static_cast<size_t>(mine.size() * kBlockN) * sizeof(float));
      for (int i = 0; i < kBlockN; ++i) offset[i] = -bias_;
      for (int64_t g = 0; g < groups_; ++g) {
        const int64_t k = g * group_, end = k + group_ < p_.k ? k + group_ : p_.k;
        if (W::kBits == 4) group_params(nb, g, scale, offset);
        for (int64_t t = range.begin; t < range.end; ++t) {
          const Range r = rows_of({t, t + 1}, rows, tiles);
          const uint32_t* from = x + r.begin * stride_;
          V::template stream<W>(static_cast<int>(r.size()), from + k / V::kUnitK, stride_, line(nb, k),
                                ceil_div(end - k, kLineK), table_, c + (r.begin - mine.begin) * kBlockN,
                                Scaling{W::kBits == 4 ? scale : nullptr, has_offset_ ? offset : nullptr,
                                        has_offset_ ? group_sums(from) + g : nullptr, stride_});
        }
      }
      prefetch(0, mine, nb);
      epilogue(0, mine, nb, c);
    }
  }

  // ---- many rows ---------------------------------------------------------------------------------------------

  void product(int64_t row, int64_t rows, const uint32_t* x, float* area, Team& team) const {
    const int64_t tiles = ceil_div(rows, V::kTileM), superblocks = ceil_div(p_.n, kBlockN);
    const int64_t blocks = ceil_div(tiles, kBlockRows / V::kTileM);
    // Block by block, so that a thread has the same superblocks in each: their weights stay in its L2, which is worth
    // more here (1.05 at 512 rows of 4096 x 4096 and 16 threads) than few readers of the rows.
    for (int64_t b = 0; b < blocks; ++b) {
      const Range block = share(tiles, static_cast<int>(b), static_cast<int>(blocks));
      const TilePairs pairs(superblocks, {rows_of(block, rows, tiles).size(), block.size(), 1, kPanelRows});
      team.each_piece(pairs.work(p_.k, kGroup), [&](Range mine, bool /*more*/) {
        for (int64_t u = mine.begin; u < mine.end;) {
          Piece pieces[kGroup];
          int count = 0;
          float* c = area + kSliceDepth * kBlockN;
          for (; count < kGroup && u < mine.end; ++count) {
            const TilePairs::Run run = pairs.run(u, mine.end);
            const Range of = {block.begin + run.tiles.begin, block.begin + run.tiles.end};
            pieces[count] = {run.superblock, of, c};
            c += rows_of(of, rows, tiles).size() * kBlockN;
            u += of.size();
          }
          multiply(pieces, count, row, rows, tiles, x, area);
        }
      });
    }
  }

  // Tiles of rows of a superblock, and where their sums are.
  struct Piece {
    int64_t nb;
    Range tiles;
    float* c;
  };

  // A piece of a slice that lies in one group.
  struct Segment {
    int64_t unit, units, group;
    bool ends_group;
  };

  // Slice by slice of K, so that the rows' part of one is in L2 for all superblocks but the first.
  void multiply(const Piece* pieces, int count, int64_t row, int64_t rows, int64_t tiles, const uint32_t* x,
                float* panel) const {
    for (int64_t k0 = 0; k0 < p_.k; k0 += kSliceDepth) {
      for (int i = 0; i < count; ++i) slice(pieces[i], k0, row, rows, tiles, x, panel);
    }
    for (int i = 0; p_.k == 0 && i < count; ++i) {
      const Range mine = rows_of(pieces[i].tiles, rows, tiles);
      std::memset(pieces[i].c, 0, static_cast<size_t>(mine.size() * kBlockN) * sizeof(float));
      epilogue(row, mine, pieces[i].nb, pieces[i].c);
    }
  }

  // A tile goes through the epilogue behind its last slice: stores wait for lines of y while the next one multiplies.
  void slice(const Piece& piece, int64_t k0, int64_t row, int64_t rows, int64_t tiles, const uint32_t* x,
             float* panel) const {
    const int64_t nb = piece.nb, first_row = rows_of(piece.tiles, rows, tiles).begin;
    const int64_t columns =
        p_.n - nb * kBlockN < kBlockN ? p_.n - nb * kBlockN : kBlockN;  // tiles of padding are left out
    alignas(kAlign) float scale[kMaxSegments][kBlockN], offset[kMaxSegments][kBlockN];
    Segment segments[kMaxSegments];
    const int64_t k1 = k0 + kSliceDepth < p_.k ? k0 + kSliceDepth : p_.k;
    const int64_t units = round_up(k1 - k0, kLineK) / V::kUnitK;
    int count = 0;
    for (int64_t k = k0; k < k1; ++count) {
      const int64_t g = k / group_, next = (g + 1) * group_ < p_.k ? (g + 1) * group_ : p_.k,
                    end = next < k1 ? next : k1;
      Segment& s = segments[count];
      s = {(k - k0) / V::kUnitK, round_up(end - k, kLineK) / V::kUnitK, g, end == next};
      if (W::kBits == 4) group_params(nb, g, scale[count], offset[count]);
      V::template panel<W>(line(nb, k), s.units / kLineUnits, table_, scale[count],
                           has_offset_ ? offset[count] : nullptr, panel + s.unit * V::kTileN, units * V::kTileN);
      k = end;
    }
    if (V::kScaledPanel || W::kBits == 8) {
      segments[0] = {0, units, 0, false};
      count = 1;
    }
    const bool scaled = !V::kScaledPanel && W::kBits == 4;
    for (int64_t j = 0; j < columns; j += V::kTileN) {
      const float* column_panel = panel + j * units;
      for (int64_t t = piece.tiles.begin; t < piece.tiles.end; ++t) {
        const Range r = rows_of({t, t + 1}, rows, tiles);
        const uint32_t* a = x + r.begin * stride_ + k0 / V::kUnitK;
        float* c = piece.c + (r.begin - first_row) * kBlockN;
        const bool ends = k1 == p_.k && j + V::kTileN >= columns;
        if (ends) prefetch(row, r, nb);
        for (int i = 0; i < count; ++i) {
          const Segment& s = segments[i];
          const bool offsets = scaled && has_offset_ && s.ends_group;
          V::tile(static_cast<int>(r.size()), a + s.unit, stride_, column_panel + s.unit * V::kTileN, s.units, c + j,
                  Scaling{scaled ? scale[i] + j : nullptr, offsets ? offset[i] + j : nullptr,
                          offsets ? group_sums(x + r.begin * stride_) + s.group : nullptr, stride_, k0 == 0 && i == 0});
        }
        if (ends) epilogue(row, r, nb, c);
      }
    }
  }

  // ---- epilogue ----------------------------------------------------------------------------------------------

  // What epilogue adds.
  void prefetch(int64_t row, Range rows, int64_t nb) const {
    prefetch_residual(p_.residual, p_.y_dtype, row + rows.begin, rows.size(), nb * kBlockN, kBlockN);
  }

  void epilogue(int64_t row, Range rows, int64_t nb, const float* c) const {
    switch (p_.y_dtype) {
      case DType::kF32:
        return epilogue_as<DType::kF32>(row, rows, nb, c);
      case DType::kBF16:
        return epilogue_as<DType::kBF16>(row, rows, nb, c);
      default:
        return epilogue_as<DType::kF16>(row, rows, nb, c);
    }
  }

  template <DType D>
  void epilogue_as(int64_t row, Range rows, int64_t nb, const float* c) const {
    constexpr int kW = V::kLanes;
    const int64_t n0 = nb * kBlockN;
    const int width = static_cast<int>(p_.n - n0 < kBlockN ? p_.n - n0 : kBlockN);
    for (int64_t r = rows.begin; r < rows.end; ++r, c += kBlockN) {
      const int64_t y = (row + r) * p_.y_stride + n0, residual = (row + r) * p_.residual.stride + n0;
      for (int i = 0; i < width; i += kW) {
        const int lanes = width - i < kW ? width - i : kW;
        auto v = V::load_f(c + i);
        if (W::kBits == 8) v = V::mul(v, V::load_f_part(static_cast<const float*>(p_.weight_scale) + n0 + i, lanes));
        if (p_.bias) v = V::add(v, V::load_f_part(p_.bias + n0 + i, lanes));
        if (p_.function != Activation::kNone) v = Activations<V>::apply(p_.function, v);
        if (p_.residual.rows) v = plus_residual<V, D>(p_.residual, residual + i, lanes, v);
        if (lanes == kW)
          V::template store<D>(p_.y, y + i, v);
        else
          V::template store_part<D>(p_.y, y + i, v, lanes);
      }
    }
  }

  const LinearWxA16Args& p_;
  const int64_t group_, groups_, stride_;
  const bool streams_;
  const float bias_;
  const bool has_offset_;
  const typename V::Table table_;
};

template <class V>
void linear_w8a16(const LinearWxA16Args& args) {
  LinearWxA16<V, W8>(args).run();
}

template <class V>
void linear_w4a16(const LinearWxA16Args& args) {
  if (args.codebook && !V::kTables) return LinearWxA16<V, W4Codebook>(args).run();
  LinearWxA16<V, W4>(args).run();
}

}  // namespace
}  // namespace qk
