// A panel of W4A8 on AMX: what of K is worked on at a time, its weights as tiles, and a thread's workspace.
//
// A panel tile holds 64 k of one group: a group that ends or begins within them has zeros in the others' places, so
// activations need no order of their own for each group size. Where groups have multipliers (kWhole), they meet the
// codes on their way into the tiles, and all of K is one group.
#pragma once

#include "linear_w4a8_impl.h"
#include "tiles_amx.h"

namespace qk {
namespace {

template <class V, bool kWhole>
class PanelsW4A8Amx : protected LinearW4A8<V, kWhole> {
 public:
  using Base = LinearW4A8<V, kWhole>;

  explicit PanelsW4A8Amx(const LinearW4A8Args& args)
      : Base(args, kWhole ? args.k : args.group_size, false), steps_(padded_k(args.k) / 64) {}

  static int64_t scratch_bytes(int64_t m, int64_t k, int64_t groups, int threads) {
    return workspaces(m, k, groups, threads) + threads * static_cast<int64_t>(sizeof(Workspace));
  }

 protected:
  using Base::p_;
  using typename Base::F;
  using typename Base::I;

  static constexpr int64_t kPanelSteps = 64;  // of 2 KiB and both halves of a superblock: 256 KiB
  // Of small groups a panel stays in L1, so that only activations come from L2. A team, whose threads may share cores,
  // was faster with the longer one and asking for activations kStepsAhead before; one thread with the shorter, without.
  static constexpr int64_t kSliceSteps = 8, kSliceStepsAlone = 4;
  static constexpr int64_t kStepsAhead = 2;
  static constexpr int64_t kFewTilesSteps = 16;  // where few row tiles share a panel it had better be near
  static constexpr int64_t kBlockTiles = V::kMaxBlockTiles;
  static constexpr int64_t kSpan = 64;  // k of a tile
  static constexpr int64_t kBytesPerK = kBlockN / 2, kPackedLine = kLineK * kBytesPerK;  // of a superblock's codes

  // What a panel holds of one group.
  struct Span {
    int64_t group, depth;  // of the whole group
    int64_t step, steps;  // of the activations
    bool begins, ends;  // whether the group's first and last k are among them: of a larger group only a panel's first
                        // span is the end, and only its only span anything else
  };
  struct Workspace {
    alignas(kAlign) int8_t panel[2][kPanelSteps * kPairBytes];
    alignas(kAlign) int32_t sums[2][2][kPairSums];  // of two groups, while the two before are added
    alignas(kAlign) float totals[2][kBlockTiles][kPairSums];
    alignas(kAlign) int32_t carried[2][kBlockTiles][kPairSums];  // of a group that ends in a later panel
    alignas(kAlign) float scale[kPanelSteps][kBlockN], min[kPanelSteps][kBlockN];
    alignas(kAlign) int32_t weight_sum[kPanelSteps][kBlockN];  // over a group's k; asymmetric activations only
    Span spans[kPanelSteps];
    int64_t span_count;
    // If spans are whole groups of equal length and even in number, else 0: the k of each.
    int64_t even_groups;
  };

  // ---- scratch: rows of tiles and their group sums | RowScale | a workspace for each thread -------------------

  static int64_t stride(int64_t m, int64_t k, int64_t groups) {
    return tile_stride(m, k, groups * static_cast<int64_t>(sizeof(int32_t)));
  }
  static int64_t workspaces(int64_t m, int64_t k, int64_t groups, int threads) {
    return round_up(row_chunks_bytes<V>(m, k, {stride(m, k, groups)}, threads), kAlign);
  }
  // Where the sums of the chunk's groups begin, [rows][groups]; `row` is the chunk's first.
  int64_t sums_at(int64_t row) const {
    const int64_t chunk = chunk_rows(p_.m, p_.k), rows = p_.m - row < chunk ? p_.m - row : chunk;
    return round_up(rows, kPairRows) * padded_k(p_.k);
  }

  // ---- a panel ---------------------------------------------------------------------------------------------------

  // Spans from k on that a panel of `most` steps holds: whole groups, or a piece of one that is larger. Returns where
  // they end.
  int64_t plan(int64_t k, int64_t most, Workspace& ws) const {
    ws.span_count = 0;
    for (int64_t used = 0; k < p_.k;) {
      const int64_t group = k / this->group_, begin = group * this->group_;
      const int64_t end = begin + this->group_ < p_.k ? begin + this->group_ : p_.k;
      const int64_t step = k / kSpan, all = ceil_div(end, kSpan) - step;
      const bool whole = used + all <= most;
      if (!whole && used > 0) break;
      const int64_t steps = whole ? all : most;
      ws.spans[ws.span_count++] = {group, end - begin, step, steps, k == begin, whole};
      used += steps;
      k = whole ? end : (step + steps) * kSpan;
      if (!whole) break;
    }
    const Span *first = ws.spans, *last = ws.spans + ws.span_count - 1;
    const bool whole = first->begins && last->ends && last->depth == first->depth && ws.span_count % 2 == 0;
    ws.even_groups = whole && first->group * this->group_ % kSpan == 0 ? first->depth : 0;
    return k;
  }

