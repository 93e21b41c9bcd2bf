// Depthwise convolution + scale and shift + activation (+ squeeze means), NHWC float32, on the CPU.
//
// A task is a band of output rows of one sample; threads share the tasks. Within a row the loop runs over chunks of
// channels, tiles of up to MAX_TILE output columns, blocks of two vectors of channels, and taps: the sums of a tile and
// block stay in registers, each input vector is loaded straight into a multiply-add, and a weight serves the whole tile.
// The input rows of a band come from memory once and from the cache for the other taps; y is written once, already
// activated.
//
// The arithmetic is written once on compiler vectors and compiled for AVX-512, AVX2 and the build's own baseline; the
// best one for the machine is picked when the library loads, so that one wheel runs everywhere.

#include "depthwise_conv_bn_act.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "checks.h"
#include "vectors.h"

namespace bbfast {
namespace {

// All that a row of output needs; strides and extents in elements.
struct Layer {
  const float* x;
  const float* weight;  // [kh, kw, C]
  const float* scale;
  const float* shift;
  float* y;             // [N, H', W', C]
  int64_t channels, height, width, out_height, out_width;
  int64_t x_stride_n, x_stride_h, x_stride_w;
  int64_t kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w, top, left;
  Act act;
  int64_t chunk;  // channels that a row is walked in; a multiple of the widest block
};

// ---- the kernel ---------------------------------------------------------------------------------------------

// Six columns of two vectors leave four of AVX2's sixteen registers for the weights and the addresses.
constexpr int MAX_TILE = 6;
// Seven sums, five weights and the input: thirteen.
constexpr int MAX_SLIDING_TILE = 7;

template <class V, int VECTORS> BBFAST_INLINE void multiply_add(V (&sum)[VECTORS], const float* input, const V (&w)[VECTORS]) {
  BBFAST_UNROLL
  for (int v = 0; v < VECTORS; ++v) {
    V values;
    load(values, input + v * lanes<V>);
    sum[v] += values * w[v];
  }
}

// One addition. Left to itself gcc keeps an offset for every column and vector, runs out of registers and fetches each
// from the stack; the empty statement hides from it where the pointer came from.
BBFAST_INLINE void advance(const float*& p, int64_t step) {
  p += step;
  asm("" : "+r"(p));
}

// Scale, shift and every activation that is short, on sums that are still in registers.
template <class V, int VECTORS, int TILE>
BBFAST_INLINE void finish_tile(const Layer& layer, const V (&sum)[TILE][VECTORS], float* out, int64_t channel) {
  V scale[VECTORS], shift[VECTORS];
  BBFAST_UNROLL
  for (int v = 0; v < VECTORS; ++v) {
    load(scale[v], layer.scale + channel + v * lanes<V>);
    load(shift[v], layer.shift + channel + v * lanes<V>);
  }
  const float low = layer.act == Act::relu || layer.act == Act::relu6 ? 0.0f : -INFINITY;
  const float high = layer.act == Act::relu6 ? 6.0f : INFINITY;
  if (layer.act == Act::hardswish) {
    BBFAST_UNROLL
    for (int t = 0; t < TILE; ++t, out += layer.channels) {
      BBFAST_UNROLL
      for (int v = 0; v < VECTORS; ++v) {
        const V values = sum[t][v] * scale[v] + shift[v];
        V gate = values * (1.0f / 6.0f) + 0.5f;
        clamp(gate, 0.0f, 1.0f);
        store(out + v * lanes<V>, values * gate);
      }
    }
  } else {
    BBFAST_UNROLL
    for (int t = 0; t < TILE; ++t, out += layer.channels) {
      BBFAST_UNROLL
      for (int v = 0; v < VECTORS; ++v) {
        V values = sum[t][v] * scale[v] + shift[v];
        clamp(values, low, high);
        store(out + v * lanes<V>, values);
      }
    }
  }
}

// `TILE` output columns from `column` on, `VECTORS` vectors of channels from `channel` on.
template <class V, int VECTORS, int TILE>
BBFAST_INLINE void run_tile(
    const Layer& layer, const float* x, float* y, int64_t row, int64_t column, int64_t channel) {
  V sum[TILE][VECTORS] = {};
  const int64_t first = column * layer.stride_w - layer.left;
  const int64_t last = first + (TILE - 1) * layer.stride_w + (layer.kernel_w - 1) * layer.dilation_w;
  const bool inside = first >= 0 && last < layer.width;
  const int64_t step = layer.stride_w * layer.x_stride_w;

  for (int64_t i = 0; i < layer.kernel_h; ++i) {
    const int64_t in_row = row * layer.stride_h - layer.top + i * layer.dilation_h;
    if (in_row < 0 || in_row >= layer.height) continue;
    const float* source = x + in_row * layer.x_stride_h + first * layer.x_stride_w + channel;
    const float* weight = layer.weight + i * layer.kernel_w * layer.channels + channel;
    for (int64_t j = 0; j < layer.kernel_w; ++j) {
      V w[VECTORS];
      BBFAST_UNROLL
      for (int v = 0; v < VECTORS; ++v) load(w[v], weight + v * lanes<V>);
      const float* input = source;
      if (inside) {
        BBFAST_UNROLL
        for (int t = 0; t < TILE; ++t) {
          multiply_add<V, VECTORS>(sum[t], input, w);
          advance(input, step);
        }
      } else {
        int64_t in_column = first + j * layer.dilation_w;
        BBFAST_UNROLL
        for (int t = 0; t < TILE; ++t) {
          if (in_column >= 0 && in_column < layer.width) multiply_add<V, VECTORS>(sum[t], input, w);
          advance(input, step);
          in_column += layer.stride_w;
        }
      }
      source += layer.dilation_w * layer.x_stride_w;
      weight += layer.channels;
    }
  }

  finish_tile<V, VECTORS, TILE>(layer, sum, y + column * layer.channels + channel, channel);
}

// Square kernels of 3 and 5 taps, known to the compiler, at stride 1 or 2: for each input row the weights are in
// registers, too, and each input vector is loaded once and serves all the outputs of the tile that it reaches. One
// vector of channels, `TILE` output columns from `column` on.
template <class V, int KERNEL, int STRIDE, int TILE>
BBFAST_INLINE void run_sliding_tile(
    const Layer& layer, const float* x, float* y, int64_t row, int64_t column, int64_t channel) {
  constexpr int COLUMNS = (TILE - 1) * STRIDE + KERNEL;
  V sum[TILE][1] = {};
  const int64_t first = column * STRIDE - layer.left;
  const bool inside = first >= 0 && first + COLUMNS <= layer.width;
  const int64_t first_row = row * STRIDE - layer.top;
  const int64_t begin = std::max<int64_t>(0, -first_row);
  const int64_t end = std::min<int64_t>(KERNEL, layer.height - first_row);
  const float* source = x + (first_row + begin) * layer.x_stride_h + first * layer.x_stride_w + channel;
  const float* weight = layer.weight + begin * KERNEL * layer.channels + channel;

  for (int64_t i = begin; i < end; ++i, source += layer.x_stride_h) {
    V w[KERNEL];
    BBFAST_UNROLL
    for (int j = 0; j < KERNEL; ++j, weight += layer.channels) load(w[j], weight);
    const float* input = source;
    BBFAST_UNROLL_ALL
    for (int c = 0; c < COLUMNS; ++c) {
      if (inside || (first + c >= 0 && first + c < layer.width)) {
        V values;
        load(values, input);
        BBFAST_UNROLL
        for (int j = 0; j < KERNEL; ++j) {
          if (c >= j && (c - j) % STRIDE == 0 && (c - j) / STRIDE < TILE) sum[(c - j) / STRIDE][0] += values * w[j];
        }
      }
      advance(input, layer.x_stride_w);
    }
  }
  finish_tile<V, 1, TILE>(layer, sum, y + column * layer.channels + channel, channel);
}

// One tile for the channels [channel, end): pairs of the widest vectors, then one of each narrower width, then scalars
// column by column (few channels get there, and each tile size costs a compilation).
template <class V, int TILE, bool WIDEST = true>
BBFAST_INLINE void run_tile_channels(
    const Layer& layer, const float* x, float* y, int64_t row, int64_t column, int64_t channel, int64_t end) {
  if constexpr (lanes<V> == 1) {
    for (; channel < end; ++channel) {
      for (int t = 0; t < TILE; ++t) run_tile<V, 1, 1>(layer, x, y, row, column + t, channel);
    }
  } else {
    if constexpr (WIDEST) {
      for (; channel + 2 * lanes<V> <= end; channel += 2 * lanes<V>) {
        run_tile<V, 2, TILE>(layer, x, y, row, column, channel);
      }
    }
    if (channel + lanes<V> <= end) {
      run_tile<V, 1, TILE>(layer, x, y, row, column, channel);
      channel += lanes<V>;
    }
    run_tile_channels<typename Traits<V>::Narrower, TILE, false>(layer, x, y, row, column, channel, end);
  }
}

// What the tiles leave to a second pass over a row's chunk, which is still in the cache: silu and gelu (long, so
// compiled once and not per tile size), and the sums over columns.
template <class V>
BBFAST_INLINE void finish_row(const Layer& layer, float* y, float* sums, int64_t channel, int64_t end) {
  for (; channel + lanes<V> <= end; channel += lanes<V>) {
    float* p = y + channel;
    V total = {};
    for (int64_t column = 0; column < layer.out_width; ++column, p += layer.channels) {
      V out;
      load(out, p);
      if (layer.act == Act::silu) {
        silu(out);
        store(p, out);
      } else if (layer.act == Act::gelu) {
        gelu(out);
        store(p, out);
      }
      total += out;
    }
    if (sums != nullptr) {
      V before;
      load(before, sums + channel);
      store(sums + channel, before + total);
    }
  }
  if constexpr (lanes<V> > 1) finish_row<typename Traits<V>::Narrower>(layer, y, sums, channel, end);
}

// Fetches what the next output row adds to the input of this one, for the columns [column, end_column) of the output:
// too few lines of a row follow each other for the hardware to see a stream.
BBFAST_INLINE void prefetch_next_row(
    const Layer& layer, const float* x, int64_t row, int64_t column, int64_t end_column, int64_t channel, int64_t end) {
  const int64_t line = 64 / sizeof(float);
  const int64_t below = row * layer.stride_h - layer.top + (layer.kernel_h - 1) * layer.dilation_h + 1;
  const int64_t last_row = std::min(below + layer.stride_h, layer.height);
  const int64_t last_column = std::min(end_column * layer.stride_w, layer.width);
  for (int64_t in_row = std::max<int64_t>(below, 0); in_row < last_row; ++in_row) {
    for (int64_t in_column = column * layer.stride_w; in_column < last_column; ++in_column) {
      const float* p = x + in_row * layer.x_stride_h + in_column * layer.x_stride_w;
      for (int64_t c = channel; c < end; c += line) __builtin_prefetch(p + c, 0, 2);
    }
  }
}

// Fetches what the next output row adds to the input under a tile, one cache line of channels. Spread over the blocks of
// channels, as too few lines of a row follow each other for the hardware to see a stream.
template <int KERNEL, int STRIDE, int TILE>
BBFAST_INLINE void prefetch_below(const Layer& layer, const float* x, int64_t row, int64_t column, int64_t channel) {
  const int64_t below = (row + 1) * STRIDE - layer.top + KERNEL - STRIDE;
  const int64_t last = std::min<int64_t>((column + TILE) * STRIDE, layer.width);
  for (int64_t in_row = std::max<int64_t>(below, 0); in_row < std::min(below + STRIDE, layer.height); ++in_row) {
    const float* p = x + in_row * layer.x_stride_h + column * STRIDE * layer.x_stride_w + channel;
    for (int64_t in_column = column * STRIDE; in_column < last; ++in_column, p += layer.x_stride_w) {
      __builtin_prefetch(p, 0, 2);
    }
  }
}

// One tile for the channels [channel, end): the widest vectors on the sliding kernel, what is left on the general one.
template <class V, int KERNEL, int STRIDE, int TILE>
BBFAST_INLINE void run_sliding_tile_channels(
    const Layer& layer, const float* x, float* y, int64_t row, int64_t column, int64_t channel, int64_t end) {
  constexpr int64_t LINE = 64 / sizeof(float);
  for (; channel + lanes<V> <= end; channel += lanes<V>) {
    if (channel % LINE < lanes<V>) prefetch_below<KERNEL, STRIDE, TILE>(layer, x, row, column, channel);
    run_sliding_tile<V, KERNEL, STRIDE, TILE>(layer, x, y, row, column, channel);
  }
  if (channel == end) return;
  for (int64_t c = column; c < column + TILE; ++c) {
    run_tile_channels<typename Traits<V>::Narrower, 1, false>(layer, x, y, row, c, channel, end);
  }
}

// Runs `run(tile size, column)` for tiles of up to MAX that cover `width` columns; sizes differ by one at most (seven
// columns are 4 + 3, not 6 + 1) and are known to the compiler.
template <int MAX, class Run> BBFAST_INLINE void for_each_tile(int64_t width, const Run& run) {
  const int64_t tiles = (width + MAX - 1) / MAX;
  const int64_t size = width / tiles, larger = width % tiles;
  int64_t column = 0;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t columns = size + (tile < larger ? 1 : 0);
    switch (columns) {
      case 1: run(std::integral_constant<int, 1>(), column); break;
      case 2: run(std::integral_constant<int, 2>(), column); break;
      case 3: run(std::integral_constant<int, 3>(), column); break;
      case 4: run(std::integral_constant<int, 4>(), column); break;
      case 5: run(std::integral_constant<int, 5>(), column); break;
      case 6: run(std::integral_constant<int, 6>(), column); break;
      default: run(std::integral_constant<int, MAX>(), column);
    }
    column += columns;
  }
}

// One output row. x: the sample's [H, W, C]; y: the row's [W', C]; sums: [C], added to, or null. KERNEL 0: any kernel.
template <class V, int KERNEL, int STRIDE>
BBFAST_INLINE void run_row(const Layer& layer, const float* x, float* y, float* sums, int64_t row) {
  for (int64_t channel = 0; channel < layer.channels; channel += layer.chunk) {
    const int64_t end = std::min(channel + layer.chunk, layer.channels);
    if constexpr (KERNEL == 0) {
      for_each_tile<MAX_TILE>(layer.out_width, [&](auto tile, int64_t column) BBFAST_INLINE_LAMBDA {
        prefetch_next_row(layer, x, row, column, column + tile, channel, end);
        run_tile_channels<V, tile>(layer, x, y, row, column, channel, end);
      });
    } else {
      for_each_tile<MAX_SLIDING_TILE>(layer.out_width, [&](auto tile, int64_t column) BBFAST_INLINE_LAMBDA {
        run_sliding_tile_channels<V, KERNEL, STRIDE, tile>(layer, x, y, row, column, channel, end);
      });
    }
    if (sums != nullptr || layer.act == Act::silu || layer.act == Act::gelu) {
      finish_row<V>(layer, y, sums, channel, end);
    }
  }
}

using RowFunction = void (*)(const Layer&, const float*, float*, float*, int64_t);

// The row function of a layer: its kernel and stride choose one of five, compiled for one instruction set.
#define BBFAST_ROW_FUNCTIONS(NAME, VECTOR, TARGET)                                                              \
  template <int KERNEL, int STRIDE>                                                                             \
  TARGET void run_row_##NAME(const Layer& layer, const float* x, float* y, float* sums, int64_t row) {          \
    run_row<VECTOR, KERNEL, STRIDE>(layer, x, y, sums, row);                                                    \
  }                                                                                                             \
  RowFunction choose_row_##NAME(int64_t kernel, int64_t stride) {                                               \
    if (kernel == 3) return stride == 1 ? run_row_##NAME<3, 1> : run_row_##NAME<3, 2>;                          \
    if (kernel == 5) return stride == 1 ? run_row_##NAME<5, 1> : run_row_##NAME<5, 2>;                          \
    return run_row_##NAME<0, 0>;                                                                                \
  }

