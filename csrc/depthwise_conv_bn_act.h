#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <string>
#include <tuple>

#include "batch_norm.h"

namespace bbfast {

// Depthwise convolution, BatchNorm with running statistics, and activation of a channels_last float32 map on the CPU.
//
//   x        [N, C, H, W]   channels side by side in memory (stride 1); batch, rows and columns at any stride
//   weight   [C, 1, kh, kw] any strides; free of copies when stored as [kh, kw, C]
//   bn       [C]            each of its tensors, or absent; any strides and floating-point dtypes
//   padding  top, bottom, left, right, in pixels
//   act      identity, relu, relu6, hardswish, silu or gelu (erf)
//
// Returns y [N, C, H', W'] (channels_last) and, with `squeeze`, its means over H' and W' [N, C] (else an empty
// tensor). For inference: nothing is recorded for autograd. Results do not depend on the number of threads.
// Throws ValueError naming the argument that does not fit.
std::tuple<at::Tensor, at::Tensor> depthwise_conv_bn_act_cpu(
    const at::Tensor& x,
    const at::Tensor& weight,
    const BatchNorm& bn,
    std::array<int64_t, 2> stride,
    std::array<int64_t, 4> padding,
    std::array<int64_t, 2> dilation,
    const std::string& act,
    bool squeeze);

// The instruction set that the call above runs with on this machine: avx512, avx2 or baseline.
std::string cpu_instruction_set();

}  // namespace bbfast
