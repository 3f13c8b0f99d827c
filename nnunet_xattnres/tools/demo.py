"""The command `nnunet-xattnres demo`: from a dataset to a Dice table and a picture, small enough for a CPU.

The steps run nnU-Net's own commands in one working directory. A step whose result exists is skipped, so that another
run continues where the last one stopped.
"""

import shutil
import time
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from nnunetv2.evaluation.evaluate_predictions import load_summary_json
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from nnunet_xattnres.common.device import choose_device
from nnunet_xattnres.common.errors import XAttnResError, reason
from nnunet_xattnres.common.figures import write_figure
from nnunet_xattnres.common.files import link_or_copy, make_writable_folder, read_json, write_json_atomically
from nnunet_xattnres.common.text import shell_command
from nnunet_xattnres.nnunet.commands import NUM_WORKERS, Model, NnUNet
from nnunet_xattnres.nnunet.datasets import (
    SPLITS,
    Cases,
    InputDataset,
    names_of_values,
    phantom_dataset,
    place_raw_dataset,
    read_dataset,
    read_dataset_json,
    read_splits,
    reader_for,
)
from nnunet_xattnres.nnunet.derived_configurations import TrainingBudget, add_small_configuration, reduced_patch_size
from nnunet_xattnres.nnunet.folders import check_not_of_nnunet
from nnunet_xattnres.nnunet.trainer_lookup import find_trainer
from nnunet_xattnres.tools.demo_report import PicturedCase, dice_per_case, dice_table, draw_cases, spread_over_ranking
from nnunet_xattnres.training.checkpoint import FINAL_CHECKPOINT
from nnunet_xattnres.training.mixin import XAttnResTrainerMixin, check_bases

BASELINE = "nnUNetTrainerPlanned"
PLANS = "nnUNetPlans"
FOLD = "0"

BASE_FEATURES = 8
MAX_PATCH_VOXELS = 100_000
VOXELS_PER_STEP = 180_000
BUDGET = TrainingBudget(num_epochs=14, num_iterations_per_epoch=100, num_val_iterations_per_epoch=5)

NUM_PICTURED_CASES = 4


def run_demo(data: Path | None, workdir: Path, trainer: str, baseline: bool) -> None:
    """Train, predict and evaluate. Print a Dice table and draw a picture.

    data: a task of the Medical Segmentation Decathlon or a dataset in nnU-Net's raw format, which is never modified.
        None for generated phantoms.
    workdir: where everything is written. Another run with the same folder continues.
    trainer: the name of any trainer that nnU-Net finds.
    baseline: also train the planned network, with the same budget.

    Raises `XAttnResError` for data that cannot be used, an unknown trainer, and an nnU-Net command that fails.
    """
    started = time.monotonic()
    dataset = phantom_dataset() if data is None else read_dataset(data)
    trainers = list(dict.fromkeys([trainer, BASELINE] if baseline else [trainer]))
    for name in trainers:
        check_trainer(name)
    check_not_of_nnunet(workdir, "--workdir", "xattnres_demo")
    make_writable_folder(workdir, "--workdir")
    nnunet = NnUNet(workdir.resolve(), choose_device())
    print("The commands below, and any other of nnU-Net's, work in a shell with these variables:")
    for variable, value in nnunet.folders().items():
        print(f"  {shell_command('export', f'{variable}={value}')}")
    demo = Demo(nnunet, dataset, num_steps=4 + 3 * len(trainers))
    demo.get_dataset()
    demo.plan_and_preprocess()
    demo.add_configuration()
    for name in trainers:
        demo.train(name)
        demo.predict(name)
        demo.evaluate(name)
    demo.report(trainers)
    print(f"\nThe demo took {(time.monotonic() - started) / 60:.1f} minutes.")


def check_trainer(name: str) -> None:
    """Say so if the trainer ignores the demo's budget. Raises `XAttnResError` unless nnU-Net finds the trainer."""
    trainer = find_trainer(name)
    check_bases(trainer)
    if not issubclass(trainer, XAttnResTrainerMixin):
        print(f"{name} ignores the demo's short budget: it trains as long as it always does.")


