"""`drop_path_add` on ConvNeXt's maps in channels_last, with layer scale, and on Swin's, without.

Every fourth sample's branch is dropped, as stochastic depth does: eager multiplies it by 0, the op does not read it.
The gradient of the residual is that of the sum itself, which nobody has to write.
"""

from dataclasses import dataclass

import torch

from bbfast.benchmarks.op_case import BACKWARD, BATCH, DTYPE, Case, rand, randn
from bbfast.benchmarks.op_suite import Suite, cases
from bbfast.benchmarks.op_timing import Work
from bbfast.ops import drop_path_add

OP = "drop_path_add"


@dataclass(frozen=True)
class Shape:
    """A map [N, C, H, W]; without channels_last in plain NCHW."""

    layer: str
    channels: int
    size: int
    scaled: bool = True
    channels_last: bool = True


SHAPES = {
    "convnext_tiny-1": Shape("convnext_tiny stage 1", 96, 56),
    "convnext_tiny-2": Shape("convnext_tiny stage 2", 192, 28),
    "convnext_tiny-3": Shape("convnext_tiny stage 3", 384, 14),
    "convnext_tiny-4": Shape("convnext_tiny stage 4", 768, 7),
    "swin_tiny-1": Shape("swin_tiny stage 1", 96, 56, scaled=False),
    "swin_tiny-3": Shape("swin_tiny stage 3", 384, 14, scaled=False),
    "efficientnet_b0": Shape("efficientnet_b0 stage 3", 40, 28, scaled=False),
    "convnext_tiny-2-NCHW": Shape("convnext_tiny stage 2", 192, 28, channels_last=False),
}
GPU = ("convnext_tiny-1", "convnext_tiny-2", "convnext_tiny-3", "convnext_tiny-4")
CPU = ("convnext_tiny-1", "convnext_tiny-3")


def work_of(shape: Shape, direction: str, batch: int, dtype: torch.dtype) -> Work:
    """Forward: residual, what is kept of branch, sum. Backward: gradient in, branch again if scaled, gradient out."""
    numel = batch * shape.channels * shape.size**2
    kept = numel // batch * (batch - len(range(0, batch, 4)))
    moved, flops = 2 * numel + kept, 2 * numel + shape.scaled * kept
    if direction == BACKWARD:
        moved += 2 * numel + shape.scaled * kept
        flops += numel + shape.scaled * 3 * kept
    return Work(moved * dtype.itemsize, flops)


def make_case(shape: Shape, direction: str) -> Case:
    size = (BATCH, shape.channels, shape.size, shape.size)

    def inputs():
        residual, branch = (randn(*size, channels_last=shape.channels_last) for _ in range(2))
        mask = torch.ones(BATCH).to(residual)
        mask[::4] = 0
        return residual, branch, mask, *((rand(shape.channels).to(DTYPE),) if shape.scaled else ())

    def eager(residual, branch, mask, layer_scale=None):
        if layer_scale is not None:
            branch = branch * layer_scale.view(-1, 1, 1)
        return residual + branch * mask.view(-1, 1, 1, 1)

    def bbfast(residual, branch, mask, layer_scale=None):
        return drop_path_add(residual, branch, layer_scale=layer_scale, mask=mask)

    details = (" layer scale" if shape.scaled else "") + ("" if shape.channels_last else " NCHW")
    return Case(
        op=OP,
        shape=f"{shape.layer} {'x'.join(map(str, size))}{details}",
        direction=direction,
        inputs=inputs,
        leaves=(0, 1, 3) if shape.scaled else (0, 1),
        eager=eager,
        bbfast=bbfast,
        work=work_of(shape, direction, BATCH, DTYPE),
    )


@cases(SHAPES, gpu=GPU, cpu=CPU)
def test_drop_path_add(suite: Suite, shape, direction, provider):
    suite.measure(make_case(shape, direction), provider)
