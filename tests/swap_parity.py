"""That a swapped model is the model it was: the same numbers, keys and gradients, and the same again when restored."""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from collections import Counter
from collections.abc import Callable

import numerics
import parity
import pytest
import torch
from torch import nn

import bbfast
from bbfast import dispatch
from bbfast.swap import _fast


def randomise(model: nn.Module) -> nn.Module:
    """Gives every parameter and statistic a random value, so that no block hides behind a zero or a one."""
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("running_var"):
                value.uniform_(0.5, 2)
            elif name.endswith("running_mean"):
                value.normal_(0, 0.3)
            elif not isinstance(value, nn.Parameter):
                continue
            elif value.dim() <= 1 and name.endswith("weight"):
                value.uniform_(0.5, 1.5).mul_(torch.randn(value.shape).sign())
            elif value.dim() <= 1:
                value.normal_(0, 0.5)
            else:
                value.normal_(0, 1 / math.sqrt(value[0].numel()))
    return model


def classes(model: nn.Module) -> list[tuple[str, type]]:
    return [(path, type(module)) for path, module in model.named_modules()]


def assert_swap_keeps_numbers(
    build: Callable[[], nn.Module],
    size: tuple[int, int],
    blocks: dict[str, int | None],
    *,
    batch: int = 2,
    pick: Callable = lambda output: output,
    train: bool = True,
) -> None:
    """Everything that a swap promises of one model.

    Args:
        build: makes the model, with stochastic depth where it has any.
        size: of the images.
        blocks: by the name of each foreign class of which blocks shall be swapped, how many; None for all there are.
        batch: images in evaluation; training takes one more.
        pick: takes the model's output, returns the tensor to compare.
        train: whether to compare a training step.
    """
    model = randomise(build()).eval()
    exact_model = copy.deepcopy(model).double()
    _assert_outputs_agree(model, exact_model, torch.randn(batch, 3, *size), blocks, pick)
    if train:
        assert_training_step_agrees(exact_model, torch.randn(batch + 1, 3, *size), pick)


def _assert_outputs_agree(model: nn.Module, exact_model: nn.Module, x: torch.Tensor, blocks: dict, pick: Callable):
    """In single precision by the rule: NCHW in plain torch, channels_last on the CPU kernels, restored to the bit."""
    with torch.no_grad():
        exact, before = pick(exact_model(x.double())), pick(model(x))
        keys, old_classes = list(model.state_dict()), classes(model)
        _assert_swapped_as_planned(model, blocks)
        # A backend is named because the interpreter of Triton's kernels would take minutes.
        with backend("torch"):
            numerics.assert_within_rule("output", pick(model(x)), exact, before)
        channels_last = copy.deepcopy(model).to(memory_format=torch.channels_last)
        with backend("cpp"):
            ours = pick(channels_last(x.contiguous(memory_format=torch.channels_last)))
        numerics.assert_within_rule("output of channels_last", ours, exact, before)
        assert list(model.state_dict()) == keys
        bbfast.restore(model)
        assert classes(model) == old_classes
        assert torch.equal(pick(model(x)), before), "the restored model's output differs"


@contextlib.contextmanager
def backend(name: str):
    """Ops run on that backend, or without a word on the reference."""
    with pytest.MonkeyPatch.context() as monkeypatch, warnings.catch_warnings():
        warnings.simplefilter("ignore", dispatch.FallbackWarning)
        monkeypatch.setenv("BBFAST_BACKEND", name)
        yield


def _assert_swapped_as_planned(model: nn.Module, blocks: dict[str, int | None]) -> None:
    there = Counter(type(module).__name__ for module in model.modules())
    expected = {name: there[name] if number is None else number for name, number in blocks.items()}
    plan = bbfast.plan(model)
    assert Counter(row.old.rpartition(".")[2] for row in plan.swapped) == expected, plan
    assert not plan.skipped and not plan.notes, plan
    report = bbfast.swap(model)
    assert report.rows == plan.rows
    for row in report.rows:
        assert _fast.is_fast(type(model.get_submodule(row.path)))


def assert_training_step_agrees(model: nn.Module, x: torch.Tensor, pick: Callable = lambda output: output) -> None:
    """In double precision, to nine digits: output, gradients of input and parameters, running statistics.

    Args:
        model: in double precision.
    """
    picked = _Picked(model, pick)
    with torch.no_grad():
        grad_out = torch.randn_like(picked.eval()(x.double()))
    swapped = copy.deepcopy(picked)
    bbfast.swap(swapped)
    parity.assert_equal_to_nine_digits(
        parity.training_step(swapped, x, grad_out), parity.training_step(picked, x, grad_out)
    )


class _Picked(nn.Module):
    """A model whose output is one tensor."""

    def __init__(self, model: nn.Module, pick: Callable):
        super().__init__()
        self.model = model
        self.pick = pick

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pick(self.model(x))
