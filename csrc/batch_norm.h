#pragma once

// BatchNorm with running statistics as one multiplication and one addition per channel, for the CPU kernels.

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <cstdint>
#include <optional>

namespace bbfast {

// What follows a convolution's sum. Each tensor has shape [channels], or is absent: no bias, BatchNorm without
// affine parameters, or (both running tensors absent) no BatchNorm.
struct BatchNorm {
  const std::optional<at::Tensor>& bias;  // the convolution's
  const std::optional<at::Tensor>& weight;
  const std::optional<at::Tensor>& shift;
  const std::optional<at::Tensor>& running_mean;
  const std::optional<at::Tensor>& running_var;
  double eps;
};

namespace detail {

// A float32 contiguous view of `t` or, where it is stored otherwise, a copy; undefined where it is absent.
inline at::Tensor channel_vector(const char* name, const std::optional<at::Tensor>& t, int64_t channels) {
  if (!t.has_value() || !t->defined()) return {};
  TORCH_CHECK_VALUE(t->layout() == at::kStrided, name, " must be a dense tensor, got layout ", t->layout());
  TORCH_CHECK_VALUE(t->device().is_cpu(), name, " must be on the CPU, got ", t->device());
  TORCH_CHECK_VALUE(t->is_floating_point(), name, " must be of a floating-point dtype, got ", t->scalar_type());
  TORCH_CHECK_VALUE(
      t->dim() == 1 && t->size(0) == channels,
      name, " must have shape [", channels, "], one value per channel, got ", t->sizes());
  if (t->scalar_type() == at::kFloat && t->is_contiguous()) return *t;
  return t->detach().to(at::kFloat).contiguous();
}

inline const float* data(const at::Tensor& t) { return t.defined() ? t.const_data_ptr<float>() : nullptr; }

}  // namespace detail

// Writes scale and shift [channels] with batch_norm(z + bias) = z * scale + shift, worked out in float32.
// Throws ValueError naming the argument that does not fit.
inline void fold_batch_norm(const BatchNorm& bn, int64_t channels, float* scale, float* shift) {
  const at::Tensor bias = detail::channel_vector("bias", bn.bias, channels);
  const at::Tensor bn_weight = detail::channel_vector("bn_weight", bn.weight, channels);
  const at::Tensor bn_bias = detail::channel_vector("bn_bias", bn.shift, channels);
  const at::Tensor mean = detail::channel_vector("running_mean", bn.running_mean, channels);
  const at::Tensor var = detail::channel_vector("running_var", bn.running_var, channels);
  TORCH_CHECK_VALUE(mean.defined() == var.defined(), "running_mean and running_var must both be tensors or both be None");
  const float *b = detail::data(bias), *w = detail::data(bn_weight), *s = detail::data(bn_bias);
  if (!mean.defined()) {
    TORCH_CHECK_VALUE(w == nullptr && s == nullptr, "bn_weight and bn_bias need running_mean and running_var");
    for (int64_t c = 0; c < channels; ++c) {
      scale[c] = 1.0f;
      shift[c] = b == nullptr ? 0.0f : b[c];
    }
    return;
  }
  const float *m = detail::data(mean), *v = detail::data(var);
  const float eps = static_cast<float>(bn.eps);
  for (int64_t c = 0; c < channels; ++c) {
    const float inverse = 1.0f / std::sqrt(v[c] + eps);
    const float offset = b == nullptr ? m[c] : m[c] - b[c];
    scale[c] = w == nullptr ? inverse : inverse * w[c];
    shift[c] = (s == nullptr ? 0.0f : s[c]) - offset * scale[c];
  }
}

}  // namespace bbfast
