"""`add_layer_norm` on Swin's and ConvNeXt's maps, NHWC, with the sum and its norm both used afterwards.

Forward is inference; with backward every fourth sample's branch is dropped, as stochastic depth does, which the op does
not even read. Eager is the sum, the product with the mask and F.layer_norm.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from bbfast.benchmarks.op_case import BACKWARD, BATCH, DTYPE, Case, randn
from bbfast.benchmarks.op_suite import Suite, cases
from bbfast.benchmarks.op_timing import Work
from bbfast.ops import add_layer_norm

OP = "add_layer_norm"


@dataclass(frozen=True)
class Shape:
    layer: str
    size: int
    channels: int


SHAPES = {
    "swin_tiny-1": Shape("swin_tiny stage 1", 56, 96),
    "swin_tiny-2": Shape("swin_tiny stage 2", 28, 192),
    "swin_tiny-3": Shape("swin_tiny stage 3", 14, 384),
    "swin_tiny-4": Shape("swin_tiny stage 4", 7, 768),
    "swin_base-1": Shape("swin_base stage 1", 56, 128),
    "swin_base-2": Shape("swin_base stage 2", 28, 256),
    "swin_base-3": Shape("swin_base stage 3", 14, 512),
    "swin_base-4": Shape("swin_base stage 4", 7, 1024),
}
GPU = ("swin_tiny-1", "swin_tiny-2", "swin_tiny-3", "swin_tiny-4")
CPU = ("swin_tiny-1", "swin_tiny-3")


def work_of(shape: Shape, direction: str, batch: int, dtype: torch.dtype) -> Work:
    """Forward: residual, branch, sum, norm. Backward: the sum and two gradients in, two out. Kept samples only."""
    numel = batch * shape.size**2 * shape.channels
    if direction != BACKWARD:
        return Work(4 * numel * dtype.itemsize, 8 * numel)
    kept = numel // batch * (batch - len(range(0, batch, 4)))
    return Work((8 * numel + kept) * dtype.itemsize, 24 * numel)


def make_case(shape: Shape, direction: str) -> Case:
    size = (BATCH, shape.size, shape.size, shape.channels)
    mask = None
    if direction == BACKWARD:
        mask = torch.ones(BATCH)
        mask[::4] = 0

    def inputs():
        vectors = (randn(shape.channels), randn(shape.channels))
        return (randn(*size), randn(*size), *vectors, *(() if mask is None else (mask.to(vectors[0]),)))

    def eager(residual, branch, weight, bias, mask=None):
        total = residual + (branch if mask is None else branch * mask.view(-1, 1, 1, 1))
        return total, F.layer_norm(total, total.shape[-1:], weight, bias)

    def bbfast(residual, branch, weight, bias, mask=None):
        return add_layer_norm(residual, branch, weight, bias, mask=mask)

    return Case(
        op=OP,
        shape=f"{shape.layer} {'x'.join(map(str, size))}",
        direction=direction,
        inputs=inputs,
        leaves=(0, 1, 2, 3),
        eager=eager,
        bbfast=bbfast,
        work=work_of(shape, direction, BATCH, DTYPE),
    )


@cases(SHAPES, gpu=GPU, cpu=CPU)
def test_add_layer_norm(suite: Suite, shape, direction, provider):
    suite.measure(make_case(shape, direction), provider)
