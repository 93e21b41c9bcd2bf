"""Whole models for the harness: timm's, compiled or swapped, and bbfast's, in inference and training.

All providers of a case have the same weights, images, memory format and precision:

- Memory format: channels_last for networks of convolutions, which is quicker for eager on GPUs and CPUs and what timm
  advises; contiguous for the others, whose only convolution cuts patches. See `is_convolutional`.
- Precision: fp32 leaves everything as torch has it. Inference in bf16 has bf16 weights. fp16, and training in either,
  is autocast over float32 weights, with a scaled loss for fp16.
- Training is forward, cross entropy, backward and a step of SGD with momentum. The learning rate is 0: every kernel
  runs, and all rounds of all providers see the same weights. Dropout and stochastic depth are set to 0, because
  compiled code draws other random numbers than eager does, and what drops other paths cannot be compared.
- Inference is under `torch.no_grad`, not `inference_mode`: CUDA graphs that were recorded in the latter break those
  that are recorded outside of it later in the process.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import timm
import torch
from torch import nn

import bbfast
from bbfast import dispatch
from bbfast.benchmarks import harness
from bbfast.benchmarks.harness import Provider, Runner, Settings
from bbfast.benchmarks.judge import DTYPES, Values

MODES = ("infer", "train")
SEED = 0
# Below this inference on a GPU waits for launches, in networks of many small layers; then graphs are compared.
GRAPHS_UP_TO_BATCH = 16


@dataclass(frozen=True)
class Recipe:
    """How a provider makes its model.

    Attributes:
        ours: bbfast's class, not timm's.
        sdpa: attention by torch's scaled_dot_product_attention where timm writes it out.
        swapped: `bbfast.swap` is applied.
        compiled: the mode of `torch.compile`; None does not compile.
    """

    ours: bool = False
    sdpa: bool = False
    swapped: bool = False
    compiled: str | None = None


PROVIDERS = {
    "eager": Recipe(),
    "eager+sdpa": Recipe(sdpa=True),
    "compile": Recipe(compiled="default"),
    "compile+sdpa": Recipe(compiled="default", sdpa=True),
    "compile max-autotune": Recipe(compiled="max-autotune"),
    "compile reduce-overhead": Recipe(compiled="reduce-overhead"),
    "bbfast": Recipe(ours=True),
    "bbfast+compile": Recipe(ours=True, compiled="default"),
    "swapped": Recipe(swapped=True),
    "swapped+compile": Recipe(swapped=True, compiled="default"),
}
# The others are for GPUs (reduce-overhead is CUDA graphs, max-autotune compiles for minutes) or tell little more.
ON_CPU = ("eager", "compile", "bbfast", "bbfast+compile")
# Modes of torch.compile that replay CUDA graphs by themselves.
WITH_GRAPHS = ("max-autotune", "reduce-overhead")


@dataclass(frozen=True)
class Case:
    """What one table is about. `dtype` is one of `judge.DTYPES`, `mode` one of `MODES`, `image_size` in pixels."""

    model: str
    mode: str
    batch: int
    image_size: int
    dtype: str

    def __str__(self) -> str:
        size = f"{self.image_size} x {self.image_size}"
        return f"{self.model}, {self.mode}, batch {self.batch}, {size}, {self.dtype}"

    @property
    def narrow(self) -> bool:
        return self.dtype != "fp32"

    @property
    def under_autocast(self) -> bool:
        return self.narrow and (self.mode == "train" or self.dtype == "fp16")

    @property
    def weights_dtype(self) -> torch.dtype:
        return torch.float32 if self.under_autocast else DTYPES[self.dtype]

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager:
        return torch.autocast(device.type, DTYPES[self.dtype]) if self.under_autocast else contextlib.nullcontext()


def default_image_size(name: str) -> int:
    return timm.get_pretrained_cfg(name).input_size[-1]


def left_out(name: str, providers: list[str]) -> dict[str, str]:
    """Those of `providers` that the model `name` cannot have, with the reason."""
    reasons = {}
    for provider in providers:
        recipe = PROVIDERS[provider]
        if recipe.ours and not bbfast.is_model(name):
            reasons[provider] = f"bbfast has no {name} of its own"
        elif recipe.sdpa and not _writes_attention_out(name):
            reasons[provider] = f"timm's {name} has no attention for it, or takes it in eager already"
    return reasons


def measure_case(
    case: Case,
    providers: list[str],
    device: torch.device,
    settings: Settings,
    on_progress: Callable[[str, int, int], None],
) -> dict:
    """One entry of `results` in models.json: the case, how it was run, and a `Row` per provider."""
    torch.manual_seed(SEED)
    original = _create(timm, case)
    randomise(original)
    family = _Family(case, device, original.state_dict(), is_convolutional(original))
    channels = timm.get_pretrained_cfg(case.model).input_size[0]
    images = family.laid_out(torch.randn(case.batch, channels, case.image_size, case.image_size).to(device))
    images = images.to(case.weights_dtype)
    try:
        rows = harness.measure(
            [Provider(name, lambda name=name: family.build(PROVIDERS[name])) for name in providers],
            harness.copies(images),
            case.dtype,
            reference=(lambda: family.reference(images)) if case.narrow else None,
            settings=settings,
            on_progress=on_progress,
        )
    finally:
        if any(PROVIDERS[name].compiled for name in providers):
            torch.compiler.reset()  # compiled code of one case must not serve, or slow down, the next
    return {
        "model": case.model,
        "mode": case.mode,
        "batch": case.batch,
        "image_size": case.image_size,
        "dtype": case.dtype,
        "memory_format": "channels_last" if family.channels_last else "contiguous",
        "cuda_graphs": settings.cuda_graphs,
        "rows": [vars(row) for row in rows],
    }


def wants_graphs(case: Case, asked: str, device: torch.device) -> bool:
    """Whether calls are replayed from CUDA graphs: `asked` is auto, always or never.

    Only inference on a GPU can: a training step asks the GPU whether to skip an update. With auto, batches so small
    that launching takes longer than running: it would hide the kernels, and whoever minds launches replays graphs.
    """
    possible = device.type == "cuda" and case.mode == "infer"
    return possible and (asked == "always" or (asked == "auto" and case.batch <= GRAPHS_UP_TO_BATCH))


# ---- models ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Family:
    """Makes the models of a case, which share weights."""

    case: Case
    device: torch.device
    state: dict[str, torch.Tensor]
    channels_last: bool

    def laid_out(self, x):
        return x.to(memory_format=torch.channels_last) if self.channels_last else x

    def build(self, recipe: Recipe) -> Runner:
        dispatch.forget_choices()
        model = self._make(recipe, self.case.weights_dtype)
        swap_notes = _swap(model) if recipe.swapped else []
        run = torch.compile(model, mode=recipe.compiled) if recipe.compiled else model
        has_graphs = self.device.type == "cuda" and recipe.compiled in WITH_GRAPHS
        if has_graphs:
            run = _in_steps(run)

        def notes() -> list[str]:
            return swap_notes + (fallbacks() if recipe.ours or recipe.swapped else [])

        runner = inference(model, run, self.case) if self.case.mode == "infer" else training(model, run, self.case)
        runner.notes, runner.has_graphs = notes, has_graphs
        return runner

    def reference(self, images: torch.Tensor) -> Values:
        """What eager computes in float32."""
        exact = Case(self.case.model, self.case.mode, self.case.batch, self.case.image_size, "fp32")
        model = self._make(Recipe(), torch.float32)
        if exact.mode == "train":
            runner = training(model, model, exact)
            return runner.values(runner.call(images.float()))
        runner = inference(model, model, exact)
        parts = [runner.call(part.float()) for part in images.split(32)]  # what fits in bf16 might not in float32
        return runner.values(torch.cat(parts))

    def _make(self, recipe: Recipe, dtype: torch.dtype) -> nn.Module:
        model = _create(bbfast if recipe.ours else timm, self.case)
        model.load_state_dict(self.state)
        if self.case.mode == "train":
            never_drop(model)
        if recipe.sdpa:
            for module in model.modules():
                if hasattr(module, "fused_attn"):
                    module.fused_attn = True
        return self.laid_out(model.train(self.case.mode == "train").to(self.device, dtype))


def inference(model: nn.Module, run: Callable, case: Case) -> Runner:
    device = next(model.parameters()).device

    @torch.no_grad()
    def logits(x: torch.Tensor) -> torch.Tensor:
        with case.autocast(device):
            return run(x)

    return Runner(logits, lambda output: {"logits": output})


def training(model: nn.Module, run: Callable, case: Case) -> Runner:
    """A step returns its logits; compared are those and the size of every matrix's and kernel's gradient.

    Sizes, as powers of two, because in bf16 the gradients of early layers are noise to a third of their largest
    values, in eager too; their norms still tell a backward pass that lost something.
    """
    device = next(model.parameters()).device
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    # A scale that no gradient outgrows, and that stays: skipped steps would be quick.
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0, growth_interval=2**30, enabled=case.dtype == "fp16")
    weights = [weight for weight in model.parameters() if weight.ndim > 1]

    def step(x: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        with case.autocast(device):
            logits = run(x)
            labels = torch.arange(len(x), device=device) % logits.shape[-1]
            loss = nn.functional.cross_entropy(logits.float(), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)  # takes the scale out of the gradients
        scaler.update()
        return logits.detach()

    def values(logits: torch.Tensor) -> Values:
        norms = torch.stack([weight.grad.norm() for weight in weights])
        return {"logits": logits, "log2 of gradients' norms": norms.clamp(min=1e-30).log2()}

    return Runner(step, values)


def _in_steps(run: Callable) -> Callable:
    """Tells graphs recorded by torch.compile that what the last call returned may be overwritten."""

    def call(x: torch.Tensor) -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return run(x)

    return call


def _create(library, case: Case) -> nn.Module:
    cfg = timm.get_pretrained_cfg(case.model)
    # Where windows and position embeddings are made for one size, the model must know another one.
    arguments = {"img_size": case.image_size} if cfg.fixed_input_size else {}
    return library.create_model(case.model, pretrained=False, **arguments)


def is_convolutional(model: nn.Module) -> bool:
    """Whether more than one convolution looks beyond its pixel; patches are cut by one."""
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    return sum(max(conv.kernel_size) > 1 for conv in convs) > 1


def randomise(model: nn.Module) -> None:
    """Gives norms, position biases and layer scales values that a broken fusion cannot hide behind."""
    for name, parameter in model.named_parameters():
        if name.endswith("relative_position_bias_table"):
            nn.init.normal_(parameter)
        if name.endswith((".gamma", ".grn.weight", ".grn.bias")):
            nn.init.uniform_(parameter, 0.1, 0.5)
    for module in model.modules():
        if isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)


def never_drop(model: nn.Module) -> None:
    """Sets dropout and stochastic depth to 0."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name in ("drop_prob", "drop_rate"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def _writes_attention_out(name: str) -> bool:
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False)
    return any(getattr(module, "fused_attn", True) is False for module in model.modules())


def _swap(model: nn.Module) -> list[str]:
    report = bbfast.swap(model)
    if not report.swapped:
        raise ValueError(f"no block has a fast class ({len(report.skipped)} skipped); bbfast.plan(model) says more")
    counted = ", ".join(f"{count} blocks {status}" for status, count in report.totals.items())
    return [counted]


def fallbacks() -> list[str]:
    """A line per op that ran in plain torch, with the reasons."""
    return [
        f"{op} ran in plain torch: {'; '.join(choice.reasons)}"
        for op, choice in sorted(dispatch.last_choices().items())
        if choice.backend == "torch"
    ]
