"""The extension bbfast._C: its CPU kernel against float64, its argument checks, and its CUDA sources."""

from __future__ import annotations

import random
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_within_rule

from bbfast import extension
from bbfast.reference.activation import ACTIVATIONS, activation

CSRC = Path(__file__).parent.parent / "csrc"


@pytest.fixture(scope="module")
def module():
    loaded = extension.load()
    if loaded is None:
        pytest.skip(extension.unavailable_reason())
    return loaded


# ---- depthwise_conv_bn_act -------------------------------------------------------------------------------


EPS = 1e-3
NO_BN = (None,) * 4


def make_parameters(channels: int, kernel: tuple[int, int]):
    """weight, bias, bn_weight, bn_bias, running_mean, running_var"""
    vectors = [torch.randn(channels) for _ in range(4)]
    return torch.randn(channels, 1, *kernel), *vectors, torch.rand(channels) + 0.1


def reference(x, weight, bias, bn_weight, bn_bias, mean, var, stride, padding, dilation, act):
    top, bottom, left, right = padding
    y = F.conv2d(F.pad(x, (left, right, top, bottom)), weight, bias, stride, 0, dilation, x.shape[1])
    if mean is not None:
        y = F.batch_norm(y, mean, var, bn_weight, bn_bias, False, 0.0, EPS)
    y = activation(y, act)
    return y, y.mean((2, 3))


def run(module, x, parameters, stride, padding, dilation, act, squeeze):
    return module.depthwise_conv_bn_act(x, *parameters, stride, padding, dilation, EPS, act, squeeze)


def check(module, x, parameters, stride=(1, 1), padding=(0, 0, 0, 0), dilation=(1, 1), act="relu"):
    """Compares y and the squeeze means with float64, by the tolerance rule."""
    geometry = (stride, padding, dilation, act)
    y, squeezed = run(module, x, parameters, *geometry, True)
    exact = reference(*(None if t is None else t.double() for t in (x, *parameters)), *geometry)
    torch_same_dtype = reference(x, *parameters, *geometry)
    assert_within_rule("y", y, exact[0], torch_same_dtype[0])
    assert_within_rule("squeezed", squeezed, exact[1], torch_same_dtype[1])
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert not y.requires_grad
    without, nothing = run(module, x, parameters, *geometry, False)
    assert torch.equal(without, y)
    assert nothing.numel() == 0


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("channels", [1, 3, 8, 17, 64])
def test_every_act_and_channel_tail(module, act, channels):
    x = torch.randn(2, channels, 9, 13).to(memory_format=torch.channels_last)
    check(module, x, make_parameters(channels, (3, 3)), padding=(1, 1, 1, 1), act=act)


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (5, 5), (7, 7), (9, 9), (3, 5), (2, 4)])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (3, 1)])
@pytest.mark.parametrize("dilation", [(1, 1), (2, 3)])
def test_every_geometry(module, kernel, stride, dilation):
    padding = tuple(random.randint(0, 6) for _ in range(4))
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilation)]
    height = max(random.randint(1, 17), spans[0] - sum(padding[:2]))
    width = max(random.randint(1, 17), spans[1] - sum(padding[2:]))
    x = torch.randn(2, 24, height, width).to(memory_format=torch.channels_last)
    check(module, x, make_parameters(24, kernel), stride, padding, dilation, "hardswish")


@pytest.mark.parametrize("batch", [1, 3, 70])
@pytest.mark.parametrize("width", range(1, 14))
def test_every_tile_width(module, batch, width):
    x = torch.randn(batch, 16, 5, width).to(memory_format=torch.channels_last)
    check(module, x, make_parameters(16, (3, 3)), padding=(1, 1, 1, 1), act="silu")


def test_several_chunks_of_channels(module):
    x = torch.randn(1, 1000, 6, 7).to(memory_format=torch.channels_last)
    check(module, x, make_parameters(1000, (5, 5)), padding=(2, 2, 2, 2), act="gelu")


def test_sliced_input_and_strided_parameters(module):
    x = torch.randn(3, 40, 15, 12).to(memory_format=torch.channels_last)[1:, 3:38, 1::2, 2:-1]
    weight, *vectors = make_parameters(35, (3, 3))
    strided = (
        weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1),  # stored as the kernel reads it
        *[torch.stack([vector, vector], 1)[:, 0] for vector in vectors],
    )
    check(module, x, strided, stride=(2, 1), padding=(0, 1, 2, 1))


