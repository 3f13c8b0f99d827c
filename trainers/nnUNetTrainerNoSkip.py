from nnunet_xattnres import XAttnResConfig
from nnunet_xattnres.trainer import XAttnResTrainerMixin


class nnUNetTrainerNoSkip(XAttnResTrainerMixin):
    """Control: the planned network without skip connections and without attention."""

    xattnres_config = XAttnResConfig(skip_connections=False, read_in_encoder=False, read_in_decoder=False)


class nnUNetTrainerNoSkip_5epochs(nnUNetTrainerNoSkip):
    """nnUNetTrainerNoSkip for 5 epochs."""

    default_num_epochs = 5


class nnUNetTrainerNoSkip_50epochs(nnUNetTrainerNoSkip):
    """nnUNetTrainerNoSkip for 50 epochs."""

    default_num_epochs = 50


class nnUNetTrainerNoSkip_100epochs(nnUNetTrainerNoSkip):
    """nnUNetTrainerNoSkip for 100 epochs."""

    default_num_epochs = 100


class nnUNetTrainerNoSkip_250epochs(nnUNetTrainerNoSkip):
    """nnUNetTrainerNoSkip for 250 epochs."""

    default_num_epochs = 250
