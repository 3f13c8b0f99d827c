from nnunet_xattnres import BlockXAttnResConfig
from nnunet_xattnres.trainer import XAttnResTrainerMixin


class nnUNetTrainerXAttnResBlock(XAttnResTrainerMixin):
    """Block level with the reference's defaults: DKVMR replaces every skip (ISAR does not act in planned networks)."""

    xattnres_config = BlockXAttnResConfig()


class nnUNetTrainerXAttnResBlock_5epochs(nnUNetTrainerXAttnResBlock):
    """nnUNetTrainerXAttnResBlock for 5 epochs."""

    default_num_epochs = 5


class nnUNetTrainerXAttnResBlock_50epochs(nnUNetTrainerXAttnResBlock):
    """nnUNetTrainerXAttnResBlock for 50 epochs."""

    default_num_epochs = 50


class nnUNetTrainerXAttnResBlock_100epochs(nnUNetTrainerXAttnResBlock):
    """nnUNetTrainerXAttnResBlock for 100 epochs."""

    default_num_epochs = 100


class nnUNetTrainerXAttnResBlock_250epochs(nnUNetTrainerXAttnResBlock):
    """nnUNetTrainerXAttnResBlock for 250 epochs."""

    default_num_epochs = 250
