"""The pretence of an H100: torch and Inductor plan for one that is not there; tensors have shapes and no values.

Everything is undone on leaving, except for what torch remembers of the device's properties: use a process of its own.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.device_interface import CudaInterface
from torch._subclasses.fake_tensor import FakeTensorMode

# What torch.cuda.get_device_properties says of an H100 80GB HBM3.
PROPERTIES = types.SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 << 30,
    L2_cache_size=50 << 20,
    warp_size=32,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    gcnArchName="",
)
# Rows of a mask start at multiples of 8 elements: the memory-efficient attention kernel wants 16 bytes.
MASK_ALIGNMENT = 8


@contextlib.contextmanager
def fake_h100() -> Iterator[None]:
    """Inside, new tensors are fake and `cuda` is an H100, for torch, for Inductor and for bbfast's launchers."""

    def answers(value):
        return lambda *args, **kwargs: value

    lies = {
        torch.cuda: {
            "get_device_properties": answers(PROPERTIES),
            "get_device_capability": answers((9, 0)),
            "get_device_name": answers(PROPERTIES.name),
            "current_device": answers(0),
            "device_count": answers(1),
            "is_bf16_supported": answers(True),
            "device": answers(contextlib.nullcontext()),
        },
        # Asked for the layout of a convolution's result; without a GPU the answer would be torch's own slow one.
        torch._C: {"_select_conv_backend": answers(torch._C._ConvBackend.Cudnn)},
        torch.cuda.amp.common: {"amp_definitely_not_available": answers(False)},
        CudaInterface: {
            "get_device_properties": answers(PROPERTIES),
            "get_compute_capability": answers(90),
            "current_device": answers(0),
            "is_available": answers(True),
            "is_bf16_supported": answers(True),
            "is_triton_capable": answers(True),
            "raise_if_triton_unavailable": answers(None),
        },
        CudaInterface.Worker: {"get_device_properties": answers(PROPERTIES), "current_device": answers(0)},
        F: {"scaled_dot_product_attention": _scaled_dot_product_attention},
    }
    with contextlib.ExitStack() as undo:
        for owner, replaced in lies.items():
            for name, answer in replaced.items():
                is_method = isinstance(owner, type)
                undo.enter_context(mock.patch.object(owner, name, staticmethod(answer) if is_method else answer))
        undo.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield


def _scaled_dot_product_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
    """What torch runs on an H100 for half precision with a mask; it asks the driver, which is not there to answer."""
    if attn_mask is not None:
        queries, keys = query.shape[-2], key.shape[-2]
        attn_mask = F.pad(attn_mask, (0, -keys % MASK_ALIGNMENT))[..., :keys]
        attn_mask = attn_mask.expand(*query.shape[:2], queries, keys)
    needs_grad = torch.is_grad_enabled() and query.requires_grad
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, needs_grad, dropout_p, is_causal, scale=scale
    )[0]


def to_fake_h100(model: nn.Module) -> nn.Module:
    """Puts fake tensors of the same shapes and strides, on the fake GPU, in the place of a model's own.

    In place; inside `fake_h100` only. Tensors that modules share stay shared.
    """
    moved: dict[int, torch.Tensor] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in moved:
            like = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")
            is_parameter = isinstance(tensor, nn.Parameter)
            moved[id(tensor)] = nn.Parameter(like, tensor.requires_grad) if is_parameter else like
        return moved[id(tensor)]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            tensors.update({name: fake(tensor) for name, tensor in tensors.items() if tensor is not None})
    return model
