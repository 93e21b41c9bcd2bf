"""torchvision's detectors, segmentation models and feature extractors around swapped backbones."""

from __future__ import annotations

import copy
from collections import Counter

import parity
import pytest
import swap_parity
import torch
from torch import nn
from torchvision import ops
from torchvision.models import _utils, detection, get_model, mobilenetv3, resnet, segmentation
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops.misc import FrozenBatchNorm2d

import bbfast
from bbfast.swap import _fast

SIZE = (48, 64)


def swapped_copy(model: nn.Module) -> tuple[nn.Module, Counter]:
    """The copy, and how many blocks of which class were swapped in it; none was skipped."""
    model = copy.deepcopy(model)
    report = bbfast.swap(model)
    assert not report.skipped and not report.notes, report
    return model, Counter(row.old.rpartition(".")[2] for row in report.swapped)


# ---- detection ---------------------------------------------------------------------------------------------


def _detector(backbone: nn.Module) -> nn.Module:
    return detection.FasterRCNN(
        backbone,
        min_size=SIZE[0],
        max_size=SIZE[1],
        rpn_anchor_generator=detection.anchor_utils.AnchorGenerator(((8,), (16,), (32,)), ((0.5, 1.0, 2.0),) * 3),
        box_roi_pool=ops.MultiScaleRoIAlign(["0", "1"], output_size=7, sampling_ratio=2),
        box_head=detection.faster_rcnn.TwoMLPHead(16 * 7 * 7, 16),
        box_predictor=detection.faster_rcnn.FastRCNNPredictor(16, 3),
        rpn_pre_nms_top_n_train=50,
        rpn_post_nms_top_n_train=20,
        rpn_pre_nms_top_n_test=50,
        rpn_post_nms_top_n_test=20,
    )


def _resnet_fpn() -> nn.Module:
    """With frozen norms, as detectors have them."""
    model = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], norm_layer=FrozenBatchNorm2d)
    return BackboneWithFPN(model, {"layer1": "0", "layer2": "1"}, [64, 128], 16)


def _mobilenet_fpn() -> nn.Module:
    return BackboneWithFPN(_mobilenet(), {"1": "0", "3": "1"}, [16, 24], 16)


def _mobilenet() -> nn.Module:
    config = mobilenetv3.InvertedResidualConfig
    settings = [
        config(16, 3, 16, 16, False, "RE", 1, 1, 1.0),
        config(16, 5, 24, 24, True, "HS", 2, 1, 1.0),
        config(24, 3, 24, 24, True, "HS", 1, 2, 1.0),
    ]
    return mobilenetv3.MobileNetV3(settings, 24).features


DETECTORS = {
    "resnet": (_resnet_fpn, {"BasicBlock": 2, "Sequential": 1}),
    "mobilenet": (_mobilenet_fpn, {"InvertedResidual": 3, "Conv2dNormActivation": 1}),
}


@pytest.mark.parametrize("name", DETECTORS)
def test_detector(name):
    """In double precision, so that no box is chosen otherwise for a rounding error."""
    build, blocks = DETECTORS[name]
    model = swap_parity.randomise(_detector(build())).double()
    fast, found = swapped_copy(model)
    assert found == blocks
    images = [torch.rand(3, *SIZE, dtype=torch.float64) for _ in range(2)]
    with torch.no_grad():
        for ours, theirs in zip(fast.eval()(images), model.eval()(images)):
            assert torch.equal(ours["labels"], theirs["labels"])
            torch.testing.assert_close(ours["boxes"], theirs["boxes"], rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(ours["scores"], theirs["scores"], rtol=1e-6, atol=1e-9)
    targets = [
        {"boxes": torch.tensor([[4.0, 6, 30, 40]], dtype=torch.float64), "labels": torch.tensor([label])}
        for label in (1, 2)
    ]
    parity.assert_equal_to_nine_digits(*(_detection_step(each, images, targets) for each in (fast, model)))
    bbfast.restore(fast)
    assert swap_parity.classes(fast) == swap_parity.classes(model)


def _detection_step(model: nn.Module, images: list, targets: list) -> dict:
    torch.manual_seed(7)  # proposals are sampled
    losses = model.train()(images, targets)
    sum(losses.values()).backward()
    return {
        **{name: loss.detach() for name, loss in losses.items()},
        **{f"gradient of {name}": parameter.grad for name, parameter in model.named_parameters()},
        **{f"buffer {name}": value for name, value in model.named_buffers()},
    }


# ---- segmentation ------------------------------------------------------------------------------------------


def test_segmentation_with_a_mobilenet():
    def build():
        backbone = _utils.IntermediateLayerGetter(_mobilenet(), {"1": "low", "3": "high"})
        return segmentation.LRASPP(backbone, 16, 24, num_classes=3, inter_channels=8)

    blocks = {"InvertedResidual": 3, "Conv2dNormActivation": 1, "Sequential": 1}
    swap_parity.assert_swap_keeps_numbers(build, SIZE, blocks, pick=lambda output: output["out"])


def _small_resnet() -> nn.Module:
    model = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1])
    del model.layer3, model.layer4, model.avgpool, model.fc
    return _utils.IntermediateLayerGetter(model, {"layer1": "aux", "layer2": "out"})


