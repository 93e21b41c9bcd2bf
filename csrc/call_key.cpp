#include "call_key.h"

#include <ATen/autocast_mode.h>
#include <ATen/record_function.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/Size.h>
#include <torch/csrc/autograd/python_variable.h>

#include <array>
#include <cstdlib>
#include <string>
#include <vector>

namespace py = pybind11;

namespace bbfast {
namespace {

// Addresses that are multiples of it are specialised by Triton.
constexpr uintptr_t ALIGNMENT = 16;

// What tensors look like goes into bytes, constants into a list behind them: Python knows how to compare those.
class Writer {
 public:
  // False for what can not be told from others.
  bool write(PyObject* value) {
    if (THPVariable_CheckExact(value)) return write(THPVariable_Unpack(value));
    if (PyTuple_CheckExact(value) || PyList_CheckExact(value) || THPSize_Check(value)) {
      const Py_ssize_t size = PySequence_Fast_GET_SIZE(value);
      tag('(');
      write(static_cast<int64_t>(size));
      for (Py_ssize_t i = 0; i < size; ++i) {
        if (!write_constant(PySequence_Fast_GET_ITEM(value, i))) return false;
      }
      return true;
    }
    return write_constant(value);
  }

  void write(int64_t number) { bytes_.append(reinterpret_cast<const char*>(&number), sizeof(number)); }

  void write(const char* text) { bytes_.append(text).push_back('\0'); }

  void append(PyObject* constant) { constants_.append(py::handle(constant)); }

  py::object key() {
    constants_.append(py::bytes(bytes_));
    return py::tuple(std::move(constants_));
  }

 private:
  bool write_constant(PyObject* value) {
    if (value == Py_None) return tag('n');
    if (value == Py_True) return tag('t');
    if (value == Py_False) return tag('f');
    const bool is_int = PyLong_CheckExact(value), is_float = PyFloat_CheckExact(value);  // 1 and 1.0 are equal
    if (!is_int && !is_float && !PyUnicode_CheckExact(value) && !THPDtype_Check(value)) return false;
    append(value);
    return tag(is_int ? 'i' : is_float ? 'd' : 'c');
  }

  bool write(const at::Tensor& t) {
    if (!is_plain(t) || (t.requires_grad() && at::GradMode::is_enabled())) return false;
    const auto address = reinterpret_cast<uintptr_t>(t.data_ptr());
    if (address == 0) return false;
    tag('T');
    write(static_cast<int64_t>(t.scalar_type()));
    write(static_cast<int64_t>(t.device().type()));
    write(static_cast<int64_t>(t.device().index()));
    write(static_cast<int64_t>(address % ALIGNMENT));
    write(place(address));
    write(t.dim());
    for (const int64_t size : t.sizes()) write(size);
    for (const int64_t stride : t.strides()) write(stride);
    return true;
  }

  // Dense memory of the CPU or a CUDA device that holds the values as they are: nothing negated or conjugated when read,
  // batched, functionalised or fake.
  static bool is_plain(const at::Tensor& t) {
    const c10::DispatchKeySet usual = c10::autograd_dispatch_keyset_with_ADInplaceOrView | c10::autocast_dispatch_keyset;
    const c10::DispatchKey first = (t.key_set() - usual).highestPriorityTypeId();
    return t.layout() == at::kStrided && (first == c10::DispatchKey::CUDA || first == c10::DispatchKey::CPU);
  }

  // Which tensors are one and the same counts, because launches tell tensors by their addresses.
  int64_t place(uintptr_t address) {
    for (size_t i = 0; i < addresses_.size(); ++i) {
      if (addresses_[i] == address) return static_cast<int64_t>(i);
    }
    addresses_.push_back(address);
    return static_cast<int64_t>(addresses_.size()) - 1;
  }

  bool tag(char kind) {
    bytes_.push_back(kind);
    return true;
  }

  std::string bytes_;
  std::vector<uintptr_t> addresses_;
  py::list constants_;
};

// Whether calls of torch's operators are traced, transformed or counted in this thread.
bool is_watched() {
  const c10::DispatchKeySet ordinary({c10::DispatchKey::BackendSelect, c10::DispatchKey::ADInplaceOrView});
  return !(c10::impl::tls_local_dispatch_key_set().included_ - ordinary).empty() || at::hasCallbacks();
}

}  // namespace

py::object call_key(const py::tuple& args, const py::dict& kwargs, int64_t generation) {
  PyObject* first = args.empty() ? nullptr : PyTuple_GET_ITEM(args.ptr(), 0);
  if (first == nullptr || !THPVariable_CheckExact(first) || is_watched()) return py::none();
  Writer writer;
  writer.write(generation);

  const at::DeviceType device = THPVariable_Unpack(first).device().type();
  const bool casts = at::autocast::is_autocast_available(device) && at::autocast::is_autocast_enabled(device);
  writer.write(casts ? static_cast<int64_t>(at::autocast::get_autocast_dtype(device)) : -1);
  const char* backend = std::getenv("BBFAST_BACKEND");
  writer.write(backend == nullptr ? "auto" : backend);

  for (const py::handle value : args) {
    if (!writer.write(value.ptr())) return py::none();
  }
  PyObject *name, *value;
  Py_ssize_t position = 0;
  while (PyDict_Next(kwargs.ptr(), &position, &name, &value)) {
    writer.append(name);
    if (!writer.write(value)) return py::none();
  }
  return writer.key();
}

}  // namespace bbfast
