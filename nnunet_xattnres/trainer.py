"""The mixin of all XAttnRes trainers, for trainers of your own."""

from nnunet_xattnres.training.mixin import XAttnResTrainerMixin

__all__ = ["XAttnResTrainerMixin"]
