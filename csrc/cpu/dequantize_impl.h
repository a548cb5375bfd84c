// Back from integers: dequantize of whole tensors, see args.h for how they are seen, and lookups in int8 tables.
//
//   out = scale * (q - zero_point), one rounding, then rounded to the output dtype
#pragma once

#include <cstring>

#include "../args.h"
#include "../layout.h"
#include "team.h"
#include "verbs_scalar.h"

namespace qk {
namespace {

constexpr int64_t kStage = 512;  // codes unpacked, or gathered, to bytes at a time; even

template <class V, DType D>
class Dequantize {
 public:
  explicit Dequantize(const DequantizeArgs& args) : p_(args) {}

  void run() const {
    switch (p_.kind) {
      case QKind::kInt8:
        return run_as<QKind::kInt8>();
      case QKind::kUint8:
        return run_as<QKind::kUint8>();
      default:
        return run_as<QKind::kInt4>();
    }
  }

 private:
  using F = typename V::F;
  using I = typename V::I;
  static constexpr int kW = V::kLanes;

  template <QKind kKind>
  void run_as() const {
    const int64_t runs = p_.outer * p_.channels, size = p_.group > 0 ? p_.group : p_.inner;
    const int threads = threads_for(runs * p_.inner, p_.threads);
    const bool ragged = size > 0 && (p_.inner % size != 0 || (kKind == QKind::kInt4 && p_.inner % 2 != 0));
    if (runs < threads && p_.group == 0) {  // few long runs: all share each of them, two codes of a byte together
      parallel_pieces(threads, conversion(ceil_div(p_.inner, 2), 2 * runs), [&](Range pairs) {
        const int64_t begin = pairs.begin * 2, end = pairs.end * 2 < p_.inner ? pairs.end * 2 : p_.inner;
        for (int64_t r = 0; r < runs; ++r)
          piece<kKind>(row_q<kKind>(r) + bytes_of<kKind>(begin), end - begin, r * p_.inner + begin, r % p_.channels);
      });
    } else if (p_.inner < kW && p_.outer > 1) {
      parallel_pieces(threads, conversion(p_.outer, p_.channels * p_.inner), [&](Range of) { columns<kKind>(of); });
    } else if (p_.outer == 1 && !ragged && size > 0) {  // granules one behind the other
      parallel_pieces(threads, conversion(runs * (p_.inner / size), size),
                      [&](Range of) { granules<kKind>(of, size); });
    } else {
      parallel_pieces(threads, conversion(runs, p_.inner), [&](Range of) {
        for (int64_t r = of.begin; r < of.end; ++r) row<kKind>(r, size);
      });
    }
  }

  template <QKind kKind>
  static int64_t bytes_of(int64_t codes) {
    return kKind == QKind::kInt4 ? ceil_div(codes, 2) : codes;
  }
  template <QKind kKind>
  const uint8_t* row_q(int64_t r) const {
    return static_cast<const uint8_t*>(p_.q) + r * bytes_of<kKind>(p_.inner);
  }

  template <QKind kKind>
  void row(int64_t r, int64_t size) const {
    const int64_t granules = size > 0 ? ceil_div(p_.inner, size) : 0, first = r % p_.channels * granules;
    for (int64_t g = 0; g < granules; ++g) {
      const int64_t begin = g * size, n = p_.inner - begin < size ? p_.inner - begin : size;
      piece<kKind>(row_q<kKind>(r) + bytes_of<kKind>(begin), n, r * p_.inner + begin, first + g);
    }
  }

  template <QKind kKind>
  void granules(Range range, int64_t size) const {
    const uint8_t* q = static_cast<const uint8_t*>(p_.q);
    const auto all = [&](auto n) {
      for (int64_t g = range.begin; g < range.end; ++g) piece<kKind>(q + bytes_of<kKind>(g * n), n, g * n, g);
    };
    switch (size) {
      case 32:
        return all(Size<32>());
      case 64:
        return all(Size<64>());
      case 128:
        return all(Size<128>());
      default:
        return all(size);
    }
  }
  template <int64_t kSize>
  struct Size {  // a number that loops know when they are compiled
    constexpr operator int64_t() const { return kSize; }
  };

