"""Models of bbfast and timm with the same random weights, and how near their results must be."""

from __future__ import annotations

import math

import numerics
import pytest
import timm
import torch
from torch import nn

import bbfast

TRAINING = {"num_classes": 7, "drop_path_rate": 0.3, "drop_rate": 0.2}


# What models fill their weights with, one operation or several after the other.
FILLING = ("normal_", "uniform_", "erfinv_", "mul_", "add_", "clamp_")


def on_meta(library, name: str, **arguments) -> nn.Module:
    """The model without memory. To draw random numbers that nobody can read takes longer than all the rest."""

    def only_with_memory(fill):
        return lambda tensor, *args, **kwargs: tensor if tensor.is_meta else fill(tensor, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        for fill in FILLING:
            patch.setattr(torch.Tensor, fill, only_with_memory(getattr(torch.Tensor, fill)))
        return library.create_model(name, device="meta", **arguments)


def random_state(name: str, library=bbfast, **arguments) -> dict[str, torch.Tensor]:
    """Random values for every parameter and buffer, so that no block hides behind a zero or a one."""
    return random_values(on_meta(library, name, **arguments).state_dict())


def random_values(shapes: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`random_state` for the state of a model."""
    state = {}
    for key, like in shapes.items():
        if key.endswith("num_batches_tracked"):
            value = torch.tensor(0)
        elif key.endswith("running_var"):
            value = torch.empty(like.shape).uniform_(0.5, 2)
        elif key.endswith("running_mean"):
            value = 0.3 * torch.randn(like.shape)
        elif like.dim() == 1 and key.endswith("weight"):  # of BatchNorm
            value = torch.empty(like.shape).uniform_(0.5, 1.5) * torch.randn(like.shape).sign()
        elif like.dim() == 1:
            value = 0.5 * torch.randn(like.shape)
        else:
            value = torch.randn(like.shape) / math.sqrt(like[0].numel())
        state[key] = value
    return state


def make(library, name: str, state: dict, dtype=torch.float32, **arguments) -> nn.Module:
    """The model with `state`, without the time that initialising it takes."""
    model = on_meta(library, name, dtype=dtype, **arguments).to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "init_non_persistent_buffers"):  # timm's: they are not in a state_dict
            module.init_non_persistent_buffers()
    model.load_state_dict(state)
    return model


def forward(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(x.to(next(model.parameters()).dtype))


def training_step(model: nn.Module, x: torch.Tensor, grad_out: torch.Tensor, *, train: bool = True) -> dict:
    """Output, gradients of input and parameters, and running statistics after one seeded pass."""
    dtype = next(model.parameters()).dtype
    x = x.to(dtype, copy=True).requires_grad_()
    model.train(train)
    torch.manual_seed(7)  # the same paths and features are dropped in each model
    y = model(x)
    y.backward(grad_out.to(dtype))
    return {
        "output": y.detach(),
        "gradient of the input": x.grad,
        **{f"gradient of {key}": parameter.grad for key, parameter in model.named_parameters()},
        **{f"buffer {key}": buffer for key, buffer in model.named_buffers() if key in model.state_dict()},
    }


def assert_forward_agrees(name: str, size: tuple[int, int], batch: int = 2, **arguments) -> None:
    """Compares logits in eval mode and single precision by the rule."""
    state = random_state(name, **arguments)
    x = torch.randn(batch, 3, *size)
    ours = forward(make(bbfast, name, state, **arguments), x)
    theirs = forward(make(timm, name, state, **arguments), x)
    exact = forward(make(timm, name, state, torch.float64, **arguments), x)
    numerics.assert_within_rule("logits", ours, exact, theirs)


def assert_training_agrees(
    name: str, size: tuple[int, int], *, train: bool = True, batch: int = 3, single: bool = True, **arguments
) -> None:
    """Compares output, gradients and running statistics of one step, tensor by tensor, in both precisions.

    Double precision leaves nothing to hide behind: nine digits. Single precision goes by the rule. There an activation
    that rounding takes across a jump in ReLU's slope moves whole gradients, and BatchNorm blows rounding up, so that
    errors differ several times over from one rounding of the parameters to the next, in timm as in ours. Of three
    roundings our middle error must keep within the rule's twice of timm's largest.

    Args:
        single: whether to compare in single precision too, which is three quarters of the work.
    """
    arguments = {**TRAINING, **arguments}
    state = random_state(name, **arguments)
    x, grad_out = torch.randn(batch, 3, *size), torch.randn(batch, 7)

    def step(library, dtype=torch.float32, state=state):
        return training_step(make(library, name, state, dtype, **arguments), x, grad_out, train=train)

    exact = step(timm, torch.float64)
    assert_equal_to_nine_digits(step(bbfast, torch.float64), exact)
    if not single:
        return
    states = [state, rounded_anew(state), rounded_anew(state)]
    ours, theirs = ([step(library, state=rounded) for rounded in states] for library in (bbfast, timm))
    for key, value in exact.items():
        if not key.endswith("num_batches_tracked"):
            our_middle = by_error([results[key] for results in ours], value)[1]
            their_worst = by_error([results[key] for results in theirs], value)[-1]
            rows = batch * (size[0] // 2) * (size[1] // 2) if key.startswith("gradient") else 1  # pixels of the stem
            numerics.assert_within_rule(key, our_middle, value, their_worst, rows=rows)


def by_error(results: list[torch.Tensor], exact: torch.Tensor) -> list[torch.Tensor]:
    """`results` from the one nearest to `exact` to the one farthest from it."""
    return sorted(results, key=lambda result: (result.double() - exact).abs().max().item())


def assert_equal_to_nine_digits(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    # The yardstick for a bias in front of a BatchNorm, whose own gradient cancels to nothing.
    scale = max(value.abs().max().item() for key, value in theirs.items() if key.startswith("gradient"))
    for key, value in theirs.items():
        error = (ours[key] - value).abs().max().item()
        allowed = 1e-9 * value.abs().max().item() + 1e-12 * scale
        assert error <= allowed, f"{key}: error {error:.3g} > {allowed:.3g}"


def rounded_anew(state: dict) -> dict:
    """`state` with each value moved by one unit in the last place, up or down."""
    return {
        key: value.nextafter(2 * value * torch.rand(value.shape)) if value.is_floating_point() else value
        for key, value in state.items()
    }
