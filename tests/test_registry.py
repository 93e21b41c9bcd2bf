"""Names, tags, wildcards, and weights from files and from the hub."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from safetensors.torch import save_file

import bbfast
from bbfast import models
from bbfast.models import _registry
from bbfast.models._pretrained import PretrainedCfg, load_pretrained

NAME = "mobilenetv3_small_050"


@pytest.fixture(autouse=True)
def restored_registry(monkeypatch):
    monkeypatch.setattr(_registry, "_models", dict(_registry._models))


def make_other(**arguments):
    """A model whose weights differ from those of any new one."""
    model = bbfast.create_model(NAME, **arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                module.num_batches_tracked.fill_(3)
    return model


def assert_same_state(model, other):
    for (key, value), (other_key, other_value) in zip(model.state_dict().items(), other.state_dict().items()):
        assert key == other_key and torch.equal(value, other_value), key


# ---- names -----------------------------------------------------------------------------------------------


def test_all_names_of_the_families_are_there():
    timm = pytest.importorskip("timm")
    patterns = ["mobilenetv[23]_*", "tf_mobilenetv3_*"]
    patterns += [f"{prefix}efficientnet_{size}" for prefix in ("", "tf_") for size in ("b?", "l2", "lite?")]
    assert bbfast.list_models(patterns) == timm.list_models(patterns)


@pytest.mark.parametrize(
    "arguments",
    [
        {"filter": "mobilenetv3*"},
        {"filter": ["*lite?", "mobilenetv2_1*"]},
        {"filter": "tf_mobilenetv3*", "pretrained": True},
        {"filter": "mobilenetv3*", "include_tags": True},
        {"filter": "tf_efficientnet_*.ap_in1k", "include_tags": True},
        {"filter": "mobilenetv2*", "pretrained": True, "include_tags": True},
        {"filter": "tf_mobilenetv3*", "exclude_filters": "*small*"},
        {
            "filter": "tf_efficientnet_b*",
            "exclude_filters": ["*.ns_*", "*_b7"],
            "pretrained": True,
            "module": "efficientnet",
        },
        {"filter": "mobilenetv3*", "module": "efficientnet"},
        {"filter": "no_such*"},
        {"module": "no_such_module"},
    ],
)
def test_list_models_agrees_with_timm(arguments):
    timm = pytest.importorskip("timm")
    ours = bbfast.list_models(**arguments)
    known = set(bbfast.list_models()) | set(bbfast.list_models(include_tags=True))
    assert ours == [name for name in timm.list_models(**arguments) if name in known]


def test_list_models_sorts_naturally():
    @bbfast.register_model
    def tiny_net_b10(pretrained=False):
        return torch.nn.Identity()

    @bbfast.register_model
    def tiny_net_b9(pretrained=False):
        return torch.nn.Identity()

    assert bbfast.list_models("tiny_net*") == ["tiny_net_b9", "tiny_net_b10"]


def test_is_model():
    assert bbfast.is_model(NAME)
    assert bbfast.is_model(f"{NAME}.any_tag")
    assert not bbfast.is_model("mobilenetv3")
    with pytest.raises(TypeError, match="model_name must be a string, got int"):
        bbfast.is_model(3)


def test_unknown_name_gets_close_matches():
    with pytest.raises(RuntimeError, match="unknown model 'mobilenetv3_larg_100'; did you mean mobilenetv3_large_100"):
        bbfast.create_model("mobilenetv3_larg_100")
    with pytest.raises(RuntimeError, match=r"unknown model 'zzz'; bbfast.list_models"):
        models.model_entrypoint("zzz")


@pytest.mark.parametrize("name", ["timm/resnet18.a1_in1k", "./resnet18", "hf-hub:timm/resnet18", ""])
def test_what_is_no_name_is_refused(name):
    with pytest.raises(ValueError, match="is not a model's name"):
        bbfast.create_model(name)


def test_tags():
    model = bbfast.create_model("mobilenetv3_large_100.miil_in21k", device="meta")
    assert model.num_classes == model.get_classifier().out_features == 11221
    assert model.pretrained_cfg["hf_hub_id"] == "timm/mobilenetv3_large_100.miil_in21k"
    assert model.pretrained_cfg["tag"] == "miil_in21k"
    assert bbfast.create_model("mobilenetv3_large_100.miil_in21k", num_classes=5, device="meta").num_classes == 5
    assert bbfast.create_model("mobilenetv3_large_100", device="meta").pretrained_cfg["tag"] == "ra_in1k"
    with pytest.raises(RuntimeError, match="no pretrained tag 'nope'; known tags: ra_in1k, ra4_e3600_r224_in1k"):
        bbfast.create_model("mobilenetv3_large_100.nope")


def test_every_tag_says_what_timm_says():
    timm = pytest.importorskip("timm")
    names = bbfast.list_models(include_tags=True)
    assert len(names) == 101
    for name in names:
        ours, theirs = models.get_pretrained_cfg(name).to_dict(), timm.get_pretrained_cfg(name).to_dict()
        assert ours.items() <= theirs.items(), name
        not_kept = {"url", "license", "origin_url", "paper_ids"}
        assert {key for key, value in theirs.items() if value} - not_kept <= ours.keys(), name


def test_none_means_the_default():
    assert bbfast.create_model(NAME, num_classes=None, drop_rate=None, device="meta").num_classes == 1000


# ---- registering -----------------------------------------------------------------------------------------


def test_register_model():
    cfgs = {"a": PretrainedCfg(hf_hub_id="me/"), "b": PretrainedCfg(num_classes=3)}

    @bbfast.register_model(pretrained_cfgs=cfgs)
    def my_net(pretrained=False, *, pretrained_cfg, width=4):
        model = torch.nn.Linear(width, pretrained_cfg.num_classes)
        model.pretrained_cfg = pretrained_cfg
        return model

    assert bbfast.create_model("my_net", width=7).in_features == 7
    assert bbfast.create_model("my_net.b").out_features == 3
    assert bbfast.create_model("my_net").pretrained_cfg.hf_hub_id == "me/my_net.a"
    assert bbfast.list_models("my_net", pretrained=True) == ["my_net.a"]
    assert bbfast.list_models("my_net", module=my_net.__module__.rpartition(".")[2]) == ["my_net"]
    assert models.model_entrypoint("my_net.b") is my_net


def test_registering_a_name_again_warns():
    def my_net(pretrained=False):
        return torch.nn.Identity()

    bbfast.register_model(my_net)
    with pytest.warns(UserWarning, match="my_net was registered before"):
        bbfast.register_model(my_net)


def test_only_functions_are_registered():
    with pytest.raises(TypeError, match="register_model takes a function, got str"):
        bbfast.register_model("my_net")


def test_pretrained_must_be_a_bool():
    with pytest.raises(TypeError, match="pretrained must be a bool, got str"):
        bbfast.create_model(NAME, "lamb_in1k")


# ---- checkpoints -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".bin", ".pt"])
def test_checkpoint_round_trip(suffix, tmp_path):
    other = make_other()
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(other.state_dict(), path)
    else:
        torch.save(other.state_dict(), path)
    assert_same_state(bbfast.create_model(NAME, checkpoint_path=path), other)
    assert_same_state(bbfast.create_model(NAME, checkpoint_path=str(path)), other)


@pytest.mark.parametrize("key", ["state_dict", "state_dict_ema", "model_ema", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod."])
def test_training_checkpoints_are_unwrapped(key, prefix, tmp_path):
    other = make_other()
    state = {prefix + name: value for name, value in other.state_dict().items()}
    torch.save({"epoch": 3, key: state}, tmp_path / "last.pth.tar")
    assert_same_state(bbfast.create_model(NAME, checkpoint_path=tmp_path / "last.pth.tar"), other)


def test_averaged_weights_win(tmp_path):
    other = make_other()
    plain = bbfast.create_model(NAME).state_dict()
    torch.save({"state_dict": plain, "state_dict_ema": other.state_dict()}, tmp_path / "last.pth")
    assert_same_state(bbfast.create_model(NAME, checkpoint_path=tmp_path / "last.pth"), other)


def test_batch_counts_may_be_missing(tmp_path):
    other = make_other()
    state = {key: value for key, value in other.state_dict().items() if "num_batches" not in key}
    torch.save(state, tmp_path / "old.pth")
    model = bbfast.create_model(NAME, checkpoint_path=tmp_path / "old.pth")
    assert torch.equal(model.bn1.running_var, other.bn1.running_var)
    assert model.bn1.num_batches_tracked == 0


def without_stem(state):
    del state["conv_stem.weight"]
    return state


def with_more(state):
    return {**state, "head.extra": torch.zeros(1)}


def transposed(state):
    return {**state, "classifier.weight": state["classifier.weight"].T}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_stem, "missing keys: conv_stem.weight$"),
        (with_more, "unexpected keys: head.extra$"),
        (transposed, r"wrong shapes: classifier.weight \(1024, 1000\) instead of \(1000, 1024\)$"),
        (lambda state: {"stem": torch.zeros(3)}, r"missing keys: .* and \d+ more; unexpected keys: stem$"),
        (lambda state: {}, "holds no weights: .* got an empty dict"),
        (lambda state: [1, 2], "holds no weights: .* got a list"),
        (lambda state: {"epoch": 3}, "not a dict of tensors: entry 'epoch' is a int"),
    ],
)
def test_checkpoint_that_does_not_fit(change, message, tmp_path):
    torch.save(change(make_other().state_dict()), tmp_path / "bad.pth")
    with pytest.raises(ValueError, match=f"(?s)^checkpoint_path: .*bad.pth.*{message}"):
        bbfast.create_model(NAME, checkpoint_path=tmp_path / "bad.pth")


def test_a_checkpoint_that_does_not_fit_changes_nothing(tmp_path):
    model = bbfast.create_model(NAME)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    torch.save(with_more(make_other().state_dict()), tmp_path / "bad.pth")
    with pytest.raises(ValueError, match="checkpoint_path"):
        models.load_checkpoint(model, tmp_path / "bad.pth")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("damage", ["text", "empty", "cut"])
def test_corrupt_checkpoint(suffix, damage, tmp_path):
    path = tmp_path / f"weights{suffix}"
    if damage == "cut":
        state = make_other().state_dict()
        save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
        path.write_bytes(path.read_bytes()[:5000])
    else:
        path.write_text("not a checkpoint\n" if damage == "text" else "")
    with pytest.raises(ValueError, match=rf"^checkpoint_path: .*weights\{suffix}") as caught:
        bbfast.create_model(NAME, checkpoint_path=path)
    assert "\n" not in str(caught.value)


def test_reason_of_a_corrupt_checkpoint_is_more_than_a_number(tmp_path):
    (tmp_path / "weights.pt").write_text("hello")  # torch.load raises KeyError(101) for it
    with pytest.raises(ValueError, match=r"cannot be read as a checkpoint: \w*Error \d+$"):
        bbfast.create_model(NAME, checkpoint_path=tmp_path / "weights.pt")


def test_code_in_a_checkpoint_does_not_run(tmp_path):
    torch.save({"state_dict": types.SimpleNamespace(a=1)}, tmp_path / "code.pth")
    with pytest.raises(ValueError, match="read safely"):
        bbfast.create_model(NAME, checkpoint_path=tmp_path / "code.pth")


def test_checkpoint_path_that_leads_nowhere(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"checkpoint_path: there is no file .*gone.pth"):
        bbfast.create_model(NAME, checkpoint_path=tmp_path / "gone.pth")
    with pytest.raises(ValueError, match=r"checkpoint_path: .* is not a file"):
        bbfast.create_model(NAME, checkpoint_path=tmp_path)
    with pytest.raises(TypeError, match="checkpoint_path must be a path, got int"):
        bbfast.create_model(NAME, checkpoint_path=3)


# ---- weights from the hub --------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that holds the weights of `make_other()`; returns that model and the list of requests."""
    other, requests = make_other(), []
    save_file(other.state_dict(), tmp_path / "model.safetensors")

    def download(repo_id, filename, cache_dir=None):
        requests.append((repo_id, filename))
        return str(tmp_path / filename)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    return other, requests


