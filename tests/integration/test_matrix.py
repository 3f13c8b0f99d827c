"""Everything that nnU-Net does, with our trainers, through nnU-Net's own commands: `make test-slow`.

A test that is run alone runs the commands that it rests on, and only those.
"""

import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from time import sleep

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
from integration.pipeline import LEARNS, RESENC_PLANS, Experiment, mean_dice, read_json
from nnunet_xattnres.common.processes import end_process_group
from nnunet_xattnres.nnunet.commands import NnUNet, find_command

pytestmark = pytest.mark.slow

CONFIGURATIONS = ("2d", "3d_lowres", "3d_fullres", "3d_cascade_fullres")
each_configuration = pytest.mark.parametrize("configuration", CONFIGURATIONS)


class Scenario:
    """What every kind of labels goes through. labels: a key of `SCENARIOS`. column: of the table."""

    labels: str
    column: str
    trainer = "nnUNetTrainerXAttnRes"

    @pytest.fixture
    def experiment(self, empty_nnunet: NnUNet, label_scenario: Callable[[str], str]) -> Experiment:
        return Experiment(empty_nnunet, label_scenario(self.labels), self.trainer)

    @pytest.mark.feature("Plan, preprocess")
    def test_plan_and_preprocess(self, experiment: Experiment):
        preprocessed = experiment.nnunet.preprocessed / experiment.dataset
        plans = read_json(preprocessed / f"{experiment.plans}.json")
        assert plans["dataset_name"] == experiment.dataset
        for configuration in ("2d", "3d_lowres", "3d_fullres"):
            identifier = plans["configurations"][f"{configuration}_planned"]["data_identifier"]
            for case in experiment.cases(experiment.raw / "labelsTr"):
                assert (preprocessed / identifier / f"{case}.b2nd").is_file()

    @pytest.mark.feature("Train and validate")
    @each_configuration
    def test_train_and_validate(self, experiment: Experiment, configuration: str, record_property: Record):
        folds = experiment.train_all(configuration)
        splits = read_json(experiment.nnunet.preprocessed / experiment.dataset / "splits_final.json")
        for split, fold in zip(splits, folds, strict=True):
            check_checkpoint(experiment, fold)
            assert experiment.cases(fold / "validation") == set(split["val"])
            check_segmentations(experiment, fold / "validation", experiment.raw / "imagesTr")
            check_probabilities(experiment, fold / "validation")
        dice = float(np.mean([mean_dice(fold / "validation") for fold in folds]))
        check_better_than_chance(experiment, dice, experiment.raw / "labelsTr", record_property)

    @pytest.mark.feature("Hand segmentations of 3d_lowres to the cascade")
    def test_cascade_reads_lowres(self, experiment: Experiment):
        folds = experiment.train_all("3d_cascade_fullres")
        handed_over = experiment.model("3d_lowres") / "predicted_next_stage" / "3d_cascade_fullres"
        assert {file.stem for file in handed_over.glob("*.b2nd")} == experiment.cases(experiment.raw / "labelsTr")
        weights = torch.load(folds[0] / "checkpoint_final.pth", weights_only=False)["network_weights"]
        images = len(experiment.dataset_json["channel_names"])
        assert next(iter(weights.values())).shape[1] == images + len(experiment.labels.foreground_labels)

    @pytest.mark.feature("Find the best configuration")
    def test_find_best_configuration(self, experiment: Experiment):
        information = experiment.find_best(CONFIGURATIONS)
        models = {f"{experiment.trainer}__{experiment.plans}__{name}" for name in CONFIGURATIONS}
        results = information["all_results"]
        assert models < results.keys()
        assert len(results.keys() - models) == 6  # pairs
        best = information["best_model_or_ensemble"]
        assert best["result_on_crossval_pre_pp"] == max(results.values())
        assert best["result_on_crossval_post_pp"] >= best["result_on_crossval_pre_pp"]
        assert Path(best["postprocessing_file"]).is_file()

    @pytest.mark.feature("Predict with a single model")
    @each_configuration
    def test_predict(self, experiment: Experiment, configuration: str, record_property: Record):
        check_test_set(experiment, experiment.predict(configuration), record_property)
        check_probabilities(experiment, experiment.predict(configuration))

    @pytest.mark.feature("Predict with an ensemble")
    def test_ensemble(self, experiment: Experiment, record_property: Record):
        check_test_set(experiment, experiment.ensemble(("2d", "3d_fullres")), record_property)

    @pytest.mark.feature("Predict with the best, postprocess")
    def test_postprocess(self, experiment: Experiment, record_property: Record):
        check_test_set(experiment, experiment.predict_best(CONFIGURATIONS), record_property)


