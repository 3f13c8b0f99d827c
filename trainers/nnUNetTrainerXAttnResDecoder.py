from nnunet_xattnres import XAttnResConfig
from nnunet_xattnres.trainer import XAttnResTrainerMixin


class nnUNetTrainerXAttnResDecoder(XAttnResTrainerMixin):
    """Decoder stages read from the history pool; skip connections stay."""

    xattnres_config = XAttnResConfig(read_in_encoder=False)


class nnUNetTrainerXAttnResDecoder_5epochs(nnUNetTrainerXAttnResDecoder):
    """nnUNetTrainerXAttnResDecoder for 5 epochs."""

    default_num_epochs = 5


class nnUNetTrainerXAttnResDecoder_50epochs(nnUNetTrainerXAttnResDecoder):
    """nnUNetTrainerXAttnResDecoder for 50 epochs."""

    default_num_epochs = 50


class nnUNetTrainerXAttnResDecoder_100epochs(nnUNetTrainerXAttnResDecoder):
    """nnUNetTrainerXAttnResDecoder for 100 epochs."""

    default_num_epochs = 100


class nnUNetTrainerXAttnResDecoder_250epochs(nnUNetTrainerXAttnResDecoder):
    """nnUNetTrainerXAttnResDecoder for 250 epochs."""

    default_num_epochs = 250
