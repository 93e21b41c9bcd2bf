"""`bbfast bench`: what is measured, what is refused as wrong, and what a user sees."""

from __future__ import annotations

import csv
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from PIL import Image
from torch import nn

import bbfast
import bbfast.benchmarks
from bbfast.benchmarks import harness, judge, model_files, models
from bbfast.benchmarks.harness import Provider, Runner, Settings
from bbfast.benchmarks.judge import Judge, WrongAnswerError
from bbfast.cli import main

SMALL = "mobilenetv3_small_050"
pytestmark = pytest.mark.filterwarnings("ignore::bbfast.dispatch.FallbackWarning")
X = torch.linspace(-1, 2, 12).reshape(4, 3)


@pytest.fixture(autouse=True)
def plain_and_single(monkeypatch):
    """Whole models in Triton's interpreter would take minutes; threads wait for one another on busy cores."""
    monkeypatch.setenv("BBFAST_BACKEND", "onednn")
    monkeypatch.setenv("COLUMNS", "140")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def provider(name: str, call=lambda x: 2 * x, **runner) -> Provider:
    return Provider(name, lambda: Runner(call, lambda y: {"y": y}, **runner))


def measure(*providers, dtype="fp32", rounds=3, **kwargs) -> list[harness.Row]:
    settings = kwargs.pop("settings", Settings(rounds=rounds))
    return harness.measure(providers, [X], dtype, settings=settings, **kwargs)


def case(mode="infer", batch=2, size=32, dtype="fp32", model=SMALL) -> models.Case:
    return models.Case(model, mode, batch, size, dtype)


def measure_case(case: models.Case, providers: list[str], rounds: int = 1) -> dict[str, dict]:
    result = models.measure_case(case, providers, torch.device("cpu"), Settings(rounds=rounds), lambda *args: None)
    return {row["provider"]: row for row in result["rows"]}


# ---- harness ---------------------------------------------------------------------------------------------


def test_providers_take_turns_and_each_measurement_follows_a_call_that_is_not_measured():
    calls = []

    def recording(name):
        return provider(name, lambda x: calls.append(name) or 2 * x)

    rows = measure(recording("eager"), recording("b"), recording("c"), rounds=3)
    prepared = [name for name in ("eager", "b", "c") for _ in range(harness.WARM_UP_CALLS)]
    turns = ["eager", "eager", "b", "b", "c", "c"] * 3
    assert calls == [*prepared, *turns, "eager", "b", "c"]  # equal warm-up, equal rounds, and a last check
    assert [row.rounds for row in rows] == [3, 3, 3]
    assert [row.failure for row in rows] == [None] * 3


def test_only_the_second_call_of_a_turn_is_measured(monkeypatch):
    now = iter(range(1000))
    monkeypatch.setattr(harness.time, "perf_counter", lambda: next(now))
    sizes = []
    contender = harness._Contender(provider("eager", lambda x: sizes.append(next(now))), [X])
    contender.runner = contender.build()
    assert contender.sample_ms() == 2000.0  # clock, call, clock; the call before moved it too
    assert len(sizes) == 2


def test_quantiles_rates_and_speedups(monkeypatch):
    times = {"eager": iter([30.0, 10.0, 20.0, 50.0, 40.0, 60.0]), "b": iter([5.0, 5.0, 5.0, 5.0, 5.0, 4.0])}
    monkeypatch.setattr(harness._Contender, "sample_ms", lambda self: next(times[self.name]))
    eager, b = measure(provider("eager"), provider("b"), rounds=6)
    assert (eager.p20_ms, eager.p50_ms, eager.p80_ms, eager.min_ms) == (20.0, 35.0, 50.0, 10.0)
    assert (b.p50_ms, b.min_ms) == (5.0, 4.0)
    assert eager.images_per_s == pytest.approx(4 / 0.035)
    assert (eager.speedup, b.speedup) == (1.0, 7.0)
    assert eager.peak_mib is None


