"""Writes docs/swap_timm.md, swap_torchvision.md and swap_transformers.md: what `bbfast.swap` knows of each library.

python docs/swap_pages.py            # writes the pages
python docs/swap_pages.py --check    # exits with 1 where one is out of date
"""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path

from bbfast.swap import _fast, record_sources
from bbfast.swap._fingerprint import by_number, known_sources

FOLDER = Path(__file__).parent

EXAMPLES = {
    "timm": """\
import bbfast, timm, torch

model = timm.create_model("mobilenetv3_small_050", pretrained=False).eval().to(memory_format=torch.channels_last)
images = torch.randn(2, 3, 224, 224).to(memory_format=torch.channels_last)
print(bbfast.plan(model))  # a row per block: what would change, what would not, and why
with torch.inference_mode():
    before = model(images)
    bbfast.swap(model)  # in place; same parameters, same keys, same numbers
    torch.testing.assert_close(model(images), before, rtol=1e-4, atol=1e-4)
bbfast.restore(model)
""",
    "torchvision": """\
import bbfast, torch, torchvision

model = torchvision.models.mobilenet_v3_small(weights=None).eval().to(memory_format=torch.channels_last)
images = torch.randn(2, 3, 224, 224).to(memory_format=torch.channels_last)
with torch.inference_mode():
    before = model(images)
    with bbfast.swapped(model) as report:  # only inside of the block
        print(report.totals)
        torch.testing.assert_close(model(images), before, rtol=1e-4, atol=1e-4)
    assert torch.equal(model(images), before)
""",
    "transformers": """\
import bbfast, torch
from transformers import ResNetConfig, ResNetModel

config = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic")
model = ResNetModel(config).eval()
images = torch.randn(2, 3, 64, 64)
with torch.inference_mode():
    before = model(images).last_hidden_state
    print(bbfast.swap(model))  # a row per block
    torch.testing.assert_close(model(images).last_hidden_state, before, rtol=1e-4, atol=1e-4)
""",
}


def page(library: str) -> str:
    """The whole text of a library's page."""
    names = record_sources.names_read(library)  # loads the adapters
    version = importlib.import_module(library).__version__.partition("+")[0]
    lines = [
        f"# bbfast.swap and {library}",
        "",
        f"What `bbfast.swap(model)` makes faster in models of {library}, as of {version}. This page is written by",
        "`python docs/swap_pages.py`; [swapping.md](swapping.md) tells how swapping works and what it promises.",
        "",
        "```python",
        *EXAMPLES[library].splitlines(),
        "```",
        "",
        "## Blocks that are swapped",
        "",
        "| class | swapped, it runs as |",
        "|---|---|",
        *_swapped_rows(library),
        "",
        "In all models, also runs of convolution, BatchNorm and activation in `torch.nn.Sequential`.",
        "",
        "## Classes that are reported as skipped",
        "",
        *_unsupported_rows(library),
        "",
        "## Versions",
        "",
        *_versions(library, names),
    ]
    return "\n".join(lines) + "\n"


def _swapped_rows(library: str) -> list[str]:
    classes = {f"{cls.__module__}.{cls.__qualname__}": fast for cls, fast in _fast.fast_classes().items()}
    return [
        f"| `{name}` | {_first_sentence(fast)} |"
        for name, fast in sorted(classes.items())
        if name.partition(".")[0] == library
    ]


def _first_sentence(cls: type) -> str:
    return inspect.cleandoc(cls.__doc__).split("\n\n")[0].replace("\n", " ")


def _unsupported_rows(library: str) -> list[str]:
    rows = [
        f"| `{name}` | {reason} |"
        for name, reason in sorted(_fast.unsupported_reasons().items())
        if name.partition(".")[0] == library
    ]
    return ["| class | reason |", "|---|---|", *rows] if rows else ["None beside subclasses of the blocks above."]


def _versions(library: str, names: list[str]) -> list[str]:
    """Which versions have all the code that the adapters rely on, and which have some of it."""
    known = known_sources(library)
    by_version: dict[str, int] = {}
    for name in names:
        for versions in known.get(name, {}).values():
            for version in versions:
                by_version[version] = by_version.get(version, 0) + 1
    lines = [
        "A block is swapped only if its source is one that was read, comments and docstrings aside; any other is",
        "skipped with that reason. So many of the functions that adapters rely on were read in each version (not",
        "every version has all of them):",
        "",
        f"| {library} | functions of {len(names)} |",
        "|---|---|",
    ]
    return lines + [f"| {version} | {by_version[version]} |" for version in sorted(by_version, key=by_number)]


def main() -> None:
    outdated = []
    for library in EXAMPLES:
        path, text = FOLDER / f"swap_{library}.md", page(library)
        if "--check" in sys.argv[1:]:
            outdated += [path.name] if not path.exists() or path.read_text() != text else []
        else:
            path.write_text(text)
    if outdated:
        raise SystemExit(f"out of date: {', '.join(outdated)}; run python docs/swap_pages.py")


if __name__ == "__main__":
    main()
