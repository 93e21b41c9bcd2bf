#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <string>

#include "batch_norm.h"

namespace bbfast {

// act(batch_norm(conv1x1(x)) + residual) of a channels_last float32 map on the CPU, without padding.
//
//   x         [N, C, H, W]    channels side by side in memory (stride 1); the rest at any stride
//   weight    [O, C, 1, 1]    any strides; free of copies when contiguous
//   bn        [O]             each of its tensors, or absent; any strides and floating-point dtypes
//   residual  [N, O, H', W']  channels_last, or none; the pixels must follow each other at one stride
//   stride    of the convolution: which rows and columns of x are read
//   act       identity, relu, relu6, hardswish, silu or gelu (erf)
//
// Returns y [N, O, H', W'] (channels_last). For inference: nothing is recorded for autograd. Results do not depend on
// the number of threads. Throws ValueError naming the argument that does not fit.
at::Tensor pointwise_conv_bn_act_cpu(
    const at::Tensor& x,
    const at::Tensor& weight,
    const BatchNorm& bn,
    const std::optional<at::Tensor>& residual,
    std::array<int64_t, 2> stride,
    const std::string& act);

}  // namespace bbfast
