"""Traffic planned without a GPU: the counting against sums made by hand, and figures of models that must not grow.

What is counted runs in processes of its own, where Triton compiles, not interprets, and where torch may remember a GPU
that does not exist. Of the small cases it is this file, run as a program.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parent.parent
# What compile(bbfast) takes at batch 128 in bf16, by mode and model, and how far it may grow: other versions of torch
# fuse a little differently.
LIMITS = json.loads((Path(__file__).parent / "traffic_limits.json").read_text())
MARGIN = 1.02

# The small cases: 8 maps of 64 channels at 14 x 14 in bf16.
VALUES = 8 * 64 * 14 * 14
MAP = 2 * VALUES
VECTOR = 2 * 64


# ---- what is counted, in a process of its own ------------------------------------------------------------


def half(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="cuda")


def new_map() -> torch.Tensor:
    """[8, 64, 14, 14] in channels_last."""
    return half(8, 14, 14, 64).permute(0, 3, 1, 2)


def wide_map() -> torch.Tensor:
    """[8, 128, 14, 14] in channels_last."""
    return half(8, 14, 14, 128).permute(0, 3, 1, 2)


def vectors(count: int, channels: int = 64) -> list[torch.Tensor]:
    return [half(channels) for _ in range(count)]


def small_cases() -> dict:
    from bbfast import ops

    x, weight, depthwise = new_map(), half(128, 64, 1, 1), half(64, 1, 3, 3)
    qkv, table = half(8, 14, 14, 3 * 64), half(13 * 13, 2)
    return {
        "add": lambda: x + new_map(),
        "in place": lambda: new_map().mul_(2).copy_(x),
        "convolution": lambda: F.conv2d(x, weight),
        "convolution with bias": lambda: F.conv2d(x, weight, half(128)),
        "depthwise convolution": lambda: F.conv2d(x, depthwise, padding=1, groups=64),
        "grouped convolution": lambda: F.conv2d(x, half(64, 4, 3, 3), padding=1, groups=16),
        "linear and views": lambda: F.linear(half(8, 196, 64), half(128, 64)).transpose(1, 2).reshape(-1),
        "expanded": lambda: half(1, 14, 14, 64).expand(8, -1, -1, -1) + 1,
        "roll": lambda: half(8, 14, 14, 64).roll((1, 1), (1, 2)),
        "batch norm": lambda: F.batch_norm(x, *vectors(4)),
        "depthwise_conv_bn_act": lambda: ops.depthwise_conv_bn_act(x, depthwise, *vectors(4), padding=1),
        "squeeze": lambda: ops.depthwise_conv_bn_act(x, depthwise, *vectors(4), padding=1, squeeze=True),
        "batch_norm_act": lambda: ops.batch_norm_act(x, *vectors(4), residual=new_map()),
        "batch_norm_act in training": lambda: ops.batch_norm_act(x, *vectors(4), training=True),
        "conv_bn_act": lambda: ops.conv_bn_act(x, weight, *vectors(4, 128)),
        "gate and residual": lambda: ops.conv_bn_act(x, weight, *[None] * 4, residual=wide_map(), gate=half(8, 64)),
        "linear_act": lambda: ops.linear_act(
            half(8, 196, 64), half(128, 64), half(128), layer_scale=half(128), residual=half(8, 196, 128)
        ),
        "mlp": lambda: ops.mlp(
            half(8, 196, 64), half(256, 64), half(256), half(64, 256), None, norm_eps=1e-5, residual=half(8, 196, 64)
        ),
        "drop_path_add": lambda: ops.drop_path_add(x, new_map(), layer_scale=half(64)),
        "add_layer_norm": lambda: ops.add_layer_norm(half(8, 196, 64), half(8, 196, 64), *vectors(2)),
        "window_attention": lambda: ops.window_attention(qkv, table, num_heads=2, window_size=7, shift_size=3),
        "window_partition": lambda: ops.window_partition(half(8, 14, 14, 64), 7),
    }


class Block(torch.nn.Module):
    """Two dense convolutions whose norms are added, a depthwise one, and a sum with layer scale."""

    def __init__(self):
        super().__init__()
        self.main, self.shortcut = (torch.nn.Conv2d(64, 64, 3, padding=1, bias=False) for _ in range(2))
        self.main_norm, self.shortcut_norm, self.norm = (torch.nn.BatchNorm2d(64) for _ in range(3))
        self.depthwise = torch.nn.Conv2d(64, 64, 3, padding=1, groups=64, bias=False)
        self.layer_scale = torch.nn.Parameter(torch.ones(64))

    def forward(self, x):
        from bbfast import nn, ops

        shortcut = nn.apply_conv_bn_act(self.shortcut, self.shortcut_norm, x, act="identity")
        y = nn.apply_conv_bn_act(self.main, self.main_norm, x, act="relu", residual=shortcut)
        branch = nn.apply_depthwise_conv_bn_act(self.depthwise, self.norm, y, act="relu")
        return F.relu(ops.drop_path_add(x, branch, layer_scale=self.layer_scale))


class Trained(torch.nn.Module):
    """A convolution with a bias, a depthwise one with its norm, and a sum that leaves samples out."""

    def __init__(self):
        super().__init__()
        self.dense = torch.nn.Conv2d(64, 64, 3, padding=1)
        self.depthwise = torch.nn.Conv2d(64, 64, 3, padding=1, groups=64, bias=False)
        self.norm = torch.nn.BatchNorm2d(64)

    def forward(self, x):
        from bbfast import nn

        branch = nn.apply_depthwise_conv_bn_act(self.depthwise, self.norm, self.dense(x), act="relu")
        keep = x.new_empty(len(x), 1, 1, 1).bernoulli_(0.5)
        return x + branch * keep


def count() -> dict:
    from bbfast.benchmarks.eager_kernels import EagerKernels
    from bbfast.benchmarks.fake_h100 import fake_h100, to_fake_h100
    from bbfast.benchmarks.inductor_plan import InductorPlan

    def replaced():
        return torch.cuda.device_count, torch.cuda.device, torch._C._select_conv_backend, F.scaled_dot_product_attention

    real = replaced()
    block = Block().eval().bfloat16().to(memory_format=torch.channels_last)
    trained = Trained().train().bfloat16().to(memory_format=torch.channels_last)
    found = {}
    with fake_h100(), torch.no_grad():
        for name, run in small_cases().items():
            with EagerKernels() as counted:
                run()
            found[name] = counted.kernels
        to_fake_h100(block)
        planned = InductorPlan()
        torch.compile(block, backend=planned, fullgraph=True)(new_map())
        found["compiled block"] = planned.kernels
    with fake_h100():
        to_fake_h100(trained)
        planned = InductorPlan()
        torch.compile(trained, backend=planned, fullgraph=True)(new_map().requires_grad_())
        found["trained block"] = planned.kernels
    assert replaced() == real
    return {name: [[k.name, k.bytes, k.flops, k.on_tensor_cores] for k in kernels] for name, kernels in found.items()}


def run_python(*arguments) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


# ---- the counting ----------------------------------------------------------------------------------------

POINTWISE = (MAP + 2 * 64 * 128 + 2 * MAP, 2 * 2 * VALUES * 64)  # 64 to 128 channels
PACKED = 4 * (9 + 4) * 128  # fp32 taps, scale, shift, centre and deviation of 64 channels, padded to 128
PACK = 2 * 9 * 64 + 4 * VECTOR + PACKED
PARTS = 4 * 4 * 8 * 64  # fp32 sums of the four tiles of an image of 14 rows
BIAS = 4 * 2 * 64 * 64  # fp32 [heads, tokens, tokens], padded to 64

# Per case the kernels' (bytes, FLOPs).
EXPECTED = {
    "add": [(3 * MAP, 0)],
    "in place": [(2 * MAP, 0), (2 * MAP, 0)],
    "convolution": [POINTWISE],
    "convolution with bias": [POINTWISE, (2 * 2 * MAP + 2 * VECTOR, 0)],
    "depthwise convolution": [(2 * MAP + 2 * 64 * 9, 2 * VALUES * 9)],
    "grouped convolution": [(2 * MAP + 2 * 64 * 4 * 9, 2 * VALUES * 9 * 16)],  # 4 channels fill 16
    "linear and views": [POINTWISE, (4 * MAP, 0)],
    "expanded": [(MAP // 8 + MAP, 0)],
    "roll": [(2 * MAP, 0), (2 * MAP, 0)],
    "batch norm": [(2 * MAP + 4 * VECTOR + 2 * 4 * 64, 0)],  # leaves mean and deviation
    "depthwise_conv_bn_act": [(PACK, 0), (2 * MAP + PACKED, 2 * VALUES * 9)],
    "squeeze": [(PACK, 0), (2 * MAP + PACKED + PARTS, 2 * VALUES * 9), (PARTS + 2 * 8 * 64, 0)],
    "batch_norm_act": [(3 * MAP + 4 * VECTOR, 0)],
    "conv_bn_act": [(POINTWISE[0] + 4 * 2 * VECTOR, POINTWISE[1])],
    "gate and residual": [(POINTWISE[0] + 2 * 8 * 64 + 2 * MAP, POINTWISE[1])],
    "linear_act": [(POINTWISE[0] + 2 * 2 * VECTOR + 2 * MAP, POINTWISE[1])],
    "mlp": [(3 * MAP + 2 * (2 * 256 * 64 + 256), 4 * 8 * 196 * 64 * 256)],
    "drop_path_add": [(3 * MAP + VECTOR, 0)],
    "add_layer_norm": [(4 * MAP + 2 * VECTOR, 0)],
    # 32 windows, 2 heads of 32 channels, 49 tokens, 2 products.
    "window_attention": [(2 * 169 * 2 + BIAS, 0), (4 * MAP + BIAS, 2 * 2 * 32 * 2 * 49 * 49 * 32)],
    "window_partition": [(2 * MAP, 0)],
}


@pytest.fixture(scope="module")
def counted() -> dict:
    return json.loads(run_python(__file__))


@pytest.mark.parametrize("case", EXPECTED)
def test_bytes_and_flops_are_those_made_by_hand(counted, case):
    found = [(moved, flops) for _, moved, flops, _ in counted[case]]
    assert found == EXPECTED[case], counted[case]


def test_depthwise_convolutions_run_on_cuda_cores(counted):
    for case, found in counted.items():
        for name, _, flops, on_tensor_cores in found:
            is_depthwise = "depthwise" in name and flops > 0
            assert on_tensor_cores == (not is_depthwise), (case, name)


def test_statistics_of_a_batch_are_a_pass_of_their_own(counted):
    """Two reads and a write of the map; what the programs leave for each other is little."""
    statistics, finish, normalise = counted["batch_norm_act in training"]
    assert "statistics" in statistics[0] and "finalize" in finish[0] and "forward" in normalise[0]
    partials = statistics[1] - MAP
    assert 0 < partials < MAP and partials % (4 * 4 * 64) == 0  # fp32 count, mean, M2 and rounding of each channel
    assert finish[1] == partials + 2 * 4 * 64 + 2 * VECTOR  # writes mean and deviation, moves the running statistics
    assert normalise[1] == 2 * MAP + 2 * VECTOR + 2 * 4 * 64


def test_inductor_fuses_around_our_ops(counted):
    """Both norms and the sum are one kernel, so are layer scale, sum and activation; our op counts as it launches."""
    found = counted["compiled block"]
    assert len(found) == 6, found
    shortcut, main, sum_of_both, pack, depthwise, last = found
    for name, moved, flops, _ in (shortcut, main):
        assert (name, moved, flops) == ("convolution", 2 * MAP + 2 * 9 * 64 * 64, 2 * VALUES * 9 * 64)
    assert sum_of_both[0].startswith("fused") and sum_of_both[1] == 3 * MAP + 8 * VECTOR
    assert (pack[1], depthwise[1]) == (PACK, 2 * MAP + PACKED)
    assert last[0].startswith("fused") and last[1] == 3 * MAP + VECTOR


def test_training_is_planned_with_its_backward(counted):
    """As for a GPU: random numbers and a bias's gradient are fused, and each other gradient of a convolution counts."""
    found = counted["trained block"]
    convolution = 2 * MAP + 2 * 9 * 64 * 64
    work = 2 * VALUES * 9 * 64
    dense = [(moved, flops) for name, moved, flops, _ in found if name.startswith("convolution")]
    assert dense == [(convolution, work)] * 3  # forward, gradient of the input, of the weight
    ours = [name for name, *_ in found if name.startswith("bbfast")]
    assert [sum(part in name for name in ours) for part in ("_train: ", "_backward: ")] == [5, 7], ours
    others = [name for name, *_ in found if not name.startswith(("bbfast", "convolution"))]
    assert {name for name in others if not name.startswith("fused")} == {"inductor_seeds"}, others
    for wanted in ("inductor_random", "sum"):
        assert any(name.startswith("fused") and wanted in name for name in others), (wanted, others)


