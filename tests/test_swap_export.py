"""Models of ours and swapped ones in ONNX, traces, torch.export and AOTInductor, and under torch.func."""

from __future__ import annotations

import contextlib
import copy
import inspect
import subprocess
import sys

import pytest
import swap_models
import swap_parity
import torch
from torch import func, nn
from torch.autograd import forward_ad

import bbfast

BATCH = torch.export.Dim("batch", min=1, max=64)


def ours(name: str, **arguments) -> nn.Module:
    model = bbfast.create_model(name, num_classes=swap_models.CLASSES, **arguments)
    return swap_parity.randomise(model).eval()


MODELS = {
    **{name: lambda name=name: swap_models.small(name) for name in swap_models.SMALL},
    "our resnet18": lambda: ours("resnet18"),
    "our mobilenetv3_small_050": lambda: ours("mobilenetv3_small_050"),
    "our swin": lambda: ours(
        "swin_tiny_patch4_window7_224", img_size=64, window_size=5, embed_dim=16, depths=(2, 1), num_heads=(2, 4)
    ),
    "our convnext_atto": lambda: ours("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 16, 16)),
}


def all_but_few(slow: tuple[str, ...]) -> pytest.MarkDecorator:
    marks = {name: [pytest.mark.slow] if name in slow else [] for name in MODELS}
    return pytest.mark.parametrize("build", [pytest.param(MODELS[name], id=name, marks=marks[name]) for name in MODELS])


every_model = all_but_few(("our resnet18",))
# Exporters take seconds for each.
one_model = all_but_few(tuple(name for name in MODELS if name != "mobile"))


@pytest.fixture(autouse=True)
def plain_backend():
    """Where a fused op runs all the same, the interpreter of Triton's kernels would take minutes."""
    torch._dynamo.reset()
    with swap_parity.backend("torch"):
        yield


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5)


def python(code: str, *arguments) -> str:
    """What a fresh process prints that runs `code`."""
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- ONNX and traces -------------------------------------------------------------------------------------------


def run_onnx(program, path, x: torch.Tensor) -> torch.Tensor:
    """The output by onnxruntime, or where that is not installed by ONNX's reference."""
    program.save(str(path))
    feed = {program.model.graph.inputs[0].name: x.numpy()}
    try:
        import onnxruntime
    except ModuleNotFoundError:
        from onnx.reference import ReferenceEvaluator

        return torch.from_numpy(ReferenceEvaluator(str(path)).run(None, feed)[0])
    return torch.from_numpy(onnxruntime.InferenceSession(str(path)).run(None, feed)[0])


@one_model
def test_onnx_with_any_batch(build, tmp_path):
    pytest.importorskip("onnx", reason="ONNX export needs onnx and onnxscript, which are not installed")
    pytest.importorskip("onnxscript", reason="ONNX export needs onnx and onnxscript, which are not installed")
    model, x = build(), swap_models.images(3)
    with bbfast.exportable():
        program = torch.onnx.export(
            model, (swap_models.images(),), dynamo=True, dynamic_shapes=({0: BATCH},), verbose=False
        )
    with torch.no_grad():
        assert_close(run_onnx(program, tmp_path / "model.onnx", x), model(x))


