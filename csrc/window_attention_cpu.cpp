// Windowed attention of a float32 map on the CPU, straight from the packed qkv of the un-partitioned map.
//
// A task is one head of one window. Its keys are transposed and its values copied into scratch that stays in the cache;
// queries are read where they lie in the map. ROWS queries at a time go all the way: their scores against every key,
// bias and mask, softmax, the product with the values, and the rows of the output at the queries' own places. Scores
// never leave the cache; what padding would ask is not computed.
//
// Compiled for AVX-512, AVX2 and the build's own baseline, like the depthwise kernel.

#include "window_attention.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "vectors.h"
#include "window.h"

namespace bbfast {
namespace {

// 6 rows x 2 vectors: twelve sums, which with two vectors of the right side fill AVX2's sixteen registers.
constexpr int ROWS = 6;
constexpr int VECTORS = 2;

// A window of 2^20 pixels a side, far from any use, keeps the products below 2^63.
constexpr int64_t MAX_WINDOW = 1 << 20;

// Scores that lie this far below their row's largest have no weight: exp would leave the normal numbers.
constexpr float FAR_BELOW = -87.0f;

struct Attention {
  const float* qkv;
  const float* padding;  // [3C], a padded token's q, k and v
  const float* bias;     // [heads, tokens, padded tokens], -inf for keys beyond the window
  float* y;              // [B, H, W, C]
  int64_t batch_stride, row_stride, column_stride;  // of qkv, in floats
  int64_t channels, heads, head_dim;
  WindowAxis<int64_t> rows, columns;
  int64_t row_shift, column_shift;
  float scale, mask_value;
  // Tokens and head_dim rounded up to whole vectors.
  int64_t padded_tokens, padded_dim;

  int64_t tokens() const { return rows.window * columns.window; }
  int64_t windows() const { return rows.count * columns.count; }
};

// Where the tokens of a window lie.
struct Window {
  std::vector<const float*> token;  // the q, k and v of each token
  std::vector<int64_t> query;       // tokens that are pixels of the map
  std::vector<float*> target;       // where in y each query's output goes
  std::vector<float> region;        // [padded tokens]: tokens of different regions were brought together by the roll
  bool masked = false;              // whether there are several regions

  explicit Window(const Attention& a) : token(a.tokens()), region(a.padded_tokens) {}
};

// Scratch of one thread.
struct Scratch {
  Window window, next_window;
  const float* const* ahead;  // tokens of the head that comes next, and where it begins in them
  int64_t ahead_offset;
  std::vector<float> keys;    // [head_dim, padded tokens]
  std::vector<float> values;  // [tokens, padded head_dim]
  std::vector<float> scores;  // [ROWS, padded tokens]
  std::vector<float> sums;    // [ROWS, padded head_dim]

