"""Methods that somebody replaced on an instance run, before a swap and after it, and are not folded away."""

from __future__ import annotations

import pytest
import timm
import torch
from torchvision.models import resnet18

import bbfast

pytestmark = pytest.mark.usefixtures("reference_backend", "one_thread")


def swin_block():
    return timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1)).layers[0].blocks[0].eval()


def zero_bias(*_):
    return torch.zeros(1, 3, 49, 49)


# For each: what makes a model, its input, the path of the module, the method, and what stands in for it.
CASES = {
    "block": (swin_block, (1, 14, 14, 96), "", "_attn", lambda x: 0 * x),
    "inner module": (swin_block, (1, 14, 14, 96), "attn", "_get_rel_pos_bias", zero_bias),
    "model": (lambda: resnet18().eval(), (1, 3, 32, 32), "", "_forward_impl", lambda x: x.mean()),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("case", CASES)
def test_somebodys_method_runs(case, when):
    make, shape, path, name, method = CASES[case]
    model, x = make(), torch.randn(shape)
    for key, table in model.named_parameters():
        if key.endswith("relative_position_bias_table"):
            torch.nn.init.normal_(table)
    with torch.no_grad():
        usual = model(x)
        if when == "after":
            bbfast.swap(model)
        setattr(model.get_submodule(path), name, method)
        if when == "before":
            report = bbfast.swap(model)
            (row,) = [row for row in report.rows if row.path == ""]
            assert row.reason == f"{path or 'it'} has a {name} of its own (somebody replaced it on the instance)"
        found = model(x)
        bbfast.restore(model)
        expected = model(x)
    torch.testing.assert_close(found, expected)
    assert expected.shape != usual.shape or not torch.allclose(expected, usual)


def test_what_somebodys_method_may_read_is_not_folded():
    model = timm.create_model("mobilenetv3_small_050").eval()
    model.forward_features = lambda x: model.conv_stem(x)
    (row,) = [row for row in bbfast.fold_bn_(model).rows if row.path == "bn1"]
    assert row.status == "skipped"
    assert row.reason == "its block has a forward_features of its own (somebody replaced it on the instance)"
