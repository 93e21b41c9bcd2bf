// window_partition and window_reverse on tensors: checks, allocation, and the choice between CPU and CUDA.

#include "window_tensors.h"

#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <limits>

namespace bbfast {
namespace {

using Pair = std::array<int64_t, 2>;

// A window of 2^31 pixels a side, far from any use, keeps the products below 2^63.
constexpr int64_t MAX_SIZE = std::numeric_limits<int32_t>::max();

void check_pair(const char* name, Pair values, int64_t minimum) {
  for (const int64_t value : values) {
    TORCH_CHECK_VALUE(
        value >= minimum && value <= MAX_SIZE,
        name, " holds ", value, "; it must lie between ", minimum, " and ", MAX_SIZE);
  }
}

void check_tensor(const char* name, const at::Tensor& t, int64_t rank, const char* layout) {
  TORCH_CHECK_VALUE(t.layout() == at::kStrided, name, " must be a dense tensor, got layout ", t.layout());
  TORCH_CHECK_VALUE(t.dim() == rank, name, " must have ", rank, " dimensions ", layout, ", got shape ", t.sizes());
#ifdef BBFAST_WITH_CUDA
  TORCH_CHECK_VALUE(t.is_cpu() || t.is_cuda(), name, " must be on the CPU or a GPU, got ", t.device());
#else
  TORCH_CHECK_VALUE(t.is_cpu(), name, " must be on the CPU (bbfast was built without CUDA), got ", t.device());
#endif
}

at::Tensor with_adjacent_channels(const at::Tensor& t) {
  return t.size(-1) <= 1 || t.stride(-1) == 1 ? t : t.contiguous();
}

// In bytes; 0 along an axis of one element, whose stride may be anything.
int64_t stride_bytes(const at::Tensor& t, int64_t axis) {
  return t.size(axis) <= 1 ? 0 : t.stride(axis) * t.element_size();
}

WindowTensors with_copy(
    const at::Tensor& map, const at::Tensor& windows, const WindowAxis<int64_t>& rows,
    const WindowAxis<int64_t>& columns, bool map_is_read) {
  // The one that is read is only read; a tensor shared between processes or threads need not be unshared for that.
  const auto address = [](const at::Tensor& t, bool is_read) {
    return static_cast<char*>(is_read ? const_cast<void*>(t.const_data_ptr()) : t.mutable_data_ptr());
  };
  const WindowCopy copy{
      address(map, map_is_read), address(windows, !map_is_read),
      map.size(0), map.size(3) * map.element_size(),
      rows, columns,
      stride_bytes(map, 0), stride_bytes(map, 1), stride_bytes(map, 2),
      stride_bytes(windows, 0), stride_bytes(windows, 1)};
  return {map, windows, copy};
}

template <class Index>
void write_places(const WindowCopy& copy, int64_t vector_bytes, const int64_t* vectors, int64_t count, int64_t* out) {
  const WindowPlaces<Index> places(copy, vector_bytes);
  for (int64_t i = 0; i < count; ++i) {
    const WindowPlace place = places(static_cast<Index>(vectors[i]));
    out[2 * i] = place.map;
    out[2 * i + 1] = place.windows;
  }
}

}  // namespace

WindowTensors windows_of_map(const at::Tensor& x, Pair window_size, Pair shift_size, bool pad_first) {
  check_tensor("x", x, 4, "[B, H, W, C]");
  TORCH_CHECK_VALUE(x.size(1) > 0 && x.size(2) > 0, "x has an empty map: shape ", x.sizes());
  check_pair("window_size", window_size, 1);
  check_pair("shift_size", shift_size, 0);
  const auto rows = make_window_axis(x.size(1), window_size[0], shift_size[0], pad_first);
  const auto columns = make_window_axis(x.size(2), window_size[1], shift_size[1], pad_first);
  const at::Tensor windows =
      at::empty({x.size(0) * rows.count * columns.count, rows.window * columns.window, x.size(3)}, x.options());
  return with_copy(with_adjacent_channels(x), windows, rows, columns, true);
}

WindowTensors map_of_windows(
    const at::Tensor& windows, Pair window_size, Pair image_size, Pair shift_size, bool pad_first) {
  check_tensor("windows", windows, 3, "[B * windows, window rows * window columns, C]");
  check_pair("window_size", window_size, 1);
  check_pair("image_size", image_size, 1);
  check_pair("shift_size", shift_size, 0);
  const auto rows = make_window_axis(image_size[0], window_size[0], shift_size[0], pad_first);
  const auto columns = make_window_axis(image_size[1], window_size[1], shift_size[1], pad_first);
  const int64_t per_image = rows.count * columns.count;
  TORCH_CHECK_VALUE(
      windows.size(0) % per_image == 0 && windows.size(1) == rows.window * columns.window,
      "windows must have shape [B * ", per_image, ", ", rows.window * columns.window, ", C], got ", windows.sizes());
  const at::Tensor map =
      at::empty({windows.size(0) / per_image, rows.length, columns.length, windows.size(2)}, windows.options());
  return with_copy(map, with_adjacent_channels(windows), rows, columns, false);
}

at::Tensor window_partition(const at::Tensor& x, Pair window_size, Pair shift_size, bool pad_first) {
  const WindowTensors tensors = windows_of_map(x, window_size, shift_size, pad_first);
  if (tensors.windows.numel() == 0) return tensors.windows;
#ifdef BBFAST_WITH_CUDA
  if (x.is_cuda()) {
    window_partition_cuda(tensors.copy, x);
    return tensors.windows;
  }
#endif
  window_partition_cpu(tensors.copy);
  return tensors.windows;
}

at::Tensor window_reverse(
    const at::Tensor& windows, Pair window_size, Pair image_size, Pair shift_size, bool pad_first) {
  const WindowTensors tensors = map_of_windows(windows, window_size, image_size, shift_size, pad_first);
  if (tensors.map.numel() == 0) return tensors.map;
#ifdef BBFAST_WITH_CUDA
  if (windows.is_cuda()) {
    window_reverse_cuda(tensors.copy, windows);
    return tensors.map;
  }
#endif
  window_reverse_cpu(tensors.copy);
  return tensors.map;
}

at::Tensor window_places(
    const at::Tensor& vectors, std::array<int64_t, 3> map_size, int64_t pixel_bytes, int64_t vector_bytes,
    Pair window_size, Pair shift_size, bool pad_first, bool wide) {
  TORCH_CHECK_VALUE(
      vectors.is_cpu() && vectors.scalar_type() == at::kLong && vectors.dim() == 1 && vectors.is_contiguous(),
      "vectors must be a contiguous int64 CPU tensor with one dimension");
  TORCH_CHECK_VALUE(pixel_bytes >= 1 && vector_bytes >= 1, "pixel_bytes and vector_bytes must be at least 1");
  TORCH_CHECK_VALUE(pixel_bytes % vector_bytes == 0, "vector_bytes must divide pixel_bytes");
  const auto [batch, height, width] = map_size;
  TORCH_CHECK_VALUE(batch >= 1 && height >= 1 && width >= 1, "map_size must hold positive numbers");
  check_pair("window_size", window_size, 1);
  check_pair("shift_size", shift_size, 0);
  const auto rows = make_window_axis(height, window_size[0], shift_size[0], pad_first);
  const auto columns = make_window_axis(width, window_size[1], shift_size[1], pad_first);
  const WindowCopy copy{
      nullptr, nullptr, batch, pixel_bytes, rows, columns,
      height * width * pixel_bytes, width * pixel_bytes, pixel_bytes,
      rows.window * columns.window * pixel_bytes, pixel_bytes};
  const int64_t total = count_vectors(copy, vector_bytes);
  TORCH_CHECK_VALUE(wide || fits_32_bits(total), "32-bit indices cannot count ", total, " vectors");

  const at::Tensor places = at::empty({vectors.size(0), 2}, vectors.options());
  const int64_t* numbers = vectors.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < vectors.size(0); ++i) {
    TORCH_CHECK_VALUE(numbers[i] >= 0 && numbers[i] < total, "vectors holds ", numbers[i], ", there are ", total);
  }
  auto* write = wide ? &write_places<int64_t> : &write_places<int32_t>;
  write(copy, vector_bytes, numbers, vectors.size(0), places.mutable_data_ptr<int64_t>());
  return places;
}

}  // namespace bbfast