def test_seconds_per_provider_decide_how_many_rounds(monkeypatch):
    assert [row.rounds for row in measure(provider("eager"), settings=Settings(seconds=1e-9))] == [harness.MIN_ROUNDS]
    clock = [0.0]
    monkeypatch.setattr(harness.time, "perf_counter", lambda: clock[0])

    def slow(x):
        clock[0] += 0.5
        return 2 * x

    progress = []
    settings = Settings(seconds=10)
    on_progress = lambda what, done, total: progress.append((what, done, total))  # noqa: E731
    rows = measure(provider("eager", slow), provider("b", slow), settings=settings, on_progress=on_progress)
    assert [row.rounds for row in rows] == [10, 10]  # four calls of half a second a round, 20 seconds for two
    assert [row.p50_ms for row in rows] == [500.0, 500.0]
    assert [name for name, *_ in progress[1:3]] == ["preparing eager", "preparing b"]
    assert progress[-1] == ("measuring, seconds", 20, 20)


def test_a_wrong_answer_is_no_result():
    eager, close, wrong, nan, absent, reshaped = measure(
        provider("eager"),
        provider("close", lambda x: 2 * x + 0.9e-3 * 4),
        provider("wrong", lambda x: 2 * x + 1.1e-3 * 4),
        provider("nan", lambda x: (2 * x).where(x < 2, math.nan)),
        Provider("absent", lambda: Runner(lambda x: 2 * x, lambda y: {"z": y})),
        provider("reshaped", lambda x: 2 * x[:2]),
    )
    assert eager.max_error == 0 and eager.failure is None
    assert close.failure is None and close.max_error == pytest.approx(0.9e-3, rel=1e-3)
    assert wrong.failure == "WrongAnswerError: y: error 0.0044, allowed 0.004"
    assert nan.failure == "WrongAnswerError: y: not finite"
    assert absent.failure == "WrongAnswerError: gives z, the baseline y"
    assert reshaped.failure == "WrongAnswerError: y: shape (2, 3), the baseline's is (4, 3)"
    for row in (wrong, nan, absent, reshaped):
        assert row.p50_ms is row.images_per_s is row.speedup is row.max_error is None


def test_an_answer_that_goes_wrong_while_it_is_measured_is_no_result():
    calls = []

    def late(x):
        calls.append(x)
        return 2 * x + (len(calls) > harness.WARM_UP_CALLS)

    rows = measure(provider("eager"), provider("late", late))
    assert rows[0].failure is None
    assert rows[1].failure == "WrongAnswerError: y: error 1, allowed 0.004"


def test_a_provider_that_raises_does_not_end_the_run():
    def no_build():
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    calls = []

    def third_round(x):
        calls.append(x)
        if len(calls) == harness.WARM_UP_CALLS + 2 * 2 + 1:
            raise KeyError("gone")
        return 2 * x

    rows = measure(
        provider("eager"), Provider("full", no_build), provider("late", third_round), provider("b"), rounds=4
    )
    assert [row.failure for row in rows] == [None, "OutOfMemoryError: CUDA out of memory.", "KeyError: 'gone'", None]
    assert [row.rounds for row in rows] == [4, 0, 0, 4]
    assert len(calls) == harness.WARM_UP_CALLS + 2 * 2 + 1


def test_an_interruption_is_not_a_failure():
    def stop(x):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(provider("eager"), provider("b", stop))


def test_nothing_is_judged_without_a_baseline():
    rows = measure(provider("eager", lambda x: x / 0), provider("b"))
    assert rows[0].failure == "WrongAnswerError: y: not finite"
    assert rows[1].failure == "WrongAnswerError: not judged, because eager failed"

    def no_reference():
        raise torch.OutOfMemoryError("CUDA out of memory.")

    rows = measure(provider("eager"), provider("b"), dtype="bf16", reference=no_reference)
    failure = "there is no float32 result to compare with: OutOfMemoryError: CUDA out of memory."
    assert [row.failure for row in rows] == [failure] * 2


