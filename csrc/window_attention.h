#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <optional>

namespace bbfast {

// Multi-head attention within the padded, shifted windows of a float32 map on the CPU.
//
//   qkv         [B, H, W, 3C]  channels (3, heads, head_dim) side by side; batch, rows and columns at any stride
//   table       [(2 wh - 1)(2 ww - 1), heads]  relative position bias; any strides and floating-point dtype
//   qkv_bias    [3C]           what padded tokens take as q, k and v, or none for zeros
//   pad_first   pads, then rolls (torchvision, transformers); else the other way round (timm)
//   mask_value  added to the scores of pairs that only the roll brought together
//
// Returns [B, H, W, C], contiguous. For inference: nothing is recorded for autograd. Beyond its output it takes the
// expanded bias and, per thread, one window of one head. Results do not depend on the number of threads.
// Throws ValueError naming the argument that does not fit.
at::Tensor window_attention_cpu(
    const at::Tensor& qkv,
    const at::Tensor& table,
    const std::optional<at::Tensor>& qkv_bias,
    int64_t num_heads,
    std::array<int64_t, 2> window_size,
    std::array<int64_t, 2> shift_size,
    double scale,
    bool pad_first,
    double mask_value);

}  // namespace bbfast
