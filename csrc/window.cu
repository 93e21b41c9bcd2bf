// window_partition and window_reverse on a GPU.

#include "window_launch.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <limits>

namespace bbfast {
namespace {

constexpr int THREADS = 256;
// Vectors that a thread has in flight, so that few resident threads suffice to cover the memory's latency.
constexpr int UNROLL = 4;
constexpr int64_t TILE = int64_t{THREADS} * UNROLL;

// A block copies a tile of 1024 vectors that follow each other in the windows, neighbouring threads neighbouring
// vectors; all loads of a thread are issued before its first store. Each pixel is read once and written once, 16 bytes at
// a time where the channels allow. A vector costs some 130 instructions, most of them five divisions by multiplication;
// an H100 has time for 300 while memory moves 16 bytes in and 16 out.
template <class Vector, class Index, bool REVERSE>
__global__ void __launch_bounds__(THREADS) window_copy_kernel(
    const WindowPlaces<Index> places, char* __restrict__ map, char* __restrict__ windows, int64_t vectors) {
  const int64_t step = gridDim.x * TILE;
  for (int64_t first = blockIdx.x * TILE + threadIdx.x; first < vectors; first += step) {
    Vector values[UNROLL];
    char* targets[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      values[u] = Vector{};
      targets[u] = nullptr;
      const int64_t vector = first + u * THREADS;
      if (vector >= vectors) continue;
      const WindowPlace place = places(static_cast<Index>(vector));
      if (place.map >= 0) {
        const char* source = REVERSE ? windows + place.windows : map + place.map;
        values[u] = *reinterpret_cast<const Vector*>(source);
        targets[u] = REVERSE ? map + place.map : windows + place.windows;
      } else if (!REVERSE) {
        targets[u] = windows + place.windows;  // padding: zeros
      }
    }
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      if (targets[u] != nullptr) *reinterpret_cast<Vector*>(targets[u]) = values[u];
    }
  }
}

template <class Vector, bool REVERSE>
cudaError_t launch(const WindowCopy& copy, cudaStream_t stream) {
  constexpr int64_t BYTES = sizeof(Vector);
  const int64_t vectors = count_vectors(copy, BYTES);
  const int64_t tiles = (vectors + TILE - 1) / TILE;
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(tiles, std::numeric_limits<int32_t>::max()));
  if (fits_32_bits(vectors)) {
    window_copy_kernel<Vector, int32_t, REVERSE><<<blocks, THREADS, 0, stream>>>(
        WindowPlaces<int32_t>(copy, BYTES), copy.map, copy.windows, vectors);
  } else {
    window_copy_kernel<Vector, int64_t, REVERSE><<<blocks, THREADS, 0, stream>>>(
        WindowPlaces<int64_t>(copy, BYTES), copy.map, copy.windows, vectors);
  }
  return cudaGetLastError();
}

template <bool REVERSE>
const char* launch_widest(const WindowCopy& copy, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  cudaError_t error = cudaSuccess;
  switch (widest_vector_bytes(copy)) {
    case 16: error = launch<uint4, REVERSE>(copy, cuda_stream); break;
    case 8: error = launch<uint2, REVERSE>(copy, cuda_stream); break;
    case 4: error = launch<uint32_t, REVERSE>(copy, cuda_stream); break;
    case 2: error = launch<uint16_t, REVERSE>(copy, cuda_stream); break;
    default: error = launch<uint8_t, REVERSE>(copy, cuda_stream); break;
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* launch_window_partition(const WindowCopy& copy, void* stream) { return launch_widest<false>(copy, stream); }

const char* launch_window_reverse(const WindowCopy& copy, void* stream) { return launch_widest<true>(copy, stream); }

}  // namespace bbfast
