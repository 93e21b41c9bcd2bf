"""How a BatchNorm module's state turns into the arguments of an op call."""

from __future__ import annotations

from torch import nn


def batch_norm_arguments(bn: nn.BatchNorm2d) -> tuple[tuple, dict]:
    """(weight, bias, running_mean, running_var), and keywords training, momentum, eps, for this call of `bn`.

    Follows `nn.BatchNorm2d.forward`: counts the batch in train mode, turns `momentum=None` into the cumulative
    average, uses batch statistics in eval mode too where none are tracked.
    """
    momentum = 0.0 if bn.momentum is None else bn.momentum
    if bn.training and bn.track_running_stats and bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
        if bn.momentum is None:
            momentum = 1.0 / float(bn.num_batches_tracked)
    use_batch_statistics = bn.training or (bn.running_mean is None and bn.running_var is None)
    update_running = not bn.training or bn.track_running_stats
    statistics = (bn.running_mean, bn.running_var) if update_running else (None, None)
    return (bn.weight, bn.bias, *statistics), {
        "training": use_batch_statistics,
        "momentum": momentum,
        "eps": bn.eps,
    }


def is_plain_batch_norm(bn: nn.Module) -> bool:
    """Whether `bn` normalises with its own process's statistics only (a SyncBatchNorm in training does not)."""
    return isinstance(bn, nn.BatchNorm2d) and not isinstance(bn, nn.SyncBatchNorm)
