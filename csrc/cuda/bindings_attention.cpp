// Bindings of what stands between the Linears of an attention block. Where a tensor of heads
// lies is (elements from one batch, head and token to the next). Other arguments as in bindings.cpp.
#include "attention.h"
#include "bindings.h"
#include "launch.h"

namespace py = pybind11;

namespace qk::cuda {
namespace {

HeadStrides strides_of(const py::tuple& steps) {
  QK_CHECK_EQ(steps.size(), size_t{3});
  return {steps[0].cast<int64_t>(), steps[1].cast<int64_t>(), steps[2].cast<int64_t>()};
}

// (batch, heads, heads of keys, tokens, features of a head)
template <typename Args>
void put_sizes(const py::tuple& sizes, Args& a) {
  QK_CHECK_EQ(sizes.size(), size_t{5});
  a.batch = sizes[0].cast<int>(), a.heads = sizes[1].cast<int>(), a.key_heads = sizes[2].cast<int>();
  a.tokens = sizes[3].cast<int>(), a.size = sizes[4].cast<int>();
  for (const int size : {a.batch, a.heads, a.key_heads, a.tokens, a.size}) QK_CHECK_GE(size, 1);
}

// What calls over tensors of one shape and layout have in common is an object.
class Rotary {
 public:
  Rotary(const py::tuple& sizes, const py::tuple& q, const py::tuple& k, const py::tuple& q_out, const py::tuple& k_out,
         const py::tuple& angles, bool dependent) {
    put_sizes(sizes, args_);
    QK_CHECK_EQ(args_.size % 2, 0);
    args_.q_at = strides_of(q), args_.k_at = strides_of(k);
    args_.q_out_at = strides_of(q_out), args_.k_out_at = strides_of(k_out);
    args_.angles = strides_of(angles), args_.dependent = dependent;
  }

  void run(int x_dtype, Address q, Address k, Address cos, Address sin, Address q_out, Address k_out,
           Address stream) const {
    RotaryArgs a = args_;
    a.dtype = dtype(x_dtype), a.q = pointer<const void>(q), a.k = pointer<const void>(k);
    a.cos = pointer<const void>(cos), a.sin = pointer<const void>(sin);
    a.q_out = pointer<void>(q_out), a.k_out = pointer<void>(k_out);
    rotary(a, stream_of(stream));
  }

 private:
  RotaryArgs args_ = {};
};

class Attention {
 public:
  // `plan` as plan_attention gives it.
  Attention(const py::tuple& sizes, int64_t length, const py::tuple& q, const py::tuple& k, const py::tuple& v,
            const py::tuple& out, const py::tuple& mask, const py::tuple& plan, bool dependent) {
    AttentionArgs& a = args_;
    put_sizes(sizes, a);
    QK_CHECK_EQ(a.heads % a.key_heads, 0);
    QK_CHECK_GE(length, 0);
    a.length = length, a.dependent = dependent;
    a.q_at = strides_of(q), a.k_at = strides_of(k), a.v_at = strides_of(v), a.out_at = strides_of(out);
    a.mask_at = strides_of(mask);
    QK_CHECK_EQ(plan.size(), size_t{4});
    a.parts = plan[0].cast<int>(), a.part = plan[1].cast<int64_t>();
    a.clustered = a.parts > 1 && plan[2].cast<int64_t>() == 0;
    QK_CHECK_GE(a.parts, 1);
    QK_CHECK_GE(a.parts * a.part, length);
  }

  // `mask` 0: every key is seen.
  void run(int x_dtype, Address q, Address k, Address v, Address mask, Address out, float scale, Address counters,
           Address partial, Address stream) const {
    AttentionArgs a = args_;
    a.dtype = dtype(x_dtype), a.scale = scale, a.q = pointer<const void>(q), a.k = pointer<const void>(k);
    a.v = pointer<const void>(v), a.mask = pointer<const uint8_t>(mask), a.out = pointer<void>(out);
    a.counters = pointer<int32_t>(counters), a.partial = pointer<float>(partial);
    attention(a, stream_of(stream));
  }

