"""Counts kernels, bytes and FLOPs of what runs op by op, without a GPU: torch's own ops, and bbfast's launches.

Bytes are those that must move: each kernel reads each of its tensors once and writes its results once, as far as its
algorithm allows; what the caches cannot hold between two passes counts for each pass. Expanded dimensions are free.

bbfast's ops tell their cost themselves: their CUDA implementation runs on fake tensors, with the Triton kernels
replaced by recorders. What a launch is handed it reads or writes, each tensor once; its FLOPs stand in LAUNCH_FLOPS.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from bbfast.benchmarks.kernel_launches import told_launches
from bbfast.benchmarks.kernel_tables import COPY_BYTES_PER_SECOND

aten = torch.ops.aten

# Dense bf16 on the tensor cores of an H100 80GB HBM3 (product of 8192 x 8192), and fp32 on its CUDA cores.
TENSOR_CORE_FLOPS_PER_SECOND = 798e12
CUDA_CORE_FLOPS_PER_SECOND = 60e12
# Channels per group that fill a tensor core's tile along the summed axis.
TENSOR_CORE_CHANNELS = 16


@dataclass(frozen=True)
class Kernel:
    """One kernel: bytes to and from memory, FLOPs, and which cores they take."""

    name: str
    bytes: int
    flops: int = 0
    on_tensor_cores: bool = True

    @property
    def floor_ms(self) -> float:
        """The least time on an H100: memory or arithmetic, whichever takes longer."""
        peak = TENSOR_CORE_FLOPS_PER_SECOND if self.on_tensor_cores else CUDA_CORE_FLOPS_PER_SECOND
        return 1e3 * max(self.bytes / COPY_BYTES_PER_SECOND, self.flops / peak)


class EagerKernels(TorchDispatchMode):
    """Collects the kernels of every op on the fake GPU into `kernels`, in order; inside `fake_h100` only."""

    def __init__(self):
        super().__init__()
        self.kernels: list[Kernel] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "bbfast":
            return self._run_ours(func, args, kwargs)
        result = func(*args, **kwargs)
        self.kernels += kernels_of_aten(func, args, kwargs, result)
        return result

    def _run_ours(self, func, args, kwargs):
        """Runs the op as on CUDA: torch's ops inside come back here, launches are recorded."""
        name = func._schema.name.removeprefix("bbfast::")
        if name in ("window_partition", "window_reverse"):  # CUDA C++, one copy; Triton's recorder cannot see it
            result = func(*args, **kwargs)
            self.kernels.append(Kernel(name, moved_bytes(tensors_in((args, kwargs))) + moved_bytes(tensors_in(result))))
            return result

        def note(function, programs, values, options):
            self.kernels.append(kernel_of_launch(name, function.__name__, values))

        with told_launches(note), self:
            return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *args, **kwargs)


# ---- bytes -----------------------------------------------------------------------------------------------


def tensors_in(values) -> list[torch.Tensor]:
    """The tensors on the GPU in nested arguments, each once."""
    leaves = torch.utils._pytree.tree_leaves(values)
    found = {id(t): t for t in leaves if isinstance(t, torch.Tensor) and t.device.type == "cuda"}
    return list(found.values())


def moved_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """What reading or writing each tensor once moves; what an expanded dimension repeats is in the caches."""
    return sum(
        t.element_size() * math.prod(size for size, stride in zip(t.shape, t.stride()) if stride or size == 0)
        for t in tensors
    )


# ---- torch's ops -----------------------------------------------------------------------------------------

# Allocate, and leave the memory as it is; or only look at a tensor.
WITHOUT_KERNEL = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}
# Write their first argument without reading it.
OVERWRITE_FIRST = {aten.copy_, aten.fill_, aten.zero_, aten.bernoulli_}
BATCH_NORMS = {aten.native_batch_norm, aten.cudnn_batch_norm, aten._native_batch_norm_legit}
BATCH_NORM_BACKWARDS = {aten.native_batch_norm_backward, aten.cudnn_batch_norm_backward}
# In _native_batch_norm_legit and its relatives the sixth argument is `training`.
TRAINING_ARGUMENT = 5
EFFICIENT_ATTENTION = {
    aten._scaled_dot_product_efficient_attention,
    aten._scaled_dot_product_efficient_attention_backward,
}


def kernels_of_aten(func, args, kwargs, result) -> list[Kernel]:
    """The kernels of one of torch's ops on a GPU; none for views and allocations."""
    packet = func._overloadpacket
    inputs, outputs = tensors_in((args, kwargs)), tensors_in(result)
    if packet in WITHOUT_KERNEL or func.namespace == "prim" or not (inputs or outputs):
        return []
    storages = {t.untyped_storage()._cdata for t in inputs}
    is_mutable = func._schema.is_mutable
    if not is_mutable and outputs and all(t.untyped_storage()._cdata in storages for t in outputs):
        return []  # views
    name = packet.__name__
    if packet is aten.convolution:
        return _convolution_kernels(args, result)
    if packet is aten.convolution_backward:
        return _convolution_backward_kernels(args, result)

    if packet in OVERWRITE_FIRST:
        inputs = [t for t in inputs if t is not args[0]]
    moved = moved_bytes(inputs) + moved_bytes(outputs)
    if packet in BATCH_NORMS and args[TRAINING_ARGUMENT]:
        moved += moved_bytes(args[:1])  # a pass for the statistics, one to normalise
    elif packet in BATCH_NORM_BACKWARDS:
        moved += moved_bytes(inputs[:2])  # a pass for the sums, one for the gradient
    kernel = Kernel(name, moved, product_flops(func, args, kwargs, result))
    if packet is aten.roll:  # one copy per axis
        return [kernel] * len(args[1])
    return [kernel]


