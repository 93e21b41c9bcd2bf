#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>

namespace bbfast {

// act(conv1x1(x) * scale + shift + residual) of a dense channels_last float32 map on the CPU, stride 1.
//
//   x         [N, C, H, W]  channels_last; the pixels must follow each other at one stride
//   weight    [O, C, 1, 1]  any strides
//   scale     [O]           multiplies the convolution's sum
//   shift     [O]           is added after that
//   residual  [N, O, H, W]  channels_last like x, or none
//   act       identity, relu, relu6, hardswish, silu or gelu (erf)
//
// Returns y [N, O, H, W] (channels_last). For inference: nothing is recorded for autograd. Results do not depend on
// the number of threads. Throws ValueError naming the argument that does not fit.
at::Tensor pointwise_conv_bn_act_cpu(
    const at::Tensor& x,
    const at::Tensor& weight,
    const at::Tensor& scale,
    const at::Tensor& shift,
    const std::optional<at::Tensor>& residual,
    const std::string& act);

}  // namespace bbfast
