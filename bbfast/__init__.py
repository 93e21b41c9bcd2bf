"""bbfast: the fastest vision backbones in PyTorch."""

from bbfast import data, nn, ops

__version__ = "0.1.0"
__all__ = ["data", "nn", "ops"]