  explicit Scratch(const Attention& a)
      : window(a),
        next_window(a),
        keys(a.head_dim * a.padded_tokens),
        values(a.tokens() * a.padded_dim),
        scores(ROWS * a.padded_tokens),
        sums(ROWS * a.padded_dim) {}
};

// ---- one window: where its tokens lie ---------------------------------------------------------------------------

void locate_tokens(const Attention& a, int64_t index, Window& w) {
  const int64_t sample = index / a.windows();
  const int64_t down = index % a.windows() / a.columns.count, across = index % a.columns.count;
  // The roll wraps the first rows and columns around to the end of the padded map.
  const int64_t first_wrapped_row = a.rows.count * a.rows.window - a.row_shift;
  const int64_t first_wrapped_column = a.columns.count * a.columns.window - a.column_shift;
  w.masked = (a.row_shift > 0 && down == a.rows.count - 1) || (a.column_shift > 0 && across == a.columns.count - 1);
  w.query.clear();
  w.target.clear();
  int64_t i = 0;
  for (int64_t row = down * a.rows.window; row < (down + 1) * a.rows.window; ++row) {
    const int64_t y = map_position(a.rows, row);
    for (int64_t column = across * a.columns.window; column < (across + 1) * a.columns.window; ++column, ++i) {
      const int64_t x = map_position(a.columns, column);
      w.region[i] = 2.0f * (row >= first_wrapped_row) + (column >= first_wrapped_column);
      if (y < 0 || x < 0) {
        w.token[i] = a.padding;
        continue;
      }
      w.token[i] = a.qkv + sample * a.batch_stride + y * a.row_stride + x * a.column_stride;
      w.query.push_back(i);
      w.target.push_back(a.y + ((sample * a.rows.length + y) * a.columns.length + x) * a.channels);
    }
  }
}

// ---- one head of it ---------------------------------------------------------------------------------------------

// out[t][:] = factor[t] * left[t][:depth] right[:depth][:], a row of `right` and of `out` being `width` in whole vectors.
template <class V, int TILE, int COUNT>
BBFAST_INLINE void multiply_columns(
    const float* const (&left)[TILE], const float* right, int64_t depth, int64_t width, const float (&factor)[TILE],
    float* const (&out)[TILE], int64_t column) {
  V sum[TILE][COUNT] = {};
  right += column;
  for (int64_t k = 0; k < depth; ++k, right += width) {
    V r[COUNT];
    BBFAST_UNROLL
    for (int v = 0; v < COUNT; ++v) load(r[v], right + v * lanes<V>);
    BBFAST_UNROLL
    for (int t = 0; t < TILE; ++t) {
      BBFAST_UNROLL
      for (int v = 0; v < COUNT; ++v) sum[t][v] += r[v] * left[t][k];
    }
  }
  BBFAST_UNROLL
  for (int t = 0; t < TILE; ++t) {
    BBFAST_UNROLL
    for (int v = 0; v < COUNT; ++v) store(out[t] + column + v * lanes<V>, sum[t][v] * factor[t]);
  }
}

template <class V, int TILE>
BBFAST_INLINE void multiply(
    const float* const (&left)[TILE], const float* right, int64_t depth, int64_t width, const float (&factor)[TILE],
    float* const (&out)[TILE]) {
  int64_t column = 0;
  for (; column + VECTORS * lanes<V> <= width; column += VECTORS * lanes<V>) {
    multiply_columns<V, TILE, VECTORS>(left, right, depth, width, factor, out, column);
  }
  for (; column < width; column += lanes<V>) {
    multiply_columns<V, TILE, 1>(left, right, depth, width, factor, out, column);
  }
}

template <class V> BBFAST_INLINE float largest_lane(const V& v) {
  float largest = v[0];
  for (int64_t i = 1; i < lanes<V>; ++i) largest = v[i] > largest ? v[i] : largest;
  return largest;
}

// Scores of one query to exp(score + bias + mask - the largest of them), in place; returns their sum.
template <class V>
BBFAST_INLINE float weigh(const Attention& a, const Window& w, int64_t query, const float* bias, float* scores) {
  V largest = V{} - INFINITY;
  const V region = V{} + w.region[query];
  const V mask_value = V{} + a.mask_value;
  for (int64_t j = 0; j < a.padded_tokens; j += lanes<V>) {
    V score, b;
    load(score, scores + j);
    load(b, bias + j);
    score = score + b;
    if (w.masked) {
      V other;
      load(other, w.region.data() + j);
      score = other == region ? score : score + mask_value;
    }
    largest = score > largest ? score : largest;
    store(scores + j, score);
  }
  const float row_largest = largest_lane(largest);
  const V far_below = V{} + FAR_BELOW;
  V sum = {};
  for (int64_t j = 0; j < a.padded_tokens; j += lanes<V>) {
    V below, weight;
    load(below, scores + j);
    below = below - row_largest;
    weight = below;
    exp_in_place(weight);
    weight = below < far_below ? V{} : weight;
    sum += weight;
    store(scores + j, weight);
  }
  float total = 0.0f;
  for (int64_t i = 0; i < lanes<V>; ++i) total += sum[i];
  return total;
}

// The outputs of TILE queries, from `first` on, for one head. Meanwhile what the next head needs is fetched, a like
// share of it: its few lines per token lie too far apart for the hardware to foresee.
template <class V, int TILE>
BBFAST_INLINE void attend(const Attention& a, Scratch& s, int64_t head, int64_t first) {
  const Window& w = s.window;
  const int64_t offset = head * a.head_dim;
  const float* left[TILE];
  float* out[TILE];
  float factor[TILE];
  for (int t = 0; t < TILE; ++t) {
    left[t] = w.token[w.query[first + t]] + offset;
    out[t] = s.scores.data() + t * a.padded_tokens;
    factor[t] = a.scale;
  }
  multiply<V, TILE>(left, s.keys.data(), a.head_dim, a.padded_tokens, factor, out);
  for (int t = 0; t < TILE; ++t) {
    const float* token = s.ahead[w.query[first + t]] + s.ahead_offset;
    for (int64_t d = 0; d < a.head_dim; d += 16) {
      for (int part = 0; part < 3; ++part) __builtin_prefetch(token + part * a.channels + d);
    }
  }
  const bool whole_vectors = a.padded_dim == a.head_dim;
  for (int t = 0; t < TILE; ++t) {
    const int64_t query = w.query[first + t];
    const float* bias = a.bias + (head * a.tokens() + query) * a.padded_tokens;
    left[t] = out[t];
    factor[t] = 1.0f / weigh<V>(a, w, query, bias, out[t]);
    out[t] = whole_vectors ? w.target[first + t] + offset : s.sums.data() + t * a.padded_dim;
  }
  multiply<V, TILE>(left, s.values.data(), a.tokens(), a.padded_dim, factor, out);
  if (whole_vectors) return;
  for (int t = 0; t < TILE; ++t) std::copy_n(out[t], a.head_dim, w.target[first + t] + offset);
}

// Keys turned on their side, so that the scores of neighbouring keys are one vector; values with whole vectors per row.
BBFAST_INLINE void gather(const Attention& a, Scratch& s, int64_t head) {
  const int64_t key = a.channels + head * a.head_dim, value = key + a.channels;
  for (int64_t i = 0; i < a.tokens(); ++i) {
    std::copy_n(s.window.token[i] + value, a.head_dim, s.values.data() + i * a.padded_dim);
  }
  for (int64_t i = 0; i < a.tokens(); i += 4) {
    // Squares of 4 x 4; where the window ends inside one, its last token stands in and its score is never looked at.
    const float* from[4];
    for (int64_t j = 0; j < 4; ++j) from[j] = s.window.token[std::min(i + j, a.tokens() - 1)] + key;
    float* to = s.keys.data() + i;
    int64_t d = 0;
    for (; d + 4 <= a.head_dim; d += 4, to += 4 * a.padded_tokens) {
      Vec4 k[4];
      for (int j = 0; j < 4; ++j) load(k[j], from[j] + d);
      BBFAST_UNROLL
      for (int c = 0; c < 4; ++c) store(to + c * a.padded_tokens, Vec4{k[0][c], k[1][c], k[2][c], k[3][c]});
    }
    for (; d < a.head_dim; ++d, to += a.padded_tokens) store(to, Vec4{from[0][d], from[1][d], from[2][d], from[3][d]});
  }
}

// Heads [begin, end) of the map, counted window by window.
template <class V> BBFAST_INLINE void run_heads(const Attention& a, int64_t begin, int64_t end) {
  Scratch s(a);
  locate_tokens(a, begin / a.heads, s.window);
  for (int64_t index = begin; index < end; ++index) {
    const int64_t head = index % a.heads;
    const bool last = head == a.heads - 1;
    if (last && index + 1 < end) {
      locate_tokens(a, index / a.heads + 1, s.next_window);
      s.ahead = s.next_window.token.data();
      s.ahead_offset = 0;
    } else {
      s.ahead = s.window.token.data();
      s.ahead_offset = (last ? head : head + 1) * a.head_dim;
    }
    gather(a, s, head);
    const int64_t queries = static_cast<int64_t>(s.window.query.size());
    int64_t i = 0;
    for (; i + ROWS <= queries; i += ROWS) attend<V, ROWS>(a, s, head, i);
    for (; i + 2 <= queries; i += 2) attend<V, 2>(a, s, head, i);
    if (i < queries) attend<V, 1>(a, s, head, i);
    if (last) std::swap(s.window, s.next_window);
  }
}

using HeadsFunction = void (*)(const Attention&, int64_t, int64_t);

void run_heads_baseline(const Attention& a, int64_t begin, int64_t end) { run_heads<Vec4>(a, begin, end); }

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) void run_heads_avx2(const Attention& a, int64_t begin, int64_t end) {
  run_heads<Vec8>(a, begin, end);
}

__attribute__((target("avx2,fma,avx512f,avx512vl"))) void run_heads_avx512(
    const Attention& a, int64_t begin, int64_t end) {
  run_heads<Vec16>(a, begin, end);
}
#endif

struct InstructionSet {
  int64_t lanes;
  HeadsFunction run_heads;
};

InstructionSet best_instruction_set() {
#if defined(__x86_64__)
  return best_of<InstructionSet>({lanes<Vec4>, run_heads_baseline}, {lanes<Vec8>, run_heads_avx2}, {lanes<Vec16>, run_heads_avx512});
#else
  return {lanes<Vec4>, run_heads_baseline};
#endif
}

const InstructionSet INSTRUCTION_SET = best_instruction_set();

// ---- bias -------------------------------------------------------------------------------------------------------

// The table by head, query and key. Made once per call: each window of each head reads it in long runs.
void expand_bias(const Attention& a, const at::Tensor& table, float* bias) {
  const float* rows = table.const_data_ptr<float>();
  const int64_t height = a.rows.window, width = a.columns.window, tokens = a.tokens();
  at::parallel_for(0, a.heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head) {
      for (int64_t i = 0; i < tokens; ++i) {
        float* out = bias + (head * tokens + i) * a.padded_tokens;
        for (int64_t y = 0, j = 0; y < height; ++y) {
          const int64_t first = (i / width - y + height - 1) * (2 * width - 1) + i % width + width - 1;
          for (int64_t x = 0; x < width; ++x, ++j) out[j] = rows[(first - x) * a.heads + head];
        }
        std::fill(out + tokens, out + a.padded_tokens, -INFINITY);
      }
    }
  });
}

