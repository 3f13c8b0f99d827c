"""Before anything is trained: the spec is checked, datasets are planned and preprocessed, configurations are made."""

import inspect
import io
import json
import os
import shlex
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nnunetv2
import torch
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.crossval_split import generate_crossval_split
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from nnunetv2.utilities.utils import (
    get_filenames_of_train_images_and_targets,
    get_identifiers_from_splitted_dataset_folder,
)

from nnunet_xattnres.benchmark.matrix import PREPARATION_LOCK, SPEC, Cell, is_locked, locked, write_cells
from nnunet_xattnres.benchmark.spec import (
    PLANNER,
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
from nnunet_xattnres.common.errors import XAttnResError, suggestion
from nnunet_xattnres.common.files import write_json_atomically
from nnunet_xattnres.common.processes import environment_with
from nnunet_xattnres.nnunet.commands import NUM_WORKERS, NnUNet
from nnunet_xattnres.nnunet.datasets import InputDataset, place_raw_dataset, read_dataset, read_dataset_json
from nnunet_xattnres.nnunet.derived_configurations import (
    TrainingBudget,
    add_small_configuration,
    add_wide_configuration,
)
from nnunet_xattnres.nnunet.planned_network import PlannedNetwork
from nnunet_xattnres.nnunet.trainer_lookup import find_trainer
from nnunet_xattnres.training.mixin import XAttnResTrainerMixin

SPLITS = "splits_final.json"
# nnU-Net's own.
NUM_ITERATIONS, NUM_VAL_ITERATIONS = 250, 50


def check_spec(spec: Spec) -> tuple[Spec, list[InputDataset]]:
    """The spec with what can be filled in, and where its datasets come from.

    Raises `XAttnResError` for trainers, planners and datasets that are not there or do not fit together.
    """
    for arm in spec.trainers:
        _check_arm(arm, spec.configurations)
    inputs = [_input_dataset(dataset) for dataset in spec.datasets]
    names: dict[str, InputDataset] = {}
    for data in inputs:
        other = names.setdefault(data.name[7:10], data)
        if other is not data:
            raise XAttnResError(f"{other.origin} and {data.origin} both have the id {int(data.name[7:10])}")
    datasets = [_filled(dataset, data) for dataset, data in zip(spec.datasets, inputs, strict=True)]
    return replace(spec, datasets=tuple(datasets)), inputs


def prepare(root: Path, spec: Spec, inputs: list[InputDataset]) -> list[Cell]:
    """Everything before training, whatever of it is not there yet. Returns the cells of the matrix.

    Raises `XAttnResError` if the folder belongs to another spec, and where nnU-Net's plans do not fit this one.
    """
    if is_locked(root / PREPARATION_LOCK):
        print("Another process prepares the data: waiting for it", flush=True)
    with locked(root / PREPARATION_LOCK, patience=float("inf")) as lock:
        _check_owner(root, spec)
        # A command that outlives this process keeps the lock: nobody begins it beside itself.
        nnunet = NnUNet(root, "cpu", keep_open=(lock,))
        preparations = [_Preparation(nnunet, spec, dataset) for dataset in spec.datasets]
        for preparation, data in zip(preparations, inputs, strict=True):
            place_raw_dataset(data, nnunet, "-o", with_test_set=bool(preparation.dataset.test))
            preparation.plan()
        variants = [(preparation.dataset, preparation.variants()) for preparation in preparations]
        # What is wrong with a spec has shown by now. Until here, another one may take the folder.
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


def _check_arm(arm: Arm, configurations: tuple[Configuration, ...]) -> None:
    _plans_name(arm.planner)
    if arm.parameters_of is not None:
        find_trainer(arm.parameters_of)
    budgets = [configuration.name for configuration in configurations if configuration.epochs]
    if not issubclass(find_trainer(arm.trainer), XAttnResTrainerMixin) and budgets:
        raise XAttnResError(
            f"{arm.trainer} ignores the budget of the configuration {budgets[0]}: take a trainer of this plugin, "
            "nnUNetTrainerPlanned for the planned network"
        )


def _plans_name(planner: str) -> str:
    """What nnU-Net calls the plans of a planner. Raises `XAttnResError` if it finds no such class."""
    folder = os.path.join(nnunetv2.__path__[0], "experiment_planning")
    found = recursive_find_python_class(folder, planner, "nnunetv2.experiment_planning")
    if not (isinstance(found, type) and issubclass(found, ExperimentPlanner)):
        known = [PLANNER, *(f"nnUNetPlannerResEnc{size}" for size in "MLXL")]
        raise XAttnResError(
            f"nnU-Net finds no planner {planner}: {suggestion(planner, known) or 'see its documentation'}"
        )
    return inspect.signature(found).parameters["plans_name"].default


def _input_dataset(dataset: Dataset) -> InputDataset:
    data = read_dataset(Path(dataset.path or _raw_folder(dataset.id)))
    if dataset.name not in ("", data.name):
        raise XAttnResError(f"{data.origin} makes {data.name}, not {dataset.name}: mend the name in the spec")
    return data


def _raw_folder(number: int | None) -> str:
    if "nnUNet_raw" not in os.environ:
        raise XAttnResError(f"dataset {number}: nnUNet_raw is not set, in which nnU-Net looks for it: export it")
    found = list(Path(os.environ["nnUNet_raw"]).glob(f"Dataset{number:03d}_*"))
    if len(found) != 1:
        there = ", ".join(folder.name for folder in sorted(Path(os.environ["nnUNet_raw"]).glob("Dataset*"))) or "none"
        raise XAttnResError(f"dataset {number}: nnUNet_raw must hold one of that number; there are {there}")
    return str(found[0])


def _filled(dataset: Dataset, data: InputDataset) -> Dataset:
    test = _has_test_set(dataset, Path(data.origin))
    family = dataset.family or data.name
    return replace(dataset, path=data.origin, id=None, name=data.name, family=family, test=test)


def _has_test_set(dataset: Dataset, data: Path) -> bool:
    """Raises `XAttnResError` for a test set of which a label or an image is missing."""
    is_raw = data.is_dir() and "channel_names" in read_dataset_json(data)
    if not is_raw and dataset.test:
        raise XAttnResError(f"{data}: the test sets of MSD tasks have no labels: remove test from the dataset")
    if not is_raw or dataset.test is False:
        return False
    ending = read_dataset_json(data)["file_ending"]
    images = data / "imagesTs"
    cases = get_identifiers_from_splitted_dataset_folder(str(images), ending) if images.is_dir() else []
    if not len(cases):
        if dataset.test:
            raise XAttnResError(f"{data} has no test images in imagesTs: remove test from the dataset")
        return False
    unlabelled = [case for case in cases if not (data / "labelsTs" / f"{case}{ending}").is_file()]
    if unlabelled:
        raise XAttnResError(
            f"{data}: the test set has no label for {unlabelled[0]}: add it to labelsTs, or say test: false"
        )
    labelled = {path.name.removesuffix(ending) for path in (data / "labelsTs").glob(f"*{ending}")}
    without_image = sorted(labelled - set(cases))
    if without_image:
        raise XAttnResError(
            f"{data}: the test set has no image for {without_image[0]}: remove it from labelsTs, or say test: false"
        )
    return True


class _Preparation:
    """The steps of one dataset. A step whose result is there already does nothing."""

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
        """nnU-Net's plans of every planner, with the configurations of the spec added, but not written yet."""
        fingerprint = ("nnUNetv2_extract_fingerprint", "-d", self.number, "--clean", "-np", NUM_WORKERS)
        self._run_once("dataset_fingerprint", *fingerprint)
        for planner in dict.fromkeys(arm.planner for arm in self.arms):
            self._run_once(_plans_name(planner), "nnUNetv2_plan_experiment", "-d", self.number, "-pl", planner)
            self.plans[planner] = plans = json.loads(self._plans_file(planner).read_text())
            for configuration in self.configurations:
                self._add(plans, configuration)
                for arm in self.arms:
                    if arm.planner == planner:
                        self._widen(plans, configuration, arm)
        self._split()

    def write_plans(self) -> None:
        for planner, plans in self.plans.items():
            write_json_atomically(plans, self._plans_file(planner))

    def preprocess(self) -> None:
        """What the configurations train on; several share it."""
        for plans in map(PlansManager, self.plans.values()):
            for base in dict.fromkeys(configuration.base for configuration in self.configurations):
                command = ["nnUNetv2_preprocess", "-d", self.number, "-plans_name", plans.plans_name]
                data = plans.get_configuration(base).data_identifier
                self._run_once(data, *command, "-c", base, "-np", NUM_WORKERS)

    def variants(self) -> list[dict[str, Any]]:
        """The fields of the cells of this dataset that do not depend on fold and seed."""
        dataset_json = read_dataset_json(self.folder)
        variants = []
        for configuration in self.configurations:
            for arm in self.arms:
                plans = self.plans[arm.planner]
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

    def _plans_file(self, planner: str) -> Path:
        return self.folder / f"{_plans_name(planner)}.json"

    def _add(self, plans: dict[str, Any], configuration: Configuration) -> None:
        if configuration.base not in plans["configurations"]:
            available = ", ".join(plans["configurations"])
            raise XAttnResError(
                f"nnU-Net plans no {configuration.base} for {self.dataset.name}: choose from {available}, "
                "or say which configurations the dataset has in the spec"
            )
        if PlansManager(plans).get_configuration(configuration.base).previous_stage_name is not None:
            raise XAttnResError(f"{configuration.base} is a cascade, which needs the folds of another: leave it out")
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

    def _widen(self, plans: dict[str, Any], configuration: Configuration, arm: Arm) -> None:
        name = planned_name(configuration, arm)
        if name not in plans["configurations"]:
            width = arm.width
            if arm.parameters_of is not None:
                width = self._matching_width(plans, configuration, arm)
            assert width is not None
            add_wide_configuration(plans, name, configuration.name, width)

    def _matching_width(self, plans: dict[str, Any], configuration: Configuration, arm: Arm) -> float:
        """The width at which `arm` has as many parameters as the trainer that it names, as nearly as can be."""
        dataset_json = read_dataset_json(self.folder)

        def parameters(trainer: str, width: float) -> int:
            changed = json.loads(json.dumps(plans))
            add_wide_configuration(changed, "wide", configuration.name, width)
            return _count_parameters(
                PlannedNetwork(self.dataset.name, changed, "wide", dataset_json), find_trainer(trainer)
            )

        wanted = parameters(arm.parameters_of or "", 1.0)
        low, high = WIDTHS
        # Channels are whole numbers: twelve halvings are finer than that.
        for _ in range(12):
            middle = (low + high) / 2
            low, high = (middle, high) if parameters(arm.trainer, middle) < wanted else (low, middle)
        return min(low, high, key=lambda width: abs(parameters(arm.trainer, width) - wanted))

    def _split(self) -> None:
        """The user's own split, or nnU-Net's, before several trainings want to write it at once."""
        raw = self.nnunet.raw / self.dataset.name
        cases = sorted(get_filenames_of_train_images_and_targets(str(raw), read_dataset_json(raw)))
        # The first is there already, or nnU-Net's planner has copied it from the raw dataset.
        folders = [self.folder, Path(os.environ.get("nnUNet_preprocessed", self.folder), self.dataset.name)]
        for path in (folder / SPLITS for folder in folders):
            if path.is_file():
                splits = _read_splits(path, cases, self.folds)
                break
        else:
            splits = [
                {key: list(map(str, part)) for key, part in fold.items()} for fold in generate_crossval_split(cases)
            ]
        write_json_atomically(splits, self.folder / SPLITS)

    def _run_once(self, result: str, *command: str) -> None:
        """Run the command that makes `result`, unless it has ended well before: what is there may be half of it."""
        complete = self.folder / f"{result}.complete"
        if not complete.exists():
            print(f"$ {shlex.join(command)}", flush=True)
            self.nnunet.run(*command, log=f"{self.dataset.name}/{result}")
            complete.touch()


def _read_splits(path: Path, cases: list[str], folds: tuple[int, ...]) -> list[dict[str, list[str]]]:
    """Raises `XAttnResError` for a file with which nnU-Net could not train, or would split at random."""
    try:
        splits = json.loads(path.read_text())
        unknown = {case for fold in splits for part in ("train", "val") for case in fold[part]}.difference(cases)
    except (ValueError, KeyError, TypeError):
        raise XAttnResError(f"{path} is no list of folds with train and val: mend or remove it") from None
    if unknown:
        raise XAttnResError(f"{path} has {min(unknown)}, which is no training case of the dataset: mend or remove it")
    if max(folds) >= len(splits):
        raise XAttnResError(f"{path} has {len(splits)} folds, counted from 0: leave {max(folds)} out of the spec's")
    return splits


def _num_epochs(planned: PlannedNetwork, trainer: type[nnUNetTrainer]) -> int:
    """As a trainer reports them. What the trainer writes when it begins is thrown away."""
    with TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        folders = dict.fromkeys(("nnUNet_results", "nnUNet_preprocessed"), folder)
        with environment_with(**folders, nnUNet_wandb_enabled="0"):
            return planned.make_trainer(trainer, fold=0, device="cpu").num_epochs


def _count_parameters(planned: PlannedNetwork, trainer: type[nnUNetTrainer]) -> int:
    with torch.device("meta"):
        network = planned.build(trainer)
    return sum(parameter.numel() for parameter in network.parameters())
