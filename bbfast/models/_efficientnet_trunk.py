"""What MobileNetV3 and EfficientNet share: the stem, the blocks, and the habits of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from bbfast.models._backbone import Backbone, prepare_images
from bbfast.models._efficientnet_blocks import SqueezeExcite
from bbfast.models._efficientnet_builder import BlockArgs, build_trunk
from bbfast.models._layers import conv_bn_act, create_conv2d, resolve_act
from bbfast.models._pretrained import PretrainedCfg
from bbfast.nn import BatchNormAct2d
from bbfast.nn._arguments import check_int, check_probability


class EfficientNetTrunk(Backbone):
    """Stem (a strided 3x3 convolution) and blocks; a subclass adds `_forward_features` and `forward_head`.

    Convolutions, BatchNorms, activations and skips run as fused ops, so hooks on the stem's modules and on
    modules inside blocks do not run; hooks on blocks, stages, the classifier and the model do.

    Args:
        block_args: stages of blocks, see `decode_arch_def`.
        num_classes: classes of the classifier; 0 leaves it out.
        in_chans: channels of the input.
        stem_size: channels of the stem, scaled by round_chs_fn unless fix_stem.
        output_stride: strides beyond this become dilation.
        pad_type: `""` pads symmetrically, `"same"` as TensorFlow does.
        act_layer: activation of the stem and of blocks that name none, by timm's name.
        bn_eps, bn_momentum: every BatchNorm's.
        se_layer, se_from_exp, round_chs_fn: see `build_trunk`.
        drop_rate: dropout before the classifier.
        drop_path_rate: block i of n drops its branch, per sample, with probability rate * i / n.
        device, dtype: of parameters and buffers.

    `feature_info` lists the last map of each size.
    """

    classifier: nn.Module

    def __init__(
        self,
        block_args: Sequence[Sequence[BlockArgs]],
        *,
        num_classes: int,
        in_chans: int,
        stem_size: int,
        fix_stem: bool,
        output_stride: int,
        pad_type: str,
        act_layer: str,
        bn_eps: float,
        bn_momentum: float | None,
        se_layer: Callable[..., SqueezeExcite],
        se_from_exp: bool,
        round_chs_fn: Callable[[float], int],
        drop_rate: float,
        drop_path_rate: float,
        device,
        dtype,
    ):
        check_int("num_classes", num_classes, minimum=0)
        check_int("in_chans", in_chans, minimum=1)
        check_probability("drop_rate", drop_rate)
        check_probability("drop_path_rate", drop_path_rate)
        super().__init__(num_classes, in_chans)
        factory = {"device": device, "dtype": dtype}
        act = resolve_act(act_layer)
        bn = {"eps": bn_eps, "momentum": bn_momentum}
        self.drop_rate = drop_rate

        if not fix_stem:
            stem_size = round_chs_fn(stem_size)
        self.conv_stem = create_conv2d(in_chans, stem_size, 3, stride=2, pad_type=pad_type, **factory)
        self.bn1 = BatchNormAct2d(stem_size, act=act, **bn, **factory)
        trunk = build_trunk(
            stem_size,
            block_args,
            output_stride=output_stride,
            pad_type=pad_type,
            act=act,
            bn=bn,
            round_chs_fn=round_chs_fn,
            se_layer=se_layer,
            se_from_exp=se_from_exp,
            drop_path_rate=drop_path_rate,
            **factory,
        )
        self.blocks = nn.Sequential(*trunk.stages)
        self.feature_info = trunk.feature_info
        self.num_features = trunk.out_chs

    def get_classifier(self) -> nn.Module:
        """The last layer (`nn.Identity` where num_classes is 0)."""
        return self.classifier

    def group_matcher(self, coarse: bool = False) -> dict:
        """Patterns that group parameters by depth, for layer-wise learning rates; coarse: by stage."""
        blocks = r"^blocks\.(\d+)" if coarse else r"^blocks\.(\d+)\.(\d+)"
        return {"stem": r"^conv_stem|bn1", "blocks": blocks}

    def _maps(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        wanted = {info["stage"] for info in self.feature_info}
        x = apply_stem(self.conv_stem, self.bn1, x)
        if 0 in wanted:
            yield x
        for stage, blocks in enumerate(self.blocks, start=1):
            x = self._run(blocks, x)
            if stage in wanted:
                yield x

    def _keep_maps(self, count: int, *, keep_norm: bool, keep_head: bool) -> None:
        self.blocks = self.blocks[: self.feature_info[count - 1]["stage"]]

    def _make_classifier(self, num_classes: int) -> nn.Module:
        """A classifier of head_hidden_size inputs, placed and typed as the stem is."""
        check_int("num_classes", num_classes, minimum=0)
        if num_classes == 0:
            return nn.Identity()
        weight = self.conv_stem.weight
        return nn.Linear(self.head_hidden_size, num_classes, device=weight.device, dtype=weight.dtype)


def apply_stem(conv: nn.Conv2d, bn: BatchNormAct2d, x: torch.Tensor) -> torch.Tensor:
    """`act(bn(conv(x)))` of images, as one op."""
    return conv_bn_act(conv, bn, prepare_images(x, conv.weight))


# How these families become feature extractors; see `register_variants`.
FEATURE_CFG = {"fused": {("conv_stem", "bn1"): apply_stem}}


def pretrained_cfg(size: int = 224, *, test_size: int | None = None, weights: bool = True, **facts) -> PretrainedCfg:
    """Square inputs, a last map of size / 32, timm's hub repositories: so are these families' weights."""
    return PretrainedCfg(
        hf_hub_id="timm/" if weights else None,
        input_size=(3, size, size),
        test_input_size=None if test_size is None else (3, test_size, test_size),
        pool_size=(-(-size // 32),) * 2,
        first_conv="conv_stem",
        classifier="classifier",
        **facts,
    )
