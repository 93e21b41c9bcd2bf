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
