#pragma once

// No torch header here: window.cu includes this.

#include "window.h"

namespace bbfast {

// Start the copy on a CUDA stream (a cudaStream_t) of the current device. Return null, or what CUDA says went wrong.
const char* launch_window_partition(const WindowCopy& copy, void* stream);
const char* launch_window_reverse(const WindowCopy& copy, void* stream);

}  // namespace bbfast
