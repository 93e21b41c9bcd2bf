"""The head of ConvNeXt: pooling, a norm, perhaps a hidden layer, dropout, a linear classifier."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from bbfast.models._pool import GlobalPool2d
from bbfast.nn._arguments import check_int, check_probability


class NormMlpClassifierHead(nn.Module):
    """Pools a map `[N, C, H, W]`, normalises what is left and classifies it.

    Args:
        in_features: C.
        num_classes: classes; 0 leaves the classifier out.
        hidden_size: width of the hidden layer, None for no such layer.
        pool_type: see `GlobalPool2d`, one that keeps the channels; `""` classifies each pixel, by 1x1 convolutions.
        drop_rate: dropout before the classifier.
        norm_layer: makes a norm over the channels of `[N, C, H, W]`.

    Attributes:
        num_features: channels that the classifier takes.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        norm_layer: Callable[..., nn.Module],
        hidden_size: int | None = None,
        pool_type: str = "avg",
        drop_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.in_features = in_features
        self.hidden_size = None if hidden_size is None else check_int("head_hidden_size", hidden_size, minimum=1)
        self.drop_rate = check_probability("drop_rate", drop_rate)
        check_int("num_classes", num_classes, minimum=0)
        factory = {"device": device, "dtype": dtype}
        self.global_pool = _pool(pool_type)
        self.norm = norm_layer(in_features, **factory)
        self.pre_logits = nn.Identity()
        if hidden_size is not None:
            hidden = self._linear(in_features, hidden_size, factory)
            self.pre_logits = nn.Sequential(OrderedDict(fc=hidden, act=nn.GELU()))
        self.fc = self._linear(self.num_features, num_classes, factory)

    @property
    def num_features(self) -> int:
        return self.hidden_size or self.in_features

    def _linear(self, in_features: int, out_features: int, factory: dict) -> nn.Module:
        """Of vectors where pixels are pooled, else of maps."""
        if not out_features:
            return nn.Identity()
        if self.global_pool.pool_type:
            return nn.Linear(in_features, out_features, **factory)
        return nn.Conv2d(in_features, out_features, 1, **factory)

    def reset(
        self,
        num_classes: int,
        pool_type: str | None = None,
        *,
        reset_other: bool = False,
        in_features: int | None = None,
        device=None,
        dtype=None,
    ) -> None:
        """A fresh classifier. Nothing changes where an argument is wrong.

        Args:
            pool_type: None keeps the pooling. The hidden layer becomes a convolution, or linear, as it demands.
            reset_other: remove the norm and the hidden layer.
            in_features: other channels of the map, which only a head without norm can take.
        """
        check_int("num_classes", num_classes, minimum=0)
        in_features = self.in_features if in_features is None else in_features
        if in_features != self.in_features and not (reset_other or isinstance(self.norm, nn.Identity)):
            raise ValueError(f"in_features={in_features} does not fit the norm of {self.in_features} channels")
        if pool_type is not None:
            self.global_pool = _pool(pool_type)
        factory = {"device": device, "dtype": dtype}
        if reset_other:
            self.norm, self.pre_logits, self.hidden_size = nn.Identity(), nn.Identity(), None
        elif self.hidden_size is not None:
            self.pre_logits.fc = self._as_pooling_demands(self.pre_logits.fc, factory)
        self.in_features = in_features
        self.fc = self._linear(self.num_features, num_classes, factory)
        self.train(self.training)

    def _as_pooling_demands(self, old: nn.Module, factory: dict) -> nn.Module:
        new = self._linear(self.in_features, self.hidden_size, factory)
        if old.weight.dim() == new.weight.dim():
            return old
        with torch.no_grad():
            for parameter, before in zip(new.parameters(), old.parameters(), strict=True):
                parameter.copy_(before.reshape(parameter.shape))
                parameter.requires_grad_(before.requires_grad)
        return new

    def forward(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        x = self.norm(self.global_pool(x))
        x = self.pre_logits(x.flatten(1) if self.global_pool.pool_type else x)
        x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    def extra_repr(self) -> str:
        return f"drop_rate={self.drop_rate}"


def _pool(pool_type: str) -> GlobalPool2d:
    pool = GlobalPool2d(pool_type)
    if pool.feat_mult() != 1:
        raise ValueError(f"global_pool={pool_type!r} is not allowed; this head's pooling must keep the channels")
    return pool
