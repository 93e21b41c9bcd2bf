"""What each of two processes does; see test_swap_distributed.py."""

from __future__ import annotations

import copy
import warnings

import swap_models
import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_functional
import torch.nn.functional as F
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import bbfast

WORLD = 2
warnings.simplefilter("ignore")


def gloo_sync_batch_norm(self: nn.SyncBatchNorm, x: torch.Tensor) -> torch.Tensor:
    """torch's SyncBatchNorm runs on GPUs only; this is its arithmetic in operators that gloo has."""
    if not self.training or not dist.is_initialized():
        return nn.BatchNorm2d.forward(self, x)
    self.num_batches_tracked.add_(1)
    mean = dist_functional.all_reduce(x.mean((0, 2, 3))) / WORLD
    centred = x - mean[:, None, None]
    var = dist_functional.all_reduce(centred.square().mean((0, 2, 3))) / WORLD
    count = WORLD * x.numel() // x.shape[1]
    with torch.no_grad():
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var * count / (count - 1), self.momentum)
    return (
        F.batch_norm(centred, torch.zeros_like(mean), torch.ones_like(mean), None, None, False, 0.0, 0.0)
        * (self.weight / (var + self.eps).sqrt())[:, None, None]
        + self.bias[:, None, None]
    )


def models() -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """(plain, swapped, a batch for all processes), the same in each process."""
    torch.manual_seed(11)
    plain = swap_models.small("mobile", swapped=False).double().train()
    fused = copy.deepcopy(plain)
    bbfast.swap(fused)
    return plain, fused, swap_models.images(6).double()


def share(x: torch.Tensor, rank: int) -> torch.Tensor:
    return x.chunk(WORLD)[rank]


def results(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of the mean over the batch, and buffers afterwards, under the names of the model itself."""
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    model(x).square().sum(1).mean().backward()
    gradients = {key: parameter.grad for key, parameter in inner.named_parameters()}
    gradients = {key: grad.full_tensor() if isinstance(grad, DTensor) else grad for key, grad in gradients.items()}
    return {**gradients, **{f"buffer {key}": value for key, value in inner.named_buffers()}}


def assert_equal(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-9, atol=1e-11, msg=lambda text, key=key: f"{key}: {text}")


# Before anything is swapped: whose forward is another one than at the first swap is not.
nn.SyncBatchNorm.forward = gloo_sync_batch_norm
DistributedDataParallel._passing_sync_batchnorm_handle = lambda self, module: None  # refuses CPU modules


# ---- DDP -------------------------------------------------------------------------------------------------------


def ddp(rank: int) -> None:
    """Swapped and plain have the same gradients and statistics, each process with its own batch statistics."""
    plain, fused, x = models()
    theirs = results(DistributedDataParallel(plain), share(x, rank))
    assert_equal(results(DistributedDataParallel(fused), share(x, rank)), theirs)


def ddp_swapped_afterwards(rank: int) -> None:
    """Blocks are found inside the wrapper, and what the wrapper remembers of them stays true."""
    plain, _, x = models()
    theirs = results(DistributedDataParallel(copy.deepcopy(plain)), share(x, rank))
    wrapped = DistributedDataParallel(plain)
    assert bbfast.swap(wrapped).swapped
    assert_equal(results(wrapped, share(x, rank)), theirs)


def ddp_with_sync_batch_norm(rank: int) -> None:
    """Converted before and after the swap: the gradients are those of one process with the whole batch."""
    plain, fused, x = models()
    alone = results(copy.deepcopy(plain), x)
    before = convert_sync_batchnorm(copy.deepcopy(plain))
    blocks = len(bbfast.swap(before).swapped)
    assert blocks >= 3
    after = convert_sync_batchnorm(fused)
    for model in (before, after):
        assert any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
        assert_equal(results(DistributedDataParallel(model), share(x, rank)), alone)


# ---- FSDP2 -----------------------------------------------------------------------------------------------------


def shard(model: nn.Module) -> nn.Module:
    """Each block and then the whole, as recipes do it."""
    for block in model[1:4]:
        fully_shard(block)
    return fully_shard(model)


def fsdp_after_swap(rank: int) -> str:
    """Blocks stay fast under FSDP's subclass of their class; gradients are those of plain DDP."""
    plain, fused, x = models()
    theirs = results(DistributedDataParallel(plain), share(x, rank))
    assert_equal(results(shard(fused), share(x, rank)), theirs)
    try:
        bbfast.restore(fused)
    except bbfast.SwapError as error:
        return str(error)
    raise AssertionError("restore gave no error")


def fsdp_before_swap(rank: int) -> dict[str, str]:
    """What was sharded is left alone, and the numbers stay right. Returns the reasons by path."""
    plain, _, x = models()
    theirs = results(DistributedDataParallel(copy.deepcopy(plain)), share(x, rank))
    sharded = shard(plain)
    report = bbfast.swap(sharded)
    assert_equal(results(sharded, share(x, rank)), theirs)
    return {row.path: row.reason for row in report.skipped}


def fsdp_of_the_root_before_swap(rank: int) -> dict[str, str]:
    plain, _, x = models()
    theirs = results(DistributedDataParallel(copy.deepcopy(plain)), share(x, rank))
    sharded = fully_shard(plain)
    report = bbfast.swap(sharded)
    assert_equal(results(sharded, share(x, rank)), theirs)
    return {row.path: row.reason for row in report.skipped}


def fsdp_of_inner_layers_after_swap(rank: int) -> None:
    """A layer that the fused block would bypass is sharded on its own: the block notices and calls it."""
    plain, fused, x = models()
    theirs = results(DistributedDataParallel(plain), share(x, rank))
    fully_shard(fused[2].conv_pw)
    fully_shard(fused)
    assert_equal(results(fused, share(x, rank)), theirs)
