"""What the models of all families do alike: forward passes, intermediate maps, checkpointing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bbfast.models._features import check_indices
from bbfast.nn import to_inference_layout
from bbfast.ops._common import overridable


class Backbone(nn.Module):
    """A model that makes maps, stage by stage, and classifies the last one.

    A family defines `_maps`, `_keep_maps`, `forward_head`, `get_classifier`, `reset_classifier` and `group_matcher`;
    where something follows the last map, `_finish`; where the last map has a norm of its own, `_norm_last_map`.

    Attributes:
        num_classes, in_chans: as the constructor was told.
        num_features: channels of `forward_features`; head_hidden_size: width of what the classifier takes.
        feature_info: for each map that `_maps` yields num_chs, reduction and module (whose output it is).
        pretrained_cfg, default_cfg: the same dict, about the model's weights.
        grad_checkpointing: see `set_grad_checkpointing`.
    """

    num_features: int
    head_hidden_size: int
    feature_info: list[dict]

    def __init__(self, num_classes: int, in_chans: int):
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.grad_checkpointing = False
        self.pretrained_cfg = self.default_cfg = {}

    # ---- what a family defines

    def _maps(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        """The maps of images `[N, in_chans, H, W]`, one for each entry of feature_info, in that order."""
        raise NotImplementedError

    def _keep_maps(self, count: int, *, keep_norm: bool, keep_head: bool) -> None:
        """Drops the layers that only maps after the first `count` need, and what follows the last of them.

        Args:
            keep_norm: keep the norm after the last map. keep_head: keep the layers of the head; the classifier and the
                pooling are no matter of this method.
        """
        raise NotImplementedError

    def _finish(self, x: torch.Tensor) -> torch.Tensor:
        """What `forward_features` makes of the last map."""
        return x

    def _norm_last_map(self, x: torch.Tensor) -> torch.Tensor:
        """The last map as `forward_intermediates(norm=True)` hands it out."""
        return x

    # ---- forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[N, in_chans, H, W]` images, contiguous or channels_last, to `[N, num_classes]` logits."""
        return self.forward_head(self._forward_features(x))

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """The last map, `[N, num_features, H / 32, W / 32]`, sizes rounded up, in x's memory format."""
        return in_format_of(x, self._forward_features(x))

    def _forward_features(self, x: torch.Tensor) -> torch.Tensor:
        for features in self._maps(x):  # noqa: B007 (the last one counts)
            pass
        return self._finish(features)

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Some of the maps that feature_info lists, `[N, C, H, W]` each, in the network's order.

        Args:
            x: images `[N, in_chans, H, W]`.
            indices: maps, negative ones from the end; an int for the last so many, None for all.
            norm: normalise the last map where the family has a norm after it.
            stop_early: skip what follows the last wanted map.
            output_fmt: "NCHW".
            intermediates_only: return the list alone, else (what `forward_features` returns, the list); after
                stop_early the first is the last map that was made.

        Raises:
            TypeError, ValueError: indices or output_fmt is not allowed.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt={output_fmt!r} is not allowed; it must be 'NCHW'")
        count = len(self.feature_info)
        wanted = {index % count for index in check_indices("indices", indices, count)}
        intermediates = []
        for index, features in enumerate(self._maps(x)):
            if index in wanted:
                tap = self._norm_last_map(features) if norm and index == count - 1 else features
                intermediates.append(in_format_of(x, self._as_nchw(tap)))
            if stop_early and index == max(wanted):
                break
        if intermediates_only:
            return intermediates
        if index == count - 1:
            features = self._finish(features)
        return in_format_of(x, features), intermediates

    def _as_nchw(self, x: torch.Tensor) -> torch.Tensor:
        return x

    # ---- what one does with a model

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether blocks recompute their activations in the backward pass instead of keeping them.

        Outputs and gradients stay the same. BatchNorm's running statistics take the batch in twice, as in timm.
        """
        for module in self.modules():
            if hasattr(module, "grad_checkpointing"):
                module.grad_checkpointing = enable

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drops the layers that `forward_intermediates(indices=indices)` does not need.

        A model that lost its last map keeps neither norm nor head: its classifier is an nn.Identity.

        Args:
            indices: as for `forward_intermediates`.
            prune_norm: drop the norm after the last map too. prune_head: drop the head too.

        Returns:
            The maps that were asked for, counted from the first.
        """
        total = len(self.feature_info)
        kept = [index % total for index in check_indices("indices", indices, total)]
        count = max(kept) + 1
        cut = count < total
        keep_norm, keep_head = not (prune_norm or cut), not (prune_head or cut)
        self._keep_maps(count, keep_norm=keep_norm, keep_head=keep_head)
        self.feature_info = self.feature_info[:count]
        if not keep_head:
            self.reset_classifier(0, "")
        return kept

    def _run(self, stage: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
        """What a stage makes of x, its blocks recomputed in the backward pass where that is asked for."""
        return run_blocks(stage, x, self.grad_checkpointing)


def run_blocks(blocks: nn.Sequential, x: torch.Tensor, recompute: bool) -> torch.Tensor:
    """What `blocks` make of x, each recomputed in the backward pass if `recompute`.

    Else, and without gradients, `blocks` itself is called, so that its hooks run.
    """
    if not recompute or not torch.is_grad_enabled():
        return blocks(x)
    for block in blocks:
        x = checkpoint(block, x, use_reentrant=False)
    return x


@overridable
def prepare_images(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Images as the first convolution, whose weight is given, may have them, in the fastest layout.

    Says in the model's words what an op would say of them in its own; the op checks the rest.

    Raises:
        TypeError: x is no tensor. ValueError: its shape or device does not fit.
    """
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
    channels = weight.shape[1]
    if x.dim() != 4 or x.shape[1] != channels:
        raise ValueError(f"x must have shape [N, {channels}, H, W], got {tuple(x.shape)}")
    if x.device != weight.device:
        raise ValueError(f"x is on {x.device} but the model is on {weight.device}; move one of them")
    return to_inference_layout(x)


@overridable
def in_format_of(images: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """`features`, contiguous where the images are: between the two a model may prefer another layout."""
    return features.contiguous() if images.is_contiguous() else features
