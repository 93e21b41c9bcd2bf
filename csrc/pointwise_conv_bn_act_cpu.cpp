// Pointwise convolution + scale and shift + residual + activation, NHWC float32, on the CPU.
//
// A matrix product, [pixels, C] x [C, O], that never leaves its sums: a tile of ROWS pixels and one panel of output
// channels stays in registers from the first input channel to the activation. The weight is packed once per call into
// panels [C][panel] (a pass over the weight, which every pixel then reads in long runs); a task is a block of pixels
// whose input stays in the L2 cache while the panels go by. Each output is a sum of chains of CHAIN multiply-adds.
//
// Compiled for AVX-512, AVX2 and the build's own baseline, like the depthwise kernel.

#include "pointwise_conv_bn_act.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "checks.h"
#include "epilogue.h"
#include "packing.h"
#include "vectors.h"

namespace bbfast {
namespace {

// 6 pixels x 2 vectors, or 4 x 3: twelve sums, which with the weights fill AVX2's sixteen registers.
constexpr int ROWS = 6;
constexpr int VECTORS = 2;
// Rounding grows with the length of a chain of sums: one over 300 channels errs up to 3.5 times as far as torch.
constexpr int64_t CHAIN = 128;

constexpr int64_t MAX_BLOCK = 192;  // pixels of a task; a multiple of ROWS

struct Product {
  const float* x;         // pixel (n, h, w) of the output reads channels from x + n * x_stride_n + ...
  const float* panels;    // for each panel: [channels][width]
  Epilogue epilogue;
  const float* residual;  // [rows, out_channels], row stride residual_stride, or null
  float* y;               // [rows, out_channels]
  int64_t rows, channels, out_channels;
  int64_t out_height, out_width;
  int64_t x_stride_n, x_stride_h, x_stride_w;  // between the pixels that are read
  int64_t residual_stride;
};

// Widths of the panels that `out_channels` are cut into: as many full ones as fit, then single vectors.
template <class V> constexpr int64_t full_width = VECTORS * lanes<V>;

// Adds the products of the channels [begin, end) to the sums.
template <class V, int TILE, int COUNT>
BBFAST_INLINE void add_products(
    V (&sum)[TILE][COUNT], const float* panel, const float* const (&x)[TILE], int64_t begin, int64_t end) {
  panel += begin * COUNT * lanes<V>;
  for (int64_t k = begin; k < end; ++k) {
    V w[COUNT];
    BBFAST_UNROLL
    for (int v = 0; v < COUNT; ++v) load(w[v], panel + v * lanes<V>);
    panel += COUNT * lanes<V>;
    BBFAST_UNROLL
    for (int t = 0; t < TILE; ++t) {
      BBFAST_UNROLL
      for (int v = 0; v < COUNT; ++v) sum[t][v] += w[v] * x[t][k];
    }
  }
}

template <class V, int TILE, int COUNT>
BBFAST_INLINE void add_from(V (&sum)[TILE][COUNT], const float (&from)[TILE][COUNT * lanes<V>]) {
  BBFAST_UNROLL
  for (int t = 0; t < TILE; ++t) {
    BBFAST_UNROLL
    for (int v = 0; v < COUNT; ++v) {
      V other;
      load(other, from[t] + v * lanes<V>);
      sum[t][v] += other;
    }
  }
}

template <class V, int TILE, int COUNT>
BBFAST_INLINE void move_to(V (&sum)[TILE][COUNT], float (&to)[TILE][COUNT * lanes<V>]) {
  BBFAST_UNROLL
  for (int t = 0; t < TILE; ++t) {
    BBFAST_UNROLL
    for (int v = 0; v < COUNT; ++v) {
      store(to[t] + v * lanes<V>, sum[t][v]);
      sum[t][v] = V{};
    }
  }
}

// `COUNT` vectors of output channels from `column` on, for `TILE` pixels from `row` on, whose inputs are `pixels`.
template <class V, int TILE, int COUNT>
BBFAST_INLINE void run_tile(
    const Product& p, const float* panel, const float* const* pixels, int64_t row, int64_t column) {
  constexpr int64_t WIDTH = COUNT * lanes<V>;
  V sum[TILE][COUNT] = {};
  const float* x[TILE];
  BBFAST_UNROLL
  for (int t = 0; t < TILE; ++t) x[t] = pixels[t];
  int64_t k = std::min(CHAIN, p.channels);
  add_products<V>(sum, panel, x, 0, k);
  while (k < p.channels) {
    float earlier[TILE][WIDTH];
    move_to<V>(sum, earlier);
    const int64_t end = std::min(k + CHAIN, p.channels);
    add_products<V>(sum, panel, x, k, end);
    add_from<V>(sum, earlier);
    k = end;
  }
  float* out = p.y + row * p.out_channels + column;
  const float* residual = p.residual == nullptr ? nullptr : p.residual + row * p.residual_stride + column;
  const int64_t valid = p.out_channels - column;
  if (valid >= WIDTH) {
    finish_tile(p.epilogue, sum, column, residual, p.residual_stride, out, p.out_channels);
    return;
  }
  float padded_residual[TILE][WIDTH] = {}, padded_out[TILE][WIDTH];  // the last vector hangs over the edge
  if (residual != nullptr) {
    for (int t = 0; t < TILE; ++t) std::copy_n(residual + t * p.residual_stride, valid, padded_residual[t]);
  }
  finish_tile(p.epilogue, sum, column, padded_residual[0], WIDTH, padded_out[0], WIDTH);
  for (int t = 0; t < TILE; ++t) std::copy_n(padded_out[t], valid, out + t * p.out_channels);
}

template <class V, int COUNT>
BBFAST_INLINE void run_panel(
    const Product& p, const float* panel, const float* const* pixels, int64_t begin, int64_t end, int64_t column) {
  int64_t row = begin;
  for (; row + ROWS <= end; row += ROWS, pixels += ROWS) run_tile<V, ROWS, COUNT>(p, panel, pixels, row, column);
  for (; row + 2 <= end; row += 2, pixels += 2) run_tile<V, 2, COUNT>(p, panel, pixels, row, column);
  if (row < end) run_tile<V, 1, COUNT>(p, panel, pixels, row, column);
}

// The inputs of the pixels [begin, end).
void find_pixels(const Product& p, int64_t begin, int64_t end, const float** pixels) {
  int64_t column = begin % p.out_width;
  int64_t row = begin / p.out_width % p.out_height;
  int64_t sample = begin / p.out_width / p.out_height;
  for (int64_t i = begin; i < end; ++i) {
    *pixels++ = p.x + sample * p.x_stride_n + row * p.x_stride_h + column * p.x_stride_w;
    if (++column < p.out_width) continue;
    column = 0;
    if (++row < p.out_height) continue;
    row = 0;
    ++sample;
  }
}

// All output channels of the pixels [begin, end), at most MAX_BLOCK.
template <class V> BBFAST_INLINE void run_rows(const Product& p, int64_t begin, int64_t end) {
  const float* pixels[MAX_BLOCK];
  find_pixels(p, begin, end, pixels);
  int64_t column = 0;
  const float* panel = p.panels;
  for (; column + full_width<V> <= p.out_channels; column += full_width<V>) {
    run_panel<V, VECTORS>(p, panel, pixels, begin, end, column);
    panel += p.channels * full_width<V>;
  }
  for (; column < p.out_channels; column += lanes<V>) {
    run_panel<V, 1>(p, panel, pixels, begin, end, column);
    panel += p.channels * lanes<V>;
  }
  if (is_long(p.epilogue.act)) {
    activate<V>(p.epilogue.act, p.y + begin * p.out_channels, (end - begin) * p.out_channels);
  }
}

using RowsFunction = void (*)(const Product&, int64_t, int64_t);

void run_rows_baseline(const Product& p, int64_t begin, int64_t end) { run_rows<Vec4>(p, begin, end); }

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) void run_rows_avx2(const Product& p, int64_t begin, int64_t end) {
  run_rows<Vec8>(p, begin, end);
}

__attribute__((target("avx2,fma,avx512f,avx512vl"))) void run_rows_avx512(
    const Product& p, int64_t begin, int64_t end) {
  run_rows<Vec16>(p, begin, end);
}
#endif

struct InstructionSet {
  int64_t lanes;
  RowsFunction run_rows;
};

InstructionSet best_instruction_set() {
#if defined(__x86_64__)
  return best_of<InstructionSet>({lanes<Vec4>, run_rows_baseline}, {lanes<Vec8>, run_rows_avx2}, {lanes<Vec16>, run_rows_avx512});
#else
  return {lanes<Vec4>, run_rows_baseline};
#endif
}

const InstructionSet INSTRUCTION_SET = best_instruction_set();

// Packs [O, C] into panels [C][width], zeros beyond O: full panels first, then single vectors.
void pack(const at::Tensor& weight, float* panels, int64_t lane_count) {
  const int64_t out_channels = weight.size(0), channels = weight.size(1);
  const at::Tensor contiguous = weight.contiguous();
  const float* source = contiguous.const_data_ptr<float>();
  const int64_t full = VECTORS * lane_count;
  const int64_t full_panels = out_channels / full;
  const int64_t single_panels = (out_channels - full_panels * full + lane_count - 1) / lane_count;
  at::parallel_for(0, full_panels + single_panels, 1 + 32768 / (channels * full), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t width = i < full_panels ? full : lane_count;
      const int64_t column = i < full_panels ? i * full : full_panels * full + (i - full_panels) * lane_count;
      const int64_t valid = std::min(width, out_channels - column);
      float* panel = panels + column * channels;
      if (valid < width) std::fill_n(panel, channels * width, 0.0f);
      pack_columns(source + column * channels, channels, panel, 0, valid, width, [](int64_t j) { return j; });
    }
  });
}

