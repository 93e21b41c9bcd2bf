"""`window_attention` on the qkv maps of Swin's stages, against every other way torch has.

Eager is timm's default: roll, partition, product, bias, mask, softmax, product, reverse, roll. "sdpa" is timm's fused
path, in which bias and mask become one tensor, with one backend of F.scaled_dot_product_attention each; where a backend
does not take such a mask (flash on a GPU), it is skipped with torch's own reasons. "flex" is compiled flex_attention,
which computes bias and mask in the kernel; rolling and partitioning are compiled along with it.
"""

import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from bbfast.benchmarks.op_case import BACKWARD, BATCH, DTYPE, Case, randn
from bbfast.benchmarks.op_suite import Suite, cases
from bbfast.benchmarks.op_timing import DEVICE, Work
from bbfast.ops import window_attention
from bbfast.reference.window_attention import Windows, relative_position_index
from bbfast.reference.window_attention import window_attention as reference

OP = "window_attention"
SDPA = {
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa math": SDPBackend.MATH,
}


@dataclass(frozen=True)
class Shape:
    """Heads have 32 channels, windows are square."""

    layer: str
    size: int
    channels: int
    window: int = 7
    shift: int = 3
    batch: int = BATCH

    @property
    def windows(self) -> int:
        """Windows of one image."""
        return (-(-self.size // self.window)) ** 2


SHAPES = {
    "swin_tiny-1": Shape("swin_tiny stage 1", 56, 96),
    "swin_tiny-2": Shape("swin_tiny stage 2", 28, 192),
    "swin_tiny-3": Shape("swin_tiny stage 3", 14, 384),
    "swin_tiny-4": Shape("swin_tiny stage 4", 7, 768, shift=0),
    "swin_base-1": Shape("swin_base stage 1", 56, 128),
    "swin_base-2": Shape("swin_base stage 2", 28, 256),
    "swin_base-3": Shape("swin_base stage 3", 14, 512),
    "swin_base-4": Shape("swin_base stage 4", 7, 1024, shift=0),
    "swin_tiny-1-unshifted": Shape("swin_tiny stage 1", 56, 96, shift=0),
    "swin_base-384-1": Shape("swin_base 384 stage 1", 96, 128, 12, 6, batch=-(-BATCH // 4)),
    "swin_base-384-4": Shape("swin_base 384 stage 4", 12, 1024, 12, 0, batch=-(-BATCH // 4)),
}
GPU = ("swin_tiny-1", "swin_tiny-2", "swin_tiny-3", "swin_tiny-4")
CPU = GPU


def work_of(shape: Shape, direction: str, dtype: torch.dtype) -> Work:
    """qkv and table in, y out; backward the same and y's gradient in, two gradients out.

    Two products of tokens x tokens x channels per window, of real tokens only; backward computes the first one
    again and four more.
    """
    pixels, table = shape.batch * shape.size**2 * shape.channels, (2 * shape.window - 1) ** 2 * shape.channels // 32
    product = 2 * shape.batch * shape.windows * shape.window**4 * shape.channels
    if direction == BACKWARD:
        return Work((11 * pixels + 3 * table) * dtype.itemsize, 7 * product, on_tensor_cores=True)
    return Work((4 * pixels + table) * dtype.itemsize, 2 * product, on_tensor_cores=True)


class Attention:
    """Every provider as a function of (qkv [B, H, W, 3C], table)."""

    def __init__(self, shape: Shape):
        self.heads = shape.channels // 32
        self.window, self.shift = (shape.window,) * 2, (shape.shift,) * 2
        self.windows = Windows(shape.size, shape.size, self.window, self.shift, "shift_then_pad")
        self.index = relative_position_index(self.window, DEVICE)
        self.masked = self.windows.masked_pairs(DEVICE)

    def bbfast(self, qkv, table):
        config = {"num_heads": self.heads, "window_size": self.window, "shift_size": self.shift}
        return window_attention(qkv, table, **config)

    def eager(self, qkv, table):
        config = (self.heads, self.window, self.shift, 32**-0.5, "shift_then_pad", -100.0)
        return reference(qkv, table, None, *config)

    def sdpa(self, backend: SDPBackend):
        def run(qkv, table):
            q, k, v = self._partition(qkv)
            mask = table[self.index].permute(2, 0, 1)[None]
            if self.masked is not None:
                shift_mask = torch.where(self.masked, -100.0, 0.0).to(mask.dtype)
                mask = (mask + shift_mask[:, None]).repeat(len(q) // len(shift_mask), 1, 1, 1)
            mask = mask.expand(len(q), -1, -1, -1).contiguous()
            with sdpa_kernel(backend), warnings.catch_warnings(record=True) as reasons:
                warnings.simplefilter("always")  # torch says in warnings why a backend does not take a call
                try:
                    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
                except RuntimeError as error:
                    texts = (
                        str(text).strip().split(" (Triggered")[0] for text in (error, *(r.message for r in reasons))
                    )
                    raise RuntimeError(" ".join(text for text in texts if not text.endswith("because:"))) from error
            return self._reverse(out)

        return run

    def flex(self, qkv, table):
        q, k, v = self._partition(qkv)
        bias, masked = table[self.index].permute(2, 0, 1), self.masked

        def score(score, window, head, query, key):
            score = score + bias[head, query, key]
            if masked is None:
                return score
            return score + torch.where(masked[window % len(masked), query, key], -100.0, 0.0)

        return self._reverse(flex_attention(q, k, v, score_mod=score))

    def _partition(self, qkv):
        windows = self.windows.partition(qkv, None)
        return windows.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def _reverse(self, out):
        return self.windows.reverse(out.transpose(1, 2).flatten(2))[0]


def make_case(shape: Shape, direction: str) -> Case:
    attention = Attention(shape)
    size = (shape.batch, shape.size, shape.size, 3 * shape.channels)
    rows = (2 * shape.window - 1) ** 2
    return Case(
        op=OP,
        shape=f"{shape.layer} {'x'.join(map(str, size))} window {shape.window} shift {shape.shift}",
        direction=direction,
        inputs=lambda: (randn(*size), randn(rows, attention.heads)),
        leaves=(0, 1),
        eager=attention.eager,
        bbfast=attention.bbfast,
        others={
            **{name: attention.sdpa(backend) for name, backend in SDPA.items()},
            "flex": torch.compile(attention.flex, dynamic=False),
        },
        work=work_of(shape, direction, DTYPE),
    )


@cases(SHAPES, gpu=GPU, cpu=CPU, others=(*SDPA, "flex"))
def test_window_attention(suite: Suite, shape, direction, provider):
    suite.measure(make_case(shape, direction), provider)
