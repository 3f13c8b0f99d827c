import torch
from nnunetv2.training.lr_scheduler.warmup import Lin_incr_LRScheduler, PolyLRScheduler_offset

from nnunet_xattnres import XAttnResConfig
from nnunet_xattnres.trainer import XAttnResTrainerMixin


class nnUNetTrainerXAttnResFinetune(XAttnResTrainerMixin):
    """Residual fusion for fine-tuning: the gate is zero at the start, the learning rate is low and warms up."""

    xattnres_config = XAttnResConfig(fusion="residual")
    default_num_epochs = 250

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.initial_lr = 1e-3
        self.warmup_epochs = self.num_epochs // 25

    def on_train_epoch_start(self) -> None:
        # Both schedulers compute the learning rate from the number of the epoch alone, so a training can be continued.
        if self.current_epoch < self.warmup_epochs:
            self.lr_scheduler = Lin_incr_LRScheduler(self.optimizer, self.initial_lr, self.warmup_epochs)
        else:
            self.lr_scheduler = PolyLRScheduler_offset(
                self.optimizer, self.initial_lr, self.num_epochs, self.warmup_epochs
            )
        super().on_train_epoch_start()
