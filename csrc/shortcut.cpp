#include "shortcut.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/record_function.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <array>
#include <cmath>
#include <optional>
#include <string>

#include "depthwise_conv_bn_act.h"
#include "grouped_conv_bn_act.h"
#include "im2col_conv_bn_act.h"
#include "pointwise_conv_bn_act.h"
#include "winograd_conv_bn_act.h"

namespace py = pybind11;

namespace bbfast {
namespace {

// ---- arguments ----------------------------------------------------------------------------------------------

// Reads the arguments of one call in order. What is not plainly right turns `fits` false for good.
class Reader {
 public:
  Reader(const py::args& args, size_t count) : args_(args) {
    if (args.size() != count) throw py::type_error("expected " + std::to_string(count) + " arguments");
  }

  bool fits() const { return fits_; }

  // A float32 tensor of torch's own type that lives on the CPU.
  const at::Tensor& tensor() {
    static const at::Tensor none;
    const at::Tensor* t = unpack(next());
    fits_ = fits_ && t != nullptr;
    return t == nullptr ? none : *t;
  }

  std::optional<at::Tensor> optional_tensor() {
    const py::handle value = next();
    if (value.is_none()) return std::nullopt;
    const at::Tensor* t = unpack(value);
    fits_ = fits_ && t != nullptr;
    return t == nullptr ? std::nullopt : std::optional(*t);
  }

  // COUNT ints in a tuple, each at least `minimum`.
  template <size_t COUNT> std::array<int64_t, COUNT> integers(int64_t minimum) { return integers<COUNT>(next(), minimum); }

  // (height, width) or (top, bottom, left, right) as the latter.
  std::array<int64_t, 4> padding() {
    const py::handle value = next();
    if (PyTuple_CheckExact(value.ptr()) && PyTuple_GET_SIZE(value.ptr()) == 4) return integers<4>(value, 0);
    const auto [height, width] = integers<2>(value, 0);
    return {height, height, width, width};
  }

  int64_t integer() { return integer(next().ptr()); }

  bool boolean() {
    PyObject* value = next().ptr();
    fits_ = fits_ && (value == Py_True || value == Py_False);
    return value == Py_True;
  }

  // A float that is finite and not negative.
  double magnitude() {
    PyObject* value = next().ptr();
    if (!PyFloat_CheckExact(value)) {
      fits_ = false;
      return 0;
    }
    const double number = PyFloat_AS_DOUBLE(value);
    fits_ = fits_ && std::isfinite(number) && number >= 0;
    return number;
  }

  std::string text() {
    PyObject* value = next().ptr();
    const char* characters = PyUnicode_CheckExact(value) ? PyUnicode_AsUTF8(value) : nullptr;
    if (characters != nullptr) return characters;
    PyErr_Clear();
    fits_ = false;
    return {};
  }

  // Whether torch's dispatcher would call a CPU kernel with the tensors read so far before anybody else: no gradient is
  // recorded and no autocast, tracer, torch.func transform, fake tensor, mode or profiler wants to see the call.
  bool reaches_cpu_kernel() const {
    if (!fits_ || (records_grad_ && at::GradMode::is_enabled())) return false;
    if (at::impl::torch_function_mode_enabled() || at::hasCallbacks()) return false;
    const c10::impl::LocalDispatchKeySet local = c10::impl::tls_local_dispatch_key_set();
    // These have no kernel of these ops and let the call pass.
    const c10::DispatchKeySet passing =
        c10::autograd_dispatch_keyset_with_ADInplaceOrView | c10::DispatchKeySet(c10::DispatchKey::BackendSelect);
    const c10::DispatchKeySet keys = (keys_ | local.included_) - local.excluded_ - passing;
    return keys.highestPriorityTypeId() == c10::DispatchKey::CPU;
  }

 private:
  py::handle next() { return PyTuple_GET_ITEM(args_.ptr(), index_++); }

  const at::Tensor* unpack(py::handle value) {
    if (!THPVariable_CheckExact(value.ptr())) return nullptr;
    const at::Tensor& t = THPVariable_Unpack(value.ptr());
    if (t.scalar_type() != at::kFloat || t.layout() != at::kStrided) return nullptr;
    keys_ = keys_ | t.key_set();
    records_grad_ = records_grad_ || t.requires_grad();
    return &t;
  }

  int64_t integer(PyObject* value) {
    const int64_t number = PyLong_CheckExact(value) ? PyLong_AsLongLong(value) : -1;
    if (number == -1) {
      PyErr_Clear();
      fits_ = false;
    }
    return number;
  }

