"""Names, tags, wildcards, and weights from files; pretrained ones are in test_pretrained.py."""

from __future__ import annotations

import argparse
import functools
import pickle
import random

import pytest
import torch
from safetensors.torch import save_file

import bbfast
from bbfast import models
from bbfast.models import _registry
from bbfast.models._keywords import accepted_keywords
from bbfast.models._pretrained import PretrainedCfg

NAME = "mobilenetv3_small_050"


@pytest.fixture(autouse=True)
def restored_registry(monkeypatch):
    for table in ("_models", "_deprecated"):
        monkeypatch.setattr(_registry, table, dict(getattr(_registry, table)))


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
        {"module": ("efficientnet", "swin_transformer"), "filter": ("*b0*", "*tiny*")},
        {"filter": "*_b0*", "pretrained": True, "include_tags": False},
        {"filter": ["mobilenetv3*", "swin*"], "name_matches_cfg": True},
        {"filter": "*in22k", "include_tags": True},
        {"filter": "*.ms_in1k", "include_tags": False},
        {"filter": "swin_tiny*.ms_in1k", "pretrained": True, "exclude_filters": "swin_tiny*"},
        {"filter": "*_b?.", "include_tags": True},
        {"filter": "*B0*"},
        {"filter": [], "exclude_filters": [], "module": [], "pretrained": True},
        {"filter": [""]},
        {"filter": "mobilenetv3_small_0[57]?", "name_matches_cfg": True, "include_tags": True},
    ],
)
def test_list_models_agrees_with_timm(arguments):
    timm = pytest.importorskip("timm")
    ours = bbfast.list_models(**arguments)
    known = set(bbfast.list_models()) | set(bbfast.list_models(include_tags=True))
    assert ours == [name for name in timm.list_models(**arguments) if name in known]
    if arguments.keys() <= {"filter", "exclude_filters"}:
        pretrained = timm.list_pretrained(**arguments)
        assert bbfast.list_pretrained(**arguments) == [name for name in pretrained if name in known]


def test_any_list_agrees_with_timm():
    timm = pytest.importorskip("timm")
    patterns = [
        "*",
        "*b?*",
        "tf_*",
        "*.in1k",
        "*_in22k",
        "swin_*",
        "mobilenetv?_*",
        "*l[ai]*",
        "*.ra*",
        "*_b0",
        "x*",
        "",
    ]
    known = set(bbfast.list_models()) | set(bbfast.list_models(include_tags=True))
    for _ in range(60):
        arguments = {
            "filter": random.sample(patterns, random.randrange(4)),
            "module": random.sample(bbfast.list_modules(), random.randrange(3)),
            "pretrained": random.random() < 0.5,
            "exclude_filters": random.sample(patterns[1:], random.randrange(3)),
            "name_matches_cfg": random.random() < 0.2,
            "include_tags": random.choice([None, True, False]),
        }
        expected = [name for name in timm.list_models(**arguments) if name in known]
        assert bbfast.list_models(**arguments) == expected, arguments


def test_lookups_agree_with_timm():
    timm = pytest.importorskip("timm")
    names = bbfast.list_models() + bbfast.list_models(include_tags=True) + ["swin_tiny", "efficientnet_b0.no_such"]
    names += list(models.get_deprecated_models())
    for name in names:
        assert bbfast.is_model(name) == timm.is_model(name), name
        assert models.is_model_pretrained(name) == timm.models.is_model_pretrained(name), name
        for modules in ("efficientnet", ["mobilenetv3", "swin_transformer"], "no_such_module", []):
            assert models.is_model_in_modules(name, modules) == timm.models.is_model_in_modules(name, modules), name
    assert set(bbfast.list_modules()) <= set(timm.list_modules())
    assert bbfast.list_modules() == sorted(bbfast.list_modules())