BBFAST_ROW_FUNCTIONS(baseline, Vec4, )
#if defined(__x86_64__)
BBFAST_ROW_FUNCTIONS(avx2, Vec8, __attribute__((target("avx2,fma"))))
BBFAST_ROW_FUNCTIONS(avx512, Vec16, __attribute__((target("avx2,fma,avx512f,avx512vl"))))
#endif

struct InstructionSet {
  const char* name;
  RowFunction (*choose_row)(int64_t kernel, int64_t stride);
};

InstructionSet best_instruction_set() {
#if defined(__x86_64__)
  return best_of<InstructionSet>({"baseline", choose_row_baseline}, {"avx2", choose_row_avx2}, {"avx512", choose_row_avx512});
#else
  return {"baseline", choose_row_baseline};
#endif
}

const InstructionSet INSTRUCTION_SET = best_instruction_set();

// ---- checks -------------------------------------------------------------------------------------------------

void check_tensors(const at::Tensor& x, const at::Tensor& weight) {
  check_float_cpu("x", x, 4);
  const int64_t channels = x.size(1);
  TORCH_CHECK_VALUE(channels > 0, "x has no channels: shape ", x.sizes());
  check_channels_together("x", x);
  check_float_cpu("weight", weight, 4);
  TORCH_CHECK_VALUE(
      weight.size(0) == channels && weight.size(1) == 1 && weight.numel() > 0,
      "weight must have shape [", channels, ", 1, kh, kw] with C as in x, got ", weight.sizes());
}

