// Convolution 3 x 3 + scale and shift + residual + activation, NHWC float32, on the CPU, by Winograd's F(2x2, 3x3).
//
// An output tile of 2 x 2 pixels needs a 4 x 4 patch of the input. Transformed, patch and kernel multiply element by
// element, so a convolution is 16 matrix products [tiles, C] x [C, O] between cheap transforms: 16 multiplications for
// 4 outputs instead of 36.
//
// The weight is transformed once per call, straight into panels [16][C][width]. A task is a block of tiles: its
// transformed input V [16][tiles][C] stays in the cache while groups of panels go by; a group's products
// M [16][tiles][columns] go back through the inverse transform, with everything that follows, to y. Each product is a
// chain of multiply-adds over at most DEPTH channels, then a sum of chains.
//
// Compiled for AVX-512, AVX2 and the build's own baseline, like the other kernels.

#include "winograd_conv_bn_act.h"

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>

#include "matrix_tile.h"
#include "vectors.h"

namespace bbfast {
namespace {

constexpr int PATCH = 4;               // pixels of a patch's side
constexpr int TILE = 2;                // and of its tile's
constexpr int POINTS = PATCH * PATCH;  // products per tile and pair of channels
constexpr int TAPS = 9;

constexpr int64_t DEPTH = 256;           // a panel's part of 16 columns fills half of a 32 KiB L1 cache
constexpr int64_t LARGEST_BLOCK = 96;    // tiles
constexpr int64_t LARGEST_GROUP = 128;   // columns of M, full panels for every instruction set
constexpr int64_t WEIGHT_CHANNELS = 16;  // transformed at once, from a buffer in the L1 cache

// A channels_last map: pixel (n, h, w) begins at data[n * stride_n + h * stride_h + w * stride_w].
struct Map {
  const float* data = nullptr;
  int64_t stride_n = 0, stride_h = 0, stride_w = 0;

