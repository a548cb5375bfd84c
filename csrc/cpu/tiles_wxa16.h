// Register kernels of the weight-only Linear for tiers with vectors; linear_wxa16_impl.h says what each is for.
//
// A tier's verbs T add to verbs_*.h:
//   Raw, load_raw(p)            kLanes columns x 4 bytes of a packed line
//   Value                       kLanes columns x one unit of weights
//   decode<W, unit>(raw, table) unit u of a line; stream_decode likewise, for streams (see stream_bias)
//   broadcast(p)                one unit of an activation row, in every column
//   mac(c, value, x)            c += value * x: one fused multiply-add, or one bf16 dot product
//   mac_at(c, value, p)         the same with the unit at p
//   fma(a, b, c)                a * b + c
//   load_value, store_value     panel elements
//   kTileVecs                   vectors of columns in the tile
//   stream_vecs(rows)           vectors of columns that a stream decodes at once, so that accumulators fit
//   kEmbedsBroadcast            mac_at is as cheap as mac, so activations need no registers
#pragma once

#include <cstdint>

#include "../layout.h"
#include "unroll.h"
#include "weights_wxa16.h"

// Values loaded before this point are loaded again after it, rather than kept in (or spilled from) registers.
#define QK_RELOAD() asm volatile("" : : : "memory")

namespace qk {
namespace {

// Bytes of weights between a use and its prefetch. Column parts, and panels with their pauses, are no pattern that the
// hardware follows: without it, four rows on AVX2 took 1.4 times as long with weights outside L2.
constexpr int64_t kAhead = 4096;

template <class T>
struct WeightTiles : T {
  using F = typename T::F;
  using Table = typename T::Table;
  using T::kLanes, T::kUnitK;
  static constexpr int kTileN = T::kTileVecs * kLanes;

  template <class W>
  static constexpr int line_units() {
    return (W::kBits == 4 ? 8 : 4) / kUnitK;
  }

  // c [kRows, kVecs * kLanes] (rows of 64) += what `acc` holds, scaled; or = that. Asked once, not for each vector: a
  // tile's depth is short.
  template <int kRows, int kVecs>
  QK_INLINE static void add_scaled(const F (&acc)[kRows][kVecs], float* c, const Scaling& s) {
    const auto put = [&](const auto& sum_at) QK_INLINE {
      unroll<kVecs>([&](auto v) QK_INLINE {
        unroll<kRows>([&](auto r) QK_INLINE {
          float* to = c + r.value * kBlockN + v.value * kLanes;
          T::store_f(to, sum_at(acc[r.value][v.value], to, r.value, v.value * kLanes));
        });
      });
    };
    if (s.scale || s.offset) {
      put([&](F sum, const float* to, int r, int at) QK_INLINE {
        const F before = s.begins ? T::set(0.0f) : T::load_f(to);
        sum = s.scale ? T::fma(sum, T::load_f(s.scale + at), before) : T::add(sum, before);
        return s.offset ? T::fma(T::set(s.sums[r * s.sum_stride]), T::load_f(s.offset + at), sum) : sum;
      });
    } else if (s.begins) {
      put([](F sum, const float*, int, int) QK_INLINE { return T::add(sum, T::set(0.0f)); });
    } else {
      put([](F sum, const float* to, int, int) QK_INLINE { return T::add(sum, T::load_f(to)); });
    }
  }

  // Two sets of accumulators where one row alone has too few chains for the latency of the multiply-add.
  template <class W, int kRows, int kVecs>
  static void stream_part(const uint32_t* x, int64_t ldx, const uint8_t* w, int64_t lines, const Table& table, float* c,
                          const Scaling& scaling) {
    constexpr int kUnits = line_units<W>(), kSets = kRows * kVecs > 4 ? 1 : 2;
    F acc[kSets][kRows][kVecs];
    unroll<kSets>([&](auto i) QK_INLINE {
      unroll<kRows>([&](auto r) QK_INLINE {
        unroll<kVecs>([&](auto v) QK_INLINE { acc[i.value][r.value][v.value] = T::set(0.0f); });
      });
    });
    const Table local = table;
    const uint32_t* x3 = x + 3 * ldx;  // two pointers, ldx and 2 * ldx address six rows
    for (int64_t i = 0; i < lines; ++i, w += kBlockN * 4, x += kUnits, x3 += kUnits) {
      for (int b = 0; b < kVecs * kLanes * 4; b += static_cast<int>(kAlign)) __builtin_prefetch(w + kAhead + b);
      if constexpr (T::kEmbedsBroadcast || kRows == 1) {
        constexpr int kBlock =
            T::kEmbedsBroadcast || kUnits < 4 ? kUnits : 4;  // units whose activations stay in registers
        unroll<kUnits / kBlock>([&](auto b) QK_INLINE {
          QK_RELOAD();
          unroll<kVecs>([&](auto v) QK_INLINE {
            if constexpr (T::kEmbedsBroadcast) QK_RELOAD();
            const auto raw = T::load_raw(w + v.value * kLanes * 4);
            unroll<kBlock>([&](auto j) QK_INLINE {
              constexpr int u = b.value * kBlock + j.value;
              const auto value = T::template stream_decode<W, u>(raw, local);
              unroll<kRows>([&](auto r) QK_INLINE {
                T::mac_at(acc[u % kSets][r.value][v.value], value,
                          (r.value < 3 ? x + r.value * ldx : x3 + (r.value - 3) * ldx) + u);
              });
            });
          });
        });
      } else {
        unroll<kUnits>([&](auto u) QK_INLINE {
          typename T::Value value[kVecs];
          unroll<kVecs>([&](auto v) QK_INLINE {
            value[v.value] = T::template stream_decode<W, u.value>(T::load_raw(w + v.value * kLanes * 4), local);
          });
          unroll<kRows>([&](auto r) QK_INLINE {
            const auto unit = T::broadcast(x + r.value * ldx + u.value);
            unroll<kVecs>([&](auto v)
                              QK_INLINE { T::mac(acc[u.value % kSets][r.value][v.value], value[v.value], unit); });
          });
        });
      }
    }
    if constexpr (kSets == 2) {
      unroll<kRows>([&](auto r) QK_INLINE {
        unroll<kVecs>([&](auto v) QK_INLINE {
          acc[0][r.value][v.value] = T::add(acc[0][r.value][v.value], acc[1][r.value][v.value]);
        });
      });
    }
    add_scaled<kRows, kVecs>(acc[0], c, scaling);
  }