class TestStandard(Scenario):
    labels = column = "standard"

    @pytest.mark.feature("Accumulate cross-validation results", column="")
    def test_accumulate_crossval_results(self, experiment: Experiment):
        accumulated = experiment.accumulate("2d")
        assert experiment.cases(accumulated) == experiment.cases(experiment.raw / "labelsTr")
        folds = [mean_dice(fold / "validation") for fold in experiment.train_all("2d")]
        assert mean_dice(accumulated) == pytest.approx(np.mean(folds))  # of folds of equal size

    @pytest.mark.feature("ResEnc plans", column="")
    def test_resenc(self, empty_nnunet: NnUNet, resenc: str, record_property: Record):
        experiment = Experiment(empty_nnunet, resenc, plans=RESENC_PLANS, folds=("0",))
        check_test_set(experiment, check_model(experiment, "3d_fullres"), record_property)
        plans = read_json(experiment.model("3d_fullres") / "plans.json")
        architecture = plans["configurations"]["3d_fullres"]["architecture"]
        assert architecture["network_class_name"].endswith("ResidualEncoderUNet")

    @pytest.mark.feature("Fold `all`", column="")
    def test_fold_all(self, empty_nnunet: NnUNet, label_scenario: Callable[[str], str], record_property: Record):
        experiment = Experiment(empty_nnunet, label_scenario("standard"), folds=("all",))
        check_test_set(experiment, check_model(experiment, "2d"), record_property)


class TestRegions(Scenario):
    labels = column = "regions"


class TestIgnoreLabel(Scenario):
    labels = column = "ignore"


class TestRegionsAndIgnoreLabel(Scenario):
    labels = column = "regions_ignore"


class TestNoSkip(Scenario):
    labels, column = "standard", "standard, NoSkip"
    trainer = "nnUNetTrainerXAttnResNoSkip"


@pytest.mark.feature("Two input channels")
def test_two_channels(empty_nnunet: NnUNet, two_channels: str, record_property: Record):
    experiment = Experiment(empty_nnunet, two_channels, folds=("0",))
    check_test_set(experiment, check_model(experiment, "3d_fullres"), record_property)


@pytest.mark.feature("2D PNG images")
def test_png(empty_nnunet: NnUNet, png: str, record_property: Record):
    experiment = Experiment(empty_nnunet, png, folds=("0",))
    check_test_set(experiment, check_model(experiment, "2d"), record_property)


@pytest.mark.feature("Kill -9, continue")
def test_kill_and_continue(empty_nnunet: NnUNet, png: str, record_property: Record):
    experiment = Experiment(empty_nnunet, png, folds=("1",))
    fold = experiment.model("2d") / "fold_1"
    command = experiment.train_command("2d", "1")
    training = subprocess.Popen(
        [find_command(command[0]), *command[1:]], env=empty_nnunet.environment(), start_new_session=True
    )
    try:
        while not (fold / "checkpoint_best.pth").exists():  # after the first epoch
            assert training.poll() is None
            sleep(0.1)
        sleep(1)
    finally:
        training.kill()
        end_process_group(training)
    assert training.returncode == -signal.SIGKILL
    empty_nnunet.run(*command, "--c", log="continued")
    check_checkpoint(experiment, fold)
    assert "Epoch 0" not in (empty_nnunet.workdir / "logs" / "continued.log").read_text()
    logged = torch.load(fold / "checkpoint_final.pth", weights_only=False)["logging"]
    assert len(logged["train_losses"]) == LEARNS.num_epochs
    check_better_than_chance(experiment, mean_dice(fold / "validation"), experiment.raw / "labelsTr", record_property)
