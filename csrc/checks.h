#pragma once

// What the CPU kernels ask of their arguments. Each function throws ValueError naming the argument that does not fit.

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <array>
#include <cstdint>

namespace bbfast {

inline void check_float_cpu(const char* name, const at::Tensor& t, int64_t rank) {
  TORCH_CHECK_VALUE(t.defined(), name, " must be a tensor, got None");
  TORCH_CHECK_VALUE(t.layout() == at::kStrided, name, " must be a dense tensor, got layout ", t.layout());
  TORCH_CHECK_VALUE(t.device().is_cpu(), name, " must be on the CPU, got ", t.device());
  TORCH_CHECK_VALUE(t.scalar_type() == at::kFloat, name, " must be float32, got ", t.scalar_type());
  TORCH_CHECK_VALUE(t.dim() == rank, name, " must have ", rank, " dimensions, got shape ", t.sizes());
}

inline void check_channels_together(const char* name, const at::Tensor& t) {
  TORCH_CHECK_VALUE(
      t.size(1) == 1 || t.stride(1) == 1,
      name, " must be channels_last (stride 1 along C), got strides ", t.strides());
}

template <size_t COUNT>
void check_at_least(const char* name, const std::array<int64_t, COUNT>& values, int64_t minimum) {
  for (const int64_t value : values) {
    TORCH_CHECK_VALUE(value >= minimum, name, " holds ", value, "; it must be at least ", minimum);
  }
}

inline int64_t output_size(
    char axis, int64_t size, int64_t before, int64_t after, int64_t kernel, int64_t dilation, int64_t stride) {
  const int64_t padded = size + before + after;
  const int64_t extent = (kernel - 1) * dilation + 1;
  TORCH_CHECK_VALUE(
      padded >= extent,
      "weight spans ", extent, " pixels along ", axis, " but the padded x has only ", padded);
  return (padded - extent) / stride + 1;
}

}  // namespace bbfast
