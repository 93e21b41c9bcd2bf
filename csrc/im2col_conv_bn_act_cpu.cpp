// Convolution + scale and shift + residual + activation, NHWC float32, on the CPU, where the output has few pixels.
//
// The other kernels prepare the weight in each call (fold BatchNorm into it, transform it or pack it), which pays when
// many pixels share the result. Here the weight is read once, as it lies: the patches of x, [pixels, values], gathered
// in the weight's own order of taps and channels, times the weight, [values, O]. What follows the sums is applied to
// the output in place.
//
// What follows is compiled for AVX-512, AVX2 and the build's own baseline, like the other kernels.

#include "im2col_conv_bn_act.h"

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/as_strided.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "checks.h"
#include "epilogue.h"
#include "vectors.h"
#include "winograd_conv_bn_act.h"

namespace bbfast {
namespace {

constexpr int64_t GRAIN = 32768;  // values that are worth a thread

struct Geometry {
  int64_t height, width, out_height, out_width;
  int64_t kernel_height, kernel_width;
  std::array<int64_t, 2> stride, dilation;
  std::array<int64_t, 4> padding;

  int64_t taps() const { return kernel_height * kernel_width; }
};

// ---- patches ------------------------------------------------------------------------------------------------

// Where each tap of output pixel `index` reads its channels; `zeros` outside of the map.
void find_taps(const Geometry& g, const at::Tensor& x, int64_t index, const float* zeros, const float** taps) {
  const float* data = x.const_data_ptr<float>() + index / (g.out_height * g.out_width) * x.stride(0);
  const int64_t row = index / g.out_width % g.out_height * g.stride[0] - g.padding[0];
  const int64_t column = index % g.out_width * g.stride[1] - g.padding[2];
  for (int64_t i = 0; i < g.kernel_height; ++i) {
    const int64_t h = row + i * g.dilation[0];
    for (int64_t j = 0; j < g.kernel_width; ++j) {
      const int64_t w = column + j * g.dilation[1];
      const bool inside = h >= 0 && h < g.height && w >= 0 && w < g.width;
      *taps++ = inside ? data + h * x.stride(2) + w * x.stride(3) : zeros;
    }
  }
}

// The patches [pixels, values]: channels side by side and tap after tap, or the other way round.
at::Tensor gather_patches(const Geometry& g, const at::Tensor& x, bool channels_inside) {
  const int64_t channels = x.size(1), taps = g.taps(), values = taps * channels;
  const int64_t pixels = x.size(0) * g.out_height * g.out_width;
  at::Tensor patches = at::empty({pixels, values}, x.options());
  float* out = patches.mutable_data_ptr<float>();
  const std::vector<float> zeros(channels);
  at::parallel_for(0, pixels, 1 + GRAIN / values, [&](int64_t begin, int64_t end) {
    std::vector<const float*> sources(taps);
    for (int64_t i = begin; i < end; ++i) {
      find_taps(g, x, i, zeros.data(), sources.data());
      float* target = out + i * values;
      if (channels_inside) {
        for (const float* source : sources) target = std::copy_n(source, channels, target);
        continue;
      }
      for (int64_t c = 0; c < channels; ++c) {
        for (const float* source : sources) *target++ = source[c];
      }
    }
  });
  return patches;
}

// ---- what follows the sums ----------------------------------------------------------------------------------

struct Output {
  Epilogue epilogue;
  const float* residual;  // [pixels, channels] like y, or null
  float* y;
  int64_t channels;
};

template <class V> BBFAST_INLINE void finish_vector(const Output& output, int64_t pixel, int64_t column, int64_t count) {
  const int64_t place = pixel * output.channels + column;
  V sum[1][1] = {}, residual = {};
  std::memcpy(&sum[0][0], output.y + place, count * sizeof(float));
  if (output.residual != nullptr) std::memcpy(&residual, output.residual + place, count * sizeof(float));
  float padded_residual[lanes<V>], out[lanes<V>];
  store(padded_residual, residual);
  finish_tile(
      output.epilogue, sum, column, output.residual == nullptr ? nullptr : padded_residual, lanes<V>, out, lanes<V>);
  std::memcpy(output.y + place, out, count * sizeof(float));
}

template <class V> BBFAST_INLINE void finish_pixels(const Output& output, int64_t begin, int64_t end) {
  for (int64_t pixel = begin; pixel < end; ++pixel) {
    int64_t column = 0;
    for (; column + lanes<V> <= output.channels; column += lanes<V>) finish_vector<V>(output, pixel, column, lanes<V>);
    if (column < output.channels) finish_vector<V>(output, pixel, column, output.channels - column);
  }
  if (is_long(output.epilogue.act)) {
    activate<V>(output.epilogue.act, output.y + begin * output.channels, (end - begin) * output.channels);
  }
}

using PixelsFunction = void (*)(const Output&, int64_t, int64_t);

void finish_baseline(const Output& output, int64_t begin, int64_t end) { finish_pixels<Vec4>(output, begin, end); }

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) void finish_avx2(const Output& output, int64_t begin, int64_t end) {
  finish_pixels<Vec8>(output, begin, end);
}

__attribute__((target("avx2,fma,avx512f,avx512vl"))) void finish_avx512(
    const Output& output, int64_t begin, int64_t end) {
  finish_pixels<Vec16>(output, begin, end);
}
#endif

constexpr int64_t MOST_LANES = lanes<Vec16>;

PixelsFunction best_finish() {
#if defined(__x86_64__)
  return best_of<PixelsFunction>(finish_baseline, finish_avx2, finish_avx512);
#else
  return finish_baseline;
#endif
}

const PixelsFunction FINISH = best_finish();

}  // namespace

