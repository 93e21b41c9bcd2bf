"""What torch.compile would run for a module on an H100: the plan of Inductor's own scheduler. No kernel is built.

compile_fx traces, decomposes, lowers and fuses as ever; where it would start to write code, the scheduler's nodes are
read instead. Their bytes are Inductor's own estimate: each buffer that a kernel reads or writes, once.
"""

from __future__ import annotations

import contextlib
from unittest import mock

import torch
from torch._inductor import config, ir
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import BaseSchedulerNode, ExternKernelSchedulerNode, NopKernelSchedulerNode
from torch._inductor.virtualized import V
from torch.utils._ordered_set import OrderedSet

from bbfast.benchmarks.eager_kernels import (
    EagerKernels,
    Kernel,
    convolution_flops,
    kernels_of_aten,
    product_flops,
)

# Caches would skip the planning; the others need a GPU to measure on, or only matter where code is written.
SETTINGS = {"fx_graph_cache": False, "compile_threads": 1, "triton.cudagraphs": False, "shape_padding": False}


class _Planned(BaseException):
    """Ends a compilation where code would be written; no `except Exception` on the way takes it for a failure."""


class InductorPlan:
    """A backend for torch.compile that collects the kernels of every graph into `kernels`.

    What it returns to torch.compile has no code: it answers with tensors of the right shapes. Inside `fake_h100` only.
    """

    def __init__(self):
        self.kernels: list[Kernel] = []

    def __call__(self, graph_module, example_inputs):
        with config.patch(SETTINGS):
            return compile_fx(graph_module, example_inputs, inner_compile=self._plan_graph)

    def _plan_graph(self, graph_module, example_inputs, **options):
        def stop_at_code(lowering: GraphLowering):
            lowering.init_wrapper_code()
            lowering._update_scheduler()
            for node in lowering.scheduler.nodes:
                self.kernels += kernels_of_node(node)
            raise _Planned

        outputs = next(node for node in graph_module.graph.nodes if node.op == "output").args[0]
        with mock.patch.object(GraphLowering, "codegen", stop_at_code), contextlib.suppress(_Planned):
            compile_fx_inner(graph_module, example_inputs, **options)

        def answer(args):
            args.clear()
            return [output.meta["val"] if isinstance(output, torch.fx.Node) else output for output in outputs]

        answer._boxed_call = True
        return answer


# ---- nodes of the scheduler ------------------------------------------------------------------------------


def kernels_of_node(node: BaseSchedulerNode) -> list[Kernel]:
    """The kernels that a node of the scheduler stands for: one where Inductor writes it, else what the op takes."""
    if isinstance(node, NopKernelSchedulerNode) or isinstance(node.node, ir.MultiOutput):
        return []
    if not isinstance(node, ExternKernelSchedulerNode):
        return [Kernel(f"fused: {_origins(node)}", node.get_read_write_buffers_sizes())]

    op = node.node.op_overload
    if op is not None and op.namespace == "bbfast":
        return _kernels_of_ours(node.node)
    if op is torch.ops.aten.convolution.default:
        x, weight, y = (_size(tensor) for tensor in (*node.node.inputs[:2], node.node))
        flops, on_tensor_cores = convolution_flops(x[1], weight, y)
        name = "convolution" if on_tensor_cores else "depthwise convolution"
        return [Kernel(name, node.get_read_write_buffers_sizes(), flops, on_tensor_cores)]
    origin = node.node.get_origin_node()
    if origin is None or not isinstance(origin.target, torch._ops.OpOverload):
        return [Kernel(f"extern: {op or node.node.python_kernel_name}", node.get_read_write_buffers_sizes())]
    args, kwargs, result = torch.fx.node.map_arg((origin.args, origin.kwargs, origin), lambda n: n.meta["val"])
    packet = origin.target._overloadpacket
    if packet is torch.ops.aten.convolution_backward:
        return kernels_of_aten(origin.target, args, kwargs, result)
    flops = product_flops(origin.target, args, kwargs, result)
    return [Kernel(packet.__name__, node.get_read_write_buffers_sizes(), flops)]


def _size(tensor: ir.IRNode) -> tuple[int, ...]:
    return V.graph.sizevars.optimization_hints(tensor.get_size())


def _origins(node: BaseSchedulerNode) -> str:
    """The ops that a fused kernel stands for, in order."""
    names = OrderedSet(
        str(getattr(origin.target, "_overloadpacket", origin.target)).removeprefix("aten.")
        for part in node.get_nodes()
        if part.node is not None
        for origin in part.node.get_origins()
    )
    return ", ".join(names)


def _kernels_of_ours(kernel: ir.FallbackKernel) -> list[Kernel]:
    """One of bbfast's ops on tensors laid out as Inductor will hand them over."""

    def fake(tensor: ir.IRNode) -> torch.Tensor:
        stride = V.graph.sizevars.optimization_hints(tensor.get_stride())
        return torch.empty_strided(_size(tensor), stride, dtype=tensor.get_dtype(), device=tensor.get_device())

    with V.fake_mode, torch.no_grad():
        tensors = [fake(tensor) for tensor in kernel.inputs]
        args, kwargs = kernel.unflatten_args(tensors, kernel.constant_args)
        with EagerKernels() as counted:
            kernel.op_overload(*args, **{**kernel.kwargs, **kwargs})
    return counted.kernels
