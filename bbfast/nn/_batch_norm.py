"""How a BatchNorm module's state turns into the arguments of an op call."""

from __future__ import annotations

import torch
from torch import nn


def batch_norm_arguments(bn: nn.BatchNorm2d) -> tuple[tuple, dict]:
    """(weight, bias, running_mean, running_var), and keywords training, momentum, eps, for this call of `bn`.

    Follows `nn.BatchNorm2d.forward`: counts the batch in train mode, turns `momentum=None` into the cumulative
    average, uses batch statistics in eval mode too where none are tracked.
    """
    weight, bias, mean, var = _tensors(bn)
    momentum = 0.0 if bn.momentum is None else bn.momentum
    training = bn.training
    if training:
        if bn.track_running_stats and bn.num_batches_tracked is not None:
            bn.num_batches_tracked.add_(1)
            if bn.momentum is None:
                momentum = 1.0 / float(bn.num_batches_tracked)
        if not bn.track_running_stats:
            mean = var = None
    else:
        training = mean is None and var is None
    return (weight, bias, mean, var), {
        "training": training,
        "momentum": momentum,
        "eps": bn.eps,
    }


def _tensors(bn: nn.BatchNorm2d) -> tuple[torch.Tensor | None, ...]:
    """Weight, bias, running mean and variance; as attributes of a module they take ten times as long."""
    try:
        parameters, buffers = bn._parameters, bn._buffers
        return parameters["weight"], parameters["bias"], buffers["running_mean"], buffers["running_var"]
    except (AttributeError, KeyError):  # not a module, or what somebody put in their places (parametrizations, shards)
        return bn.weight, bn.bias, bn.running_mean, bn.running_var