  const float* pixel(int64_t n, int64_t h, int64_t w) const { return data + n * stride_n + h * stride_h + w * stride_w; }
};

struct Layer {
  Map x, residual;      // residual.data may be null
  const float* panels;  // for each panel: [POINTS][C][width]
  const float* scale;   // [padded O]
  const float* shift;   // [padded O]
  float* y;             // [N, H', W', O]
  bool* finite;         // [N]: turned false where a sum is not
  int64_t channels, out_channels, padded_out;
  int64_t height, width, out_height, out_width, top, left;
  int64_t tile_rows, tile_columns;
  Act act;
  float low, high;  // of every activation but hardswish
};

// Where a block's V and M lie. Planes begin a cache line further than they need to: a plane that is a multiple of 4 KiB
// would put all sixteen elements of a patch into one set of the L1 cache.
struct Scratch {
  float* patch;  // [PATCH][PATCH][C], of a tile at the map's edge
  float* spare;  // [padded O], for pixels beyond it
  float *v, *m;
  int64_t v_plane, m_plane, m_row;
};

struct Tile {
  int64_t sample, row, column;  // of the output's first pixel
};

Tile tile_at(const Layer& layer, int64_t index) {
  const int64_t row = index / layer.tile_columns, column = index % layer.tile_columns;
  return {row / layer.tile_rows, row % layer.tile_rows * TILE, column * TILE};
}

// ---- input --------------------------------------------------------------------------------------------------

// One row of B^T d B from a row of B^T d.
template <class V> BBFAST_INLINE void transform_input_row(const V (&t)[PATCH], float* v, int64_t plane) {
  store(v, t[0] - t[2]);
  store(v + plane, t[1] + t[2]);
  store(v + 2 * plane, t[2] - t[1]);
  store(v + 3 * plane, t[1] - t[3]);
}

// V = B^T d B for the channels [channel, channels); rows and columns of d at the distances given.
template <class V>
BBFAST_INLINE void transform_input(
    const float* d, int64_t stride_h, int64_t stride_w, int64_t channel, int64_t channels, float* v, int64_t plane) {
  for (; channel + lanes<V> <= channels; channel += lanes<V>) {
    const float* source = d + channel;
    float* target = v + channel;
    V first[PATCH], second[PATCH], t[PATCH];  // rows 1 and 2 of d
    BBFAST_UNROLL
    for (int j = 0; j < PATCH; ++j) {
      load(first[j], source + stride_h + j * stride_w);
      load(second[j], source + 2 * stride_h + j * stride_w);
      t[j] = first[j] + second[j];
    }
    transform_input_row(t, target + PATCH * plane, plane);
    BBFAST_UNROLL
    for (int j = 0; j < PATCH; ++j) t[j] = second[j] - first[j];
    transform_input_row(t, target + 2 * PATCH * plane, plane);
    BBFAST_UNROLL
    for (int j = 0; j < PATCH; ++j) {
      load(t[j], source + j * stride_w);
      t[j] -= second[j];
    }
    transform_input_row(t, target, plane);
    BBFAST_UNROLL
    for (int j = 0; j < PATCH; ++j) {
      load(t[j], source + 3 * stride_h + j * stride_w);
      t[j] = first[j] - t[j];
    }
    transform_input_row(t, target + 3 * PATCH * plane, plane);
  }
  if constexpr (lanes<V> > 1) {
    if (channel < channels) {
      transform_input<typename Traits<V>::Narrower>(d, stride_h, stride_w, channel, channels, v, plane);
    }
  }
}

// The patch of a tile at the map's edge, with zeros around the map: [PATCH][PATCH][C].
void copy_patch(const Layer& layer, const Tile& tile, float* patch) {
  for (int i = 0; i < PATCH; ++i) {
    const int64_t h = tile.row - layer.top + i;
    for (int j = 0; j < PATCH; ++j, patch += layer.channels) {
      const int64_t w = tile.column - layer.left + j;
      if (h >= 0 && h < layer.height && w >= 0 && w < layer.width) {
        std::copy_n(layer.x.pixel(tile.sample, h, w), layer.channels, patch);
      } else {
        std::fill_n(patch, layer.channels, 0.0f);
      }
    }
  }
}

template <class V>
BBFAST_INLINE void transform_inputs(const Layer& layer, const Scratch& scratch, int64_t begin, int64_t end) {
  float* v = scratch.v;
  for (int64_t index = begin; index < end; ++index, v += layer.channels) {
    const Tile tile = tile_at(layer, index);
    const int64_t h = tile.row - layer.top, w = tile.column - layer.left;
    const bool inside = h >= 0 && h + PATCH <= layer.height && w >= 0 && w + PATCH <= layer.width;
    if (!inside) copy_patch(layer, tile, scratch.patch);
    const float* d = inside ? layer.x.pixel(tile.sample, h, w) : scratch.patch;
    const int64_t stride_h = inside ? layer.x.stride_h : PATCH * layer.channels;
    const int64_t stride_w = inside ? layer.x.stride_w : layer.channels;
    transform_input<V>(d, stride_h, stride_w, 0, layer.channels, v, scratch.v_plane);
  }
}

// ---- products -----------------------------------------------------------------------------------------------

// m = v * panel, or m += v * panel, for `COUNT_ROWS` tiles.
template <class V, int COUNT_ROWS, int COUNT>
BBFAST_INLINE void multiply_rows(
    const float* v, int64_t channels, const float* panel, int64_t depth, float* m, int64_t m_row, bool add) {
  V sum[COUNT_ROWS][COUNT] = {};
  multiply_tile<V, COUNT_ROWS, COUNT>(sum, v, channels, panel, depth);
  BBFAST_UNROLL
  for (int t = 0; t < COUNT_ROWS; ++t, m += m_row) {
    BBFAST_UNROLL
    for (int i = 0; i < COUNT; ++i) {
      V before = {};
      if (add) load(before, m + i * lanes<V>);
      store(m + i * lanes<V>, before + sum[t][i]);
    }
  }
}

// The products of `tiles` rows of v [tiles, C] with one panel [C, width] at one point.
template <class V, int COUNT>
BBFAST_INLINE void multiply_panel(
    const float* v, int64_t channels, const float* panel, float* m, int64_t m_row, int64_t tiles) {
  for (int64_t channel = 0; channel < channels; channel += DEPTH) {
    const int64_t depth = std::min(DEPTH, channels - channel);
    const bool add = channel > 0;
    const float* rows = v + channel;
    float* out = m;
    int64_t left = tiles;
    for (; left >= ROWS; left -= ROWS, rows += ROWS * channels, out += ROWS * m_row) {
      multiply_rows<V, ROWS, COUNT>(rows, channels, panel, depth, out, m_row, add);
    }
    for (; left >= 2; left -= 2, rows += 2 * channels, out += 2 * m_row) {
      multiply_rows<V, 2, COUNT>(rows, channels, panel, depth, out, m_row, add);
    }
    if (left > 0) multiply_rows<V, 1, COUNT>(rows, channels, panel, depth, out, m_row, add);
    panel += depth * COUNT * lanes<V>;
  }
}

// M for the panels whose columns are [begin, end).
template <class V>
BBFAST_INLINE void multiply_group(
    const Layer& layer, const Scratch& scratch, int64_t tiles, int64_t begin, int64_t end) {
  for (int point = 0; point < POINTS; ++point) {
    const float* v = scratch.v + point * scratch.v_plane;
    float* m = scratch.m + point * scratch.m_plane;
    int64_t column = begin;
    for (; column + full_width<V> <= end; column += full_width<V>, m += full_width<V>) {
      const float* panel = layer.panels + (column * POINTS + point * full_width<V>) * layer.channels;
      multiply_panel<V, VECTORS>(v, layer.channels, panel, m, scratch.m_row, tiles);
    }
    for (; column < end; column += lanes<V>, m += lanes<V>) {
      const float* panel = layer.panels + (column * POINTS + point * lanes<V>) * layer.channels;
      multiply_panel<V, 1>(v, layer.channels, panel, m, scratch.m_row, tiles);
    }
  }
}

// ---- output -------------------------------------------------------------------------------------------------

// What follows a sum, for activations that are short; the others run in a second pass. `sum` are the channels from
// `column` on; where not WHOLE, they hang over the last one.
template <class V, bool WHOLE>
BBFAST_INLINE void finish(const Layer& layer, V sum, int64_t column, const float* residual, float* y) {
  const int64_t bytes = WHOLE ? sizeof(V) : (layer.out_channels - column) * sizeof(float);
  V scale, shift;
  load(scale, layer.scale + column);
  load(shift, layer.shift + column);
  sum = sum * scale + shift;
  if (residual != nullptr) {
    V other = {};
    std::memcpy(&other, residual + column, bytes);
    sum += other;
  }
  if (layer.act == Act::hardswish) {
    V gate = sum * (1.0f / 6.0f) + 0.5f;
    clamp(gate, 0.0f, 1.0f);
    sum = sum * gate;
  } else {
    clamp(sum, layer.low, layer.high);
  }
  std::memcpy(y + column, &sum, bytes);
}

// silu and gelu of what is still in the cache: long, so compiled once.
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

// One tile's output: its pixels in y, and in the residual, or null.
struct Pixels {
  float* y[TILE][TILE];
  const float* residual[TILE][TILE];
};

Pixels pixels_of(const Layer& layer, const Scratch& scratch, const Tile& tile) {
  Pixels pixels{};
  for (int i = 0; i < TILE; ++i) {
    for (int j = 0; j < TILE; ++j) {
      const int64_t h = tile.row + i, w = tile.column + j;
      const bool inside = h < layer.out_height && w < layer.out_width;  // the last tile hangs over an odd edge
      const int64_t pixel = (tile.sample * layer.out_height + h) * layer.out_width + w;
      pixels.y[i][j] = inside ? layer.y + pixel * layer.out_channels : scratch.spare;
      if (layer.residual.data == nullptr) continue;
      pixels.residual[i][j] = inside ? layer.residual.pixel(tile.sample, h, w) : scratch.spare;
    }
  }
  return pixels;
}

// A^T m A and what follows, for one vector of columns. Where a sum is not finite, `zeros` are no longer.
template <class V, bool WHOLE>
BBFAST_INLINE void transform_output(
    const Layer& layer, const float* m, int64_t plane, int64_t column, const Pixels& pixels, V& zeros) {
  V t[TILE][PATCH];
  BBFAST_UNROLL
  for (int j = 0; j < PATCH; ++j) {
    V rows[PATCH];
    BBFAST_UNROLL
    for (int i = 0; i < PATCH; ++i) load(rows[i], m + (i * PATCH + j) * plane);
    t[0][j] = rows[0] + rows[1] + rows[2];
    t[1][j] = rows[1] - rows[2] - rows[3];
  }
  BBFAST_UNROLL
  for (int i = 0; i < TILE; ++i) {
    const V left = t[i][0] + t[i][1] + t[i][2], right = t[i][1] - t[i][2] - t[i][3];
    zeros += left * 0.0f + right * 0.0f;
    finish<V, WHOLE>(layer, left, column, pixels.residual[i][0], pixels.y[i][0]);
    finish<V, WHOLE>(layer, right, column, pixels.residual[i][1], pixels.y[i][1]);
  }
}

// From M to y for the tiles [first, last) and the columns [begin, end).
template <class V>
BBFAST_INLINE void transform_outputs(
    const Layer& layer, const Scratch& scratch, int64_t first, int64_t last, int64_t begin, int64_t end) {
  const int64_t valid_end = std::min(end, layer.out_channels);
  const float* m = scratch.m;
  for (int64_t index = first; index < last; ++index, m += scratch.m_row) {
    const Tile tile = tile_at(layer, index);
    const Pixels pixels = pixels_of(layer, scratch, tile);
    V zeros = {};
    int64_t column = begin;
    for (; column + lanes<V> <= valid_end; column += lanes<V>) {
      transform_output<V, true>(layer, m + column - begin, scratch.m_plane, column, pixels, zeros);
    }
    if (column < valid_end) {
      transform_output<V, false>(layer, m + column - begin, scratch.m_plane, column, pixels, zeros);
    }
    float zero = 0.0f;
    for (int64_t i = 0; i < lanes<V>; ++i) zero += zeros[i];
    if (zero != 0.0f) layer.finite[tile.sample] = false;
    if (layer.act == Act::silu || layer.act == Act::gelu) {
      for (const auto& row : pixels.y) {
        for (float* y : row) activate<V>(layer.act, y + begin, valid_end - begin);
      }
    }
  }
}

// ---- weight -------------------------------------------------------------------------------------------------

// [4 rows][count] at distance `stride` to [count][4] at distance `out_stride`.
BBFAST_INLINE void transpose_four(const float* in, int64_t stride, int64_t count, float* out, int64_t out_stride) {
  int64_t k = 0;
  for (; k + 4 <= count; k += 4, in += 4, out += 4 * out_stride) {
    Vec4 a, b, c, d;
    load(a, in);
    load(b, in + stride);
    load(c, in + 2 * stride);
    load(d, in + 3 * stride);
    const Vec4 ab_low = __builtin_shuffle(a, b, Int4{0, 4, 1, 5}), ab_high = __builtin_shuffle(a, b, Int4{2, 6, 3, 7});
    const Vec4 cd_low = __builtin_shuffle(c, d, Int4{0, 4, 1, 5}), cd_high = __builtin_shuffle(c, d, Int4{2, 6, 3, 7});
    store(out, __builtin_shuffle(ab_low, cd_low, Int4{0, 1, 4, 5}));
    store(out + out_stride, __builtin_shuffle(ab_low, cd_low, Int4{2, 3, 6, 7}));
    store(out + 2 * out_stride, __builtin_shuffle(ab_high, cd_high, Int4{0, 1, 4, 5}));
    store(out + 3 * out_stride, __builtin_shuffle(ab_high, cd_high, Int4{2, 3, 6, 7}));
  }
  for (; k < count; ++k, ++in, out += out_stride) {
    for (int i = 0; i < 4; ++i) out[i] = in[i * stride];
  }
}

struct Weight {
  const float* data;  // [O][9 C]
  int64_t channels, out_channels;
  int64_t stride_c, stride_tap;  // 9 and 1, or 1 and C
};

// taps [TAPS * WEIGHT_CHANNELS][width]: the weights of `width` outputs from `column` on, zeros beyond the last.
void gather_taps(const Weight& weight, int64_t column, int64_t width, int64_t channel, int64_t channels, float* taps) {
  const int64_t valid = std::min(width, weight.out_channels - column), row = TAPS * weight.channels;
  const float* source = weight.data + column * row;
  const bool taps_inside = weight.stride_tap == 1;
  const int64_t runs = taps_inside ? 1 : TAPS, run = taps_inside ? TAPS * channels : channels;
  for (int64_t i = 0; i < runs; ++i) {
    const float* from = source + (taps_inside ? TAPS * channel : i * weight.channels + channel);
    float* to = taps + i * run * width;
    int64_t j = 0;
    for (; j + 4 <= valid; j += 4) transpose_four(from + j * row, row, run, to + j, width);
    for (; j < width; ++j) {
      for (int64_t k = 0; k < run; ++k) to[k * width + j] = j < valid ? from[j * row + k] : 0.0f;
    }
  }
}

// U = G g G^T of one vector of outputs and one channel; the nine taps at distance `stride`.
template <class V> BBFAST_INLINE void transform_taps(const float* taps, int64_t stride, float* u, int64_t plane) {
  V t[PATCH][3];
  BBFAST_UNROLL
  for (int j = 0; j < 3; ++j) {
    V g[3];
    BBFAST_UNROLL
    for (int i = 0; i < 3; ++i) load(g[i], taps + (i * 3 + j) * stride);
    const V outer = (g[0] + g[2]) * 0.5f, inner = g[1] * 0.5f;
    t[0][j] = g[0];
    t[1][j] = outer + inner;
    t[2][j] = outer - inner;
    t[3][j] = g[2];
  }
  BBFAST_UNROLL
  for (int i = 0; i < PATCH; ++i) {
    const V outer = (t[i][0] + t[i][2]) * 0.5f, inner = t[i][1] * 0.5f;
    store(u + (i * PATCH) * plane, t[i][0]);
    store(u + (i * PATCH + 1) * plane, outer + inner);
    store(u + (i * PATCH + 2) * plane, outer - inner);
    store(u + (i * PATCH + 3) * plane, t[i][2]);
  }
}

// One panel [POINTS][C][width] of outputs from `column` on.
template <class V> BBFAST_INLINE void transform_panel(const Weight& weight, int64_t column, int64_t width, float* panel) {
  alignas(64) float taps[TAPS * WEIGHT_CHANNELS * full_width<V>];
  for (int64_t channel = 0; channel < weight.channels; channel += WEIGHT_CHANNELS) {
    const int64_t channels = std::min(WEIGHT_CHANNELS, weight.channels - channel);
    gather_taps(weight, column, width, channel, channels, taps);
    const bool taps_inside = weight.stride_tap == 1;
    const int64_t step = (taps_inside ? TAPS : 1) * width, stride = (taps_inside ? 1 : channels) * width;
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t i = 0; i < width; i += lanes<V>) {
        float* u = panel + (channel + c) * width + i;
        transform_taps<V>(taps + c * step + i, stride, u, weight.channels * width);
      }
    }
  }
}

