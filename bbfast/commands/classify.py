"""`bbfast classify PHOTO...`: what a model sees in photos."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from dataclasses import asdict

import torch
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bbfast import data
from bbfast.commands._common import (
    RUN_ERRORS,
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

Found = list[tuple[str, list[Prediction]]]


def run(args: Namespace) -> int:
    """Classifies what can be read, then names on stderr what cannot."""
    device = pick_device(args.device)
    classifier, found, complaints = None, [], []
    with progress_bar() as progress:
        for path in progress.track(args.photos, description="Classifying"):
            try:
                photo = data.load_photo(path)
            except (OSError, ValueError) as error:
                complaints.append(error)
                continue
            if classifier is None:  # a wrong path alone should not wait for a model
                classifier = make_classifier(args.model, args.checkpoint, device)
            found.append((path, classify(classifier, photo, args.top)))

    if classifier is not None and args.json:
        print(json.dumps(_as_json(classifier, found), indent=2))
    elif classifier is not None:
        _print_tables(classifier, found)
    for complaint in complaints:
        print(f"bbfast classify: {complaint}", file=sys.stderr)
    return 1 if complaints else 0


def classify(classifier: Classifier, photo: Image.Image, top: int) -> list[Prediction]:
    with torch.inference_mode(), one_line_errors(*RUN_ERRORS):
        return classifier.top(classifier.model(classifier.as_input(photo)), top)


def _as_json(classifier: Classifier, found: Found) -> dict:
    return {
        "model": classifier.name,
        "weights": classifier.weights,
        "device": str(classifier.device),
        "photos": [
            {"photo": path, "predictions": [asdict(prediction) for prediction in predictions]}
            for path, predictions in found
        ],
    }


def _print_tables(classifier: Classifier, found: Found) -> None:
    console = Console(highlight=False)
    for path, predictions in found:
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
