#pragma once

// The short way from Python to the CPU kernels.
//
// On the way through bbfast's checks and torch's dispatcher a call spends 100 us, since each layer finds the caches full
// of another one's maps; the kernels of small layers take less. A call takes the short way exactly where the long one
// would lead to the same kernel with the same arguments. Everything else, wrong arguments included, is answered with
// None, and the caller goes the long way, which knows other backends and says what is wrong.

#include <pybind11/pybind11.h>

namespace bbfast {

// Results of the kernels, or None; the first function leads to the one for few pixels, the grouped, the Winograd and the
// pointwise one. Arguments as in bbfast.ops, none of them checked yet.
pybind11::object try_pointwise_conv_bn_act(pybind11::args args);
pybind11::object try_depthwise_conv_bn_act(pybind11::args args);

}  // namespace bbfast
