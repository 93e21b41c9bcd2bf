"""Pretrained weights: from files, folders, URLs and the hub, adapted as timm adapts them."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from loopback import COMMIT, Answer, hub_error, hub_file, serve
from safetensors.torch import save, save_file

import bbfast
from bbfast import models
from bbfast.models import PretrainedCfg, _registry, _weights
from bbfast.models._hub_folder import weights_in_folder, weights_on_hub

timm = pytest.importorskip("timm")
from parity import random_state  # noqa: E402

NAME = "mobilenetv3_small_050"
TAGGED = "mobilenetv3_small_050.lamb_in1k"

# One model per module of `bbfast.models`: a small one where it is named here, else the first.
SMALL = {
    "convnext": ("convnext_atto", {"depths": (1, 1, 1, 1)}),
    "efficientnet": ("mobilenetv2_035", {}),
    "mobilenetv3": (NAME, {}),
    "regnet": ("regnety_002", {}),
    "resnet": ("resnet10t", {}),
    "swin_transformer": (
        "swin_tiny_patch4_window7_224",
        {"depths": (1, 1, 1, 1), "embed_dim": 16, "num_heads": (1, 2, 4, 8)},
    ),
}
FAMILIES = [SMALL.get(module, (bbfast.list_models(module=module)[0], {})) for module in bbfast.list_modules()]
per_family = pytest.mark.parametrize(("name", "arguments"), FAMILIES, ids=bbfast.list_modules())


def assert_equal(ours, theirs, but: str = "-"):
    assert list(ours) == list(theirs)
    for key, value in theirs.items():
        assert key.startswith(but) or torch.equal(ours[key], value), key


def made_by_timm(name: str, **arguments) -> dict[str, torch.Tensor]:
    return random_state(name, timm, **arguments)


@pytest.fixture(scope="module")
def state():
    return made_by_timm(NAME)


def with_file(path, **fields) -> dict:
    return {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path), **fields}}


# ---- every family, against timm --------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@per_family
def test_timm_checkpoints_load(name, arguments, suffix, tmp_path):
    state, path = made_by_timm(name, **arguments), tmp_path / f"weights{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save({"state_dict": state}, path)
    assert_equal(bbfast.create_model(name, checkpoint_path=path, **arguments).state_dict(), state)


@pytest.mark.parametrize("in_chans", [1, 4])
@per_family
def test_weights_are_adapted_as_timm_does(name, arguments, in_chans, tmp_path):
    """Other channels, other classes: the same tensors, but for the new classifier."""
    torch.save(made_by_timm(name, **arguments), tmp_path / "weights.pth")
    arguments = {**arguments, **with_file(tmp_path / "weights.pth"), "in_chans": in_chans, "num_classes": 5}
    ours, theirs = bbfast.create_model(name, **arguments), timm.create_model(name, **arguments)
    assert_equal(ours.state_dict(), theirs.state_dict(), but=ours.pretrained_cfg["classifier"])
    assert ours.get_classifier().out_features == 5


@pytest.mark.parametrize("source", [1, 3, 4])
@pytest.mark.parametrize("in_chans", [1, 2, 3, 4, 6, 7])
def test_first_convolution_of_any_channels(source, in_chans):
    state = {"stem.weight": torch.randn(5, source, 3, 3)}
    expected = timm.models.adapt_input_conv(in_chans, state["stem.weight"], source)
    _weights._adapt_first_conv(state, "stem.weight", {"stem.weight": torch.empty(5, in_chans, 3, 3)})
    assert torch.equal(state["stem.weight"], expected)


@per_family
def test_a_class_that_is_none_is_left_out(name, arguments, tmp_path):
    state = made_by_timm(name, num_classes=8, **arguments)
    torch.save(state, tmp_path / "weights.pth")
    arguments = {**arguments, **with_file(tmp_path / "weights.pth", num_classes=7, label_offset=1)}
    ours, theirs = bbfast.create_model(name, **arguments), timm.create_model(name, **arguments)
    assert_equal(ours.state_dict(), theirs.state_dict())
    assert torch.equal(ours.get_classifier().bias, state[f"{ours.pretrained_cfg['classifier']}.bias"][1:])


@per_family
def test_feature_extractors_take_the_weights_of_the_whole_model(name, arguments, tmp_path):
    state = made_by_timm(name, **arguments)
    torch.save(state, tmp_path / "weights.pth")
    arguments = {**arguments, **with_file(tmp_path / "weights.pth"), "features_only": True, "out_indices": (0, 2)}
    ours, theirs = bbfast.create_model(name, **arguments), timm.create_model(name, **arguments).state_dict()
    assert_equal(ours.state_dict(), {key: theirs[key] for key in ours.state_dict()})


@per_family
def test_folders_of_bbfast_and_timm_are_the_same(name, arguments, tmp_path):
    """`local-dir:` each way, with another classifier and other channels than the architecture's."""
    arguments = {**arguments, "num_classes": 3, "in_chans": 2}
    ours = bbfast.create_model(name, **arguments)
    ours.load_state_dict(made_by_timm(name, **arguments))
    models.save_for_hf(ours, tmp_path / "ours", label_names=["a", "b", "c"])
    theirs = timm.create_model(f"local-dir:{tmp_path / 'ours'}", pretrained=True)
    assert_equal(ours.state_dict(), theirs.state_dict())
    assert theirs.pretrained_cfg["label_names"] == ["a", "b", "c"]
    timm.models.save_for_hf(theirs, tmp_path / "theirs", safe_serialization=True)
    again = bbfast.create_model(f"local-dir:{tmp_path / 'theirs'}", pretrained=True)
    assert_equal(again.state_dict(), ours.state_dict())
    assert again.pretrained_cfg["input_size"] == (2, *ours.pretrained_cfg["input_size"][1:])
    other = bbfast.create_model(f"local-dir:{tmp_path / 'ours'}", num_classes=4)
    for key in ("mean", "std", "first_conv", "classifier", "num_classes", "pool_size"):
        assert again.pretrained_cfg[key] == other.pretrained_cfg[key], key
    assert other.num_classes == 4 and other.in_chans == 2