  template <QKind kKind>
  static I load(const uint8_t* q) {
    return kKind == QKind::kInt8 ? V::load_i8(reinterpret_cast<const int8_t*>(q)) : V::load_u8(q);
  }
  template <QKind kKind>
  static I load_part(const uint8_t* q, int n) {
    return kKind == QKind::kInt8 ? V::load_i8_part(reinterpret_cast<const int8_t*>(q), n) : V::load_u8_part(q, n);
  }

  template <QKind kKind>
  int32_t zero_point(int64_t granule) const {
    return p_.zero_point ? p_.zero_point[granule] : kKind == QKind::kInt4 ? 8 : 0;
  }

  // n codes at q, of one granule, to out[at, at + n).
  template <QKind kKind>
  QK_INLINE void piece(const uint8_t* q, int64_t n, int64_t at, int64_t granule) const {
    const float scale = p_.scale[granule];
    const int32_t zp = zero_point<kKind>(granule);
    if constexpr (kKind != QKind::kInt4)
      bytes<kKind>(q, n, at, scale, zp);
    else if constexpr (D == DType::kF32)
      nibbles(q, n, at, scale, zp);
    else
      halves(q, n, at, scale, zp);
  }

  static bool finite(float scale) { return scale - scale == 0.0f; }  // then no product is a NaN

  template <QKind kKind>
  QK_INLINE void bytes(const uint8_t* q, int64_t n, int64_t at, float scale, int32_t zp) const {
    const F scales = V::set(scale);
    const I zeros = V::set_i(zp);
    const auto value = [&](I code) { return V::mul(V::to_f(V::sub_i(code, zeros)), scales); };
    int64_t i = 0;
    if (finite(scale))
      for (; i + 2 * kW <= n; i += 2 * kW)
        V::template store_numbers<D>(p_.out, at + i, value(load<kKind>(q + i)), value(load<kKind>(q + i + kW)));
    for (; i + kW <= n; i += kW) V::template store<D>(p_.out, at + i, value(load<kKind>(q + i)));
    if (i == n) return;
    const int rest = static_cast<int>(n - i);
    V::template store_part<D>(p_.out, at + i, value(load_part<kKind>(q + i, rest)), rest);
  }

  QK_INLINE void nibbles(const uint8_t* q, int64_t n, int64_t at, float scale, int32_t zp) const {
    alignas(kAlign) uint8_t stage[kStage];
    for (int64_t i = 0; i < n; i += kStage) {
      const int64_t part = n - i < kStage ? n - i : kStage;
      unpack(q + i / 2, part, stage);
      bytes<QKind::kUint8>(stage, part, at + i, scale, zp);
    }
  }

  // Sixteen codes stand for sixteen values: those are rounded once, and then looked up.
  QK_INLINE void halves(const uint8_t* q, int64_t n, int64_t at, float scale, int32_t zp) const {
    static constexpr int32_t kCodes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    alignas(kAlign) uint16_t table[16];
    const auto value = [&](int i) {
      return V::mul(V::to_f(V::sub_i(V::load_i(kCodes + i), V::set_i(zp))), V::set(scale));
    };
    int code = 0;
    for (; code + 2 * kW <= 16 && finite(scale); code += 2 * kW)
      V::template store_numbers<D>(table, code, value(code), value(code + kW));
    for (; code < 16; code += kW) V::template store<D>(table, code, value(code));
    uint16_t* out = static_cast<uint16_t*>(p_.out) + at;
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) V::lookup_nibbles(table, q + i / 2, out + i);
    for (; i < n; ++i) out[i] = table[i % 2 ? q[i / 2] >> 4 : q[i / 2] & 15];
  }

  static void unpack(const uint8_t* q, int64_t n, uint8_t* codes) {
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) V::unpack_nibbles(q + i / 2, codes + i);
    for (; i < n; ++i) codes[i] = i % 2 ? q[i / 2] >> 4 : q[i / 2] & 15;
  }