def test_random_numbers_start_anew_for_each_comparison():
    def drop(x):
        return 2 * x * torch.rand(4, 1)

    rows = measure(provider("eager", drop), provider("b", drop), provider("other", lambda x: 2 * x * torch.rand(4)[:1]))
    assert [row.failure is None for row in rows] == [True, True, False]


def test_notes_are_asked_after_the_first_call():
    calls = []
    row = measure(provider("eager", lambda x: calls.append(1) or 2 * x, notes=lambda: [f"{len(calls)} calls"]))[0]
    assert row.notes == ["1 calls"]


def test_a_cpu_needs_no_copies_of_the_input():
    assert harness.copies(X)[0] is X and len(harness.copies(X)) == 1


def test_inputs_are_taken_in_turns():
    seen = []
    inputs = [torch.full((2, 2), float(number)) for number in (1, 2, 3)]
    rows = harness.measure(
        [provider("eager", lambda x: seen.append(x[0, 0].item()) or x)], inputs, "fp32", settings=Settings(rounds=2)
    )
    assert rows[0].failure is None
    assert seen == [1, 1, 2, 3, 1, 2, 3, 1]  # checked on the first, warmed up, measured, checked on the first


def test_long_messages_are_cut():
    assert harness.one_line(ValueError("\n\n  first\nsecond")) == "ValueError: first"
    assert harness.one_line(ValueError()) == "ValueError"
    assert len(harness.one_line(ValueError("x" * 1000))) == 300


# ---- judge -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, eps", [("bf16", 2**-7), ("fp16", 2**-10)])
def test_half_types_may_err_twice_as_far_as_eager_and_four_eps(dtype, eps):
    exact = torch.tensor([8.0, -1.0])
    allowed = 2 * 0.25 + 4 * eps * 8
    decide = Judge(dtype, False, {"y": exact})
    assert decide({"y": exact + torch.tensor([0.0, 0.25])}) == 0  # eager
    assert decide({"y": exact + torch.tensor([0.0, 0.99 * allowed])}) == pytest.approx((0.99 * allowed - 0.25) / 8)
    with pytest.raises(WrongAnswerError, match=r"y: error 0\.\d+, allowed 0\.\d+"):
        decide({"y": exact + torch.tensor([0.0, 1.01 * allowed])})


def test_eager_far_from_float32_is_no_baseline():
    exact = {"y": torch.tensor([1.0, 2.0])}
    with pytest.raises(WrongAnswerError, match="y: too far from float32 to judge others by"):
        Judge("bf16", False, exact)({"y": torch.tensor([1.0, -0.1])})
    with pytest.raises(WrongAnswerError, match="y: not finite"):
        Judge("bf16", False, {"y": torch.tensor([math.inf])})


def test_tf32_widens_what_is_allowed_on_a_gpu(monkeypatch):
    tolerances = []
    for on_gpu, products, convolutions in (
        (False, True, True),
        (True, False, False),
        (True, True, False),
        (True, False, True),
    ):
        monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(allow_tf32=products))
        monkeypatch.setattr(torch.backends, "cudnn", SimpleNamespace(allow_tf32=convolutions))
        tolerances.append(Judge("fp32", on_gpu, None).tolerance_fp32)
    assert tolerances == [1e-3, 1e-3, 2e-2, 2e-2]


def test_zeros_are_equal():
    decide = Judge("fp32", False, None)
    assert decide({"y": torch.zeros(2)}) == 0 and decide({"y": torch.zeros(2)}) == 0
    with pytest.raises(WrongAnswerError):
        decide({"y": torch.full((2,), 1e-9)})


# ---- models ----------------------------------------------------------------------------------------------


def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name)


@pytest.mark.parametrize(
    "name, convolutional",
    [("resnet18", True), (SMALL, True), ("convnext_atto", True), ("swin_tiny_patch4_window7_224", False)],
)
def test_networks_of_convolutions_are_channels_last(name, convolutional):
    assert models.is_convolutional(on_meta(name)) is convolutional