// As many channels as keep the weights in a quarter of a 32 KiB L1 cache: a row is then read in long runs, which the
// prefetcher likes, and each weight still comes from the L1 cache for the next tile.
int64_t channels_per_chunk(int64_t taps) {
  const int64_t widest_block = 2 * lanes<Vec16>;
  const int64_t fitting = 8192 / (taps * static_cast<int64_t>(sizeof(float)));
  return std::max(fitting / widest_block * widest_block, widest_block);
}

// ---- squeeze ------------------------------------------------------------------------------------------------

// Adds the bands' sums in a fixed order, so that the means do not depend on the number of threads.
void mean_of_bands(const float* sums, float* squeezed, int64_t batch, int64_t bands, int64_t channels, int64_t area) {
  for (int64_t n = 0; n < batch; ++n) {
    float* out = squeezed + n * channels;
    std::copy_n(sums + n * bands * channels, channels, out);
    for (int64_t band = 1; band < bands; ++band) {
      const float* more = sums + (n * bands + band) * channels;
      for (int64_t c = 0; c < channels; ++c) out[c] += more[c];
    }
    for (int64_t c = 0; c < channels; ++c) out[c] /= static_cast<float>(area);
  }
}

}  // namespace

std::string cpu_instruction_set() { return INSTRUCTION_SET.name; }

