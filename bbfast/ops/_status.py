"""Which backends of each op can run on this machine, found by asking each ladder with a tiny example."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class BackendStatus:
    """Attributes: `reasons` says why `backend` cannot run `op` on `device` (empty: it can)."""

    op: str
    device: str
    backend: str
    reasons: tuple[str, ...]


def backend_status() -> list[BackendStatus]:
    """Each op, forward and backward, on each device of this machine: its backends, best first, `torch` last."""
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    found = []
    for name, examples in EXAMPLES.items():
        module = importlib.import_module(f"bbfast.ops.{name}")
        ladders = ((name, module._FORWARD_KERNELS), (f"{name}_backward", module._BACKWARD_KERNELS))
        for device in devices:
            for (op, kernels), args in zip(ladders, examples(device)):
                found += [
                    BackendStatus(op, device, kernel.name, tuple(kernel.unsupported_reasons(*args)))
                    for kernel in kernels
                ]
                found.append(BackendStatus(op, device, "torch", ()))
    return found


def _image(device: str) -> torch.Tensor:
    return torch.zeros(1, 8, 5, 5, device=device)


def _vectors(device: str) -> tuple[torch.Tensor, ...]:
    """BatchNorm's weight, bias, running mean and running variance."""
    return tuple(torch.ones(8, device=device) for _ in range(4))


def _depthwise_conv_bn_act(device: str) -> tuple[tuple, tuple]:
    x, weight = _image(device), torch.zeros(8, 1, 3, 3, device=device)
    bn_weight, bn_bias, mean, var = _vectors(device)
    tensors = (x, weight, None, bn_weight, bn_bias)
    geometry = ((1, 1), (1, 1, 1, 1), (1, 1))
    forward = (*tensors, mean, var, *geometry, False, 0.1, 1e-5, "relu", False)
    backward = (x, None, *tensors, None, None, mean, var, *geometry, False, 1e-5, "relu")
    return forward, backward


# Per op file: the arguments that its forward and its backward ladder are asked with, on a device.
EXAMPLES: dict[str, Callable[[str], tuple[tuple, tuple]]] = {
    "depthwise_conv_bn_act": _depthwise_conv_bn_act,
}
