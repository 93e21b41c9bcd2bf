"""Swapped models in a training loop: autocast, loss scaling, checkpointing, averages, copies, files, optimisers."""

from __future__ import annotations

import contextlib
import copy
import pickle
import subprocess
import sys

import numerics
import pytest
import swap_models
import swap_parity
import timm
import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import bbfast
from bbfast.swap import _fast

every_model = pytest.mark.parametrize("name", swap_models.SMALL)


@pytest.fixture(autouse=True)
def plain_backend():
    """The interpreter of Triton's kernels would take minutes."""
    with swap_parity.backend("torch"):
        yield


def pair(name: str, **arguments) -> tuple[nn.Module, nn.Module]:
    """(plain, swapped) with the same values."""
    plain = swap_models.small(name, swapped=False, **arguments)
    fused = copy.deepcopy(plain)
    bbfast.swap(fused)
    return plain, fused


def step(model: nn.Module, x: torch.Tensor, call=None, context=contextlib.nullcontext) -> dict[str, torch.Tensor]:
    """Output, gradients and buffers of one seeded step; the running statistics move."""
    model.zero_grad()
    torch.manual_seed(5)
    with context():
        output = (call or model)(x)
        loss = output.float().square().sum() if output.dtype != torch.float64 else output.square().sum()
    loss.backward()
    gradients = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
    return {"output": output.detach(), **gradients, **{key: buffer.clone() for key, buffer in model.named_buffers()}}


def assert_steps_agree(ours: dict, theirs: dict):
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-9, atol=1e-10, msg=lambda text, key=key: f"{key}: {text}")


# ---- precision and layout --------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_autocast_in_evaluation(name, memory_format):
    plain, fused = pair(name)
    x = swap_models.images().to(memory_format=memory_format)
    exact = copy.deepcopy(plain).double()(x.double()).detach()
    plain, fused = (model.to(memory_format=memory_format) for model in (plain, fused))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        theirs, ours = plain(x), fused(x)
    numerics.assert_within_rule("output", ours, exact, theirs)


@every_model
def test_autocast_in_training(name):
    """Each gradient, by the rule; its error is that of a bfloat16 chain, so the yardstick is the tensor's largest."""
    plain, fused = pair(name)
    exact_model, x = copy.deepcopy(plain).double(), swap_models.images(4)

    def autocast():
        return torch.autocast("cpu", torch.bfloat16)

    exact = step(exact_model.train(), x.double())
    theirs, ours = (step(model.train(), x, context=autocast) for model in (plain, fused))
    largest = max(value.abs().max().item() for key, value in exact.items() if not key.endswith("tracked"))
    for key, value in exact.items():
        assert ours[key].dtype == theirs[key].dtype, key
        if not value.is_floating_point():
            assert torch.equal(ours[key], theirs[key])
            continue
        our_error, their_error = ((got[key].double() - value).abs().max().item() for got in (ours, theirs))
        # Noise of a random bfloat16 chain: twice torch's own error, and some roundings of what flows through.
        allowed = 2 * their_error + 2**-8 * (4 * value.abs().max().item() + 1e-2 * largest)
        assert our_error <= allowed, f"{key}: error {our_error:.3g}, torch's {their_error:.3g}, allowed {allowed:.3g}"


def test_gradient_scaler():
    """Scaled losses, an overflow that skips a step, and the scale that follows."""
    plain, fused = pair("mobile")
    results = []
    for model in (plain.train(), fused.train()):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1)
        torch.manual_seed(1)
        for factor in (1.0, float("inf"), 1.0):
            loss = model(swap_models.images()).square().mean() * factor
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        results.append((scaler.get_scale(), torch.cat([p.detach().flatten() for p in model.parameters()])))
    assert results[0][0] == results[1][0] == 16.0
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-3, atol=1e-4)


@every_model
def test_channels_last_training(name):
    plain, fused = pair(name)
    plain, fused = (model.double().train().to(memory_format=torch.channels_last) for model in (plain, fused))
    x = swap_models.images().double().to(memory_format=torch.channels_last)
    assert_steps_agree(step(fused, x), step(plain, x))


# ---- activation checkpointing ----------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(name, use_reentrant):
    """With stochastic depth, whose draws the second pass must repeat; statistics move twice, as they do in timm."""
    plain, fused = pair(name, drop_path_rate=0.4)
    x = swap_models.images(3).double().requires_grad_()

    def checkpointed(model):
        return lambda x: checkpoint(model, x, use_reentrant=use_reentrant)

    theirs, ours = (step(model.double().train(), x, checkpointed(model)) for model in (plain, fused))
    assert_steps_agree(ours, theirs)
    assert x.grad is not None


