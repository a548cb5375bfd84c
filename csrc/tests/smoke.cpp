// Runs every usable tier of the core without Python, and compares it bit for bit with contract.h. Made for emulated
// processors, for cross-compiled builds and for sanitizers; every buffer has exactly the size that the kernels may use.
//
//   qk_smoke [--slack] [EXPECTED_ISA [TIERS]]   exits 1 if anything differs, if the tier chosen at start is not
//                                               EXPECTED_ISA, or if the usable tiers are not TIERS (comma-separated)
//
// --slack puts 512 unused bytes behind every buffer: QEMU's user mode emulates a masked AVX load as a whole one (seen
// in 7.2), which faults at the end of a page where a processor does not.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <stdexcept>
#include <string>

#include "../cpu/dispatch.h"
#include "../cpu/pack.h"
#include "../layout.h"
#include "contract.h"
#include "smoke_attention.h"
#include "smoke_norm.h"
#include "smoke_team.h"
#include "smoke_tools.h"

namespace {

// Rows by number: 2 tiny, 3 zero, 4 with a NaN, 5 with an infinity, 6 an outlier; the rest normal.
std::vector<uint8_t> make_rows(DType dtype, int64_t m, int64_t k, std::mt19937& random) {
  std::normal_distribution<float> normal;
  auto x = buffer<uint8_t>(m * k * bytes_of(dtype));
  for (int64_t r = 0; r < m; ++r) {
    for (int64_t i = 0; i < k; ++i) {
      float value = normal(random);
      if (r == 2) value *= 1e-36f;
      if (r == 3) value = 0.0f;
      if (r == 4 && i == k / 2) value = std::numeric_limits<float>::quiet_NaN();
      if (r == 5 && i == k - 1) value = -std::numeric_limits<float>::infinity();
      if (r == 6 && i == 0) value = 1e4f;
      store(dtype, x.data(), r * k + i, value);
    }
  }
  return x;
}

qk::ActivationArgs activations(const void* x, DType dtype, int64_t k, bool symmetric, bool dynamic) {
  return {x, dtype, k, symmetric, dynamic ? 0.0f : 0.02f, dynamic || symmetric ? 0 : 117, nullptr};
}

contract::Row quantized(const qk::ActivationArgs& act, int64_t r, int64_t k) {
  std::vector<float> row(static_cast<size_t>(k));
  for (int64_t i = 0; i < k; ++i) row[static_cast<size_t>(i)] = load(act.x_dtype, act.x, r * act.x_stride + i);
  return contract::quantize(row, act.symmetric, act.scale, act.zero_point);
}

// Whether y [row, column] is what the contract says; tells what it is if not.
bool check_value(DType dtype, const void* y, int64_t n, int64_t r, int64_t j, float expected, const std::string& what) {
  ++checks;
  if (same(dtype, y, r * n + j, expected)) return true;
  char where[112];
  std::snprintf(where, sizeof(where), " row %lld column %lld: got %.9g, expected %.9g", static_cast<long long>(r),
                static_cast<long long>(j), load(dtype, y, r * n + j), expected);
  fail(what + where);
  return false;
}

struct Case {
  int64_t m, n, k;
  DType dtype;
  bool symmetric, dynamic, bias, minus128;
  int threads;