 private:
  AttentionArgs args_ = {};
};

class Append {
 public:
  // `sizes`: batch, heads, tokens, bytes of a key and of a value of one head, tokens that the cache has room for; then
  // strides in bytes.
  Append(const py::tuple& sizes, const py::tuple& key, const py::tuple& value, const py::tuple& keys,
         const py::tuple& values, bool dependent) {
    QK_CHECK_EQ(sizes.size(), size_t{6});
    AppendArgs& a = args_;
    a.batch = sizes[0].cast<int>(), a.heads = sizes[1].cast<int>(), a.tokens = sizes[2].cast<int>();
    a.key_bytes = sizes[3].cast<int>(), a.value_bytes = sizes[4].cast<int>(), a.capacity = sizes[5].cast<int64_t>();
    for (const int size : {a.batch, a.heads, a.tokens, a.key_bytes, a.value_bytes}) QK_CHECK_GE(size, 1);
    a.key_at = strides_of(key), a.value_at = strides_of(value);
    a.keys_at = strides_of(keys), a.values_at = strides_of(values);
    int64_t all = a.key_bytes | a.value_bytes;
    for (const HeadStrides& at : {a.key_at, a.value_at, a.keys_at, a.values_at}) all |= at.batch | at.head | at.token;
    QK_CHECK_EQ(all % 16, int64_t{0});
    a.dependent = dependent;
  }

  void run(Address key, Address value, Address keys, Address values, Address length, Address counter,
           Address stream) const {
    QK_CHECK_EQ((key | value | keys | values) % 16, Address{0});
    AppendArgs a = args_;
    a.key = pointer<const void>(key), a.value = pointer<const void>(value);
    a.keys = pointer<void>(keys), a.values = pointer<void>(values);
    a.length = pointer<int64_t>(length), a.counter = pointer<int32_t>(counter);
    append(a, stream_of(stream));
  }

 private:
  AppendArgs args_ = {};
};

py::tuple plan_attention_of(const py::tuple& sizes, int64_t length, int capability, int sms) {
  AttentionArgs a = {};
  put_sizes(sizes, a);
  const AttentionPlan p = plan_attention(a.batch, a.heads, a.key_heads, a.tokens, a.size, length, capability, sms);
  return py::make_tuple(p.parts, p.part, p.counters, p.floats);
}

}  // namespace

void bind_attention(py::module_& m) {
  py::class_<Rotary>(m, "Rotary")
      .def(py::init<py::tuple, py::tuple, py::tuple, py::tuple, py::tuple, py::tuple, bool>(), py::arg("sizes"),
           py::arg("q"), py::arg("k"), py::arg("q_out"), py::arg("k_out"), py::arg("angles"), py::arg("dependent"))
      .def("run", &Rotary::run, py::arg("dtype"), py::arg("q"), py::arg("k"), py::arg("cos"), py::arg("sin"),
           py::arg("q_out"), py::arg("k_out"), py::arg("stream"));
  py::class_<Attention>(m, "Attention")
      .def(py::init<py::tuple, int64_t, py::tuple, py::tuple, py::tuple, py::tuple, py::tuple, py::tuple, bool>(),
           py::arg("sizes"), py::arg("length"), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("out"),
           py::arg("mask"), py::arg("plan"), py::arg("dependent"))
      .def("run", &Attention::run, py::arg("dtype"), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("mask"),
           py::arg("out"), py::arg("scale"), py::arg("counters"), py::arg("partial"), py::arg("stream"));
  py::class_<Append>(m, "Append")
      .def(py::init<py::tuple, py::tuple, py::tuple, py::tuple, py::tuple, bool>(), py::arg("sizes"), py::arg("key"),
           py::arg("value"), py::arg("keys"), py::arg("values"), py::arg("dependent"))
      .def("run", &Append::run, py::arg("key"), py::arg("value"), py::arg("keys"), py::arg("values"), py::arg("length"),
           py::arg("counter"), py::arg("stream"));
  m.def("plan_attention", &plan_attention_of, py::arg("sizes"), py::arg("length"), py::arg("capability"),
        py::arg("sms"));
}

}  // namespace qk::cuda
