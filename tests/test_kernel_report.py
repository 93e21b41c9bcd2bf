"""The static kernel report without a compiler: reading SASS, counting work, whole models, and what fails a check."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from bbfast import ops
from bbfast.benchmarks import kernels, sass
from bbfast.benchmarks.kernel_launches import Argument, Launch
from bbfast.benchmarks.kernel_models import backward
from bbfast.benchmarks.kernel_tables import Report, total
from bbfast.benchmarks.kernel_work import Work, work_of
from bbfast.triton_kernels.channel_tile import Walk

ROOT = Path(__file__).parent.parent

# As nvdisasm prints it: a loop over tiles with a loop inside, a wait for a barrier, and padding after the end.
SASS = """
\t.section\t.text._walk_kernel,"ax",@progbits
\t.sectioninfo\t@"SHI_REGISTERS=24"
_walk_kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   IMAD.MOV.U32 R2, RZ, RZ, R1 ;
.L_x_1:
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/                   LDGSTS.E.BYPASS.128 [R8], desc[UR4][R2.64] ;
        /*0040*/              @!P0 LDG.E.U16 R9, desc[UR4][R2.64] ;
.L_x_2:
        /*0050*/                   IMAD.U32 R10, R4, 0x10000, RZ ;
        /*0060*/                   F2FP.BF16.F32.PACK_AB R4, R5, R4 ;
        /*0070*/                   MUFU.EX2 R11, R10 ;
        /*0080*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT ;
        /*0090*/              @!P1 BRA `(.L_x_2) ;
        /*00a0*/                   STG.E.64 desc[UR4][R2.64], R4 ;
        /*00b0*/               @P2 BRA `(.L_x_1) ;
.L_x_3:
        /*00c0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R3 ;
        /*00d0*/              @!P0 BRA `(.L_x_3) ;
        /*00e0*/                   FADD R4, R4, R5 ;
        /*00f0*/                   EXIT ;
.L_x_4:
        /*0100*/                   BRA `(.L_x_4);
        /*0110*/                   NOP;
"""
USAGE = """
Resource usage:
 Common:
  GLOBAL:0
 Function _walk_kernel:
  REG:24 STACK:8 SHARED:0 LOCAL:0 CONSTANT[0]:592 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


# ---- reading SASS ----------------------------------------------------------------------------------------


@pytest.fixture
def function(monkeypatch) -> sass.Function:
    monkeypatch.setattr(sass, "_tool", lambda name, *args: USAGE if name == "cuobjdump" else SASS)
    (found,) = sass.read_cubin("any.cubin")
    return found


def test_opcodes_and_loops(function):
    assert function.name == "_walk_kernel"
    assert function.registers == 24
    assert function.spill_bytes == 0  # a stack that nothing touches
    assert len(function.opcodes) == 16 and function.opcodes[-1] == "EXIT"
    outer, inner = function.nest
    assert (outer.first, outer.length) == (2, 10)
    assert (inner.first, inner.length) == (5, 5)
    assert function.outer_loops == [outer]  # the wait is none
    assert function.outside == 6


def test_a_stack_that_is_used_is_spilled(monkeypatch):
    spilling = SASS.replace("FADD R4, R4, R5", "STL.64 [R1], R4")
    monkeypatch.setattr(sass, "_tool", lambda name, *args: USAGE if name == "cuobjdump" else spilling)
    assert sass.read_cubin("any.cubin")[0].spill_bytes == 8


def test_instruction_mix(function):
    assert sass.mix(function.opcodes) == {
        "other": 6,  # constants, branches, the wait, the end
        "global loads": 3,
        "moves": 1,
        "integer": 1,
        "conversions": 1,
        "MUFU": 1,
        "tensor cores": 1,
        "global stores": 1,
        "floating point": 1,
    }


def test_widths(function):
    assert sass.global_accesses(function.opcodes) == {"load 16": 2, "load 2": 1, "store 8": 1}
    widths = {"LDG.E.U8.CONSTANT": 1, "STG.E": 4, "LDG.E.64.CONSTANT": 8, "LDG.E.ENL2.256": 32}
    assert {opcode: sass.access_bytes(opcode) for opcode in widths} == widths


# ---- work ------------------------------------------------------------------------------------------------