// ---- the kernel ---------------------------------------------------------------------------------------------

at::Tensor im2col_conv_bn_act_cpu(
    const at::Tensor& x,
    const at::Tensor& weight,
    const BatchNorm& bn,
    const std::optional<at::Tensor>& residual,
    std::array<int64_t, 2> stride,
    std::array<int64_t, 4> padding,
    std::array<int64_t, 2> dilation,
    const std::string& act) {
  check_float_cpu("x", x, 4);
  check_float_cpu("weight", weight, 4);
  check_channels_together("x", x);
  check_at_least("stride", stride, 1);
  check_at_least("dilation", dilation, 1);
  check_at_least("padding", padding, 0);
  const int64_t batch = x.size(0), channels = x.size(1), out_channels = weight.size(0);
  TORCH_CHECK_VALUE(
      weight.numel() > 0 && weight.size(1) == channels,
      "weight must have shape [O, ", channels, ", kh, kw] with C as in x, got ", weight.sizes());
  Geometry g{};
  g.height = x.size(2);
  g.width = x.size(3);
  g.kernel_height = weight.size(2);
  g.kernel_width = weight.size(3);
  g.stride = stride;
  g.dilation = dilation;
  g.padding = padding;
  g.out_height = output_size('H', g.height, padding[0], padding[1], g.kernel_height, dilation[0], stride[0]);
  g.out_width = output_size('W', g.width, padding[2], padding[3], g.kernel_width, dilation[1], stride[1]);

  at::AutoDispatchBelowADInplaceOrView below;
  const std::array<int64_t, 4> shape{batch, out_channels, g.out_height, g.out_width};
  at::Tensor followed_by;
  if (residual.has_value()) {
    check_float_cpu("residual", *residual, 4);
    TORCH_CHECK_VALUE(residual->sizes() == at::IntArrayRef(shape), "residual must have the output's shape, got ", residual->sizes());
    followed_by = residual->contiguous(at::MemoryFormat::ChannelsLast);
  }
  Output output{};
  output.epilogue.act = parse_act(act);
  at::Tensor y = at::empty(shape, x.options(), at::MemoryFormat::ChannelsLast);
  const at::Tensor vectors = at::zeros({2, out_channels + MOST_LANES}, x.options());
  float* scale = vectors.mutable_data_ptr<float>();
  float* shift = scale + out_channels + MOST_LANES;
  fold_batch_norm(bn, out_channels, scale, shift);
  if (y.numel() == 0) return y;

  const int64_t values = g.taps() * channels, pixels = batch * g.out_height * g.out_width;
  const bool channels_inside = !weight.is_contiguous() && weight.is_contiguous(at::MemoryFormat::ChannelsLast);
  const at::Tensor dense = channels_inside ? weight : weight.contiguous();
  const bool is_matrix = g.taps() == 1 && pixels == batch * g.height * g.width && padding == std::array<int64_t, 4>{} &&
      x.is_contiguous(at::MemoryFormat::ChannelsLast);
  const at::Tensor patches = is_matrix ? x.as_strided({pixels, channels}, {channels, 1}) : gather_patches(g, x, channels_inside);
  at::Tensor sums = y.as_strided({pixels, out_channels}, {out_channels, 1});
  at::mm_out(sums, patches, dense.as_strided({values, out_channels}, {1, values}));

  output.epilogue.scale = scale;
  output.epilogue.shift = shift;
  output.residual = followed_by.defined() ? followed_by.const_data_ptr<float>() : nullptr;
  output.y = y.mutable_data_ptr<float>();
  output.channels = out_channels;
  at::parallel_for(0, pixels, 1 + GRAIN / out_channels, [&](int64_t begin, int64_t end) { FINISH(output, begin, end); });
  return y;
}

bool im2col_pays(
    const at::Tensor& x,
    const at::Tensor& weight,
    std::array<int64_t, 2> stride,
    std::array<int64_t, 4> padding,
    std::array<int64_t, 2> dilation,
    int64_t groups) {
  if (groups != 1 || x.dim() != 4 || weight.dim() != 4 || weight.size(1) != x.size(1) || weight.numel() == 0) return false;
  const int64_t out_channels = weight.size(0), values = weight.numel() / out_channels;
  int64_t pixels = x.size(0);
  for (int axis = 0; axis < 2; ++axis) {
    const int64_t extent = (weight.size(2 + axis) - 1) * dilation[axis] + 1;
    const int64_t free = x.size(2 + axis) + padding[2 * axis] + padding[2 * axis + 1] - extent;
    if (free < 0) return false;
    pixels *= free / stride[axis] + 1;
  }
  // Measured; benchmarks/NOTES.md. Few pixels do not pay for a weight that is packed, nor for one that is transformed.
  constexpr int64_t LARGE_WEIGHT = 1 << 18, MOST_PACKED = 16, MOST_TRANSFORMED = 48;
  if (values == weight.size(1)) return out_channels * values >= LARGE_WEIGHT && pixels <= MOST_PACKED;
  if (winograd_pays(x, weight, stride, padding, dilation, groups)) return pixels <= MOST_TRANSFORMED;
  // oneDNN's weight is folded and reordered: values * out_channels against the pixels * values that are gathered here.
  constexpr int64_t SMALL_PATCHES = 1 << 16;  // are gathered before a fold has begun
  return pixels <= out_channels || pixels * values <= SMALL_PATCHES;
}

}  // namespace bbfast
