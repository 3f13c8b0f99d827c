"""Costs of networks in tests: plans that a CPU computes a step of in a moment, trainers of a user, made-up answers."""

import json
from pathlib import Path
from typing import Any

import pytest

from nnunet_xattnres.nnunet.derived_configurations import TrainingBudget, add_small_configuration
from nnunet_xattnres.nnunet.presets import build_preset
from nnunet_xattnres.overhead.measurement import MEASURED, Answer, Request

PLANNED = "nnUNetTrainerPlanned"
NO_SKIP = "nnUNetTrainerXAttnResNoSkip"
DATASET = "Dataset004_Hippocampus"


def small_plans(preset: str = "msd04", configuration: str = "3d_fullres") -> tuple[dict[str, Any], dict[str, Any]]:
    """Plans of a preset, with a small configuration `small`, and dataset.json."""
    plans, dataset_json = build_preset(preset, configuration)
    budget = TrainingBudget(1, 1, 1)
    add_small_configuration(
        plans, "small", configuration, base_features=2, max_patch_voxels=16**3, batch_size=1, budget=budget
    )
    return plans, dataset_json


def write_small_plans(preprocessed: Path) -> Path:
    """The plans file, where nnU-Net puts it. preprocessed: nnUNet_preprocessed."""
    folder = preprocessed / DATASET
    folder.mkdir(parents=True)
    plans, dataset_json = small_plans()
    (folder / "dataset.json").write_text(json.dumps(dataset_json))
    (folder / "nnUNetPlans.json").write_text(json.dumps(plans))
    return folder / "nnUNetPlans.json"


def output_options(folder: Path) -> list[str]:
    """The command's options for what it writes: its files go to a new folder."""
    folder.mkdir()
    return ["--json", str(folder / "o.json"), "--csv", str(folder / "o.csv"), "--chart", str(folder / "o.png")]


def small_request(
    trainer: str = PLANNED, dataset_json: dict[str, Any] | None = None, backend: str | None = None, **changes: Any
) -> Request:
    """changes: of the small configuration."""
    plans, preset_json = small_plans()
    plans["configurations"]["small"].update(changes)
    return Request(plans, "small", dataset_json or preset_json, trainer, "cpu", backend)


def use_own_trainer(train_step: str, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Let nnU-Net find `nnUNetTrainerMine` in a new folder. train_step: the line that its training step consists of."""
    folder.mkdir()
    (folder / "nnUNetTrainerMine.py").write_text(
        "from nnunet_xattnres.training.mixin import XAttnResTrainerMixin\n\n\n"
        "class nnUNetTrainerMine(XAttnResTrainerMixin):\n"
        "    def train_step(self, batch):\n"
        f"        {train_step}\n"
    )
    patch.setenv("nnUNet_extTrainer", str(folder))


def made_up_answers(*seconds: list[float], memory: int = 100, parameters: int = 10) -> list[Answer]:
    """seconds: of the steps, one list per round."""
    return [
        Answer(
            MEASURED,
            step_seconds=of_round,
            inference_seconds=[0.5],
            peak_memory=memory,
            kept_for_backward=memory,
            parameters=parameters,
            flops=3_000_000_000,
        )
        for of_round in seconds
    ]
