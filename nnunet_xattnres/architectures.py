"""The network classes. Plans and checkpoints may name them by this path, so it never changes."""

from nnunet_xattnres.model.block_level import BlockXAttnResUNet
from nnunet_xattnres.model.build import build_network_from_plans
from nnunet_xattnres.model.plan_classes import (
    PlainConvBlockXAttnResUNet,
    PlainConvXAttnResUNet,
    ResidualEncoderBlockXAttnResUNet,
    ResidualEncoderXAttnResUNet,
)
from nnunet_xattnres.model.stage_level import XAttnResUNet

__all__ = [
    "BlockXAttnResUNet",
    "PlainConvBlockXAttnResUNet",
    "PlainConvXAttnResUNet",
    "ResidualEncoderBlockXAttnResUNet",
    "ResidualEncoderXAttnResUNet",
    "XAttnResUNet",
    "build_network_from_plans",
]