def test_memory_format_is_told_and_that_of_model_and_images(monkeypatch):
    seen = []
    inference = models.inference

    def spy(model, run, case):
        conv = next(module for module in model.modules() if isinstance(module, nn.Conv2d))

        def look(x):
            seen.append([t.is_contiguous(memory_format=torch.channels_last) for t in (x, conv.weight)])
            return run(x)

        return inference(model, look, case)

    monkeypatch.setattr(models, "inference", spy)
    result = models.measure_case(case(), ["eager"], torch.device("cpu"), Settings(rounds=1), lambda *args: None)
    assert result["memory_format"] == "channels_last" and seen[0] == [True, True]


def test_providers_that_a_model_cannot_have():
    every = list(models.PROVIDERS)
    assert list(models.left_out("swin_tiny_patch4_window7_224", every)) == []
    assert list(models.left_out("resnet18", every)) == ["eager+sdpa", "compile+sdpa"]
    assert list(models.left_out("vit_tiny_patch16_224", every)) == [
        "eager+sdpa",  # which timm's eager model takes already
        "compile+sdpa",
        "bbfast",
        "bbfast+compile",
    ]


@pytest.mark.parametrize(
    "mode, dtype, weights, autocast",
    [
        ("infer", "fp32", torch.float32, False),
        ("infer", "bf16", torch.bfloat16, False),
        ("infer", "fp16", torch.float32, True),
        ("train", "fp32", torch.float32, False),
        ("train", "bf16", torch.float32, True),
        ("train", "fp16", torch.float32, True),
    ],
)
def test_precision(mode, dtype, weights, autocast):
    asked = case(mode, dtype=dtype)
    assert asked.weights_dtype == weights
    with asked.autocast(torch.device("cpu")):
        assert torch.is_autocast_enabled("cpu") is autocast
        assert not autocast or torch.get_autocast_dtype("cpu") == judge.DTYPES[dtype]


def test_cuda_graphs_are_for_small_batches_of_inference_on_a_gpu():
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    limit = models.GRAPHS_UP_TO_BATCH
    assert models.wants_graphs(case(batch=limit), "auto", gpu)
    assert not models.wants_graphs(case(batch=limit + 1), "auto", gpu)
    assert models.wants_graphs(case(batch=limit + 1), "always", gpu)
    assert not models.wants_graphs(case(batch=1), "never", gpu)
    assert not models.wants_graphs(case("train", batch=1), "always", gpu)
    assert not models.wants_graphs(case(batch=1), "always", cpu)


def test_recipes():
    """Each name is what it says."""
    for name, recipe in models.PROVIDERS.items():
        assert recipe.ours == name.startswith("bbfast")
        assert recipe.swapped == name.startswith("swapped")
        assert recipe.sdpa == ("sdpa" in name)
        assert (recipe.compiled is not None) == ("compile" in name)
        assert recipe.compiled in (None, "default", *models.WITH_GRAPHS)
        assert recipe.compiled in (None, "default") or name.endswith(recipe.compiled)


def test_sdpa_swaps_and_classes_are_really_used(monkeypatch):
    made = []
    runner = models.inference
    monkeypatch.setattr(models, "inference", lambda model, run, case: made.append(model) or runner(model, run, case))
    swin = case(model="swin_tiny_patch4_window7_224", size=64)
    state = models._create(timm, swin).state_dict()
    family = models._Family(swin, torch.device("cpu"), state, False)
    for name in ("eager", "eager+sdpa", "bbfast", "swapped"):
        family.build(models.PROVIDERS[name])
    eager, sdpa, ours, swapped = made
    assert [model.layers[0].blocks[0].attn.fused_attn for model in (eager, sdpa)] == [False, True]
    assert type(ours).__module__.startswith("bbfast.models")
    assert type(swapped.layers[0].blocks[0]).__module__.startswith("bbfast.swap")
    assert all(torch.equal(made[0].head.fc.weight, model.head.fc.weight) for model in made)
    assert not any(model.training for model in made)


