#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>

#include "batch_norm.h"

namespace bbfast {

// act(batch_norm(conv1x1(x)) + residual) of a dense channels_last float32 map on the CPU, stride 1.
//
//   x         [N, C, H, W]  channels_last; the pixels must follow each other at one stride
//   weight    [O, C, 1, 1]  any strides
//   bn        [O]           each of its tensors, or absent; any strides and floating-point dtypes
//   residual  [N, O, H, W]  channels_last like x, or none
//   act       identity, relu, relu6, hardswish, silu or gelu (erf)
//
// Returns y [N, O, H, W] (channels_last). For inference: nothing is recorded for autograd. Results do not depend on
// the number of threads. Throws ValueError naming the argument that does not fit.
at::Tensor pointwise_conv_bn_act_cpu(
    const at::Tensor& x,
    const at::Tensor& weight,
    const BatchNorm& bn,
    const std::optional<at::Tensor>& residual,
    const std::string& act);

}  // namespace bbfast
