"""What comes before training: datasets are planned and preprocessed, and the configurations of the spec are made."""

import io
import json
import os
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.crossval_split import generate_crossval_split
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from nnunet_xattnres.benchmark.cells import COMPLETE, PREPARATION_LOCK, SPEC, Cell, read_planned, write_cells
from nnunet_xattnres.benchmark.locks import is_locked, locked
from nnunet_xattnres.benchmark.spec import (
    WIDTHS,
    Arm,
    Configuration,
    Dataset,
    Spec,
    planned_name,
    read_spec,
    without_executor,
    write_spec,
)
from nnunet_xattnres.benchmark.spec_check import plans_name
from nnunet_xattnres.common.errors import XAttnResError
from nnunet_xattnres.common.files import write_json_atomically
from nnunet_xattnres.common.processes import environment_with
from nnunet_xattnres.common.text import counted, shell_command
from nnunet_xattnres.nnunet.commands import NUM_WORKERS, NnUNet
from nnunet_xattnres.nnunet.datasets import SPLITS, InputDataset, place_raw_dataset, read_dataset_json, read_splits
from nnunet_xattnres.nnunet.derived_configurations import (
    TrainingBudget,
    add_small_configuration,
    add_wide_configuration,
)
from nnunet_xattnres.nnunet.planned_network import PlannedNetwork
from nnunet_xattnres.nnunet.trainer_lookup import find_trainer
from nnunet_xattnres.nnunet.xattnres_plans import default_plans_name, plans_with_xattnres, preset_config

# nnU-Net's defaults.
NUM_ITERATIONS, NUM_VAL_ITERATIONS = 250, 50


def prepare(root: Path, spec: Spec, inputs: list[InputDataset]) -> list[Cell]:
    """Do what is missing of everything before training. Returns the cells of the matrix.

    Raises `XAttnResError` if the folder belongs to another spec, and if nnU-Net's plans do not fit this one.
    """
    if is_locked(root / PREPARATION_LOCK):
        print("Another process prepares the data: waiting for it", flush=True)
    with locked(root / PREPARATION_LOCK, patience=float("inf")) as lock:
        _check_owner(root, spec)
        # A command that outlives this process keeps the lock, so that no other process starts the same command.
        nnunet = NnUNet(root, "cpu", keep_open=(lock,))
        preparations = [DatasetPreparation(nnunet, spec, dataset) for dataset in spec.datasets]
        for preparation, data in zip(preparations, inputs, strict=True):
            place_raw_dataset(data, nnunet, "-o", with_test_set=bool(preparation.dataset.test))
            preparation.plan()
        variants = [(preparation.dataset, preparation.variants()) for preparation in preparations]
        # The folder belongs to the spec from here on: all that could be wrong with the spec has been checked.
        write_spec(spec, root / SPEC)
        for preparation in preparations:
            preparation.write_plans()
            preparation.preprocess()
        cells = [
            Cell(dataset.name, **variant, fold=fold, seed=seed, test=bool(dataset.test))
            for seed in spec.seeds
            for fold in spec.folds
            for dataset, variants_of_dataset in variants
            for variant in variants_of_dataset
        ]
        write_cells(root, cells)
    return cells


def _check_owner(root: Path, spec: Spec) -> None:
    path = root / SPEC
    if path.exists() and without_executor(read_spec(path)) != without_executor(spec):
        raise XAttnResError(f"{root} belongs to another spec, {path}: choose another -o")


