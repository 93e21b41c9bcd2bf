#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string>

#include "batch_norm.h"

namespace bbfast {

// act(batch_norm(conv(x, groups)) + residual) of a channels_last float32 map on the CPU, without dilation.
//
//   x         [N, C, H, W]                channels side by side in memory (stride 1); the rest at any stride
//   weight    [O, C / groups, kh, kw]     any strides; free of copies when contiguous or channels_last
//   bn        [O]                         each of its tensors, or absent; any strides and floating-point dtypes
//   residual  [N, O, H', W']              channels_last like x, or none
//   padding   top, bottom, left, right, in pixels
//   act       identity, relu, relu6, hardswish, silu or gelu (erf)
//
// Returns y [N, O, H', W'] (channels_last). For inference: nothing is recorded for autograd. Results do not depend on
// the number of threads. Throws ValueError naming the argument that does not fit.
at::Tensor grouped_conv_bn_act_cpu(
    const at::Tensor& x,
    const at::Tensor& weight,
    const BatchNorm& bn,
    const std::optional<at::Tensor>& residual,
    std::array<int64_t, 2> stride,
    std::array<int64_t, 4> padding,
    int64_t groups,
    const std::string& act);

// Whether the kernel is quicker than oneDNN with such a weight [O, C / groups, kh, kw].
bool grouped_pays(const at::Tensor& weight, std::array<int64_t, 2> dilation, int64_t groups);

}  // namespace bbfast
