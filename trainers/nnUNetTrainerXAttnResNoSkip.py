from nnunet_xattnres import XAttnResConfig
from nnunet_xattnres.trainer import XAttnResTrainerMixin


class nnUNetTrainerXAttnResNoSkip(XAttnResTrainerMixin):
    """Every stage reads from the history pool, which replaces the skip connections."""

    xattnres_config = XAttnResConfig(skip_connections=False)


class nnUNetTrainerXAttnResNoSkip_5epochs(nnUNetTrainerXAttnResNoSkip):
    """nnUNetTrainerXAttnResNoSkip for 5 epochs."""

    default_num_epochs = 5


class nnUNetTrainerXAttnResNoSkip_50epochs(nnUNetTrainerXAttnResNoSkip):
    """nnUNetTrainerXAttnResNoSkip for 50 epochs."""

    default_num_epochs = 50


class nnUNetTrainerXAttnResNoSkip_100epochs(nnUNetTrainerXAttnResNoSkip):
    """nnUNetTrainerXAttnResNoSkip for 100 epochs."""

    default_num_epochs = 100


class nnUNetTrainerXAttnResNoSkip_250epochs(nnUNetTrainerXAttnResNoSkip):
    """nnUNetTrainerXAttnResNoSkip for 250 epochs."""

    default_num_epochs = 250
