"""`bbfast demo`: real photographs, real weights, fused against eager."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

import bbfast
from bbfast import dispatch
from bbfast.commands._common import (
    RUN_ERRORS,
    Classifier,
    CommandError,
    Prediction,
    describe_device,
    make_classifier,
    one_line_errors,
    pick_device,
    print_titled,
    probability_bar,
    progress_bar,
)
from bbfast.data import packaged_weights
from bbfast.data.sample_photos import sample_photos

INSTALL_HINT = "pip install 'bbfast[demo]' brings it"

# Passes that are run but not counted, and where a slow machine stops repeating.
WARMUP = 2
MIN_REPEATS = 3
MAX_MS_PER_PHOTO = 4000


@dataclass(frozen=True)
class Measurement:
    """One photo, classified with fused kernels and by the eager reference.

    Attributes:
        predictions: the fused model's five best.
        logit_difference, probability_difference: the largest over all classes.
        fused_ms, eager_ms: median time of one forward pass with the photo on the device.
        repeats: how many passes of each the medians are over.
    """

    photo: str
    size: tuple[int, int]
    predictions: list[Prediction]
    logit_difference: float
    probability_difference: float
    fused_ms: float
    eager_ms: float
    repeats: int


def run(args: Namespace) -> int:
    device = pick_device(args.device)
    classifier, photos = _prepare(device)
    measurements = []
    with progress_bar() as progress, one_line_errors(*RUN_ERRORS):
        for name in progress.track(photos, description="Classifying"):
            measurements.append(measure(classifier, name, photos[name], args.repeats))
        # The eager passes chose backends too, so ask once more what the fused model runs on.
        dispatch.forget_choices()
        _logits(classifier, classifier.as_input(photos[name]))
        choices = dispatch.last_choices()

    console = Console(highlight=False)
    _print_heading(console, classifier)
    _print_predictions(console, measurements)
    _print_times(console, measurements)
    _print_choices(console, choices)
    return 0


def _prepare(device: torch.device) -> tuple[Classifier, dict[str, Image.Image]]:
    if packaged_weights.packaged_weights_path(packaged_weights.MODEL) is None:
        raise CommandError(f"the demo needs the package {packaged_weights.PACKAGE}; {INSTALL_HINT}")
    with one_line_errors(ModuleNotFoundError, prefix=f"the demo's photographs need a package; {INSTALL_HINT}: "):
        photos = sample_photos()
    return make_classifier(packaged_weights.MODEL, None, device), photos


# ---- measuring -------------------------------------------------------------------------------------------


def measure(classifier: Classifier, name: str, photo: Image.Image, repeats: int) -> Measurement:
    """Compares logits and probabilities, then times both in turns."""
    x = classifier.as_input(photo)
    fused = _logits(classifier, x)
    with eager_reference():
        eager = _logits(classifier, x)
    fused_ms, eager_ms = _interleaved_times_ms(classifier, x, repeats)
    return Measurement(
        photo=name,
        size=photo.size,
        predictions=classifier.top(fused, 5),
        logit_difference=(fused - eager).abs().max().item(),
        probability_difference=(fused.softmax(-1) - eager.softmax(-1)).abs().max().item(),
        fused_ms=statistics.median(fused_ms),
        eager_ms=statistics.median(eager_ms),
        repeats=len(fused_ms),
    )


@contextlib.contextmanager
def eager_reference() -> Iterator[None]:
    """Within it every op runs its reference: the same model in plain torch."""
    before = os.environ.get("BBFAST_BACKEND")
    os.environ["BBFAST_BACKEND"] = "torch"
    try:
        yield
    finally:
        if before is None:
            del os.environ["BBFAST_BACKEND"]
        else:
            os.environ["BBFAST_BACKEND"] = before


def _logits(classifier: Classifier, x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return classifier.model(x).float()


def _interleaved_times_ms(classifier: Classifier, x: torch.Tensor, repeats: int) -> tuple[list[float], list[float]]:
    """Times of fused and eager passes in turns: `repeats` of each, or as many as fit into a few seconds."""
    fused_ms, eager_ms = [], []
    for _ in range(WARMUP + repeats):
        fused_ms.append(_time_ms(classifier, x))
        with eager_reference():
            eager_ms.append(_time_ms(classifier, x))
        if len(fused_ms) >= WARMUP + MIN_REPEATS and sum(fused_ms) + sum(eager_ms) > MAX_MS_PER_PHOTO:
            break
    return fused_ms[WARMUP:], eager_ms[WARMUP:]


def _time_ms(classifier: Classifier, x: torch.Tensor) -> float:
    synchronize = torch.cuda.synchronize if x.is_cuda else lambda: None
    synchronize()
    start = time.perf_counter()
    _logits(classifier, x)
    synchronize()
    return (time.perf_counter() - start) * 1e3


# ---- printing --------------------------------------------------------------------------------------------


def _print_heading(console: Console, classifier: Classifier) -> None:
    console.print(
        Text(f"bbfast {bbfast.__version__}: {classifier.name} on {describe_device(classifier.device)}", "bold")
    )
    console.print(f"Weights: {classifier.weights} (ImageNet). torch {torch.__version__}, float32, batch of 1.")


def _print_predictions(console: Console, measurements: list[Measurement]) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("photo", "pixels", "label"):
        table.add_column(name)
    table.add_column("probability", justify="right")
    table.add_column("")
    for measurement in measurements:
        width, height = measurement.size
        for rank, prediction in enumerate(measurement.predictions):
            table.add_row(
                measurement.photo if rank == 0 else "",
                f"{width}x{height}" if rank == 0 else "",
                prediction.label,
                f"{prediction.probability:.3f}",
                probability_bar(prediction.probability, console),
                end_section=rank == len(measurement.predictions) - 1,
            )
    print_titled(console, "What the model sees", table)


def _print_times(console: Console, measurements: list[Measurement]) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("photo")
    for name in ("max |Δlogit|", "max |Δprob.|", "fused ms", "eager ms", "eager/fused"):
        table.add_column(name, justify="right")
    for m in measurements:
        table.add_row(
            m.photo,
            f"{m.logit_difference:.1e}",
            f"{m.probability_difference:.1e}",
            f"{m.fused_ms:.2f}",
            f"{m.eager_ms:.2f}",
            f"{m.eager_ms / m.fused_ms:.2f}",
        )
    fewest, most = min(m.repeats for m in measurements), max(m.repeats for m in measurements)
    counts = str(most) if fewest == most else f"{fewest} to {most}"
    note = f"Times are per image, medians of {counts} repeats in turns, after warm-up.\n"
    print_titled(console, "Fused against eager: the same model with every op in plain torch", table, note)


def _print_choices(console: Console, choices: dict[str, dispatch.Choice]) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("op", no_wrap=True)
    table.add_column("backend")
    table.add_column("passed over, and why", overflow="fold")
    for op, choice in sorted(choices.items()):
        table.add_row(op, choice.backend, Text("\n".join(choice.reasons) or "-"))
    print_titled(console, "The backend that each op took in its last call", table)
