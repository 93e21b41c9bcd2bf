"""From a configuration to a network."""

from __future__ import annotations

from bbfast.design_space._complexity import STEM_WIDTH
from bbfast.design_space._configs import AnyNetConfig, Config, RegNetConfig
from bbfast.models.regnet import AnyNet, StageCfg


def build(
    config: Config,
    num_classes: int = 1000,
    in_chans: int = 3,
    *,
    global_pool: str = "avg",
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    zero_init_last: bool = True,
    device=None,
    dtype=None,
) -> AnyNet:
    """Makes the network of `config`, untrained: a stem of 32 channels, the configuration's stages, a classifier.

    Args:
        config: any configuration, be it of a space or not.
        num_classes: classes; 0 leaves the classifier out.
        in_chans: channels of the images.
        global_pool, drop_rate, drop_path_rate, zero_init_last, device, dtype: see `bbfast.models.regnet.AnyNet`.

    Returns:
        A model in train mode, with RegNet's modules and keys (`stem`, `s1.b1.conv1`, ..., `head.fc`).

    Raises:
        TypeError, ValueError: an argument is of the wrong type or not allowed.
    """
    if not isinstance(config, (AnyNetConfig, RegNetConfig)):
        raise TypeError(f"config must be an AnyNetConfig or a RegNetConfig, got {type(config).__name__}")
    stages = [
        StageCfg(stage.depth, stage.width, 1 / stage.bottleneck, stage.group_width, config.se_ratio)
        for stage in config.stages
    ]
    return AnyNet(
        stages,
        stem_width=STEM_WIDTH,
        num_classes=num_classes,
        in_chans=in_chans,
        global_pool=global_pool,
        drop_rate=drop_rate,
        drop_path_rate=drop_path_rate,
        zero_init_last=zero_init_last,
        device=device,
        dtype=dtype,
    )
