from nnunet_xattnres import XAttnResConfig
from nnunet_xattnres.trainer import XAttnResTrainerMixin


class nnUNetTrainerPlanned(XAttnResTrainerMixin):
    """The planned network itself, as the baseline of comparisons."""

    xattnres_config = XAttnResConfig(read_in_encoder=False, read_in_decoder=False)


class nnUNetTrainerPlanned_5epochs(nnUNetTrainerPlanned):
    """nnUNetTrainerPlanned for 5 epochs."""

    default_num_epochs = 5


class nnUNetTrainerPlanned_50epochs(nnUNetTrainerPlanned):
    """nnUNetTrainerPlanned for 50 epochs."""

    default_num_epochs = 50


class nnUNetTrainerPlanned_100epochs(nnUNetTrainerPlanned):
    """nnUNetTrainerPlanned for 100 epochs."""

    default_num_epochs = 100


class nnUNetTrainerPlanned_250epochs(nnUNetTrainerPlanned):
    """nnUNetTrainerPlanned for 250 epochs."""

    default_num_epochs = 250
