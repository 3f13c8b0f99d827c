"""nnU-Net's commands, from a raw dataset to evaluated predictions, and the Dice that a guess would reach."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from nnunetv2.evaluation.evaluate_predictions import compute_tp_fp_fn_tn, load_summary_json, region_or_label_to_mask
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunet_xattnres.common.files import write_json_atomically
from nnunet_xattnres.nnunet.commands import Model, NnUNet
from nnunet_xattnres.nnunet.datasets import reader_for
from nnunet_xattnres.nnunet.derived_configurations import TrainingBudget, add_small_configuration

FOLDS = ("0", "1")
RESENC_PLANS = "nnUNetResEncUNetMPlans"
BATCH_SIZE = {"2d": 8, "3d_lowres": 2, "3d_fullres": 2}


@dataclass(frozen=True)
class Size:
    """The size of networks and trainings. By configuration: num_iterations (per epoch) and max_patch_voxels."""

    base_features: int
    num_epochs: int
    num_iterations: Mapping[str, int]
    max_patch_voxels: Mapping[str, int]


# Networks with fewer channels take several times as many steps until they predict anything but background.
LEARNS = Size(
    base_features=32,
    num_epochs=4,
    num_iterations={"2d": 75, "3d_lowres": 75, "3d_fullres": 40},
    max_patch_voxels={"2d": 64 * 64, "3d_lowres": 20_000, "3d_fullres": 20_000},
)

Result = TypeVar("Result")


def once(step: Callable[..., Result]) -> Callable[..., Result]:
    """Run a step when its result is first needed. Later calls return the same result or raise the same error."""
    outcomes: dict[tuple, Callable[[], Result]] = {}

    @wraps(step)
    def remembered(*arguments: Any) -> Result:
        if arguments not in outcomes:
            try:
                result = step(*arguments)
                outcomes[arguments] = lambda: result
            except Exception as error:
                outcomes[arguments] = _raising(error)
        return outcomes[arguments]()

    return remembered


def _raising(error: Exception) -> Callable[[], Any]:
    def fail() -> Any:
        raise error

    return fail


def run_module(nnunet: NnUNet, module: str, *arguments: str) -> None:
    """Run one of the scripts for which nnU-Net has no command."""
    nnunet.run(sys.executable, "-m", module, *arguments, log=module)


def shrink(
    nnunet: NnUNet,
    dataset: str,
    configurations: Sequence[str],
    plans: str = "nnUNetPlans",
    size: Size = LEARNS,
) -> None:
    """Make configurations small enough for a CPU. The planned ones are kept as `<name>_planned`."""
    path = nnunet.preprocessed / dataset / f"{plans}.json"
    content = json.loads(path.read_text())
    for name in configurations:
        planned = f"{name}_planned"
        content["configurations"][planned] = content["configurations"].pop(name)
        add_small_configuration(
            content,
            name,
            planned,
            base_features=size.base_features,
            max_patch_voxels=size.max_patch_voxels[name],
            batch_size=BATCH_SIZE[name],
            budget=TrainingBudget(
                num_epochs=size.num_epochs,
                num_iterations_per_epoch=size.num_iterations[name],
                num_val_iterations_per_epoch=2,
            ),
        )
    write_json_atomically(content, path)


def make_label_scenario(nnunet: NnUNet, dataset: str, size: Size = LEARNS) -> None:
    """Make a dataset from dataset 4 with nnU-Net's own script, add lowres and cascade, and preprocess."""
    number = dataset[7:10]
    run_module(nnunet, f"nnunetv2.dataset_conversion.datasets_for_integration_tests.{dataset}")
    nnunet.run("nnUNetv2_plan_and_preprocess", "-d", number, "--no_pp", "-npfp", "2", log=f"{dataset}_plan")
    run_module(nnunet, "nnunetv2.tests.integration_tests.add_lowres_and_cascade", "-d", number)
    configurations = ("2d", "3d_lowres", "3d_fullres")
    shrink(nnunet, dataset, configurations, size=size)
    write_two_folds(nnunet, dataset)
    nnunet.run("nnUNetv2_preprocess", "-d", number, "-c", *configurations, "-np", "2", log=f"{dataset}_preprocess")


def plan_and_preprocess(nnunet: NnUNet, dataset: str, configuration: str, size: Size = LEARNS) -> None:
    command = ("nnUNetv2_plan_and_preprocess", "-d", dataset[7:10], "-c", configuration)
    nnunet.run(*command, "-npfp", "2", "-np", "2", log=f"{dataset}_plan")
    shrink(nnunet, dataset, (configuration,), size=size)
    write_two_folds(nnunet, dataset)


