"""The command `bbfast`: classify photos, list and time models, tune kernels, sample design spaces, a demo, and more.

Exit codes: 0 done, 1 something given cannot be used (one line on stderr says what), 2 wrong usage.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import bbfast
from bbfast.data.packaged_weights import MODEL as DEFAULT_MODEL
from bbfast.triton_kernels.tuned import NAMES as TUNABLE_KERNELS


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    Args:
        argv: the arguments without the program's name; None takes those of the process.

    Raises:
        SystemExit: wrong usage (2), `--help` or `--version` (0).
    """
    args = _parser().parse_args(argv)
    # Commands import torchvision and more, which `--help` should not wait for.
    from bbfast.commands._common import CommandError

    try:
        return args.command(args)
    except CommandError as error:
        print(f"bbfast {args.name}: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bbfast", description="The fastest vision backbones in PyTorch.")
    parser.add_argument("--version", action="version", version=f"bbfast {bbfast.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="name")

    info = commands.add_parser("info", help="versions, GPUs, what was built, which backends can run and why not")
    info.set_defaults(command=_command("info"))

    listing = commands.add_parser("list", help="names of models")
    listing.add_argument("pattern", nargs="*", metavar="PATTERN", help="wildcards in quotes, e.g. 'mobilenetv3*'")
    listing.add_argument("--pretrained", action="store_true", help="only names with known weights, with their tags")
    listing.add_argument("--tags", action="store_true", help="with the tags of all weights: architecture.tag")
    listing.add_argument("--module", action="append", metavar="NAME", help="only of this module, e.g. mobilenetv3")
    listing.add_argument("--exclude", action="append", metavar="PATTERN", help="leave out what matches")
    listing.set_defaults(command=_list)

    classify = commands.add_parser("classify", help="what a model sees in photos")
    classify.add_argument("photos", nargs="+", metavar="PHOTO", help="an image file")
    classify.add_argument("--model", default=DEFAULT_MODEL, metavar="NAME", help="default: %(default)s")
    classify.add_argument("--checkpoint", metavar="FILE", help="weights to load instead of the pretrained ones")
    classify.add_argument("--top", type=_positive, default=5, metavar="N", help="labels per photo, default 5")
    classify.add_argument("--json", action="store_true", help="print JSON instead of tables")
    _add_device(classify)
    classify.set_defaults(command=_command("classify"))

    demo = commands.add_parser("demo", help="classify real photographs, fused against eager")
    demo.add_argument(
        "--repeats",
        type=_positive,
        default=15,
        metavar="N",
        help="timed repeats per photo, fewer on a slow machine; default 15",
    )
    _add_device(demo)
    demo.set_defaults(command=_command("demo"))

    _add_bench(commands.add_parser("bench", help="how quick models are here: eager, compiled, swapped, bbfast"))
    _add_tune(commands.add_parser("tune", help="measure launch configurations of kernels on the GPU at hand"))
    _add_design_space(commands.add_parser("design-space", help="random networks of a design space, and their errors"))
    return parser


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_command("bench"))
    parser.add_argument("models", nargs="+", metavar="MODEL", help="a model of timm, e.g. resnet50")
    parser.add_argument(
        "--batch", type=_list_of(_positive), metavar="N,...", help="images per call; default 128, on a CPU 8"
    )
    parser.add_argument(
        "--dtype", type=_list_of(str), metavar="NAME,...", help="bf16, fp16, fp32; default bf16, on a CPU fp32"
    )
    parser.add_argument(
        "--mode", type=_list_of(str), metavar="NAME,...", help="infer, train; default both, on a CPU infer"
    )
    parser.add_argument("--image-size", type=_positive, metavar="N", help="pixels; default: the model's own")
    parser.add_argument(
        "--providers",
        type=_list_of(str),
        metavar="NAME,...",
        help="what to compare with eager, e.g. 'compile,bbfast'; a wrong name lists them; default all, on a CPU four",
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--rounds", type=_positive, metavar="N", help="measurements of each provider")
    length.add_argument(
        "--seconds", type=_seconds, default=5.0, metavar="S", help="for each provider, at least 5 rounds; default 5"
    )
    parser.add_argument(
        "--cuda-graphs",
        choices=("auto", "always", "never"),
        default="auto",
        help="replay inference on a GPU from CUDA graphs; default auto: up to batch 16",
    )
    parser.add_argument("--threads", type=_positive, metavar="N", help="of the CPU; default: as many as torch takes")
    parser.add_argument("--turns", type=Path, help=argparse.SUPPRESS)  # benchmarks/together.py alone says when
    parser.add_argument("--json", metavar="FILE", help="write everything there, after each case")
    parser.add_argument("--csv", metavar="FILE", help="write a line per provider and case")
    parser.add_argument("--plot", metavar="FILE", help="draw the speed-ups: .png, .pdf, .svg; needs matplotlib")
    _add_device(parser)


def _add_tune(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Tries other tiles, warps and so on than the heuristics choose for the kernels that these models launch, and "
        "keeps, for later runs on this kind of GPU, those that are quicker and give the same numbers. May be cut short "
        "and goes on where it was."
    )
    parser.set_defaults(command=_command("tune"))
    parser.add_argument("models", nargs="+", metavar="MODEL", help="whose kernels, e.g. mobilenetv3_large_100")
    parser.add_argument(
        "--batch", type=_list_of(_positive), default=[128], metavar="N[,N]", help="photos at a time, default 128"
    )
    for name, default, allowed, text in (
        ("dtype", "bf16", ("fp32", "bf16", "fp16"), "in training autocast's"),
        ("mode", "infer", ("infer", "train"), "train: forward and backward"),
        ("kernels", None, TUNABLE_KERNELS, "only these kernels"),
    ):
        parser.add_argument(
            f"--{name}",
            type=_list_of(_one_of(allowed)),
            default=default and [default],
            metavar="NAME[,NAME]",
            help=f"{', '.join(allowed)}; {text}; default {default or 'all'}",
        )
    parser.add_argument(
        "--output",
        metavar="FOLDER",
        help="default: $BBFAST_TUNED_DIR or ~/.cache/bbfast/tuned, where later runs look",
    )
    parser.add_argument("--again", action="store_true", help="also measure what the folder holds already")


def _add_design_space(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_command("design_space"))
    actions = parser.add_subparsers(required=True, metavar="ACTION", dest="action")

    sample = actions.add_parser("sample", help="draw configurations of a given cost")
    sample.add_argument("space", metavar="NAME", help="AnyNetXA to AnyNetXE, RegNetX, RegNetY, RegNetXRefined, ...")
    sample.add_argument("-n", "--count", type=_positive, default=100, metavar="N", help="how many, default 100")
    sample.add_argument(
        "--flops", type=float, nargs=2, metavar=("LOW", "HIGH"), help="multiply-adds of one image, e.g. 360e6 400e6"
    )
    sample.add_argument("--image-size", type=_positive, default=224, metavar="N", help="pixels, default 224")
    sample.add_argument("--seed", type=_natural, default=0, metavar="N", help="default 0")
    sample.add_argument(
        "--max-tries",
        type=_positive,
        default=100_000,
        metavar="N",
        help="candidates in a row that may miss --flops, default 100000",
    )
    sample.add_argument("--json", metavar="FILE", help="write the configurations there instead of a table")

    edf = actions.add_parser("edf", help="how the errors of trained configurations are distributed")
    edf.add_argument("files", nargs="+", metavar="FILE", help="what `sample --json` wrote, with an error per model")
    edf.add_argument("--plot", metavar="FILE", help="draw the distributions: .png, .pdf, .svg; needs matplotlib")
    edf.add_argument(
        "--confidence", type=_share, default=0.95, metavar="P", help="share within the bands, default 0.95"
    )
    edf.add_argument("--resamples", type=_positive, default=1000, metavar="N", help="bootstrap draws, default 1000")
    edf.add_argument("--seed", type=_natural, default=0, metavar="N", help="of the bootstrap, default 0")


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="default auto: the GPU if there is one",
    )