// ---- one instruction set --------------------------------------------------------------------------------------

// The tiles [begin, end).
template <class V>
BBFAST_INLINE void run_block(const Layer& layer, const Scratch& scratch, int64_t begin, int64_t end) {
  transform_inputs<V>(layer, scratch, begin, end);
  for (int64_t column = 0; column < layer.padded_out; column += LARGEST_GROUP) {
    const int64_t last = std::min(column + LARGEST_GROUP, layer.padded_out);
    multiply_group<V>(layer, scratch, end - begin, column, last);
    transform_outputs<V>(layer, scratch, begin, end, column, last);
  }
}

// What follows the sums of pixels [count, O], which torch has worked out.
template <class V>
BBFAST_INLINE void finish_pixels(const Layer& layer, const float* sums, const float* residual, float* y, int64_t count) {
  for (int64_t i = 0; i < count; ++i, sums += layer.out_channels, y += layer.out_channels) {
    int64_t column = 0;
    V sum = {};
    for (; column + lanes<V> <= layer.out_channels; column += lanes<V>) {
      load(sum, sums + column);
      finish<V, true>(layer, sum, column, residual, y);
    }
    if (column < layer.out_channels) {
      std::memcpy(&sum, sums + column, (layer.out_channels - column) * sizeof(float));
      finish<V, false>(layer, sum, column, residual, y);
    }
    if (layer.act == Act::silu || layer.act == Act::gelu) activate<V>(layer.act, y, layer.out_channels);
    if (residual != nullptr) residual += layer.residual.stride_w;
  }
}