def test_cfgs_of_an_architecture():
    timm = pytest.importorskip("timm")
    for name in bbfast.list_models():
        ours, theirs = models.get_arch_pretrained_cfgs(name), timm.models.get_arch_pretrained_cfgs(name)
        assert list(ours) == list(theirs)
        assert models.get_pretrained_cfg(name).tag == timm.get_pretrained_cfg(name).tag
    assert models.get_arch_pretrained_cfgs("no_such_model") == {}
    assert models.get_pretrained_cfg_value("efficientnet_b1", "input_size") == (3, 240, 240)
    assert models.get_pretrained_cfg_value("efficientnet_b1", "no_such_field") is None
    assert bbfast.get_pretrained_cfg("no_such_model") is None
    for ask in (models.get_pretrained_cfg_value, lambda name, _: bbfast.get_pretrained_cfg(name, False)):
        with pytest.raises(RuntimeError, match="no pretrained_cfg is known for 'no_such_model'"):
            ask("no_such_model", "input_size")
    with pytest.raises(RuntimeError, match="no pretrained tag 'x'; known tags: ra4_e3600_r240_in1k, ft_in1k"):
        bbfast.get_pretrained_cfg("efficientnet_b1.x")


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
    with pytest.raises(KeyError):  # as timm's
        models.model_entrypoint("zzz")
    with pytest.raises(RuntimeError, match="'efficientnet_b0' is not in the module 'mobilenetv3'"):
        models.model_entrypoint("efficientnet_b0", module_filter="mobilenetv3")
    assert models.model_entrypoint(NAME, module_filter="mobilenetv3").__name__ == NAME


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm/resnet18.a1_in1k", "is not a model's name; write 'hf-hub:timm/resnet18.a1_in1k' .* 'local-dir:timm"),
        ("./resnet18", "is not a model's name"),
        ("C:\\resnet18", "is not a model's name"),
        ("", "is not a model's name"),
        ("resnet 18", "is not a model's name"),
        ("s3:bucket/resnet18", "has the unknown source 's3'; allowed: hf-hub, local-dir"),
        ("local-dir:", "names nothing after local-dir:"),
    ],
)
def test_what_is_no_name_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        bbfast.create_model(name)


@pytest.mark.parametrize(
    "name",
    ["a.b.c", "HF-Hub:a/b@c", "hf_hub:a", "local-dir:C:\\a b", "local-dir:a:b", "x1", "hf-hub:", "s3:a", "a/b", "c:/a"],
)
def test_names_are_parsed_as_timm_does(name):
    timm = pytest.importorskip("timm")
    for ours, theirs in (
        (models.parse_model_name, timm.models.parse_model_name),
        (models.safe_model_name, timm.models.safe_model_name),
    ):
        try:
            expected = theirs(name)
        except ValueError:
            with pytest.raises(ValueError):
                ours(name)
        else:
            assert ours(name) == expected


# ---- old names -------------------------------------------------------------------------------------------


def test_old_names_are_those_of_timm():
    timm = pytest.importorskip("timm")
    for module in bbfast.list_modules():
        theirs = timm.models.get_deprecated_models(module)
        known = {old: new for old, new in theirs.items() if new and bbfast.is_model(new)}
        assert models.get_deprecated_models(module) == known, module
    assert models.get_deprecated_models()["efficientnet_b2a"] == "efficientnet_b2"


def test_old_names_work_with_a_warning():
    with pytest.warns(UserWarning, match="mobilenetv3_large_100_miil_in21k is now called .*_100.miil_in21k") as caught:
        model = bbfast.create_model("mobilenetv3_large_100_miil_in21k", device="meta")
    assert caught[0].filename == __file__
    assert model.num_classes == 11221 and model.pretrained_cfg["tag"] == "miil_in21k"
    with pytest.warns(UserWarning, match="is now called mobilenetv3_large_100.ra_in1k"):
        model = bbfast.create_model("mobilenetv3_large_100_miil_in21k.ra_in1k", device="meta")
    assert model.pretrained_cfg["tag"] == "ra_in1k"
    entrypoint = models.model_entrypoint("mobilenetv3_large_100_miil_in21k")
    with pytest.warns(UserWarning, match="is now called") as caught:
        assert entrypoint(device="meta", num_classes=7).pretrained_cfg["tag"] == "miil_in21k"
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="is now called"):
        assert entrypoint(pretrained_cfg="ra_in1k", device="meta").pretrained_cfg["tag"] == "ra_in1k"
    assert not bbfast.list_models("*miil*") and bbfast.is_model("mobilenetv3_large_100_miil")