def test_pretrained_loads_from_the_hub(hub):
    other, requests = hub
    assert_same_state(bbfast.create_model(NAME, pretrained=True), other)
    assert requests == [(f"timm/{NAME}.lamb_in1k", "model.safetensors")]
    assert_same_state(models.model_entrypoint(NAME)(pretrained=True), other)


@pytest.mark.parametrize("in_chans", [1, 2, 4, 7])
def test_pretrained_adapts_the_first_convolution(hub, in_chans):
    timm_manipulate = pytest.importorskip("timm.models._manipulate")
    other, _ = hub
    model = bbfast.create_model(NAME, pretrained=True, in_chans=in_chans)
    expected = timm_manipulate.adapt_input_conv(in_chans, other.conv_stem.weight.detach())
    torch.testing.assert_close(model.conv_stem.weight.detach(), expected)
    assert torch.equal(model.blocks[0][0].conv_dw.weight, other.blocks[0][0].conv_dw.weight)


@pytest.mark.parametrize("num_classes", [0, 10])
def test_pretrained_leaves_another_classifier_out(hub, num_classes):
    other, _ = hub
    model = bbfast.create_model(NAME, pretrained=True, num_classes=num_classes)
    assert torch.equal(model.conv_head.weight, other.conv_head.weight)
    assert num_classes == 0 or model.get_classifier().out_features == num_classes


def test_weights_from_the_hub_must_fit(hub):
    with pytest.raises(
        ValueError, match=r"^the weights of mobilenetv3_small_075.lamb_in1k does not fit .*wrong shapes"
    ):
        bbfast.create_model("mobilenetv3_small_075", pretrained=True)


def test_no_network(monkeypatch):
    def download(*args, **kwargs):
        raise OSError("Connection refused\nmore")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    message = (
        "weights of mobilenetv3_small_050.lamb_in1k could not be fetched from "
        "timm/mobilenetv3_small_050.lamb_in1k .*"
        r"\(Connection refused\).*checkpoint_path="
    )
    with pytest.raises(RuntimeError, match=message):
        bbfast.create_model(NAME, pretrained=True)


def test_no_hub_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(RuntimeError, match="needs the package huggingface_hub"):
        bbfast.create_model(NAME, pretrained=True)


def test_no_weights_known():
    with pytest.raises(RuntimeError, match=r"no pretrained weights exist for mobilenetv2_035.untrained"):
        bbfast.create_model("mobilenetv2_035", pretrained=True)
    with pytest.raises(RuntimeError, match="no pretrained weights exist for Identity"):
        load_pretrained(torch.nn.Identity(), PretrainedCfg())
