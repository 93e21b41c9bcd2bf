// Grouped convolution + scale and shift + residual + activation, NHWC float32, on the CPU.
//
// A group is a small matrix product per tap. A tile of neighbouring output columns and one panel (up to three vectors of
// the group's output channels) keep their sums in registers through all taps and input channels, up to the activation.
// The weight is packed once per call into panels [taps][input channels][vectors]. A task is a band of output rows; within
// it the loops run over panels, rows and tiles, so that a panel stays in the L1 cache (20 KB for groups of 24) and the
// band's input in the L2 cache. Each tile fetches its part of the next group's input: a group reads pieces of 100 bytes
// or so that lie a pixel apart, which the hardware does not see as a stream.
//
// Nothing is padded: a tile at the edge of the map leaves out its first or its last column for the taps that would read
// beyond. Groups of four channels, too narrow for a vector, go by several at a time: the weights of a vector's groups lie
// side by side, and the input is spread within each four lanes.
//
// Each output is one chain of multiply-adds over taps, then channels. Compiled for AVX-512, AVX2 and the build's own
// baseline, like the depthwise kernel.

#include "grouped_conv_bn_act.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <type_traits>
#include <vector>

#include "checks.h"
#include "epilogue.h"
#include "packing.h"
#include "vectors.h"