@pytest.mark.parametrize("head, blocks", [("deeplab", 6), ("fcn", 1)])
def test_segmentation_heads(head, blocks):
    def build():
        classifier = {
            "deeplab": segmentation.deeplabv3.DeepLabHead(128, 3, (2, 3)),
            "fcn": segmentation.fcn.FCNHead(128, 3),
        }[head]
        return segmentation.DeepLabV3(_small_resnet(), classifier, segmentation.fcn.FCNHead(64, 3))

    heads = {"deeplab": {"DeepLabHead": 1, "ASPPConv": 2, "FCNHead": 1}, "fcn": {"FCNHead": 2}}[head]
    sequences = {"deeplab": 3, "fcn": 1}[head]  # one of the backbone's; in the head, two
    swap_parity.assert_swap_keeps_numbers(
        build,
        (32, 40),
        {"BasicBlock": 2, "Sequential": sequences} | heads,
        pick=lambda output: torch.cat((output["out"], output["aux"]), 1),
    )


# ---- features ----------------------------------------------------------------------------------------------

EXTRACTED = {
    "resnet18": {"layer1.1": "first", "layer2": "second"},
    "mobilenet_v3_small": {"features.1": "first", "features.3": "second"},
    "densenet121": {"features.denseblock1": "first", "features.transition1": "second"},
}


@pytest.mark.parametrize("name", EXTRACTED)
@pytest.mark.parametrize("train", [False, True])
def test_feature_extractor_of_a_swapped_model(name, train):
    """torch.fx takes each fast block as one leaf, so that the extractor's are fast as well, and can be restored."""
    nodes = EXTRACTED[name]
    model = swap_parity.randomise(get_model(name, weights=None, num_classes=3)).double()
    fast, _ = swapped_copy(model)
    buffers = {key: value.clone() for key, value in fast.named_buffers()}
    extractor = create_feature_extractor(fast, nodes)
    for key, value in fast.named_buffers():
        assert torch.equal(value, buffers[key]), f"tracing changed {key}"
    assert any(isinstance(module, _fast.Fast) for module in extractor.modules())
    x = torch.randn(2, 3, *SIZE, dtype=torch.float64)
    expected = create_feature_extractor(model, nodes).train(train)(x)
    found = extractor.train(train)(x)
    assert found.keys() == expected.keys()
    for key in found:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-9, atol=1e-9)
    bbfast.restore(extractor)
    assert not any(isinstance(module, _fast.Fast) for module in extractor.modules())


def test_feature_extractor_of_a_plain_model():
    """torch.fx has dissolved the blocks by then, but for those that torchvision tells it to leave whole."""
    extractor = create_feature_extractor(get_model("resnet18", weights=None), ["layer2"])
    assert bbfast.plan(extractor).rows == ()
    model = swap_parity.randomise(get_model("mobilenet_v3_small", weights=None, num_classes=3)).double().eval()
    extractor = create_feature_extractor(model, ["features.3"])
    x = torch.randn(2, 3, *SIZE, dtype=torch.float64)
    expected = extractor(x)["features.3"]
    assert Counter(row.old.rpartition(".")[2] for row in bbfast.swap(extractor).swapped) == {"Conv2dNormActivation": 9}
    torch.testing.assert_close(extractor(x)["features.3"], expected, rtol=1e-9, atol=1e-9)


def test_intermediate_layers():
    model = swap_parity.randomise(_small_resnet()).double().eval()
    fast, found = swapped_copy(model)
    assert found == {"BasicBlock": 2, "Sequential": 1}
    x = torch.randn(2, 3, *SIZE, dtype=torch.float64)
    for key, value in model(x).items():
        torch.testing.assert_close(fast(x)[key], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "swin_t", "convnext_tiny"])
def test_symbolic_trace(name):
    """The whole model may be a fast block itself; then torch.fx looks into it all the same."""
    model, _ = swapped_copy(get_model(name, weights=None, num_classes=3).double().eval())
    traced = torch.fx.symbolic_trace(model)
    called = {type(traced.get_submodule(node.target)) for node in traced.graph.nodes if node.op == "call_module"}
    assert any(issubclass(cls, _fast.Fast) for cls in called)
    x = torch.randn(1, 3, *SIZE, dtype=torch.float64)
    torch.testing.assert_close(traced(x), model(x), rtol=1e-9, atol=1e-9)
