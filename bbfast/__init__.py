"""bbfast: the fastest vision backbones in PyTorch."""

from bbfast import nn, ops

__version__ = "0.1.0"
__all__ = ["nn", "ops"]
