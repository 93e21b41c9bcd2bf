#pragma once

// The inner loop of a product of matrices on the CPU, inlined into functions compiled for one instruction set each.

#include <algorithm>
#include <cstdint>

#include "vectors.h"

namespace bbfast {
namespace {

// 6 rows x 2 vectors, or 4 x 3: twelve sums, which with the weights fill AVX2's sixteen registers.
constexpr int ROWS = 6;
constexpr int VECTORS = 2;

// Widths of the panels that columns are cut into: as many full ones as fit, then single vectors.
template <class V> constexpr int64_t full_width = VECTORS * lanes<V>;

// sum += a * panel for `TILE` rows a [TILE, depth] at distance `stride` and a panel [depth, COUNT vectors]: each sum is one
// chain of multiply-adds.
template <class V, int TILE, int COUNT>
BBFAST_INLINE void multiply_tile(
    V (&sum)[TILE][COUNT], const float* a, int64_t stride, const float* panel, int64_t depth) {
  for (int64_t k = 0; k < depth; ++k, ++a) {
    V w[COUNT];
    BBFAST_UNROLL
    for (int v = 0; v < COUNT; ++v) load(w[v], panel + v * lanes<V>);
    panel += COUNT * lanes<V>;
    BBFAST_UNROLL
    for (int t = 0; t < TILE; ++t) {
      BBFAST_UNROLL
      for (int v = 0; v < COUNT; ++v) sum[t][v] += w[v] * a[t * stride];
    }
  }
}

}  // namespace
}  // namespace bbfast