// ---- checks -----------------------------------------------------------------------------------------------------

void check_qkv(const at::Tensor& t, int64_t num_heads) {
  TORCH_CHECK_VALUE(t.layout() == at::kStrided, "qkv must be a dense tensor, got layout ", t.layout());
  TORCH_CHECK_VALUE(t.device().is_cpu(), "qkv must be on the CPU, got ", t.device());
  TORCH_CHECK_VALUE(t.scalar_type() == at::kFloat, "qkv must be float32, got ", t.scalar_type());
  TORCH_CHECK_VALUE(t.dim() == 4, "qkv must have 4 dimensions [B, H, W, 3C], got shape ", t.sizes());
  TORCH_CHECK_VALUE(t.size(1) > 0 && t.size(2) > 0, "qkv has an empty map: shape ", t.sizes());
  TORCH_CHECK_VALUE(num_heads >= 1, "num_heads is ", num_heads, "; it must be at least 1");
  TORCH_CHECK_VALUE(
      t.size(3) > 0 && t.size(3) % (3 * num_heads) == 0,
      "qkv's last axis must hold (3, num_heads=", num_heads, ", head_dim) channels, got ", t.size(3));
  TORCH_CHECK_VALUE(
      t.stride(3) == 1, "qkv's channels must lie side by side, got strides ", t.strides());
}

