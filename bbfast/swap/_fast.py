"""Fast classes, which foreign blocks are reclassed to, and the list of all of them."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Iterable, Mapping

from torch import fx, nn

from bbfast import dispatch
from bbfast.swap import _fingerprint, _lending
from bbfast.swap._blocks import DROP_PATHS


class Fast:
    """First base of a fast class; the foreign class is the second.

    A fast class overrides nothing of the foreign one but forward, so parameters, keys, hooks, isinstance, deepcopy and
    pickle are those of the foreign block. It implements `fused_forward`. In each call forward makes sure that the
    inner modules can still be bypassed; somebody may have hooked, replaced or quantised them since the swap. Where
    one cannot, and where plain torch is wanted (`bbfast.exportable`, torch.func), the foreign forward runs.

    Attributes:
        lends: names of inner modules that fused_forward uses without calling them, if they are there. A norm stands
            right behind the convolution whose result it takes, and nowhere else (`bbfast.fold_bn_` goes by that).
        drops: names of those among them that are layers of stochastic depth, nn.Identity or None.
        asked_once: whether objections are asked before a swap only: it takes long, or fused_forward copes with changes.
        relies_on: qualified names of further foreign functions that were read beside forward.
        own_names: what fused_forward calls arguments that have another name in the foreign forward.
        methods_read: names of the block's methods among relies_on; `register` finds them.
        leaf: whether torch.fx records one call of the block, which so stays fast, or looks into the foreign forward.
    """

    lends: tuple[str, ...] = ()
    drops: tuple[str, ...] = ()
    asked_once: bool = False
    relies_on: tuple[str, ...] = ()
    own_names: Mapping[str, str] = {}
    methods_read: tuple[str, ...] = ()
    leaf: bool = True

    @classmethod
    def lent(cls, block: nn.Module) -> Iterable[tuple[str, nn.Module | None]]:
        """(name, module) of the inner modules that do not run; `block` is of the foreign class or of this one."""
        inner = block._modules  # not getattr, which is slow for modules: this runs in each call
        return [(name, inner.get(name)) for name in (*cls.lends, *cls.drops)]

    @classmethod
    def concerns(cls, block: nn.Module) -> bool:
        """Whether there is anything in this block that fuses; one without is not even reported."""
        return True

    @classmethod
    def objections(cls, block: nn.Module) -> list[str]:
        """Why this block, unlike others of its class, cannot run fused (empty: it can)."""
        return []

    def forward(self, *args, **kwargs):
        tracer = _tracer(*args, *kwargs.values())
        if tracer is not None and self.leaf and tracer.root is not self:
            return tracer.create_proxy("call_module", tracer.path_of_module(self), args, kwargs)
        if tracer is not None or dispatch.wants_plain_torch() or not self._can_bypass():
            return super().forward(*args, **kwargs)
        if kwargs:
            kwargs = {self.own_names.get(name, name): value for name, value in kwargs.items()}
        return self.fused_forward(*args, **kwargs)

    def __prepare_scriptable__(self):
        """Asked for by torch.jit.script, which cannot compile this and would say so in riddles."""
        raise RuntimeError(
            f"torch.jit.script cannot compile {type(self).__name__}, a swapped block: call bbfast.restore(model), "
            "or trace with torch.jit.trace inside of bbfast.exportable()"
        )

    def _can_bypass(self) -> bool:
        if self.methods_read and _fingerprint.replaced_methods(self, self.methods_read):
            return False
        if self.drops and _misplaced_drops(self, self.drops):
            return False
        if not self.asked_once and self.objections(self):
            return False
        return _lending.can_lend([module for _, module in self.lent(self)])

    def fused_forward(self, *args, **kwargs):
        """What the foreign forward returns."""
        raise NotImplementedError(f"{type(self).__name__} has no fused_forward")


def _misplaced_drops(block: nn.Module, drops: tuple[str, ...]) -> list[str]:
    """Names of what stands in a place for stochastic depth and is something else."""
    inner = block._modules
    return [name for name in drops if not _drops_samples(inner.get(name))]


def _drops_samples(module: nn.Module | None) -> bool:
    return module is None or type(module) in DROP_PATHS or type(module) is nn.Identity


def _tracer(*values) -> fx.Tracer | None:
    """The one that sent these arguments of a forward, some of them in lists, to record what becomes of them."""
    for value in values:
        if isinstance(value, fx.Proxy):
            return value.tracer
        if isinstance(value, (list, tuple)) and (tracer := _tracer(*value)) is not None:
            return tracer
    return None


_fast_classes: dict[type[nn.Module], type[Fast]] = {}
_foreign_classes: dict[type[Fast], type[nn.Module]] = {}
_unsupported: dict[str, str] = {}


def register(cls: type[Fast]) -> type[Fast]:
    """Decorator of a fast class: exact instances of its second base can become it."""
    foreign = cls.__bases__[1]
    cls.forward = _with_signature_of(foreign.forward)
    names = zip(_parameters(foreign.forward), _parameters(cls.fused_forward))
    cls.own_names = {theirs: ours for theirs, ours in names if theirs != ours}
    cls.methods_read = _fingerprint.methods_read(foreign, cls.relies_on)
    _fast_classes[foreign] = cls
    _foreign_classes[cls] = foreign
    return cls


def _parameters(forward) -> list[str]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [name for name, value in inspect.signature(forward).parameters.items() if value.kind in kinds]


def _with_signature_of(foreign_forward):
    """`Fast.forward` for those who ask what a model takes, such as torch.fx and torch.export."""

    @functools.wraps(foreign_forward)
    def forward(self, *args, **kwargs):
        return Fast.forward(self, *args, **kwargs)

    return forward


def unsupported(name: str, reason: str) -> None:
    """Says that modules of the class with this qualified name shall be reported as skipped."""
    _unsupported[name] = reason


def foreign_class(cls: type[Fast]) -> type[nn.Module]:
    """What instances of a fast class were, and become again."""
    return _foreign_classes[cls]


def is_fast(cls: type) -> bool:
    """Whether it is a fast class, rather than what somebody derived from one."""
    return cls in _foreign_classes


def fast_class(cls: type) -> type[Fast] | None:
    return _fast_classes.get(cls)


def fast_classes() -> dict[type[nn.Module], type[Fast]]:
    """Of every foreign class that the loaded adapters know, the fast one."""
    return dict(_fast_classes)


def unsupported_reason(cls: type) -> str | None:
    """Why a class that people might expect to be swapped is not; None for any other."""
    return _unsupported.get(f"{cls.__module__}.{cls.__qualname__}")


def unsupported_reasons() -> dict[str, str]:
    """By the qualified name of each class that the loaded adapters name as skipped: why."""
    return dict(_unsupported)


def objections_to(block: nn.Module, cls: type[Fast]) -> list[str]:
    """Why `block`, whose class `cls` replaces, should stay what it is (empty: it can become fast)."""
    if replaced := _fingerprint.replaced_methods(block, ("forward", *cls.methods_read)):
        return [f"it {reason}" for reason in replaced]
    reasons = _fingerprint.objections_to_code(foreign_class(cls), cls.relies_on)
    if reasons:  # then its attributes may be others, too
        return reasons
    reasons += _lending.tensor_objections(block)
    for name, module in cls.lent(block):
        reasons += _lending.objections_to(name, module)
    reasons += [f"{name} is not a layer of stochastic depth" for name in _misplaced_drops(block, cls.drops)]
    return list(dict.fromkeys(reasons)) or cls.objections(block)  # several inner modules may have one and the same


# ---- adapters --------------------------------------------------------------------------------------------

# An adapter is imported when the foreign module that it is about already is.
ADAPTERS = {
    "torch.nn": "bbfast.swap.torch_nn",
    "bbfast.models": "bbfast.swap.own_models",
    "timm.layers": "bbfast.swap.timm_layers",
    "timm.models._efficientnet_blocks": "bbfast.swap.timm_mobile",
    "timm.models.convnext": "bbfast.swap.timm_convnext",
    "timm.models.swin_transformer": "bbfast.swap.timm_swin",
    "timm.models.resnet": "bbfast.swap.timm_resnet",
    "timm.models.regnet": "bbfast.swap.timm_regnet",
    "torchvision.ops.misc": "bbfast.swap.torchvision_layers",
    "torchvision.models.convnext": "bbfast.swap.torchvision_convnext",
    "torchvision.models.regnet": "bbfast.swap.torchvision_mobile",
    "torchvision.models.segmentation": "bbfast.swap.torchvision_resnet",
    "torchvision.models.swin_transformer": "bbfast.swap.torchvision_swin",
    "transformers.activations": "bbfast.swap.transformers_layers",
    "transformers.models.swin.modeling_swin": "bbfast.swap.transformers_swin",
    "transformers.models.donut.modeling_donut_swin": "bbfast.swap.transformers_donut",
    "transformers.models.maskformer.modeling_maskformer_swin": "bbfast.swap.transformers_maskformer",
    "transformers.models.clap.modeling_clap": "bbfast.swap.transformers_clap",
    "transformers.models.efficientnet.modeling_efficientnet": "bbfast.swap.transformers_efficientnet",
    "transformers.models.resnet.modeling_resnet": "bbfast.swap.transformers_resnet",
    "transformers.models.regnet.modeling_regnet": "bbfast.swap.transformers_regnet",
    "transformers.models.convnext.modeling_convnext": "bbfast.swap.transformers_convnext",
    "transformers.models.convnextv2.modeling_convnextv2": "bbfast.swap.transformers_convnextv2",
    "transformers.models.mobilenet_v1.modeling_mobilenet_v1": "bbfast.swap.transformers_mobilenet_v1",
    "transformers.models.mobilenet_v2.modeling_mobilenet_v2": "bbfast.swap.transformers_mobilenet_v2",
}


def load_adapters() -> tuple[str, ...]:
    """Imports the adapters for what is imported; returns a note on each that does not fit the installed library."""
    notes = []
    for foreign, adapter in ADAPTERS.items():
        if foreign not in sys.modules:
            continue
        try:
            importlib.import_module(adapter)
        except (ImportError, AttributeError) as error:
            notes.append(f"{adapter} does not fit the installed {foreign.partition('.')[0]}: {error}")
    return tuple(notes)