std::tuple<at::Tensor, at::Tensor> depthwise_conv_bn_act_cpu(
    const at::Tensor& x,
    const at::Tensor& weight,
    const BatchNorm& bn,
    std::array<int64_t, 2> stride,
    std::array<int64_t, 4> padding,
    std::array<int64_t, 2> dilation,
    const std::string& act,
    bool squeeze) {
  check_tensors(x, weight);
  check_at_least("stride", stride, 1);
  check_at_least("padding", padding, 0);
  check_at_least("dilation", dilation, 1);
  const auto [top, bottom, left, right] = padding;
  const int64_t batch = x.size(0), channels = x.size(1);
  const int64_t out_height =
      output_size('H', x.size(2), top, bottom, weight.size(2), dilation[0], stride[0]);
  const int64_t out_width = output_size('W', x.size(3), left, right, weight.size(3), dilation[1], stride[1]);

  // Contiguous [kh, kw, C], copied only where it is not stored so; the outputs in the layouts promised.
  const at::Tensor taps = weight.detach().permute({2, 3, 1, 0}).contiguous();
  std::vector<float> vectors(2 * channels);
  fold_batch_norm(bn, channels, vectors.data(), vectors.data() + channels);
  const auto options = x.options().requires_grad(false);
  const at::Tensor y = at::empty({batch, out_height, out_width, channels}, options);
  const at::Tensor squeezed = at::empty(
      squeeze ? std::vector<int64_t>{batch, channels} : std::vector<int64_t>{0}, options);

  const Layer layer{
      x.const_data_ptr<float>(), taps.const_data_ptr<float>(), vectors.data(),
      vectors.data() + channels, y.mutable_data_ptr<float>(),
      channels, x.size(2), x.size(3), out_height, out_width,
      x.stride(0), x.stride(2), x.stride(3),
      weight.size(2), weight.size(3), stride[0], stride[1], dilation[0], dilation[1], top, left,
      parse_act(act),
      channels_per_chunk(weight.size(2) * weight.size(3))};

  const bool sliding = layer.kernel_h == layer.kernel_w && layer.stride_h == layer.stride_w && layer.stride_h <= 2 &&
      layer.dilation_h == 1 && layer.dilation_w == 1;
  const RowFunction run_row = INSTRUCTION_SET.choose_row(sliding ? layer.kernel_h : 0, layer.stride_h);

  // About 64 tasks whatever the number of threads; a band is at least a row.
  const int64_t bands = batch == 0 ? 0 : std::clamp<int64_t>((64 + batch - 1) / batch, 1, out_height);
  std::vector<float> sums(squeeze ? batch * bands * channels : 0);
  const int64_t task_work = (out_height * out_width * channels * (layer.kernel_h * layer.kernel_w + 4)) /
      std::max<int64_t>(bands, 1);
  const int64_t grain = std::max<int64_t>(1, 200000 / std::max<int64_t>(task_work, 1));
  at::parallel_for(0, batch * bands, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / bands, band = task % bands;
      const int64_t last = out_height * (band + 1) / bands;
      for (int64_t row = out_height * band / bands; row < last; ++row) {
        run_row(
            layer,
            layer.x + n * layer.x_stride_n,
            layer.y + (n * out_height + row) * out_width * channels,
            squeeze ? sums.data() + task * channels : nullptr,
            row);
      }
    }
  });
  if (squeeze) mean_of_bands(sums.data(), squeezed.mutable_data_ptr<float>(), batch, bands, channels, out_height * out_width);
  return {y.permute({0, 3, 1, 2}), squeezed};
}

}  // namespace bbfast
