// Weight-only kernels of the scalar tier: portable C++.
#include "dispatch.h"
#include "linear_wxa16_impl.h"
#include "verbs_scalar.h"

namespace qk {
namespace {

struct Scalar : ScalarVerbs {
  static constexpr int kUnitK = 1, kTileM = 4, kTileN = 64;
  static constexpr bool kScaledPanel = true, kTables = true;

  struct Table {
    float value[16];
  };
  template <class W>
  static Table make_table(const float* codebook) {
    Table table;
    for (int i = 0; i < 16; ++i) table.value[i] = codebook ? codebook[i] : static_cast<float>(i - 8);
    return table;
  }

  static F fma(F a, F b, F c) { return a * b + c; }  // two roundings
  static float reduce_add(F v) { return v; }

  static constexpr bool kStreams = false;
  template <class W>
  static int64_t stream_max() {
    return 0;
  }
  template <class W>
  static constexpr float stream_bias() {
    return 0.0f;
  }

  template <DType D, class W>
  static void copy_row(const void* x, const float* inv_smooth, int64_t k, bool /*stream*/, uint32_t* units) {
    float* out = reinterpret_cast<float*>(units);
    for (int64_t i = 0; i < k; ++i) out[i] = inv_smooth ? load<D>(x, i) * inv_smooth[i] : load<D>(x, i);
    for (int64_t i = k; i < padded_k(k); ++i) out[i] = 0.0f;
  }

  template <class W>
  static void panel(const uint8_t* w, int64_t lines, const Table& table, const float* scale, const float* offset,
                    float* out, int64_t /*pitch*/) {
    for (int64_t i = 0; i < lines; ++i, w += kBlockN * 4) {
      for (int u = 0; u < (W::kBits == 4 ? 8 : 4); ++u, out += kTileN) {
        for (int j = 0; j < kTileN; ++j) {
          const uint8_t byte = w[j * 4 + u % 4];
          if constexpr (W::kBits == 8) {
            out[j] = static_cast<float>(static_cast<int8_t>(byte));
          } else {
            const float value = table.value[u < 4 ? byte & 15 : byte >> 4] * scale[j];
            out[j] = offset ? value + offset[j] : value;
          }
        }
      }
    }
  }

  static void tile(int rows, const uint32_t* a, int64_t lda, const float* b, int64_t units, float* c,
                   const Scaling& s) {
    for (int r = 0; r < rows; ++r, a += lda, c += kBlockN) {
      const float* x = reinterpret_cast<const float*>(a);
      float sums[kTileN] = {};
      for (int64_t i = 0; i < units; ++i)
        for (int j = 0; j < kTileN; ++j) sums[j] += x[i] * b[i * kTileN + j];
      for (int j = 0; j < kTileN; ++j) c[j] = s.begins ? sums[j] : c[j] + sums[j];
    }
  }
};

}  // namespace

const WeightOnlyTable& weight_only_scalar() {
  static constexpr WeightOnlyTable table = {"", linear_w8a16<Scalar>, linear_w4a16<Scalar>, linear_wxa16_scratch_bytes};
  return table;
}

}  // namespace qk
