// window_partition and window_reverse on the CPU.
//
// A task is a run of window rows (one row of pixels of one window each), which threads share. Within a window row the
// pixels that lie side by side in the map, up to the wrap of the roll or the padding, are one memcpy; where the pixels
// of a slice lie apart, each pixel is one.

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>

#include "window_tensors.h"

namespace bbfast {
namespace {

// What a task copies at least: less costs more to hand out than to copy.
constexpr int64_t TASK_BYTES = 1 << 15;

// Pixels from `position` on, at most `limit`, that are all padding or follow each other in the map.
int64_t run_length(const WindowAxis<int64_t>& axis, int64_t position, int64_t found, int64_t limit) {
  if (found >= 0) {
    const int64_t until_wrap = axis.period - position;
    return std::min({limit, until_wrap, axis.length - found, axis.period - found});
  }
  int64_t run = 1;
  while (run < limit && map_position(axis, position + run) < 0) ++run;
  return run;
}

template <bool REVERSE>
void copy_pixels(const WindowCopy& copy, char* map, char* windows, int64_t pixels) {
  const bool adjacent = pixels == 1 ||
      (copy.map_column_stride == copy.pixel_bytes && copy.token_stride == copy.pixel_bytes);
  const int64_t pieces = adjacent ? 1 : pixels;
  const int64_t bytes = adjacent ? pixels * copy.pixel_bytes : copy.pixel_bytes;
  for (int64_t piece = 0; piece < pieces; ++piece) {
    char* in_map = map + piece * copy.map_column_stride;
    char* in_windows = windows + piece * copy.token_stride;
    std::memcpy(REVERSE ? in_map : in_windows, REVERSE ? in_windows : in_map, static_cast<size_t>(bytes));
  }
}

// Only window_partition comes here; it writes dense windows.
void clear_pixels(const WindowCopy& copy, char* windows, int64_t pixels) {
  std::memset(windows, 0, static_cast<size_t>(pixels * copy.pixel_bytes));
}

// The window row `row` of window `across` in the band of windows that lies `down` in `sample`.
template <bool REVERSE>
void copy_window_row(const WindowCopy& copy, int64_t sample, int64_t down, int64_t across, int64_t row) {
  const int64_t window = (sample * copy.rows.count + down) * copy.columns.count + across;
  char* windows = copy.windows + window * copy.window_stride + row * copy.columns.window * copy.token_stride;
  const int64_t y = map_position(copy.rows, down * copy.rows.window + row);
  if (y < 0) {
    if (!REVERSE) clear_pixels(copy, windows, copy.columns.window);
    return;
  }
  char* map = copy.map + sample * copy.map_batch_stride + y * copy.map_row_stride;
  const int64_t first = across * copy.columns.window;
  for (int64_t column = 0, run; column < copy.columns.window; column += run) {
    const int64_t x = map_position(copy.columns, first + column);
    run = run_length(copy.columns, first + column, x, copy.columns.window - column);
    char* target = windows + column * copy.token_stride;
    if (x >= 0) {
      copy_pixels<REVERSE>(copy, map + x * copy.map_column_stride, target, run);
    } else if (!REVERSE) {
      clear_pixels(copy, target, run);
    }
  }
}

template <bool REVERSE>
void copy_windows(const WindowCopy& copy) {
  const int64_t window_rows = copy.batch * copy.rows.count * copy.columns.count * copy.rows.window;
  const int64_t row_bytes = copy.columns.window * copy.pixel_bytes;
  const int64_t grain = std::max<int64_t>(1, TASK_BYTES / row_bytes);
  at::parallel_for(0, window_rows, grain, [&](int64_t begin, int64_t end) {
    int64_t row = begin % copy.rows.window;
    const int64_t window = begin / copy.rows.window;
    int64_t across = window % copy.columns.count;
    int64_t down = window / copy.columns.count % copy.rows.count;
    int64_t sample = window / copy.columns.count / copy.rows.count;
    for (int64_t index = begin; index < end; ++index) {
      copy_window_row<REVERSE>(copy, sample, down, across, row);
      // Count on, because four divisions per window row would cost as much as copying a short one.
      if (++row < copy.rows.window) continue;
      row = 0;
      if (++across < copy.columns.count) continue;
      across = 0;
      if (++down < copy.rows.count) continue;
      down = 0;
      ++sample;
    }
  });
}

}  // namespace

void window_partition_cpu(const WindowCopy& copy) { copy_windows<false>(copy); }

void window_reverse_cpu(const WindowCopy& copy) { copy_windows<true>(copy); }

}  // namespace bbfast