namespace bbfast {
namespace {

constexpr int MAX_COUNT = 3;  // vectors of output channels in a panel
constexpr int QUAD = 4;       // channels of a group that shares its vectors with others
// Columns of a tile: twelve sums, which with the weights fill AVX2's sixteen registers. With quads four weights and two
// inputs leave ten.
constexpr int MAX_TILE[] = {8, 8, 6, 4};
template <int COUNT> constexpr int max_tile = MAX_TILE[COUNT];

// Which columns of a tile take part in a tap.
enum class Part : uint8_t { all, without_first, without_last, none };

// Neighbouring output columns, and which of them take part in the taps of each kernel column.
struct Span {
  int64_t column;
  int tile;
  const Part* parts;  // [kernel_w]
};

struct Plan {
  std::vector<Span> spans;
  std::vector<Part> parts;
};

struct Layer {
  const float* x;
  const float* panels;
  const float* residual;  // or null
  float* y;
  Epilogue epilogue;
  int64_t batch, groups, depth, width;  // channels per group: input and output
  int64_t height, in_width, out_channels, out_height, out_width;
  int64_t x_stride_n, x_stride_h, x_stride_w;
  int64_t residual_stride_n, residual_stride_h, residual_stride_w;
  int64_t kernel_h, kernel_w, stride_h, stride_w, top, left;
  Plan plans[MAX_COUNT + 1];  // for panels of so many vectors; the first is for quads
};

// Output rows [row, end_row) of one sample, for the groups [group, end_group).
struct Task {
  int64_t sample, row, end_row, group, end_group;
};

// ---- the kernel ---------------------------------------------------------------------------------------------

// Adds x [TILE, depth] times panel [depth][COUNT vectors] to the columns [BEGIN, END) of the tile.
template <int BEGIN, int END, class V, int TILE, int COUNT>
BBFAST_INLINE void multiply_add(
    V (&sum)[TILE][COUNT], const float* x, int64_t step, const float* panel, int64_t depth) {
  for (int64_t k = 0; k < depth; ++k, ++x, panel += COUNT * lanes<V>) {
    V w[COUNT];
    BBFAST_UNROLL
    for (int v = 0; v < COUNT; ++v) load(w[v], panel + v * lanes<V>);
    BBFAST_UNROLL_ALL
    for (int t = BEGIN; t < END; ++t) {
      BBFAST_UNROLL
      for (int v = 0; v < COUNT; ++v) sum[t][v] += w[v] * x[t * step];
    }
  }
}

// Element K of each four lanes in all of them.
template <int K, class V> BBFAST_INLINE V spread(const V& v) {
  if constexpr (lanes<V> == 4) {
    return __builtin_shuffle(v, Int4{K, K, K, K});
  } else if constexpr (lanes<V> == 8) {
    return __builtin_shuffle(v, Int8{K, K, K, K, 4 + K, 4 + K, 4 + K, 4 + K});
  } else {
    return __builtin_shuffle(
        v, Int16{K, K, K, K, 4 + K, 4 + K, 4 + K, 4 + K, 8 + K, 8 + K, 8 + K, 8 + K, 12 + K, 12 + K, 12 + K, 12 + K});
  }
}

// The same for a vector of quads: x [TILE, one vector], panel [QUAD][one vector].
template <int BEGIN, int END, class V, int TILE>
BBFAST_INLINE void multiply_add_quads(V (&sum)[TILE][1], const float* x, int64_t step, const float* panel) {
  V w[QUAD];
  BBFAST_UNROLL
  for (int k = 0; k < QUAD; ++k) load(w[k], panel + k * lanes<V>);
  BBFAST_UNROLL_ALL
  for (int t = BEGIN; t < END; ++t) {
    V values;
    load(values, x + t * step);
    sum[t][0] += spread<0>(values) * w[0];
    sum[t][0] += spread<1>(values) * w[1];
    sum[t][0] += spread<2>(values) * w[2];
    sum[t][0] += spread<3>(values) * w[3];
  }
}

// One tile. x: the sample's map from the group's first channel on; out, residual: the tile's first column from the panel's
// first channel, `channel`, on; valid: the group's channels from there on.
template <class V, bool QUADS, int TILE, int COUNT>
BBFAST_INLINE void run_tile(
    const Layer& layer, const float* x, const float* panel, int64_t row, const Span& span, int64_t channel,
    int64_t valid, float* out, const float* residual) {
  constexpr int64_t WIDTH = COUNT * lanes<V>;
  V sum[TILE][COUNT] = {};
  const int64_t step = layer.stride_w * layer.x_stride_w;
  const int64_t depth = QUADS ? QUAD : layer.depth;
  const int64_t first_row = row * layer.stride_h - layer.top;
  const float* corner = x + first_row * layer.x_stride_h + (span.column * layer.stride_w - layer.left) * layer.x_stride_w;
  const int64_t begin = std::max<int64_t>(0, -first_row);
  const int64_t end = std::min(layer.kernel_h, layer.height - first_row);
  panel += begin * layer.kernel_w * depth * WIDTH;
  for (int64_t i = begin; i < end; ++i) {
    const float* source = corner + i * layer.x_stride_h;
    for (int64_t j = 0; j < layer.kernel_w; ++j, source += layer.x_stride_w, panel += depth * WIDTH) {
      const Part part = span.parts[j];
      if (part == Part::none) continue;
      if constexpr (QUADS) {
        if (part == Part::all) {
          multiply_add_quads<0, TILE>(sum, source, step, panel);
        } else if (part == Part::without_first) {
          multiply_add_quads<1, TILE>(sum, source, step, panel);
        } else {
          multiply_add_quads<0, TILE - 1>(sum, source, step, panel);
        }
      } else {
        if (part == Part::all) {
          multiply_add<0, TILE>(sum, source, step, panel, depth);
        } else if (part == Part::without_first) {
          multiply_add<1, TILE>(sum, source, step, panel, depth);
        } else {
          multiply_add<0, TILE - 1>(sum, source, step, panel, depth);
        }
      }
    }
  }

  if (valid >= WIDTH) {
    finish_tile(layer.epilogue, sum, channel, residual, layer.residual_stride_w, out, layer.out_channels);
    return;
  }
  float padded_residual[TILE][WIDTH] = {}, padded_out[TILE][WIDTH];  // the last vector hangs over the group's edge
  if (residual != nullptr) {
    for (int t = 0; t < TILE; ++t) std::copy_n(residual + t * layer.residual_stride_w, valid, padded_residual[t]);
  }
  finish_tile(layer.epilogue, sum, channel, padded_residual[0], WIDTH, padded_out[0], WIDTH);
  for (int t = 0; t < TILE; ++t) std::copy_n(padded_out[t], valid, out + t * layer.out_channels);
}

// Calls `run` with `tile` as a constant.
template <int MAX, class Run> BBFAST_INLINE void with_tile(int tile, const Run& run) {
  if constexpr (MAX == 1) {
    run(std::integral_constant<int, 1>());
  } else if (tile == MAX) {
    run(std::integral_constant<int, MAX>());
  } else {
    with_tile<MAX - 1>(tile, run);
  }
}

// Fetches what a tile adds to the input of an earlier one: the pieces of a map that a group reads lie too far apart for
// the hardware to see a stream. x: the map's channels [0, depth) are wanted.
BBFAST_INLINE void prefetch_input(
    const Layer& layer, const float* x, int64_t depth, int64_t row, bool last_row, const Span& span) {
  constexpr int64_t LINE = 64;
  const int64_t first_row = row * layer.stride_h - layer.top, first_column = span.column * layer.stride_w - layer.left;
  const int64_t end_row = std::min(first_row + (last_row ? layer.kernel_h : layer.stride_h), layer.height);
  const int64_t end_column = std::min(first_column + span.tile * layer.stride_w, layer.in_width);
  for (int64_t i = std::max<int64_t>(first_row, 0); i < end_row; ++i) {
    for (int64_t j = std::max<int64_t>(first_column, 0); j < end_column; ++j) {
      const uintptr_t address = reinterpret_cast<uintptr_t>(x + i * layer.x_stride_h + j * layer.x_stride_w);
      const uintptr_t end = address + depth * sizeof(float);
      for (uintptr_t line = address / LINE * LINE; line < end; line += LINE) {
        __builtin_prefetch(reinterpret_cast<const void*>(line), 0, 2);
      }
    }
  }
}

// The channels [0, depth) of the map that a task's next panel reads: x, or null, and the output row to begin with.
struct Following {
  const float* x;
  int64_t row;
};

// What follows the panel of `x_channel`: the next group on the same rows or, after the last one, the first group on the
// rows that follow.
BBFAST_INLINE Following following(const Layer& layer, const Task& task, int64_t x_channel, int64_t depth, bool last_group) {
  const float* sample = layer.x + task.sample * layer.x_stride_n;
  if (!last_group) return {sample + x_channel + depth, task.row};
  const int64_t first_channel = task.group * layer.depth;
  if (task.end_row < layer.out_height) return {sample + first_channel, task.end_row};
  if (task.sample + 1 < layer.batch) return {sample + layer.x_stride_n + first_channel, 0};
  return {nullptr, 0};
}

// A panel of COUNT vectors from output channel `channel` on, over the rows of a task; x_channel: the first of its input.
template <class V, bool QUADS, int COUNT>
BBFAST_INLINE void run_panel(
    const Layer& layer, const Task& task, const float* panel, int64_t x_channel, int64_t channel, int64_t valid,
    const Following& next) {
  constexpr int PLAN = QUADS ? 0 : COUNT;
  const int64_t depth = QUADS ? lanes<V> : layer.depth;
  const float* x = layer.x + task.sample * layer.x_stride_n + x_channel;
  for (int64_t row = task.row; row < task.end_row; ++row) {
    float* out = layer.y + (task.sample * layer.out_height + row) * layer.out_width * layer.out_channels + channel;
    const float* residual = layer.residual == nullptr
        ? nullptr
        : layer.residual + task.sample * layer.residual_stride_n + row * layer.residual_stride_h + channel;
    for (const Span& span : layer.plans[PLAN].spans) {
      if (next.x != nullptr) {
        prefetch_input(layer, next.x, depth, next.row + row - task.row, row + 1 == task.end_row, span);
      }
      with_tile<max_tile<PLAN>>(span.tile, [&](auto tile) BBFAST_INLINE_LAMBDA {
        run_tile<V, QUADS, tile, COUNT>(
            layer, x, panel, row, span, channel, valid, out + span.column * layer.out_channels,
            residual == nullptr ? nullptr : residual + span.column * layer.residual_stride_w);
      });
    }
    if (is_long(layer.epilogue.act)) {
      const int64_t count = std::min(valid, COUNT * lanes<V>);
      for (int64_t column = 0; column < layer.out_width; ++column, out += layer.out_channels) {
        activate<V>(layer.epilogue.act, out, count);
      }
    }
  }
}

// Panels that `vectors` are cut into: threes, and twos rather than a single one.
constexpr int panel_vectors(int64_t vectors) { return vectors == 4 ? 2 : vectors < MAX_COUNT ? vectors : MAX_COUNT; }

template <class V> BBFAST_INLINE void run_groups(const Layer& layer, const Task& task) {
  const int64_t taps = layer.kernel_h * layer.kernel_w;
  const int64_t vectors = (layer.width + lanes<V> - 1) / lanes<V>;
  for (int64_t group = task.group; group < task.end_group; ++group) {
    const float* panel = layer.panels + group * taps * layer.depth * vectors * lanes<V>;
    const Following next = following(layer, task, group * layer.depth, layer.depth, group + 1 == task.end_group);
    int64_t done = 0;
    while (done < vectors) {
      const int count = panel_vectors(vectors - done);
      const int64_t within = done * lanes<V>;
      with_tile<MAX_COUNT>(count, [&](auto constant) BBFAST_INLINE_LAMBDA {
        run_panel<V, false, constant>(
            layer, task, panel, group * layer.depth, group * layer.width + within, layer.width - within,
            done > 0 ? Following{nullptr, 0} : next);
      });
      panel += taps * layer.depth * count * lanes<V>;
      done += count;
    }
  }
}

// The same for quads, of which a vector holds several: as many of the widest vectors as fit, then narrower ones.
template <class V> BBFAST_INLINE void run_quads(const Layer& layer, const Task& task, int64_t group) {
  constexpr int64_t GROUPS = lanes<V> / QUAD;
  const int64_t taps = layer.kernel_h * layer.kernel_w;
  for (; group + GROUPS <= task.end_group; group += GROUPS) {
    const float* panel = layer.panels + group * taps * QUAD * QUAD;
    const Following next = following(layer, task, group * QUAD, lanes<V>, group + GROUPS == task.end_group);
    run_panel<V, true, 1>(layer, task, panel, group * QUAD, group * QUAD, lanes<V>, next);
  }
  if constexpr (lanes<V> > QUAD) run_quads<typename Traits<V>::Narrower>(layer, task, group);
}

using Function = void (*)(const Layer&, const Task&);

// How one instruction set goes about a layer: `lanes` of the vectors that its panels are made of, and what walks them.
struct Walk {
  int64_t lanes;
  Function run;
};

#define BBFAST_WALKS(NAME, VECTOR, TARGET)                                                                   \
  TARGET void run_groups_##NAME(const Layer& layer, const Task& task) { run_groups<VECTOR>(layer, task); }   \
  TARGET void run_quads_##NAME(const Layer& layer, const Task& task) { run_quads<VECTOR>(layer, task, task.group); }

#define BBFAST_AVX512 __attribute__((target("avx2,fma,avx512f,avx512vl")))

BBFAST_WALKS(baseline, Vec4, )
#if defined(__x86_64__)
BBFAST_WALKS(avx2, Vec8, __attribute__((target("avx2,fma"))))
BBFAST_WALKS(avx512, Vec16, BBFAST_AVX512)
BBFAST_AVX512 void run_groups_avx512_by_8(const Layer& layer, const Task& task) { run_groups<Vec8>(layer, task); }
#endif

Walk choose_walk(bool quads, int64_t width) {
  const Walk baseline{lanes<Vec4>, quads ? run_quads_baseline : run_groups_baseline};
#if defined(__x86_64__)
  const Walk avx2{lanes<Vec8>, quads ? run_quads_avx2 : run_groups_avx2};
  Walk avx512{lanes<Vec16>, quads ? run_quads_avx512 : run_groups_avx512};
  const int64_t beyond = width % lanes<Vec16>;
  if (!quads && beyond > 0 && beyond <= lanes<Vec8>) avx512 = {lanes<Vec8>, run_groups_avx512_by_8};
  return best_of(baseline, avx2, avx512);
#else
  return baseline;
#endif
}

// ---- preparation --------------------------------------------------------------------------------------------

// Cuts the output columns into tiles of nearly equal size (seven are 4 + 3, not 6 + 1) of at most `largest`. Columns of
// which a tap would leave out more than the first or the last of a tile go by one at a time.
Plan plan_spans(int64_t largest, int64_t width, int64_t out_width, int64_t kernel, int64_t stride, int64_t left) {
  Plan plan;
  const auto add = [&](int64_t column, int64_t tile) {
    const size_t before = plan.parts.size();
    for (int64_t j = 0; j < kernel; ++j) {
      int64_t begin = 0, end = tile;
      const auto source = [&](int64_t t) { return (column + t) * stride - left + j; };
      while (begin < tile && source(begin) < 0) ++begin;
      while (end > begin && source(end - 1) >= width) --end;
      if (begin == end) {
        plan.parts.push_back(Part::none);
      } else if (begin == 0 && end == tile) {
        plan.parts.push_back(Part::all);
      } else if (begin == 1 && end == tile) {
        plan.parts.push_back(Part::without_first);
      } else if (begin == 0 && end == tile - 1) {
        plan.parts.push_back(Part::without_last);
      } else {
        plan.parts.resize(before);
        return false;
      }
    }
    plan.spans.push_back({column, static_cast<int>(tile), nullptr});
    return true;
  };
  const int64_t tiles = (out_width + largest - 1) / largest;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t begin = out_width * i / tiles, end = out_width * (i + 1) / tiles;
    if (add(begin, end - begin)) continue;
    for (int64_t column = begin; column < end; ++column) add(column, 1);
  }
  for (size_t i = 0; i < plan.spans.size(); ++i) plan.spans[i].parts = plan.parts.data() + i * kernel;
  return plan;
}

// The weight as it lies in memory, and the row of its panel that each value of an output channel goes to.
struct Packing {
  at::Tensor weight;
  std::vector<int64_t> rows;  // tap * depth + input channel
  float* panels;
};

// All panels; columns beyond a group's width are zeros.
void pack(const Layer& layer, const Packing& packing, int64_t lane_count, bool quads) {
  const int64_t values = packing.rows.size();
  const float* weight = packing.weight.const_data_ptr<float>();
  const auto row = [rows = packing.rows.data()](int64_t j) { return rows[j]; };
  const int64_t work = values * layer.width;
  at::parallel_for(0, layer.groups, 1 + 32768 / work, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      const float* from = weight + group * layer.width * values;
      if (quads) {
        // The groups of a vector lie side by side; the last ones may have to do with a narrower vector.
        int64_t size = lane_count, first = group * QUAD / size * size;
        while (first + size > layer.out_channels) {
          size /= 2;
          first = group * QUAD / size * size;
        }
        pack_columns(from, values, packing.panels + first * values, group * QUAD - first, QUAD, size, row);
        continue;
      }
      const int64_t vectors = (layer.width + lane_count - 1) / lane_count;
      float* panel = packing.panels + group * values * vectors * lane_count;
      for (int64_t done = 0; done < vectors;) {
        const int count = panel_vectors(vectors - done);
        const int64_t columns = count * lane_count, valid = std::min(columns, layer.width - done * lane_count);
        if (valid < columns) std::fill_n(panel, values * columns, 0.0f);
        pack_columns(from + done * lane_count * values, values, panel, 0, valid, columns, row);
        panel += values * columns;
        done += count;
      }
    }
  });
}