# ---- where weights come from -----------------------------------------------------------------------------


def test_state_dict_wins_over_file_and_hub(state, tmp_path):
    before = {key: value.clone() for key, value in state.items()}
    overlay = {"state_dict": state, "file": str(tmp_path / "gone.pth")}
    model = bbfast.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay, in_chans=1)
    assert torch.equal(model.conv_stem.weight, state["conv_stem.weight"].sum(1, keepdim=True))
    assert torch.equal(model.conv_head.weight, state["conv_head.weight"])
    assert_equal(state, before)
    assert "state_dict" not in model.pretrained_cfg


def test_first_conv_and_classifier_may_be_several(state):
    class Twins(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.num_classes = 2
            self.left, self.right = (torch.nn.Conv2d(2, 4, 1, bias=False) for _ in range(2))
            self.head, self.head_dist = torch.nn.Linear(4, 2), torch.nn.Linear(4, 2)

    weights = {name: torch.randn(4, 3, 1, 1) for name in ("left.weight", "right.weight")}
    weights |= {f"{head}.{part}": torch.randn(9, 4) for head in ("head", "head_dist") for part in ("weight", "bias")}
    cfg = PretrainedCfg(
        state_dict=weights, num_classes=9, first_conv=["left", "right"], classifier=("head", "head_dist")
    )
    twins = Twins()
    before = twins.head_dist.weight.clone()
    models.load_pretrained(twins, cfg)
    for name in ("left", "right"):
        torch.testing.assert_close(twins.get_submodule(name).weight.detach(), weights[f"{name}.weight"][:, :2] * 1.5)
    assert torch.equal(twins.head_dist.weight, before)


def test_half_precision_weights_are_adapted_in_float32(state):
    halves = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    arguments = {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": halves}, "in_chans": 1}
    ours = bbfast.create_model(NAME, **arguments)
    assert torch.equal(ours.conv_stem.weight, halves["conv_stem.weight"].float().sum(1, keepdim=True).half().float())


@pytest.mark.parametrize("cfg", ["miil_in21k", {"num_classes": 11221}, PretrainedCfg(num_classes=11221)])
def test_pretrained_cfg_wins_over_the_tag(cfg):
    model = bbfast.create_model("mobilenetv3_large_100.ra_in1k", pretrained_cfg=cfg, device="meta")
    assert model.num_classes == 11221
    assert model.pretrained_cfg["architecture"] == "mobilenetv3_large_100"
    assert model.pretrained_cfg.get("tag") == (cfg if isinstance(cfg, str) else None)
    entrypoint = models.model_entrypoint("mobilenetv3_large_100")
    assert entrypoint(pretrained_cfg=cfg, device="meta").num_classes == 11221


def test_overlay_replaces_fields():
    overlay = {"num_classes": 12, "input_size": [1, 64, 64], "mean": [0.5]}
    model = bbfast.create_model(TAGGED, pretrained_cfg_overlay=overlay, device="meta")
    assert model.num_classes == 12 and model.in_chans == 1
    assert model.pretrained_cfg["mean"] == (0.5,) and model.pretrained_cfg["tag"] == "lamb_in1k"
    assert model.default_cfg is model.pretrained_cfg
    assert models.get_pretrained_cfg(TAGGED).num_classes == 1000


def test_fixed_sizes_come_from_the_cfg():
    overlay = {"input_size": (3, 112, 112)}
    ours = bbfast.create_model("swin_tiny_patch4_window7_224", pretrained_cfg_overlay=overlay, device="meta")
    theirs = timm.create_model("swin_tiny_patch4_window7_224", pretrained_cfg_overlay=overlay, device="meta")
    assert ours.patch_embed.img_size == theirs.patch_embed.img_size == (112, 112)


def test_folder_that_timm_wrote_in_pickle(state, tmp_path):
    timm_model = timm.create_model(NAME)
    timm_model.load_state_dict(state)
    timm.models.save_for_hf(timm_model, tmp_path, safe_serialization=False)
    assert weights_in_folder(tmp_path).name == "pytorch_model.bin"
    assert_equal(bbfast.create_model(f"local-dir:{tmp_path}", pretrained=True).state_dict(), state)


def test_old_config_without_levels(state, tmp_path):
    content = {"architecture": NAME, "num_classes": 2, "num_features": 288, "labels": ["no", "yes"], "mean": [0.5] * 3}
    (tmp_path / "config.json").write_text(json.dumps({**content, "of_a_later_version": 1}))
    cfg = bbfast.create_model(f"local-dir:{tmp_path}", device="meta").pretrained_cfg
    assert (cfg["num_classes"], cfg["label_names"], cfg["mean"]) == (2, ("no", "yes"), (0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    ("model_args", "expected"),
    [
        ({"img_size": 64}, {"input_size": (3, 64, 64), "fixed_input_size": True}),
        ({"img_size": [64, 96]}, {"input_size": (3, 64, 96), "fixed_input_size": True}),
        ({"strict_img_size": False}, {"input_size": (3, 224, 224), "fixed_input_size": False}),
        ({"in_chans": 1}, {"input_size": (1, 224, 224), "test_input_size": (1, 288, 288)}),
    ],
)
def test_model_args_of_a_config_say_what_it_was_trained_on(model_args, expected, tmp_path):
    about = {"fixed_input_size": True, "input_size": [3, 224, 224], "test_input_size": [3, 288, 288]}
    content = {"architecture": "swin_tiny_patch4_window7_224", "pretrained_cfg": about, "model_args": model_args}
    (tmp_path / "config.json").write_text(json.dumps(content))
    name = f"local-dir:{tmp_path}"
    ours = bbfast.create_model(name, device="meta")
    theirs = timm.create_model(name, device="meta").pretrained_cfg
    for key, value in expected.items():
        assert ours.pretrained_cfg[key] == value == (tuple(theirs[key]) if isinstance(value, tuple) else theirs[key])
    if "img_size" in model_args:
        assert ours.patch_embed.img_size == expected["input_size"][1:]


def test_a_config_does_not_choose_where_its_weights_are(tmp_path):
    about = {
        "file": "/etc/hostname",
        "url": "http://x/y.pth",
        "state_dict": {},
        "hf_hub_id": "me/x",
        "source": "hf-hub",
    }
    (tmp_path / "config.json").write_text(json.dumps({"architecture": NAME, "pretrained_cfg": about}))
    cfg = bbfast.create_model(f"local-dir:{tmp_path}", device="meta").pretrained_cfg
    assert cfg["file"] == str(tmp_path) and cfg["source"] == "local-dir" and not {"url", "hf_hub_id"} & cfg.keys()


def test_names_of_the_weights_on_the_hub():
    assert weights_on_hub(None) == ("model.safetensors", "pytorch_model.bin")
    assert weights_on_hub("pytorch_model.bin") == ("model.safetensors", "pytorch_model.bin")
    assert weights_on_hub("open_clip_pytorch_model.bin") == (
        "open_clip_model.safetensors",
        "open_clip_pytorch_model.bin",
    )
    assert weights_on_hub("own.bin") == ("own.safetensors", "own.bin")
    assert weights_on_hub("own.safetensors") == ("own.safetensors",)


# ---- saving ----------------------------------------------------------------------------------------------


def test_saving_a_model_that_was_changed(tmp_path):
    model = bbfast.create_model(NAME, num_classes=3, drop_rate=0.5).to(memory_format=torch.channels_last)
    model.reset_classifier(2)
    models.save_for_hf(model, tmp_path, model_args={"act_layer": "hard_swish"})
    content = json.loads((tmp_path / "config.json").read_text())
    args = {"num_classes": 2, "in_chans": 3, "global_pool": "avg", "act_layer": "hard_swish"}
    assert content["model_args"] == args and content["num_classes"] == content["pretrained_cfg"]["num_classes"] == 2
    assert "hf_hub_id" not in content["pretrained_cfg"]
    again = bbfast.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert_equal(again.state_dict(), model.state_dict())
    assert again.drop_rate == 0


def test_what_cannot_be_saved(tmp_path, monkeypatch):
    monkeypatch.setenv("BBFAST_BACKEND", "torch")
    swin, sizes = "swin_tiny_patch4_window7_224", {"depths": (1, 1), "num_heads": (1, 2), "embed_dim": 16}
    model = bbfast.create_model(swin, **sizes)
    model.set_input_size(256)
    with pytest.raises(ValueError, match=r"has other shapes than this model, e.g. of layers\.0.*as model_args"):
        models.save_for_hf(model, tmp_path)
    models.save_for_hf(model, tmp_path, model_args={"window_size": 8})
    again = bbfast.create_model(f"local-dir:{tmp_path}", pretrained=True)
    x = torch.randn(1, 3, 256, 256)
    assert torch.equal(again.eval()(x), model.eval()(x))
    model = bbfast.create_model(swin, norm_layer=lambda *args, **kwargs: torch.nn.LayerNorm(*args, **kwargs), **sizes)
    with pytest.raises(ValueError, match="JSON cannot express the argument norm_layer"):
        models.save_for_hf(model, tmp_path)
    with pytest.raises(ValueError, match=r"takes a whole model .*, got FeatureListNet"):
        models.save_for_hf(bbfast.create_model(NAME, features_only=True), tmp_path)
    with pytest.raises(ValueError, match=r"takes a whole model .*, got Linear"):
        models.save_for_hf(torch.nn.Linear(1, 1), tmp_path)


# ---- what is refused -------------------------------------------------------------------------------------


def without_stem(state):
    return {key: value for key, value in state.items() if key != "conv_stem.weight"}


@pytest.mark.parametrize(
    ("overlay", "error", "message"),
    [
        ({"hf_hub_id": None}, RuntimeError, f"no pretrained weights exist for {TAGGED}; use pretrained=False"),
        ({"custom_load": True}, RuntimeError, "no state_dict"),
        ({"file": "gone.pth"}, FileNotFoundError, "the file of pretrained_cfg: there is no file gone.pth"),
        ({"state_dict": {"epoch": 3}}, ValueError, "the state_dict of pretrained_cfg is not a dict of tensors"),
        ({"state_dict": [1]}, ValueError, "the state_dict of pretrained_cfg holds no weights: .* got a tuple"),
        ({"hf_hub_id": "me/a@b@c"}, ValueError, "hf_hub_id 'me/a@b@c' must be owner/repository"),
        ({"hf_hub_id": "no name"}, ValueError, "hf_hub_id 'no name' is not allowed"),
        ({"fil": "weights.pth"}, TypeError, "pretrained_cfg_overlay has no field 'fil'; did you mean file"),
        ({"qqq": 1}, TypeError, "pretrained_cfg_overlay has no field 'qqq'; allowed: url, file"),
        ({"hf_hub_id": None, "url": "http://127.0.0.1/"}, ValueError, "url='http://127.0.0.1/' ends in no file's name"),
        ({"input_size": 224}, ValueError, r"input_size=224 of a pretrained_cfg must be \(channels, height, width\)"),
        ([("file", "a")], TypeError, "pretrained_cfg_overlay must be a dict, got list"),
    ],
)
def test_bad_overlays(overlay, error, message):
    with pytest.raises(error, match=message):
        bbfast.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay)


def test_custom_load_is_about_the_weights_it_came_with(state):
    cfg = {"custom_load": True, "url": "http://127.0.0.1/weights.npz"}
    overlay = {"state_dict": state}
    model = bbfast.create_model(NAME, pretrained=True, pretrained_cfg=cfg, pretrained_cfg_overlay=overlay)
    assert torch.equal(model.conv_head.weight, state["conv_head.weight"])


@pytest.mark.parametrize(
    ("cfg", "error", "message"),
    [
        ("nope", RuntimeError, "has no pretrained tag 'nope'; known tags: lamb_in1k"),
        ({"num_clases": 3}, TypeError, "pretrained_cfg has no field 'num_clases'; did you mean num_classes"),
        (3, TypeError, "pretrained_cfg must be a tag, a PretrainedCfg or a dict of its fields, got int"),
    ],
)
def test_bad_pretrained_cfg(cfg, error, message):
    with pytest.raises(error, match=message):
        bbfast.create_model(NAME, pretrained_cfg=cfg)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_stem, "weights.pth does not fit the model; missing keys: conv_stem.weight$"),
        (lambda state: {**state, "more": torch.zeros(1)}, "unexpected keys: more$"),
        (
            lambda state: {**state, "conv_head.bias": torch.zeros(3)},
            r"wrong shapes: conv_head.bias \(3,\) instead of \(1024,\)$",
        ),
        (lambda state: types.SimpleNamespace(**state), "weights.pth holds more than tensors"),
    ],
)
def test_files_that_do_not_fit(change, message, state, tmp_path):
    torch.save(change(state), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=f"^the file of pretrained_cfg: .*{message}"):
        bbfast.create_model(NAME, **with_file(tmp_path / "weights.pth"))