def test_deprecating_a_name():
    models.register_model_deprecations("my.mobiles", {"old_net": f"{NAME}.lamb_in1k", "gone_net": None})
    assert models.get_deprecated_models("mobiles") == {"old_net": f"{NAME}.lamb_in1k", "gone_net": None}
    assert "mobiles" in bbfast.list_modules()
    with pytest.raises(RuntimeError, match="model gone_net was removed"):
        bbfast.create_model("gone_net")
    with pytest.raises(RuntimeError, match="unknown model 'no_such_net'"):
        models.register_model_deprecations("my.mobiles", {"old": "no_such_net"})
    with pytest.raises(RuntimeError, match="no pretrained tag 'x'"):
        models.register_model_deprecations("my.mobiles", {"old": f"{NAME}.x"})

    @bbfast.register_model
    def old_net(pretrained=False):
        return torch.nn.Identity()

    assert "old_net" not in models.get_deprecated_models() and bbfast.list_models("old_net") == ["old_net"]
    models.register_model_deprecations("my.mobiles", {"old_net": NAME})
    assert not bbfast.list_models("old_net")


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
    assert len(names) >= 168
    for name in names:
        ours, theirs = models.get_pretrained_cfg(name).to_dict(), timm.get_pretrained_cfg(name).to_dict()
        assert ours.items() <= theirs.items(), name
        not_kept = {"url", "license", "origin_url", "paper_name", "paper_ids"}
        assert {key for key, value in theirs.items() if value} - not_kept <= ours.keys(), name


@pytest.mark.parametrize("module", bbfast.list_modules())
def test_unknown_keyword_is_named(module):
    for name in bbfast.list_models(module=module):
        for keyword, message in (
            ("num_clases", "did you mean num_classes"),
            ("pretraned", "did you mean pretrained"),
            ("xyzzyx", "it takes .*num_classes"),
        ):
            with pytest.raises(TypeError, match=f"^{name} takes no argument {keyword!r}; {message}"):
                bbfast.create_model(name, **{keyword: 3})


class Net(torch.nn.Module):
    def __init__(self, blocks, *, width: int = 3):
        super().__init__()


class Loose(torch.nn.Module):
    def __init__(self, **anything):
        super().__init__()


def make_net(depth: int = 2, **arguments) -> Net:
    return Net((), **arguments)


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (Net, {"blocks", "width"}),
        (make_net, {"depth", "width"}),
        (functools.partial(make_net, depth=3), {"depth", "width"}),
        (Loose, None),
        (lambda **arguments: Net((), **arguments), None),
    ],
)
def test_keywords_of_a_builder(build, expected):
    assert accepted_keywords(build) == expected


def test_arguments_of_scripts_for_timm():
    model = bbfast.create_model(NAME, scriptable=False, exportable=None, no_jit=True, device="meta")
    assert model.num_classes == 1000
    for name in ("scriptable", "exportable"):
        with pytest.raises(ValueError, match=f"{name}=True is not allowed"):
            bbfast.create_model(NAME, **{name: True})


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


class Intruder:
    """Pickles as a call that would leave a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_checkpoint_does_not_run(legacy, protocol, tmp_path):
    content = {"state_dict": make_other().state_dict(), "extra": Intruder(tmp_path / "intruder")}
    torch.save(content, tmp_path / "code.pth", pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(content["extra"], protocol))
    says = r"holds more than .*, and is not read, .*: io\.open$" if protocol == 2 else "cannot be read as a checkpoint"
    for name in ("code", "plain"):
        with pytest.raises(ValueError, match=rf"^checkpoint_path: .*{name}.pth {says}") as caught:
            bbfast.create_model(NAME, checkpoint_path=tmp_path / f"{name}.pth")
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "intruder").exists()


def test_arguments_of_a_training_script_may_lie_beside_the_weights(tmp_path):
    other = make_other()
    torch.save({"state_dict": other.state_dict(), "args": argparse.Namespace(lr=0.1)}, tmp_path / "last.pth.tar")
    assert_same_state(bbfast.create_model(NAME, checkpoint_path=tmp_path / "last.pth.tar"), other)


def test_checkpoint_path_that_leads_nowhere(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"checkpoint_path: there is no file .*gone.pth"):
        bbfast.create_model(NAME, checkpoint_path=tmp_path / "gone.pth")
    with pytest.raises(ValueError, match=r"checkpoint_path: .* is not a file"):
        bbfast.create_model(NAME, checkpoint_path=tmp_path)
    with pytest.raises(TypeError, match="checkpoint_path must be a path, got int"):
        bbfast.create_model(NAME, checkpoint_path=3)
