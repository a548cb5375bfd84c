// 4-bit weights: addresses, sizes and a stream in, launches out; rules as in bindings.cpp.
#include "bindings.h"

#include "host.h"
#include "launch.h"
#include "launch_w4.h"

namespace py = pybind11;

namespace qk::cuda {
namespace {

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
  QK_CHECK_EQ(v.size(), size_t{6});
  const int kernel = v[0].cast<int>();
  QK_CHECK_GE(kernel, 0);
  QK_CHECK_LE(kernel, 1);
  W4Plan p = {static_cast<W4Kernel>(kernel), v[1].cast<int32_t>(), v[2].cast<int32_t>(),
              v[3].cast<int32_t>(),          v[4].cast<int64_t>(), v[5].cast<int64_t>()};
  QK_CHECK_GE(p.ctas, 0);
  return p;
}

py::tuple tuple_of(const W4Plan& p) {
  return py::make_tuple(static_cast<int>(p.kernel), p.tokens, p.phases, p.ctas, p.counters, p.partial_floats);
}

namespace {

py::tuple plan(bool bytes, int64_t m, int64_t n, int64_t k, int64_t group, int kind, int capability, int sms) {
  QK_CHECK_GE(kind, 0);
  QK_CHECK_LE(kind, 3);
  const auto as = static_cast<W4Kind>(kind);
  return tuple_of(bytes ? plan_w4a8(m, n, k, group, as, capability, sms) : plan_w4a16(m, n, k, as, capability, sms));
}

void gemm_w4a16_at(const py::tuple& weight, Address x, int x_dtype, int64_t m, int64_t x_stride, Address bias,
                   Address y, int y_dtype, int64_t y_stride, const py::tuple& plan, Address counters, Address partials,
                   bool dependent, Address stream) {
  GemmW4A16Args a = {};
  a.weight = weight_of(weight);
  QK_CHECK_EQ(static_cast<int>(a.weight.order), 0);
  QK_CHECK_GE(m, 0);
  QK_CHECK_LE(m, int64_t{0x7fffff00});
  QK_CHECK_EQ(x % 16, Address{0});
  QK_CHECK_EQ(x_stride % 8, 0);
  QK_CHECK_GE(x_dtype, 1);
  a.x = pointer<const void>(x), a.x_dtype = dtype(x_dtype), a.x_stride = x_stride;
  a.bias = pointer<const float>(bias), a.m = static_cast<int32_t>(m);
  a.y = pointer<void>(y), a.y_dtype = dtype(y_dtype), a.y_stride = y_stride;
  a.counters = pointer<int32_t>(counters), a.partials = pointer<float>(partials);
  gemm_w4a16(a, plan_of(plan), dependent, stream_of(stream));
}

void gemm_w4a8_at(const py::tuple& weight, Address xq, int64_t m, int64_t x_stride, Address x_scale,
                  Address x_zero_point, Address bias, Address y, int y_dtype, int64_t y_stride, const py::tuple& plan,
                  bool dependent, Address stream) {
  GemmW4A8Args a = {};
  a.weight = weight_of(weight);
  QK_CHECK_EQ(static_cast<int>(a.weight.order), 1);
  QK_CHECK_GE(m, 0);
  QK_CHECK_LE(m, int64_t{0x7fffff00});
  QK_CHECK_EQ(xq % 16, Address{0});
  QK_CHECK_EQ(x_stride % 16, 0);
  a.xq = pointer<const int8_t>(xq), a.x_stride = x_stride, a.x_scale = pointer<const float>(x_scale);
  a.x_zero_point = pointer<const int32_t>(x_zero_point);
  a.channel_sum = pointer<const int32_t>(weight[12].cast<Address>());
  a.bias = pointer<const float>(bias), a.m = static_cast<int32_t>(m);
  a.y = pointer<void>(y), a.y_dtype = dtype(y_dtype), a.y_stride = y_stride;
  const W4Plan p = plan_of(plan);
  if (a.x_zero_point && a.weight.kind != W4Kind::kMultiplier && p.kernel != W4Kernel::kMma) {
    throw std::invalid_argument("plan: expected the mma.sync kernel beside x_zero_point, got the wgmma kernel");
  }
  if (a.x_zero_point && a.weight.kind == W4Kind::kMultiplier && !a.channel_sum) {
    throw std::invalid_argument("weight: expected sums of channels beside multipliers and x_zero_point, got none");
  }
  gemm_w4a8(a, p, dependent, stream_of(stream));
}

// 0 where the stream is not being captured, else a number of this capture alone.
uint64_t capture_id(Address stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;  // the runtime's own type
  check(cudaStreamGetCaptureInfo(stream_of(stream), &status, &id), "cudaStreamGetCaptureInfo");
  return status == cudaStreamCaptureStatusActive ? id : 0;
}

}  // namespace

void bind_w4(py::module_& m) {
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
  m.def("capture_id", &capture_id, py::arg("stream"));
}

}  // namespace qk::cuda