def test_meta_device_cannot_hold_weights(state):
    with pytest.raises(ValueError, match="pretrained=True cannot fill a model on the meta device"):
        overlay = {"state_dict": state}
        bbfast.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay, device="meta")


def test_folders_that_are_none(state, tmp_path):
    folder = tmp_path / "model"
    with pytest.raises(FileNotFoundError, match=r"local-dir:.*model has no config.json"):
        bbfast.create_model(f"local-dir:{folder}")
    folder.mkdir()
    config = folder / "config.json"
    for text, message in (("{", "is not JSON"), ("[]", "names no architecture"), ("{}", "names no architecture")):
        config.write_text(text)
        with pytest.raises(ValueError, match=message):
            bbfast.create_model(f"local-dir:{folder}")
    for name in ("pretrained_cfg", "model_args"):
        config.write_text(json.dumps({"architecture": NAME, name: [1]}))
        with pytest.raises(ValueError, match=f"{name} in .* is no object"):
            bbfast.create_model(f"local-dir:{folder}")
    config.write_text(json.dumps({"architecture": "vit_base_patch16_224", "pretrained_cfg": {}}))
    with pytest.raises(RuntimeError, match="unknown model 'vit_base_patch16_224'"):
        bbfast.create_model(f"local-dir:{folder}")
    config.write_text(json.dumps({"architecture": NAME, "pretrained_cfg": {}, "model_args": {"num_clases": 3}}))
    with pytest.raises(TypeError, match="takes no argument 'num_clases'; did you mean num_classes"):
        bbfast.create_model(f"local-dir:{folder}")
    config.write_text(json.dumps({"architecture": NAME, "pretrained_cfg": {}}))
    with pytest.raises(FileNotFoundError, match=r"local-dir:.*model holds no weights"):
        bbfast.create_model(f"local-dir:{folder}", pretrained=True)
    with pytest.raises(ValueError, match=r"pretrained_cfg cannot be given with local-dir:"):
        bbfast.create_model(f"local-dir:{folder}", pretrained_cfg="lamb_in1k")
    torch.save(state, folder / "any.pth")
    assert_equal(bbfast.create_model(f"local-dir:{folder}", pretrained=True).state_dict(), state)


