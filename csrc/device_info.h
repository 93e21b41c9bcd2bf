#pragma once

// No torch header here: device_info.cu is compiled by nvcc, which would take minutes over them.

#include <string>
#include <vector>

namespace bbfast {

struct DeviceInfo {
  std::string name;
  int compute_capability_major;
  int compute_capability_minor;
  int multiprocessors;
  long long memory_bytes;
  long long l2_bytes;
  long long shared_memory_per_block_bytes;  // with opt-in, the most a kernel may ask for
  double memory_gbps;                       // from clock and bus width; 0 where the driver does not tell
};

struct DeviceList {
  std::vector<DeviceInfo> devices;
  std::string reason;  // why `devices` is empty; empty otherwise
};

// What the CUDA runtime says about the GPUs of this machine. Never throws, and needs neither a driver nor a GPU.
DeviceList list_devices();

// The CUDA runtime's version that this library was compiled with, as in 13000 for 13.0.
int compiled_cuda_version();

}  // namespace bbfast
