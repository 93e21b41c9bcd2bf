// Pointwise convolution + scale and shift + residual + activation, NHWC float32, on the CPU.
//
// A matrix product, [pixels, C] x [C, O], that never leaves its sums: a tile of ROWS pixels and one panel of output
// channels stays in registers from the first input channel to the activation. The weight is packed once per call into
// panels [C][panel] (a pass over the weight, which every pixel then reads in long runs); a task is a block of pixels
// whose input stays in the L2 cache while the panels go by. Each output is one chain of multiply-adds over C.
//
// Compiled for AVX-512, AVX2 and the build's own baseline, like the depthwise kernel.

#include "pointwise_conv_bn_act.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "vectors.h"

namespace bbfast {
namespace {

// 6 pixels x 2 vectors, or 4 x 3: twelve sums, which with the weights fill AVX2's sixteen registers.
constexpr int ROWS = 6;
constexpr int VECTORS = 2;

struct Product {
  const float* x;         // [rows, channels], row stride x_stride
  const float* panels;    // for each panel: [channels][width]
  const float* scale;     // [padded out_channels]
  const float* shift;     // [padded out_channels]
  const float* residual;  // [rows, out_channels], row stride residual_stride, or null
  float* y;               // [rows, out_channels]
  int64_t rows, channels, out_channels;
  int64_t x_stride, residual_stride;
  Act act;
};

// Widths of the panels that `out_channels` are cut into: as many full ones as fit, then single vectors.
template <class V> constexpr int64_t full_width = VECTORS * lanes<V>;

// Scale, shift, residual and every activation that is short; the sums stay in registers up to the store.
template <class V, int TILE, int COUNT>
BBFAST_INLINE void finish_tile(
    const Product& p, V (&sum)[TILE][COUNT], int64_t column, const float* residual, int64_t residual_stride, float* out,
    int64_t out_stride) {
  V scale[COUNT], shift[COUNT];
  BBFAST_UNROLL
  for (int v = 0; v < COUNT; ++v) {
    load(scale[v], p.scale + column + v * lanes<V>);
    load(shift[v], p.shift + column + v * lanes<V>);
  }
  BBFAST_UNROLL
  for (int t = 0; t < TILE; ++t) {
    BBFAST_UNROLL
    for (int v = 0; v < COUNT; ++v) sum[t][v] = sum[t][v] * scale[v] + shift[v];
  }
  if (residual != nullptr) {
    BBFAST_UNROLL
    for (int t = 0; t < TILE; ++t, residual += residual_stride) {
      BBFAST_UNROLL
      for (int v = 0; v < COUNT; ++v) {
        V other;
        load(other, residual + v * lanes<V>);
        sum[t][v] += other;
      }
    }
  }
  if (p.act == Act::hardswish) {
    BBFAST_UNROLL
    for (int t = 0; t < TILE; ++t, out += out_stride) {
      BBFAST_UNROLL
      for (int v = 0; v < COUNT; ++v) {
        V gate = sum[t][v] * (1.0f / 6.0f) + 0.5f;
        clamp(gate, 0.0f, 1.0f);
        store(out + v * lanes<V>, sum[t][v] * gate);
      }
    }
  } else {
    const float low = p.act == Act::relu || p.act == Act::relu6 ? 0.0f : -INFINITY;
    const float high = p.act == Act::relu6 ? 6.0f : INFINITY;
    BBFAST_UNROLL
    for (int t = 0; t < TILE; ++t, out += out_stride) {
      BBFAST_UNROLL
      for (int v = 0; v < COUNT; ++v) {
        clamp(sum[t][v], low, high);
        store(out + v * lanes<V>, sum[t][v]);
      }
    }
  }
}

// `COUNT` vectors of output channels from `column` on, for `TILE` pixels from `row` on.
template <class V, int TILE, int COUNT>
BBFAST_INLINE void run_tile(const Product& p, const float* panel, int64_t row, int64_t column) {
  constexpr int64_t WIDTH = COUNT * lanes<V>;
  V sum[TILE][COUNT] = {};
  const float* x = p.x + row * p.x_stride;
  for (int64_t k = 0; k < p.channels; ++k, ++x) {
    V w[COUNT];
    BBFAST_UNROLL
    for (int v = 0; v < COUNT; ++v) load(w[v], panel + v * lanes<V>);
    panel += WIDTH;
    BBFAST_UNROLL
    for (int t = 0; t < TILE; ++t) {
      BBFAST_UNROLL
      for (int v = 0; v < COUNT; ++v) sum[t][v] += w[v] * x[t * p.x_stride];
    }
  }
  float* out = p.y + row * p.out_channels + column;
  const float* residual = p.residual == nullptr ? nullptr : p.residual + row * p.residual_stride + column;
  const int64_t valid = p.out_channels - column;
  if (valid >= WIDTH) {
    finish_tile<V, TILE, COUNT>(p, sum, column, residual, p.residual_stride, out, p.out_channels);
    return;
  }
  float padded_residual[TILE][WIDTH] = {}, padded_out[TILE][WIDTH];  // the last vector hangs over the edge
  if (residual != nullptr) {
    for (int t = 0; t < TILE; ++t) std::copy_n(residual + t * p.residual_stride, valid, padded_residual[t]);
  }
  finish_tile<V, TILE, COUNT>(p, sum, column, padded_residual[0], WIDTH, padded_out[0], WIDTH);
  for (int t = 0; t < TILE; ++t) std::copy_n(padded_out[t], valid, out + t * p.out_channels);
}

// silu and gelu of a block that is still in the cache: long, so compiled once and not per tile size.
template <class V> BBFAST_INLINE void activate(Act act, float* y, int64_t count) {
  for (; count >= lanes<V>; count -= lanes<V>, y += lanes<V>) {
    V values;
    load(values, y);
    if (act == Act::silu) {
      silu(values);
    } else {
      gelu(values);
    }
    store(y, values);
  }
  if constexpr (lanes<V> > 1) activate<float>(act, y, count);
}

template <class V, int COUNT>
BBFAST_INLINE void run_panel(const Product& p, const float* panel, int64_t begin, int64_t end, int64_t column) {
  int64_t row = begin;
  for (; row + ROWS <= end; row += ROWS) run_tile<V, ROWS, COUNT>(p, panel, row, column);
  for (; row + 2 <= end; row += 2) run_tile<V, 2, COUNT>(p, panel, row, column);
  if (row < end) run_tile<V, 1, COUNT>(p, panel, row, column);
}

// All output channels of the pixels [begin, end).
template <class V> BBFAST_INLINE void run_rows(const Product& p, int64_t begin, int64_t end) {
  int64_t column = 0;
  const float* panel = p.panels;
  for (; column + full_width<V> <= p.out_channels; column += full_width<V>) {
    run_panel<V, VECTORS>(p, panel, begin, end, column);
    panel += p.channels * full_width<V>;
  }
  for (; column < p.out_channels; column += lanes<V>) {
    run_panel<V, 1>(p, panel, begin, end, column);
    panel += p.channels * lanes<V>;
  }
  if (p.act == Act::silu || p.act == Act::gelu) {
    activate<V>(p.act, p.y + begin * p.out_channels, (end - begin) * p.out_channels);
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
  const int64_t stride_o = weight.stride(0), stride_c = weight.stride(1);
  const float* source = weight.const_data_ptr<float>();
  const int64_t full = VECTORS * lane_count;
  const int64_t full_panels = out_channels / full;
  const int64_t single_panels = (out_channels - full_panels * full + lane_count - 1) / lane_count;
  at::parallel_for(0, full_panels + single_panels, 1 + 16384 / (channels * full), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t width = i < full_panels ? full : lane_count;
      const int64_t column = i < full_panels ? i * full : full_panels * full + (i - full_panels) * lane_count;
      const int64_t valid = std::min(width, out_channels - column);
      float* panel = panels + column * channels;
      for (int64_t k = 0; k < channels; ++k, panel += width) {
        const float* from = source + column * stride_o + k * stride_c;
        int64_t j = 0;
        for (; j + 4 <= valid; j += 4, from += 4 * stride_o) {
          store(panel + j, Vec4{from[0], from[stride_o], from[2 * stride_o], from[3 * stride_o]});
        }
        for (; j < valid; ++j, from += stride_o) panel[j] = *from;
        for (; j < width; ++j) panel[j] = 0.0f;
      }
    }
  });
}

// ---- checks -------------------------------------------------------------------------------------------------

void check_float_cpu(const char* name, const at::Tensor& t, int64_t rank) {
  TORCH_CHECK_VALUE(t.defined(), name, " must be a tensor, got None");
  TORCH_CHECK_VALUE(t.layout() == at::kStrided, name, " must be a dense tensor, got layout ", t.layout());
  TORCH_CHECK_VALUE(t.device().is_cpu(), name, " must be on the CPU, got ", t.device());
  TORCH_CHECK_VALUE(t.scalar_type() == at::kFloat, name, " must be float32, got ", t.scalar_type());
  TORCH_CHECK_VALUE(t.dim() == rank, name, " must have ", rank, " dimensions, got shape ", t.sizes());
}

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
    const std::string& act) {
  check_float_cpu("x", x, 4);
  check_float_cpu("weight", weight, 4);
  const int64_t batch = x.size(0), channels = x.size(1), height = x.size(2), width = x.size(3);
  const int64_t out_channels = weight.size(0);
  TORCH_CHECK_VALUE(
      channels > 0 && out_channels > 0 && weight.size(1) == channels && weight.size(2) == 1 && weight.size(3) == 1,
      "weight must have shape [O, ", channels, ", 1, 1] with C as in x, got ", weight.sizes());

  Product p;
  p.act = parse_act(act);
  p.rows = batch * height * width;
  p.channels = channels;
  p.out_channels = out_channels;
  p.x = x.const_data_ptr<float>();
  p.x_stride = pixel_stride("x", x);
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
  p.scale = vectors;
  p.shift = vectors + padded;

  // A block's input fills at most half of a 512 KiB L2 cache; all blocks are of nearly one size and every thread gets
  // as many as the others, or the last one would keep them waiting.
  const int64_t largest = std::clamp<int64_t>(65536 / channels / ROWS * ROWS, ROWS, 192);
  const int64_t threads = at::get_num_threads();
  const int64_t rounds = (p.rows + threads * largest - 1) / (threads * largest);
  const int64_t block = ((p.rows + rounds * threads - 1) / (rounds * threads) + ROWS - 1) / ROWS * ROWS;
  const int64_t blocks = (p.rows + block - 1) / block;
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) INSTRUCTION_SET.run_rows(p, i * block, std::min((i + 1) * block, p.rows));
  });
  return y;
}

}  // namespace bbfast
