// The module bbfast._C: functions on tensors, one line each, and what the build was made of.

#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include "build_config.h"  // written by setup.py
#include "call_key.h"
#include "depthwise_conv_bn_act.h"
#include "grouped_conv_bn_act.h"
#include "im2col_conv_bn_act.h"
#include "pointwise_conv_bn_act.h"
#include "shortcut.h"
#include "window_attention.h"
#include "window_tensors.h"
#include "winograd_conv_bn_act.h"
#ifdef BBFAST_WITH_CUDA
#include "device_info.h"
#endif

namespace py = pybind11;
using namespace bbfast;

namespace {

#if defined(__clang__)
constexpr const char* COMPILER = "clang " __clang_version__;
#elif defined(__GNUC__)
constexpr const char* COMPILER = "gcc " __VERSION__;
#else
constexpr const char* COMPILER = "unknown";
#endif

py::dict build_info() {
  py::dict info;
  info["compiler"] = COMPILER;
  info["cxx11_abi"] = static_cast<bool>(_GLIBCXX_USE_CXX11_ABI);
  info["torch"] = TORCH_VERSION;
  info["openmp"] =
#ifdef _OPENMP
      true;
#else
      false;
#endif
  info["cpu_instruction_set"] = cpu_instruction_set();
#ifdef BBFAST_WITH_CUDA
  info["cuda"] = true;
  info["cuda_version"] =
      std::to_string(compiled_cuda_version() / 1000) + "." + std::to_string(compiled_cuda_version() % 1000 / 10);
#else
  info["cuda"] = false;
  info["cuda_version"] = py::none();
#endif
  info["cuda_archs"] = py::str(BBFAST_CUDA_ARCHS).attr("split")();
  info["cuda_reason"] = BBFAST_CUDA_REASON;  // why there is, or is no, CUDA half
  return info;
}

// (devices, reason): a dict per GPU, and why there is none where there is none.
py::tuple device_info() {
  py::list devices;
#ifdef BBFAST_WITH_CUDA
  const DeviceList list = list_devices();
  for (const DeviceInfo& device : list.devices) {
    py::dict info;
    info["name"] = device.name;
    info["compute_capability"] = py::make_tuple(device.compute_capability_major, device.compute_capability_minor);
    info["multiprocessors"] = device.multiprocessors;
    info["memory_bytes"] = device.memory_bytes;
    info["l2_bytes"] = device.l2_bytes;
    info["shared_memory_per_block_bytes"] = device.shared_memory_per_block_bytes;
    info["memory_gbps"] = device.memory_gbps;
    devices.append(info);
  }
  return py::make_tuple(devices, list.reason.empty() ? py::object(py::none()) : py::str(list.reason));
#else
  return py::make_tuple(devices, "bbfast was built without CUDA: " BBFAST_CUDA_REASON);
#endif
}

using OptionalTensor = std::optional<at::Tensor>;

std::tuple<at::Tensor, at::Tensor> depthwise(
    const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias, const OptionalTensor& bn_weight,
    const OptionalTensor& bn_bias, const OptionalTensor& running_mean, const OptionalTensor& running_var,
    std::array<int64_t, 2> stride, std::array<int64_t, 4> padding, std::array<int64_t, 2> dilation, double eps,
    const std::string& act, bool squeeze) {
  const BatchNorm bn{bias, bn_weight, bn_bias, running_mean, running_var, eps};
  return depthwise_conv_bn_act_cpu(x, weight, bn, stride, padding, dilation, act, squeeze);
}

at::Tensor grouped(
    const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias, const OptionalTensor& bn_weight,
    const OptionalTensor& bn_bias, const OptionalTensor& running_mean, const OptionalTensor& running_var,
    const OptionalTensor& residual, std::array<int64_t, 2> stride, std::array<int64_t, 4> padding, int64_t groups,
    double eps, const std::string& act) {
  const BatchNorm bn{bias, bn_weight, bn_bias, running_mean, running_var, eps};
  return grouped_conv_bn_act_cpu(x, weight, bn, residual, stride, padding, groups, act);
}

at::Tensor im2col(
    const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias, const OptionalTensor& bn_weight,
    const OptionalTensor& bn_bias, const OptionalTensor& running_mean, const OptionalTensor& running_var,
    const OptionalTensor& residual, std::array<int64_t, 2> stride, std::array<int64_t, 4> padding,
    std::array<int64_t, 2> dilation, double eps, const std::string& act) {
  const BatchNorm bn{bias, bn_weight, bn_bias, running_mean, running_var, eps};
  return im2col_conv_bn_act_cpu(x, weight, bn, residual, stride, padding, dilation, act);
}

at::Tensor pointwise(
    const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias, const OptionalTensor& bn_weight,
    const OptionalTensor& bn_bias, const OptionalTensor& running_mean, const OptionalTensor& running_var,
    const OptionalTensor& residual, std::array<int64_t, 2> stride, double eps, const std::string& act) {
  const BatchNorm bn{bias, bn_weight, bn_bias, running_mean, running_var, eps};
  return pointwise_conv_bn_act_cpu(x, weight, bn, residual, stride, act);
}

at::Tensor winograd(
    const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias, const OptionalTensor& bn_weight,
    const OptionalTensor& bn_bias, const OptionalTensor& running_mean, const OptionalTensor& running_var,
    const OptionalTensor& residual, std::array<int64_t, 4> padding, double eps, const std::string& act) {
  const BatchNorm bn{bias, bn_weight, bn_bias, running_mean, running_var, eps};
  return winograd_conv_bn_act_cpu(x, weight, bn, residual, padding, act);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "bbfast's C++ and CUDA kernels; use them through bbfast.ops.";
  m.def("build_info", &build_info, "What this library was built with, as a dict.");
  m.def("device_info", &device_info, "(list of a dict per GPU, reason why it is empty or None).");
  m.def("call_key", &call_key, py::arg("args"), py::arg("kwargs"), py::arg("generation"),
        "What a call of an op in inference may depend on, or None where it must run as it is written.");
  m.def("depthwise_conv_bn_act", &depthwise, py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("bn_weight"),
        py::arg("bn_bias"), py::arg("running_mean"), py::arg("running_var"), py::arg("stride"), py::arg("padding"),
        py::arg("dilation"), py::arg("eps"), py::arg("act"), py::arg("squeeze"),
        py::call_guard<py::gil_scoped_release>(),
        "Depthwise conv + BatchNorm + act of a channels_last float32 CPU map: (y, squeeze means or empty).");
  m.def("grouped_conv_bn_act", &grouped, py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("bn_weight"),
        py::arg("bn_bias"), py::arg("running_mean"), py::arg("running_var"), py::arg("residual"), py::arg("stride"),
        py::arg("padding"), py::arg("groups"), py::arg("eps"), py::arg("act"), py::call_guard<py::gil_scoped_release>(),
        "Grouped conv + BatchNorm + residual + act of a channels_last float32 CPU map.");
  m.def("grouped_pays", &grouped_pays, py::arg("weight"), py::arg("dilation"), py::arg("groups"),
        "Whether grouped_conv_bn_act is quicker than oneDNN.");
  m.def("im2col_conv_bn_act", &im2col, py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("bn_weight"),
        py::arg("bn_bias"), py::arg("running_mean"), py::arg("running_var"), py::arg("residual"), py::arg("stride"),
        py::arg("padding"), py::arg("dilation"), py::arg("eps"), py::arg("act"),
        py::call_guard<py::gil_scoped_release>(),
        "Conv + BatchNorm + residual + act of a channels_last float32 CPU map, for outputs of few pixels.");
  m.def("im2col_pays", &im2col_pays, py::arg("x"), py::arg("weight"), py::arg("stride"), py::arg("padding"),
        py::arg("dilation"), py::arg("groups"),
        "Whether im2col_conv_bn_act is quicker than kernels that prepare the weight in each call.");
  m.def("pointwise_conv_bn_act", &pointwise, py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("bn_weight"),
        py::arg("bn_bias"), py::arg("running_mean"), py::arg("running_var"), py::arg("residual"), py::arg("stride"),
        py::arg("eps"), py::arg("act"), py::call_guard<py::gil_scoped_release>(),
        "Pointwise conv + BatchNorm + residual + act of a channels_last float32 CPU map.");
  m.def("try_depthwise_conv_bn_act", &try_depthwise_conv_bn_act,
        "(y, squeeze means or empty) where checks and dispatcher would lead to the kernel, else None.");
  m.def("try_pointwise_conv_bn_act", &try_pointwise_conv_bn_act,
        "y where checks and dispatcher would lead to the kernel, else None.");
  m.def("window_attention", &window_attention_cpu, py::arg("qkv"), py::arg("table"), py::arg("qkv_bias"),
        py::arg("num_heads"), py::arg("window_size"), py::arg("shift_size"), py::arg("scale"), py::arg("pad_first"),
        py::arg("mask_value"), py::call_guard<py::gil_scoped_release>(),
        "Attention [B, H, W, C] within the shifted windows of a float32 CPU map's packed qkv [B, H, W, 3C].");
  m.def("window_partition", &window_partition, py::arg("x"), py::arg("window_size"), py::arg("shift_size"),
        py::arg("pad_first"), py::call_guard<py::gil_scoped_release>(),
        "Windows [B * n, h * w, C] of a map [B, H, W, C], padded and shifted in the same copy.");
  m.def("window_reverse", &window_reverse, py::arg("windows"), py::arg("window_size"), py::arg("image_size"),
        py::arg("shift_size"), py::arg("pad_first"), py::call_guard<py::gil_scoped_release>(),
        "The map [B, H, W, C] of windows [B * n, h * w, C], shifted back and cropped in the same copy.");
  m.def("window_places", &window_places, py::arg("vectors"), py::arg("map_size"), py::arg("pixel_bytes"),
        py::arg("vector_bytes"), py::arg("window_size"), py::arg("shift_size"), py::arg("pad_first"), py::arg("wide"),
        "Byte offsets [N, 2] into map and windows of the CUDA kernel's vectors, for tests.");
  m.def("winograd_conv_bn_act", &winograd, py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("bn_weight"),
        py::arg("bn_bias"), py::arg("running_mean"), py::arg("running_var"), py::arg("residual"), py::arg("padding"),
        py::arg("eps"), py::arg("act"), py::call_guard<py::gil_scoped_release>(),
        "3x3 conv + BatchNorm + residual + act of a channels_last float32 CPU map, stride 1, by Winograd's F(2x2, 3x3).");
  m.def("winograd_pays", &winograd_pays, py::arg("x"), py::arg("weight"), py::arg("stride"), py::arg("padding"),
        py::arg("dilation"), py::arg("groups"), "Whether winograd_conv_bn_act is quicker than oneDNN.");
}
