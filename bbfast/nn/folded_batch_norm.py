"""What is left of a BatchNorm when its statistics went into the convolution before it."""

from __future__ import annotations

import torch
from torch import nn

from bbfast.reference.activation import activation


class FoldedBatchNorm2d(nn.Module):
    """Stands where a BatchNorm was that `bbfast.fold_bn_` folded, and does what it did beside normalising.

    Inference only: in train mode there are no batch statistics to normalise with, and calls raise a RuntimeError.

    Args:
        num_features: C, to show.
        act: the activation that the BatchNorm had: the ops' name of it, a module, or "identity".
    """

    def __init__(self, num_features: int, act: str | nn.Module = "identity"):
        super().__init__()
        self.num_features = num_features
        self.act = act

    def check_inference(self) -> None:
        """Raises a RuntimeError in train mode."""
        if self.training:
            raise RuntimeError(
                "this model's BatchNorms were folded into its convolutions by bbfast.fold_bn_, which cannot be undone: "
                "call model.eval(), or build the model anew and load its weights to train it"
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.check_inference()
        return activation(x, self.act) if isinstance(self.act, str) else self.act(x)

    def extra_repr(self) -> str:
        return f"{self.num_features}" + (f", act={self.act!r}" if isinstance(self.act, str) else "")


def without_folded(bn: nn.Module | None) -> nn.Module | None:
    """`bn`, or None where it was folded, for ops that take no BatchNorm then.

    Raises:
        RuntimeError: it was folded, and is in train mode.
    """
    if not isinstance(bn, FoldedBatchNorm2d):
        return bn
    bn.check_inference()
    return None


BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, FoldedBatchNorm2d)  # what `apply_conv_bn_act` takes
