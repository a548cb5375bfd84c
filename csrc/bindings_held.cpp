// Tensors whose addresses a native object borrowed: whether a layer still holds them, and they are where they were.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "bindings.h"

namespace py = pybind11;

namespace {

// A call of a layer asks this first. In Python it would take longer than the rest of what stands before a launch. It
// refers to the tensors weakly: whoever replaces them gets their memory back at once.
class Held {
 public:
  // Those of `tensors` under `names`; a name that is missing counts as None.
  Held(const py::dict& tensors, const py::tuple& names) {
    for (const py::handle name : names) {
      PyObject* tensor = entry(tensors, name);
      Entry e = {py::reinterpret_borrow<py::object>(name), py::none(), 0};
      if (tensor != Py_None) e.address = address(tensor), e.reference = py::weakref(tensor);
      entries_.push_back(std::move(e));
    }
  }

  bool holds(const py::dict& tensors) const {
    for (const Entry& e : entries_) {
      PyObject* tensor = entry(tensors, e.name);
      if (e.reference.is_none() || tensor == Py_None) {
        if (!e.reference.is_none() || tensor != Py_None) return false;
      } else if (!refers(e.reference, tensor) || address(tensor) != e.address) {
        return false;
      }
    }
    return true;
  }

 private:
  struct Entry {
    py::object name, reference;  // None where there was no tensor
    uintptr_t address;
  };

  static bool refers(const py::object& reference, PyObject* tensor) {
#if PY_VERSION_HEX >= 0x030D0000
    PyObject* found = nullptr;
    if (PyWeakref_GetRef(reference.ptr(), &found) < 0) throw py::error_already_set();
    Py_XDECREF(found);  // `tensor` is somebody's
    return found == tensor;
#else
    return PyWeakref_GET_OBJECT(reference.ptr()) == tensor;
#endif
  }

  static PyObject* entry(const py::dict& tensors, const py::handle name) {
    PyObject* found = PyDict_GetItemWithError(tensors.ptr(), name.ptr());  // borrowed
    if (found) return found;
    if (PyErr_Occurred()) throw py::error_already_set();
    return Py_None;
  }

  static uintptr_t address(PyObject* tensor) {
    static PyObject* const method = PyUnicode_InternFromString("data_ptr");
    const auto owner = py::reinterpret_borrow<py::object>(tensor);  // Python may run in the call
    const auto value = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor, method));
    if (!value) throw py::error_already_set();
    return value.cast<uintptr_t>();
  }

  std::vector<Entry> entries_;
};

}  // namespace

void bind_held(py::module_& m) {
  py::class_<Held>(m, "Held")
      .def(py::init<py::dict, py::tuple>(), py::arg("tensors"), py::arg("names"))
      .def("holds", &Held::holds, py::arg("tensors"));
}
