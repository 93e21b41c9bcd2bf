"""`bbfast classify PHOTO...`: what a model sees in photos."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bbfast import data, dispatch
from bbfast.commands._common import (
    Classifier,
    Prediction,
    describe_device,
    make_classifier,
    one_line_errors,
    pick_device,
    print_titled,
    probability_bar,
    progress_bar,
)


def run(args: Namespace) -> int:
    device = pick_device(args.device)
    # Photos first: a wrong path should not wait for a model.
    with one_line_errors(OSError, ValueError):
        for path in args.photos:
            data.load_photo(path)
    classifier = make_classifier(args.model, args.checkpoint, device)
    found = {}
    with progress_bar() as progress:
        for path in progress.track(args.photos, description="Classifying"):
            found[path] = classify_photo(classifier, path, args.top)

    if args.json:
        print(json.dumps(_as_json(classifier, found), indent=2))
    else:
        _print_tables(classifier, found)
    return 0


def classify_photo(classifier: Classifier, path: str | Path, top: int) -> list[Prediction]:
    with one_line_errors(OSError, ValueError):
        photo = data.load_photo(path)
    with (
        torch.inference_mode(),
        one_line_errors(dispatch.BackendUnavailableError, ValueError, torch.OutOfMemoryError),
    ):
        return classifier.top(classifier.model(classifier.as_input(photo)), top)


def _as_json(classifier: Classifier, found: dict[str, list[Prediction]]) -> dict:
    return {
        "model": classifier.name,
        "weights": classifier.weights,
        "device": str(classifier.device),
        "photos": [
            {"photo": path, "predictions": [asdict(prediction) for prediction in predictions]}
            for path, predictions in found.items()
        ],
    }


def _print_tables(classifier: Classifier, found: dict[str, list[Prediction]]) -> None:
    console = Console(highlight=False)
    for path, predictions in found.items():
        table = Table(box=box.SIMPLE_HEAD)
        table.add_column("probability", justify="right")
        table.add_column("label")
        table.add_column("")
        for prediction in predictions:
            bar = probability_bar(prediction.probability, console)
            table.add_row(f"{prediction.probability:.3f}", prediction.label, bar)
        print_titled(console, path, table)
    console.print(
        Text(
            f"{classifier.name} (weights: {classifier.weights}) on {describe_device(classifier.device)}",
            "dim",
        )
    )
