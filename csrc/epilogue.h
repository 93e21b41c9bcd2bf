#pragma once

// What follows the sums of a convolution, for the CPU kernels that keep a tile of them, TILE pixels times COUNT vectors
// of output channels, in registers. Inlined into functions compiled for one instruction set each.

#include <cmath>
#include <cstdint>

#include "vectors.h"

namespace bbfast {
namespace {

// What happens to a finished sum. The vectors are read a whole vector at a time, also where a tile hangs over the edge.
struct Epilogue {
  const float* scale;  // [out_channels, and up to a vector more]
  const float* shift;
  Act act;
};

// Scale, shift, residual and every activation that is short; the sums stay in registers up to the store.
template <class V, int TILE, int COUNT>
BBFAST_INLINE void finish_tile(
    const Epilogue& epilogue, V (&sum)[TILE][COUNT], int64_t column, const float* residual, int64_t residual_stride,
    float* out, int64_t out_stride) {
  V scale[COUNT], shift[COUNT];
  BBFAST_UNROLL
  for (int v = 0; v < COUNT; ++v) {
    load(scale[v], epilogue.scale + column + v * lanes<V>);
    load(shift[v], epilogue.shift + column + v * lanes<V>);
  }
  BBFAST_UNROLL_ALL
  for (int t = 0; t < TILE; ++t) {
    BBFAST_UNROLL
    for (int v = 0; v < COUNT; ++v) sum[t][v] = sum[t][v] * scale[v] + shift[v];
  }
  if (residual != nullptr) {
    BBFAST_UNROLL_ALL
    for (int t = 0; t < TILE; ++t, residual += residual_stride) {
      BBFAST_UNROLL
      for (int v = 0; v < COUNT; ++v) {
        V other;
        load(other, residual + v * lanes<V>);
        sum[t][v] += other;
      }
    }
  }
  if (epilogue.act == Act::hardswish) {
    BBFAST_UNROLL_ALL
    for (int t = 0; t < TILE; ++t, out += out_stride) {
      BBFAST_UNROLL
      for (int v = 0; v < COUNT; ++v) {
        V gate = sum[t][v] * (1.0f / 6.0f) + 0.5f;
        clamp(gate, 0.0f, 1.0f);
        store(out + v * lanes<V>, sum[t][v] * gate);
      }
    }
  } else {
    const float low = epilogue.act == Act::relu || epilogue.act == Act::relu6 ? 0.0f : -INFINITY;
    const float high = epilogue.act == Act::relu6 ? 6.0f : INFINITY;
    BBFAST_UNROLL_ALL
    for (int t = 0; t < TILE; ++t, out += out_stride) {
      BBFAST_UNROLL
      for (int v = 0; v < COUNT; ++v) {
        clamp(sum[t][v], low, high);
        store(out + v * lanes<V>, sum[t][v]);
      }
    }
  }
}

// The activations that finish_tile leaves out, on values that are still in the cache: long, so compiled once and not
// per tile size.
[[maybe_unused]] bool is_long(Act act) { return act == Act::silu || act == Act::gelu; }

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

}  // namespace
}  // namespace bbfast
