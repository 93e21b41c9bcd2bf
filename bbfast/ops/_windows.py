"""The extension's window copies: where they run, and windows that are cut and put together by them."""

from __future__ import annotations

import torch

from bbfast import extension
from bbfast.reference.window_attention import Windows

# Ready-made, for one of them is asked for in every call.
_NOT_ON_A_GPU = "the tensor is not on a GPU, which the extension's CUDA kernels need"
_NOT_ON_THE_CPU = "the tensor is not on the CPU, where the extension's C++ kernels run"


def cuda_unsupported_reasons(x: torch.Tensor, *args) -> list[str]:
    """Why the extension's CUDA copies cannot run on `x` (empty: they can).

    Raises:
        BrokenExtensionError: the extension is there but cannot be used.
    """
    if not x.is_cuda:
        return [_NOT_ON_A_GPU]
    if unavailable := extension.unavailable_reason():
        return [unavailable]
    build = extension.load().build_info()
    return [] if build["cuda"] else [f"bbfast._C was built without CUDA: {build['cuda_reason']}"]


def cpp_unsupported_reasons(x: torch.Tensor, *args) -> list[str]:
    """Why the extension's C++ copies cannot run on `x` (empty: they can).

    Raises:
        BrokenExtensionError: the extension is there but cannot be used.
    """
    if not x.is_cpu:
        return [_NOT_ON_THE_CPU]
    unavailable = extension.unavailable_reason()
    return [unavailable] if unavailable else []


class CopiedWindows(Windows):
    """`Windows` whose pad, shift and cut are one copy, and the inverse another."""

    def partition(self, x: torch.Tensor, fill: torch.Tensor | None) -> torch.Tensor:
        windows = extension.load().window_partition(x, self.size, self.shift, self._pad_first)
        if fill is None or not self._pads:
            return windows
        by_image = windows.unflatten(0, (-1, self.count[0] * self.count[1]))
        return torch.where(self._padding(x.device)[:, :, None], fill.to(x.dtype), by_image).flatten(0, 1)

    def reverse(self, windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        size = (self.height, self.width)
        x = extension.load().window_reverse(windows, self.size, size, self.shift, self._pad_first)
        if not self._pads:
            return x, windows.new_zeros(windows.shape[2])
        by_image = windows.unflatten(0, (-1, self.count[0] * self.count[1]))
        return x, by_image[:, self._padding(windows.device)].sum((0, 1))

    @property
    def _pad_first(self) -> bool:
        return self.pad_order == "pad_then_shift"

    @property
    def _pads(self) -> bool:
        return self.padded != (self.height, self.width)

    def _padding(self, device: torch.device) -> torch.Tensor:
        """[windows, tokens]: which tokens are padding."""
        pixels = torch.ones((1, self.height, self.width, 1), dtype=torch.bool, device=device)
        return ~extension.load().window_partition(pixels, self.size, self.shift, self._pad_first)[:, :, 0]
