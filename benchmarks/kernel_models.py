"""Which kernels whole models launch: they run on fake tensors, inference and training, batch 128 in bf16."""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Callable
from unittest import mock

import torch
from torch import nn
from torch._C import DispatchKey, DispatchKeySet
from torch._prims_common import suggest_memory_format
from torch.utils._python_dispatch import TorchDispatchMode

import bbfast
from bbfast.benchmarks.kernel_launches import NO_NAME, Launch, recorded_launches

MODELS = (
    "swin_tiny_patch4_window7_224",
    "swin_base_patch4_window7_224",
    "convnext_tiny",
    "mobilenetv3_large_100",
    "efficientnet_b0",
    "resnet50",
    "regnety_016",
    "resnext50_32x4d",
)
MODES = ("infer", "train")
CONVOLUTION, CONVOLUTION_BACKWARD = torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default


def model_launches(name: str, mode: str, arch: int, gpu: str = NO_NAME, batch: int = 128) -> list[Launch]:
    """Every launch of one of `MODELS`, in channels_last.

    Args:
        mode: `infer`, a model in bf16, or `train`, forward and backward of float32 weights under autocast to bf16.
        arch, gpu: as for `recorded_launches`.

    Raises:
        BackendUnavailableError: an op would not run on kernels.
    """
    model = bbfast.create_model(name, pretrained=False).to(memory_format=torch.channels_last)
    run = functools.partial(_infer if mode == "infer" else _train, model, batch)
    with mock.patch.dict(os.environ, BBFAST_BACKEND="auto", BBFAST_STRICT="1"):
        return recorded_launches(run, arch, gpu)


def _infer(model: nn.Module, batch: int) -> None:
    _move_to_stand_in(model, torch.bfloat16)
    x = torch.empty(batch, 3, 224, 224, dtype=torch.bfloat16, device="cuda")
    with _RunImplementations(), torch.no_grad():
        model.eval()(x.to(memory_format=torch.channels_last))


def _train(model: nn.Module, batch: int) -> None:
    _move_to_stand_in(model, torch.float32)
    x = torch.empty(batch, 3, 224, 224, device="cuda").to(memory_format=torch.channels_last)
    labels = torch.empty(batch, dtype=torch.int64, device="cuda")
    with _RunImplementations():
        # torch.autocast itself turns off where there is no GPU.
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        try:
            loss = nn.functional.cross_entropy(model.train()(x).float(), labels)
        finally:
            torch.set_autocast_enabled("cuda", False)
            torch.clear_autocast_cache()
        backward(loss)


def _move_to_stand_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Replaces parameters and buffers by fake tensors on `cuda`, which `model.to` cannot do."""

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        wanted = dtype if tensor.is_floating_point() else tensor.dtype
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=wanted, device="cuda")

    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(fake(parameter)))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, fake(buffer))


class _RunImplementations(TorchDispatchMode):
    """Runs what bbfast's ops do on CUDA where fake tensors would only ask for shapes.

    And convolutions give what cuDNN gives, which torch asks for in vain where there is no GPU: channels_last wherever
    input or weight are.
    """

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace == "bbfast":
            return operator.redispatch(DispatchKeySet(DispatchKey.CUDA), *args, **(kwargs or {}))
        outputs = operator(*args, **(kwargs or {}))
        if operator == CONVOLUTION:
            return _as_cudnn(outputs, *args[:2])
        if operator == CONVOLUTION_BACKWARD:
            return tuple(_as_cudnn(output, *args[1:3]) for output in outputs)
        return outputs


def _as_cudnn(output: torch.Tensor | None, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor | None:
    if output is None or output.dim() != 4:
        return output
    if torch.channels_last in (suggest_memory_format(x), suggest_memory_format(weight)):
        return output.contiguous(memory_format=torch.channels_last)
    return output


@torch.no_grad()
def backward(loss: torch.Tensor) -> dict[torch.Tensor, torch.Tensor]:
    """Runs the nodes of loss's graph as autograd does, hooks left out; returns the gradient of each leaf.

    torch's own engine asks each CUDA device for its streams, and there is no device.
    """
    waiting = _count_users(loss.grad_fn)
    grads = {loss.grad_fn: [torch.ones_like(loss)]}
    ready, leaves = [loss.grad_fn], {}
    while ready:
        node = ready.pop()
        outputs = None
        if node in grads and node.name() == "torch::autograd::AccumulateGrad":
            leaves[node.variable] = grads.pop(node)[0]
        elif node in grads:
            outputs = _call(node, grads.pop(node))
        for position, (next_node, index) in enumerate(node.next_functions):
            if next_node is None:
                continue
            if outputs is not None and (grad := outputs[position]) is not None:
                wanted = next_node._input_metadata
                into = grads.setdefault(next_node, [None] * len(wanted))
                grad = _fitted(grad, wanted[index])
                into[index] = grad if into[index] is None else into[index] + grad
            waiting[next_node] -= 1
            if waiting[next_node] == 0:
                ready.append(next_node)
    return leaves


def _count_users(root) -> Counter:
    """How many gradients each node of the graph waits for. Its keys keep the nodes alive."""
    waiting, seen, stack = Counter(), {root}, [root]
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is None:
                continue
            waiting[node] += 1
            if node not in seen:
                seen.add(node)
                stack.append(node)
    return waiting


def _fitted(grad: torch.Tensor, wanted) -> torch.Tensor:
    """A gradient in the shape and dtype of what it is the gradient of, which may have been broadcast or cast."""
    return (grad if grad.shape == wanted.shape else grad.sum_to_size(wanted.shape)).to(wanted.dtype)


def _call(node, grads: list) -> tuple:
    """The node's gradients for its inputs."""
    run: Callable = node if callable(node) else node.apply  # the latter: autograd.Function
    outputs = run(*grads)
    return outputs if isinstance(outputs, tuple) else (outputs,)