def _list_of(kind: Callable) -> Callable[[str], list]:
    """A list with commas, each part read by `kind`; what stands there twice counts once."""
    return lambda text: list(dict.fromkeys(kind(part.strip()) for part in text.split(",")))


def _one_of(allowed: Sequence[str]) -> Callable[[str], str]:
    def check(text: str) -> str:
        if text not in allowed:
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(allowed)}")
        return text

    return check


def _positive(text: str) -> int:
    value = int(text) if text.isascii() and text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value


def _natural(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 and below 1")
    return value


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value


def _command(name: str) -> Callable[[argparse.Namespace], int]:
    def run(args: argparse.Namespace) -> int:
        import importlib

        return importlib.import_module(f"bbfast.commands.{name}").run(args)

    return run


def _list(args: argparse.Namespace) -> int:
    from bbfast.commands._common import CommandError

    if unknown := set(args.module or ()) - set(bbfast.list_modules()):
        known = ", ".join(bbfast.list_modules())
        raise CommandError(f"--module: there is no module {min(unknown)}; there are {known}")
    names = bbfast.list_models(
        args.pattern,
        args.module or "",
        pretrained=args.pretrained,
        exclude_filters=args.exclude or "",
        # A pattern with a dot asks for tags, too: weights, of which an architecture can have several.
        include_tags=args.tags or args.pretrained or any("." in pattern for pattern in args.pattern),
    )
    if not names:
        asked = " or ".join(args.pattern) or "this"
        raise CommandError(f"no model matches {asked}{_described_filters(args)}")
    print("\n".join(names))
    sys.stdout.flush()  # a closed pipe shows here, not when the interpreter ends
    return 0


def _described_filters(args: argparse.Namespace) -> str:
    parts = [f"in {' or '.join(args.module)}"] if args.module else []
    parts += ["with weights"] if args.pretrained else []
    parts += [f"without {' or '.join(args.exclude)}"] if args.exclude else []
    return "".join(f" {part}" for part in parts)