class Demo:
    """The steps in their order. A step whose result exists does nothing."""

    def __init__(self, nnunet: NnUNet, dataset: InputDataset, num_steps: int) -> None:
        self.nnunet = nnunet
        self.dataset = dataset
        self.num_steps = num_steps
        self._step_numbers = count(1)
        self.raw_dataset = nnunet.raw / dataset.name
        self.preprocessed_dataset = nnunet.preprocessed / dataset.name
        self.plans_file = self.preprocessed_dataset / f"{PLANS}.json"
        self.output = nnunet.workdir / dataset.name
        self.held_out_images = self.output / "held_out" / "images"
        self.held_out_references = self.output / "held_out" / "references"

    def get_dataset(self) -> None:
        self._announce("The dataset in nnU-Net's raw format, and nnU-Net's integrity check")
        if not place_raw_dataset(self.dataset, self.nnunet, "--workdir"):
            self._already_there(self.raw_dataset)

    def plan_and_preprocess(self) -> None:
        self._announce("Planning and preprocessing")
        # nnU-Net copies the references last.
        copied = self.preprocessed_dataset / "gt_segmentations"
        if all((copied / f"{case}{self.file_ending}").is_file() for case in self.cases):
            self._already_there(self.preprocessed_dataset)
            return
        number = str(int(self.dataset.name[7:10]))
        command = ["nnUNetv2_plan_and_preprocess", "-d", number, "-c", self.planned_configuration]
        self._run(*command, "-np", NUM_WORKERS, log="plan_and_preprocess")

    def add_configuration(self) -> None:
        self._announce(f"A CPU-sized configuration, {self.configuration}, in the plans")
        plans = read_json(self.plans_file, self._begin_again)
        if self.configuration not in plans["configurations"]:
            patch_size = reduced_patch_size(plans, self.planned_configuration, MAX_PATCH_VOXELS)
            planned_batch_size = plans["configurations"][self.planned_configuration]["batch_size"]
            add_small_configuration(
                plans,
                self.configuration,
                self.planned_configuration,
                base_features=BASE_FEATURES,
                max_patch_voxels=MAX_PATCH_VOXELS,
                batch_size=max(2, min(planned_batch_size, VOXELS_PER_STEP // int(np.prod(patch_size)))),
                budget=BUDGET,
            )
            write_json_atomically(plans, self.plans_file)
        added = plans["configurations"][self.configuration]
        features = added["architecture"]["arch_kwargs"]["features_per_stage"]
        epochs, iterations = added["training"]["num_epochs"], added["training"]["num_iterations_per_epoch"]
        print(f"Patch size {added['patch_size']}, batch size {added['batch_size']}, features {features}, ", end="")
        print(f"{epochs} epochs of {iterations} iterations: {self.plans_file}")

    def train(self, trainer: str) -> None:
        self._announce(f"Training {trainer} on fold 0")
        if self._checkpoint(trainer).is_file():
            self._already_there(self._checkpoint(trainer))
            return
        resume = ["--c"] if any(self._checkpoint(trainer).parent.glob("checkpoint_*.pth")) else []
        command = self._model(trainer).train_command(FOLD, self.nnunet.device, *resume)
        self._run(*command, log=f"train_{trainer}")

    def predict(self, trainer: str) -> None:
        self._announce(f"Predicting the {len(self.held_out_cases)} held-out cases with {trainer}")
        predictions = self._predictions(trainer)
        if predictions.is_dir() and predictions.stat().st_mtime >= self._checkpoint(trainer).stat().st_mtime:
            self._already_there(predictions)
            return
        self._link_held_out_cases()
        incomplete = predictions.with_name(f"{trainer}.incomplete")
        for outdated in (predictions, incomplete):
            shutil.rmtree(outdated, ignore_errors=True)
        command = self._model(trainer).predict_command([FOLD], self.held_out_images, incomplete, self.nnunet.device)
        self._run(*command, log=f"predict_{trainer}")
        incomplete.rename(predictions)

    def evaluate(self, trainer: str) -> None:
        self._announce(f"Evaluating {trainer} against the references")
        summary = self._predictions(trainer) / "summary.json"
        if summary.is_file():
            self._already_there(summary)
            return
        command = ["nnUNetv2_evaluate_folder", str(self.held_out_references), str(self._predictions(trainer))]
        command += ["-djfile", str(self.raw_dataset / "dataset.json"), "-pfile", str(self.plans_file)]
        self._run(*command, log=f"evaluate_{trainer}")

    def report(self, trainers: list[str]) -> None:
        self._announce("Results")
        summaries = {trainer: self._summary(trainer) for trainer in trainers}
        print(f"Dice on {len(self.held_out_cases)} held-out cases of {self.dataset.name}\n")
        print(dice_table(summaries, self.dataset_json["labels"]), end="\n\n")
        picture = self.output / "demo.png"
        write_figure(self._draw(summaries), picture)
        print(f"Picture:     {picture}")
        for trainer in trainers:
            print(f"Predictions: {self._predictions(trainer)}")
            print(f"Model:       {self._checkpoint(trainer).parent}")
        print(f"Plans:       {self.plans_file}")
        print(f"Logs:        {self.nnunet.workdir / 'logs'}")

    @cached_property
    def dataset_json(self) -> dict[str, Any]:
        return read_dataset_json(self.raw_dataset)

    @cached_property
    def cases(self) -> Cases:
        return get_filenames_of_train_images_and_targets(str(self.raw_dataset), dict(self.dataset_json))

    @property
    def file_ending(self) -> str:
        return self.dataset_json["file_ending"]

    @cached_property
    def planned_configuration(self) -> str:
        """The only configuration that nnU-Net plans for images of a single slice is 2d."""
        first_case = next(iter(self.cases.values()))
        image, _ = reader_for(self.dataset_json)().read_images(first_case["images"])
        return "2d" if image.shape[1] == 1 else "3d_fullres"

    @property
    def configuration(self) -> str:
        return f"{self.planned_configuration}_demo"

    @cached_property
    def held_out_cases(self) -> list[str]:
        """The validation cases of fold 0. The training has written the split."""
        return read_splits(self.preprocessed_dataset / SPLITS, self._begin_again)[0]["val"]

    @property
    def _begin_again(self) -> str:
        """What to do about a damaged file. The training has written the split, and is not repeated for it alone."""
        return f"delete {self.preprocessed_dataset} and {self.nnunet.results / self.dataset.name}, run again"

    def _announce(self, title: str) -> None:
        print(f"\n[{next(self._step_numbers)}/{self.num_steps}] {title}", flush=True)

    def _already_there(self, result: Path) -> None:
        print(f"Already there: {result}")

    def _run(self, *command: str, log: str) -> None:
        print(f"$ {shell_command(*command)}", flush=True)
        started = time.monotonic()
        self.nnunet.run(*command, log=f"{self.dataset.name}_{log}")
        print(f"{command[0]} took {time.monotonic() - started:.0f} s")

    def _checkpoint(self, trainer: str) -> Path:
        return self._model(trainer).folder(self.nnunet.results) / f"fold_{FOLD}" / FINAL_CHECKPOINT

    def _model(self, trainer: str) -> Model:
        return Model(self.dataset.name, self.configuration, trainer, PLANS)

    def _predictions(self, trainer: str) -> Path:
        return self.output / "predictions" / trainer

    def _summary(self, trainer: str) -> dict[str, Any]:
        path = self._predictions(trainer) / "summary.json"
        try:
            return load_summary_json(str(path))
        except (ValueError, KeyError) as error:
            raise XAttnResError(f"{path} is damaged ({reason(error)}): delete it, run again") from None

    def _link_held_out_cases(self) -> None:
        shutil.rmtree(self.output / "held_out", ignore_errors=True)
        self.held_out_images.mkdir(parents=True)
        self.held_out_references.mkdir()
        for case in self.held_out_cases:
            reference = Path(self.cases[case]["label"])
            link_or_copy(reference, self.held_out_references / f"{case}{self.file_ending}")
            for channel, image in enumerate(self.cases[case]["images"]):
                link_or_copy(Path(image), self.held_out_images / f"{case}_{channel:04d}{self.file_ending}")

    def _draw(self, summaries: dict[str, dict[str, Any]]) -> Figure:
        reader = reader_for(self.dataset_json)()
        dice = {trainer: dice_per_case(summary, self.file_ending) for trainer, summary in summaries.items()}
        pictured = []
        for case in spread_over_ranking(dice[next(iter(dice))], NUM_PICTURED_CASES):
            image, properties = reader.read_images(self.cases[case]["images"])
            reference, _ = reader.read_seg(self.cases[case]["label"])
            predictions = {
                trainer: reader.read_seg(str(self._predictions(trainer) / f"{case}{self.file_ending}"))[0][0]
                for trainer in summaries
            }
            scores = {trainer: dice[trainer][case] for trainer in summaries}
            spacing = properties["spacing"][1:]
            pictured.append(PicturedCase(case, image[0], reference[0], predictions, scores, spacing))
        return draw_cases(pictured, names_of_values(self.dataset_json["labels"]))
