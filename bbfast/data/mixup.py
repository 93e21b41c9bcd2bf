"""Mixing the images of a batch, and their targets."""

from __future__ import annotations

import torch
from torch.nn.functional import one_hot
from torchvision.transforms.v2 import CutMix, MixUp

from bbfast.nn._arguments import check_bool, check_int, check_probability


class Mixup:
    """torchvision's MixUp or CutMix on a batch, with soft targets, under timm's argument names.

    MixUp gives each image the share lam, drawn from Beta(alpha, alpha) once a batch, and its partner the rest. CutMix
    puts a rectangle of the partner, of the share 1 - lam, into each image; lam is then set right for a rectangle that
    the border cuts off. Targets get the same shares.

    Where timm's class of this name differs: the partner of an image is the one before it in the batch (timm: the one in
    the mirrored place), so that batches may have an odd length; x is left as it is (timm overwrites it); torch's
    generator is drawn from, as `torch.manual_seed` sets it (timm: numpy's); rectangles are placed a pixel otherwise.

    Args:
        mixup_alpha, cutmix_alpha: of the Beta distribution; 0 switches the one or the other off.
        cutmix_minmax, correct_lam: timm's; only None and True are provided.
        prob: share of the batches that are mixed at all.
        switch_prob: share of CutMix among these, where both are on.
        mode: timm's; only "batch", one lam for all, is provided.
        label_smoothing: share of the target that is spread evenly over all classes.
        num_classes: of the targets.

    Attributes:
        mixup_enabled: set it to False to go on without mixing; targets stay soft and smoothed.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: an argument outside of what is allowed.

    Example:
        >>> mixup = Mixup(mixup_alpha=0.2, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=10)
        >>> images, soft_targets = mixup(images, targets)
        >>> loss = torch.nn.functional.cross_entropy(model(images), soft_targets)
    """

    def __init__(
        self,
        mixup_alpha: float = 1.0,
        cutmix_alpha: float = 0.0,
        cutmix_minmax: None = None,
        prob: float = 1.0,
        switch_prob: float = 0.5,
        mode: str = "batch",
        correct_lam: bool = True,
        label_smoothing: float = 0.1,
        num_classes: int = 1000,
    ):
        for name, alpha in (("mixup_alpha", mixup_alpha), ("cutmix_alpha", cutmix_alpha)):
            _check_alpha(name, alpha)
        if mixup_alpha == cutmix_alpha == 0:
            raise ValueError("mixup_alpha and cutmix_alpha are both 0; one must be above 0")
        if cutmix_minmax is not None:
            raise ValueError(f"cutmix_minmax={cutmix_minmax!r} is not provided by torchvision; it must be None")
        if mode != "batch":
            raise ValueError(
                f"mode={mode!r} is not provided by torchvision, which mixes a batch by one lam; use 'batch'"
            )
        if not check_bool("correct_lam", correct_lam):
            raise ValueError("correct_lam=False is not provided: torchvision always sets lam right")
        self.mixup = MixUp(alpha=float(mixup_alpha)) if mixup_alpha > 0 else None
        self.cutmix = CutMix(alpha=float(cutmix_alpha)) if cutmix_alpha > 0 else None
        self.prob = check_probability("prob", prob)
        self.switch_prob = check_probability("switch_prob", switch_prob)
        self.label_smoothing = check_probability("label_smoothing", label_smoothing)
        self.num_classes = check_int("num_classes", num_classes, minimum=1)
        self.mixup_enabled = True

    def __call__(self, x: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mixes a batch; the arguments stay as they are.

        Args:
            x: `[N, C, H, W]`, floating point, on any device, at any scale.
            target: `[N]` class indices in 0..num_classes - 1, on any device. On a GPU a wrong index is the GPU's error.

        Returns:
            x of the same dtype, and `[N, num_classes]` float32 targets that sum to 1 in each row.

        Raises:
            TypeError: x is not floating point, or target not of integers.
            ValueError: wrong shapes, or an index outside of the classes.
        """
        self._check(x, target)
        soft = one_hot(target.long(), self.num_classes).float()
        soft = soft * (1 - self.label_smoothing) + self.label_smoothing / self.num_classes
        mix = self._draw() if self.mixup_enabled else None
        return (x, soft) if mix is None or not len(x) else mix(x, soft)

    def _draw(self) -> MixUp | CutMix | None:
        """What this batch gets."""
        if torch.rand(()).item() >= self.prob:
            return None
        if self.mixup is None or self.cutmix is None:
            return self.mixup or self.cutmix
        return self.cutmix if torch.rand(()).item() < self.switch_prob else self.mixup

    def _check(self, x: torch.Tensor, target: torch.Tensor) -> None:
        for name, tensor in (("x", x), ("target", target)):
            if not isinstance(tensor, torch.Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if not x.is_floating_point():
            raise TypeError(f"x must be floating point, got {x.dtype}; mix after normalising")
        if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
            raise TypeError(f"target must hold class indices, got {target.dtype}")
        if x.ndim != 4 or target.shape != x.shape[:1]:
            raise ValueError(f"x must be [N, C, H, W] and target [N], got {tuple(x.shape)} and {tuple(target.shape)}")
        if target.device.type == "cpu" and len(target):
            lowest, highest = target.min().item(), target.max().item()
            if lowest < 0 or highest >= self.num_classes:
                raise ValueError(
                    f"target must hold classes 0..{self.num_classes - 1}, got {lowest if lowest < 0 else highest}"
                )

    def __repr__(self) -> str:
        alphas = {"mixup_alpha": self.mixup, "cutmix_alpha": self.cutmix}
        return (
            f"{type(self).__name__}({', '.join(f'{name}={mix.alpha}' for name, mix in alphas.items() if mix)}, "
            f"prob={self.prob}, switch_prob={self.switch_prob}, label_smoothing={self.label_smoothing}, "
            f"num_classes={self.num_classes})"
        )


def _check_alpha(name: str, alpha: float) -> None:
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool):
        raise TypeError(f"{name} must be a float, got {type(alpha).__name__}")
    if not 0 <= alpha < float("inf"):
        raise ValueError(f"{name}={alpha} is not allowed; it must be a finite number of at least 0")
