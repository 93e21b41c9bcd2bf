"""Mixup: inputs and targets get the same shares, distributed as timm's; what is refused."""

import math
import pickle
import random

import numpy as np
import pytest
import torch

from bbfast.data import Mixup

CLASSES = 7


@pytest.fixture(scope="module")
def timm():
    return pytest.importorskip("timm")


def batch(number: int = 5, size: tuple[int, int] = (9, 12), dtype=torch.float32):
    return torch.randn(number, 3, *size, dtype=dtype), torch.randint(CLASSES, (number,))


def lam_of(x: torch.Tensor, mixed: torch.Tensor) -> float:
    """The share of the images' own pixels, or of their own values, in a mixed batch of two different images."""
    partner = x.roll(1, 0)
    return ((mixed - partner) / (x - partner)).double().mean().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("number", [1, 2, 5, CLASSES])
def test_mixup_is_the_convex_mix_of_inputs_and_targets(number, dtype):
    mixup = Mixup(mixup_alpha=1.0, label_smoothing=0.0, num_classes=CLASSES)
    x, target = batch(number, dtype=dtype)
    target = torch.arange(number)
    before = x.clone()
    mixed, soft = mixup(x, target)
    assert torch.equal(x, before) and mixed.dtype == dtype and soft.dtype == torch.float32
    lam = soft[0, 0].item() if number > 1 else 1.0  # of the first image's own class
    partners = [index - 1 for index in range(number)]  # Python counts -1 from the end, as the first image's partner is
    assert torch.allclose(soft.sum(1), torch.ones(number))
    for index, partner in enumerate(partners):
        expected = lam * x[index].double() + (1 - lam) * x[partner].double()
        assert torch.allclose(
            mixed[index].double(), expected, atol=8 * torch.finfo(dtype).eps, rtol=4 * torch.finfo(dtype).eps
        )
        expected = torch.zeros(CLASSES)
        expected[target[index]] += lam
        expected[target[partner]] += 1 - lam
        assert torch.allclose(soft[index], expected, atol=1e-6)


@pytest.mark.parametrize("size", [(16, 16), (9, 20), (1, 5)])
def test_cutmix_exchanges_one_rectangle(size):
    mixup = Mixup(mixup_alpha=0.0, cutmix_alpha=1.0, label_smoothing=0.0, num_classes=CLASSES)
    rectangles = 0
    for _ in range(30):
        x, _ = batch(4, size)
        target = torch.tensor([0, 2, 4, 6])
        mixed, soft = mixup(x, target)
        own = (mixed == x).all(1)
        assert ((mixed == x.roll(1, 0)).all(1) ^ own).all()  # each pixel is the one image's or the other's
        assert (own == own[0]).all()
        rows, columns = (~own[0]).nonzero(as_tuple=True)
        if len(rows):
            rectangles += 1
            assert len(rows) == (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
        for index in range(4):
            assert soft[index, target[index]].item() == pytest.approx(own[0].double().mean().item(), abs=1e-6)
            assert soft[index, target[index - 1]].item() == pytest.approx(1 - own[0].double().mean().item(), abs=1e-6)
    assert rectangles > 10 or size[0] == 1  # of one row a rectangle would be half a row high


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.35, 1.0])
def test_label_smoothing_is_timms(timm, smoothing):
    x, target = batch(6)
    mixup = Mixup(label_smoothing=smoothing, num_classes=CLASSES, prob=0.0)
    mixed, soft = mixup(x, target)
    assert torch.equal(mixed, x)
    assert torch.allclose(soft, timm.data.mixup.mixup_target(target, CLASSES, 1.0, smoothing), atol=1e-7)
    assert soft[0, target[0]].item() == pytest.approx(1 - smoothing + smoothing / CLASSES)
    mixup = Mixup(label_smoothing=smoothing, num_classes=CLASSES)
    mixup.mixup_enabled = False
    unmixed = mixup(x, target)
    assert torch.equal(unmixed[0], x) and torch.equal(unmixed[1], soft)


def test_a_pair_is_mixed_as_by_timm(timm, monkeypatch):
    """Of two images each is the other's partner in both libraries."""
    for _ in range(20):
        x, target = batch(2)
        x[1] = x[0] + 0.5 + torch.rand_like(x[0])
        mixed, soft = Mixup(0.8, label_smoothing=0.2, num_classes=CLASSES)(x, target)
        theirs = timm.data.Mixup(0.8, label_smoothing=0.2, num_classes=CLASSES)
        lam = lam_of(x, mixed)
        monkeypatch.setattr(theirs, "_params_per_batch", lambda lam=lam: (lam, False))
        expected = theirs(x.clone(), target)
        assert torch.allclose(mixed, expected[0], atol=1e-5)
        assert torch.allclose(soft, expected[1], atol=1e-5)


@pytest.mark.parametrize(
    "arguments",
    [
        {"mixup_alpha": 0.2},
        {"mixup_alpha": 0.0, "cutmix_alpha": 1.0},
        {"mixup_alpha": 0.4, "cutmix_alpha": 0.5, "switch_prob": 0.3},
        {"mixup_alpha": 1.0, "prob": 0.6},
    ],
)
def test_shares_are_distributed_as_timms(timm, arguments):
    count, samples = 400, []
    for library in (Mixup, timm.data.Mixup):
        mixup = library(**arguments, label_smoothing=0.0, num_classes=2)
        x, target = torch.zeros(2, 1, 112, 112), torch.tensor([0, 1])
        samples.append(np.sort([mixup(x, target)[1][0, 0].item() for _ in range(count)]))
    places = np.sort(np.concatenate(samples))
    places = places[(places > 1e-4) & (places < 1 - 1e-4)]  # float32 rounds what is near the ends otherwise
    ours, theirs = (np.searchsorted(sample, places, side="right") / count for sample in samples)
    distance = np.abs(ours - theirs).max()
    print(f"distance {distance:.3f}")
    assert distance < 2.7 * math.sqrt(2 / count)