def _launch(tiles: int = 40, pixels: int = 640) -> Launch:
    """A walk over tiles of 64 channels x 16 positions, 8 elements a thread, one vector of bf16."""
    tensor = Argument((1, 64, pixels, 1), (64 * pixels, 1, 64, 64), torch.bfloat16)
    walk = Walk(channels_last=True, collapsed=True, wide=False, vec=8, block_c=64, block_p=16)
    values = {"x_ptr": tensor, "y_ptr": tensor, "tiles": tiles, "tiles_per_program": 4, "WALK": walk}
    return Launch("bbfast.triton_kernels.batch_norm_act", "_k", tiles // 4, tuple(values.items()), (("num_warps", 4),))


def _function(opcodes: str, loops=((2, 6),), **changes) -> sass.Function:
    values = {"name": "_k", "registers": 32, "spill_bytes": 0, **changes}
    return sass.Function(opcodes=tuple(opcodes.split()), loops=tuple(sass.Loop(*loop) for loop in loops), **values)


WIDE = "MOV MOV LDG.E.128 FADD FMUL STG.E.128 IADD3 BRA EXIT"


def test_work_of_a_walk():
    work = work_of(_launch(), _function(WIDE), 4, 90)
    assert work.outputs == 40 * 64 * 16
    assert work.traffic_bytes == 2 * 64 * 640 * 2
    # Ten programs of 128 threads issue three instructions once, and six in each of forty tiles.
    assert work.lane_instructions == 128 * (10 * 3 + 40 * 6)
    assert work.per_output == work.lane_instructions / work.outputs
    assert work.narrow == []


@pytest.mark.parametrize(
    "opcodes, message",
    [
        (WIDE.replace("LDG.E.128", "LDG.E.64"), "0 of 1 16-byte loads"),
        (WIDE.replace("STG.E.128", "STG.E.U16"), "0 of 1 16-byte stores"),
        (WIDE.replace("MOV MOV LDG.E.128", "MOV LDG.E.128 LDG.E"), "0 of 1 16-byte loads"),  # wide before the loop only
    ],
)
def test_narrow_accesses_are_named(opcodes, message):
    assert work_of(_launch(), _function(opcodes), 4, 90).narrow == [message]


def test_equal_code_is_one_use(monkeypatch):
    """What shares compiled code is one row, shown by the launch that moves most, and counted by model."""
    monkeypatch.setattr(Launch, "compilation", property(lambda launch: launch.values["tiles"] % 16 == 0))
    small, large, other = _launch(40, 640), _launch(56, 896), _launch(48, 768)
    assert small == _launch(40, 640) and small != large
    uses = kernels.model_uses({"a infer": [small, small, other], "b train": [large, small]}, [""])
    assert [(use.launch, use.launches, use.models) for use in uses] == [
        (large, 4, {"a infer": 2, "b train": 2}),
        (other, 1, {"a infer": 1}),
    ]
    assert uses[0].case == "1x64x896x1 bfloat16"
    assert [use.launch for use in kernels.model_uses({"a infer": [small], "b train": [other]}, ["b train"])] == [other]


# ---- reports and the check -------------------------------------------------------------------------------


def _report(opcodes: str = WIDE, **changes) -> Report:
    function = _function(opcodes, **changes)
    work = work_of(_launch(), function, 4, 90)
    return Report.of(
        case="made up",
        op="batch_norm_act",
        kernel="k",
        arch=90,
        tile="",
        num_warps=4,
        shared_bytes=0,
        function=function,
        work=work,
    )


BAD = {
    "16 bytes spilled": _report(spill_bytes=16),
    "narrow accesses: 0 of 1 16-byte loads": _report(WIDE.replace("LDG.E.128", "LDG.E.64")),
}


def test_floors_and_what_binds():
    report = _report()
    assert report.occupancy == 1.0
    assert report.memory_us == pytest.approx(2 * 64 * 640 * 2 / 3.0e6)
    assert report.issue_us == pytest.approx(128 * 270 / (132 * 128 * 1.75e9) * 1e6)
    assert report.binds == "memory"
    slow = Report.of(
        case="", op="", kernel="", arch=90, tile="", num_warps=4, shared_bytes=0, function=_function(WIDE),
        work=Work(traffic_bytes=3000, lane_instructions=29568e4),
    )  # fmt: skip
    assert slow.binds == "issue"
    assert total("a infer", 90, [report, slow]) == {
        "run": "a infer",
        "arch": 90,
        "launches": 2,
        "memory_us": pytest.approx(report.memory_us + 0.001),
        "issue_bound_launches": 1,
        "issue_above_memory_us": pytest.approx(10 - 0.001),
        "unknown_issue_launches": 0,
    }


@pytest.mark.parametrize("message", BAD)
def test_check_fails(message, monkeypatch, capsys, tmp_path):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    rows = [_report(), BAD[message]]
    monkeypatch.setattr(kernels, "case_reports", lambda *args: rows)
    command = ["--set", "mobilenetv3", "--arch", "90", "--json", str(tmp_path / "out.json")]
    assert kernels.main(command) == 0  # only --check turns problems into a failure
    assert kernels.main([*command, "--check"]) == 1
    output = capsys.readouterr()
    assert f"made up, k, sm_90: {message}" in output.err
    assert "2 kernels compiled: 2 bound by memory" in output.out and "1 problems" in output.out
    rows.pop()
    assert kernels.main([*command, "--check"]) == 0


def test_check_does_not_compile_in_the_interpreter(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit):
        kernels.main(["--set", "mobilenetv3"])
    assert "unset it" in capsys.readouterr().err


# ---- whole models ----------------------------------------------------------------------------------------


def test_backward_gives_the_gradients_of_the_engine(monkeypatch):
    """Through a custom Function, broadcasting, a cast, a value used twice, and outputs that nobody uses."""
    monkeypatch.setenv("BBFAST_BACKEND", "torch")
    conv, linear = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)
    bias = torch.randn(8, 1, 1, requires_grad=True)
    x = conv(torch.randn(2, 3, 9, 9)) + bias
    z = ops.batch_norm_act(x, torch.rand(8, requires_grad=True), None, None, None, training=True, act="silu")
    halves, _ = (x * z).split([5, 2], dim=2)
    loss = linear(halves.bfloat16().float().mean((2, 3))).square().sum()

    leaves = backward(loss)
    assert {id(leaf) for leaf in leaves} >= {id(p) for p in (*conv.parameters(), *linear.parameters(), bias)}
    exact = torch.autograd.grad(loss, list(leaves))
    for grad, wanted in zip(leaves.values(), exact):
        assert grad.dtype == wanted.dtype
        torch.testing.assert_close(grad, wanted)


