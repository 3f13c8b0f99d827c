"""nnU-Net without its commands and its worker processes."""

import multiprocessing.dummy
import multiprocessing.pool
from typing import Any

import pytest
import torch
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities import utils

from nnunet_xattnres.nnunet.commands import NnUNet

CPU = torch.device("cpu")


def run_in_threads(nnunet: NnUNet, patch: pytest.MonkeyPatch) -> None:
    """nnU-Net in this process: threads in place of its worker processes, each of which would import torch.

    Predictions are made without workers. A fingerprint takes a sample of 10,000 intensities, where nnU-Net takes 1e8 of
    any dataset, which costs 5 s.
    """
    for name, value in nnunet.folders().items():
        patch.setenv(name, value)
    patch.setattr(multiprocessing, "get_context", lambda method=None: multiprocessing.dummy)
    patch.setattr(utils, "Pool", multiprocessing.dummy.Pool)
    sample_size = property(lambda extractor: 10_000, lambda extractor, value: None)
    patch.setattr(DatasetFingerprintExtractor, "num_foreground_voxels_for_intensitystats", sample_size, raising=False)
    patch.setattr(nnUNetPredictor, "predict_from_files", _predict_sequentially)


def _predict_sequentially(predictor: nnUNetPredictor, images: Any, output: Any, **options: Any) -> Any:
    for of_workers in ("num_processes_preprocessing", "num_processes_segmentation_export", "num_parts", "part_id"):
        options.pop(of_workers, None)
    return predictor.predict_from_files_sequential(images, output, **options)


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