def test_rates_of_mixing_and_switching():
    mixup = Mixup(1.0, 1.0, prob=0.7, switch_prob=0.2, num_classes=CLASSES)
    kinds = {"none": 0, "cutmix": 0, "mixup": 0}
    x, target = torch.stack([torch.zeros(3, 32, 32), torch.ones(3, 32, 32)]), torch.tensor([0, 1])
    for _ in range(600):
        values = mixup(x, target)[0][0].unique()
        if len(values) == 1 and values.item() not in (0, 1):
            kinds["mixup"] += 1
        elif len(values) == 2:
            kinds["cutmix"] += 1
        else:
            kinds["none"] += 1
    print(kinds)
    for kind, probability, slack in (("mixup", 0.7 * 0.8, 0), ("cutmix", 0.7 * 0.2, 12), ("none", 0.3, 12)):
        # Some rectangles have no pixels, or all.
        assert abs(kinds[kind] - 600 * probability) <= 5 * math.sqrt(600 * probability * (1 - probability)) + slack


def test_seed_pickle_layout_and_empty_batch():
    mixup = Mixup(1, 1, num_classes=CLASSES)  # integers are numbers, too
    x, target = batch(6)
    x = x.to(memory_format=torch.channels_last)
    results = []
    for mix in (mixup, pickle.loads(pickle.dumps(mixup))):
        torch.manual_seed(3)
        random.seed(len(results))  # which must not count
        np.random.seed(len(results))
        results.append([mix(x, target) for _ in range(6)])
    for (first, first_target), (second, second_target) in zip(*results):
        assert torch.equal(first, second) and torch.equal(first_target, second_target)
        assert first.is_contiguous(memory_format=torch.channels_last)
    mixed, soft = mixup(x[:0], target[:0])
    assert mixed.shape == (0, 3, 9, 12) and soft.shape == (0, CLASSES)
    assert mixup(x, target.to(torch.uint8))[1].shape == (6, CLASSES)
    assert repr(mixup) == (
        "Mixup(mixup_alpha=1.0, cutmix_alpha=1.0, prob=1.0, switch_prob=0.5, label_smoothing=0.1, num_classes=7)"
    )


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (
            {"mixup_alpha": -0.1},
            ValueError,
            "mixup_alpha=-0.1 is not allowed; it must be a finite number of at least 0",
        ),
        ({"cutmix_alpha": math.inf}, ValueError, "cutmix_alpha=inf is not allowed"),
        ({"cutmix_alpha": math.nan}, ValueError, "cutmix_alpha=nan is not allowed"),
        ({"mixup_alpha": None}, TypeError, "mixup_alpha must be a float, got NoneType"),
        ({"mixup_alpha": 0}, ValueError, "mixup_alpha and cutmix_alpha are both 0; one must be above 0"),
        ({"cutmix_minmax": (0.2, 0.8)}, ValueError, r"cutmix_minmax=\(0.2, 0.8\) is not provided by torchvision"),
        ({"mode": "elem"}, ValueError, "mode='elem' is not provided by torchvision, .* use 'batch'"),
        ({"mode": "pair"}, ValueError, "mode='pair' is not provided by torchvision"),
        ({"correct_lam": False}, ValueError, "correct_lam=False is not provided"),
        ({"prob": 1.1}, ValueError, "prob=1.1 is not allowed"),
        ({"switch_prob": -1}, ValueError, "switch_prob=-1 is not allowed"),
        ({"label_smoothing": 2}, ValueError, "label_smoothing=2 is not allowed"),
        ({"num_classes": 0}, ValueError, "num_classes=0 is not allowed"),
        ({"num_classes": 10.0}, TypeError, "num_classes must be an int, got float"),
        ({"multi_label": True}, TypeError, "unexpected keyword argument 'multi_label'"),
    ],
)
def test_rejects_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        Mixup(**arguments)


@pytest.mark.parametrize(
    "x, target, error, message",
    [
        (np.zeros((2, 3, 4, 4)), torch.zeros(2).long(), TypeError, "x must be a tensor, got ndarray"),
        (torch.zeros(2, 3, 4, 4), [0, 1], TypeError, "target must be a tensor, got list"),
        (torch.zeros(2, 3, 4, 4).byte(), torch.zeros(2).long(), TypeError, "x must be floating point, got torch.uint8"),
        (torch.zeros(2, 3, 4, 4), torch.zeros(2), TypeError, "target must hold class indices, got torch.float32"),
        (torch.zeros(2, 3, 4, 4), torch.zeros(2).bool(), TypeError, "target must hold class indices, got torch.bool"),
        (
            torch.zeros(3, 4, 4),
            torch.zeros(3).long(),
            ValueError,
            r"x must be \[N, C, H, W\] .* got \(3, 4, 4\) and \(3,\)",
        ),
        (torch.zeros(2, 3, 4, 4), torch.zeros(3).long(), ValueError, r"got \(2, 3, 4, 4\) and \(3,\)"),
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, 7).long(), ValueError, r"got \(2, 3, 4, 4\) and \(2, 7\)"),
        (torch.zeros(2, 3, 4, 4), torch.tensor([0, 7]), ValueError, "target must hold classes 0..6, got 7"),
        (torch.zeros(2, 3, 4, 4), torch.tensor([-1, 7]), ValueError, "target must hold classes 0..6, got -1"),
    ],
)
def test_rejects_batches(x, target, error, message):
    with pytest.raises(error, match=message):
        Mixup(num_classes=CLASSES)(x, target)
