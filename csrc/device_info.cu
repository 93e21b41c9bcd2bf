// What `bbfast info` tells about each GPU, straight from the CUDA runtime (without a context on any device).

#include "device_info.h"

#include <cuda_runtime_api.h>

namespace bbfast {
namespace {

long long attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  if (cudaDeviceGetAttribute(&value, which, device) != cudaSuccess) {
    cudaGetLastError();  // an attribute that the driver does not know must not surface in a later call
    return 0;
  }
  return value;
}

// Bytes per second of the bus: memory clock (kHz) times two transfers per clock times the bus width.
double memory_gbps(int device) {
  const double clock_hz = 1e3 * attribute(cudaDevAttrMemoryClockRate, device);
  const double bus_bytes = attribute(cudaDevAttrGlobalMemoryBusWidth, device) / 8.0;
  return 2.0 * clock_hz * bus_bytes / 1e9;
}

}  // namespace

DeviceList list_devices() {
  DeviceList list;
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) {
    cudaGetLastError();
    list.reason = cudaGetErrorString(error);
    return list;
  }
  for (int device = 0; device < count; ++device) {
    cudaDeviceProp properties;
    if (const cudaError_t failed = cudaGetDeviceProperties(&properties, device); failed != cudaSuccess) {
      cudaGetLastError();
      list.devices.clear();
      list.reason = cudaGetErrorString(failed);
      return list;
    }
    list.devices.push_back(DeviceInfo{
        properties.name,
        properties.major,
        properties.minor,
        properties.multiProcessorCount,
        static_cast<long long>(properties.totalGlobalMem),
        properties.l2CacheSize,
        static_cast<long long>(properties.sharedMemPerBlockOptin),
        memory_gbps(device)});
  }
  if (list.devices.empty()) list.reason = "the CUDA driver reports no device";
  return list;
}

int compiled_cuda_version() { return CUDART_VERSION; }

}  // namespace bbfast