@pytest.mark.parametrize("name", ["swin", "convnext", "resnet"])
def test_grad_checkpointing_of_timm(name):
    plain, fused = pair(name, drop_path_rate=0.4)
    x = swap_models.images(3).double()
    for model in (plain, fused):
        model.double().train().set_grad_checkpointing()
    assert_steps_agree(step(fused, x), step(plain, x))


# ---- copies and files ------------------------------------------------------------------------------------------


def fast_blocks(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, _fast.Fast)]


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "AveragedModel": lambda model: AveragedModel(model).module,
    "ModelEmaV3": lambda model: ModelEmaV3(model).module,
}


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
def test_copies_are_swapped_and_restore_on_their_own(make):
    model, x = swap_models.small("mobile"), swap_models.images()
    twin = make(model).eval()
    with torch.no_grad():
        assert fast_blocks(twin) == fast_blocks(model) != []
        assert torch.equal(twin(x), model(x))
        bbfast.restore(twin)
        assert not fast_blocks(twin)
        assert fast_blocks(model)
        torch.testing.assert_close(twin(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", ["AveragedModel", "ModelEmaV3"])
def test_averages_follow_a_swapped_model(make):
    """The average of a swapped model is that of a plain one."""
    plain, fused = pair("mobile")
    averages = []
    for model in (plain.double().train(), fused.double().train()):
        if make == "AveragedModel":
            average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=False)
            update = average.update_parameters
        else:
            average = ModelEmaV3(model, decay=0.9)
            update = average.update
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        torch.manual_seed(2)
        for _ in range(3):
            optimizer.zero_grad()
            model(swap_models.images().double()).square().mean().backward()
            optimizer.step()
            update(model)
        averages.append(average.module.state_dict())
    for key, value in averages[0].items():
        torch.testing.assert_close(averages[1][key], value, rtol=1e-8, atol=1e-9)


LOAD = """
import sys
import torch
model, x, expected = torch.load(sys.argv[1], weights_only=False)
with torch.no_grad():
    actual = model(x)
torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
import bbfast
print(len(bbfast.restore(model).rows))
torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
assert not bbfast.restore(model).rows
"""


def test_whole_model_file_in_a_process_that_imported_torch_alone(tmp_path):
    model, x = swap_models.small("resnet"), swap_models.images()
    with torch.no_grad():
        torch.save((model, x, model(x)), tmp_path / "model.pt")
    command = [sys.executable, "-W", "ignore", "-c", LOAD, str(tmp_path / "model.pt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(fast_blocks(model))


@every_model
def test_states_load_both_ways(name):
    plain, fused = swap_models.small(name, swapped=False), swap_models.small(name)
    x = swap_models.images()
    with torch.no_grad():
        for source, target in ((plain, fused), (swap_models.small(name), plain)):
            target.load_state_dict(source.state_dict(), strict=True)
            torch.testing.assert_close(target(x), source(x), rtol=1e-3, atol=1e-4)


# ---- in the middle of a training -------------------------------------------------------------------------------


@every_model
def test_swap_and_restore_in_mid_training(name):
    """Six steps of AdamW, swapped for the middle two: losses, parameters and the optimiser's state are the same."""

    def train(swapping: bool):
        torch.manual_seed(4)
        model = swap_parity.randomise(swap_models.SMALL[name](drop_path_rate=0.2)).double().train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses = []
        for index in range(6):
            if swapping and index == 2:
                identities = [id(parameter) for parameter in model.parameters()]
                bbfast.swap(model)
                assert [id(p) for group in optimizer.param_groups for p in group["params"]] == identities
            if swapping and index == 4:
                bbfast.restore(model)
            loss = model(swap_models.images(3).double()).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return torch.tensor(losses), optimizer.state_dict()["state"]

    (ours, our_state), (theirs, their_state) = train(True), train(False)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    assert our_state.keys() == their_state.keys()
    for index, moments in their_state.items():
        torch.testing.assert_close(our_state[index]["step"], moments["step"])
        torch.testing.assert_close(our_state[index]["exp_avg_sq"], moments["exp_avg_sq"], rtol=1e-5, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", swap_models.WHOLE)
def test_whole_model_under_autocast(name):
    plain = swap_models.whole(name, swapped=False)
    fused, x = copy.deepcopy(plain), swap_models.images()
    bbfast.swap(fused)
    with torch.no_grad():
        exact = copy.deepcopy(plain).double()(x.double())
        with torch.autocast("cpu", torch.bfloat16):
            numerics.assert_within_rule("output", fused(x), exact, plain(x))


def test_models_of_ours_and_timms_swapped_agree_under_one_checkpoint():
    ours = swap_parity.randomise(bbfast.create_model("mobilenetv3_small_050", num_classes=5)).eval()
    theirs = timm.create_model("mobilenetv3_small_050", num_classes=5).eval()
    theirs.load_state_dict(ours.state_dict())
    bbfast.swap(theirs)
    x = swap_models.images()
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-3, atol=1e-4)
