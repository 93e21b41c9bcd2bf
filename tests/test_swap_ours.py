"""A model of ours built with the fused layers, timm's plain one and timm's swapped one, all from one checkpoint."""

from __future__ import annotations

import numerics
import pytest
import torch

import bbfast

timm = pytest.importorskip("timm")
from parity import (  # noqa: E402
    TRAINING,
    assert_equal_to_nine_digits,
    forward,
    make,
    random_state,
    training_step,
)

# Further arguments of the model, and the size of the images.
MODELS = {
    "swin_tiny_patch4_window7_224": ({"img_size": (60, 76), "depths": (2, 2, 2, 1)}, (60, 76)),
    "convnext_atto": ({}, (68, 92)),
    "resnet18": ({}, (68, 92)),
    "mobilenetv3_small_050": ({}, (68, 92)),
    "regnetx_002": ({}, (68, 92)),
}

pytestmark = pytest.mark.usefixtures("reference_backend")


class Trio:
    """Three models with the same random weights: of bbfast, of timm, and of timm and swapped."""

    def __init__(self, name: str):
        arguments, self.size = MODELS[name]
        self.name = name
        self.arguments = {**TRAINING, **arguments}
        self.state = random_state(name, **self.arguments)

    def make(self, dtype: torch.dtype) -> tuple[torch.nn.Module, ...]:
        libraries = (bbfast, timm, timm)
        ours, plain, swapped = (make(library, self.name, self.state, dtype, **self.arguments) for library in libraries)
        report = bbfast.swap(swapped, strict=True)
        assert report.swapped and not report.notes, report
        return ours, plain, swapped

    def images(self, batch: int) -> torch.Tensor:
        return torch.randn(batch, 3, *self.size)


@pytest.mark.parametrize("name", MODELS)
def test_keys(name):
    ours, plain, swapped = Trio(name).make(torch.float32)
    assert list(ours.state_dict()) == list(plain.state_dict()) == list(swapped.state_dict())


@pytest.mark.parametrize("name", MODELS)
def test_forward(name):
    trio = Trio(name)
    x = trio.images(2)
    exact = forward(trio.make(torch.float64)[1], x)
    ours, plain, swapped = (forward(model, x) for model in trio.make(torch.float32))
    numerics.assert_within_rule("logits of ours", ours, exact, plain)
    numerics.assert_within_rule("logits of the swapped one", swapped, exact, plain)


@pytest.mark.parametrize("name", MODELS)
def test_training(name):
    """Output, gradients and running statistics of one seeded step, in double precision and to nine digits."""
    trio = Trio(name)
    x, grad_out = trio.images(3), torch.randn(3, TRAINING["num_classes"])
    ours, plain, swapped = (training_step(model, x, grad_out) for model in trio.make(torch.float64))
    assert_equal_to_nine_digits(ours, plain)
    assert_equal_to_nine_digits(swapped, plain)
