#pragma once

// What a call of an op may depend on, as one hashable object; see bbfast/ops/_repeated.py.

#include <pybind11/pybind11.h>

#include <cstdint>

namespace bbfast {

// A tuple that is equal for calls that an op answers in the same way: it holds what tensors look like (shape, strides,
// dtype, device, alignment, which of them share an address), constants and the names of keywords, autocast for the first
// tensor's device, BBFAST_BACKEND and `generation`. None where a call must run as it is written: torch records gradients,
// somebody looks on or takes part (tracers, transforms, modes, profilers), or an argument is neither a plain tensor nor a
// plain constant. `args` begins with a tensor.
pybind11::object call_key(const pybind11::tuple& args, const pybind11::dict& kwargs, int64_t generation);

}  // namespace bbfast
