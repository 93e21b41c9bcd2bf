"""Pages that are written by programs say what the programs say."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

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
