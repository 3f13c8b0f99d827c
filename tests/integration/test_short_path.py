"""A path through every feature of the matrix, in this process, two steps a training. The longest part of it, with
every kind of command, is in the normal suite."""

from pathlib import Path

import numpy as np
import pytest

from helpers.in_process import InProcess
from integration.checks import check_checkpoint, check_model, check_predictions, check_probabilities
from integration.conftest import HIPPOCAMPUS_DATASET, PNG, SCENARIOS, TWO_CHANNELS
from integration.pipeline import (
    RESENC_PLANS,
    Experiment,
    Size,
    make_label_scenario,
    mean_dice,
    plan_and_preprocess,
    plan_resenc,
)
from integration.raw_datasets import add_smoothed_channel, write_hippocampus, write_ultrasound

CONFIGURATIONS = ("2d", "3d_lowres", "3d_fullres")
# Patches are larger than the images: nothing is predicted in tiles.
STEPS = Size(
    base_features=4,
    num_epochs=1,
    num_iterations=dict.fromkeys(CONFIGURATIONS, 2),
    max_patch_voxels=dict.fromkeys(CONFIGURATIONS, 64**3),
)


@pytest.fixture
def here(tmp_path: Path) -> InProcess:
    return InProcess(tmp_path, "cpu")


@pytest.mark.long
def test_regions_ignore_label_cascade_and_ensemble(here: InProcess):
    write_hippocampus(here.raw / HIPPOCAMPUS_DATASET, num_training=2, num_test=1)
    dataset = SCENARIOS["regions_ignore"]
    make_label_scenario(here, dataset, STEPS)
    experiment = Experiment(here, dataset)
    stages = ("3d_lowres", "3d_cascade_fullres")
    best = experiment.find_best(stages)
    assert len(best["all_results"]) == 3  # two stages and their ensemble
    for stage in stages:
        for fold in experiment.train_all(stage):
            check_checkpoint(experiment, fold)
            check_probabilities(experiment, fold / "validation")
        check_predictions(experiment, experiment.predict(stage))
    check_predictions(experiment, experiment.ensemble(stages))
    postprocessed = experiment.predict_best(stages)
    check_predictions(experiment, postprocessed)
    assert 0 <= experiment.evaluate(postprocessed) <= 1
    folds = [mean_dice(fold / "validation") for fold in experiment.train_all("3d_lowres")]
    assert mean_dice(experiment.accumulate("3d_lowres")) == pytest.approx(np.mean(folds))


@pytest.mark.slow
def test_residual_encoder_with_two_channels(here: InProcess, tmp_path: Path):
    write_hippocampus(tmp_path / "one_channel", num_training=2, num_test=1)
    add_smoothed_channel(tmp_path / "one_channel", here.raw / TWO_CHANNELS)
    plan_and_preprocess(here, TWO_CHANNELS, "2d", STEPS)
    plan_resenc(here, TWO_CHANNELS, "2d", STEPS)
    check_model(Experiment(here, TWO_CHANNELS, plans=RESENC_PLANS, folds=("0",)), "2d")


@pytest.mark.slow
def test_png_and_fold_all(here: InProcess):
    write_ultrasound(here.raw / PNG, num_training=2, num_test=1)
    plan_and_preprocess(here, PNG, "2d", STEPS)
    check_model(Experiment(here, PNG, folds=("all",)), "2d")
