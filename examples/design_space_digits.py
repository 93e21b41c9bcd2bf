"""Compares two design spaces on handwritten digits: which one holds more good networks of equal cost?

    python examples/design_space_digits.py -n 20 --epochs 3

draws n networks of each space within one range of multiply-adds, trains each for a few epochs on scikit-learn's digits
(1,797 real images of 8 x 8 pixels, enlarged to 32 x 32), writes each space's errors as JSON, and draws their
distributions. It needs scikit-learn and matplotlib: pip install 'bbfast[demo,plot]'. `bbfast design-space edf` reads
the files again.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import nn

from bbfast.design_space import ErrorDistribution, Population, build, get_space, plot_edfs

IMAGE_SIZE = 32
CLASSES = 10
TEST_IMAGES = 597
BATCH = 64


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    import matplotlib.figure  # noqa: F401, a missing package should show before hours of training

    digits = load_digits(args.images)
    args.out.mkdir(parents=True, exist_ok=True)
    distributions = {}
    for name in args.spaces:
        space = get_space(name)
        configs = space.sample(args.n, args.seed, tuple(args.flops), image_size=IMAGE_SIZE)
        settings = {"seed": args.seed, "flops": args.flops, "epochs": args.epochs, "images": len(digits["train"][0])}
        population = Population.of(space.name, configs, IMAGE_SIZE, CLASSES, 1, **settings, learning_rate=args.lr)
        steps = enumerate(zip(configs, population.models))
        for index, (config, model) in track(steps, space.name, args.n, console=Console(stderr=True)):
            torch.manual_seed(args.seed + index)  # of the weights and of the images' order
            model["error"] = train(build(config, CLASSES, in_chans=1), digits, args.epochs, args.lr)
        population.save(args.out / f"{space.name}.json")
        errors = distributions[space.name] = ErrorDistribution(population.errors)
        low, high = errors.bootstrap_mean()
        print(f"{space.name}: least error {errors.min:.4f}, mean {errors.mean:.4f} ({low:.4f}..{high:.4f})")
    plot_edfs(distributions, args.out / "edf.png", title=f"digits, {args.epochs} epochs")
    print(f"{args.out}: {', '.join(f'{name}.json' for name in distributions)}, edf.png")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-n", type=int, default=20, help="networks of each space, default 20")
    parser.add_argument("--epochs", type=int, default=3, help="default 3")
    parser.add_argument("--seed", type=int, default=0, help="of samples, weights and order, default 0")
    parser.add_argument("--spaces", nargs="+", default=["AnyNetXA", "RegNetX"], help="default AnyNetXA RegNetX")
    parser.add_argument("--flops", type=float, nargs=2, default=[2e6, 4e6], help="multiply-adds, default 2e6 4e6")
    parser.add_argument("--lr", type=float, default=0.05, help="the highest learning rate, default 0.05")
    parser.add_argument("--images", type=int, default=None, help="training images, default all but the 597 for testing")
    parser.add_argument("--out", type=Path, default=Path("design_space_digits"), help="default design_space_digits")
    return parser.parse_args(argv)


def load_digits(images: int | None) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Images `[N, 1, 32, 32]` float32 of mean 0 and variance 1 and labels `[N]`, as "train" and "test"."""
    from sklearn import datasets

    pixels, labels = datasets.load_digits(return_X_y=True)
    x = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8)
    x = F.interpolate((x - x.mean()) / x.std(), size=IMAGE_SIZE, mode="bilinear")
    x, y = x.contiguous(memory_format=torch.channels_last), torch.from_numpy(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))  # the same split for every seed
    test, train = order[:TEST_IMAGES], order[TEST_IMAGES:][:images]
    return {"train": (x[train], y[train]), "test": (x[test], y[test])}


def train(model: nn.Module, digits: dict, epochs: int, lr: float) -> float:
    """Trains with SGD on a cosine schedule; returns the share of test images that are misread."""
    x, y = digits["train"]
    model.to(memory_format=torch.channels_last).train()
    steps_per_epoch = max(1, len(x) // BATCH)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-5)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps_per_epoch)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(BATCH)[:steps_per_epoch]:
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
            schedule.step()
    return test_error(model, *digits["test"])


@torch.inference_mode()
def test_error(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    model.eval()
    wrong = sum(int((model(images).argmax(-1) != labels).sum()) for images, labels in zip(x.split(256), y.split(256)))
    return wrong / len(x)


if __name__ == "__main__":
    main()
