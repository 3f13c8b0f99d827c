from nnunet_xattnres import BlockXAttnResConfig
from nnunet_xattnres.trainer import XAttnResTrainerMixin


class nnUNetTrainerXAttnResBlockInput(XAttnResTrainerMixin):
    """Block level with this plugin's change: ISAR, in encoder and decoder, also reads the stage's input."""

    xattnres_config = BlockXAttnResConfig(isar_in_encoder=True, bank_includes_input=True)


class nnUNetTrainerXAttnResBlockInput_5epochs(nnUNetTrainerXAttnResBlockInput):
    """nnUNetTrainerXAttnResBlockInput for 5 epochs."""

    default_num_epochs = 5


class nnUNetTrainerXAttnResBlockInput_50epochs(nnUNetTrainerXAttnResBlockInput):
    """nnUNetTrainerXAttnResBlockInput for 50 epochs."""

    default_num_epochs = 50


class nnUNetTrainerXAttnResBlockInput_100epochs(nnUNetTrainerXAttnResBlockInput):
    """nnUNetTrainerXAttnResBlockInput for 100 epochs."""

    default_num_epochs = 100


class nnUNetTrainerXAttnResBlockInput_250epochs(nnUNetTrainerXAttnResBlockInput):
    """nnUNetTrainerXAttnResBlockInput for 250 epochs."""

    default_num_epochs = 250