@pytest.mark.slow
def test_onnx_under_autocast():
    """Convolutions are bfloat16 in the graph, as in that of the model before the swap. (ONNX's interpreters on the CPU
    do not run those.)
    """
    pytest.importorskip("onnx", reason="ONNX export needs onnx and onnxscript, which are not installed")
    pytest.importorskip("onnxscript", reason="ONNX export needs onnx and onnxscript, which are not installed")
    with bbfast.exportable(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        program = torch.onnx.export(swap_models.small("mobile"), (swap_models.images(),), dynamo=True, verbose=False)
    convolutions = [node for node in program.model.graph if node.op_type == "Conv"]
    assert len(convolutions) == 9
    assert {node.outputs[0].dtype.name for node in convolutions} == {"BFLOAT16"}


class Autocast(nn.Module):
    """A model that brings its autocast along, so that it is part of what is exported."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.model(x)


@pytest.mark.parametrize("plain", [False, True])
def test_torch_export_of_autocast(plain):
    model, x = Autocast(swap_models.small("mobile")), swap_models.images()
    with torch.no_grad():
        expected = model(x)
        with bbfast.exportable() if plain else contextlib.nullcontext():
            program = torch.export.export(model, (x,))
        actual = program.module()(x)
    torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.03 * expected.abs().max().item())


@every_model
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*deprecated:FutureWarning")
def test_trace(build):
    """The trace holds operators of torch alone, and nothing of it depends on the block that made it."""
    model, x = build(), swap_models.images()
    with torch.no_grad():
        with bbfast.exportable():
            traced = torch.jit.trace(model, swap_models.images())
        assert "bbfast::" not in str(traced.inlined_graph)
        assert_close(traced(x), model(x))


@every_model
def test_symbolic_trace_of_fx(build):
    model, x = build(), swap_models.images()
    if any(
        type(module).__name__ == "SwinTransformer" for module in model.modules() if "timm" in type(module).__module__
    ):
        pytest.skip("timm's Swin asks for sizes that torch.fx does not know, swapped or not")
    with torch.no_grad():
        assert_close(torch.fx.symbolic_trace(model)(x), model(x))


# ---- torch.export and AOTInductor ------------------------------------------------------------------------------


def test_names_of_inputs_stay():
    """Exporters take them from the signature of forward, that of a swapped root included."""
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
    fused = copy.deepcopy(plain)
    assert bbfast.swap(fused).swapped
    assert inspect.signature(fused.forward) == inspect.signature(plain.forward)
    ours, theirs = (
        torch.export.export(model, (swap_models.images(),), dynamic_shapes=({0: BATCH},)) for model in (fused, plain)
    )
    assert ours.graph_signature.user_inputs == theirs.graph_signature.user_inputs


@one_model
@pytest.mark.parametrize("plain", [False, True])
def test_torch_export(build, plain, tmp_path):
    """With the fused ops in the graph; under exportable, with operators of torch alone."""
    model, x = build(), swap_models.images(3)
    with torch.no_grad():
        expected = model(x)
        if plain:
            with bbfast.exportable():
                program = torch.export.export(model, (swap_models.images(),), dynamic_shapes=({0: BATCH},))
        else:
            program = torch.export.export(model, (swap_models.images(),), dynamic_shapes=({0: BATCH},))
        targets = " ".join(str(node.target) for node in program.graph.nodes)
        if plain or build is MODELS["mobile"]:
            assert ("bbfast." in targets) != plain
        torch.export.save(program, tmp_path / "model.pt2")
        assert_close(torch.export.load(tmp_path / "model.pt2").module()(x), expected)


LOAD = """
import sys
import torch
{imports}
x, expected = torch.load(sys.argv[2])
with torch.no_grad():
    actual = torch._inductor.aoti_load_package(sys.argv[1])(x)
torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5)
print("equal")
"""


@pytest.mark.slow
@pytest.mark.parametrize("plain", [False, True])
def test_aot_inductor_package(plain, tmp_path):
    """A fresh process runs the package: with the fused ops once it has imported bbfast, in plain torch without."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, groups=1), nn.BatchNorm2d(8), nn.SiLU(), swap_models.Head(8))
    swap_parity.randomise(model).eval()
    assert bbfast.swap(model).swapped
    x, path = swap_models.images(3), str(tmp_path / "model.pt2")
    with torch.no_grad():
        expected = model(x)
        if plain:
            with bbfast.exportable():
                program = torch.export.export(model, (swap_models.images(),), dynamic_shapes=({0: BATCH},))
        else:
            program = torch.export.export(model, (swap_models.images(),), dynamic_shapes=({0: BATCH},))
        torch._inductor.aoti_compile_and_package(program, package_path=path)
        assert_close(torch._inductor.aoti_load_package(path)(x), expected)
    torch.save((x, expected), tmp_path / "expected.pt")
    code = LOAD.format(imports="" if plain else "import bbfast")
    assert python(code, path, tmp_path / "expected.pt").endswith("equal\n")


# ---- torch.func ------------------------------------------------------------------------------------------------


def functional(model: nn.Module):
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    return lambda parameters, x: func.functional_call(model, (parameters, buffers), (x,)), parameters


@every_model
def test_gradients_per_sample(build):
    """vmap(grad), beside one backward pass for each sample."""
    model, x = build(), swap_models.images().to(memory_format=torch.channels_last)
    call, parameters = functional(model)
    together = func.vmap(func.grad(lambda p, x: call(p, x[None]).square().sum()), in_dims=(None, 0))(parameters, x)
    for index, sample in enumerate(x):
        model.zero_grad()
        model(sample[None]).square().sum().backward()
        for key, parameter in model.named_parameters():
            scale = parameter.grad.abs().max().item()
            torch.testing.assert_close(together[key][index], parameter.grad, rtol=1e-3, atol=1e-4 * scale + 1e-5)


@every_model
def test_vmap(build):
    model, x = build(), swap_models.images(6)
    with torch.no_grad():
        assert_close(func.vmap(model)(x.unflatten(0, (3, 2))).flatten(0, 1), model(x))


@every_model
def test_derivatives_along_a_direction(build):
    """jvp, forward-mode differentiation by hand, and a row of jacrev say the same."""
    model, x = build().double(), swap_models.images(1).double()
    direction = torch.randn_like(x)
    with torch.no_grad():
        _, along = func.jvp(model, (x,), (direction,))
        with forward_ad.dual_level():
            by_hand = forward_ad.unpack_dual(model(forward_ad.make_dual(x, direction))).tangent
    jacobian = func.jacrev(model)(x)
    torch.testing.assert_close(along, by_hand)
    torch.testing.assert_close((jacobian * direction).sum((2, 3, 4, 5)), along)


@pytest.mark.parametrize("name", swap_models.SMALL)
def test_gradient_penalty(name):
    """Gradients of gradients: those of the model without a swap, under exportable; refused outside of it."""
    plain = swap_models.small(name, swapped=False).double()
    x = swap_models.images(1).double()

    def penalty(model):
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(model(leaf).square().sum(), leaf, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), [*model.parameters()], materialize_grads=True)

    theirs = penalty(plain)
    fused = bbfast.swap(plain).swapped
    with bbfast.exportable():
        torch.testing.assert_close(penalty(plain), theirs)
    if fused:
        with pytest.raises(RuntimeError, match=r"with bbfast\.exportable\(\)"):
            penalty(plain)
