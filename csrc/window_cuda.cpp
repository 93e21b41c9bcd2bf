// The device guard, the current stream and the launch check around window.cu.

#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/util/Exception.h>

#include "window_launch.h"
#include "window_tensors.h"

namespace bbfast {
namespace {

using Launch = const char* (*)(const WindowCopy&, void*);

void run(const char* name, Launch launch, const WindowCopy& copy, const at::Tensor& like) {
  const c10::cuda::CUDAGuard guard(like.device());
  const char* error = launch(copy, c10::cuda::getCurrentCUDAStream(like.device().index()).stream());
  TORCH_CHECK(error == nullptr, name, " could not be launched: ", error);
}

}  // namespace

void window_partition_cuda(const WindowCopy& copy, const at::Tensor& like) {
  run("window_partition", launch_window_partition, copy, like);
}

void window_reverse_cuda(const WindowCopy& copy, const at::Tensor& like) {
  run("window_reverse", launch_window_reverse, copy, like);
}

}  // namespace bbfast