  std::string name(const char* tier) const {
    char text[160];
    std::snprintf(text, sizeof(text), "%s m=%lld n=%lld k=%lld dtype=%d symmetric=%d dynamic=%d threads=%d", tier,
                  static_cast<long long>(m), static_cast<long long>(n), static_cast<long long>(k),
                  static_cast<int>(dtype), symmetric, dynamic, threads);
    return text;
  }
};

struct Weight {
  double value, reach;  // a kernel may add an offset to a code and take it off the sum: reach bounds what it multiplies
};

// Weight-only kernels sum floats in an order of their own: equal to double precision within k + 8 roundings of fp32
// and one of the output. `args` brings the weight, `weight_at(j, i)` tells what it stands for.
template <class WeightAt>
void check_weight_only(const qk::WeightOnlyTable& table, int bits, const Case& c, qk::LinearWxA16Args args,
                       const WeightAt& weight_at) {
  auto y = buffer<uint8_t>(c.m * c.n * bytes_of(c.dtype), 0xAB);
  args.y = y.data();
  auto scratch = aligned<uint8_t>(table.scratch_bytes(c.m, c.k, args.group_size, c.threads));
  args.scratch = scratch.get();
  (bits == 8 ? table.linear_w8a16 : table.linear_w4a16)(args);
  const double unit = c.dtype == DType::kBF16 ? 0x1p-8 : c.dtype == DType::kF16 ? 0x1p-11 : 0x1p-24;
  for (int64_t r = 0; r < c.m; ++r) {
    if (r == 4 || r == 5) continue;  // NaN and infinity: they only must not harm the other rows
    for (int64_t j = 0; j < c.n; ++j, ++checks) {
      double sum = args.bias ? static_cast<double>(args.bias[j]) : 0.0, magnitude = std::fabs(sum);
      for (int64_t i = 0; i < c.k; ++i) {
        const double value = static_cast<double>(load(c.dtype, args.x, r * c.k + i));
        const Weight weight = weight_at(j, i);
        sum += value * weight.value;
        magnitude += std::fabs(value) * weight.reach;
      }
      const double bound = 0x1p-23 * static_cast<double>(c.k + 8) * magnitude + 1.01 * unit * std::fabs(sum) + 1e-7;
      if (!(std::fabs(static_cast<double>(load(c.dtype, y.data(), r * c.n + j)) - sum) <= bound)) {
        return fail("weight only, " + std::to_string(bits) + " bits: " + c.name(qk::kernels().isa) + " row " +
                    std::to_string(r) + " column " + std::to_string(j));
      }
    }
  }
}

// By every kernel that can take the activations.
template <class WeightAt>
void check_weight_only(int bits, const Case& c, qk::LinearWxA16Args args, const void* x, const WeightAt& weight_at) {
  args.n = c.n;
  args.k = c.k;
  args.x = x;
  args.x_dtype = c.dtype;
  args.x_stride = c.k;
  args.m = c.m;
  args.y_dtype = c.dtype;
  args.y_stride = c.n;
  args.threads = c.threads;
  const qk::WeightOnlyTables all = qk::weight_only_tables(args);
  for (int i = 0; i < all.count; ++i) check_weight_only(*all.tables[i], bits, c, args, weight_at);
}

void check_linear(const Case& c, std::mt19937& random) {
  std::uniform_int_distribution<int> level(-127, 127);
  std::normal_distribution<float> normal;
  auto weight = buffer<int8_t>(c.n * c.k);
  for (int8_t& w : weight) w = static_cast<int8_t>(level(random));
  if (c.minus128 && !weight.empty()) weight[weight.size() / 2] = -128;
  auto scale = buffer<float>(c.n), bias = buffer<float>(c.n);
  for (float& s : scale) s = 0.01f + 0.001f * std::fabs(normal(random));
  for (float& b : bias) b = normal(random);

  auto packed = aligned<int8_t>(qk::packed_w8_bytes(c.n, c.k));
  auto colsum = buffer<int32_t>(c.n);
  const bool has_minus128 = qk::pack_w8(weight.data(), c.n, c.k, packed.get(), colsum.data(), c.threads);
  if (has_minus128 != (c.minus128 && !weight.empty())) fail("pack_w8 misses a -128, or sees one");
  auto unpacked = buffer<int8_t>(c.n * c.k);
  qk::unpack_w8(packed.get(), c.n, c.k, unpacked.data(), c.threads);
  if (unpacked != weight) fail("unpack_w8 does not give back what pack_w8 was given");

  const auto x = make_rows(c.dtype, c.m, c.k, random);
  auto y = buffer<uint8_t>(c.m * c.n * bytes_of(c.dtype), 0xAB);
  qk::LinearW8A8Args args{};
  args.packed = packed.get();
  args.colsum = colsum.data();
  args.weight_scale = scale.data();
  args.bias = c.bias ? bias.data() : nullptr;
  args.n = c.n;
  args.k = c.k;
  args.has_minus128 = has_minus128;
  args.act = activations(x.data(), c.dtype, c.k, c.symmetric, c.dynamic);
  args.m = c.m;
  args.y = y.data();
  args.y_dtype = c.dtype;
  args.y_stride = c.n;
  args.threads = c.threads;
  const qk::KernelTable& table = qk::kernels();
  args.scratch_bytes = table.linear_w8a8_scratch_bytes(c.m, c.k, c.threads);
  auto scratch = aligned<uint8_t>(args.scratch_bytes);
  args.scratch = scratch.get();
  table.linear_w8a8(&args, 1);

  for (int64_t r = 0; r < c.m; ++r) {
    const contract::Row q = quantized(args.act, r, c.k);
    for (int64_t j = 0; j < c.n; ++j) {
      const float expected = contract::linear(q, weight.data() + j * c.k, scale[static_cast<size_t>(j)],
                                              c.bias ? &bias[static_cast<size_t>(j)] : nullptr);
      if (!check_value(c.dtype, y.data(), c.n, r, j, expected, "linear_w8a8 " + c.name(table.isa))) return;
    }
  }
  if (!c.symmetric) return;
  qk::LinearWxA16Args floats{};
  floats.packed = reinterpret_cast<const uint8_t*>(packed.get());
  floats.weight_scale = scale.data();
  floats.bias = args.bias;
  floats.group_size = c.k < 1 ? 1 : c.k;
  check_weight_only(8, c, floats, x.data(), [&](int64_t j, int64_t i) {
    const double unit = static_cast<double>(scale[static_cast<size_t>(j)]);
    return Weight{unit * weight[static_cast<size_t>(j * c.k + i)], unit * 256};
  });
}

enum class Offset { kNone, kZeroPoint, kMinimum };  // of the int4 groups

void check_w4(const Case& c, int64_t group_size, Offset offset, qk::ScaleType type, std::mt19937& random) {
  std::uniform_int_distribution<int> level(0, 15);
  std::normal_distribution<float> normal;
  const int64_t group = group_size < c.k ? group_size : c.k, groups = group > 0 ? qk::ceil_div(c.k, group) : 0;
  const int64_t row_bytes = qk::ceil_div(c.k, 2), element = type == qk::ScaleType::kF16 ? 2 : 4;
  const DType stored = type == qk::ScaleType::kF16 ? DType::kF16 : DType::kF32;
  auto codes = buffer<uint8_t>(c.n * c.k), weight = buffer<uint8_t>(c.n * row_bytes);
  for (int64_t i = 0; i < c.n * c.k; ++i) {
    const int q = level(random);
    codes[static_cast<size_t>(i)] = static_cast<uint8_t>(q);
    const int64_t at = i / c.k * row_bytes + i % c.k / 2;
    weight[static_cast<size_t>(at)] |= static_cast<uint8_t>(i % c.k % 2 ? q << 4 : q);
  }
  auto scale = buffer<uint8_t>(c.n * groups * element), minimum = buffer<uint8_t>(c.n * groups * element);
  auto zero_point = buffer<uint8_t>(c.n * groups);
  auto bias = buffer<float>(c.n);
  for (int64_t i = 0; i < c.n * groups; ++i) {
    store(stored, scale.data(), i, 0.02f + 0.01f * std::fabs(normal(random)));
    store(stored, minimum.data(), i, 0.1f * normal(random));
    zero_point[static_cast<size_t>(i)] = static_cast<uint8_t>(level(random));
  }
  for (float& b : bias) b = normal(random);

  auto packed = aligned<uint8_t>(qk::packed_w4_bytes(c.n, c.k));
  qk::pack_w4(weight.data(), c.n, c.k, packed.get(), c.threads);
  auto unpacked = buffer<uint8_t>(c.n * row_bytes);
  qk::unpack_w4(packed.get(), c.n, c.k, unpacked.data(), c.threads);
  if (unpacked != weight) fail("unpack_w4 does not give back what pack_w4 was given");
  const int64_t elements = qk::packed_group_elements(c.n, groups);
  auto packed_scale = aligned<uint8_t>(elements * element), packed_minimum = aligned<uint8_t>(elements * element);
  auto packed_zero_point = aligned<uint8_t>(elements);
  qk::pack_groups(scale.data(), element, c.n, groups, packed_scale.get());
  qk::pack_groups(minimum.data(), element, c.n, groups, packed_minimum.get());
  qk::pack_groups(zero_point.data(), 1, c.n, groups, packed_zero_point.get());

  const auto x = make_rows(c.dtype, c.m, c.k, random);
  auto y = buffer<uint8_t>(c.m * c.n * bytes_of(c.dtype), 0xAB);
  qk::LinearW4A8Args args{};
  args.packed = packed.get();
  args.weight_scale = packed_scale.get();
  args.weight_zero_point = offset == Offset::kZeroPoint ? packed_zero_point.get() : nullptr;
  args.weight_min = offset == Offset::kMinimum ? packed_minimum.get() : nullptr;
  args.scale_type = type;
  args.bias = c.bias ? bias.data() : nullptr;
  args.n = c.n;
  args.k = c.k;
  args.group_size = group_size;
  args.act = activations(x.data(), c.dtype, c.k, c.symmetric, c.dynamic);
  args.m = c.m;
  args.y = y.data();
  args.y_dtype = c.dtype;
  args.y_stride = c.n;
  args.threads = c.threads;
  const qk::KernelTable& table = qk::kernels();
  auto scratch = aligned<uint8_t>(table.linear_w4a8_scratch_bytes(c.m, c.k, groups < 1 ? 1 : groups, c.threads));
  args.scratch = scratch.get();
  table.linear_w4a8(args);

  const std::string what = "linear_w4a8 " + c.name(table.isa) + " group=" + std::to_string(group_size) +
                           " offset=" + std::to_string(static_cast<int>(offset));
  for (int64_t r = 0; r < c.m; ++r) {
    const contract::Row q = quantized(args.act, r, c.k);
    for (int64_t j = 0; j < c.n; ++j) {
      contract::Groups g{group, offset == Offset::kMinimum, {}, {}, {}};
      for (int64_t i = j * groups; i < (j + 1) * groups; ++i) {
        g.scale.push_back(load(stored, scale.data(), i));
        g.minimum.push_back(load(stored, minimum.data(), i));
        g.zero_point.push_back(offset == Offset::kZeroPoint ? zero_point[static_cast<size_t>(i)]
                               : offset == Offset::kMinimum ? 0
                                                            : 8);
      }
      const float expected =
          contract::linear(q, codes.data() + j * c.k, g, c.bias ? &bias[static_cast<size_t>(j)] : nullptr);
      if (!check_value(c.dtype, y.data(), c.n, r, j, expected, what)) return;
    }
  }
  qk::LinearWxA16Args floats{};
  floats.packed = args.packed;
  floats.weight_scale = args.weight_scale;
  floats.scale_type = type;
  floats.weight_zero_point = args.weight_zero_point;
  floats.weight_min = args.weight_min;
  floats.bias = args.bias;
  floats.group_size = group_size;
  check_weight_only(4, c, floats, x.data(), [&](int64_t j, int64_t i) {
    const int64_t g = j * groups + i / group;
    const double q = codes[static_cast<size_t>(j * c.k + i)], s = static_cast<double>(load(stored, scale.data(), g));
    const double low = static_cast<double>(load(stored, minimum.data(), g));
    if (offset == Offset::kMinimum) return Weight{s * q + low, s * 256 + std::fabs(low)};
    return Weight{s * (q - (offset == Offset::kZeroPoint ? zero_point[static_cast<size_t>(g)] : 8)), s * 256};
  });
}

// quantize and dequantize of 8 bits, one granule a channel, at a place of the axis that `outer` decides.
void check_quantize(int64_t outer, int64_t channels, int64_t inner, bool symmetric, int threads, std::mt19937& random) {
  std::normal_distribution<float> normal;
  const int64_t count = outer * channels * inner;
  auto x = buffer<float>(count), back = buffer<float>(count), scale = buffer<float>(channels);
  auto q = buffer<uint8_t>(count);
  auto zero_point = buffer<int32_t>(channels);
  for (float& value : x) value = normal(random);
  if (count > 3) x[static_cast<size_t>(count / 3)] = std::numeric_limits<float>::infinity();
  const qk::QKind kind = symmetric ? qk::QKind::kInt8 : qk::QKind::kUint8;
  int32_t* zero_points = symmetric ? nullptr : zero_point.data();
  const qk::KernelTable& table = qk::kernels();
  table.quantize({x.data(), DType::kF32, outer, channels, inner, 0, q.data(), kind, scale.data(), zero_points,
                  symmetric, false, threads});
  table.dequantize(
      {q.data(), kind, outer, channels, inner, 0, scale.data(), zero_points, back.data(), DType::kF32, threads});
  const std::string name = std::string(table.isa) + " " + std::to_string(outer) + "x" + std::to_string(channels) + "x" +
                           std::to_string(inner) + (symmetric ? " symmetric" : " asymmetric");
  for (int64_t c = 0; c < channels; ++c) {
    std::vector<float> granule;
    for (int64_t o = 0; o < outer; ++o)
      for (int64_t i = 0; i < inner; ++i) granule.push_back(x[static_cast<size_t>((o * channels + c) * inner + i)]);
    const contract::Row expected = contract::quantize(granule, symmetric, 0.0f, 0);
    if (!same(DType::kF32, scale.data(), c, expected.scale)) return fail("quantize, scale: " + name);
    if (!symmetric && zero_point[static_cast<size_t>(c)] != expected.zero_point)
      return fail("quantize, zero point: " + name);
    for (int64_t e = 0; e < outer * inner; ++e, ++checks) {
      const size_t at = static_cast<size_t>((e / inner * channels + c) * inner + e % inner);
      const int32_t got = symmetric ? static_cast<int8_t>(q[at]) : q[at];
      const int32_t wanted = expected.q[static_cast<size_t>(e)];
      if (got != wanted) return fail("quantize: " + name);
      if (!same(DType::kF32, back.data(), static_cast<int64_t>(at),
                expected.scale * static_cast<float>(wanted - expected.zero_point)))
        return fail("dequantize: " + name);
    }
  }
}

// 4-bit groups: every level must come back from its own dequantized value.
void check_int4(int64_t rows, int64_t inner, int64_t group, bool symmetric, int threads) {
  const int64_t groups = qk::ceil_div(inner, group), row_bytes = qk::ceil_div(inner, 2);
  auto x = buffer<float>(rows * inner), back = buffer<float>(rows * inner), scale = buffer<float>(rows * groups);
  auto q = buffer<uint8_t>(rows * row_bytes);
  auto zero_point = buffer<int32_t>(rows * groups);
  const int lowest = symmetric ? -7 : -5, count = symmetric ? 15 : 16;
  for (int64_t i = 0; i < rows * inner; ++i) {
    // Each group starts with its two extremes, so that its scale is exactly 1/4.
    const int64_t at = i % inner % group;
    const int64_t step = at == 0 ? 0 : at == 1 ? count - 1 : i * 7 % count;
    x[static_cast<size_t>(i)] = 0.25f * static_cast<float>(lowest + step);
  }
  int32_t* zero_points = symmetric ? nullptr : zero_point.data();
  const qk::KernelTable& table = qk::kernels();
  table.quantize({x.data(), DType::kF32, 1, rows, inner, group, q.data(), qk::QKind::kInt4, scale.data(), zero_points,
                  symmetric, false, threads});
  table.dequantize({q.data(), qk::QKind::kInt4, 1, rows, inner, group, scale.data(), zero_points, back.data(),
                    DType::kF32, threads});
  checks += rows * inner;
  for (size_t i = 0; i < x.size(); ++i)
    if (std::fabs(back[i] - x[i]) > 1e-5f) return fail(std::string("int4 round trip: ") + table.isa);
}

// Functions by themselves: the bits of the scalar tier, which the Python tests compare with double precision.
void check_activation(qk::Activation function, DType from, DType to, std::mt19937& random) {
  std::normal_distribution<float> normal(0.0f, 3.0f);
  const int64_t count = 1001;
  auto x = buffer<uint8_t>(count * bytes_of(from));
  for (int64_t i = 0; i < count; ++i) store(from, x.data(), i, i % 50 ? normal(random) : normal(random) * 1e4f);
  store(from, x.data(), 7, std::numeric_limits<float>::quiet_NaN());
  store(from, x.data(), 8, std::numeric_limits<float>::infinity());
  auto y = buffer<uint8_t>(count * bytes_of(to), 0xAB), expected = y;
  qk::kernels().activation({x.data(), from, y.data(), to, count, function, 3});
  qk::kernels_scalar().activation({x.data(), from, expected.data(), to, count, function, 1});
  for (int64_t i = 0; i < count; ++i, ++checks)
    if (!same(to, y.data(), i, load(to, expected.data(), i)))
      return fail(std::string("activation ") + qk::kernels().isa + " " + std::to_string(static_cast<int>(function)) +
                  " element " + std::to_string(i));
}

void check_tier() {
  std::mt19937 random(20);
  for (int function = 1; function <= 4; ++function) {
    for (DType dtype : {DType::kF32, DType::kBF16, DType::kF16})
      check_activation(static_cast<qk::Activation>(function), dtype, function % 2 ? dtype : DType::kF32, random);
  }
  const int64_t attended[][3] = {{1, 1, 1}, {5, 7, 33}, {26, 17, 32}, {9, 150, 64}, {60, 300, 20}, {13, 70, 256}};
  for (const auto& s : attended) {
    for (DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
      for (int mode = 0; mode < 3; ++mode)
        check_attention(s[0], s[1], s[2], dtype, mode == 1, mode == 2, 1 + mode % 2 * 2, random);
      if (s[2] % 2 == 0) check_rotary(s[0], s[2], dtype, 1 + s[0] % 2 * 2, random);
    }
  }
  const int64_t normalized[][2] = {{1, 1}, {3, 7}, {5, 16}, {4, 63}, {9, 130}, {6, 384}, {2, 5000}};
  for (const auto& s : normalized) {
    for (DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
      for (int mode = 0; mode < 4; ++mode)
        check_norm(s[0], s[1], dtype, mode % 2 == 1, mode < 2, 1 + mode % 2 * 2, random);
    }
  }
  const int64_t shapes[][3] = {{1, 1, 1},    {1, 64, 64},  {7, 65, 3},  {9, 130, 67}, {2, 63, 200}, {13, 97, 64},
                               {8, 33, 257}, {97, 64, 31}, {0, 64, 64}, {3, 0, 64},   {7, 5, 0},    {5, 192, 520}};
  for (const auto& s : shapes) {
    for (DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
      for (int mode = 0; mode < 4; ++mode) {
        const bool symmetric = mode % 2 == 0, dynamic = mode < 2;
        for (int threads = 1; threads <= 3; threads += 2)
          check_linear({s[0], s[1], s[2], dtype, symmetric, dynamic, threads == 1, mode == 0 && threads == 3, threads},
                       random);
      }
    }
  }
  const int64_t grouped[][4] = {{1, 65, 64, 32}, {7, 66, 70, 32},  {9, 3, 129, 128}, {13, 64, 40, 8},
                                {5, 10, 33, 64}, {34, 70, 96, 32}, {2, 1, 1, 128},   {7, 130, 256, 128}};
  for (const auto& s : grouped) {
    for (Offset offset : {Offset::kNone, Offset::kZeroPoint, Offset::kMinimum}) {
      for (int mode = 0; mode < 4; ++mode) {
        const DType dtype = mode == 1 ? DType::kBF16 : mode == 2 ? DType::kF16 : DType::kF32;
        const qk::ScaleType type = mode == 3 ? qk::ScaleType::kF32 : qk::ScaleType::kF16;
        check_w4({s[0], s[1], s[2], dtype, mode % 2 == 0, mode != 2, mode != 0, false, 1 + mode % 2}, s[3], offset,
                 type, random);
      }
    }
  }
  for (bool symmetric : {true, false}) {
    for (int threads = 1; threads <= 2; ++threads) {
      check_quantize(1, 5, 67, symmetric, threads, random);
      check_quantize(3, 4, 5, symmetric, threads, random);
      check_quantize(6, 300, 1, symmetric, threads, random);
      check_quantize(2, 3, 1000, symmetric, threads, random);
      check_quantize(1, 1, 200000, symmetric, threads, random);
      check_int4(3, 64, 32, symmetric, threads);
      check_int4(2, 77, 32, symmetric, threads);
      check_int4(1, 1300, 1300, symmetric, threads);
    }
  }
}

std::string joined(const qk::TierList& tiers) {
  std::string text;
  for (int i = 0; i < tiers.count; ++i) text += (i ? "," : "") + std::string(tiers.names[i]);
  return text;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1 && std::string(argv[1]) == "--slack") {
    slack = 512;
    --argc;
    ++argv;
  }
  try {
    qk::init_dispatch();
    const std::string chosen = qk::kernels().isa, usable = joined(qk::usable_tiers());
    std::printf("chosen %s (%s)\ncompiled %s\nusable %s\n", chosen.c_str(), qk::isa_reason(),
                joined(qk::compiled_tiers()).c_str(), usable.c_str());
    if (argc > 1 && chosen != argv[1]) fail("expected the tier " + std::string(argv[1]) + ", got " + chosen);
    if (argc > 2 && usable != argv[2]) fail("expected the usable tiers " + std::string(argv[2]) + ", got " + usable);
    check_teams();
    const qk::TierList tiers = qk::usable_tiers();
    for (int i = 0; i < tiers.count; ++i) {
      const int64_t before = checks;
      qk::force_isa(tiers.names[i], "smoke");
      check_tier();
      std::printf("%s: %lld values compared\n", tiers.names[i], static_cast<long long>(checks - before));
    }
    try {
      qk::force_isa("sse9", "smoke");
      fail("an unknown tier was accepted");
    } catch (const std::invalid_argument&) {
    }
  } catch (const std::exception& error) {
    fail(error.what());
  }
  std::printf(failures ? "%d failures\n" : "all equal\n", failures);
  return failures ? 1 : 0;
}
