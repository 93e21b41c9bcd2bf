"""conv_bn_act on the CPU per layer: pointwise of MobileNetV3-Large or 3x3 of ResNet-50; eager, each kernel backend, and
for pointwise layers bare products.

python benchmarks/bench_conv_bn_act.py --batch 8 --threads 2 --kernel 1
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

import torch
import torch.nn.functional as F

from bbfast import extension
from bbfast.ops import conv_bn_act
from bbfast.reference.conv_bn_act import conv_bn_act as reference

# (C, O, H = W, activation, how often) at 224 x 224, stride 1.
POINTWISE_LAYERS = [
    (16, 16, 112, "identity", 1),
    (16, 64, 112, "relu", 1),
    (64, 24, 56, "identity", 1),
    (24, 72, 56, "relu", 2),
    (72, 24, 56, "identity", 1),
    (72, 40, 28, "identity", 1),
    (40, 120, 28, "relu", 2),
    (120, 40, 28, "identity", 2),
    (40, 240, 28, "hardswish", 1),
    (240, 80, 14, "identity", 1),
    (80, 200, 14, "hardswish", 1),
    (200, 80, 14, "identity", 1),
    (80, 184, 14, "hardswish", 2),
    (184, 80, 14, "identity", 2),
    (80, 480, 14, "hardswish", 1),
    (480, 112, 14, "identity", 1),
    (112, 672, 14, "hardswish", 2),
    (672, 112, 14, "identity", 1),
    (672, 160, 7, "identity", 1),
    (160, 960, 7, "hardswish", 3),
    (960, 160, 7, "identity", 2),
]
LAYERS_3X3 = [
    (64, 64, 56, "relu", 3),
    (128, 128, 28, "relu", 3),
    (256, 256, 14, "relu", 5),
    (512, 512, 7, "relu", 2),
]


def providers(batch: int, channels: int, out_channels: int, size: int, act: str, kernel: int) -> dict:
    """Functions that run one layer on channels_last input, which it pads to its own size."""
    x = torch.randn(batch, channels, size, size).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(out_channels, channels, kernel, kernel) / (kernel * channels**0.5)
    bn = [torch.rand(out_channels) + 0.5 for _ in range(4)]
    padding = kernel // 2
    geometry = ((1, 1), (padding,) * 4, (1, 1), 1)

    def forced(backend: str):
        def run():
            os.environ["BBFAST_BACKEND"] = backend
            return conv_bn_act(x, weight, *bn, padding=padding, act=act)

        return run

    return {
        "eager": lambda: reference(x, weight, None, *bn, None, *geometry, False, 0.1, 1e-5, act),
        "onednn": forced("onednn"),
        **({"cpp": forced("cpp")} if extension.load() else {}),
        **({"matmul": lambda: F.linear(x.permute(0, 2, 3, 1), weight.flatten(1))} if kernel == 1 else {}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--kernel", type=int, choices=(1, 3), default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    totals: dict[str, float] = {}
    print(f"{'layer':28} milliseconds, median (billion multiply-adds per second)")
    for channels, out_channels, size, act, count in POINTWISE_LAYERS if args.kernel == 1 else LAYERS_3X3:
        with torch.inference_mode():
            runs = providers(args.batch, channels, out_channels, size, act, args.kernel)
            times = {name: [] for name in runs}
            for _ in range(args.repeats):
                for name, run in runs.items():
                    run()
                    start = time.perf_counter()
                    run()
                    times[name].append(1e3 * (time.perf_counter() - start))
        work = args.batch * size * size * channels * out_channels * args.kernel**2 / 1e6
        cells = []
        for name, values in times.items():
            median = statistics.median(values)
            totals[name] = totals.get(name, 0.0) + count * median
            cells.append(f"{name} {median:.3f} ({work / median:.0f})")
        print(f"{channels:4} -> {out_channels:4} @ {size:3} {act:10} " + "  ".join(cells), flush=True)
    print("all layers of the model: " + "  ".join(f"{name} {total:.2f} ms" for name, total in totals.items()))


if __name__ == "__main__":
    main()
