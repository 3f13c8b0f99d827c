"""nnU-Net without its commands, in this process or as `python training.py DATASET CONFIG TRAINER RESUME`."""

import multiprocessing.dummy
import multiprocessing.pool
import sys

import pytest
import torch
from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities import utils

from nnunet_xattnres.nnunet.commands import NnUNet

CPU = torch.device("cpu")


def run_in_threads(nnunet: NnUNet, patch: pytest.MonkeyPatch) -> None:
    """nnU-Net in this process: threads in place of its worker processes, each of which would import torch."""
    for name, value in nnunet.folders().items():
        patch.setenv(name, value)
    patch.setattr(multiprocessing, "get_context", lambda method=None: multiprocessing.dummy)
    patch.setattr(utils, "Pool", multiprocessing.dummy.Pool)


def train(
    dataset: str,
    configuration: str,
    trainer: str,
    pretrained: str | None = None,
    resume: bool = False,
    fold: int = 0,
) -> nnUNetTrainer:
    """On a CPU, as `nnUNetv2_train` does it but for the final validation. resume: `--c`."""
    training = get_trainer_from_args(dataset, configuration, fold, trainer, "nnUNetPlans", resume, CPU)
    maybe_load_checkpoint(training, resume, False, pretrained)
    training.run_training()
    return training


if __name__ == "__main__":
    dataset, configuration, trainer, resume = sys.argv[1:]
    train(dataset, configuration, trainer, resume=resume == "--c")
