"""Everything that nnU-Net does, with our trainers, through nnU-Net's own commands: `make test-matrix`.

A test that is run alone runs the commands that it rests on, and only those.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from integration.checks import (
    Record,
    check_better_than_chance,
    check_checkpoint,
    check_model,
    check_probabilities,
    check_segmentations,
    check_test_set,
)
from integration.conftest import SCENARIOS
from integration.pipeline import RESENC_PLANS, Experiment, mean_dice, read_json
from nnunet_xattnres.commands import NnUNet

pytestmark = pytest.mark.slow

CONFIGURATIONS = ("2d", "3d_lowres", "3d_fullres", "3d_cascade_fullres")
TRAINERS = {"standard, NoSkip": "nnUNetTrainerXAttnResNoSkip"}

each_scenario = pytest.mark.parametrize("scenario", [*SCENARIOS, *TRAINERS])
each_configuration = pytest.mark.parametrize("configuration", CONFIGURATIONS)


@pytest.fixture
def experiment(label_scenarios: NnUNet, scenario: str) -> Experiment:
    labels = scenario.split(",")[0]
    return Experiment(label_scenarios, SCENARIOS[labels], TRAINERS.get(scenario, "nnUNetTrainerXAttnRes"))


@each_scenario
def test_plan_and_preprocess(experiment: Experiment):
    """Plan, preprocess."""
    preprocessed = experiment.nnunet.preprocessed / experiment.dataset
    plans = read_json(preprocessed / f"{experiment.plans}.json")
    assert plans["dataset_name"] == experiment.dataset
    for configuration in ("2d", "3d_lowres", "3d_fullres"):
        identifier = plans["configurations"][f"{configuration}_planned"]["data_identifier"]
        for case in experiment.cases(experiment.raw / "labelsTr"):
            assert (preprocessed / identifier / f"{case}.b2nd").is_file()


@each_scenario
@each_configuration
def test_train_and_validate(experiment: Experiment, configuration: str, record_property: Record):
    """Train and validate."""
    folds = experiment.train_all(configuration)
    splits = read_json(experiment.nnunet.preprocessed / experiment.dataset / "splits_final.json")
    for split, fold in zip(splits, folds, strict=True):
        check_checkpoint(experiment, fold)
        assert experiment.cases(fold / "validation") == set(split["val"])
        check_segmentations(experiment, fold / "validation", experiment.raw / "imagesTr")
        check_probabilities(experiment, fold / "validation")
    dice = float(np.mean([mean_dice(fold / "validation") for fold in folds]))
    check_better_than_chance(experiment, dice, experiment.raw / "labelsTr", record_property)


@each_scenario
def test_cascade_reads_lowres(experiment: Experiment):
    """Hand segmentations of 3d_lowres to the cascade."""
    folds = experiment.train_all("3d_cascade_fullres")
    handed_over = experiment.model("3d_lowres") / "predicted_next_stage" / "3d_cascade_fullres"
    assert {file.stem for file in handed_over.glob("*.b2nd")} == experiment.cases(experiment.raw / "labelsTr")
    weights = torch.load(folds[0] / "checkpoint_final.pth", weights_only=False)["network_weights"]
    images = len(experiment.dataset_json["channel_names"])
    assert next(iter(weights.values())).shape[1] == images + len(experiment.labels.foreground_labels)


@each_scenario
def test_find_best_configuration(experiment: Experiment):
    """Find the best configuration."""
    information = experiment.find_best(CONFIGURATIONS)
    models = {f"{experiment.trainer}__{experiment.plans}__{name}" for name in CONFIGURATIONS}
    results = information["all_results"]
    assert models < results.keys()
    assert len(results.keys() - models) == 6  # pairs
    best = information["best_model_or_ensemble"]
    assert best["result_on_crossval_pre_pp"] == max(results.values())
    assert best["result_on_crossval_post_pp"] >= best["result_on_crossval_pre_pp"]
    assert Path(best["postprocessing_file"]).is_file()


@each_scenario
@each_configuration
def test_predict(experiment: Experiment, configuration: str, record_property: Record):
    """Predict with a single model."""
    check_test_set(experiment, experiment.predict(configuration), record_property)
    check_probabilities(experiment, experiment.predict(configuration))


@each_scenario
def test_ensemble(experiment: Experiment, record_property: Record):
    """Predict with an ensemble."""
    check_test_set(experiment, experiment.ensemble(("2d", "3d_fullres")), record_property)


@each_scenario
def test_postprocess(experiment: Experiment, record_property: Record):
    """Predict with the best, postprocess."""
    check_test_set(experiment, experiment.predict_best(CONFIGURATIONS), record_property)


def test_accumulate_crossval_results(label_scenarios: NnUNet, record_property: Record):
    """Accumulate cross-validation results."""
    experiment = Experiment(label_scenarios, SCENARIOS["standard"])
    accumulated = experiment.accumulate("2d")
    assert experiment.cases(accumulated) == experiment.cases(experiment.raw / "labelsTr")
    folds = [mean_dice(fold / "validation") for fold in experiment.train_all("2d")]
    assert mean_dice(accumulated) == pytest.approx(np.mean(folds))  # of folds of equal size


def test_resenc(label_scenarios: NnUNet, resenc: str, record_property: Record):
    """ResEnc plans."""
    experiment = Experiment(label_scenarios, resenc, plans=RESENC_PLANS, folds=("0",))
    check_test_set(experiment, check_model(experiment, "3d_fullres"), record_property)
    plans = read_json(experiment.model("3d_fullres") / "plans.json")
    architecture = plans["configurations"]["3d_fullres"]["architecture"]
    assert architecture["network_class_name"].endswith("ResidualEncoderUNet")


def test_two_channels(nnunet: NnUNet, two_channels: str, record_property: Record):
    """Two input channels."""
    experiment = Experiment(nnunet, two_channels, folds=("0",))
    check_test_set(experiment, check_model(experiment, "3d_fullres"), record_property)


def test_png(nnunet: NnUNet, png: str, record_property: Record):
    """2D PNG images."""
    experiment = Experiment(nnunet, png, folds=("0",))
    check_test_set(experiment, check_model(experiment, "2d"), record_property)


def test_fold_all(label_scenarios: NnUNet, record_property: Record):
    """Fold `all`."""
    experiment = Experiment(label_scenarios, SCENARIOS["standard"], folds=("all",))
    check_test_set(experiment, check_model(experiment, "2d"), record_property)
