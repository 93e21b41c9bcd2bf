"""ConvNeXt's block: a depthwise convolution, a norm and a perceptron over channels, added to its input."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from bbfast.nn._arguments import check_bool, check_int, check_positive, check_probability
from bbfast.nn.add_layer_norm import apply_layer_norm
from bbfast.nn.channel_norm import LayerNorm
from bbfast.nn.depthwise_conv_bn_act import apply_depthwise_conv_bn_act
from bbfast.nn.drop_path_add import DropPathAdd
from bbfast.nn.global_response_norm import GlobalResponseNorm
from bbfast.nn.linear_act import apply_linear_act, only_runs
from bbfast.nn.mlp import apply_mlp
from bbfast.ops._common import is_channels_last


class ConvNeXtMlp(nn.Module):
    """`fc2(grn(act(fc1(x))))` on maps `[N, H, W, C]`.

    Args:
        dim, hidden_dim: channels of input and output, and between the layers.
        use_conv: the layers are 1x1 convolutions, with weights `[O, I, 1, 1]`; they only lend these to a product of
            matrices, so hooks on them do not run.
        use_grn: put a `GlobalResponseNorm` before fc2.
        act_layer: makes the activation.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        *,
        use_conv: bool = False,
        use_grn: bool = False,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        device=None,
        dtype=None,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.use_conv = use_conv
        self.fc1 = self._layer(dim, hidden_dim, factory)
        self.act = act_layer()
        self.grn = GlobalResponseNorm(hidden_dim, **factory) if use_grn else nn.Identity()
        self.fc2 = self._layer(hidden_dim, dim, factory)

    def _layer(self, in_dim: int, out_dim: int, factory: dict) -> nn.Module:
        return nn.Conv2d(in_dim, out_dim, 1, **factory) if self.use_conv else nn.Linear(in_dim, out_dim, **factory)

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None = None,
        layer_scale: torch.Tensor | None = None,
        norm: nn.Module | None = None,
    ) -> torch.Tensor:
        """
        Args:
            x: `[N, H, W, C]`.
            residual: of x's shape; what layer_scale `[C]` times the result is added to.
            norm: what x goes through first.
        """
        fc1, fc2 = self._on_pixels(self.fc1), self._on_pixels(self.fc2)
        if only_runs(self.grn, nn.Identity):
            return apply_mlp(norm, fc1, self.act, fc2, x, residual=residual, layer_scale=layer_scale)
        x = self.grn(apply_linear_act(fc1, x if norm is None else apply_layer_norm(norm, x), act=self.act))
        return apply_linear_act(fc2, x, residual=residual, layer_scale=layer_scale)

    def _on_pixels(self, layer: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
        """Of maps `[N, H, W, C]`."""
        if self.use_conv and not isinstance(layer, nn.Conv2d):  # somebody's, in the place of a convolution
            return lambda maps: layer(maps.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return layer


class ConvNeXtBlock(nn.Module):
    """`x + drop_path(gamma * mlp(norm(conv_dw(x))))` on maps `[N, C, H, W]`.

    Between convolution and sum everything runs on `[N, H, W, C]`, which costs a channels_last map no copy. gamma,
    drop_path and the sum are one op. conv_dw only lends its parameters, so hooks on it do not run.

    Args:
        dim: C.
        kernel_size, dilation: of the depthwise convolution; odd, so that it keeps the size of a map.
        mlp_ratio: hidden channels of the perceptron per channel.
        conv_mlp, use_grn, act_layer: use_conv, use_grn and act_layer of `ConvNeXtMlp`.
        conv_bias: whether the depthwise convolution has a bias.
        ls_init_value: what gamma starts from; None for no gamma.
        norm_layer: makes a norm over the last axis from `dim`.
        drop_path: chance of each sample to leave out the branch in training.
    """

    def __init__(
        self,
        dim: int,
        *,
        kernel_size: int = 7,
        dilation: int = 1,
        mlp_ratio: float = 4.0,
        conv_mlp: bool = False,
        conv_bias: bool = True,
        use_grn: bool = False,
        ls_init_value: float | None = 1e-6,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        norm_layer: Callable[..., nn.Module] = LayerNorm,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        for name, value in (("conv_mlp", conv_mlp), ("conv_bias", conv_bias), ("use_grn", use_grn)):
            check_bool(name, value)
        if check_int("kernel_size", kernel_size, minimum=1) % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size} is not allowed; it must be odd")
        if isinstance(ls_init_value, bool) or not isinstance(ls_init_value, (int, float, type(None))):
            raise TypeError(f"ls_init_value must be a float or None, got {type(ls_init_value).__name__}")
        hidden_dim = int(dim * check_positive("mlp_ratio", mlp_ratio))
        if hidden_dim < 1:
            raise ValueError(f"mlp_ratio={mlp_ratio} leaves no hidden channel of {dim}")
        padding = check_int("dilation", dilation, minimum=1) * (kernel_size - 1) // 2
        self.conv_dw = nn.Conv2d(
            dim, dim, kernel_size, padding=padding, dilation=dilation, groups=dim, bias=conv_bias, **factory
        )
        self.norm = norm_layer(dim, **factory)
        self.mlp = ConvNeXtMlp(dim, hidden_dim, use_conv=conv_mlp, use_grn=use_grn, act_layer=act_layer, **factory)
        if ls_init_value is None:
            self.register_parameter("gamma", None)
        else:
            self.gamma = nn.Parameter(torch.full((dim,), float(ls_init_value), **factory))
        self.drop_path = DropPathAdd(check_probability("drop_path", drop_path))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Takes `[N, C, H, W]` and returns the same shape and memory format."""
        branch = apply_depthwise_conv_bn_act(self.conv_dw, None, x, act="identity")
        branch = branch.permute(0, 2, 3, 1)
        drops = self.training and self.drop_path.drop_prob
        # Symbolic tracing knows no layouts.
        if not drops and only_runs(self.mlp, ConvNeXtMlp) and isinstance(x, torch.Tensor) and is_channels_last(x):
            return self.mlp(branch, x.permute(0, 2, 3, 1), self.gamma, self.norm).permute(0, 3, 1, 2)
        return self.drop_path(x, self.mlp(apply_layer_norm(self.norm, branch)).permute(0, 3, 1, 2), self.gamma)
