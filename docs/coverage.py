"""Writes docs/models.md: which of timm's models bbfast has, and why it lacks the others.

python docs/coverage.py            # writes the page
python docs/coverage.py --check    # exits with 1 where the page is out of date
"""

from __future__ import annotations

import sys
from fnmatch import fnmatchcase
from pathlib import Path

import timm

import bbfast

PAGE = Path(__file__).with_name("models.md")

# By pattern, why names of a module are left out; the first match counts.
REASONS = {
    "mobilenetv3": {
        "mobilenetv4_hybrid_*": "attention between convolutions (mobile multi-query attention)",
        "mobilenetv4_conv_*": "universal inverted bottlenecks, with a depthwise convolution before the expansion",
        "*": "blocks that are here, in an order that is not written down yet",
    },
    "efficientnet": {
        "*_gn": "GroupNorm in place of BatchNorm",
        "*_ln": "LayerNorm in place of BatchNorm",
        "*_evos": "EvoNorm in place of BatchNorm",
        "*_pruned": "each layer has channels of its own, from a file",
        "*_cc_*": "conditionally parametrised convolutions, a weight per image",
        "*mixnet_*": "depthwise kernels of several sizes in one layer",
        "efficientnet_blur_*": "blur pooling",
        "*efficientnetv2_*": "fused inverted residuals (a dense 3x3 convolution expands)",
        "*efficientnet_e[lms]": "fused inverted residuals (a dense 3x3 convolution expands)",
        "efficientnet_[hx]_*": "fused inverted residuals (a dense 3x3 convolution expands)",
        "mobilenet_edgetpu_*": "fused inverted residuals (a dense 3x3 convolution expands)",
        "test_efficientnet": "fused inverted residuals (a dense 3x3 convolution expands)",
        "*": "blocks that are here, in an order that is not written down yet",
    },
}


def page() -> str:
    """The whole text of docs/models.md."""
    modules = bbfast.list_modules()
    lines = [
        "# Models",
        "",
        f"Names, state_dict keys, outputs and tags are those of timm {timm.__version__}. This page is written by",
        "`python docs/coverage.py`; `bbfast list` prints the names that the installed version has.",
        "",
        "| module | bbfast | timm | bbfast's tags with weights |",
        "|---|---|---|---|",
    ]
    for module in modules:
        ours, theirs = bbfast.list_models(module=module), timm.list_models(module=module)
        if strangers := sorted(set(ours) - set(theirs)):
            raise SystemExit(f"{module} has names that timm has not: {', '.join(strangers)}")
        tags = len(bbfast.list_models(module=module, pretrained=True))
        lines.append(f"| [{module}](#{module}) | {len(ours)} | {len(theirs)} | {tags} |")
    for module in modules:
        lines += ["", f"## {module}", "", *section(module)]
    return "\n".join(lines) + "\n"


def section(module: str) -> list[str]:
    ours = bbfast.list_models(module=module)
    missing = [name for name in timm.list_models(module=module) if name not in ours]
    lines = [" ".join(f"`{name}`" for name in ours), ""]
    if not missing:
        return [*lines, "Nothing is left out."]
    by_reason: dict[str, list[str]] = {}
    for name in missing:
        by_reason.setdefault(reason(module, name), []).append(name)
    lines += ["| left out | why |", "|---|---|"]
    return lines + [f"| {' '.join(f'`{name}`' for name in names)} | {why} |" for why, names in by_reason.items()]


def reason(module: str, name: str) -> str:
    for pattern, why in REASONS.get(module, {}).items():
        if fnmatchcase(name, pattern):
            return why
    raise SystemExit(f"docs/coverage.py gives no reason why {module} lacks {name}")


def main() -> int:
    text = page()
    if "--check" in sys.argv[1:]:
        if PAGE.read_text() == text:
            return 0
        print(f"{PAGE} is out of date; run python {Path(__file__).name}", file=sys.stderr)
        return 1
    PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
