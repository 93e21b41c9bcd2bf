"""timm's models, swapped: the blocks that are found, the numbers that stay."""

from __future__ import annotations

import pytest
import swap_parity
import timm

# name, size of the images, blocks that are swapped by the name of their class (None: all there are)
MOBILE = [
    ("mobilenetv2_050", (64, 96), {"BatchNormAct2d": 2, "DepthwiseSeparableConv": None, "InvertedResidual": None}),
    (
        "mobilenetv3_small_050",
        (64, 96),
        {"BatchNormAct2d": 1, "DepthwiseSeparableConv": None, "InvertedResidual": None, "ConvBnAct": None},
    ),
]


@pytest.mark.parametrize("name, size, blocks", MOBILE, ids=lambda value: value if isinstance(value, str) else "")
def test_mobile(name, size, blocks):
    swap_parity.assert_swap_keeps_numbers(
        lambda: timm.create_model(name, num_classes=7, drop_path_rate=0.3, drop_rate=0.2), size, blocks
    )
