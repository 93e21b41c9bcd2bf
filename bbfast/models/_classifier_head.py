"""The head that most backbones share: pooling, dropout, a linear classifier."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from bbfast.models._pool import GlobalPool2d
from bbfast.nn._arguments import check_int, check_probability


class ClassifierHead(nn.Module):
    """Pools a map and classifies what is left.

    Args:
        in_features: channels of the map.
        num_classes: classes; 0 leaves the classifier out.
        pool_type: see `GlobalPool2d`; `""` classifies each pixel of a channels_last map, else it goes with
            num_classes=0.
        drop_rate: dropout before the classifier.
        channels_last: maps are `[N, H, W, C]` instead of `[N, C, H, W]`.

    Attributes:
        num_features: channels that the classifier takes.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        pool_type: str = "avg",
        drop_rate: float = 0.0,
        channels_last: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.in_features = in_features
        self.channels_last = channels_last
        self.drop_rate = check_probability("drop_rate", drop_rate)
        self.reset(num_classes, pool_type, device=device, dtype=dtype)

    def reset(self, num_classes: int, pool_type: str | None = None, *, device=None, dtype=None) -> None:
        """A fresh classifier; pool_type None keeps the pooling. Nothing changes where an argument is wrong."""
        check_int("num_classes", num_classes, minimum=0)
        pool = self.global_pool if pool_type is None else GlobalPool2d(pool_type, True, self.channels_last)
        pool.check_classifier(num_classes)
        self.global_pool = pool.train(self.training)
        self.num_features = self.in_features * self.global_pool.feat_mult()
        fc = nn.Linear(self.num_features, num_classes, device=device, dtype=dtype) if num_classes else nn.Identity()
        self.fc = fc.train(self.training)

    def forward(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        x = F.dropout(self.global_pool(x), self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    def extra_repr(self) -> str:
        return f"drop_rate={self.drop_rate}, channels_last={self.channels_last}"
