#pragma once

// Where the pixels of padded, shifted windows lie in a map: the index arithmetic that the CPU and the CUDA copies share.
//
// Along each axis a map of `length` pixels is rolled by `shift` and padded to whole windows, in either order. A
// position of the result holds a pixel of the map or padding, and no pixel is held twice. So one walk over the windows
// serves both copies: window_partition reads the map there (zeros for padding), window_reverse writes it.
//
// No torch header here: window.cu is compiled by nvcc, which would take minutes over them.

#include <cstdint>

#ifdef __CUDACC__
#define BBFAST_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define BBFAST_HOST_DEVICE inline
#endif

namespace bbfast {

// ---- one axis ----------------------------------------------------------------------------------------------

// Rows or columns, in pixels.
template <class Index>
struct WindowAxis {
  Index length;  // of the map
  Index window;
  Index count;   // windows
  Index period;  // where the roll wraps around: `length` if it came before the padding, else count * window
  Index shift;   // 0 <= shift < period
};

inline WindowAxis<int64_t> make_window_axis(int64_t length, int64_t window, int64_t shift, bool pad_first) {
  const int64_t count = length / window + (length % window != 0);
  const int64_t period = pad_first ? count * window : length;
  return {length, window, count, period, shift % period};
}

// The pixel of the map at `position` of the rolled and padded axis, or -1 where that is padding.
template <class Index>
BBFAST_HOST_DEVICE Index map_position(const WindowAxis<Index>& axis, Index position) {
  if (position >= axis.period) return -1;
  const Index until_wrap = axis.period - axis.shift;
  const Index found = position < until_wrap ? position + axis.shift : position - until_wrap;
  return found < axis.length ? found : -1;
}

// ---- one copy ----------------------------------------------------------------------------------------------

// All that a copy between a map [B, H, W, C] and its windows [B * windows, window rows * window columns, C] needs.
// Channels lie side by side in both; all strides are in bytes.
struct WindowCopy {
  char* map;
  char* windows;
  int64_t batch;
  int64_t pixel_bytes;
  WindowAxis<int64_t> rows;
  WindowAxis<int64_t> columns;
  int64_t map_batch_stride, map_row_stride, map_column_stride;
  int64_t window_stride, token_stride;
};

// ---- vectors of a pixel, as the CUDA kernel counts them -------------------------------------------------------

// Division by a number that stays the same: 64-bit indices divide, 32-bit ones multiply and shift.
template <class Index>
struct Divider {
  Index divisor;
  explicit Divider(Index divisor) : divisor(divisor) {}
  BBFAST_HOST_DEVICE Index operator()(Index n) const { return n / divisor; }
};

// Exact for 0 <= n < 2^31 and 1 <= divisor < 2^31 (Granlund and Montgomery, 1994): with 2^shift the first power of two
// that is not below the divisor, n / divisor = (n * (2^32 + multiplier)) >> (32 + shift).
template <>
struct Divider<int32_t> {
  int32_t divisor;
  uint32_t multiplier;
  uint32_t shift = 0;
  explicit Divider(int32_t divisor) : divisor(divisor) {
    while ((int64_t{1} << shift) < divisor) ++shift;
    const uint64_t excess = (uint64_t{1} << shift) - static_cast<uint64_t>(divisor);
    multiplier = static_cast<uint32_t>((excess << 32) / static_cast<uint64_t>(divisor) + 1);
  }
  BBFAST_HOST_DEVICE int32_t operator()(int32_t n) const {
    const uint32_t dividend = static_cast<uint32_t>(n);
#ifdef __CUDA_ARCH__
    const uint32_t high = __umulhi(dividend, multiplier);
#else
    const uint32_t high = static_cast<uint32_t>((static_cast<uint64_t>(dividend) * multiplier) >> 32);
#endif
    return static_cast<int32_t>((dividend + high) >> shift);
  }
};

// Offsets in bytes; `map` is -1 for padding.
struct WindowPlace {
  int64_t map;
  int64_t windows;
};

// Finds both places of the n-th vector, counted as the windows lie: window by window, token by token.
template <class Index>
struct WindowPlaces {
  Divider<Index> vectors;  // of a pixel
  Divider<Index> window_columns, window_rows;
  Divider<Index> windows_across, windows_down;
  WindowAxis<Index> rows, columns;
  int64_t map_batch_stride, map_row_stride, map_column_stride;
  int64_t window_stride, token_stride;
  int64_t vector_bytes;