Packing plan_packing(const at::Tensor& weight, float* panels) {
  const int64_t depth = weight.size(1), taps = weight.size(2) * weight.size(3);
  const bool channels_last = weight.is_contiguous(at::MemoryFormat::ChannelsLast);
  Packing packing{channels_last ? weight : weight.contiguous(), std::vector<int64_t>(depth * taps), panels};
  for (int64_t k = 0; k < depth; ++k) {
    for (int64_t tap = 0; tap < taps; ++tap) {
      packing.rows[channels_last ? tap * depth + k : k * taps + tap] = tap * depth + k;
    }
  }
  return packing;
}

constexpr int64_t WIDEST_GROUP = 256;  // wider ones were not measured

}  // namespace

bool grouped_pays(const at::Tensor& weight, std::array<int64_t, 2> dilation, int64_t groups) {
  if (groups <= 1 || weight.size(2) != 3 || weight.size(3) != 3 || dilation != std::array<int64_t, 2>{1, 1}) return false;
  const int64_t depth = weight.size(1), width = weight.size(0) / groups;
  return depth > 1 && width > 1 && std::max(depth, width) <= WIDEST_GROUP;
}

at::Tensor grouped_conv_bn_act_cpu(
    const at::Tensor& x,
    const at::Tensor& weight,
    const BatchNorm& bn,
    const std::optional<at::Tensor>& residual,
    std::array<int64_t, 2> stride,
    std::array<int64_t, 4> padding,
    int64_t groups,
    const std::string& act) {
  check_float_cpu("x", x, 4);
  check_channels_together("x", x);
  check_float_cpu("weight", weight, 4);
  check_at_least("stride", stride, 1);
  check_at_least("padding", padding, 0);
  TORCH_CHECK_VALUE(groups >= 1, "groups=", groups, " is not allowed; it must be at least 1");
  const auto [top, bottom, left, right] = padding;
  const int64_t batch = x.size(0), channels = x.size(1), out_channels = weight.size(0);
  TORCH_CHECK_VALUE(
      weight.numel() > 0 && weight.size(1) * groups == channels && out_channels % groups == 0,
      "weight must have shape [O, C / groups, kh, kw] with C=", channels, " as in x and O a multiple of groups=", groups,
      ", got ", weight.sizes());

  Layer layer;
  layer.batch = batch;
  layer.groups = groups;
  layer.depth = weight.size(1);
  layer.width = out_channels / groups;
  layer.height = x.size(2);
  layer.in_width = x.size(3);
  layer.out_channels = out_channels;
  layer.out_height = output_size('H', x.size(2), top, bottom, weight.size(2), 1, stride[0]);
  layer.out_width = output_size('W', x.size(3), left, right, weight.size(3), 1, stride[1]);
  layer.x = x.const_data_ptr<float>();
  layer.x_stride_n = x.stride(0);
  layer.x_stride_h = x.stride(2);
  layer.x_stride_w = x.stride(3);
  layer.residual = nullptr;
  layer.residual_stride_n = layer.residual_stride_h = layer.residual_stride_w = 0;
  if (residual.has_value()) {
    check_float_cpu("residual", *residual, 4);
    check_channels_together("residual", *residual);
    TORCH_CHECK_VALUE(
        residual->sizes() == at::IntArrayRef({batch, out_channels, layer.out_height, layer.out_width}),
        "residual must have the output's shape, got ", residual->sizes());
    layer.residual = residual->const_data_ptr<float>();
    layer.residual_stride_n = residual->stride(0);
    layer.residual_stride_h = residual->stride(2);
    layer.residual_stride_w = residual->stride(3);
  }
  layer.kernel_h = weight.size(2);
  layer.kernel_w = weight.size(3);
  layer.stride_h = stride[0];
  layer.stride_w = stride[1];
  layer.top = top;
  layer.left = left;
  layer.epilogue.act = parse_act(act);

  at::Tensor y = at::empty(
      {batch, out_channels, layer.out_height, layer.out_width}, x.options(), at::MemoryFormat::ChannelsLast);
  if (y.numel() == 0) return y;
  layer.y = y.mutable_data_ptr<float>();

  const bool quads = layer.depth == QUAD && layer.width == QUAD;
  const Walk walk = choose_walk(quads, layer.width);
  const int64_t taps = layer.kernel_h * layer.kernel_w;
  const int64_t padded = quads ? layer.width : (layer.width + walk.lanes - 1) / walk.lanes * walk.lanes;
  const int64_t vector_size = out_channels + lanes<Vec16>;
  at::Tensor scratch = at::empty({groups * padded * layer.depth * taps + 2 * vector_size}, x.options());
  float* panels = scratch.mutable_data_ptr<float>();
  float* vectors = panels + groups * padded * layer.depth * taps;
  std::fill_n(vectors, 2 * vector_size, 0.0f);
  fold_batch_norm(bn, out_channels, vectors, vectors + vector_size);
  layer.epilogue.scale = vectors;
  layer.epilogue.shift = vectors + vector_size;
  pack(layer, plan_packing(weight, panels), walk.lanes, quads);
  layer.panels = panels;
  for (int i = 0; i <= MAX_COUNT; ++i) {
    layer.plans[i] = plan_spans(MAX_TILE[i], x.size(3), layer.out_width, layer.kernel_w, stride[1], left);
  }

  // A band's input takes about half of a 512 KiB L2 cache, but at least seven rows share what passes by of the weight.
  // Where this gives threads unequal shares, the groups are divided as well.
  const int64_t sample_size = x.size(2) * x.size(3) * channels;
  const int64_t bands = std::clamp<int64_t>(sample_size / 65536, 1, std::max<int64_t>(layer.out_height / 7, 1));
  const int64_t threads = at::get_num_threads();
  const int64_t unit = quads ? lanes<Vec16> / QUAD : 1;  // groups that a vector may hold
  const int64_t units = (groups + unit - 1) / unit;
  const int64_t wanted = batch * bands % threads == 0 ? 1 : 8 * threads / (batch * bands) + 1;
  const int64_t chunks = std::min(wanted, units);
  at::parallel_for(0, chunks * batch * bands, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t chunk = i / (batch * bands), sample = i / bands % batch, band = i % bands;
      const Task task{
          sample, layer.out_height * band / bands, layer.out_height * (band + 1) / bands,
          units * chunk / chunks * unit, std::min(units * (chunk + 1) / chunks * unit, groups)};
      walk.run(layer, task);
    }
  });
  return y;
}

}  // namespace bbfast
