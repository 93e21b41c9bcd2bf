#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string>

#include "batch_norm.h"

namespace bbfast {

// act(batch_norm(conv(x)) + residual) of a channels_last float32 map on the CPU, for outputs of few pixels; one group.
//
//   x         [N, C, H, W]    channels side by side in memory (stride 1); the rest at any stride
//   weight    [O, C, kh, kw]  any strides; free of copies when contiguous or channels_last
//   bn        [O]             each of its tensors, or absent; any strides and floating-point dtypes
//   residual  [N, O, H', W']  any strides, or none; free of copies when channels_last
//   stride, padding (top, bottom, left, right), dilation: in pixels
//   act       identity, relu, relu6, hardswish, silu or gelu (erf)
//
// Returns y [N, O, H', W'] (channels_last). For inference: nothing is recorded for autograd. The sums are those of
// at::mm. Throws ValueError naming the argument that does not fit.
at::Tensor im2col_conv_bn_act_cpu(
    const at::Tensor& x,
    const at::Tensor& weight,
    const BatchNorm& bn,
    const std::optional<at::Tensor>& residual,
    std::array<int64_t, 2> stride,
    std::array<int64_t, 4> padding,
    std::array<int64_t, 2> dilation,
    const std::string& act);

// Whether the kernel takes such a convolution and is quicker than those that prepare the weight in each call. Looks at
// sizes alone.
bool im2col_pays(
    const at::Tensor& x,
    const at::Tensor& weight,
    std::array<int64_t, 2> stride,
    std::array<int64_t, 4> padding,
    std::array<int64_t, 2> dilation,
    int64_t groups);

}  // namespace bbfast
