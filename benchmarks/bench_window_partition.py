"""`window_partition` and `window_reverse` at the shapes of Swin's stages.

Eager is roll, pad, view, permute and contiguous, as in timm; every provider must equal it bit by bit. Where one window
is the whole map (Swin's last stage) eager's partition is one plain copy, and its reverse a view, which leaves nothing
to time there. Each op is the other's backward pass, so there is no direction for that.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from bbfast.benchmarks.op_case import BATCH, DTYPE, FORWARD, Case, randn
from bbfast.benchmarks.op_suite import Suite, cases
from bbfast.benchmarks.op_timing import Work
from bbfast.ops import window_partition, window_reverse


@dataclass(frozen=True)
class Shape:
    layer: str
    height: int
    width: int
    channels: int
    shift: int
    window: int = 7

    @property
    def windows(self) -> int:
        """Windows of one image."""
        return -(-self.height // self.window) * -(-self.width // self.window)


SHAPES = {
    "swin_tiny-1": Shape("swin_tiny stage 1", 56, 56, 96, 3),
    "swin_tiny-2": Shape("swin_tiny stage 2", 28, 28, 192, 3),
    "swin_tiny-3": Shape("swin_tiny stage 3", 14, 14, 384, 3),
    "swin_tiny-4": Shape("swin_tiny stage 4", 7, 7, 768, 0),
    "swin_tiny-1-unshifted": Shape("swin_tiny stage 1", 56, 56, 96, 0),
    "padded": Shape("a map that windows do not divide", 50, 75, 96, 3),
    "swin_base-1": Shape("swin_base stage 1", 56, 56, 128, 3),
    "swin_base-2": Shape("swin_base stage 2", 28, 28, 256, 3),
    "swin_base-3": Shape("swin_base stage 3", 14, 14, 512, 3),
}
GPU = ("swin_tiny-1", "swin_tiny-2", "swin_tiny-3", "swin_tiny-4")
CPU = ("swin_tiny-1", "swin_tiny-3", "swin_tiny-4")
SEVERAL_WINDOWS = {name: shape for name, shape in SHAPES.items() if shape.windows > 1}


def eager_partition(x, window, shift):
    if shift:
        x = torch.roll(x, (-shift, -shift), (1, 2))
    batch, height, width, channels = x.shape
    x = F.pad(x, (0, 0, 0, -width % window, 0, -height % window))
    x = x.view(batch, x.shape[1] // window, window, x.shape[2] // window, window, channels)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, window * window, channels)


def eager_reverse(windows, window, size, shift):
    down, across = (-(-length // window) for length in size)
    channels = windows.shape[2]
    x = windows.view(-1, down, across, window, window, channels).permute(0, 1, 3, 2, 4, 5).contiguous()
    x = x.view(-1, down * window, across * window, channels)[:, : size[0], : size[1]].contiguous()
    return torch.roll(x, (shift, shift), (1, 2)) if shift else x


def work_of(shape: Shape, batch: int, dtype: torch.dtype) -> Work:
    """The map once and the windows once."""
    pixels = shape.height * shape.width + shape.windows * shape.window**2
    return Work(batch * pixels * shape.channels * dtype.itemsize)


def make_case(op: str, shape: Shape) -> Case:
    size = (shape.height, shape.width)
    if op == "window_partition":
        eager, bbfast, config = eager_partition, window_partition, (shape.window, shape.shift)
        input_size = (BATCH, *size, shape.channels)
    else:
        eager, bbfast, config = eager_reverse, window_reverse, (shape.window, size, shape.shift)
        input_size = (BATCH * shape.windows, shape.window**2, shape.channels)
    details = f"{BATCH}x{shape.height}x{shape.width}x{shape.channels} window {shape.window} shift {shape.shift}"
    return Case(
        op=op,
        shape=f"{shape.layer} {details}",
        direction=FORWARD,
        inputs=lambda: (randn(*input_size),),
        leaves=(),
        eager=lambda x: eager(x, *config),
        bbfast=lambda x: bbfast(x, *config),
        work=work_of(shape, BATCH, DTYPE),
        epsilons=0,
    )


@cases(SHAPES, gpu=GPU, cpu=CPU, directions=(FORWARD,))
def test_window_partition(suite: Suite, shape, direction, provider):
    suite.measure(make_case("window_partition", shape), provider)


@cases(SEVERAL_WINDOWS, gpu=GPU[:3], cpu=CPU[:2], directions=(FORWARD,))
def test_window_reverse(suite: Suite, shape, direction, provider):
    suite.measure(make_case("window_reverse", shape), provider)
