"""Swapped models on a GPU, where every op runs its kernels: the same numbers in all dtypes and both memory formats."""

from __future__ import annotations

import copy

import numerics
import pytest
import swap_parity
import torch

import bbfast

torchvision = pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")

NAMES = {
    "timm swin": lambda: timm.create_model("swin_tiny_patch4_window7_224", num_classes=7, depths=(2, 2, 2, 2)),
    "timm convnext": lambda: timm.create_model("convnext_atto", num_classes=7),
    "timm mobilenetv3": lambda: timm.create_model("mobilenetv3_large_100", num_classes=7),
    "timm efficientnet": lambda: timm.create_model("tf_efficientnet_b0", num_classes=7),
    "timm resnet": lambda: timm.create_model("resnet26d", num_classes=7),
    "timm regnet": lambda: timm.create_model("regnety_002", num_classes=7),
    "torchvision mobilenet_v2": lambda: torchvision.models.mobilenet_v2(num_classes=7),
    "torchvision swin_t": lambda: torchvision.models.swin_t(num_classes=7),
    "torchvision regnet": lambda: torchvision.models.regnet_y_400mf(num_classes=7),
}

pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("name", NAMES)]


def models(name: str, dtype: torch.dtype):
    """(in double precision, plain, swapped), with the same random weights, on the GPU."""
    plain = swap_parity.randomise(NAMES[name]()).to("cuda", dtype)
    exact, swapped = copy.deepcopy(plain).double(), copy.deepcopy(plain)
    assert bbfast.swap(swapped).swapped
    return exact, plain, swapped


@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_evaluation(name, dtype, channels_last):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    exact, plain, swapped = (model.eval().to(memory_format=layout) for model in models(name, dtype))
    x = torch.randn(4, 3, 224, 224, device="cuda", dtype=dtype).contiguous(memory_format=layout)
    with torch.no_grad():
        numerics.assert_within_rule("logits", swapped(x), exact(x.double()), plain(x))


def test_training_step(name):
    """Loss and every gradient, relative to what float32 costs torch itself."""
    exact, plain, swapped = (model.train() for model in models(name, torch.float32))
    x, target = torch.randn(8, 3, 224, 224, device="cuda"), torch.randint(7, (8,), device="cuda")
    results = []
    for model in (swapped, exact, plain):
        images = x.to(next(model.parameters()).dtype)
        torch.manual_seed(3)
        loss = torch.nn.functional.cross_entropy(model(images), target)
        loss.backward()
        results.append({"loss": loss.detach(), **{key: value.grad for key, value in model.named_parameters()}})
    ours, reference, theirs = results
    for key, value in reference.items():
        numerics.assert_within_rule(key, ours[key], value, theirs[key], rows=8 * 112 * 112)
