"""Kernels compiled for real GPUs, as their launchers would launch them: no spills, wide accesses, small halos.

Runs `python -m bbfast.benchmarks.kernels --check` in a process of its own, where Triton compiles, not interprets.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def _check(tmp_path, sets, archs, cases=("",)):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    output = tmp_path / "kernels.json"
    command = [sys.executable, "-m", "bbfast.benchmarks.kernels", "--check", "--json", output]
    command += ["--set", *sets, "--arch", *map(str, archs), "--case", *cases]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(output.read_text())["reports"]


def _check_mobilenetv3(reports, archs):
    forwards = [report for report in reports if report["kernel"] == "forward_kernel"]
    assert {report["arch"] for report in forwards} == set(archs) and len(forwards) == 12 * len(archs)
    for report in forwards:
        # On Hopper half a vector per thread was measured to be quicker, in smaller tiles with more halo.
        bits = "64" if report["arch"] == 90 else "128"
        assert report["vector_bytes"] * 8 == int(bits), report
        assert any(opcode.startswith("LDG.E") and opcode.endswith(f".{bits}") for opcode in report["opcodes"]), report
        assert any(opcode.startswith("STG.E") and opcode.endswith(f".{bits}") for opcode in report["opcodes"]), report
        assert report["halo"] <= 1.15 or report["arch"] == 90, report


@pytest.mark.thorough
def test_mobilenetv3_layers(tmp_path):
    _check_mobilenetv3(_check(tmp_path, ["mobilenetv3"], [90]), [90])


@pytest.mark.slow
def test_kernels_of_models(tmp_path):
    """Neither spills nor narrow accesses in anything that the eight models launch."""
    reports = _check(tmp_path, ["models"], [80, 90, 100])
    runs = {run for report in reports for run in report["models"]}
    assert len(runs) == 16
    assert {report["arch"] for report in reports} == {80, 90, 100}


@pytest.mark.slow
def test_mobilenetv3_layers_on_other_architectures(tmp_path):
    _check_mobilenetv3(_check(tmp_path, ["mobilenetv3"], [80, 100]), [80, 100])


# Each kernel of a training step, in both layouts and, where there is a choice of dtype, once in each.
TRAINING = (
    *("training 672x14x14", "k7 s1 gelu bf16 NCHW", "frozen", "add_layer_norm 96x56x56"),
    *("batch_norm_act 256x56x56 bf16 NHWC", "batch_norm_act 256x56x56 fp32 NCHW"),
    *("drop_path_add 96x56x56 bf16 NHWC", "drop_path_add 96x56x56 fp32 NCHW"),
)


def _check_training(reports):
    names = {report["kernel"] for report in reports}
    assert {"statistics_kernel", "conv_grad_kernel", "input_grad_kernel", "weight_grad_kernel"} <= names

    # Rows of half precision move in 16 bytes; the statistics of a row and the partial sums are fp32.
    rows = [r for r in reports if r["kernel"].startswith("add_layer_norm")]
    assert {"add_layer_norm_forward_kernel", "add_layer_norm_backward_kernel"} == {r["kernel"] for r in rows}
    for report in rows:
        stores = {opcode for opcode in report["opcodes"] if opcode.startswith("STG")}
        assert "STG.E.128" in stores and stores <= {"STG.E.128", "STG.E"}, report
        assert any(opcode.startswith("LDG.E") and opcode.endswith(".128") for opcode in report["opcodes"]), report


@pytest.mark.thorough
def test_training_kernels(tmp_path):
    _check_training(_check(tmp_path, ["training"], [90], TRAINING))


def _check_attention(reports, shapes):
    """Tensor cores in every pass over scores, and a forward pass that the instruction issue does not hold up."""
    forwards = [report for report in reports if report["kernel"] == "window_attention_forward_kernel"]
    assert len(forwards) == shapes * len({report["arch"] for report in reports})
    for report in reports:
        if report["kernel"].startswith("window_attention"):
            wanted = {80: ("HMMA",), 90: ("HGMMA", "HMMA"), 100: ("UTCHMMA", "HMMA")}[report["arch"]]
            assert any(opcode.split(".")[0] in wanted for opcode in report["opcodes"]), report
    for report in forwards:
        if report["arch"] == 90:
            assert any(opcode.startswith("HGMMA") for opcode in report["opcodes"]), report
        # Where a program has one window, what it does before the first counts, too.
        one_window = report["case"].startswith(("attention 14x14", "attention 12x12"))
        assert report["per_output"] is None or report["per_output"] <= (45 if one_window else 30), report
        # 3C read and C written per token, besides the bias.
        assert report["traffic_bytes"] <= 1.05 * report["least_bytes"] + report["bias_bytes"], report


@pytest.mark.thorough
def test_window_attention_kernels(tmp_path):
    """Swin-T's shifted windows, its last stage, and the large windows of Swin-B."""
    texts = ("attention 56x56", "attention 7x7", "attention 96x96")
    _check_attention(_check(tmp_path, ["window_attention"], [90], texts), 3)


@pytest.mark.slow
def test_window_attention_kernels_of_all_shapes_and_architectures(tmp_path):
    _check_attention(_check(tmp_path, ["window_attention"], [80, 90, 100]), 6)


@pytest.mark.slow
def test_training_kernels_of_more_shapes(tmp_path):
    _check_training(_check(tmp_path, ["training"], [90]))


@pytest.mark.slow
def test_training_kernels_of_other_architectures(tmp_path):
    _check(tmp_path, ["training"], [80, 100])


@pytest.mark.slow
def test_sweep(tmp_path):
    _check(tmp_path, ["sweep"], [80, 90, 100])


@pytest.mark.slow
def test_window_attention_sweep(tmp_path):
    _check(tmp_path, ["window_attention_sweep"], [80, 90, 100])
