// Bindings of what stands between the Linears of an attention block. A tensor of heads is (address, elements from one
// batch, head and token to the next). Other arguments as in bindings.cpp.
#include "attention.h"
#include "bindings.h"
#include "launch.h"

namespace py = pybind11;

namespace qk::cuda {
namespace {

template <typename T>
void put(const py::tuple& heads, T*& data, HeadStrides& at) {
  QK_CHECK_EQ(heads.size(), size_t{4});
  data = pointer<T>(heads[0].cast<Address>());
  at = {heads[1].cast<int64_t>(), heads[2].cast<int64_t>(), heads[3].cast<int64_t>()};
}

// (batch, heads, heads of keys, tokens, features of a head)
template <typename Args>
void put_sizes(const py::tuple& sizes, Args& a) {
  QK_CHECK_EQ(sizes.size(), size_t{5});
  a.batch = sizes[0].cast<int>(), a.heads = sizes[1].cast<int>(), a.key_heads = sizes[2].cast<int>();
  a.tokens = sizes[3].cast<int>(), a.size = sizes[4].cast<int>();
  for (const int size : {a.batch, a.heads, a.key_heads, a.tokens, a.size}) QK_CHECK_GE(size, 1);
}

void rotary_at(int x_dtype, const py::tuple& sizes, const py::tuple& q, const py::tuple& k, const py::tuple& q_out,
               const py::tuple& k_out, Address cos, Address sin, int64_t angle_batch, int64_t angle_token,
               bool dependent, Address stream) {
  RotaryArgs a = {};
  a.dtype = dtype(x_dtype), a.dependent = dependent;
  put_sizes(sizes, a);
  QK_CHECK_EQ(a.size % 2, 0);
  put(q, a.q, a.q_at), put(k, a.k, a.k_at), put(q_out, a.q_out, a.q_out_at), put(k_out, a.k_out, a.k_out_at);
  a.cos = pointer<const void>(cos), a.sin = pointer<const void>(sin), a.angles = {angle_batch, 0, angle_token};
  rotary(a, stream_of(stream));
}

void attention_at(int x_dtype, const py::tuple& sizes, int64_t length, const py::tuple& q, const py::tuple& k,
                  const py::tuple& v, const py::tuple& out, const py::tuple& mask, float scale, const py::tuple& plan,
                  Address counters, Address partial, bool dependent, Address stream) {
  AttentionArgs a = {};
  a.dtype = dtype(x_dtype), a.length = length, a.scale = scale, a.dependent = dependent;
  put_sizes(sizes, a);
  QK_CHECK_EQ(a.heads % a.key_heads, 0);
  QK_CHECK_GE(length, 0);
  put(q, a.q, a.q_at), put(k, a.k, a.k_at), put(v, a.v, a.v_at), put(out, a.out, a.out_at);
  put(mask, a.mask, a.mask_at);
  QK_CHECK_EQ(plan.size(), size_t{4});
  a.parts = plan[0].cast<int>(), a.part = plan[1].cast<int64_t>();
  QK_CHECK_GE(a.parts, 1);
  QK_CHECK_GE(a.parts * a.part, length);
  a.counters = pointer<int32_t>(counters), a.partial = pointer<float>(partial);
  attention(a, stream_of(stream));
}

py::tuple plan_attention_of(const py::tuple& sizes, int64_t length, int sms) {
  AttentionArgs a = {};
  put_sizes(sizes, a);
  const AttentionPlan p = plan_attention(a.batch, a.heads, a.key_heads, a.tokens, a.size, length, sms);
  return py::make_tuple(p.parts, p.part, p.counters, p.floats);
}

}  // namespace

void bind_attention(py::module_& m) {
  m.def("rotary", &rotary_at, py::arg("dtype"), py::arg("sizes"), py::arg("q"), py::arg("k"), py::arg("q_out"),
        py::arg("k_out"), py::arg("cos"), py::arg("sin"), py::arg("angle_batch"), py::arg("angle_token"),
        py::arg("dependent"), py::arg("stream"));
  m.def("attention", &attention_at, py::arg("dtype"), py::arg("sizes"), py::arg("length"), py::arg("q"), py::arg("k"),
        py::arg("v"), py::arg("out"), py::arg("mask"), py::arg("scale"), py::arg("plan"), py::arg("counters"),
        py::arg("partial"), py::arg("dependent"), py::arg("stream"));
  m.def("plan_attention", &plan_attention_of, py::arg("sizes"), py::arg("length"), py::arg("sms"));
}

}  // namespace qk::cuda