RECORD = """
from collections import Counter
from bbfast.benchmarks.kernel_models import model_launches
for mode in ("infer", "train"):
    launches = model_launches("mobilenetv3_large_100", mode, 90)
    names = Counter(launch.name for launch in launches)
    # In inference all BatchNorms but the stem's go with a convolution.
    norms, products = (31, 0) if mode == "train" else (1, 30)
    assert names["_forward_kernel"] == 15 and names["_batch_norm_act_forward_kernel"] == norms, names
    assert names["_pointwise_kernel"] == products, names
    assert names["_weight_grad_kernel"] == names["_statistics_kernel"] == (15 if mode == "train" else 0), names
    assert all(launch.values["WALK"].channels_last for launch in launches if "WALK" in launch.values)
    large = [launch.values["x_ptr"] for launch in launches if launch.name == "_forward_kernel"]
    assert large[0].shape == (128, 16, 112, 112) and {str(x.dtype) for x in large} == {"torch.bfloat16"}, large
"""


@pytest.mark.thorough
def test_launches_of_a_model():
    """In a process of its own, where Triton's kernels are not those of its interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", RECORD], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]


@pytest.mark.thorough
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
def test_cuda_kernels():
    """Both copies for each width of vectors and of indices, in accesses as wide as their vectors."""
    reports = kernels.cuda_reports(90, [""])
    assert len({report.kernel for report in reports}) == 20
    for report in reports:
        assert kernels.problems(report) == []
        assert {int(name.split()[1]) for name in report.accesses} == {report.vector_bytes}
    widest = next(report for report in reports if report.kernel == "window_partition, 16 bytes, int32")
    assert widest.binds == "memory" and 60 <= widest.per_output <= 200