// ---- checks -------------------------------------------------------------------------------------------------

// The distance between pixels of a [N, C, H, W] map whose pixels follow each other and hold their channels together.
int64_t pixel_stride(const char* name, const at::Tensor& t) {
  const int64_t stride = t.stride(3);
  const bool even = (t.size(1) == 1 || t.stride(1) == 1) && (t.size(2) == 1 || t.stride(2) == t.size(3) * stride) &&
      (t.size(0) == 1 || t.stride(0) == t.size(2) * t.size(3) * stride);
  TORCH_CHECK_VALUE(even, name, " must be dense channels_last, got strides ", t.strides(), " for shape ", t.sizes());
  return stride;
}

}  // namespace

at::Tensor pointwise_conv_bn_act_cpu(
    const at::Tensor& x,
    const at::Tensor& weight,
    const BatchNorm& bn,
    const std::optional<at::Tensor>& residual,
    std::array<int64_t, 2> stride,
    const std::string& act) {
  check_float_cpu("x", x, 4);
  check_float_cpu("weight", weight, 4);
  check_channels_together("x", x);
  check_at_least("stride", stride, 1);
  const int64_t batch = x.size(0), channels = x.size(1), out_channels = weight.size(0);
  const int64_t height = output_size('H', x.size(2), 0, 0, 1, 1, stride[0]);
  const int64_t width = output_size('W', x.size(3), 0, 0, 1, 1, stride[1]);
  TORCH_CHECK_VALUE(
      channels > 0 && out_channels > 0 && weight.size(1) == channels && weight.size(2) == 1 && weight.size(3) == 1,
      "weight must have shape [O, ", channels, ", 1, 1] with C as in x, got ", weight.sizes());

  Product p;
  p.epilogue.act = parse_act(act);
  p.rows = batch * height * width;
  p.channels = channels;
  p.out_channels = out_channels;
  p.x = x.const_data_ptr<float>();
  p.out_height = height;
  p.out_width = width;
  p.x_stride_n = x.stride(0);
  p.x_stride_h = x.stride(2) * stride[0];
  p.x_stride_w = x.stride(3) * stride[1];
  p.residual = nullptr;
  p.residual_stride = 0;
  if (residual.has_value()) {
    check_float_cpu("residual", *residual, 4);
    TORCH_CHECK_VALUE(
        residual->sizes() == at::IntArrayRef({batch, out_channels, height, width}),
        "residual must have the output's shape, got ", residual->sizes());
    p.residual = residual->const_data_ptr<float>();
    p.residual_stride = pixel_stride("residual", *residual);
  }
  at::Tensor y = at::empty({batch, out_channels, height, width}, x.options(), at::MemoryFormat::ChannelsLast);
  if (p.rows == 0) return y;
  p.y = y.mutable_data_ptr<float>();

  const int64_t lane_count = INSTRUCTION_SET.lanes;
  const int64_t padded = (out_channels + lane_count - 1) / lane_count * lane_count;
  at::Tensor scratch = at::empty({padded * (channels + 2)}, x.options());
  float* panels = scratch.mutable_data_ptr<float>();
  float* vectors = panels + padded * channels;
  pack(weight, panels, lane_count);
  std::fill_n(vectors, 2 * padded, 0.0f);
  fold_batch_norm(bn, out_channels, vectors, vectors + padded);
  p.panels = panels;
  p.epilogue.scale = vectors;
  p.epilogue.shift = vectors + padded;

  // A block's input fills at most half of a 512 KiB L2 cache; blocks differ by a tile at most and every thread gets as
  // many as the others, or the last one would keep them waiting.
  const int64_t largest = std::clamp<int64_t>(65536 / channels / ROWS, 1, MAX_BLOCK / ROWS);
  const int64_t tiles = (p.rows + ROWS - 1) / ROWS;
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), tiles);
  const int64_t blocks = (tiles + threads * largest - 1) / (threads * largest) * threads;
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      INSTRUCTION_SET.run_rows(p, tiles * i / blocks * ROWS, std::min(tiles * (i + 1) / blocks * ROWS, p.rows));
    }
  });
  return y;
}

}  // namespace bbfast
