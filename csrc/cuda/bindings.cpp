// The module qkernels._cuda: pointers, sizes and a stream in, launches out. Importing it touches no GPU.
//
// Pointers and streams are integers (tensor.data_ptr(), torch.cuda.Stream.cuda_stream); dtype codes are those of
// args.h. Nothing here allocates or synchronises, and every check of a tensor lives in Python.
#include "bindings.h"

#include "bindings_layers.h"
#include "host.h"
#include "launch.h"

namespace py = pybind11;

namespace qk::cuda {
namespace {

W8A8Config config_of(const py::tuple& values) {
  QK_CHECK_EQ(values.size(), size_t{6});
  return W8A8Config{static_cast<W8A8Kernel>(values[0].cast<int>()),
                    values[1].cast<int>(),
                    values[2].cast<int>(),
                    values[3].cast<int>(),
                    values[4].cast<int>(),
                    values[5].cast<int>()};
}

py::tuple select(int64_t m, int64_t n, int64_t k, int capability, int sms) {
  const W8A8Config c = select_w8a8(m, n, k, capability, sms);
  return py::make_tuple(static_cast<int>(c.kernel), c.tile, c.split, c.share, c.deep, c.channels);
}

void quantize_rows_at(Address x, int x_dtype, int64_t m, int64_t k, int64_t x_stride, Address q, int64_t q_stride,
                      Address scale, Address zero_point, Address inv_smooth, Address static_scale,
                      Address static_zero_point, bool shifted, bool dependent, bool settled, Address stream) {
  QK_CHECK_GE(m, 0);
  QK_CHECK_GE(k, 1);
  QuantizeRowsArgs a = {};
  a.x = pointer<const void>(x), a.x_dtype = dtype(x_dtype), a.m = m, a.k = k, a.x_stride = x_stride;
  a.q = pointer<int8_t>(q), a.q_stride = q_stride, a.scale = pointer<float>(scale);
  a.zero_point = pointer<int32_t>(zero_point), a.inv_smooth = pointer<const float>(inv_smooth);
  a.is_static = static_scale != 0, a.static_scale = pointer<const float>(static_scale);
  a.static_zero_point = pointer<const int32_t>(static_zero_point);
  a.shifted = shifted, a.dependent = dependent, a.settled = settled && m <= kSettledRows;
  quantize_rows(a, stream_of(stream));
}

// What a layer of 8-bit weights keeps.
GemmW8A8Args weight_w8a8(Address packed, int64_t slab_rows, Address colsum, Address weight_scale, Address bias,
                         int64_t n, int64_t k) {
  QK_CHECK_GE(n, 1);
  QK_CHECK_LE(n, int64_t{0x7fffff00});
  QK_CHECK_GE(k, 1);
  QK_CHECK_LE(k, int64_t{65536});
  QK_CHECK_EQ(packed % 128, Address{0});
  QK_CHECK_GE(slab_rows, packed_rows(n));
  QK_CHECK_EQ(slab_rows % kAtomRows, int64_t{0});
  GemmW8A8Args a = {};
  a.packed = pointer<const int8_t>(packed), a.slab_rows = slab_rows;
  a.colsum = pointer<const int32_t>(colsum), a.weight_scale = pointer<const float>(weight_scale);
  a.bias = pointer<const float>(bias);
  a.n = static_cast<int32_t>(n), a.k = static_cast<int32_t>(k);
  return a;
}

void gemm_at(Address xq, int64_t x_stride, Address x_scale, Address x_zero_point, Address packed, int64_t slab_rows,
             Address colsum, Address weight_scale, Address bias, int64_t m, int64_t n, int64_t k, Address y,
             int y_dtype, int64_t y_stride, const py::tuple& config, bool dependent, Address stream) {
  GemmW8A8Args a = weight_w8a8(packed, slab_rows, colsum, weight_scale, bias, n, k);
  put_codes(a, xq, m, x_stride, x_scale, x_zero_point, y, y_dtype, y_stride);
  gemm_w8a8(a, config_of(config), dependent, stream_of(stream));
}

// 0 where the stream is not being captured, else a number of this capture alone.
uint64_t capture_id(Address stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;  // the runtime's own type
  check(cudaStreamGetCaptureInfo(stream_of(stream), &status, &id), "cudaStreamGetCaptureInfo");
  return status == cudaStreamCaptureStatusActive ? id : 0;
}

void quantize_at(Address x, int x_dtype, int64_t outer, int64_t channels, int64_t inner, int64_t group, Address q,
                 int kind, Address scale, Address zero_point, bool symmetric, bool is_static, Address stats,
                 Address stream) {
  QK_CHECK_GE(kind, 0);
  QK_CHECK_LE(kind, 2);
  QuantizeArgs a = {};
  a.x = pointer<const void>(x), a.x_dtype = dtype(x_dtype);
  a.outer = outer, a.channels = channels, a.inner = inner, a.group = group;
  a.q = pointer<void>(q), a.kind = static_cast<QKind>(kind), a.scale = pointer<float>(scale);
  a.zero_point = pointer<int32_t>(zero_point), a.symmetric = symmetric, a.is_static = is_static;
  quantize(a, pointer<uint32_t>(stats), stream_of(stream));
}

void dequantize_at(Address q, int kind, int64_t outer, int64_t channels, int64_t inner, int64_t group, Address scale,
                   Address zero_point, Address out, int out_dtype, Address stream) {
  QK_CHECK_GE(kind, 0);
  QK_CHECK_LE(kind, 2);
  DequantizeArgs a = {};
  a.q = pointer<const void>(q), a.kind = static_cast<QKind>(kind);
  a.outer = outer, a.channels = channels, a.inner = inner, a.group = group;
  a.scale = pointer<const float>(scale), a.zero_point = pointer<const int32_t>(zero_point);
  a.out = pointer<void>(out), a.out_dtype = dtype(out_dtype);
  dequantize(a, stream_of(stream));
}

}  // namespace

QuantizeRowsArgs grid_of(bool symmetric, Address inv_smooth, Address static_scale, Address static_zero_point) {
  QK_CHECK_EQ(symmetric && static_zero_point, false);
  QuantizeRowsArgs a = {};
  a.inv_smooth = pointer<const float>(inv_smooth);
  a.is_static = static_scale != 0, a.static_scale = pointer<const float>(static_scale);
  a.static_zero_point = pointer<const int32_t>(static_zero_point);
  a.shifted = true;
  return a;
}

void multiply(const GemmW8A8Args& a, int capability, cudaStream_t stream) {
  gemm_w8a8(a, select_w8a8(a.m, a.n, a.k, capability, multiprocessors()), capability >= 90, stream);
}

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of qkernels. Pointers are integers; every launch is on the given stream.";
  m.def("has_sm90a", &has_sm90a);
  m.def("device_capability", &device_capability);
  m.def("multiprocessors", &multiprocessors);
  m.def("packed_w8_bytes", &packed_w8_bytes, py::arg("n"), py::arg("k"));
  m.def("select_w8a8", &select, py::arg("m"), py::arg("n"), py::arg("k"), py::arg("capability"), py::arg("sms"));
  m.def(
      "pack_w8",
      [](Address weight, int64_t n, int64_t k, int layout, Address packed, Address colsum, Address stream) {
        QK_CHECK_GE(n, 1);
        QK_CHECK_GE(k, 1);
        pack_w8(pointer<const int8_t>(weight), n, k, w8_layout(layout), pointer<int8_t>(packed),
                pointer<int32_t>(colsum), stream_of(stream));
      },
      py::arg("weight"), py::arg("n"), py::arg("k"), py::arg("layout"), py::arg("packed"), py::arg("colsum"),
      py::arg("stream"));
  m.def(
      "unpack_w8",
      [](Address packed, int64_t n, int64_t k, int layout, Address weight, Address stream) {
        QK_CHECK_GE(n, 1);
        QK_CHECK_GE(k, 1);
        unpack_w8(pointer<const int8_t>(packed), n, k, w8_layout(layout), pointer<int8_t>(weight), stream_of(stream));
      },
      py::arg("packed"), py::arg("n"), py::arg("k"), py::arg("layout"), py::arg("weight"), py::arg("stream"));
  m.def("quantize_rows", &quantize_rows_at, py::arg("x"), py::arg("x_dtype"), py::arg("m"), py::arg("k"),
        py::arg("x_stride"), py::arg("q"), py::arg("q_stride"), py::arg("scale"), py::arg("zero_point"),
        py::arg("inv_smooth"), py::arg("static_scale"), py::arg("static_zero_point"), py::arg("shifted"),
        py::arg("dependent"), py::arg("settled"), py::arg("stream"));
  m.def("gemm_w8a8", &gemm_at, py::arg("xq"), py::arg("x_stride"), py::arg("x_scale"), py::arg("x_zero_point"),
        py::arg("packed"), py::arg("slab_rows"), py::arg("colsum"), py::arg("weight_scale"), py::arg("bias"),
        py::arg("m"), py::arg("n"), py::arg("k"), py::arg("y"), py::arg("y_dtype"), py::arg("y_stride"),
        py::arg("config"), py::arg("dependent"), py::arg("stream"));
#ifdef QK_CUDA_SM90A
  m.def(
      "peak_s8",
      [](Address random, int iterations, Address sink, Address stream) {
        return peak_s8(pointer<const void>(random), iterations, pointer<int32_t>(sink), stream_of(stream));
      },
      py::arg("random"), py::arg("iterations"), py::arg("sink"), py::arg("stream"));
#endif
  m.def("capture_id", &capture_id, py::arg("stream"));
  m.def("workspace_bytes", &workspace_bytes, py::arg("m"), py::arg("k"));
  bind_codes<GemmW8A8Args>(m, "LinearW8A8")
      .def(py::init([](Address packed, int64_t slab_rows, Address colsum, Address weight_scale, Address bias, int64_t n,
                       int64_t k, bool symmetric, Address inv_smooth, Address static_scale, Address static_zero_point,
                       bool settled) {
             return CodeLayer<GemmW8A8Args>(weight_w8a8(packed, slab_rows, colsum, weight_scale, bias, n, k), symmetric,
                                            inv_smooth, static_scale, static_zero_point, settled);
           }),
           py::arg("packed"), py::arg("slab_rows"), py::arg("colsum"), py::arg("weight_scale"), py::arg("bias"),
           py::arg("n"), py::arg("k"), py::arg("symmetric"), py::arg("inv_smooth"), py::arg("static_scale"),
           py::arg("static_zero_point"), py::arg("settled"));
  m.def("quantize", &quantize_at, py::arg("x"), py::arg("x_dtype"), py::arg("outer"), py::arg("channels"),
        py::arg("inner"), py::arg("group"), py::arg("q"), py::arg("kind"), py::arg("scale"), py::arg("zero_point"),
        py::arg("symmetric"), py::arg("is_static"), py::arg("stats"), py::arg("stream"));
  m.def("dequantize", &dequantize_at, py::arg("q"), py::arg("kind"), py::arg("outer"), py::arg("channels"),
        py::arg("inner"), py::arg("group"), py::arg("scale"), py::arg("zero_point"), py::arg("out"),
        py::arg("out_dtype"), py::arg("stream"));
  bind_w4(m);
  bind_w8a16(m);
  bind_rows(m);
  bind_attention(m);
}

}  // namespace qk::cuda