  template <size_t COUNT> std::array<int64_t, COUNT> integers(py::handle value, int64_t minimum) {
    std::array<int64_t, COUNT> numbers{};
    fits_ = fits_ && PyTuple_CheckExact(value.ptr()) && PyTuple_GET_SIZE(value.ptr()) == COUNT;
    if (!fits_) return numbers;
    for (size_t i = 0; i < COUNT; ++i) {
      numbers[i] = integer(PyTuple_GET_ITEM(value.ptr(), i));
      fits_ = fits_ && numbers[i] >= minimum;
    }
    return numbers;
  }

  const py::args& args_;
  Py_ssize_t index_ = 0;
  bool fits_ = true;
  bool records_grad_ = false;
  c10::DispatchKeySet keys_;
};

// What bbfast.triton_kernels.layout.is_channels_last says.
bool is_channels_last(const at::Tensor& x) {
  return x.dim() == 4 && x.size(1) > 1 && x.stride(1) == 1 && x.stride(3) != 1;
}

// The result of `run`, or None where the kernel objects: the long way finds the same fault and names it.
template <class Run> py::object run_kernel(const Run& run) {
  try {
    decltype(run()) result;
    {
      py::gil_scoped_release released;
      at::AutoDispatchBelowADInplaceOrView below;  // as under the dispatcher
      result = run();
    }
    return py::cast(std::move(result));
  } catch (const c10::Error&) {
    return py::none();
  }
}

}  // namespace

// ---- the two ways in ----------------------------------------------------------------------------------------

py::object try_pointwise_conv_bn_act(py::args args) {
  Reader read(args, 16);
  const at::Tensor& x = read.tensor();
  const at::Tensor& weight = read.tensor();
  const std::optional<at::Tensor> bn_weight = read.optional_tensor(), bn_bias = read.optional_tensor();
  const std::optional<at::Tensor> mean = read.optional_tensor(), var = read.optional_tensor();
  const std::optional<at::Tensor> bias = read.optional_tensor(), residual = read.optional_tensor();
  const auto stride = read.integers<2>(1);
  const auto padding = read.padding();
  const auto dilation = read.integers<2>(1);
  const int64_t groups = read.integer();
  const bool training = read.boolean();
  read.magnitude();  // momentum, which only training uses
  const double eps = read.magnitude();
  const std::string act = read.text();

  if (!read.reaches_cpu_kernel() || training) return py::none();
  if (!is_channels_last(x) || x.numel() == 0 || weight.dim() != 4) return py::none();
  const BatchNorm bn{bias, bn_weight, bn_bias, mean, var, eps};
  if (im2col_pays(x, weight, stride, padding, dilation, groups)) {
    return run_kernel([&] { return im2col_conv_bn_act_cpu(x, weight, bn, residual, stride, padding, dilation, act); });
  }
  if (grouped_pays(weight, dilation, groups)) {
    return run_kernel([&] { return grouped_conv_bn_act_cpu(x, weight, bn, residual, stride, padding, groups, act); });
  }
  if (winograd_pays(x, weight, stride, padding, dilation, groups)) {
    return run_kernel([&] { return winograd_conv_bn_act_cpu(x, weight, bn, residual, padding, act); });
  }
  if (groups != 1 || padding != std::array<int64_t, 4>{}) return py::none();
  if (weight.size(2) != 1 || weight.size(3) != 1) return py::none();  // one tap does not feel a dilation
  return run_kernel([&] { return pointwise_conv_bn_act_cpu(x, weight, bn, residual, stride, act); });
}

py::object try_depthwise_conv_bn_act(py::args args) {
  Reader read(args, 15);
  const at::Tensor& x = read.tensor();
  const at::Tensor& weight = read.tensor();
  const std::optional<at::Tensor> bn_weight = read.optional_tensor(), bn_bias = read.optional_tensor();
  const std::optional<at::Tensor> mean = read.optional_tensor(), var = read.optional_tensor();
  const std::optional<at::Tensor> bias = read.optional_tensor();
  const auto stride = read.integers<2>(1);
  const auto padding = read.padding();
  const auto dilation = read.integers<2>(1);
  const bool training = read.boolean();
  read.magnitude();  // momentum, which only training uses
  const double eps = read.magnitude();
  const std::string act = read.text();
  const bool squeeze = read.boolean();

  if (!read.reaches_cpu_kernel() || training) return py::none();
  if (!is_channels_last(x) || x.numel() == 0 || weight.dim() != 4 || weight.size(0) != x.size(1)) return py::none();
  const BatchNorm bn{bias, bn_weight, bn_bias, mean, var, eps};
  return run_kernel([&] { return depthwise_conv_bn_act_cpu(x, weight, bn, stride, padding, dilation, act, squeeze); });
}

}  // namespace bbfast
