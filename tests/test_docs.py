"""Pages that are written by programs say what the programs say."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
from results_folders import FACTS, model_row, write_models

timm = pytest.importorskip("timm")

DOCS = Path(__file__).resolve().parent.parent / "docs"


@pytest.mark.skipif(timm.__version__ != "1.0.31", reason="the page compares with timm 1.0.31")
def test_the_table_of_models_is_up_to_date():
    coverage = runpy.run_path(str(DOCS / "coverage.py"))
    assert (DOCS / "models.md").read_text() == coverage["page"](), "run python docs/coverage.py"


def test_a_model_left_out_without_a_reason_is_an_error():
    coverage = runpy.run_path(str(DOCS / "coverage.py"))
    assert "GroupNorm" in coverage["reason"]("efficientnet", "efficientnet_b3_gn")
    with pytest.raises(SystemExit, match="no reason why resnet lacks resnet999"):
        coverage["reason"]("resnet", "resnet999")


def performance_page() -> dict:
    return runpy.run_path(str(DOCS / "performance_page.py"))


def test_the_page_and_the_table_on_performance_are_up_to_date():
    page = performance_page()
    folders, readme = page["latest"](), (DOCS.parent / "README.md").read_text()
    advice = "run python docs/performance_page.py"
    assert (DOCS / "performance.md").read_text() == page["page"](folders, page["latest_plans"]()), advice
    assert readme == page["readme_with"](readme, page["headline"](folders)), advice


@pytest.fixture
def results(tmp_path) -> Path:
    """Two runs on a CPU and one on a GPU, where benchmarks/results is."""
    rows = [model_row("eager", 12.0), model_row("compile", 8.0), model_row("bbfast", 10.0)]
    cpu = {**FACTS, "gpu": None, "processor": "Test CPU"}
    folder = tmp_path / "benchmarks" / "results"
    write_models(folder / "cpu" / "b-older", {"resnet50": rows}, cpu)
    write_models(folder / "cpu" / "a-newer", {"convnext_tiny": rows}, {**cpu, "started": "2031-01-01T00:00:00+00:00"})
    write_models(folder / "gpu" / "run", {"swin": [*rows, model_row("bbfast+compile", 4.0)]})
    (folder / "cpu" / "flat.json").write_text("{}")  # older results lie in the device's folder itself
    return tmp_path


def test_the_page_shows_the_newest_results_of_each_device(results):
    page = performance_page()
    page["page"].__globals__["ROOT"] = results
    folders = page["latest"](results)
    assert [found.folder.name for found in folders] == ["run", "a-newer"]
    text = page["page"](folders, [])
    assert text.index("### Test GPU") < text.index("### Test CPU")
    assert "| convnext_tiny infer bf16 batch 8 224 px | compile | 8.00 | bbfast | 10.0 | 1.25 |" in text
    assert "In none of the 1 cases" in text and "resnet50" not in text.partition("## Results")[2]
    assert "No results folder is committed" not in text
    assert "No results folder is committed" in page["page"]([], [])


def test_the_page_shows_the_newest_plan_of_each_mode(tmp_path):
    page = performance_page()
    page["page"].__globals__["ROOT"] = tmp_path
    folder = tmp_path / "benchmarks" / "results" / "planned"
    folder.mkdir(parents=True)
    case = {"model": "swin", "batch": 128, "dtype": "bf16", "image_size": 224}
    floors = {"eager": 9.0, "compile": 7.0, "compile+sdpa": 6.0, "bbfast+compile": 5.0}
    rows = [{**case, "provider": name, "floor_ms": ms, "kernels": int(10 * ms)} for name, ms in floors.items()]
    plans = (("b", "2030", "infer", rows[:2]), ("a", "2031", "infer", rows), ("c", "2029", "train", rows[1:]))
    for name, started, mode, chosen in plans:
        facts = {**FACTS, "timm": "1.0", "commit": "0123456789abcdef", "started": started}
        chosen = [{**row, "mode": mode} for row in chosen]
        (folder / f"{name}-traffic.json").write_text(json.dumps({"facts": facts, "results": chosen}))
    latest = page["latest_plans"](tmp_path)
    assert [plan.name for plan in latest] == ["a-traffic.json", "c-traffic.json"]
    text = page["page"]([], latest)
    inference, training = text.split("Forward and backward, batch 128, bf16, 224 px")
    assert "Inference, batch 128, bf16, 224 px" in inference and "No kernel ran" in inference
    assert "| swin | 9.00 (90) | 7.00 (70) | 6.00 (60) | 5.00 (50) | 1.20 |" in inference
    assert "| swin | 7.00 (70) | 6.00 (60) | 5.00 (50) | 1.20 |" in training and "timm eager" not in training


def test_the_table_in_the_readme_is_about_the_gpu_if_there_is_one(results):
    page = performance_page()
    page["headline"].__globals__["ROOT"] = results
    gpu, cpu = page["latest"](results)
    assert "| swin, infer, bf16, batch 8, 224 px | 12.0 | 8.00 | 4.00 | 3.00 | 2.00 |" in page["headline"]([gpu, cpu])
    table = page["headline"]([cpu])
    assert table.startswith("Test CPU, torch 9.9")
    assert "| convnext_tiny, infer, bf16, batch 8, 224 px | 12.0 | 8.00 | 10.0 | 1.20 | 0.80 |" in table
    assert page["headline"]([]) == ""


def test_the_readme_is_changed_between_its_markers_alone():
    page = performance_page()
    begin, end = page["BEGIN"], page["END"]
    before = f"above\n{begin}\nold\n{end}\nbelow\n"
    assert page["readme_with"](before, "new\n") == f"above\n{begin}\nnew\n{end}\nbelow\n"
    for wrong in ("nothing", f"{end}{begin}", f"{before}{before}"):
        with pytest.raises(ValueError, match="once each"):
            page["readme_with"](wrong, "new\n")


LIBRARIES = {"timm": "1.0.31", "torchvision": "0.29.1", "transformers": "5.23.0"}


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_pages_on_swapping_are_up_to_date(library):
    version = pytest.importorskip(library).__version__.partition("+")[0]
    if version != LIBRARIES[library]:
        pytest.skip(f"the page is for {library} {LIBRARIES[library]}")
    pages = runpy.run_path(str(DOCS / "swap_pages.py"))
    assert (DOCS / f"swap_{library}.md").read_text() == pages["page"](library), "run python docs/swap_pages.py"


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_examples_of_swapping_run(library, monkeypatch):
    pytest.importorskip(library)
    monkeypatch.setenv("BBFAST_BACKEND", "torch")  # Triton's interpreter would take minutes
    text = (DOCS / f"swap_{library}.md").read_text()
    example = text.partition("```python\n")[2].partition("```")[0]
    exec(compile(example, f"swap_{library}.md", "exec"), {})
