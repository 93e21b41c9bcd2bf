"""`bbfast tune` on a real GPU: what it finds is right, is written, and is taken by later launches."""

from __future__ import annotations

import pytest
import torch

import bbfast
from bbfast.cli import main

pytest.importorskip("triton")

from bbfast.commands import _tuning
from bbfast.triton_kernels import depthwise_conv_bn_act, tuned

pytestmark = pytest.mark.gpu


@pytest.fixture
def fresh_choices():
    def forget():
        for tunable in tuned.tunables().values():
            tunable.forget()

    forget()
    yield
    forget()


def test_a_search_measures_and_later_launches_take_what_it_found(tmp_path, monkeypatch, fresh_choices):
    x = torch.randn(32, 96, 28, 28, device="cuda", dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    weight = torch.randn(96, 1, 3, 3, device="cuda", dtype=torch.bfloat16)

    def run():
        return bbfast.ops.depthwise_conv_bn_act(x, weight, None, None, None, None, padding=1)

    expected = run()
    tunable = depthwise_conv_bn_act.TUNABLE
    with _tuning.recorded_calls() as calls:
        run()
    ((name, key),) = calls[0].places
    _, used = calls[0].run(calls[0].fresh_arguments(), {})
    near = tunable.neighbours(key, used[name, key])[:3]
    monkeypatch.setattr(tunable, "_neighbours", lambda *_: near)
    result = _tuning.search(tunable, key, calls[0], {}, _tuning.gpu_ms)
    print(result)
    assert 0 < result.ms <= result.heuristic_ms < 10 and result.tried == len(near)
    assert len(result.dropped) < len(near)

    monkeypatch.setenv("BBFAST_TUNED_DIR", str(tmp_path))
    gpu = torch.cuda.get_device_name()
    tuned.write(tmp_path / tuned.file_name(name, gpu), gpu, {}, [tuned.Entry(key, near[0], 1.0, 2.0)])
    tunable.forget()
    torch.testing.assert_close(run(), expected)
    assert list(tunable._choices.values()) == [near[0]]


def test_the_command(tmp_path, monkeypatch, fresh_choices, capsys):
    for tunable in tuned.tunables().values():
        neighbours = tunable._neighbours
        monkeypatch.setattr(tunable, "_neighbours", lambda *args, known=neighbours: list(known(*args))[:1])
    command = ["tune", "mobilenetv3_small_050", "--batch", "8", "--kernels", "depthwise_conv_bn_act"]
    assert main([*command, "--output", str(tmp_path)]) == 0
    assert "launches became quicker" in capsys.readouterr().out
    (path,) = tmp_path.iterdir()
    entries = tuned.read(path, depthwise_conv_bn_act.TUNABLE, torch.cuda.get_device_name())
    assert len(entries) > 3 and all(entry.key.batch == 8 and entry.key.element_bytes == 2 for entry in entries)
    assert main([*command, "--output", str(tmp_path)]) == 0
    assert "nothing to do" in capsys.readouterr().out
