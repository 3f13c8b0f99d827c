"""Whether a spec can be run: its trainers, planners and datasets are looked up, and what it leaves out is filled in."""

import inspect
import os
from pathlib import Path

import nnunetv2
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class
from nnunetv2.utilities.utils import get_identifiers_from_splitted_dataset_folder

from nnunet_xattnres.benchmark.spec import PLANNER, Arm, Configuration, Dataset, Spec
from nnunet_xattnres.common.errors import XAttnResError, suggestion
from nnunet_xattnres.nnunet.datasets import InputDataset, read_dataset, read_dataset_json
from nnunet_xattnres.nnunet.folders import dataset_folder
from nnunet_xattnres.nnunet.trainer_lookup import find_trainer
from nnunet_xattnres.nnunet.xattnres_plans import default_plans_name, preset_config
from nnunet_xattnres.training.mixin import XAttnResTrainerMixin, adds_xattnres, check_bases


def check_spec(spec: Spec) -> tuple[Spec, list[InputDataset]]:
    """The spec with the paths, names, families and test sets of its datasets filled in, and the datasets that it names.

    Raises `XAttnResError` for trainers, planners and datasets that do not exist or do not fit together.
    """
    for arm in spec.trainers:
        _check_arm(arm, spec.configurations)
    _check_differences(spec.trainers)
    inputs = [_input_dataset(dataset) for dataset in spec.datasets]
    by_number: dict[str, InputDataset] = {}
    for data in inputs:
        number = data.name[7:10]
        other = by_number.setdefault(number, data)
        if other is not data:
            raise XAttnResError(f"{other.origin} and {data.origin} both have the id {int(number)}")
    datasets = tuple(_filled_in(dataset, data) for dataset, data in zip(spec.datasets, inputs, strict=True))
    return spec.model_copy(update={"datasets": datasets}), inputs


def plans_name(planner: str) -> str:
    """nnU-Net's name of the plans that a planner makes. Raises `XAttnResError` if nnU-Net finds no such planner."""
    folder = os.path.join(nnunetv2.__path__[0], "experiment_planning")
    found = recursive_find_python_class(folder, planner, "nnunetv2.experiment_planning")
    if not (isinstance(found, type) and issubclass(found, ExperimentPlanner)):
        known = [PLANNER, *(f"nnUNetPlannerResEnc{size}" for size in ("M", "L", "XL"))]
        near = suggestion(planner, known) or "see its documentation"
        raise XAttnResError(f"nnU-Net finds no planner {planner}: {near}")
    return inspect.signature(found).parameters["plans_name"].default


def _check_arm(arm: Arm, configurations: tuple[Configuration, ...]) -> None:
    plans_name(arm.planner)
    if arm.parameters_of is not None:
        find_trainer(arm.parameters_of)
    trainer = find_trainer(arm.trainer)
    check_bases(trainer)
    if arm.preset is not None:
        preset_config(arm.preset)
        if adds_xattnres(trainer):
            raise XAttnResError(
                f"{arm.trainer} and the preset {arm.preset} both add XAttnRes: take nnUNetTrainerPlanned, or a trainer "
                "of nnU-Net's own"
            )
    budgets = [configuration.name for configuration in configurations if configuration.epochs]
    if not issubclass(trainer, XAttnResTrainerMixin) and budgets:
        raise XAttnResError(
            f"{arm.trainer} ignores the budget of the configuration {budgets[0]}: take a trainer of this plugin, "
            "nnUNetTrainerPlanned for the planned network"
        )


def _check_differences(arms: tuple[Arm, ...]) -> None:
    """Raise `XAttnResError` if two trainers train the same plans in the same way: they would share their folders."""
    names: dict[Arm, str] = {}
    for arm in arms:
        plans = plans_name(arm.planner)
        if arm.preset is not None:
            plans = default_plans_name(plans, arm.preset)
        same = names.setdefault(arm.model_copy(update={"name": "", "planner": plans, "preset": None}), arm.name)
        if same != arm.name:
            raise XAttnResError(f"trainers {same} and {arm.name} are the same: remove one")


def _input_dataset(dataset: Dataset) -> InputDataset:
    data = read_dataset(Path(dataset.path or _raw_folder(dataset.id)))
    if dataset.name not in ("", data.name):
        raise XAttnResError(f"{data.origin} makes {data.name}, not {dataset.name}: mend the name in the spec")
    return data


def _raw_folder(number: int | None) -> str:
    try:
        return str(dataset_folder(str(number), "nnUNet_raw"))
    except XAttnResError as error:
        raise XAttnResError(f"dataset {number}: {error}") from None


def _filled_in(dataset: Dataset, data: InputDataset) -> Dataset:
    return dataset.model_copy(
        update={
            "path": data.origin,
            "id": None,
            "name": data.name,
            "family": dataset.family or data.name,
            "test": _has_test_set(dataset, Path(data.origin)),
        }
    )


def _has_test_set(dataset: Dataset, data: Path) -> bool:
    """Whether to predict a test set. Raises `XAttnResError` if one of its labels or images is missing."""
    dataset_json = read_dataset_json(data) if data.is_dir() else {}
    is_raw = "channel_names" in dataset_json
    if not is_raw and dataset.test:
        raise XAttnResError(f"{data}: the test sets of MSD tasks have no labels: remove test from the dataset")
    if not is_raw or dataset.test is False:
        return False
    ending = dataset_json["file_ending"]
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