struct InstructionSet {
  int64_t lanes;
  void (*transform_panel)(const Weight&, int64_t, int64_t, float*);
  void (*run_block)(const Layer&, const Scratch&, int64_t, int64_t);
  void (*finish_pixels)(const Layer&, const float*, const float*, float*, int64_t);
};

#define BBFAST_WINOGRAD(NAME, VECTOR, TARGET)                                                                      \
  TARGET void transform_panel_##NAME(const Weight& weight, int64_t column, int64_t width, float* panel) {          \
    transform_panel<VECTOR>(weight, column, width, panel);                                                         \
  }                                                                                                                \
  TARGET void run_block_##NAME(const Layer& layer, const Scratch& scratch, int64_t begin, int64_t end) {           \
    run_block<VECTOR>(layer, scratch, begin, end);                                                                 \
  }                                                                                                                \
  TARGET void finish_pixels_##NAME(                                                                                \
      const Layer& layer, const float* sums, const float* residual, float* y, int64_t count) {                     \
    finish_pixels<VECTOR>(layer, sums, residual, y, count);                                                        \
  }                                                                                                                \
  const InstructionSet NAME{lanes<VECTOR>, transform_panel_##NAME, run_block_##NAME, finish_pixels_##NAME};

BBFAST_WINOGRAD(baseline, Vec4, )
#if defined(__x86_64__)
BBFAST_WINOGRAD(avx2, Vec8, __attribute__((target("avx2,fma"))))
BBFAST_WINOGRAD(avx512, Vec16, __attribute__((target("avx2,fma,avx512f,avx512vl"))))
#endif

InstructionSet best_instruction_set() {
#if defined(__x86_64__)
  return best_of(baseline, avx2, avx512);
#else
  return baseline;
#endif
}

const InstructionSet INSTRUCTION_SET = best_instruction_set();

// ---- the steps of a call ----------------------------------------------------------------------------------------

int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }
int64_t tiles_along(int64_t pixels) { return (pixels + TILE - 1) / TILE; }

