// 4-bit weights: addresses, sizes and a stream in, launches out; rules as in bindings.cpp.
#include "bindings.h"

#include "bindings_layers.h"
#include "launch.h"
#include "launch_w4.h"

namespace py = pybind11;

namespace qk::cuda {
namespace {

constexpr int kMmaCapability = 89;  // the highest whose plans are all of mma.sync; those run on every later one too

W4Order order_of(int code) {
  QK_CHECK_GE(code, 0);
  QK_CHECK_LE(code, 1);
  return static_cast<W4Order>(code);
}

// (packed, scale, zero point, minimum, codebook) as addresses, 0: absent; scale dtype code; order; N, K, group; blocks;
// the address of the channels' scales, 0: groups have their own; that of the channels' sums, which gemm_w4a8 reads.
W4Weight weight_of(const py::tuple& v) {
  QK_CHECK_EQ(v.size(), size_t{13});
  const auto address = [&](size_t i) { return v[i].cast<Address>(); };
  W4Weight w = {};
  w.packed = pointer<const uint8_t>(address(0)), w.scale = pointer<const void>(address(1));
  w.zero_point = pointer<const uint8_t>(address(2)), w.minimum = pointer<const void>(address(3));
  w.codebook = pointer<const float>(address(4)), w.channel_scale = pointer<const float>(address(11));
  const int scale = v[5].cast<int>();
  QK_CHECK_EQ(scale % 2, 0);
  w.scale_type = dtype(scale) == DType::kF32 ? ScaleType::kF32 : ScaleType::kF16;
  w.order = order_of(v[6].cast<int>());
  const auto n = v[7].cast<int64_t>(), k = v[8].cast<int64_t>(), group = v[9].cast<int64_t>();
  QK_CHECK_GE(n, 1);
  QK_CHECK_LE(n, int64_t{0x7fffff00});
  QK_CHECK_GE(k, 1);
  QK_CHECK_LE(k, int64_t{1} << 18);
  QK_CHECK_GE(group, 1);
  if (group < k) QK_CHECK_EQ(group % kW4GroupStep, int64_t{0});
  QK_CHECK_EQ((address(0) | address(1) | address(2) | address(3)) % 16, Address{0});
  w.n = static_cast<int32_t>(n), w.k = static_cast<int32_t>(k);
  w.group = static_cast<int32_t>(group < k ? group : k);
  const auto stored = v[10].cast<int64_t>();
  QK_CHECK_GE(stored, w4_blocks(n));
  QK_CHECK_LE(stored, w4_blocks(0x7fffff00));
  w.blocks = static_cast<int32_t>(stored);
  w.kind = w.channel_scale ? W4Kind::kMultiplier
           : w.codebook    ? W4Kind::kCodebook
           : w.minimum     ? W4Kind::kMinimum
                           : W4Kind::kZeroPoint;
  if (w.channel_scale && (scale == 0 || address(2) || address(3) || address(4) || w.order != W4Order::kByte)) {
    throw std::invalid_argument(
        "weight: expected multipliers of 16 bits, in the order of bytes, and nothing else of "
        "groups beside scales of channels");
  }
  return w;
}

}  // namespace

W4Plan plan_of(const py::tuple& v) {
  if (v.size() != 6) QK_CHECK_EQ(v.size(), size_t{8});  // with a head
  const int kernel = v[0].cast<int>();
  QK_CHECK_GE(kernel, 0);
  QK_CHECK_LE(kernel, 1);
  W4Plan p = {static_cast<W4Kernel>(kernel), v[1].cast<int32_t>(), v[2].cast<int32_t>(),
              v[3].cast<int32_t>(),          v[4].cast<int64_t>(), v[5].cast<int64_t>()};
  QK_CHECK_GE(p.ctas, 0);
  if (v.size() == 8) {
    p.head_channels = v[6].cast<int32_t>(), p.head_tokens = v[7].cast<int32_t>();
    QK_CHECK_GE(p.head_channels, 0);
    QK_CHECK_EQ(p.head_channels % kW4Rows, 0);
    QK_CHECK_GE(p.head_tokens, p.head_channels > 0 ? 1 : 0);
  }
  return p;
}

py::tuple tuple_of(const W4Plan& p) {
  return py::make_tuple(static_cast<int>(p.kernel), p.tokens, p.phases, p.ctas, p.counters, p.partial_floats,
                        p.head_channels, p.head_tokens);
}

namespace {

py::tuple plan(bool bytes, int64_t m, int64_t n, int64_t k, int64_t group, int kind, int capability, int sms) {
  QK_CHECK_GE(kind, 0);
  QK_CHECK_LE(kind, 3);
  const auto as = static_cast<W4Kind>(kind);
  return tuple_of(bytes ? plan_w4a8(m, n, k, group, as, capability, sms) : plan_w4a16(m, n, k, as, capability, sms));
}

// What a layer of floats keeps.
GemmW4A16Args weight_w4a16(const py::tuple& weight, Address bias) {
  GemmW4A16Args a = {};
  a.weight = weight_of(weight);
  QK_CHECK_EQ(static_cast<int>(a.weight.order), 0);
  a.bias = pointer<const float>(bias);
  return a;
}

void gemm_w4a16_at(const py::tuple& weight, Address x, int x_dtype, int64_t m, int64_t x_stride, Address bias,
                   Address y, int y_dtype, int64_t y_stride, const py::tuple& plan, Address counters, Address partials,
                   bool dependent, Address stream) {
  GemmW4A16Args a = weight_w4a16(weight, bias);
  put_floats(a, x, x_dtype, m, x_stride, y, y_dtype, y_stride, counters, partials);
  gemm_w4a16(a, plan_of(plan), dependent, stream_of(stream));
}

// What a layer of integers keeps.
GemmW4A8Args weight_w4a8(const py::tuple& weight, Address bias) {
  GemmW4A8Args a = {};
  a.weight = weight_of(weight);
  QK_CHECK_EQ(static_cast<int>(a.weight.order), 1);
  a.channel_sum = pointer<const int32_t>(weight[12].cast<Address>());
  a.bias = pointer<const float>(bias);
  return a;
}

void run_w4a8(const GemmW4A8Args& a, const W4Plan& p, bool dependent, cudaStream_t stream) {
  if (a.x_zero_point && a.weight.kind != W4Kind::kMultiplier && p.kernel != W4Kernel::kMma) {
    throw std::invalid_argument("plan: expected the mma.sync kernel beside x_zero_point, got the wgmma kernel");
  }
  if (a.x_zero_point && a.weight.kind == W4Kind::kMultiplier && !a.channel_sum) {
    throw std::invalid_argument("weight: expected sums of channels beside multipliers and x_zero_point, got none");
  }
  gemm_w4a8(a, p, dependent, stream);
}

void gemm_w4a8_at(const py::tuple& weight, Address xq, int64_t m, int64_t x_stride, Address x_scale,
                  Address x_zero_point, Address bias, Address y, int y_dtype, int64_t y_stride, const py::tuple& plan,
                  bool dependent, Address stream) {
  GemmW4A8Args a = weight_w4a8(weight, bias);
  put_codes(a, xq, m, x_stride, x_scale, x_zero_point, y, y_dtype, y_stride);
  run_w4a8(a, plan_of(plan), dependent, stream_of(stream));
}

}  // namespace

// Of the kernels of 4-bit weights, those of mma.sync alone take zero points of activations, but for multipliers'.
void multiply(const GemmW4A8Args& a, int capability, cudaStream_t stream) {
  const W4Weight& w = a.weight;
  const bool mma = a.x_zero_point && w.kind != W4Kind::kMultiplier;
  const int most = mma && capability > kMmaCapability ? kMmaCapability : capability;
  run_w4a8(a, plan_w4a8(a.m, w.n, w.k, w.group, w.kind, most, multiprocessors()), capability >= 90, stream);
}

void bind_w4(py::module_& m) {
  bind_floats<GemmW4A16Args>(m, "LinearW4A16")
      .def(py::init([](const py::tuple& weight, Address bias) {
             return FloatLayer<GemmW4A16Args>(weight_w4a16(weight, bias));
           }),
           py::arg("weight"), py::arg("bias"));
  bind_codes<GemmW4A8Args>(m, "LinearW4A8")
      .def(py::init([](const py::tuple& weight, Address bias, bool symmetric, Address inv_smooth, Address static_scale,
                       Address static_zero_point) {
             return CodeLayer<GemmW4A8Args>(weight_w4a8(weight, bias), symmetric, inv_smooth, static_scale,
                                            static_zero_point, true);
           }),
           py::arg("weight"), py::arg("bias"), py::arg("symmetric"), py::arg("inv_smooth"), py::arg("static_scale"),
           py::arg("static_zero_point"));
  m.def("packed_w4_bytes", &packed_w4_bytes, py::arg("n"), py::arg("k"));
  m.def("w4_group_pitch", [](int64_t n) { return w4_blocks(n) * kW4Rows; }, py::arg("n"));
  m.def(
      "pack_w4",
      [](Address weight, int64_t n, int64_t k, int order, Address packed, Address stream) {
        QK_CHECK_GE(n, 1);
        QK_CHECK_GE(k, 1);
        pack_w4(pointer<const uint8_t>(weight), n, k, order_of(order), pointer<uint8_t>(packed), stream_of(stream));
      },
      py::arg("weight"), py::arg("n"), py::arg("k"), py::arg("order"), py::arg("packed"), py::arg("stream"));
  m.def(
      "unpack_w4",
      [](Address packed, int64_t n, int64_t k, int order, Address weight, Address stream) {
        QK_CHECK_GE(n, 1);
        QK_CHECK_GE(k, 1);
        unpack_w4(pointer<const uint8_t>(packed), n, k, order_of(order), pointer<uint8_t>(weight), stream_of(stream));
      },
      py::arg("packed"), py::arg("n"), py::arg("k"), py::arg("order"), py::arg("weight"), py::arg("stream"));
  m.def(
      "dequantize_w4",
      [](const py::tuple& weight, int64_t first_row, int64_t rows, Address out, int out_dtype, Address stream) {
        const W4Weight w = weight_of(weight);
        QK_CHECK_EQ(first_row % kW4Rows, int64_t{0});
        QK_CHECK_LE(first_row + rows, int64_t{w.n});
        dequantize_w4(w, first_row, rows, pointer<void>(out), dtype(out_dtype), stream_of(stream));
      },
      py::arg("weight"), py::arg("first_row"), py::arg("rows"), py::arg("out"), py::arg("out_dtype"),
      py::arg("stream"));
  m.def("plan_w4", &plan, py::arg("bytes"), py::arg("m"), py::arg("n"), py::arg("k"), py::arg("group"), py::arg("kind"),
        py::arg("capability"), py::arg("sms"));
  m.def("gemm_w4a16", &gemm_w4a16_at, py::arg("weight"), py::arg("x"), py::arg("x_dtype"), py::arg("m"),
        py::arg("x_stride"), py::arg("bias"), py::arg("y"), py::arg("y_dtype"), py::arg("y_stride"), py::arg("plan"),
        py::arg("counters"), py::arg("partials"), py::arg("dependent"), py::arg("stream"));
  m.def("gemm_w4a8", &gemm_w4a8_at, py::arg("weight"), py::arg("xq"), py::arg("m"), py::arg("x_stride"),
        py::arg("x_scale"), py::arg("x_zero_point"), py::arg("bias"), py::arg("y"), py::arg("y_dtype"),
        py::arg("y_stride"), py::arg("plan"), py::arg("dependent"), py::arg("stream"));
}

}  // namespace qk::cuda