  // Multiplied codes. Those beyond K are zero, but for their zero points, which meet activations that are.
  void unpack_whole(const uint8_t* codes, const Span& span, int64_t nb, int64_t at, Workspace& ws) const {
    const int64_t size = p_.group_size < p_.k ? p_.group_size : p_.k, groups = ceil_div(p_.k, size);
    const bool sums_codes = !p_.act.symmetric;
    const __m512i nibble = _mm512_set1_epi8(15), ones = _mm512_set1_epi8(1), pair = _mm512_set1_epi32(0x00010001),
                  bytes = _mm512_set1_epi32(0x01010101);
    for (int64_t j = 0; j < kBlockN; j += V::kLanes) {
      I code_sum = V::set_i(0), multiplier = code_sum, zeros = code_sum;
      int8_t* out = ws.panel[j / kPairRows] + at * kPairBytes + j % kPairRows / kTileRows * kTileBytes;
      const uint8_t* in = codes + span.step * (kSpan / kLineK) * kPackedLine + j * kPackK;
      int64_t begins = span.step * kSpan;  // where another group does
      for (int64_t k = begins; k < (span.step + span.steps) * kSpan;) {
        for (int64_t l = 0; l < kSpan / kLineK; ++l, k += kLineK, in += kPackedLine, out += 128) {
          if (k == begins && k < p_.k) {
            const int64_t g = k / size, here = (nb * groups + g) * kBlockN + j;
            const I one = load_bytes(p_.weight_multiplier + here);
            const I zero = p_.weight_zero_point ? load_bytes(p_.weight_zero_point + here) : V::set_i(8);
            multiplier = V::mul_i(one, pair);
            zeros = V::mul_i(V::mul_i(one, zero), bytes);
            begins = (g + 1) * size;
          }
          const __m512i both = _mm512_load_si512(in), low = _mm512_and_si512(both, nibble),
                        high = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
          // Two bytes at a time: 15 * 15 does not leave the lower one.
          const I first = _mm512_sub_epi8(_mm512_mullo_epi16(low, multiplier), zeros),
                  second = _mm512_sub_epi8(_mm512_mullo_epi16(high, multiplier), zeros);
          _mm512_store_si512(out, first);
          _mm512_store_si512(out + 64, second);
          if (sums_codes && k < p_.k) code_sum = V::dot4(V::dot4(code_sum, ones, first), ones, second);
        }
        out += kPairBytes - kTileBytes;
      }
      if (!sums_codes) continue;
      int32_t* sum = ws.weight_sum[0] + j;
      if (!span.begins) code_sum = V::add_i(code_sum, V::load_i(sum));
      if (span.ends && p_.k % kLineK) {  // zero points that stand for nothing
        const I all = V::dot4(V::set_i(0), ones, _mm512_sub_epi8(V::set_i(0), zeros));  // of four k
        const int64_t beyond = kLineK - p_.k % kLineK;
        code_sum = V::sub_i(code_sum, V::mul_i(_mm512_srai_epi32(all, 2), V::set_i(static_cast<int32_t>(beyond))));
      }
      V::store_i(sum, code_sum);
    }
    for (float& scale : ws.scale[&span - ws.spans]) scale = 1.0f;  // the channel's comes after that of the row
  }
  static I load_bytes(const uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }

  void unpack_span(const uint8_t* codes, const Span& span, int64_t nb, int64_t at, Workspace& ws) const {
    const int64_t begin = span.group * this->group_, end = begin + span.depth;
    typename Base::Group group;
    this->load_group(nb, span.group, group);
    const bool sums_codes = !p_.act.symmetric;
    const __m512i nibble = _mm512_set1_epi8(15), bytes = _mm512_set1_epi32(0x01010101);
    for (int64_t j = 0; j < kBlockN; j += V::kLanes) {
      I zero_point = p_.weight_min ? V::set_i(0) : V::load_i(group.zero_point + j);
      I code_sum = V::set_i(0);
      const I zeros = V::mul_i(zero_point, bytes);
      int8_t* out = ws.panel[j / kPairRows] + at * kPairBytes + j % kPairRows / kTileRows * kTileBytes;
      const uint8_t* in = codes + span.step * (kSpan / kLineK) * kPackedLine + j * kPackK;
      for (int64_t k = span.step * kSpan; k < (span.step + span.steps) * kSpan;) {
        for (int64_t l = 0; l < kSpan / kLineK; ++l, k += kLineK, in += kPackedLine, out += 128) {
          if (k < begin || k >= end) {
            _mm512_store_si512(out, V::set_i(0));
            _mm512_store_si512(out + 64, V::set_i(0));
            continue;
          }
          const __m512i both = _mm512_load_si512(in), low = _mm512_and_si512(both, nibble),
                        high = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
          if (sums_codes) code_sum = V::dot4(V::dot4(code_sum, low, bytes), high, bytes);
          _mm512_store_si512(out, _mm512_sub_epi8(low, zeros));
          _mm512_store_si512(out + 64, _mm512_sub_epi8(high, zeros));
        }
        out += kPairBytes - kTileBytes;
      }
      if (!sums_codes) continue;
      // Codes beyond K are zero, so that they count for nothing but their zero points.
      int32_t* sum = ws.weight_sum[&span - ws.spans] + j;
      if (span.begins)
        code_sum = V::sub_i(code_sum, V::mul_i(zero_point, V::set_i(static_cast<int32_t>(span.depth))));
      else
        code_sum = V::add_i(code_sum, V::load_i(sum));
      V::store_i(sum, code_sum);
    }
    const int64_t index = &span - ws.spans;
    std::memcpy(ws.scale[index], group.scale, sizeof(group.scale));
    if (p_.weight_min) std::memcpy(ws.min[index], group.min, sizeof(group.min));
  }

  const int64_t steps_;
};

}  // namespace
}  // namespace qk