  template <class W, int kRows>
  static void stream_rows(const uint32_t* x, int64_t ldx, const uint8_t* w, int64_t lines, const Table& table, float* c,
                          const Scaling& s) {
    constexpr int kVecs = T::stream_vecs(kRows), kPart = kVecs * kLanes;
    for (int j = 0; j < kBlockN; j += kPart)
      stream_part<W, kRows, kVecs>(
          x, ldx, w + j * 4, lines, table, c + j,
          {s.scale ? s.scale + j : nullptr, s.offset ? s.offset + j : nullptr, s.sums, s.sum_stride});
  }

  template <class W, int kRows = 1>
  static void stream(int rows, const uint32_t* x, int64_t ldx, const uint8_t* w, int64_t lines, const Table& table,
                     float* c, const Scaling& s) {
    if constexpr (kRows < T::kStreamRows) {
      if (rows > kRows) return stream<W, kRows + 1>(rows, x, ldx, w, lines, table, c, s);
    }
    stream_rows<W, kRows>(x, ldx, w, lines, table, c, s);
  }

  // panel [64 / kTileN][units][kTileN]; `pitch` floats from one block of columns to the next.
  template <class W>
  static void panel(const uint8_t* w, int64_t lines, const Table& table, const float* scale, const float* offset,
                    float* out, int64_t pitch) {
    constexpr int kUnits = line_units<W>();
    const Table local = table;
    for (int64_t i = 0; i < lines; ++i, w += kBlockN * 4, out += kUnits * kTileN) {
      for (int b = 0; b < kBlockN * 4; b += static_cast<int>(kAlign)) __builtin_prefetch(w + kAhead + b);
      unroll<kBlockN / kLanes>([&](auto v) QK_INLINE {
        constexpr int kAt = v.value * kLanes;
        float* to = out + kAt / kTileN * pitch + kAt % kTileN;
        const auto raw = T::load_raw(w + kAt * 4);
        unroll<kUnits>([&](auto u) QK_INLINE {
          auto value = T::template decode<W, u.value>(raw, local);
          if constexpr (T::kScaledPanel && W::kBits == 4) {
            const F s = T::load_f(scale + kAt);
            value = offset ? T::fma(value, s, T::load_f(offset + kAt)) : T::mul(value, s);
          }
          T::store_value(to + u.value * kTileN, value);
        });
      });
    }
  }

  template <int kRows>
  QK_NOINLINE static void tile_rows(const uint32_t* a, int64_t lda, const float* b, int64_t units, float* c,
                                    const Scaling& s) {
    constexpr int kVecs = T::kTileVecs;
    F acc[kRows][kVecs];
    unroll<kRows>([&](auto r)
                      QK_INLINE { unroll<kVecs>([&](auto v) QK_INLINE { acc[r.value][v.value] = T::set(0.0f); }); });
    const uint32_t *a3 = a + 3 * lda, *a6 = a + 6 * lda, *a9 = a + 9 * lda;  // as above, three rows a pointer
    for (int64_t i = 0; i < units; ++i, b += kTileN) {
      typename T::Value w[kVecs];
      unroll<kVecs>([&](auto v) QK_INLINE { w[v.value] = T::load_value(b + v.value * kLanes); });
      unroll<kRows>([&](auto r) QK_INLINE {
        constexpr int kRow = r.value;
        const uint32_t* row = kRow < 3 ? a : kRow < 6 ? a3 : kRow < 9 ? a6 : a9;
        const auto x = T::broadcast(row + kRow % 3 * lda + i);
        unroll<kVecs>([&](auto v) QK_INLINE { T::mac(acc[kRow][v.value], w[v.value], x); });
      });
    }
    add_scaled<kRows, kVecs>(acc, c, s);
  }

  template <int kRows = 1>
  static void tile(int rows, const uint32_t* a, int64_t lda, const float* b, int64_t units, float* c,
                   const Scaling& s) {
    if constexpr (kRows < T::kTileM) {
      if (rows > kRows) return tile<kRows + 1>(rows, a, lda, b, units, c, s);
    }
    tile_rows<kRows>(a, lda, b, units, c, s);
  }
};

}  // namespace
}  // namespace qk

#undef QK_RELOAD