class DatasetPreparation:
    """The steps of preparing one dataset. A step that is done already does nothing."""

    def __init__(self, nnunet: NnUNet, spec: Spec, dataset: Dataset) -> None:
        self.nnunet = nnunet
        self.dataset = dataset
        self.configurations = spec.configurations_of(dataset)
        self.arms = spec.arms_of(dataset)
        self.folds = spec.folds
        self.number = str(int(dataset.name[7:10]))
        self.folder = nnunet.preprocessed / dataset.name
        self.plans: dict[str, dict[str, Any]] = {}

    def plan(self) -> None:
        """Let nnU-Net plan with every planner, and add the configurations of the spec, in memory only."""
        fingerprint = ("nnUNetv2_extract_fingerprint", "-d", self.number, "--clean", "-np", NUM_WORKERS)
        self._run_once("dataset_fingerprint", *fingerprint)
        for planner in dict.fromkeys(arm.planner for arm in self.arms):
            self._run_once(plans_name(planner), "nnUNetv2_plan_experiment", "-d", self.number, "-pl", planner)
            self.plans[planner] = plans = read_planned(self._plans_file(planner))
            for configuration in self.configurations:
                self._add_configuration(plans, configuration)
                for arm in self.arms:
                    if arm.planner == planner:
                        self._add_widened(plans, configuration, arm)
        self.split()

    def write_plans(self) -> None:
        """Write the plans with the configurations of the spec."""
        for planner, plans in self.plans.items():
            write_json_atomically(plans, self._plans_file(planner))
        for plans in (self._plans_of(arm) for arm in self.arms if arm.preset):
            write_json_atomically(plans, self.folder / f"{plans['plans_name']}.json")

    def preprocess(self) -> None:
        """Let nnU-Net preprocess the data. Configurations that are made from one base share its data."""
        for plans in map(PlansManager, self.plans.values()):
            for base in dict.fromkeys(configuration.base for configuration in self.configurations):
                command = ["nnUNetv2_preprocess", "-d", self.number, "-plans_name", plans.plans_name]
                data = plans.get_configuration(base).data_identifier
                self._run_once(data, *command, "-c", base, "-np", NUM_WORKERS)

    def variants(self) -> list[dict[str, Any]]:
        """The fields of a `Cell` that do not depend on fold and seed, for every configuration and arm."""
        dataset_json = read_dataset_json(self.folder)
        variants = []
        for configuration in self.configurations:
            for arm in self.arms:
                plans = self._plans_of(arm)
                name = planned_name(configuration, arm)
                planned = PlannedNetwork(self.dataset.name, plans, name, dataset_json)
                trainer = find_trainer(arm.trainer)
                variants.append(
                    {
                        "configuration": configuration.name,
                        "trainer": arm.name,
                        "trainer_class": arm.trainer,
                        "plans": plans["plans_name"],
                        "planned_configuration": name,
                        "num_epochs": _num_epochs(planned, trainer),
                        "parameters": _count_parameters(planned, trainer),
                    }
                )
        return variants

    def _plans_of(self, arm: Arm) -> dict[str, Any]:
        """The plans of the arm's planner, with the XAttnRes of its preset if it has one."""
        plans = self.plans[arm.planner]
        if arm.preset is None:
            return plans
        name = default_plans_name(plans["plans_name"], arm.preset)
        configurations = [configuration.name for configuration in self.configurations]
        return plans_with_xattnres(plans, name, preset_config(arm.preset), configurations)

    def _plans_file(self, planner: str) -> Path:
        return self.folder / f"{plans_name(planner)}.json"

    def _add_configuration(self, plans: dict[str, Any], configuration: Configuration) -> None:
        if configuration.base not in plans["configurations"]:
            available = ", ".join(plans["configurations"])
            raise XAttnResError(
                f"nnU-Net plans no {configuration.base} for {self.dataset.name}: choose from {available}, "
                "or say which configurations the dataset has in the spec"
            )
        if PlansManager(plans).get_configuration(configuration.base).previous_stage_name is not None:
            raise XAttnResError(f"{configuration.base} is a cascade, which needs another one's folds: leave it out")
        if configuration.name not in plans["configurations"]:
            budget = configuration.epochs and TrainingBudget(
                configuration.epochs,
                configuration.iterations or NUM_ITERATIONS,
                configuration.validation_iterations or NUM_VAL_ITERATIONS,
            )
            add_small_configuration(
                plans,
                configuration.name,
                configuration.base,
                base_features=configuration.features,
                max_patch_voxels=configuration.patch_voxels,
                batch_size=configuration.batch_size,
                budget=budget or None,
            )

    def _add_widened(self, plans: dict[str, Any], configuration: Configuration, arm: Arm) -> None:
        name = planned_name(configuration, arm)
        if name not in plans["configurations"]:
            width = arm.width or self._matching_width(plans, configuration.name, arm)
            add_wide_configuration(plans, name, configuration.name, width)

    def _matching_width(self, plans: dict[str, Any], configuration: str, arm: Arm) -> float:
        """The width at which `arm` comes closest to the number of parameters of the trainer `parameters_of`."""
        dataset_json = read_dataset_json(self.folder)
        trainer, other_trainer = find_trainer(arm.trainer), find_trainer(arm.parameters_of or arm.trainer)

        def parameters(trainer: type[nnUNetTrainer], width: float) -> int:
            changed = json.loads(json.dumps(plans))
            add_wide_configuration(changed, "wide", configuration, width)
            return _count_parameters(PlannedNetwork(self.dataset.name, changed, "wide", dataset_json), trainer)

        wanted = parameters(other_trainer, 1.0)
        low, high = WIDTHS
        # Channels are whole numbers. Twelve halvings resolve every one of them.
        for _ in range(12):
            middle = (low + high) / 2
            low, high = (middle, high) if parameters(trainer, middle) < wanted else (low, middle)
        return min(low, high, key=lambda width: abs(parameters(trainer, width) - wanted))

    def split(self) -> None:
        """Write the folds, the user's own or nnU-Net's, before several trainings write them at the same time."""
        raw = self.nnunet.raw / self.dataset.name
        cases = sorted(get_filenames_of_train_images_and_targets(str(raw), read_dataset_json(raw)))
        # A file in the first folder is this method's own, or nnU-Net's planner has copied it from the raw dataset.
        folders = [self.folder, Path(os.environ.get("nnUNet_preprocessed", self.folder), self.dataset.name)]
        for path in (folder / SPLITS for folder in folders):
            if path.is_file():
                splits = _read_splits(path, cases, self.folds)
                break
        else:
            splits = [
                {key: list(map(str, part)) for key, part in fold.items()} for fold in generate_crossval_split(cases)
            ]
            if max(self.folds) >= len(splits):
                raise XAttnResError(
                    f"nnU-Net makes {counted(len(splits), 'fold')} of {self.dataset.name}, counted from 0: leave "
                    f"{max(self.folds)} out of the spec's, or put a {SPLITS} with more into {self.dataset.path}"
                )
        write_json_atomically(splits, self.folder / SPLITS)

    def _run_once(self, result: str, *command: str) -> None:
        """Run the command that makes `result`, unless it has succeeded before. The result alone may be incomplete."""
        complete = self.folder / f"{result}{COMPLETE}"
        if not complete.exists():
            print(f"$ {shell_command(*command)}", flush=True)
            self.nnunet.run(*command, log=f"{self.dataset.name}/{result}")
            complete.touch()


