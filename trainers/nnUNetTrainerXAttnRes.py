from nnunet_xattnres import XAttnResConfig
from nnunet_xattnres.trainer import XAttnResTrainerMixin


class nnUNetTrainerXAttnRes(XAttnResTrainerMixin):
    """Every encoder and decoder stage reads from the history pool; skip connections stay."""

    xattnres_config = XAttnResConfig()


class nnUNetTrainerXAttnRes_5epochs(nnUNetTrainerXAttnRes):
    """nnUNetTrainerXAttnRes for 5 epochs."""

    default_num_epochs = 5


class nnUNetTrainerXAttnRes_50epochs(nnUNetTrainerXAttnRes):
    """nnUNetTrainerXAttnRes for 50 epochs."""

    default_num_epochs = 50


class nnUNetTrainerXAttnRes_100epochs(nnUNetTrainerXAttnRes):
    """nnUNetTrainerXAttnRes for 100 epochs."""

    default_num_epochs = 100


class nnUNetTrainerXAttnRes_250epochs(nnUNetTrainerXAttnRes):
    """nnUNetTrainerXAttnRes for 250 epochs."""

    default_num_epochs = 250
