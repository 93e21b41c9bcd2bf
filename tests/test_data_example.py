"""What the documentation shows runs, and the example learns."""

import re
import runpy
from pathlib import Path

import pytest
import torch
from random_photos import random_photo

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def plain_torch(monkeypatch):
    """Training through Triton's interpreter would crawl, and more threads wait for one another."""
    monkeypatch.setenv("BBFAST_BACKEND", "torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_page_runs(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "preprocessing.md").read_text(), re.DOTALL)
    random_photo(300, 200).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    shown = {}
    exec("".join(blocks), shown)
    assert shown["image"].shape == (3, 224, 224)
    assert shown["images"].shape == (4, 3, 224, 224)
    assert torch.allclose(shown["soft_targets"].sum(1), torch.ones(4))
    assert all(parameter.grad.isfinite().all() for parameter in shown["model"].parameters())


def test_the_example_learns(capsys):
    pytest.importorskip("sklearn", reason="the example's digits come with scikit-learn")
    example = runpy.run_path(str(ROOT / "examples" / "train_digits.py"), run_name="train_digits")
    accuracy = example["main"](["--classes", "3", "--epochs", "3"])
    printed = capsys.readouterr().out
    print(printed)
    losses = [float(loss) for loss in re.findall(r"epoch \d: loss (\d+\.\d+), accuracy", printed)]
    assert len(losses) == 3 and losses[2] < 0.8 * losses[0]
    assert accuracy > 0.55  # by chance a third