// Panels as multiply_group reads them.
void transform_weight(const at::Tensor& weight, int64_t padded_out, float* panels) {
  const int64_t out_channels = weight.size(0), channels = weight.size(1);
  const int64_t lane_count = INSTRUCTION_SET.lanes, full = VECTORS * lane_count;
  const bool channels_inside = !weight.is_contiguous();
  const Weight w{
      weight.const_data_ptr<float>(), channels, out_channels, channels_inside ? 1 : TAPS, channels_inside ? channels : 1};
  const int64_t full_panels = padded_out / full, single_panels = (padded_out - full_panels * full) / lane_count;
  at::parallel_for(0, full_panels + single_panels, 1 + 2048 / (channels * full), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t width = i < full_panels ? full : lane_count;
      const int64_t column = i < full_panels ? i * full : full_panels * full + (i - full_panels) * lane_count;
      INSTRUCTION_SET.transform_panel(w, column, width, panels + column * POINTS * channels);
    }
  });
}

// The same layer by torch's own convolution, for a sample whose sums are not finite here.
void run_sample_by_torch(
    const Layer& layer, const at::Tensor& x, const at::Tensor& weight, std::array<int64_t, 4> padding, int64_t n) {
  const auto [top, bottom, left, right] = padding;
  const at::Tensor padded = at::constant_pad_nd(x.narrow(0, n, 1), {left, right, top, bottom});
  const at::Tensor sums = at::conv2d(padded, weight).contiguous(at::MemoryFormat::ChannelsLast);
  const int64_t row = layer.out_width * layer.out_channels;
  for (int64_t h = 0; h < layer.out_height; ++h) {
    INSTRUCTION_SET.finish_pixels(
        layer, sums.const_data_ptr<float>() + h * row,
        layer.residual.data == nullptr ? nullptr : layer.residual.pixel(n, h, 0),
        layer.y + (n * layer.out_height + h) * row, layer.out_width);
  }
}

