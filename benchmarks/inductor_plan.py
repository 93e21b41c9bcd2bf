"""What torch.compile would run for a module on an H100: the plan of Inductor's own scheduler. No kernel is built.

compile_fx traces, decomposes, lowers and fuses as ever; where it would start to write code, the scheduler's nodes are
read instead. Their bytes are Inductor's own estimate: each buffer that a kernel reads or writes, once.

Gradients are traced by torch's autograd engine, which wants streams of the tensors' GPU. So a graph that has any is
handed to it as if on the CPU, after Dynamo has decided everything for the GPU, and what it makes of it is moved back.
"""

from __future__ import annotations

import contextlib
from unittest import mock

import torch
from torch._functorch import config as functorch_config
from torch._inductor import config, decomposition, ir
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import BaseSchedulerNode, ExternKernelSchedulerNode, NopKernelSchedulerNode
from torch._inductor.virtualized import V
from torch.utils._ordered_set import OrderedSet
from torch.utils._pytree import tree_map

from bbfast.benchmarks.eager_kernels import (
    EagerKernels,
    Kernel,
    convolution_flops,
    product_flops,
)

# Caches would skip the planning; the others need a GPU to measure on, or only matter where code is written.
SETTINGS = {"fx_graph_cache": False, "compile_threads": 1, "triton.cudagraphs": False, "shape_padding": False}


class _Planned(BaseException):
    """Ends a compilation where code would be written; no `except Exception` on the way takes it for a failure."""


class InductorPlan:
    """A backend for torch.compile that collects the kernels of every graph, and of its backward, into `kernels`.

    What it returns to torch.compile has no code: it answers with tensors of the right shapes. Inside `fake_h100` only.
    """

    def __init__(self):
        self.kernels: list[Kernel] = []

    def __call__(self, graph_module, example_inputs):
        wants_grad = torch.is_grad_enabled() and any(getattr(x, "requires_grad", False) for x in example_inputs)
        with config.patch(SETTINGS):
            if not wants_grad:
                return compile_fx(graph_module, example_inputs, inner_compile=self._plan_graph)
            with _traced_on_cpu():
                return compile_fx(
                    graph_module,
                    _move(graph_module, example_inputs, torch.device("cpu")),
                    inner_compile=self._plan_traced_graph,
                    decompositions=decomposition.select_decomp_table() | {torch.ops.aten.bernoulli.p: _bernoulli},
                )

    def _plan_traced_graph(self, graph_module, example_inputs, **options):
        example_inputs = _move(graph_module, example_inputs, torch.device("cuda", 0))
        return self._plan_graph(graph_module, example_inputs, **options)

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


@contextlib.contextmanager
def _traced_on_cpu():
    """What is traced on the CPU inside is decomposed as on a GPU, and its backward planned at once, not when run."""
    with (
        functorch_config.patch(force_non_lazy_backward_lowering=True),
        mock.patch.object(decomposition, "is_gpu", lambda device_type: True),
    ):
        yield


def _bernoulli(x, p=0.5, *, generator=None):
    """Inductor's own for GPUs."""
    return torch.rand_like(x, dtype=torch.float32) < p


def _move(graph_module: torch.fx.GraphModule, example_inputs: list, device: torch.device) -> list:
    """The inputs on another device, and the graph made for them, in place: what its nodes name and what they return."""

    def moved(value):
        if isinstance(value, torch.device):
            return device
        if not isinstance(value, torch.Tensor) or value.device == device:
            return value
        with value.fake_mode:
            like = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
        return like.requires_grad_(value.requires_grad)

    for node in graph_module.graph.nodes:
        node.args, node.kwargs = torch.fx.node.map_aggregate((node.args, node.kwargs), moved)
        for key in {"val", "example_value"} & node.meta.keys():
            node.meta[key] = tree_map(moved, node.meta[key])
    graph_module.recompile()
    return [moved(value) for value in example_inputs]


# ---- nodes of the scheduler ------------------------------------------------------------------------------


def kernels_of_node(node: BaseSchedulerNode) -> list[Kernel]:
    """The kernels that a node of the scheduler stands for: one where Inductor writes it, else what the op takes."""
    if isinstance(node, NopKernelSchedulerNode) or isinstance(node.node, ir.MultiOutput):
        return []
    if not isinstance(node, ExternKernelSchedulerNode):
        return [Kernel(f"fused: {_origins(node)}", node.get_read_write_buffers_sizes())]

    op = node.node.op_overload
    if op is not None and (op.namespace == "bbfast" or op is torch.ops.aten.convolution_backward.default):
        return _kernels_by_running(node.node)
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


def _kernels_by_running(kernel: ir.FallbackKernel) -> list[Kernel]:
    """Of an op that takes several, counted on fake tensors laid out as Inductor will hand them over."""

    def fake(tensor: ir.IRNode) -> torch.Tensor:
        stride = V.graph.sizevars.optimization_hints(tensor.get_stride())
        return torch.empty_strided(_size(tensor), stride, dtype=tensor.get_dtype(), device=tensor.get_device())

    with V.fake_mode, torch.no_grad():
        tensors = [fake(tensor) for tensor in kernel.inputs]
        args, kwargs = kernel.unflatten_args(tensors, kernel.constant_args)
        with EagerKernels() as counted:
            kernel.op_overload(*args, **{**kernel.kwargs, **kwargs})
    return counted.kernels
