"""Trainings without nnU-Net's command, in this process or as `python training.py DATASET CONFIG TRAINER RESUME`."""

import sys

import torch
from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

CPU = torch.device("cpu")


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