// ---- checks -------------------------------------------------------------------------------------------------

void check_float_cpu(const char* name, const at::Tensor& t) {
  TORCH_CHECK_VALUE(t.defined(), name, " must be a tensor, got None");
  TORCH_CHECK_VALUE(t.layout() == at::kStrided, name, " must be a dense tensor, got layout ", t.layout());
  TORCH_CHECK_VALUE(t.device().is_cpu(), name, " must be on the CPU, got ", t.device());
  TORCH_CHECK_VALUE(t.scalar_type() == at::kFloat, name, " must be float32, got ", t.scalar_type());
  TORCH_CHECK_VALUE(t.dim() == 4, name, " must have 4 dimensions, got shape ", t.sizes());
}

Map as_map(const char* name, const at::Tensor& t) {
  TORCH_CHECK_VALUE(
      t.size(1) == 1 || t.stride(1) == 1,
      name, " must be channels_last (stride 1 along C), got strides ", t.strides());
  return {t.const_data_ptr<float>(), t.stride(0), t.stride(2), t.stride(3)};
}

int64_t output_size(char axis, int64_t size, int64_t before, int64_t after) {
  for (const int64_t side : {before, after}) {
    TORCH_CHECK_VALUE(side >= 0 && side <= 2, "padding must be 0, 1 or 2 along ", axis, ", got ", side);
  }
  const int64_t padded = size + before + after;
  TORCH_CHECK_VALUE(padded >= 3, "weight spans 3 pixels along ", axis, " but the padded x has only ", padded);
  return padded - 2;
}

}  // namespace

