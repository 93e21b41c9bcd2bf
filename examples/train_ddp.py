"""Trains a swapped timm model on several GPUs, or in several processes on the CPU, with DistributedDataParallel.

torchrun --nproc-per-node 2 examples/train_ddp.py [--model mobilenetv3_small_100] [--steps 20] [--sync-bn]

The images are random, and each class has a colour of its own to be found; put your data set where `make_batch` is.
Uses nccl where there are GPUs, with bfloat16 autocast, and gloo elsewhere. Needs timm.
"""

from __future__ import annotations

import argparse
import os
import time

import timm
import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import bbfast


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mobilenetv3_small_100", help="any of timm's names")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=32, help="images in each process")
    parser.add_argument("--size", type=int, default=128, help="of the images, in pixels a side")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--sync-bn", action="store_true", help="batch statistics over all processes (GPUs only)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    return parser.parse_args(argv)


def set_up(device: str) -> torch.device:
    """Joins the group of processes that torchrun started; returns this process's device."""
    if "LOCAL_RANK" not in os.environ:
        raise SystemExit("start this with torchrun, e.g. torchrun --nproc-per-node 2 examples/train_ddp.py")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    return device


def make_model(options: argparse.Namespace, device: torch.device) -> DistributedDataParallel:
    """timm's model: batch statistics of all processes if wanted, then swap, then DDP."""
    torch.manual_seed(0)
    model = timm.create_model(options.model, num_classes=options.classes).to(device, memory_format=torch.channels_last)
    if options.sync_bn:
        model = convert_sync_batchnorm(model)
    report = bbfast.swap(model)
    if dist.get_rank() == 0:
        print(f"{options.model} in {dist.get_world_size()} processes on {device.type}: {report.totals}", flush=True)
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)


def make_batch(
    options: argparse.Namespace, device: torch.device, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    targets = torch.randint(options.classes, (options.batch_size,), generator=generator)
    images = torch.randn((options.batch_size, 3, options.size, options.size), generator=generator)
    angle = targets * (2 * torch.pi / options.classes)
    images += torch.stack((angle.cos(), angle.sin(), -angle.cos()), 1)[:, :, None, None]
    return images.to(device, memory_format=torch.channels_last), targets.to(device)


def train(model: DistributedDataParallel, options: argparse.Namespace, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(dist.get_rank())  # each process has images of its own
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr)
    model.train()
    for step in range(1, options.steps + 1):
        start = time.perf_counter()
        images, targets = make_batch(options, device, generator)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = cross_entropy(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean_loss = loss.detach() / dist.get_world_size()
        dist.all_reduce(mean_loss)
        mean_loss = mean_loss.item()  # waits for the GPU, so the time is that of the whole step
        if dist.get_rank() == 0:
            images_per_second = options.batch_size * dist.get_world_size() / (time.perf_counter() - start)
            print(f"step {step}/{options.steps}  loss {mean_loss:.4f}  {images_per_second:.0f} images/s", flush=True)


def main(argv: list[str] | None = None) -> None:
    options = parse_arguments(argv)
    device = set_up(options.device)
    try:
        train(make_model(options, device), options, device)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
