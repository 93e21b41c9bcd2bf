"""What a kernel module tells the tools that compile its kernels without launching them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class CompileCase:
    """One kernel with one configuration that its module's heuristic can choose.

    Attributes:
        op: the op's name.
        description: the configuration in words.
        kernel: a `triton.jit` function.
        signature: argument name -> type ("*bf16", "*fp32", "i32", "fp32"), constants left out.
        constexprs: constant name -> value; arguments that a launch makes constant (a stride of 1, None) too.
        num_warps, num_stages: as in a launch.
        divisible_by_16: the names of pointers and sizes that are multiples of 16 in this case.
        outputs: output elements per program (for instructions per element); None where that says nothing.
    """

    op: str
    description: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int = 3
    divisible_by_16: tuple[str, ...] = ()
    outputs: int | None = None