at::Tensor winograd_conv_bn_act_cpu(
    const at::Tensor& x,
    const at::Tensor& weight,
    const BatchNorm& bn,
    const std::optional<at::Tensor>& residual,
    std::array<int64_t, 4> padding,
    const std::string& act) {
  check_float_cpu("x", x);
  check_float_cpu("weight", weight);
  const int64_t batch = x.size(0), channels = x.size(1), out_channels = weight.size(0);
  TORCH_CHECK_VALUE(
      channels > 0 && out_channels > 0 && weight.size(1) == channels && weight.size(2) == 3 && weight.size(3) == 3,
      "weight must have shape [O, ", channels, ", 3, 3] with C as in x, got ", weight.sizes());

  Layer layer;
  layer.act = parse_act(act);
  layer.low = layer.act == Act::relu || layer.act == Act::relu6 ? 0.0f : -INFINITY;
  layer.high = layer.act == Act::relu6 ? 6.0f : INFINITY;
  layer.channels = channels;
  layer.out_channels = out_channels;
  layer.height = x.size(2);
  layer.width = x.size(3);
  layer.top = padding[0];
  layer.left = padding[2];
  layer.out_height = output_size('H', layer.height, padding[0], padding[1]);
  layer.out_width = output_size('W', layer.width, padding[2], padding[3]);
  layer.tile_rows = tiles_along(layer.out_height);
  layer.tile_columns = tiles_along(layer.out_width);
  layer.x = as_map("x", x);
  if (residual.has_value()) {
    check_float_cpu("residual", *residual);
    TORCH_CHECK_VALUE(
        residual->sizes() == at::IntArrayRef({batch, out_channels, layer.out_height, layer.out_width}),
        "residual must have the output's shape, got ", residual->sizes());
    layer.residual = as_map("residual", *residual);
  }
  at::Tensor y = at::empty(
      {batch, out_channels, layer.out_height, layer.out_width}, x.options(), at::MemoryFormat::ChannelsLast);
  if (batch == 0) return y;
  layer.y = y.mutable_data_ptr<float>();

  const int64_t lane_count = INSTRUCTION_SET.lanes;
  layer.padded_out = round_up(out_channels, lane_count);
  const at::Tensor dense = weight.is_contiguous() || weight.is_contiguous(at::MemoryFormat::ChannelsLast)
      ? weight
      : weight.detach().contiguous();
  const at::Tensor transformed = at::empty({layer.padded_out * (POINTS * channels + 2)}, x.options());
  float* panels = transformed.mutable_data_ptr<float>();
  transform_weight(dense, layer.padded_out, panels);
  float* vectors = panels + layer.padded_out * POINTS * channels;
  std::fill_n(vectors, 2 * layer.padded_out, 0.0f);
  fold_batch_norm(bn, out_channels, vectors, vectors + layer.padded_out);
  layer.panels = panels;
  layer.scale = vectors;
  layer.shift = vectors + layer.padded_out;
  const std::unique_ptr<bool[]> finite(new bool[batch]);
  std::fill_n(finite.get(), batch, true);
  layer.finite = finite.get();

  // Blocks of nearly one size, as many for each thread.
  const int64_t tiles = batch * layer.tile_rows * layer.tile_columns;
  const int64_t threads = at::get_num_threads();
  const int64_t rounds = (tiles + threads * LARGEST_BLOCK - 1) / (threads * LARGEST_BLOCK);
  const int64_t block = round_up((tiles + rounds * threads - 1) / (rounds * threads), ROWS);
  const int64_t blocks = (tiles + block - 1) / block;

  Scratch sizes{};
  sizes.v_plane = block * channels + 16;
  sizes.m_row = std::min(layer.padded_out, LARGEST_GROUP);
  sizes.m_plane = block * sizes.m_row + 16;
  const int64_t patch_size = round_up(POINTS * channels, 16);
  const int64_t spare_size = round_up(layer.padded_out, 16);
  const int64_t per_thread = patch_size + spare_size + round_up(POINTS * (sizes.v_plane + sizes.m_plane), 16);
  const at::Tensor scratch = at::empty({std::min(threads, blocks) * per_thread}, x.options());
  float* memory = scratch.mutable_data_ptr<float>();
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    Scratch own = sizes;
    own.patch = memory + at::get_thread_num() * per_thread;
    own.spare = own.patch + patch_size;
    std::fill_n(own.spare, spare_size, 0.0f);
    own.v = own.spare + spare_size;
    own.m = own.v + POINTS * sizes.v_plane;
    for (int64_t i = begin; i < end; ++i) {
      INSTRUCTION_SET.run_block(layer, own, i * block, std::min((i + 1) * block, tiles));
    }
  });

  at::AutoDispatchBelowADInplaceOrView below;
  for (int64_t n = 0; n < batch; ++n) {
    if (!finite[n]) run_sample_by_torch(layer, x, weight, padding, n);
  }
  return y;
}

bool winograd_pays(
    const at::Tensor& x,
    const at::Tensor& weight,
    std::array<int64_t, 2> stride,
    std::array<int64_t, 4> padding,
    std::array<int64_t, 2> dilation,
    int64_t groups) {
  const std::array<int64_t, 2> one{1, 1};
  if (groups != 1 || stride != one || dilation != one || x.dim() != 4 || weight.dim() != 4) return false;
  if (weight.size(2) != 3 || weight.size(3) != 3) return false;
  if (*std::max_element(padding.begin(), padding.end()) > 2) return false;
  // Fewer channels do not pay for the transforms of the map, nor fewer tiles for that of the weight.
  constexpr int64_t LEAST_CHANNELS = 24, LEAST_SIDE = 3, LEAST_TILES = 8;
  const int64_t height = x.size(2) + padding[0] + padding[1] - 2, width = x.size(3) + padding[2] + padding[3] - 2;
  return std::min(x.size(1), weight.size(0)) >= LEAST_CHANNELS && std::min(height, width) >= LEAST_SIDE &&
      x.size(0) * tiles_along(height) * tiles_along(width) >= LEAST_TILES;
}

}  // namespace bbfast
