"""Runs launchers, and ops around them, three times on CPU tensors, with kernels compiled for an H100 and not launched.

A process of its own, since Triton must not interpret here: `python tests/replayed_launches.py`. The first call runs as
written, the second is recorded, the third repeated. All three must hand the same values to the same kernels, tensors in
the same places, and write to memory of their own.
"""

from __future__ import annotations

import sys
from functools import partial
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel
from triton.runtime import driver

from bbfast import env, ops
from bbfast.triton_kernels import (
    add_layer_norm,
    batch_norm_act,
    conv_bn_act,
    depthwise_conv_bn_act,
    drop_path_add,
    linear_act,
    mlp,
    replay,
    window_attention,
)

HALF = torch.float16
CHANNELS_LAST = torch.channels_last
noted: list[tuple] = []


class Driver:
    """As much of Triton's driver as compiling takes."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


def note_launches() -> None:
    """Kernels are compiled; instead of running they say what they were handed."""
    driver.set_active(Driver())

    def prepare(self):
        if self.module is None:
            self.module, self.function = self, self.name

            def run(x, y, z, stream, function, packed, metadata, enter, leave, *args):
                noted.append((function, (x, y, z), tuple(args)))

            self._run = run

    CompiledKernel._init_handles = prepare
    replay._is_eligible = lambda x: type(x) in replay.TENSORS
    env.TRITON_INTERPRET = True  # for ops, which else would not take these tensors to kernels
    torch.cuda.current_device = lambda: None  # as a CPU tensor's device has no index


def randn(*shape, dtype=HALF):
    return torch.randn(shape).to(dtype)


def maps(*shape):
    return randn(*shape).to(memory_format=CHANNELS_LAST)


def statistics(channels):
    return [torch.rand(channels) + 0.5 for _ in range(4)]


def calls() -> dict:
    """By name, a launcher and what makes new arguments of one kind for it."""
    norm = lambda c: (randn(c), randn(c))  # noqa: E731
    conv = ((1, 1), (1, 1, 1, 1), (1, 1))
    geometry = (3, (7, 7), (3, 3), 0.2, "shift_then_pad")
    return {
        "layer norm": (
            add_layer_norm.forward,
            lambda: (randn(5, 7, 96), None, None, None, *norm(96), 1e-5, HALF, False),
        ),
        "sum and norm": (
            add_layer_norm.forward,
            lambda: (randn(5, 7, 96), randn(5, 7, 96), torch.rand(5), randn(96), *norm(96), 1e-5, HALF, True),
        ),
        "batch norm": (
            batch_norm_act.forward,
            lambda: (maps(2, 24, 5, 6), *statistics(24)[:2], None, *statistics(24)[2:], False, 0.1, 1e-5, "relu"),
        ),
        "batch norm in training": (
            batch_norm_act.forward,
            lambda: (
                maps(2, 24, 5, 6),
                *statistics(24)[:2],
                maps(2, 24, 5, 6),
                *statistics(24)[2:],
                True,
                0.1,
                1e-5,
                "relu",
            ),
        ),
        "pointwise convolution": (
            conv_bn_act.forward,
            lambda: (
                maps(2, 24, 5, 6),
                randn(40, 24, 1, 1),
                None,
                *statistics(40),
                maps(2, 40, 5, 6),
                None,
                (1, 1),
                1e-5,
                "relu",
            ),
        ),
        "depthwise convolution": (
            depthwise_conv_bn_act.forward,
            lambda: (
                maps(2, 24, 9, 8),
                randn(24, 1, 3, 3),
                None,
                *statistics(24),
                *conv,
                False,
                0.1,
                1e-5,
                "silu",
                False,
            ),
        ),
        "depthwise convolution with means": (
            depthwise_conv_bn_act.forward,
            lambda: (
                maps(2, 24, 9, 8),
                randn(24, 1, 3, 3),
                None,
                *statistics(24),
                *conv,
                False,
                0.1,
                1e-5,
                "silu",
                True,
            ),
        ),
        "drop path": (drop_path_add.forward, lambda: (maps(3, 24, 5, 6), maps(3, 24, 5, 6), torch.rand(3), randn(24))),
        "linear": (linear_act.forward, lambda: (randn(5, 7, 24), randn(40, 24), randn(40), None, None, "gelu", HALF)),
        "perceptron": (mlp.forward, lambda: perceptron(randn(5, 7, 24), randn(5, 7, 24))),
        "perceptron, its input added": (mlp.forward, lambda: perceptron(*[randn(5, 7, 24)] * 2)),
        "window attention": (
            window_attention.forward,
            lambda: (randn(2, 14, 14, 144), randn(169, 3), None, *geometry, -100.0),
        ),
        "op: linear": (partial(ops.linear_act, act="relu"), lambda: (randn(5, 7, 24), randn(40, 24), randn(40))),
        "op: pointwise convolution": (
            partial(ops.conv_bn_act, act="silu"),
            lambda: (maps(2, 24, 5, 6), randn(40, 24, 1, 1), *statistics(40)),
        ),
        "op: depthwise convolution with means": (
            partial(ops.depthwise_conv_bn_act, padding="same", stride=2, squeeze=True),
            lambda: (maps(2, 24, 9, 8), randn(24, 1, 5, 5), *statistics(24)),
        ),
        "op: window attention": (
            partial(ops.window_attention, num_heads=3, window_size=7, shift_size=3),
            lambda: (randn(2, 14, 14, 144), randn(169, 3)),
        ),
        "batch norm's gradients": (
            batch_norm_act.backward,
            lambda: (
                *(maps(2, 24, 5, 6), maps(2, 24, 5, 6), *statistics(24)[:2], None, torch.rand(24), torch.rand(24)),
                *(None, None, True, 1e-5, "relu"),
            ),
        ),
        "norm's gradients": (
            add_layer_norm.backward,
            lambda: (
                *(randn(5, 7, 96), None, randn(5, 7, 96), None, None, None, *norm(96), torch.rand(35), torch.rand(35)),
                *(HALF, None, True),
            ),
        ),
        "sum and norm's gradients": (
            add_layer_norm.backward,
            lambda: (
                *(randn(5, 7, 96), randn(5, 7, 96), randn(5, 7, 96), randn(5, 7, 96), torch.rand(5), randn(96)),
                *(*norm(96), torch.rand(35), torch.rand(35), HALF, HALF, True),
            ),
        ),
        "depthwise convolution's gradients": (
            depthwise_conv_bn_act.backward,
            lambda: (
                *(maps(2, 24, 9, 8), None, maps(2, 24, 9, 8), randn(24, 1, 3, 3), None, *statistics(24), None, None),
                *(*conv, True, 1e-5, "silu", True, True),
            ),
        ),
        "depthwise convolution's gradients, no norm": (
            depthwise_conv_bn_act.backward,
            lambda: (
                *(maps(2, 24, 9, 8), None, maps(2, 24, 9, 8), randn(24, 1, 3, 3), randn(24), *[None] * 6),
                *(*conv, False, 1e-5, "identity", True, True),
            ),
        ),
        "drop path's gradients": (
            drop_path_add.backward,
            lambda: (maps(3, 24, 5, 6), maps(3, 24, 5, 6), torch.rand(3), randn(24), HALF),
        ),
        "window attention's gradients": (
            window_attention.backward,
            lambda: (randn(2, 14, 14, 48), randn(2, 14, 14, 144), randn(169, 3), None, *geometry, -100.0, True, False),
        ),
    }


def perceptron(x, residual):
    layers = (randn(96, 24), randn(96), randn(24, 96), randn(24))
    return (x, *layers, randn(24), randn(24), None, residual, 1e-5, "gelu", HALF)


def described(args: tuple, results: tuple) -> list[tuple]:
    """What was noted, each tensor by where it came from: an argument, a result, or memory of the launcher's."""
    names: dict[int, str] = {}
    for index, value in enumerate(args):
        if isinstance(value, torch.Tensor):
            names.setdefault(value.data_ptr(), f"argument {index}")
    for index, value in enumerate(results):
        if isinstance(value, torch.Tensor) and value.data_ptr() not in names:
            names[value.data_ptr()] = f"result {index} {tuple(value.shape)} {value.stride()} {value.dtype}"

    def name(value):
        if isinstance(value, torch.Tensor):
            return f"{names.setdefault(value.data_ptr(), f'own {len(names)}')} {value.dtype}"
        return value

    return [(kernel, grid, tuple(name(value) for value in values)) for kernel, grid, values in noted]


