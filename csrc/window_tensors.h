#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>

#include "window.h"

namespace bbfast {

// A map and its windows as tensors, and the copy between them. Holds what was allocated or made contiguous for it.
struct WindowTensors {
  at::Tensor map;      // [B, H, W, C]
  at::Tensor windows;  // [B * windows, window rows * window columns, C]
  WindowCopy copy;
};

// Checks the arguments and allocates the windows of a map [B, H, W, C], or the map of windows [B * n, tokens, C], on the
// same device. Batch, rows, columns, windows and tokens of the argument may have any strides; it is made contiguous
// first where its channels do not lie side by side. Throws ValueError naming the argument that does not fit.
WindowTensors windows_of_map(
    const at::Tensor& x, std::array<int64_t, 2> window_size, std::array<int64_t, 2> shift_size, bool pad_first);
WindowTensors map_of_windows(
    const at::Tensor& windows, std::array<int64_t, 2> window_size, std::array<int64_t, 2> image_size,
    std::array<int64_t, 2> shift_size, bool pad_first);

// Map to windows, zeros in the padding; and windows to map, without the padding.
void window_partition_cpu(const WindowCopy& copy);
void window_reverse_cpu(const WindowCopy& copy);

#ifdef BBFAST_WITH_CUDA
// The same on the device and current stream of `like`.
void window_partition_cuda(const WindowCopy& copy, const at::Tensor& like);
void window_reverse_cuda(const WindowCopy& copy, const at::Tensor& like);
#endif

// Pad, shift and partition a map in one copy, and the inverse, on the CPU or (in a build with CUDA) a GPU.
// Nothing is recorded for autograd.
at::Tensor window_partition(
    const at::Tensor& x, std::array<int64_t, 2> window_size, std::array<int64_t, 2> shift_size, bool pad_first);
at::Tensor window_reverse(
    const at::Tensor& windows, std::array<int64_t, 2> window_size, std::array<int64_t, 2> image_size,
    std::array<int64_t, 2> shift_size, bool pad_first);

// For tests of the arithmetic without a GPU, and without memory: the byte offsets [N, 2] into map (-1: padding) and
// windows that the CUDA kernel would use for the int64 vector numbers [N], of a contiguous [B, H, W, C] map of
// `pixel_bytes` per pixel. `wide` takes 64-bit indices.
at::Tensor window_places(
    const at::Tensor& vectors, std::array<int64_t, 3> map_size, int64_t pixel_bytes, int64_t vector_bytes,
    std::array<int64_t, 2> window_size, std::array<int64_t, 2> shift_size, bool pad_first, bool wide);

}  // namespace bbfast
