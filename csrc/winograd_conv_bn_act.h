#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string>

#include "batch_norm.h"

namespace bbfast {

// act(batch_norm(conv3x3(x)) + residual) of a channels_last float32 map on the CPU by Winograd's F(2x2, 3x3); stride 1,
// dilation 1, one group.
//
//   x         [N, C, H, W]    channels_last; samples, rows and columns at any stride
//   weight    [O, C, 3, 3]    any strides
//   bn        [O]             each of its tensors, or absent; any strides and floating-point dtypes
//   residual  [N, O, H', W']  channels_last like x, or none
//   padding   top, bottom, left, right, in pixels, each at most 2
//   act       identity, relu, relu6, hardswish, silu or gelu (erf)
//
// Returns y [N, O, H', W'] (channels_last). For inference: nothing is recorded for autograd. Results do not depend on the
// number of threads, and a sample's not on the others. Rounding errors are below those of adding up all products one
// by one. A sample with a sum that is not finite is convolved by torch: NaN and infinity reach exactly the outputs whose
// window holds them. Throws ValueError naming the argument that does not fit.
at::Tensor winograd_conv_bn_act_cpu(
    const at::Tensor& x,
    const at::Tensor& weight,
    const BatchNorm& bn,
    const std::optional<at::Tensor>& residual,
    std::array<int64_t, 4> padding,
    const std::string& act);

// Whether the kernel takes such a convolution and is quicker than oneDNN. Looks at sizes alone.
bool winograd_pays(
    const at::Tensor& x,
    const at::Tensor& weight,
    std::array<int64_t, 2> stride,
    std::array<int64_t, 4> padding,
    std::array<int64_t, 2> dilation,
    int64_t groups);

}  // namespace bbfast
