"""LayerNorm fused with the residual addition before it."""

from __future__ import annotations

import torch
from torch import nn

from bbfast import ops
from bbfast.nn.linear_act import only_runs
from bbfast.ops._common import overridable
from bbfast.ops.add_layer_norm import takes_layer_norm


class AddLayerNorm(nn.LayerNorm):
    """`x = residual + DropPath(branch * layer_scale)` and LayerNorm of x as one op; both come back.

    Parameters, keys and initial values are those of nn.LayerNorm over the channels.

    Args:
        channels: size of the last dimension.
        eps: added to the variance.
        elementwise_affine: whether there is a weight.
        bias: whether there is a bias beside the weight.
        drop_prob: chance of each sample's branch to be dropped in training, between 0 and 1.
        scale_by_keep: divide what is kept by `1 - drop_prob`.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        channels: int,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        *,
        drop_prob: float = 0.0,
        scale_by_keep: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__(channels, eps, elementwise_affine, bias, device=device, dtype=dtype)
        self.drop_prob = drop_prob
        self.scale_by_keep = scale_by_keep

    def forward(
        self, residual: torch.Tensor, branch: torch.Tensor | None = None, layer_scale: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tensors and results are those of `bbfast.ops.add_layer_norm`."""
        return ops.add_layer_norm(
            residual,
            branch,
            self.weight,
            self.bias,
            drop_prob=self.drop_prob,
            training=self.training,
            scale_by_keep=self.scale_by_keep,
            layer_scale=layer_scale,
            eps=self.eps,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, drop_prob={round(self.drop_prob, 3):0.3f}, scale_by_keep={self.scale_by_keep}"


def apply_add_layer_norm(
    norm: nn.LayerNorm,
    drop_path: nn.Module | None,
    residual: torch.Tensor,
    branch: torch.Tensor | None,
    layer_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`x = residual + drop_path(branch * layer_scale)` and `norm(x)` as one op, with the modules' own settings.

    The modules stay where a model has them and lend weight, bias, eps, drop_prob, scale_by_keep and training mode;
    their forwards and hooks do not run.

    Args:
        norm: LayerNorm over the last dimension.
        drop_path: bbfast's or timm's DropPath, or nn.Identity or None for nothing to drop.
        residual, branch, layer_scale: as `bbfast.ops.add_layer_norm` takes them.

    Returns:
        `(x, norm(x))`.

    Raises:
        TypeError: a module of another kind.
        ValueError: a norm over several dimensions, or what the op does not take.
    """
    if not isinstance(norm, nn.LayerNorm):
        raise TypeError(f"norm must be an nn.LayerNorm, got {type(norm).__name__}")
    if len(norm.normalized_shape) != 1:
        raise ValueError(f"norm must normalise the last dimension alone, got normalized_shape={norm.normalized_shape}")
    residual = _with_channels(residual, norm.normalized_shape[0])
    drop = {}
    if drop_path is not None and not isinstance(drop_path, nn.Identity):
        if not hasattr(drop_path, "drop_prob"):
            raise TypeError(
                f"drop_path must be a DropPath (a module with drop_prob), nn.Identity or None, "
                f"got {type(drop_path).__name__}"
            )
        drop = {
            "drop_prob": drop_path.drop_prob,
            "training": drop_path.training,
            "scale_by_keep": getattr(drop_path, "scale_by_keep", True),
        }
    return ops.add_layer_norm(residual, branch, norm.weight, norm.bias, **drop, layer_scale=layer_scale, eps=norm.eps)


def apply_layer_norm(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """`norm(x)`, where a plain nn.LayerNorm over the last axis lends its parameters to the kernel on a GPU.

    torch's own is slow for few channels: see benchmarks/NOTES.md. Under torch.compile it is called, since Inductor
    generates code for it together with its neighbours.
    """
    if torch.compiler.is_compiling() or not (
        is_plain_layer_norm(norm) and takes_layer_norm(x, norm.normalized_shape[0])
    ):
        return norm(x)
    return ops.add_layer_norm(x, None, norm.weight, norm.bias, eps=norm.eps)[1]


def is_plain_layer_norm(norm: nn.Module) -> bool:
    """Whether it does nothing but nn.LayerNorm over the last axis."""
    return only_runs(norm, nn.LayerNorm) and len(norm.normalized_shape) == 1


@overridable
def _with_channels(residual: torch.Tensor, channels: int) -> torch.Tensor:
    """`residual` itself, if its last dimension is what the norm is for: one without weights cannot tell."""
    if residual.shape[-1] != channels:
        raise ValueError(f"norm is for {channels} channels but residual has shape {tuple(residual.shape)}")
    return residual