def test_training_is_a_whole_step_that_leaves_the_weights_alone():
    family = models._Family(case("train"), torch.device("cpu"), models._create(timm, case()).state_dict(), True)
    runner = family.build(models.PROVIDERS["eager"])
    step = runner.call.__closure__
    optimizer = next(cell.cell_contents for cell in step if isinstance(cell.cell_contents, torch.optim.Optimizer))
    weights = [weight.detach().clone() for weight in optimizer.param_groups[0]["params"]]
    logits, norms = runner.values(runner.call(torch.randn(2, 3, 32, 32))).values()
    assert logits.shape == (2, 1000)
    assert len(norms) == sum(weight.ndim > 1 for weight in weights)
    assert (norms > -20).all()  # each has a gradient
    for before, weight in zip(weights, optimizer.param_groups[0]["params"], strict=True):
        assert torch.equal(before, weight) and "momentum_buffer" in optimizer.state[weight]


def test_nothing_is_dropped():
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=32, drop_rate=0.5, drop_path_rate=0.5).train()
    x = torch.randn(2, 3, 32, 32)
    assert not torch.equal(model(x), model(x))
    models.never_drop(model)
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize(
    "mode, dtype", [("infer", "bf16"), ("infer", "fp16"), ("train", "fp32"), ("train", "bf16"), ("train", "fp16")]
)
def test_modes_and_dtypes(mode, dtype):
    rows = measure_case(case(mode, dtype=dtype), ["eager", "bbfast", "swapped"])
    assert [row["failure"] for row in rows.values()] == [None] * 3
    assert rows["eager"]["max_error"] == 0
    assert all(row["p50_ms"] > 0 for row in rows.values())


@pytest.mark.parametrize("mode", ["infer", "train"])
def test_a_model_that_lost_an_activation_is_found_out(mode, monkeypatch):
    create = bbfast.create_model

    def broken(*args, **kwargs):
        model = create(*args, **kwargs)
        block = model.blocks[3][0]
        assert block.bn2.act == "hardswish"
        block.bn2.act = "identity"
        return model

    monkeypatch.setattr(bbfast, "create_model", broken)
    monkeypatch.setenv("BBFAST_BACKEND", "torch")
    rows = measure_case(case(mode), ["eager", "bbfast", "swapped"])
    assert rows["bbfast"]["failure"].startswith("WrongAnswerError: ")
    assert rows["eager"]["failure"] is None and rows["swapped"]["failure"] is None


def test_ops_without_a_kernel_are_told(monkeypatch):
    monkeypatch.setenv("BBFAST_BACKEND", "torch")
    rows = measure_case(case(), ["eager", "bbfast", "swapped"])
    assert rows["eager"]["notes"] == []
    assert "conv_bn_act ran in plain torch: BBFAST_BACKEND=torch" in rows["bbfast"]["notes"]
    assert rows["swapped"]["notes"][0].endswith("blocks swapped")
    monkeypatch.setenv("BBFAST_BACKEND", "onednn")
    assert not any("plain torch" in note for note in measure_case(case(), ["eager", "bbfast"])["bbfast"]["notes"])


def test_a_model_without_a_fast_block_has_no_swapped_row():
    rows = measure_case(case(model="vit_tiny_patch16_224"), ["eager", "swapped"])
    assert rows["eager"]["failure"] is None
    assert rows["swapped"]["failure"].startswith("ValueError: no block has a fast class")


def test_settings_of_torch_stay():
    def settings():
        return (
            torch.backends.cuda.matmul.allow_tf32,
            torch.backends.cudnn.allow_tf32,
            torch.backends.cudnn.benchmark,
            torch.get_num_threads(),
        )

    before = settings()
    measure_case(case(), ["eager"])
    assert settings() == before


# ---- files -----------------------------------------------------------------------------------------------


def result(providers: int = 3, **changes) -> dict:
    rows = [
        vars(harness.Row(name, 1.0, 2.0, 3.0, 0.5, 1234.5, None, 1.5, 1e-3, 9, ["a note", "another"]))
        for name in list(models.PROVIDERS)[:providers]
    ]
    return {
        "model": "resnet50",
        "mode": "infer",
        "batch": 1,
        "image_size": 224,
        "dtype": "fp32",
        "rows": rows,
        **changes,
    }