  WindowPlaces(const WindowCopy& copy, int64_t vector_bytes)
      : vectors(static_cast<Index>(copy.pixel_bytes / vector_bytes)),
        window_columns(static_cast<Index>(copy.columns.window)),
        window_rows(static_cast<Index>(copy.rows.window)),
        windows_across(static_cast<Index>(copy.columns.count)),
        windows_down(static_cast<Index>(copy.rows.count)),
        rows(narrow(copy.rows)),
        columns(narrow(copy.columns)),
        map_batch_stride(copy.map_batch_stride),
        map_row_stride(copy.map_row_stride),
        map_column_stride(copy.map_column_stride),
        window_stride(copy.window_stride),
        token_stride(copy.token_stride),
        vector_bytes(vector_bytes) {}

  BBFAST_HOST_DEVICE WindowPlace operator()(Index n) const {
    const Index pixel = vectors(n);
    const int64_t within_pixel = static_cast<int64_t>(n - pixel * vectors.divisor) * vector_bytes;
    const Index window_row = window_columns(pixel);
    const Index column = pixel - window_row * window_columns.divisor;
    const Index window = window_rows(window_row);
    const Index row = window_row - window * window_rows.divisor;
    const Index band = windows_across(window);
    const Index across = window - band * windows_across.divisor;
    const Index sample = windows_down(band);
    const Index down = band - sample * windows_down.divisor;

    const Index token = row * window_columns.divisor + column;
    const int64_t in_windows = window * window_stride + token * token_stride + within_pixel;
    const Index y = map_position(rows, static_cast<Index>(down * window_rows.divisor + row));
    const Index x = map_position(columns, static_cast<Index>(across * window_columns.divisor + column));
    if (y < 0 || x < 0) return {-1, in_windows};
    return {sample * map_batch_stride + y * map_row_stride + x * map_column_stride + within_pixel, in_windows};
  }

 private:
  static WindowAxis<Index> narrow(const WindowAxis<int64_t>& axis) {
    return {static_cast<Index>(axis.length), static_cast<Index>(axis.window), static_cast<Index>(axis.count),
            static_cast<Index>(axis.period), static_cast<Index>(axis.shift)};
  }
};

// How many vectors the windows hold, padding included.
inline int64_t count_vectors(const WindowCopy& copy, int64_t vector_bytes) {
  const int64_t pixels = copy.rows.count * copy.rows.window * copy.columns.count * copy.columns.window;
  return copy.batch * pixels * (copy.pixel_bytes / vector_bytes);
}

// Whether 32-bit indices count them.
inline bool fits_32_bits(int64_t vectors) { return vectors <= INT32_MAX; }

// The widest vector, of 16, 8, 4, 2 or 1 bytes, that divides every stride and both addresses.
inline int64_t widest_vector_bytes(const WindowCopy& copy) {
  const uint64_t bits = reinterpret_cast<uintptr_t>(copy.map) | reinterpret_cast<uintptr_t>(copy.windows) |
      static_cast<uint64_t>(copy.pixel_bytes | copy.map_batch_stride | copy.map_row_stride | copy.map_column_stride |
                            copy.window_stride | copy.token_stride);
  int64_t bytes = 16;
  while (bits % static_cast<uint64_t>(bytes) != 0) bytes /= 2;
  return bytes;
}

}  // namespace bbfast