def _read_splits(path: Path, cases: list[str], folds: tuple[int, ...]) -> list[dict[str, list[str]]]:
    """Read a split. Raises `XAttnResError` if nnU-Net could not train with it, or would replace it by a random one."""
    splits = read_splits(path, "mend or remove it")
    unknown = {case for fold in splits for part in fold.values() for case in part}.difference(cases)
    if unknown:
        raise XAttnResError(f"{path} has {min(unknown)}, which is no training case of the dataset: mend or remove it")
    if max(folds) >= len(splits):
        raise XAttnResError(
            f"{path} has {counted(len(splits), 'fold')}, counted from 0: leave {max(folds)} out of the spec's"
        )
    return splits


def _num_epochs(planned: PlannedNetwork, trainer: type[nnUNetTrainer]) -> int:
    """The number of epochs that a trainer reports. What the trainer writes when it is made is thrown away."""
    with TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        folders = dict.fromkeys(("nnUNet_results", "nnUNet_preprocessed"), folder)
        with environment_with(**folders, nnUNet_wandb_enabled="0"):
            return planned.make_trainer(trainer, fold=0, device="cpu").num_epochs


def _count_parameters(planned: PlannedNetwork, trainer: type[nnUNetTrainer]) -> int:
    with torch.device("meta"):
        network = planned.build(trainer)
    return sum(parameter.numel() for parameter in network.parameters())
