"""Lets the blocks of timm, torchvision and transformers models run as bbfast's fused ops."""

from bbfast.swap._engine import SwapError, plan, restore, swap, swapped
from bbfast.swap._fold import fold_bn_
from bbfast.swap._report import SwapReport, SwapRow

__all__ = ["SwapError", "SwapReport", "SwapRow", "fold_bn_", "plan", "restore", "swap", "swapped"]
