"""The phantom dataset that tests share, its plans, and trainers on it."""

import json
from pathlib import Path
from typing import Any

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_xattnres.nnunet.commands import NnUNet
from nnunet_xattnres.nnunet.derived_configurations import TrainingBudget
from nnunet_xattnres.nnunet.planned_network import PlannedNetwork

PHANTOM = "Dataset901_Phantom"
ONE_SHORT_EPOCH = TrainingBudget(num_epochs=1, num_iterations_per_epoch=2, num_val_iterations_per_epoch=1)


def plans_file(nnunet: NnUNet, identifier: str = "nnUNetPlans") -> Path:
    return nnunet.preprocessed / PHANTOM / f"{identifier}.json"


def read_plans(nnunet: NnUNet, identifier: str = "nnUNetPlans") -> dict:
    return json.loads(plans_file(nnunet, identifier).read_text())


def make_trainer(
    nnunet: NnUNet, trainer_class: type[nnUNetTrainer], configuration: str = "3d_small", **budget: Any
) -> Any:
    plans = read_plans(nnunet)
    plans["configurations"][configuration].setdefault("training", {}).update(budget)
    dataset_json = json.loads((nnunet.raw / PHANTOM / "dataset.json").read_text())
    return PlannedNetwork(PHANTOM, plans, configuration, dataset_json).make_trainer(trainer_class, fold=0, device="cpu")
