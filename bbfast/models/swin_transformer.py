"""Swin: a transformer whose attention stays within windows, which every other block shifts by half.

`Swin Transformer: Hierarchical Vision Transformer using Shifted Windows`, https://arxiv.org/abs/2103.14030, and the S3
variants of `Searching the Search Space of Vision Transformer`, https://arxiv.org/abs/2111.14725. Names, weights and
state_dict keys are timm's. Maps are `[B, H, W, C]` from the patch embedding to the head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from bbfast.models._backbone import Backbone, run_blocks
from bbfast.models._classifier_head import ClassifierHead
from bbfast.models._factory import register_variants
from bbfast.models._pretrained import PretrainedCfg
from bbfast.models._registry import register_model_deprecations
from bbfast.models._swin_weights import adapt_state_dict, resample_patch_embed
from bbfast.nn._arguments import check_bool, check_int, check_ints, check_probability
from bbfast.nn.add_layer_norm import apply_layer_norm
from bbfast.nn.linear_act import apply_linear
from bbfast.nn.swin_block import SwinBlock
from bbfast.nn.window_attention import WindowAttention
from bbfast.ops._common import overridable, pair

# ---- parts -----------------------------------------------------------------------------------------------


class PatchEmbed(nn.Module):
    """Cuts an image into patches and maps each to a vector: `[B, C, H, W]` to `[B, H / patch, W / patch, embed_dim]`.

    Where patches do not divide an image of img_size, the last pixels are left out.

    Args:
        img_size, patch_size: an int or (height, width), in pixels.
        strict_img_size: take images of img_size only, else of any multiple of patch_size.
        norm_layer: makes the norm after the projection.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int],
        patch_size: int | tuple[int, int],
        *,
        in_chans: int,
        embed_dim: int,
        strict_img_size: bool = True,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.img_size, self.patch_size = _check_sizes(img_size, patch_size)
        self.strict_img_size = strict_img_size
        self.proj = nn.Conv2d(in_chans, embed_dim, self.patch_size, self.patch_size, device=device, dtype=dtype)
        self.norm = norm_layer(embed_dim, device=device, dtype=dtype)

    @property
    def grid_size(self) -> tuple[int, int]:
        """Patches in an image of img_size, (rows, columns)."""
        return tuple(size // patch for size, patch in zip(self.img_size, self.patch_size))

    @property
    def num_patches(self) -> int:
        """Patches in an image of img_size."""
        return self.grid_size[0] * self.grid_size[1]

    def set_input_size(self, img_size=None, patch_size=None) -> None:
        """Other sizes; None keeps one. The filters are resampled for another patch_size."""
        old_patch_size = self.patch_size
        self.img_size, self.patch_size = _check_sizes(
            self.img_size if img_size is None else img_size, self.patch_size if patch_size is None else patch_size
        )
        if self.patch_size != old_patch_size:
            old = self.proj
            factory = {"device": old.weight.device, "dtype": old.weight.dtype}
            self.proj = nn.Conv2d(old.in_channels, old.out_channels, self.patch_size, self.patch_size, **factory)
            with torch.no_grad():
                self.proj.weight.copy_(resample_patch_embed(old.weight, self.patch_size))
                self.proj.bias.copy_(old.bias)
            for parameter, before in zip(self.proj.parameters(), old.parameters()):
                parameter.requires_grad_(before.requires_grad)
            self.proj.train(old.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = _checked_images(x, self.proj.in_channels, self.patch_size, self.img_size if self.strict_img_size else None)
        return apply_layer_norm(self.norm, self.proj(x).permute(0, 2, 3, 1))


@overridable
def _checked_images(x, in_chans: int, patch_size: tuple[int, int], img_size: tuple[int, int] | None) -> torch.Tensor:
    """`x` itself, if it is images of img_size (None: of any size that patches divide)."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
    if x.dim() != 4 or x.shape[1] != in_chans:
        raise ValueError(f"x must have shape [N, {in_chans}, H, W], got {tuple(x.shape)}")
    if img_size is not None and tuple(x.shape[2:]) != img_size:
        raise ValueError(
            f"x is {x.shape[2]} x {x.shape[3]} pixels but the model was made for {img_size[0]} x {img_size[1]}; make "
            "it with img_size= or strict_img_size=False, or call set_input_size"
        )
    if img_size is None:
        for axis, size, patch in zip("HW", x.shape[2:], patch_size):
            if size % patch:
                raise ValueError(f"x has {size} pixels along {axis}, which patches of {patch} do not divide")
    return x


def _check_sizes(img_size, patch_size) -> tuple[tuple[int, int], tuple[int, int]]:
    """Both as pairs, if an image holds a patch."""
    sizes, patches = pair("img_size", img_size, 1), pair("patch_size", patch_size, 1)
    if any(size < patch for size, patch in zip(sizes, patches)):
        raise ValueError(f"img_size={img_size!r} is not allowed; it must be at least patch_size={patch_size!r}")
    return sizes, patches


class PatchMerging(nn.Module):
    """Halves a map: the four pixels of each 2 x 2 square side by side, normalised, mapped from 4 dim to out_dim.

    A square that hangs over the bottom or right edge has zeros there.
    """

    def __init__(self, dim: int, out_dim: int, *, norm_layer=nn.LayerNorm, device=None, dtype=None):
        super().__init__()
        self.norm = norm_layer(4 * dim, device=device, dtype=dtype)
        self.reduction = nn.Linear(4 * dim, out_dim, bias=False, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, H, W, dim]` to `[B, ceil(H / 2), ceil(W / 2), out_dim]`."""
        squares = _squares_when_compiled(x) if torch.compiler.is_compiling() else _squares(x)
        return apply_linear(self.reduction, apply_layer_norm(self.norm, squares))


@overridable
def _squares(x: torch.Tensor) -> torch.Tensor:
    """`[B, H, W, C]` to `[B, ceil(H / 2), ceil(W / 2), 4 C]`: the left column of each square, then its right one."""
    if x.shape[1] % 2 or x.shape[2] % 2:
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
    squares = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # [B, H / 2, row, W / 2, column, C]
    return squares.permute(0, 1, 3, 4, 2, 5).flatten(3)


def _squares_when_compiled(x: torch.Tensor) -> torch.Tensor:
    """The same without a question whose answer hangs on which sizes are even: a graph would be tied to it.

    Where the answer is known, squares are cut as ever: gradients of slices fill maps of zeros.
    """
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # imports sympy

    if all(statically_known_true(size % 2 == 0) for size in x.shape[1:3]):
        return _squares(x)
    rows, columns = 2 * ((x.shape[1] + 1) // 2), 2 * ((x.shape[2] + 1) // 2)
    x = F.pad(x, (0, 0, 0, 1, 0, 1))
    return torch.cat([x[:, row:rows:2, column:columns:2] for column in (0, 1) for row in (0, 1)], 3)


class SwinTransformerStage(nn.Module):
    """Patch merging (but in the first stage) and `depth` blocks, every other one shifted.

    Args:
        dim, out_dim: channels of the stage's input and of its blocks.
        input_resolution: (height, width) of the stage's input.
        downsample: whether the stage begins with patch merging.
        drop_path: rates, one per block.
        num_heads, head_dim, window_size, always_partition, mlp_ratio, qkv_bias, proj_drop, attn_drop, norm_layer: see
            `bbfast.nn.SwinBlock`.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        input_resolution: tuple[int, int],
        *,
        depth: int,
        downsample: bool,
        window_size: tuple[int, int],
        drop_path: Sequence[float],
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        device=None,
        dtype=None,
        **block_arguments,
    ):
        super().__init__()
        factory = {"norm_layer": norm_layer, "device": device, "dtype": dtype}
        self.downsample = PatchMerging(dim, out_dim, **factory) if downsample else nn.Identity()
        half = tuple(side // 2 for side in window_size)
        self.blocks = nn.Sequential(
            *(
                SwinBlock(
                    out_dim,
                    self._block_resolution(input_resolution),
                    window_size=window_size,
                    shift_size=half if index % 2 else 0,
                    drop_path=drop_path[index],
                    **block_arguments,
                    **factory,
                )
                for index in range(depth)
            )
        )
        self.grad_checkpointing = False

    def _block_resolution(self, input_resolution: tuple[int, int]) -> tuple[int, int]:
        if isinstance(self.downsample, nn.Identity):
            return tuple(input_resolution)
        return tuple((size + 1) // 2 for size in input_resolution)

    def set_input_size(self, input_resolution, window_size, always_partition: bool | None = None) -> None:
        """Prepares the blocks for inputs of another size."""
        for block in self.blocks:
            block.set_input_size(self._block_resolution(input_resolution), window_size, always_partition)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return run_blocks(self.blocks, self.downsample(x), self.grad_checkpointing)


# ---- the model -------------------------------------------------------------------------------------------


class SwinTransformer(Backbone):
    """Swin: patches, stages of windowed attention at halving resolution, a norm, a pooled classifier.

    Args:
        img_size: an int or (height, width) in pixels that windows and shifts are made for.
        patch_size, embed_dim: of the patch embedding; each later stage doubles the channels.
        depths, num_heads: blocks and heads of each stage. head_dim: channels per head, None for channels / heads.
        window_size: an int or (height, width) for all stages, or one of these per stage (two ints are one window).
        always_partition: keep window and shift where a stage's map is no larger than the window.
        strict_img_size: take images of img_size only. False, or dynamic_img_size=True: any multiple of patch_size;
            windows and shifts stay as they are.
        mlp_ratio: hidden channels of the perceptrons per channel, one number or one per stage.
        drop_rate, proj_drop_rate, attn_drop_rate: dropout before the classifier, after projections, of the attention's
            weights. drop_path_rate: the last block drops its branches with this chance, the first never.
        global_pool: see `GlobalPool2d`.
        weight_init: `""`, or `"skip"` to leave linear layers as torch makes them.

    Attributes:
        num_features, head_hidden_size: channels of `forward_features`, and of what the classifier takes.
        feature_info: for each stage its module, num_chs and reduction. output_fmt: "NHWC".
        pretrained_cfg, default_cfg: the same dict, about the model's weights.
    """

    output_fmt = "NHWC"

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        head_dim: int | Sequence[int | None] | None = None,
        window_size: int | Sequence = 7,
        always_partition: bool = False,
        strict_img_size: bool = True,
        dynamic_img_size: bool = False,
        mlp_ratio: float | Sequence[float] = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        weight_init: str = "",
        device=None,
        dtype=None,
    ):
        check_int("in_chans", in_chans, minimum=1)
        check_int("embed_dim", embed_dim, minimum=1)
        for name, rate in (("attn_drop_rate", attn_drop_rate), ("proj_drop_rate", proj_drop_rate)):
            check_probability(name, rate)
        check_probability("drop_path_rate", drop_path_rate)
        for name, value in (("strict_img_size", strict_img_size), ("dynamic_img_size", dynamic_img_size)):
            check_bool(name, value)
        depths, num_heads = check_ints("depths", depths, minimum=1), check_ints("num_heads", num_heads, minimum=1)
        if len(num_heads) != len(depths):
            raise ValueError(f"num_heads={num_heads!r} must have one entry per stage, as depths={depths!r}")
        if weight_init not in ("", "skip"):
            raise ValueError(f"weight_init={weight_init!r} is not known; allowed: '', 'skip'")
        super().__init__(num_classes, in_chans)
        factory = {"norm_layer": norm_layer, "device": device, "dtype": dtype}
        stages = len(depths)
        channels = [embed_dim * 2**stage for stage in range(stages)]
        self.dynamic_img_size = dynamic_img_size or not strict_img_size
        self.global_pool = global_pool
        self.num_layers = stages
        self.embed_dim = embed_dim
        self.num_features = channels[-1]

        self.patch_embed = PatchEmbed(
            img_size,
            patch_size,
            in_chans=in_chans,
            embed_dim=embed_dim,
            strict_img_size=not self.dynamic_img_size,
            **factory,
        )
        windows = windows_per_stage(window_size, stages)
        # `set_input_size` keeps these windows' share of this grid.
        self._reference = (windows, self.patch_embed.grid_size)
        rates = [part.tolist() for part in torch.linspace(0, drop_path_rate, sum(depths)).split(list(depths))]
        self.layers = nn.Sequential(
            *(
                SwinTransformerStage(
                    channels[max(stage - 1, 0)],
                    channels[stage],
                    self._stage_input(stage),
                    depth=depths[stage],
                    downsample=stage > 0,
                    num_heads=num_heads[stage],
                    head_dim=_per_stage("head_dim", head_dim, stages)[stage],
                    window_size=windows[stage],
                    always_partition=always_partition,
                    mlp_ratio=_per_stage("mlp_ratio", mlp_ratio, stages)[stage],
                    qkv_bias=qkv_bias,
                    proj_drop=proj_drop_rate,
                    attn_drop=attn_drop_rate,
                    drop_path=rates[stage],
                    **factory,
                )
                for stage in range(stages)
            )
        )
        self.feature_info = [
            {"num_chs": channels[i], "reduction": max(self.patch_embed.patch_size) * 2**i, "module": f"layers.{i}"}
            for i in range(stages)
        ]
        self.norm = norm_layer(self.num_features, device=device, dtype=dtype)
        self.head = ClassifierHead(
            self.num_features,
            num_classes,
            pool_type=global_pool,
            drop_rate=drop_rate,
            channels_last=True,
            device=device,
            dtype=dtype,
        )
        if weight_init != "skip":
            _init_weights(self)

    @property
    def head_hidden_size(self) -> int:
        return self.head.num_features

    def _stage_input(self, stage: int) -> tuple[int, int]:
        """(height, width) of a stage's input, before its patch merging."""
        scale = 2 ** max(stage - 1, 0)
        return tuple(-(-size // scale) for size in self.patch_embed.grid_size)

    # ---- forward

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """The last map, normalised, `[N, H / 32, W / 32, num_features]`, sizes rounded up."""
        return self._forward_features(x)

    def _maps(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        x = self.patch_embed(x)
        for stage in self.layers:
            x = stage(x)
            yield x

    def _keep_maps(self, count: int, *, keep_norm: bool, keep_head: bool) -> None:
        self.layers = self.layers[:count]
        windows, grid = self._reference
        self._reference = (windows[:count], grid)
        self.num_features = self.head.in_features = self.feature_info[count - 1]["num_chs"]
        if not keep_norm:
            self.norm = nn.Identity()

    def _finish(self, x: torch.Tensor) -> torch.Tensor:
        return apply_layer_norm(self.norm, x)

    def _norm_last_map(self, x: torch.Tensor) -> torch.Tensor:
        return apply_layer_norm(self.norm, x)

    def _as_nchw(self, x: torch.Tensor) -> torch.Tensor:
        return x.permute(0, 3, 1, 2).contiguous()

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Pooling, dropout and classifier; pre_logits leaves it out: `[N, head_hidden_size]`."""
        return self.head(x, pre_logits)

    # ---- what one does with a model

    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
        window_size: int | Sequence | None = None,
        window_ratio: int | Sequence[int] | None = None,
        always_partition: bool | None = None,
    ) -> None:
        """Makes the model one for other images; tables and filters are interpolated.

        Args:
            img_size, patch_size, always_partition: None keeps what there is.
            window_size: as for the constructor. None: from window_ratio, or each stage's window keeps its share of
                the grid.
            window_ratio: patches of the whole grid per window, one int or one per stage.
        """
        stages = len(self.layers)
        windows = None if window_size is None else windows_per_stage(window_size, stages)
        ratios = None if window_ratio is None else _per_stage("window_ratio", window_ratio, stages)
        for ratio in ratios or ():
            check_int("window_ratio", ratio, minimum=1)
        if always_partition is not None:
            check_bool("always_partition", always_partition)
        self.patch_embed.set_input_size(img_size, patch_size)  # checks both before it changes one
        grid = self.patch_embed.grid_size
        if windows is None and ratios is not None:
            windows = tuple(tuple(max(1, size // ratio) for size in grid) for ratio in ratios)
        if windows is not None:
            self._reference = (windows, grid)
        else:
            windows = tuple(_scaled(window, grid, self._reference[1]) for window in self._reference[0])
        for index, stage in enumerate(self.layers):
            stage.set_input_size(self._stage_input(index), windows[index], always_partition)
            self.feature_info[index]["reduction"] = max(self.patch_embed.patch_size) * 2**index

    @property
    def adapt_state_dict(self) -> Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]:
        """Function that turns a state_dict of other versions, windows or patch sizes into this model's.

        See `_swin_weights`. It does not hold the model, so that a feature extractor can keep it.
        """
        tables = {
            f"{name}.relative_position_bias_table": module.window_size
            for name, module in self.named_modules()
            if isinstance(module, WindowAttention)
        }
        return partial(adapt_state_dict, patch_size=self.patch_embed.patch_size, window_sizes=tables)

    def get_classifier(self) -> nn.Module:
        """The last layer (`nn.Identity` where num_classes is 0)."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier by a fresh one, and the pooling unless global_pool is None."""
        weight = self.patch_embed.proj.weight
        self.head.reset(num_classes, global_pool, device=weight.device, dtype=weight.dtype)
        self.num_classes = num_classes
        self.global_pool = self.global_pool if global_pool is None else global_pool

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay should leave alone: the relative position bias tables."""
        return {name for name, _ in self.named_parameters() if name.endswith("relative_position_bias_table")}

    def group_matcher(self, coarse: bool = False) -> dict:
        """Patterns that group parameters by depth, for layer-wise learning rates; coarse: by stage."""
        fine = [
            (r"^layers\.(\d+).downsample", (0,)),
            (r"^layers\.(\d+)\.\w+\.(\d+)", None),
            (r"^norm", (99999,)),
        ]
        return {"stem": r"^patch_embed", "blocks": r"^layers\.(\d+)" if coarse else fine}


def windows_per_stage(window_size: int | Sequence, stages: int) -> tuple[tuple[int, int], ...]:
    """One (height, width) per stage from an int or (height, width) for all, or one of these per stage."""
    if not isinstance(window_size, (int, tuple, list)):
        kind = type(window_size).__name__
        raise TypeError(f"window_size must be an int, a pair of them, or one of these per stage, got {kind}")
    for_all = isinstance(window_size, int) or (len(window_size) == 2 and isinstance(window_size[0], int))
    windows = [window_size] * stages if for_all else list(window_size)
    if len(windows) != stages:
        raise ValueError(f"window_size={window_size!r} must be one window, or one per stage ({stages})")
    return tuple(pair("window_size", window, 1) for window in windows)


def _per_stage(name: str, value, stages: int) -> list:
    values = list(value) if isinstance(value, (tuple, list)) else [value] * stages
    if len(values) != stages:
        raise ValueError(f"{name}={value!r} must be one value, or one per stage ({stages})")
    return values


def _scaled(window: tuple[int, int], grid: tuple[int, int], reference_grid: tuple[int, int]) -> tuple[int, int]:
    return tuple(max(1, side * size // reference) for side, size, reference in zip(window, grid, reference_grid))


def _init_weights(model: SwinTransformer) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


# ---- pretrained weights ----------------------------------------------------------------------------------


def _cfg(size: int = 224, **facts) -> PretrainedCfg:
    return PretrainedCfg(
        hf_hub_id="timm/",
        input_size=(3, size, size),
        pool_size=(size // 32, size // 32),
        fixed_input_size=True,
        crop_pct=1.0 if size == 384 else 0.9,
        first_conv="patch_embed.proj",
        classifier="head.fc",
        **facts,
    )


_22K = {"num_classes": 21841}

PRETRAINED_CFGS = {
    "swin_tiny_patch4_window7_224.ms_in1k": _cfg(),
    "swin_tiny_patch4_window7_224.ms_in22k_ft_in1k": _cfg(),
    "swin_tiny_patch4_window7_224.ms_in22k": _cfg(**_22K),
    "swin_small_patch4_window7_224.ms_in22k_ft_in1k": _cfg(),
    "swin_small_patch4_window7_224.ms_in1k": _cfg(),
    "swin_small_patch4_window7_224.ms_in22k": _cfg(**_22K),
    "swin_base_patch4_window7_224.ms_in22k_ft_in1k": _cfg(),
    "swin_base_patch4_window7_224.ms_in1k": _cfg(),
    "swin_base_patch4_window7_224.ms_in22k": _cfg(**_22K),
    "swin_base_patch4_window12_384.ms_in22k_ft_in1k": _cfg(384),
    "swin_base_patch4_window12_384.ms_in1k": _cfg(384),
    "swin_base_patch4_window12_384.ms_in22k": _cfg(384, **_22K),
    "swin_large_patch4_window7_224.ms_in22k_ft_in1k": _cfg(),
    "swin_large_patch4_window7_224.ms_in22k": _cfg(**_22K),
    "swin_large_patch4_window12_384.ms_in22k_ft_in1k": _cfg(384),
    "swin_large_patch4_window12_384.ms_in22k": _cfg(384, **_22K),
    "swin_s3_tiny_224.ms_in1k": _cfg(),
    "swin_s3_small_224.ms_in1k": _cfg(),
    "swin_s3_base_224.ms_in1k": _cfg(),
}

# ---- variants --------------------------------------------------------------------------------------------

_TINY = {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)}
_SMALL = {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)}
_BASE = {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)}
_LARGE = {"embed_dim": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48)}

_VARIANTS = {
    "swin_tiny_patch4_window7_224": {"window_size": 7, **_TINY},
    "swin_small_patch4_window7_224": {"window_size": 7, **_SMALL},
    "swin_base_patch4_window7_224": {"window_size": 7, **_BASE},
    "swin_base_patch4_window12_384": {"window_size": 12, **_BASE},
    "swin_large_patch4_window7_224": {"window_size": 7, **_LARGE},
    "swin_large_patch4_window12_384": {"window_size": 12, **_LARGE},
    "swin_s3_tiny_224": {"window_size": (7, 7, 14, 7), **_TINY},
    "swin_s3_small_224": {"window_size": (14, 14, 14, 7), **_SMALL},
    "swin_s3_base_224": {"window_size": (7, 7, 14, 7), **_SMALL, "depths": (2, 2, 30, 2)},
}

register_variants(SwinTransformer, PRETRAINED_CFGS, _VARIANTS, {"flatten_sequential": True})

# ---- old names -------------------------------------------------------------------------------------------

register_model_deprecations(
    __name__,
    {
        "swin_base_patch4_window7_224_in22k": "swin_base_patch4_window7_224.ms_in22k",
        "swin_base_patch4_window12_384_in22k": "swin_base_patch4_window12_384.ms_in22k",
        "swin_large_patch4_window7_224_in22k": "swin_large_patch4_window7_224.ms_in22k",
        "swin_large_patch4_window12_384_in22k": "swin_large_patch4_window12_384.ms_in22k",
    },
)