def run(launcher, make) -> tuple[list[tuple], list[tuple]]:
    """The launches of each of three calls, and what each returned, with all tensors kept alive."""
    launches, kept = [], []
    for _ in range(3):
        noted.clear()
        args = make()
        results = launcher(*args)
        results = results if isinstance(results, tuple) else (results,)
        shapes = [None if r is None else (r.shape, r.stride(), r.dtype) for r in results]
        launches.append((described(args, results), shapes))
        kept.append((args, results, list(noted)))
    addresses = [r.data_ptr() for _, results, _ in kept for r in results if r is not None]
    assert len(set(addresses)) == len(addresses), "two calls returned the same memory"
    return launches


def main() -> int:
    note_launches()
    print(SimpleNamespace(triton=triton.__version__, torch=torch.__version__))
    for name, (launcher, make) in calls().items():
        plans = getattr(launcher, "func", launcher).plans
        before = len(plans)
        written, recorded, repeated = run(launcher, make)
        (plan,) = list(plans.values())[before:]
        assert isinstance(plan, replay._Plan), f"{name}: is not remembered"
        assert written[0], f"{name}: nothing was launched"
        assert recorded == written, f"{name}: the recorded call differs"
        assert repeated == written, f"{name}:\n{written}\n{repeated}"
        print(f"{name}: {len(written[0])} launches, repeated")
    return 0


if __name__ == "__main__":
    sys.exit(main())