def plan_resenc(nnunet: NnUNet, dataset: str, configuration: str, size: Size = LEARNS) -> None:
    """Add plans with residual encoders to a dataset. They use the preprocessed images of the other plans."""
    nnunet.run("nnUNetv2_plan_experiment", "-d", dataset[7:10], "-pl", "nnUNetPlannerResEncM", log="plan_resenc")
    shrink(nnunet, dataset, (configuration,), RESENC_PLANS, size)


def write_two_folds(nnunet: NnUNet, dataset: str) -> None:
    """A `splits_final.json` whose two folds validate every case once."""
    ending = read_json(nnunet.raw / dataset / "dataset.json")["file_ending"]
    cases = sorted(file.name.removesuffix(ending) for file in (nnunet.raw / dataset / "labelsTr").iterdir())
    halves = cases[::2], cases[1::2]
    splits = [{"train": train, "val": val} for train, val in (halves, halves[::-1])]
    (nnunet.preprocessed / dataset / "splits_final.json").write_text(json.dumps(splits))


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


@dataclass(frozen=True)
class Experiment:
    """A trainer on a planned dataset. Every step is an nnU-Net command, run after the steps that it needs."""

    nnunet: NnUNet
    dataset: str
    trainer: str = "nnUNetTrainerXAttnRes"
    plans: str = "nnUNetPlans"
    folds: tuple[str, ...] = FOLDS

    @property
    def raw(self) -> Path:
        return self.nnunet.raw / self.dataset

    @property
    def dataset_json(self) -> dict[str, Any]:
        return read_json(self.raw / "dataset.json")

    @property
    def labels(self) -> LabelManager:
        return LabelManager(self.dataset_json["labels"], self.dataset_json.get("regions_class_order"))

    def cases(self, folder: Path) -> set[str]:
        """The names of the cases in a folder of segmentations."""
        ending = self.dataset_json["file_ending"]
        return {file.name.removesuffix(ending) for file in folder.glob(f"*{ending}")}

    def model(self, configuration: str) -> Path:
        return self._model(configuration).folder(self.nnunet.results)

    def _model(self, configuration: str) -> Model:
        return Model(self.dataset, configuration, self.trainer, self.plans)

    @once
    def train(self, configuration: str, fold: str) -> Path:
        """The folder of the trained and validated fold. Use `train_all`, which first trains what the cascade reads."""
        self.nnunet.run(*self.train_command(configuration, fold), log=self._log("train", f"{configuration}_{fold}"))
        return self.model(configuration) / f"fold_{fold}"

    def train_command(self, configuration: str, fold: str) -> list[str]:
        return self._model(configuration).train_command(fold, "cpu", "--npz")

    def train_all(self, configuration: str) -> list[Path]:
        """The folders of the trained and validated folds."""
        if configuration == "3d_cascade_fullres":
            self.train_all("3d_lowres")
        return [self.train(configuration, fold) for fold in self.folds]

    @once
    def find_best(self, configurations: tuple[str, ...]) -> dict[str, Any]:
        """What nnU-Net writes about the best of the configurations and their ensembles."""
        for configuration in configurations:
            self.train_all(configuration)
        which = ("-c", *configurations, "-tr", self.trainer, "-p", self.plans, "-f", *self.folds)
        self._run("find_best_configuration", self.dataset, *which, log="all")
        return read_json(self.nnunet.results / self.dataset / "inference_information.json")

    @once
    def accumulate(self, configuration: str) -> Path:
        """A folder with the validation cases of both folds."""
        self.train_all(configuration)
        output = self._output(f"accumulated_{configuration}")
        which = ("-c", configuration, "-tr", self.trainer, "-p", self.plans, "-f", *self.folds, "-o", str(output))
        self._run("accumulate_crossval_results", self.dataset, *which, log=configuration)
        return output

    @once
    def predict(self, configuration: str) -> Path:
        """The test set, with probabilities."""
        self.train_all(configuration)
        options = ["--save_probabilities"]
        if configuration == "3d_cascade_fullres":
            options += ["-prev_stage_predictions", str(self.predict("3d_lowres"))]
        output = self._output(configuration)
        images = self.raw / "imagesTs"
        command = self._model(configuration).predict_command(self.folds, images, output, "cpu", *options)
        self.nnunet.run(*command, log=self._log("predict", configuration))
        return output

    @once
    def ensemble(self, configurations: tuple[str, ...]) -> Path:
        """The test set."""
        members = [str(self.predict(configuration)) for configuration in configurations]
        output = self._output("_and_".join(configurations))
        self._run("ensemble", "-i", *members, "-o", str(output), log=output.name)
        return output

    @once
    def predict_best(self, configurations: tuple[str, ...]) -> Path:
        """The test set, predicted and postprocessed as `find_best` says."""
        best = self.find_best(configurations)["best_model_or_ensemble"]
        selected = tuple(model["configuration"] for model in best["selected_model_or_models"])
        predictions = self.ensemble(selected) if len(selected) > 1 else self.predict(selected[0])
        output = self._output("postprocessed")
        how = ("-pp_pkl_file", best["postprocessing_file"], "-plans_json", best["some_plans_file"])
        description = ("-dataset_json", str(self.raw / "dataset.json"))
        self._run(
            "apply_postprocessing", "-i", str(predictions), "-o", str(output), *how, *description, log=output.name
        )
        return output

    @once
    def evaluate(self, predictions: Path) -> float:
        """The mean foreground Dice on the test set."""
        description = ("-djfile", str(self.raw / "dataset.json"))
        plans = ("-pfile", str(self.nnunet.preprocessed / self.dataset / f"{self.plans}.json"))
        folders = (str(self.raw / "labelsTs"), str(predictions))
        self._run("evaluate_folder", *folders, *description, *plans, log=predictions.name)
        return mean_dice(predictions)

    def chance(self, references: Path) -> float:
        """The mean foreground Dice, as nnU-Net computes it, of a guess that is right in everything but the image.

        The guess is the segmentation of another case, somewhere: centre on centre, then rolled around every axis by a
        random number of voxels. All pairs of a reference and another case count. references: a folder of them; the
        other cases are the training cases, as they were before nnU-Net's scripts hid labels.
        """
        rng = np.random.default_rng(0)
        reader = reader_for(self.dataset_json)()
        others = self._read(reader, whole_references(self.raw))
        classes = self.labels.foreground_regions if self.labels.has_regions else self.labels.foreground_labels
        dice = []
        for name, reference in self._read(reader, references).items():
            ignored = reference == self.labels.ignore_label
            for other, segmentation in others.items():
                if other != name:
                    guess = centred(segmentation, reference.shape)
                    guess = np.roll(guess, rng.integers(reference.shape), axis=tuple(range(reference.ndim)))
                    dice.append([_dice(reference, guess, which, ignored) for which in classes])
        return float(np.mean(np.nanmean(dice, axis=0)))

    def _read(self, reader: Any, folder: Path) -> dict[str, np.ndarray]:
        files = sorted(folder.glob(f"*{self.dataset_json['file_ending']}"))
        return {file.name: reader.read_seg(str(file))[0][0] for file in files}

    def _output(self, name: str) -> Path:
        return (
            self.nnunet.workdir / "predictions" / self.dataset / self.plans / self.trainer / "_".join(self.folds) / name
        )

    def _run(self, command: str, *arguments: str, log: str) -> None:
        self.nnunet.run(f"nnUNetv2_{command}", *arguments, log=self._log(command, log))

    def _log(self, command: str, name: str) -> str:
        return f"{self.dataset}_{self.trainer}_{self.plans}_{command}_{name}"


def whole_references(raw: Path) -> Path:
    """Those of the training cases, without an ignore label: nnU-Net's scripts make their datasets from number 4."""
    is_made_from_it = "IntegrationTest" in raw.name
    return (next(raw.parent.glob("Dataset004_*")) if is_made_from_it else raw) / "labelsTr"


def centred(segmentation: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Cropped and padded with background to `shape`, its centre in the centre."""
    starts = [(has - wanted) // 2 for has, wanted in zip(segmentation.shape, shape, strict=True)]
    return crop_and_pad_nd(segmentation, [[start, start + size] for start, size in zip(starts, shape, strict=True)])


def _dice(reference: np.ndarray, guess: np.ndarray, which: Any, ignored: np.ndarray) -> float:
    masks = (region_or_label_to_mask(segmentation, which) for segmentation in (reference, guess))
    tp, fp, fn, _ = compute_tp_fp_fn_tn(*masks, ignored)
    return 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else np.nan


def mean_dice(folder: Path) -> float:
    return load_summary_json(str(folder / "summary.json"))["foreground_mean"]["Dice"]