# ---- from a URL ------------------------------------------------------------------------------------------


@pytest.fixture
def server(state):
    with serve({}) as running:
        yield running


def from_url(url, cache_dir, **fields) -> dict:
    overlay = {"hf_hub_id": None, "url": url, **fields}
    return {"pretrained": True, "pretrained_cfg_overlay": overlay, "cache_dir": cache_dir}


def test_url(server, state, tmp_path, monkeypatch, capsys):
    body = save(state)
    name = f"weights-{hashlib.sha256(body).hexdigest()[:8]}.safetensors"
    server.answers[f"/{name}"] = Answer(body)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    arguments = from_url(f"{server.url}/{name}?download=1", tmp_path / "cache")
    server.answers[f"/{name}?download=1"] = Answer(body)
    assert_equal(bbfast.create_model(NAME, **arguments).state_dict(), state)
    assert name in capsys.readouterr().err  # the progress bar
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [name]
    bbfast.create_model(NAME, **arguments)
    assert len(server.requests) == 1


def test_url_with_a_name_for_the_cache(server, state, tmp_path, monkeypatch):
    server.answers["/download"] = Answer(save(state))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    arguments = from_url((f"{server.url}/download", "own.safetensors"), None)
    assert_equal(bbfast.create_model(NAME, **arguments).state_dict(), state)
    assert (tmp_path / "checkpoints" / "own.safetensors").is_file()