def test_one_channel_of_an_nchw_map(module):
    weight, *vectors = make_parameters(1, (3, 3))
    no_vectors = [None] * len(vectors)  # they could make all that there is of one channel cancel
    check(module, torch.randn(2, 3, 9, 9)[:, 1:2], (weight, *no_vectors), padding=(1, 1, 1, 1))


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("act", ["relu6", "hardswish"])
def test_sizes_of_models(module, kernel, stride, act):
    """Interior and border tiles, rows cut off above and below, channels that fill no vector."""
    for size in (7, 14, 30):
        x = torch.randn(2, 44, size, size + 1).to(memory_format=torch.channels_last)
        check(module, x, make_parameters(44, (kernel, kernel)), (stride,) * 2, (kernel // 2,) * 4, act=act)


@pytest.mark.parametrize("absent", [(1,), (2,), (3,), (2, 3), (1, 2, 3, 4, 5), (2, 3, 4, 5)])
def test_absent_vectors(module, absent):
    x = torch.randn(2, 12, 6, 6).to(memory_format=torch.channels_last)
    parameters = make_parameters(12, (3, 3))
    check(module, x, tuple(None if i in absent else p for i, p in enumerate(parameters)), padding=(1, 1, 1, 1))


def test_batch_norm_of_other_dtypes(module):
    x = torch.randn(2, 12, 6, 6).to(memory_format=torch.channels_last)
    weight, *vectors = make_parameters(12, (3, 3))
    half = [vector.to(torch.float16) for vector in vectors]
    geometry = ((1, 1), (1, 1, 1, 1), (1, 1), "relu", False)
    y, _ = run(module, x, (weight, *[vector.double() for vector in half]), *geometry)
    assert torch.equal(y, run(module, x, (weight, *half), *geometry)[0])
    assert torch.equal(y, run(module, x, (weight, *[vector.float() for vector in half]), *geometry)[0])


def test_large_values_of_exponential_activations(module):
    x = torch.cat([torch.linspace(-12, 12, 5000), torch.tensor([-1e4, -200.0, -88.5, 88.5, 200.0, 1e4])])
    x = x.reshape(1, 1, 1, -1).expand(1, 8, 1, -1).contiguous(memory_format=torch.channels_last)
    parameters = (torch.ones(8, 1, 1, 1), None, *NO_BN)
    for act in ("silu", "gelu"):
        y, _ = run(module, x, parameters, (1, 1), (0,) * 4, (1, 1), act, False)
        assert_within_rule(act, y[..., :5000], activation(x.double(), act)[..., :5000], activation(x, act)[..., :5000])
        torch.testing.assert_close(y[..., 5000:], activation(x, act)[..., 5000:])


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_nan_passes_through(module, act):
    x = torch.randn(1, 11, 4, 4).to(memory_format=torch.channels_last)
    x[:, :, 2, 2] = float("nan")
    parameters = (torch.ones(11, 1, 1, 1), torch.ones(11), *NO_BN)
    y, squeezed = run(module, x, parameters, (1, 1), (0,) * 4, (1, 1), act, True)
    assert torch.equal(y.isnan(), x.isnan())
    assert squeezed.isnan().all()


def test_empty_batch(module):
    x = torch.randn(0, 8, 6, 6).to(memory_format=torch.channels_last)
    y, squeezed = run(module, x, make_parameters(8, (3, 3)), (2, 2), (1, 1, 1, 1), (1, 1), "relu", True)
    assert y.shape == (0, 8, 3, 3)
    assert squeezed.shape == (0, 8)


def test_result_does_not_depend_on_threads(module):
    x = torch.randn(2, 48, 33, 29).to(memory_format=torch.channels_last)
    parameters = make_parameters(48, (5, 5))
    before = torch.get_num_threads()
    outputs = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outputs.append(run(module, x, parameters, (1, 1), (2, 2, 2, 2), (1, 1), "silu", True))
    finally:
        torch.set_num_threads(before)
    for y, squeezed in outputs[1:]:
        assert torch.equal(y, outputs[0][0])
        assert torch.equal(squeezed, outputs[0][1])


BAD_ARGUMENTS = {
    "x must have 4 dimensions": {"x": torch.zeros(8, 6, 6)},
    "x must be float32": {"x": torch.zeros(1, 8, 6, 6, dtype=torch.float64)},
    "x must be channels_last": {"x": torch.zeros(1, 8, 6, 6)},
    "x must be on the CPU": {"x": torch.zeros(1, 8, 6, 6, device="meta")},
    "x has no channels": {"x": torch.zeros(1, 0, 6, 6)},
    "weight must have shape": {"weight": torch.zeros(16, 1, 3, 3)},
    "weight must be float32": {"weight": torch.zeros(8, 1, 3, 3, dtype=torch.int32)},
    "weight spans 9 pixels along H": {"weight": torch.zeros(8, 1, 9, 3)},
    "bias must have shape": {"bias": torch.zeros(1)},
    "bn_weight must be of a floating-point dtype": {"bn_weight": torch.zeros(8, dtype=torch.int32)},
    "bn_bias must be on the CPU": {"bn_bias": torch.zeros(8, device="meta")},
    "running_mean and running_var must both": {"running_var": None},
    "bn_weight and bn_bias need running_mean": {"running_mean": None, "running_var": None},
    "stride holds 0": {"stride": (1, 0)},
    "padding holds -1": {"padding": (0, 0, -1, 0)},
    "dilation holds 0": {"dilation": (0, 1)},
    "act='tanh' is not known": {"act": "tanh"},
}


@pytest.mark.parametrize("message", BAD_ARGUMENTS)
def test_bad_arguments_are_named(module, message):
    arguments = {
        "x": torch.zeros(1, 8, 6, 6).to(memory_format=torch.channels_last),
        "weight": torch.zeros(8, 1, 3, 3),
        **dict.fromkeys(("bias", "bn_weight", "bn_bias", "running_mean", "running_var"), torch.zeros(8)),
        "stride": (1, 1),
        "padding": (0, 0, 0, 0),
        "dilation": (1, 1),
        "eps": 1e-5,
        "act": "relu",
        "squeeze": False,
    }
    with pytest.raises(ValueError, match=message):
        module.depthwise_conv_bn_act(**{**arguments, **BAD_ARGUMENTS[message]})


def test_a_build_of_older_sources_is_named(monkeypatch):
    from types import SimpleNamespace

    older = SimpleNamespace(build_info=lambda: {"torch": torch.__version__})
    monkeypatch.setattr(extension.importlib, "import_module", lambda name: older)
    monkeypatch.setattr(extension.importlib.util, "find_spec", lambda name: name)
    with pytest.raises(extension.BrokenExtensionError, match="older sources, without call_key; rebuild"):
        extension.load.__wrapped__()


# ---- what the build was made of --------------------------------------------------------------------------


def test_build_info(module):
    info = module.build_info()
    assert info["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert info["openmp"] is True
    assert info["cpu_instruction_set"] in ("avx512", "avx2", "baseline")
    assert info["cuda_reason"]
    assert info["cuda"] == bool(info["cuda_archs"]) == (info["cuda_version"] is not None)


def test_device_info_tells_devices_or_a_reason(module):
    devices, reason = module.device_info()
    if module.build_info()["cuda"] and torch.cuda.is_available():
        assert reason is None
        assert [device["name"] for device in devices] == [
            torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())
        ]
        for index, device in enumerate(devices):
            assert device["compute_capability"] == torch.cuda.get_device_capability(index)
            assert device["multiprocessors"] > 0
            assert device["l2_bytes"] > 0
            assert device["shared_memory_per_block_bytes"] >= 48 * 1024
    else:
        assert devices == []
        assert isinstance(reason, str)
        assert reason


@pytest.mark.parametrize("source", sorted(path.name for path in CSRC.glob("*.cu")))
def test_cuda_sources_compile(source, tmp_path):
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH")
    archs = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in (80, 90, 100)]
    strict = ["-Werror=all-warnings", "-Xptxas=-warn-spills,-warn-lmem-usage,-Werror"]
    command = ["nvcc", "-std=c++17", "-O3", *strict, *archs, "--threads=2", "-c", str(CSRC / source)]
    result = subprocess.run([*command, "-o", str(tmp_path / "out.o")], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out.o").stat().st_size > 0


def test_no_two_sources_share_an_object_file():
    stems = [path.stem for path in CSRC.iterdir() if path.suffix in (".cpp", ".cu")]
    assert len(stems) == len(set(stems)), sorted(stems)
