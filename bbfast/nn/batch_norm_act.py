"""BatchNorm + residual + activation as a layer with BatchNorm2d's parameters and keys."""

from __future__ import annotations

import torch
from torch import nn

from bbfast import ops
from bbfast.nn._batch_norm import batch_norm_arguments
from bbfast.reference.activation import ACTIVATIONS, activation


class _ActivationGuard:
    """Makes it an error to replace a layer by one that would lose its activation."""

    @property
    def qconfig(self):
        """Absent; asked for by functions that would replace this layer by one without its activation."""
        if self.act == "identity":
            raise AttributeError("qconfig")
        raise RuntimeError(
            f"a {type(self).__name__} with act={self.act!r} is about to be replaced by a layer without the activation "
            "(or quantised, which it does not support); to synchronise statistics use "
            "bbfast.nn.convert_sync_batchnorm"
        )

    def __dir__(self):
        """Without qconfig, so that who looks at every attribute, such as `torch.jit.trace`, does not set it off."""
        return [name for name in super().__dir__() if name != "qconfig"]


class BatchNormAct2d(_ActivationGuard, nn.BatchNorm2d):
    """`act(batch_norm(x) + residual)`, with the parameters, buffers and state_dict keys of `nn.BatchNorm2d`.

    Several processes: `nn.SyncBatchNorm.convert_sync_batchnorm` would build a SyncBatchNorm that knows nothing of
    the activation, and timm's function likewise. Use `bbfast.nn.convert_sync_batchnorm`, which keeps it. So that
    the mistake cannot pass unseen, reading `qconfig` from this layer, which those functions do with every
    BatchNorm that they replace, raises a RuntimeError (unless act is "identity", where nothing would be lost).

    Args:
        num_features: C.
        eps, momentum, affine, track_running_stats, device, dtype: as in `nn.BatchNorm2d`.
        act: identity, relu, relu6, hardswish, silu or gelu.

    Raises:
        ValueError: an unknown act.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        act: str = "relu",
        device=None,
        dtype=None,
    ):
        if act not in ACTIVATIONS:
            raise ValueError(f"act={act!r} is not known; allowed: {', '.join(ACTIVATIONS)}")
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self.act = act

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Takes `[N, C, H, W]` x and, to be added before the activation, a residual of the same shape."""
        if isinstance(x, torch.Tensor):  # else one that stands for it while a graph is traced, or the op objects
            self._check_input_dim(x)
        statistics, keywords = batch_norm_arguments(self)
        return ops.batch_norm_act(x, *statistics, residual=residual, act=self.act, **keywords)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, act={self.act!r}"


class SyncBatchNormAct2d(_ActivationGuard, nn.SyncBatchNorm):
    """`BatchNormAct2d` whose batch statistics are those of all processes; made by `convert_sync_batchnorm`.

    In train mode torch's SyncBatchNorm runs, then addition and activation; in eval mode the fused op.
    """

    def __init__(self, *args, act: str = "relu", **kwargs):
        super().__init__(*args, **kwargs)
        self.act = act

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        if not self.training and self.running_mean is not None:
            statistics, keywords = batch_norm_arguments(self)
            return ops.batch_norm_act(x, *statistics, residual=residual, act=self.act, **keywords)
        y = super().forward(x)
        return activation(y if residual is None else y + residual, self.act)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, act={self.act!r}"


def convert_sync_batchnorm(module: nn.Module, process_group=None) -> nn.Module:
    """Replaces each BatchNorm inside `module` by a synchronised one that shares its parameters and buffers.

    `BatchNormAct2d` becomes `SyncBatchNormAct2d`, any other BatchNorm torch's `nn.SyncBatchNorm`. Returns `module`,
    or its replacement where it is itself a BatchNorm.
    """
    if isinstance(module, BatchNormAct2d):
        return _synchronised(module, process_group)
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, nn.SyncBatchNorm):
        return nn.SyncBatchNorm.convert_sync_batchnorm(module, process_group)
    for name, child in module.named_children():
        converted = convert_sync_batchnorm(child, process_group)
        if converted is not child:
            setattr(module, name, converted)
    return module


def _synchronised(bn: BatchNormAct2d, process_group) -> SyncBatchNormAct2d:
    converted = SyncBatchNormAct2d(
        bn.num_features,
        bn.eps,
        bn.momentum,
        bn.affine,
        bn.track_running_stats,
        process_group,
        act=bn.act,
    )
    for name in ("weight", "bias"):
        setattr(converted, name, getattr(bn, name))
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        setattr(converted, name, getattr(bn, name))
    return converted.train(bn.training)