@pytest.mark.parametrize(
    ("path", "answer", "message"),
    [
        ("weights.pth", Answer(status=404), "could not be fetched: the server answers 404 Not Found"),
        (
            "weights.pth",
            Answer(b"x" * 10, length=99),
            "could not be fetched: the connection ended after 10 of 99 bytes",
        ),
        ("weights-0badbeef.pth", Answer(b"x"), "its SHA-256 begins with 2d711642 instead of 0badbeef"),
        ("weights.pth", Answer(b"<p>", headers={"Content-Type": "text/html; charset=utf-8"}), "is a web page"),
        ("weights.pth", Answer(requests=0), "could not be fetched: .*closed connection"),
    ],
)
def test_url_that_gives_no_weights(server, path, answer, message, tmp_path):
    server.answers[f"/{path}"] = answer
    with pytest.raises(RuntimeError, match=rf"the pretrained weights of {TAGGED}: .*{message}.*use checkpoint_path="):
        bbfast.create_model(NAME, **from_url(f"{server.url}/{path}", tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_url_that_gives_something_else(server, tmp_path):
    server.answers["/weights.pth"] = Answer(b"no weights")
    with pytest.raises(ValueError, match=r"weights.pth cannot be read as a checkpoint.*; delete it, and it is fetched"):
        bbfast.create_model(NAME, **from_url(f"{server.url}/weights.pth", tmp_path))
    torch.save(types.SimpleNamespace(), tmp_path / "code.pth")
    with pytest.raises(ValueError, match="holds more than tensors and plain containers"):
        bbfast.create_model(NAME, **from_url(f"{server.url}/code.pth", tmp_path))


def test_no_one_listens(tmp_path):
    with serve({}) as server:
        url = f"{server.url}/weights.pth"
    with pytest.raises(RuntimeError, match=r"weights.pth could not be fetched: .*refused"):
        bbfast.create_model(NAME, **from_url(url, tmp_path))


# ---- from the hub ----------------------------------------------------------------------------------------

# The hub's client reads HF_ENDPOINT when it is imported, so a process of its own makes all these models.
_SESSION = """
import hashlib, json, sys, warnings
import bbfast
warnings.simplefilter("ignore")
results = {}
for key, (name, arguments) in json.load(sys.stdin).items():
    try:
        model = bbfast.create_model(name, **arguments)
        digest = hashlib.sha256(b"".join(value.numpy().tobytes() for value in model.state_dict().values())).hexdigest()
        result = {"digest": digest, "cfg": {k: v for k, v in model.pretrained_cfg.items() if isinstance(v, (str, int))}}
    except Exception as error:
        result = {"error": type(error).__name__, "message": str(error)}
    results[key] = result
print(json.dumps(results))
"""


def digest(state: dict) -> str:
    return hashlib.sha256(b"".join(value.numpy().tobytes() for value in state.values())).hexdigest()


def in_cache(cache_dir: Path, repository: str, files: dict[str, bytes]) -> None:
    """Files as the hub's client keeps them."""
    folder = cache_dir / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    (folder / "snapshots" / COMMIT).mkdir(parents=True)
    for name, content in files.items():
        (folder / "snapshots" / COMMIT / name).write_bytes(content)


def pickled(value, path: Path) -> bytes:
    torch.save(value, path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def hub(state, tmp_path_factory):
    """What came of many calls, by key, and what each asked of the hub; `stderr` is that of all."""
    tmp_path = tmp_path_factory.mktemp("hub")
    weights = save(state)
    config = {"architecture": NAME, "num_classes": 1000, "pretrained_cfg": {"tag": "mine"}, "model_args": {}}
    config = json.dumps(config).encode()
    pickle_file = pickled(state, tmp_path / "weights.pth")
    answers = {
        f"/timm/{TAGGED}/resolve/main/model.safetensors": hub_file(weights),
        f"/timm/{TAGGED}/resolve/main/pytorch_model.bin": hub_file(b"not wanted"),
        "/me/config/resolve/main/config.json": hub_file(config),
        "/me/config/resolve/main/model.safetensors": hub_file(weights),
        "/me/versions/resolve/v2/config.json": hub_file(config),
        "/me/versions/resolve/v2/model.safetensors": hub_file(weights),
        "/me/versions/resolve/v3/config.json": hub_error(404, "RevisionNotFound"),
        "/me/pickle/resolve/main/pytorch_model.bin": hub_file(pickle_file),
        "/me/code/resolve/main/pytorch_model.bin": hub_file(pickled(types.SimpleNamespace(), tmp_path / "code.pth")),
        "/me/named/resolve/main/other.safetensors": hub_file(weights),
        "/me/gone/resolve/main/model.safetensors": hub_error(404, "RepoNotFound"),
        "/me/gated/resolve/main/model.safetensors": hub_error(403, "GatedRepo"),
        "/me/html/resolve/main/model.safetensors": Answer(b"<p>Log in to this network", headers={"ETag": '"1"'}),
        "/me/cut/resolve/main/model.safetensors": hub_file(weights[:5000]),
        "/me/other/resolve/main/model.safetensors": hub_file(weights, etag="0" * 64),
        "/me/down/resolve/main/model.safetensors": Answer(requests=0),
        "/me/down_later/resolve/main/model.safetensors": hub_file(weights, requests=3),
        "/me/ill/resolve/main/model.safetensors": Answer(status=503),
        "/me/new/resolve/main/model.safetensors": hub_file(weights),
    }
    other = bbfast.create_model(NAME)
    in_cache(tmp_path / "cached", "me/down", {"pytorch_model.bin": pickle_file})
    in_cache(tmp_path / "cached", "me/new", {"model.safetensors": save(other.state_dict())})
    (tmp_path / "cached" / "models--me--new" / "refs" / "main").write_text(COMMIT[::-1])
    (tmp_path / "cached" / "models--me--new" / "snapshots" / COMMIT).rename(
        tmp_path / "cached" / "models--me--new" / "snapshots" / COMMIT[::-1]
    )

    def call(name=NAME, cache="cache", **overlay):
        arguments = {"pretrained": True, "cache_dir": str(tmp_path / cache)}
        return name, {**arguments, "pretrained_cfg_overlay": overlay} if overlay else arguments

    repositories = ("pickle", "code", "gone", "gated", "html", "cut", "other", "down", "ill", "new", "empty")
    calls = {
        "first": call(),
        "again": call(),
        "hf-hub": call("hf-hub:me/config"),
        "alias": call("HF_hub:me/config"),
        "no weights": ("hf-hub:me/config", {"cache_dir": str(tmp_path / "config"), "num_classes": 3}),
        "revision": call("hf-hub:me/versions@v2"),
        "no revision": call("hf-hub:me/versions@v3"),
        "named": call(hf_hub_id="me/named", hf_hub_filename="other.safetensors"),
        "up": call(hf_hub_id="me/down_later"),
        "down, cached": call(hf_hub_id="me/down_later"),
        "down, cached pickle": call(cache="cached", hf_hub_id="me/down"),
        **{repository: call(hf_hub_id=f"me/{repository}") for repository in repositories},
        "newer": call(cache="cached", hf_hub_id="me/new"),
    }
    with serve(answers) as server:
        session = subprocess.run(
            [sys.executable, "-c", _SESSION],
            input=json.dumps(calls),
            env={
                **os.environ,
                "HF_ENDPOINT": server.url,
                "HF_HOME": str(tmp_path / "home"),
                "HF_HUB_OFFLINE": "0",
                "TQDM_POSITION": "-1",  # a bar though this is no terminal
            },
            capture_output=True,
            text=True,
        )
    assert session.returncode == 0, session.stderr
    return types.SimpleNamespace(
        results=json.loads(session.stdout), stderr=session.stderr, requests=server.requests, folder=tmp_path
    )


@pytest.mark.parametrize(
    "key",
    ["first", "again", "hf-hub", "alias", "revision", "named", "pickle", "up", "down, cached", "down, cached pickle"],
)
def test_weights_of_the_hub(hub, state, key):
    assert hub.results[key].get("digest") == digest(state), hub.results[key]


def test_newer_weights_replace_cached_ones(hub, state):
    assert hub.results["newer"]["digest"] == digest(state)


def test_the_hub_is_asked_once_for_what_is_cached(hub):
    path = f"/timm/{TAGGED}/resolve/main/model.safetensors"
    assert [request for request in hub.requests if path in request][-2:] == [f"GET {path}", f"HEAD {path}"]


def test_a_bar_shows_the_download(hub):
    assert "model.safetensors: 100%" in hub.stderr


def test_config_of_the_hub(hub):
    cfg = hub.results["hf-hub"]["cfg"]
    assert cfg["hf_hub_id"] == "me/config" and cfg["source"] == "hf-hub"
    assert cfg["tag"] == "mine" and cfg["architecture"] == NAME
    assert hub.results["revision"]["cfg"]["hf_hub_id"] == "me/versions@v2"
    assert not list((hub.folder / "config").rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("key", "error", "message"),
    [
        ("gone", "RuntimeError", "there is no repository me/gone on the Hugging Face hub, or it is private"),
        ("gated", "RuntimeError", "gives model.safetensors of me/gated only to those who accepted its terms"),
        ("no revision", "RuntimeError", "has no such revision: me/versions@v3"),
        (
            "empty",
            "RuntimeError",
            "me/empty on the Hugging Face hub has no file model.safetensors or pytorch_model.bin",
        ),
        ("html", "RuntimeError", "could not be fetched from the Hugging Face hub"),
        ("other", "RuntimeError", "what arrived has the SHA-256"),
        ("down", "RuntimeError", "model.safetensors of me/down is not in the cache, and could not be fetched"),
        ("ill", "RuntimeError", "503"),
        ("cut", "ValueError", "cannot be read as a checkpoint"),
        ("code", "ValueError", "holds more than tensors and plain containers"),
    ],
)
def test_what_the_hub_does_not_give(hub, key, error, message):
    result = hub.results[key]
    assert result.get("error") == error, result
    assert message in result["message"]
    assert "\n" not in result["message"]


@pytest.mark.parametrize(("repository", "calls"), [("down", 2), ("ill", 1)])
def test_a_hub_out_of_reach_is_asked_once(hub, repository, calls):
    """Its client alone asks seven times and waits 23 seconds in between."""
    asked = [request for request in hub.requests if f"/me/{repository}/" in request]
    assert asked == [f"HEAD /me/{repository}/resolve/main/model.safetensors"] * calls


def test_damaged_downloads_are_not_kept(hub):
    assert not list((hub.folder / "cache" / "models--me--other").rglob("model.safetensors"))
    assert "use checkpoint_path= for a file, or pretrained=False" in hub.results["other"]["message"]
    assert "; delete it, and it is fetched anew" in hub.results["cut"]["message"]


def test_offline(state, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    in_cache(tmp_path, f"timm/{TAGGED}", {"model.safetensors": save(state)})
    assert_equal(bbfast.create_model(NAME, pretrained=True, cache_dir=tmp_path).state_dict(), state)
    with pytest.raises(RuntimeError, match=r"is not in the cache, and HF_HUB_OFFLINE forbids .*checkpoint_path="):
        bbfast.create_model("mobilenetv3_small_075", pretrained=True, cache_dir=tmp_path)
    with pytest.raises(RuntimeError, match=r"^config.json of me/any is not in the cache, and HF_HUB_OFFLINE forbids"):
        bbfast.create_model("hf-hub:me/any", cache_dir=tmp_path)


def test_no_hub_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(RuntimeError, match="needs the package huggingface_hub"):
        bbfast.create_model(NAME, pretrained=True)


# ---- configs ---------------------------------------------------------------------------------------------


def test_config_as_a_dict():
    fields = {"hf_hub_id": "me/x", "url": "http://x/y.pth", "num_classes": 3, "mean": (0.1, 0.2, 0.3), "notes": ("a",)}
    ours, theirs = PretrainedCfg(**fields), timm.models.PretrainedCfg(**fields)
    for arguments in ({}, {"remove_null": False}, {"remove_source": True}):
        assert (
            ours.to_dict(**arguments)
            == {
                key: value
                for key, value in theirs.to_dict(**arguments).items()
                if key != "state_dict" or value is not None
            }
            or arguments.get("remove_null") is False
        )
    assert ours.to_dict(remove_null=False) == theirs.to_dict(remove_null=False)
    assert list(ours.to_dict(remove_null=False)) == list(theirs.to_dict(remove_null=False))


def test_configs_do_not_change():
    cfg = models.get_pretrained_cfg(TAGGED)
    with pytest.raises(AttributeError):
        cfg.num_classes = 3
    other = cfg.replace(num_classes=3, input_size=[1, 2, 3])
    assert (other.num_classes, other.input_size, other.name) == (3, (1, 2, 3), TAGGED)
    assert cfg.num_classes == 1000 and cfg == models.get_pretrained_cfg(NAME)
    with pytest.raises(TypeError, match="has no field 'num_clases'; did you mean num_classes"):
        cfg.replace(num_clases=3)
    assert hash(cfg) == hash(models.get_pretrained_cfg(NAME))


def test_default_cfgs():
    with_weights, without = {"hf_hub_id": "me/"}, {}
    for cfgs in (
        {"a.x": without, "a.y": with_weights, "a.z": with_weights},
        {"a.x": with_weights, "a.y*": with_weights, "a.z": without},
        {"a.x": with_weights, "a": with_weights, "b.x": without, "b.y": without},
        {"a": without, "a.y": with_weights},
    ):
        ours, theirs = models.generate_default_cfgs(cfgs), timm.models.generate_default_cfgs(cfgs)
        assert list(ours) == list(theirs)
        for name, expected in theirs.items():
            assert ours[name].tags[0] == expected.tags[0] and set(ours[name].tags) == set(expected.tags)
            assert ours[name].is_pretrained == expected.is_pretrained
            assert ours[name].default_with_tag == (ours[name].tags[0], ours[name].default)
    assert ours["a"].replace(tags=("",)).tags == ("",)
    with pytest.raises(TypeError, match=r"the cfg of a.x has no field 'hub'"):
        models.generate_default_cfgs({"a.x": {"hub": 3}})


def test_defaults_of_a_module_are_found(monkeypatch):
    monkeypatch.setattr(_registry, "_models", dict(_registry._models))
    module = types.ModuleType("own_module")
    module.default_cfgs = models.generate_default_cfgs({"own_net.a": {"hf_hub_id": "timm/"}, "own_net.b*": {}})
    monkeypatch.setitem(sys.modules, "own_module", module)

    def own_net(pretrained=False, pretrained_cfg=None):
        return torch.nn.Linear(1, pretrained_cfg.num_classes)

    own_net.__module__ = "own_module"
    models.register_model(own_net)
    assert models.get_pretrained_cfg("own_net").tag == "b"
    assert models.get_pretrained_cfg("own_net.a").hf_hub_id == "timm/own_net.a"
    assert "own_module" in bbfast.list_modules()