def product_flops(func, args, kwargs, result) -> int:
    """FLOPs of matrix products and attention; 0 for what moves memory."""
    packet = func._overloadpacket
    if packet is aten._scaled_dot_product_efficient_attention:
        query, key, value = args[:3]
        return 2 * query.numel() * key.shape[-2] + 2 * query[..., 0].numel() * key.shape[-2] * value.shape[-1]
    count = flop_registry.get(packet)
    return int(count(*args, **kwargs, out_val=result)) if count is not None else 0


def convolution_flops(channels: int, weight_shape, output_shape) -> tuple[int, bool]:
    """(FLOPs, on tensor cores) of a forward convolution with as many input `channels`.

    Depthwise convolutions run on CUDA cores. Narrow groups are padded to a tensor core's tile.
    """
    per_group = weight_shape[1]
    flops = 2 * math.prod(output_shape) * math.prod(weight_shape[1:])
    if per_group == 1 and channels > 1:
        return flops, False
    if per_group < channels and per_group < 4 * TENSOR_CORE_CHANNELS:
        flops = flops * (-(-per_group // TENSOR_CORE_CHANNELS) * TENSOR_CORE_CHANNELS) // per_group
    return flops, True


def _convolution_kernels(args, y) -> list[Kernel]:
    x, weight, bias = args[:3]
    kernels = [convolution_kernel(x, weight, y)]
    if bias is not None:  # cuDNN convolves, then torch adds
        kernels.append(Kernel("convolution's bias", 2 * moved_bytes([y]) + moved_bytes([bias])))
    return kernels


def convolution_kernel(x, weight, y) -> Kernel:
    flops, on_tensor_cores = convolution_flops(x.shape[1], weight.shape, y.shape)
    name = "convolution" if on_tensor_cores else "depthwise convolution"
    return Kernel(name, moved_bytes([x, weight, y]), flops, on_tensor_cores)


def _convolution_backward_kernels(args, result) -> list[Kernel]:
    """One kernel per gradient that is wanted: of the input, of the weight, of the bias."""
    grad_y, x, weight = args[:3]
    flops, on_tensor_cores = convolution_flops(x.shape[1], weight.shape, grad_y.shape)
    name = "convolution backward" if on_tensor_cores else "depthwise convolution backward"
    reads = ([grad_y, weight], [grad_y, x], [grad_y])
    kernels = []
    for index, (read, grad) in enumerate(zip(reads, result)):
        if grad is not None:
            work = flops if index < 2 else 0
            kernels.append(Kernel(name, moved_bytes([*read, grad]), work, on_tensor_cores))
    return kernels


# ---- bbfast's launches -----------------------------------------------------------------------------------


def _depthwise_flops(values: dict, map_name: str) -> int:
    """A multiply-add for each tap and element of the map that the convolution's output is as large as."""
    return 2 * values[map_name].numel() * values["KERNEL_T"] * values["KERNEL_S"]


def _statistics_flops(values: dict) -> int:
    channels = values["channel_vectors"] * values["VECTOR"]
    outputs = values["batch"] * channels * values["out_t"] * values["out_s"]
    return 2 * outputs * values["KERNEL_T"] * values["KERNEL_S"]


def _attention_flops(values: dict, products: int) -> int:
    """`products` matrix products of (window, window, head) each, padding of tiles left out."""
    tokens = values["WINDOW_H"] * values["WINDOW_W"]
    return 2 * products * values["num_windows"] * values["heads"] * tokens * tokens * values["HEAD_DIM"]


# By kernel: (FLOPs, on tensor cores). Kernels that are not here do a few operations per element that they move.
LAUNCH_FLOPS = {
    "_forward_kernel": (lambda v: _depthwise_flops(v, "y_ptr"), False),
    "_statistics_kernel": (_statistics_flops, False),
    "_conv_grad_kernel": (lambda v: _depthwise_flops(v, "dy_ptr"), False),
    "_input_grad_kernel": (lambda v: _depthwise_flops(v, "dz_ptr"), False),
    "_weight_grad_kernel": (lambda v: _depthwise_flops(v, "dz_ptr"), False),
    "_mlp_kernel": (lambda v: 4 * v["rows"] * v["fc1_weight_ptr"].numel(), True),
    "_pointwise_kernel": (lambda v: 2 * v["rows"] * v["weight_ptr"].numel(), True),
    "_window_attention_forward_kernel": (lambda v: _attention_flops(v, 2), True),
    "_window_attention_backward_kernel": (lambda v: _attention_flops(v, 5), True),
    "_window_attention_query_grad_kernel": (lambda v: _attention_flops(v, 4), True),
    "_window_attention_key_grad_kernel": (lambda v: _attention_flops(v, 4), True),
    "_window_attention_bias_grad_kernel": (lambda v: _attention_flops(v, 2), True),
}


def kernel_of_launch(op: str, name: str, values: dict) -> Kernel:
    """What a launch moves and computes: each tensor that it is handed is read or written once."""
    flops, on_tensor_cores = LAUNCH_FLOPS.get(name, (lambda values: 0, True))
    moved = moved_bytes(tensors_in(list(values.values())))
    return Kernel(f"bbfast {op}: {name.strip('_')}", moved, flops(values), on_tensor_cores)