  // Rows of channels of short runs, each column with its own scale. Rows are whole where a channel is one column;
  // otherwise what belongs to columns is spread over kColumns of them first.
  template <QKind kKind>
  void columns(Range rows) const {
    constexpr int64_t kColumns = 2048;
    const int64_t pitch = p_.channels * p_.inner;
    bool numbers = true;
    for (int64_t c = 0; c < p_.channels; ++c) numbers = numbers & finite(p_.scale[c]);
    if (p_.inner == 1) {
      for (int64_t o = rows.begin; o < rows.end; ++o)
        columns_of_row<kKind>(o * pitch, pitch, p_.scale, p_.zero_point, numbers);
      return;
    }
    alignas(kAlign) float scale[kColumns];
    alignas(kAlign) int32_t zp[kColumns];
    const int64_t per_block = kColumns / p_.inner;
    for (int64_t c0 = 0; c0 < p_.channels; c0 += per_block) {
      const int64_t count = p_.channels - c0 < per_block ? p_.channels - c0 : per_block;
      for (int64_t c = 0, j = 0; c < count; ++c)
        for (int64_t i = 0; i < p_.inner; ++i, ++j) scale[j] = p_.scale[c0 + c], zp[j] = zero_point<kKind>(c0 + c);
      for (int64_t o = rows.begin; o < rows.end; ++o)
        columns_of_row<kKind>(o * pitch + c0 * p_.inner, count * p_.inner, scale, p_.zero_point ? zp : nullptr,
                              numbers);
    }
  }

  template <QKind kKind>
  void columns_of_row(int64_t at, int64_t width, const float* scale, const int32_t* zero_point, bool numbers) const {
    const uint8_t* q = static_cast<const uint8_t*>(p_.q) + at;
    const auto value = [&](int64_t j) {
      const I code = load<kKind>(q + j);
      return V::mul(V::to_f(zero_point ? V::sub_i(code, V::load_i(zero_point + j)) : code), V::load_f(scale + j));
    };
    int64_t j = 0;
    for (; numbers && j + 2 * kW <= width; j += 2 * kW)
      V::template store_numbers<D>(p_.out, at + j, value(j), value(j + kW));
    for (; j + kW <= width; j += kW) V::template store<D>(p_.out, at + j, value(j));
    for (; j < width; ++j) {
      const int32_t zp = zero_point ? zero_point[j] : 0,
                    code = kKind == QKind::kInt8 ? static_cast<int8_t>(q[j]) : q[j];
      ScalarVerbs::store<D>(p_.out, at + j, static_cast<float>(code - zp) * scale[j]);
    }
  }

  const DequantizeArgs& p_;
};

template <class V, DType D>
void embedding_as(const EmbeddingArgs& p) {
  const int64_t stride = padded_k(p.k);
  parallel_pieces(threads_for(p.count * p.k, p.threads), conversion(p.count, p.k), [&](Range range) {
    int8_t stage[kStage];
    for (int64_t i = range.begin; i < range.end; ++i) {
      const int64_t id = p.ids[i];
      const auto scale = V::set(p.scale[id]);
      const int8_t* row =
          p.packed ? p.table + id / kBlockN * kBlockN * stride + id % kBlockN * kPackK : p.table + id * p.k;
      for (int64_t k0 = 0; k0 < p.k; k0 += kStage) {
        const int64_t n = p.k - k0 < kStage ? p.k - k0 : kStage;
        const int8_t* q = row + k0;
        if (p.packed) {  // four bytes of each 256-byte line
          for (int64_t k = 0; k < n; k += kPackK) std::memcpy(stage + k, row + (k0 + k) * kBlockN, kPackK);
          q = stage;
        }
        for (int64_t j = 0; j < n; j += V::kLanes) {
          const int lanes = static_cast<int>(n - j < V::kLanes ? n - j : V::kLanes);
          if (lanes == V::kLanes)
            V::template store<D>(p.out, i * p.k + k0 + j, V::mul(V::to_f(V::load_i8(q + j)), scale));
          else
            V::template store_part<D>(p.out, i * p.k + k0 + j, V::mul(V::to_f(V::load_i8_part(q + j, lanes)), scale),
                                      lanes);
        }
      }
    }
  });
}

template <class V>
void embedding(const EmbeddingArgs& args) {
  switch (args.out_dtype) {
    case DType::kF32:
      return embedding_as<V, DType::kF32>(args);
    case DType::kBF16:
      return embedding_as<V, DType::kBF16>(args);
    default:
      return embedding_as<V, DType::kF16>(args);
  }
}

template <class V>
void dequantize(const DequantizeArgs& args) {
  switch (args.out_dtype) {
    case DType::kF32:
      return Dequantize<V, DType::kF32>(args).run();
    case DType::kBF16:
      return Dequantize<V, DType::kBF16>(args).run();
    default:
      return Dequantize<V, DType::kF16>(args).run();
  }
}

}  // namespace
}  // namespace qk