def test_json_is_replaced_in_one_move(tmp_path, monkeypatch):
    path = tmp_path / "models.json"
    model_files.write_json(path, {"results": [1]})
    replace, seen = Path.replace, []

    def spy(self, target):
        seen.append((json.loads(Path(target).read_text()), json.loads(self.read_text())))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", spy)
    model_files.write_json(path, {"results": [1, 2]})
    assert seen == [({"results": [1]}, {"results": [1, 2]})]
    assert json.loads(path.read_text()) == {"results": [1, 2]}
    assert list(tmp_path.iterdir()) == [path]


def test_csv_has_a_line_per_provider_and_case(tmp_path):
    model_files.write_csv(tmp_path / "m.csv", [result(), result(batch=32)])
    with open(tmp_path / "m.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["batch"], line["provider"]) for line in lines] == [
        (batch, name) for batch in ("1", "32") for name in list(models.PROVIDERS)[:3]
    ]
    assert lines[0]["p50_ms"] == "2.0" and lines[0]["notes"] == "a note; another" and lines[0]["peak_mib"] == ""


def test_picture_has_a_bar_per_row(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    figures = []
    figure_class = model_files.import_figure()
    monkeypatch.setattr(
        model_files, "import_figure", lambda: lambda **kwargs: figures.append(figure_class(**kwargs)) or figures[-1]
    )
    failed = result(2)
    failed["rows"][1] = vars(harness.Row("eager+sdpa", failure="out of memory"))
    results = [result(), failed, *(result(10, batch=batch) for batch in (1, 32, 128))]  # 5 + 5 + 11, 11 + 11 wide
    model_files.draw(tmp_path / "m.png", results, "a title")
    bars = [patch.get_height() for axes in figures[0].axes for patch in axes.patches]
    assert bars == [1.5] * 4 + [0] + [1.5] * 30
    texts = [text.get_text().strip() for axes in figures[0].axes for text in axes.texts]
    assert texts == ["1,234"] * 4 + ["failed"] + ["1,234"] * 30
    assert len(figures[0].axes) == 2  # lines of bars that can be read
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == list(models.PROVIDERS)
    with Image.open(tmp_path / "m.png") as picture:
        assert picture.width > 900 and picture.height > 900


# ---- the command -----------------------------------------------------------------------------------------

QUICK = ["bench", SMALL, "--device", "cpu", "--batch", "1", "--image-size", "32", "--rounds", "2"]


def test_command_end_to_end(tmp_path, capsys):
    paths = {name: tmp_path / "new folder" / f"m.{name}" for name in ("json", "csv", "png")}
    files = ["--json", str(paths["json"]), "--csv", str(paths["csv"]), "--plot", str(paths["png"])]
    assert main([*QUICK, "--image-size", "48", "--batch", "1,2", "--providers", "bbfast,swapped", *files]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""  # no progress bar where there is no terminal
    heading, facts = captured.out.splitlines()[:2]
    assert "on CPU" in heading and heading.endswith(": 2 cases")
    assert torch.__version__ in facts and timm.__version__ in facts
    assert "BBFAST_BACKEND=onednn" in captured.out
    assert f"{SMALL}, infer, batch 2, 48 x 48, fp32, channels_last" in captured.out

    written = json.loads(paths["json"].read_text())
    assert written["facts"]["device"] == "cpu" and written["facts"]["bbfast_backend"] == "onednn"
    assert [(entry["model"], entry["batch"]) for entry in written["results"]] == [(SMALL, 1), (SMALL, 2)]
    for entry in written["results"]:
        assert (entry["mode"], entry["image_size"], entry["dtype"]) == ("infer", 48, "fp32")
        assert [row["provider"] for row in entry["rows"]] == ["eager", "bbfast", "swapped"]
        for row in entry["rows"]:
            assert 0 < row["min_ms"] <= row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
            assert row["images_per_s"] == pytest.approx(1e3 * entry["batch"] / row["p50_ms"])
            assert row["speedup"] == pytest.approx(entry["rows"][0]["p50_ms"] / row["p50_ms"])
            assert row["peak_mib"] is row["failure"] is None and row["rounds"] == 2 and row["max_error"] < 1e-4
            line = next(
                line
                for line in captured.out.splitlines()
                if line.split()[:2] == [row["provider"], f"{row['images_per_s']:.1f}"]
            )
            assert line.split()[3] == f"{row['p50_ms']:.2f}"
            assert all(f"{row['provider']}: {note}" in captured.out for note in row["notes"])
    assert len(paths["csv"].read_text().splitlines()) == 1 + 6
    with Image.open(paths["png"]) as picture:
        assert picture.format == "PNG"
    assert sorted(path.name for path in paths["json"].parent.iterdir()) == ["m.csv", "m.json", "m.png"]


def test_defaults_on_a_cpu(monkeypatch):
    seen = []

    def record(case, providers, device, settings, on_progress):
        seen.append((case, providers, settings))
        return {"memory_format": "contiguous", "cuda_graphs": False, "rows": []}

    monkeypatch.setattr(models, "measure_case", record)
    assert main(["bench", SMALL, "efficientnet_b1", "--device", "cpu"]) == 0
    assert [asked for asked, *_ in seen] == [
        models.Case(SMALL, "infer", 8, 224, "fp32"),
        models.Case("efficientnet_b1", "infer", 8, timm.get_pretrained_cfg("efficientnet_b1").input_size[-1], "fp32"),
    ]
    assert seen[0][1] == ["eager", "compile", "bbfast", "bbfast+compile"]
    assert seen[0][2] == Settings(None, 5.0, False)

    seen.clear()
    options = ["--batch", "1,32", "--dtype", "bf16,fp16", "--mode", "infer,train", "--seconds", "0.5", "--threads", "1"]
    assert main(["bench", "resnet18", "--device", "cpu", "--providers", "compile", *options]) == 0
    assert {(asked.batch, asked.dtype, asked.mode) for asked, *_ in seen} == {
        (batch, dtype, mode) for batch in (1, 32) for dtype in ("bf16", "fp16") for mode in ("infer", "train")
    }
    assert seen[0][1:] == (["eager", "compile"], Settings(None, 0.5, False))


def test_threads_are_those_asked_for(monkeypatch):
    seen = []
    monkeypatch.setattr(models, "measure_case", lambda *args: seen.append(torch.get_num_threads()) or args[99])
    with pytest.raises(IndexError):
        main([*QUICK, "--threads", "3"])
    assert seen == [3]


def test_a_failure_is_told_and_ends_with_1(tmp_path, capsys, monkeypatch):
    def no_swap(model):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    monkeypatch.setattr(bbfast, "swap", no_swap)
    assert main([*QUICK, "--providers", "bbfast,swapped", "--json", str(tmp_path / "m.json")]) == 1
    captured = capsys.readouterr()
    assert "swapped failed: OutOfMemoryError: CUDA out of memory." in captured.out
    assert ["swapped", "failed"] in [line.split() for line in captured.out.splitlines()]
    assert captured.err == "bbfast bench: 1 of the providers' rows failed, as told above\n"
    rows = json.loads((tmp_path / "m.json").read_text())["results"][0]["rows"]
    assert [row["failure"] is None for row in rows] == [True, True, False]
    assert rows[1]["p50_ms"] > 0


def test_numbers_stay_where_eager_fails_after_the_others_were_judged(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(models, "measure_case", lambda *args: {**result(2), "memory_format": "contiguous", **failed})
    rows = [harness.Row("eager", failure="gone"), harness.Row("bbfast", 1.0, 2.0, 3.0, 0.5, 1234.5, None, None, 1e-3)]
    failed = {"rows": [vars(row) for row in rows], "cuda_graphs": False}
    assert main([*QUICK, "--plot", str(tmp_path / "m.png")]) == 1
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["eager", "failed"] in lines
    assert ["bbfast", "1234.5", "1.00", "2.00", "3.00", "-", "-", "1.0e-03"] in lines


def test_a_run_cut_short_keeps_what_it_had(tmp_path, monkeypatch):
    real, path = models.measure_case, tmp_path / "m.json"

    def second_is_interrupted(case, *args):
        if case.batch == 2:
            raise KeyboardInterrupt
        return real(case, *args)

    monkeypatch.setattr(models, "measure_case", second_is_interrupted)
    assert main([*QUICK, "--batch", "1,2", "--providers", "bbfast", "--json", str(path)]) == 130
    assert [entry["batch"] for entry in json.loads(path.read_text())["results"]] == [1]


def test_a_model_of_timm_alone_runs_without_our_classes(capsys, monkeypatch):
    monkeypatch.setattr(models, "measure_case", lambda case, providers, *args: pytest.fail(f"{providers}"))
    with pytest.raises(pytest.fail.Exception, match=r"\['eager', 'compile'\]"):
        main(["bench", "vit_tiny_patch16_224", "--device", "cpu"])
    assert "left out: bbfast: bbfast has no vit_tiny_patch16_224 of its own" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--dtype", "fp32,fp8"], "--dtype: 'fp8' is not known; allowed: fp32, bf16, fp16"),
        (["--mode", "eval"], "--mode: 'eval' is not known; allowed: infer, train"),
        (["--providers", "jax"], f"--providers: 'jax' is not known; allowed: {', '.join(models.PROVIDERS)}"),
        (["--plot", "m.txt"], "--plot: m.txt has no suffix of a picture; known are"),
        (["--json", "/dev/null/m.json"], "--json: "),
        (["--csv", "/"], "--csv: / is a folder; a file's name is needed"),
    ],
)
def test_what_is_wrong_is_told_before_anything_runs(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(models, "measure_case", lambda *args: pytest.fail("it ran"))
    assert main([*QUICK, *arguments]) == 1
    assert error_line(capsys).startswith(f"bbfast bench: {message}")


def test_unknown_models_are_told_before_anything_runs(capsys, monkeypatch):
    monkeypatch.setattr(models, "measure_case", lambda *args: pytest.fail("it ran"))
    for name, hint in (("mobilenetv3_smal_050", "meant: mobilenetv3_small_050"), ("qqqq", "see `bbfast list`")):
        assert main(["bench", SMALL, name]) == 1
        assert error_line(capsys).startswith(f"bbfast bench: MODEL: timm has no {name!r}; {hint}")


def error_line(capsys) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1, captured.err
    return captured.err.strip()


@pytest.mark.parametrize("variable, value", [("BBFAST_BACKEND", "tritn"), ("BBFAST_STRICT", "yes")])
def test_wrong_variables_are_told_before_anything_runs(variable, value, capsys, monkeypatch):
    monkeypatch.setenv(variable, value)
    assert main(QUICK) == 1
    assert f"{variable}={value!r}" in error_line(capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_where_there_is_none(capsys):
    assert main(["bench", SMALL, "--device", "cuda"]) == 1
    assert "--device cuda" in error_line(capsys)


def test_without_timm(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.delitem(sys.modules, "bbfast.benchmarks.models")
    monkeypatch.delattr(bbfast.benchmarks, "models")
    assert main(QUICK) == 1
    assert error_line(capsys).endswith("pip install 'bbfast[timm]'")


def test_without_matplotlib(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main([*QUICK, "--plot", "m.png"]) == 1
    assert "pip install 'bbfast[plot]'" in error_line(capsys)


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["bench"], "MODEL"),
        ([*QUICK, "--batch", "1,0"], "--batch"),
        ([*QUICK, "--seconds", "1"], "--seconds"),
        (["bench", SMALL, "--seconds", "nan"], "--seconds"),
        ([*QUICK, "--cuda-graphs", "maybe"], "--cuda-graphs"),
    ],
)
def test_wrong_usage_exits_with_2(arguments, complaint, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert complaint in capsys.readouterr().err.splitlines()[-1]