# ---- models ----------------------------------------------------------------------------------------------


@pytest.mark.thorough
@pytest.mark.parametrize(("mode", "model"), [(mode, model) for mode in LIMITS for model in LIMITS[mode]])
def test_traffic_of_models_does_not_grow(mode, model, tmp_path):
    """Where it shrank, lower the limit: what is gained should stay."""
    output = tmp_path / "traffic.json"
    command = ("--mode", mode, "--model", model, "--provider", "bbfast+compile", "--json", output)
    table = run_python("-m", "bbfast.benchmarks.traffic", *command)
    (found,) = json.loads(output.read_text())["results"]
    assert model in table and str(found["kernels"]) in table
    limits = LIMITS[mode][model]
    for name in ("kernels", "bytes", "floor_ms"):
        assert found[name] <= MARGIN * limits[name], (name, found[name])
        assert found[name] >= limits[name] / MARGIN**2, f"{name} fell to {found[name]}: lower its limit"
    assert sum(kernel["times"] for kernel in found["list"]) == found["kernels"]


def test_arguments_that_cannot_be_used():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "bbfast.benchmarks.traffic"]
    for arguments, environ, message in (
        (["--batch", "0"], {**environment, "TRITON_INTERPRET": "0"}, "--batch 0 is not allowed"),
        ([], environment, "TRITON_INTERPRET=1 replaces the kernels"),
        (
            ["--mode", "train", "--provider", "eager", "bbfast"],
            {**environment, "TRITON_INTERPRET": "0"},
            "--provider eager bbfast: in --mode train only compiled providers can be planned",
        ),
    ):
        run = subprocess.run([*command, *arguments], cwd=ROOT, env=environ, capture_output=True, text=True)
        assert run.returncode == 2 and message in run.stderr


if __name__ == "__main__":
    print(json.dumps(count()))
