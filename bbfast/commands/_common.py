"""What the subcommands share: errors a user can act on, devices, a model that classifies."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from PIL import Image
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

import bbfast
from bbfast import data, dispatch, extension
from bbfast.data import packaged_weights

# What running a model can raise that its user can mend: a wrong environment variable, BBFAST_STRICT=1
# without a kernel, an extension built for another torch, a GPU that is full.
RUN_ERRORS = (
    ValueError,
    dispatch.BackendUnavailableError,
    extension.BrokenExtensionError,
    torch.OutOfMemoryError,
)


class CommandError(Exception):
    """Something the user gave cannot be used; the message is one line for the terminal."""


@contextlib.contextmanager
def one_line_errors(*kinds: type[Exception], prefix: str = "") -> Iterator[None]:
    """Turns exceptions of `kinds`, whose messages are written for users, into CommandErrors of one line."""
    try:
        yield
    except kinds as error:
        message = " ".join(str(error).split()) or type(error).__name__
        raise CommandError(prefix + message) from error


def pick_device(name: str) -> torch.device:
    """`auto` is the GPU if torch sees one, else the CPU.

    Raises:
        CommandError: `cuda` was asked for and torch sees no GPU.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise CommandError("--device cuda: torch sees no NVIDIA GPU here (torch.cuda.is_available() is False)")
    return torch.device(name)


def describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU ({torch.backends.cpu.get_cpu_capability()}, {threads} thread{'s' if threads > 1 else ''})"


@dataclass(frozen=True)
class Classifier:
    """A model in eval mode, what it wants to see, and where its weights came from."""

    name: str
    weights: str
    model: torch.nn.Module
    transform: Callable[[Image.Image], torch.Tensor]
    device: torch.device

    def as_input(self, photo: Image.Image) -> torch.Tensor:
        """`[1, 3, H, W]` float32, channels_last, on the model's device."""
        x = self.transform(photo)[None].to(self.device)
        return x.contiguous(memory_format=torch.channels_last)

    def top(self, logits: torch.Tensor, count: int) -> list[Prediction]:
        """The `count` most probable classes of `[1, num_classes]` logits, best first."""
        probabilities = logits[0].float().softmax(-1)
        values, indices = probabilities.topk(min(count, len(probabilities)))
        return [
            Prediction(index, data.class_label(index, len(probabilities)), value)
            for value, index in zip(values.tolist(), indices.tolist())
        ]


@dataclass(frozen=True)
class Prediction:
    index: int
    label: str
    probability: float


def make_classifier(model_name: str, checkpoint: str | None, device: torch.device) -> Classifier:
    """Makes the model with the checkpoint's weights, those of an installed package, or the hub's.

    Raises:
        CommandError: the name is unknown, or weights are missing or do not fit.
    """
    packaged = packaged_weights.packaged_weights_path(model_name) if checkpoint is None else None
    with one_line_errors(RuntimeError, ValueError, OSError):
        model = bbfast.create_model(
            model_name, pretrained=checkpoint is None and not packaged, checkpoint_path=checkpoint
        )
        if packaged:
            packaged_weights.load_packaged_weights(model, packaged)

    if packaged:
        config = packaged_weights.DATA_CONFIG
        weights = f"{packaged_weights.PACKAGE} {packaged_weights.package_version()}"
    else:
        config = data.resolve_model_data_config(model)
        weights = checkpoint or f"Hugging Face hub, {model.pretrained_cfg.get('hf_hub_id')}"
    model = model.eval().to(device, memory_format=torch.channels_last)
    return Classifier(model_name, weights, model, data.create_transform(**config), device)


def progress_bar() -> Progress:
    """A bar on stderr that disappears when done; nothing at all where stderr is no terminal."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def print_titled(console: Console, title: str, *below: RenderableType) -> None:
    """A bold line as wide as it needs to be, then tables or text under it."""
    console.print(Text(title, "bold"), soft_wrap=True)
    for renderable in below:
        console.print(renderable)


def probability_bar(probability: float, console: Console, width: int = 20) -> str:
    return ("#" if console.options.ascii_only else "█") * round(probability * width)
