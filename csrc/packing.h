#pragma once

// Turning a convolution's weight, whose output channels lie one after the other, into panels whose output channels lie
// side by side, for the CPU kernels that multiply matrices.

#include <cstdint>

#include "vectors.h"

namespace bbfast {
namespace {

// Writes from[c][j], c < count and j < values, to panel[row(j)][column + c]; `width`: the panel's columns. Squares of
// four by four, since storing one value at a time takes as long as the convolution of a small map.
template <class Row>
BBFAST_INLINE void pack_columns(
    const float* from, int64_t values, float* panel, int64_t column, int64_t count, int64_t width, const Row& row) {
  float* target = panel + column;
  int64_t c = 0;
  for (; c + 4 <= count; c += 4, target += 4, from += 4 * values) {
    const float *a = from, *b = from + values, *d = from + 2 * values, *e = from + 3 * values;
    int64_t j = 0;
    for (; j + 4 <= values; j += 4) {
      Vec4 va, vb, vd, ve;
      load(va, a + j);
      load(vb, b + j);
      load(vd, d + j);
      load(ve, e + j);
      const Vec4 ab_low = __builtin_shuffle(va, vb, Int4{0, 4, 1, 5}), ab_high = __builtin_shuffle(va, vb, Int4{2, 6, 3, 7});
      const Vec4 de_low = __builtin_shuffle(vd, ve, Int4{0, 4, 1, 5}), de_high = __builtin_shuffle(vd, ve, Int4{2, 6, 3, 7});
      store(target + row(j) * width, __builtin_shuffle(ab_low, de_low, Int4{0, 1, 4, 5}));
      store(target + row(j + 1) * width, __builtin_shuffle(ab_low, de_low, Int4{2, 3, 6, 7}));
      store(target + row(j + 2) * width, __builtin_shuffle(ab_high, de_high, Int4{0, 1, 4, 5}));
      store(target + row(j + 3) * width, __builtin_shuffle(ab_high, de_high, Int4{2, 3, 6, 7}));
    }
    for (; j < values; ++j) store(target + row(j) * width, Vec4{a[j], b[j], d[j], e[j]});
  }
  for (; c < count; ++c, ++target, from += values) {
    for (int64_t j = 0; j < values; ++j) target[row(j) * width] = from[j];
  }
}

}  // namespace
}  // namespace bbfast