// A vector or matrix of parameters as contiguous float32.
at::Tensor parameter(const char* name, const at::Tensor& t, at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(t.device().is_cpu(), name, " must be on the CPU, got ", t.device());
  TORCH_CHECK_VALUE(at::isFloatingType(t.scalar_type()), name, " must be floating-point, got ", t.scalar_type());
  TORCH_CHECK_VALUE(t.sizes() == shape, name, " must have shape ", shape, ", got ", t.sizes());
  return t.to(at::kFloat).contiguous();
}

int64_t round_up(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

}  // namespace

at::Tensor window_attention_cpu(
    const at::Tensor& qkv,
    const at::Tensor& table,
    const std::optional<at::Tensor>& qkv_bias,
    int64_t num_heads,
    std::array<int64_t, 2> window_size,
    std::array<int64_t, 2> shift_size,
    double scale,
    bool pad_first,
    double mask_value) {
  check_qkv(qkv, num_heads);
  for (const int axis : {0, 1}) {
    TORCH_CHECK_VALUE(
        shift_size[axis] >= 0 && shift_size[axis] < window_size[axis] && window_size[axis] <= MAX_WINDOW,
        "window_size and shift_size must keep 0 <= shift < window <= ", MAX_WINDOW, ", got a shift of ",
        shift_size[axis], " and a window of ", window_size[axis]);
  }
  const int64_t table_rows = (2 * window_size[0] - 1) * (2 * window_size[1] - 1);
  const at::Tensor bias_table = parameter("relative_position_bias_table", table, {table_rows, num_heads});
  at::Tensor padding;
  if (qkv_bias.has_value()) {
    padding = parameter("qkv_bias", *qkv_bias, {qkv.size(3)});
  } else {
    padding = at::empty({qkv.size(3)}, qkv.options()).zero_();
  }

  Attention a;
  a.qkv = qkv.const_data_ptr<float>();
  a.padding = padding.const_data_ptr<float>();
  a.batch_stride = qkv.stride(0);
  a.row_stride = qkv.stride(1);
  a.column_stride = qkv.stride(2);
  a.channels = qkv.size(3) / 3;
  a.heads = num_heads;
  a.head_dim = a.channels / num_heads;
  a.rows = make_window_axis(qkv.size(1), window_size[0], shift_size[0], pad_first);
  a.columns = make_window_axis(qkv.size(2), window_size[1], shift_size[1], pad_first);
  a.row_shift = shift_size[0];
  a.column_shift = shift_size[1];
  a.scale = static_cast<float>(scale);
  a.mask_value = static_cast<float>(mask_value);
  a.padded_tokens = round_up(a.tokens(), INSTRUCTION_SET.lanes);
  a.padded_dim = round_up(a.head_dim, INSTRUCTION_SET.lanes);

  const at::Tensor y = at::empty({qkv.size(0), qkv.size(1), qkv.size(2), a.channels}, qkv.options());
  if (y.numel() == 0) return y;
  a.y = y.mutable_data_ptr<float>();
  const at::Tensor bias = at::empty({num_heads, a.tokens(), a.padded_tokens}, qkv.options());
  expand_bias(a, bias_table, bias.mutable_data_ptr<float>());
  a.bias = bias.const_data_ptr<float>();

  at::parallel_for(0, qkv.size(0) * a.windows() * num_heads, 1, [&](int64_t begin, int64_t end) {
    INSTRUCTION_SET.run_heads(a, begin, end);
  });
  return y;
}

}  // namespace bbfast
