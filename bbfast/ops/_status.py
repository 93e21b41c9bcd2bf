"""Which backends of each op can run on this machine, found by asking each ladder with a tiny example."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bbfast import dispatch, extension


@dataclass(frozen=True)
class BackendStatus:
    """Attributes: `reasons` says why `backend` cannot run `op` on `device` (empty: it can)."""

    op: str
    device: str
    backend: str
    reasons: tuple[str, ...]


def backend_status() -> list[BackendStatus]:
    """Each op's backends on each device of this machine, best first, the reference `torch` last."""
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    found = []
    for name, examples in EXAMPLES.items():
        module = importlib.import_module(f"bbfast.ops.{name}")
        for device in devices:
            for ladder, args in examples(device).items():
                op = ladder_op(name, ladder)
                for kernel in getattr(module, ladder):
                    found.append(BackendStatus(op, device, kernel.name, _reasons(kernel, args)))
                found.append(BackendStatus(op, device, "torch", ()))
    return found


def ladder_op(module: str, ladder: str) -> str:
    """What `dispatch.last_choices` calls the op whose backends `ladder` in `bbfast.ops.<module>` holds."""
    if ladder == "_REVERSE_KERNELS":
        return "window_reverse"
    return f"{module}_backward" if "BACKWARD" in ladder else module


def _reasons(kernel: dispatch.Backend, args: tuple) -> tuple[str, ...]:
    try:
        return tuple(kernel.unsupported_reasons(*args))
    except extension.BrokenExtensionError as error:  # stops whoever runs the op, but here it is the answer
        return (str(error),)


def _image(device: str) -> torch.Tensor:
    """In channels_last, the layout that the most backends take."""
    return torch.zeros(1, 8, 5, 5, device=device).contiguous(memory_format=torch.channels_last)


def _batch_norm(device: str) -> tuple[torch.Tensor, ...]:
    """Weight, bias, running mean and running variance."""
    return tuple(torch.ones(8, device=device) for _ in range(4))


def _depthwise_conv_bn_act(device: str) -> dict[str, tuple]:
    x, weight = _image(device), torch.zeros(8, 1, 3, 3, device=device)
    bn_weight, bn_bias, mean, var = _batch_norm(device)
    tensors = (x, weight, None, bn_weight, bn_bias)
    geometry = ((1, 1), (1, 1, 1, 1), (1, 1))
    return {
        "_FORWARD_KERNELS": (*tensors, mean, var, *geometry, False, 0.1, 1e-5, "relu", False),
        "_BACKWARD_KERNELS": (x, None, *tensors, None, None, mean, var, *geometry, False, 1e-5, "relu", True, True),
    }


def _conv_bn_act(device: str) -> dict[str, tuple]:
    dtype = product_dtype(device)
    x, weight = _image(device).to(dtype), torch.zeros(8, 8, 1, 1, device=device, dtype=dtype)
    geometry = ((1, 1), (0, 0, 0, 0), (1, 1), 1)
    gate, needs_grad = None, False
    return {
        "_FORWARD_KERNELS": (
            *(x, weight, None, *_batch_norm(device), None),
            *(*geometry, 1e-5, "relu", gate, False, needs_grad),
        )
    }


def _linear_act(device: str) -> dict[str, tuple]:
    x, weight = (torch.zeros(8, 8, device=device, dtype=torch.float16) for _ in range(2))
    return {"_FORWARD_KERNELS": (x, weight, None, None, None, "gelu")}


def _mlp(device: str) -> dict[str, tuple]:
    x, weight = (torch.zeros(8, 8, device=device, dtype=torch.float16) for _ in range(2))
    return {"_FORWARD_KERNELS": (x, weight, None, weight, None, None, None, None, None, 1e-5, "gelu")}


def product_dtype(device: str) -> torch.dtype:
    """What pointwise convolutions have fused kernels for: on a GPU, what its tensor cores take."""
    return torch.float16 if device == "cuda" else torch.float32


def _batch_norm_act(device: str) -> dict[str, tuple]:
    x, residual = _image(device), None
    weight, bias, mean, var = _batch_norm(device)
    tensors = (x, weight, bias, residual)
    return {
        "_FORWARD_KERNELS": (*tensors, mean, var, False, 0.1, 1e-5, "relu"),
        "_BACKWARD_KERNELS": (x, *tensors, None, None, mean, var, False, 1e-5, "relu"),
    }


def _drop_path_add(device: str) -> dict[str, tuple]:
    residual = branch = _image(device)
    multiplier = torch.ones(1, device=device)
    return {
        "_FORWARD_KERNELS": (residual, branch, multiplier, None),
        "_BACKWARD_KERNELS": (residual, None, multiplier, None, torch.float32),
    }


def _add_layer_norm(device: str) -> dict[str, tuple]:
    residual = branch = torch.zeros(1, 5, 5, 8, device=device)
    multiplier, rows = torch.ones(1, device=device), torch.zeros(1, 5, 5, device=device)
    weight, bias, *_ = _batch_norm(device)
    tensors = (multiplier, None, weight, bias)
    dtypes = (torch.float32, torch.float32)
    return {
        "_FORWARD_KERNELS": (residual, branch, *tensors, 1e-5, torch.float32, True),
        "_BACKWARD_KERNELS": (residual, residual, residual, None, *tensors, rows, rows, *dtypes, True),
    }


def _window_partition(device: str) -> dict[str, tuple]:
    x, window_size, shift_size, pad_order = torch.zeros(1, 5, 5, 8, device=device), (2, 2), (1, 1), "shift_then_pad"
    windows = torch.zeros(9, 4, 8, device=device)
    return {
        "_PARTITION_KERNELS": (x, window_size, shift_size, pad_order),
        "_REVERSE_KERNELS": (windows, window_size, (5, 5), shift_size, pad_order),
    }


def _window_attention(device: str) -> dict[str, tuple]:
    qkv, table = torch.zeros(1, 7, 7, 96, device=device), torch.zeros(169, 1, device=device)
    args = (qkv, table, None, 1, (7, 7), (3, 3), 1.0, "shift_then_pad", -100.0)
    return {"_FORWARD_KERNELS": args, "_BACKWARD_KERNELS": (qkv[..., :32], *args, True, False)}


# Per op file: the arguments that each of its ladders is asked with, on a device.
EXAMPLES: dict[str, Callable[[str], dict[str, tuple]]] = {
    "depthwise_conv_bn_act": _depthwise_conv_bn_act,
    "conv_bn_act": _conv_bn_act,
    "batch_norm_act": _batch_norm_act,
    "drop_path_add": _drop_path_add,
    "linear_act": _linear_act,
    "mlp": _mlp,
    "add_layer_norm": _add_layer_norm,
    "window_partition": _window_partition,
    "window_attention": _window_attention,
}
