"""Results that exist already: nnU-Net's result folders, and plain folders of predictions. They are only read."""

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.file_path_utilities import convert_identifier_to_trainer_plans_config

from nnunet_xattnres.benchmark.cells import FINISHED, MATRIX
from nnunet_xattnres.benchmark.cost_recording import logged_times, recorded_costs
from nnunet_xattnres.benchmark.measuring import References, curve_rows, label_curve_rows, planned_columns
from nnunet_xattnres.common.errors import XAttnResError, reason
from nnunet_xattnres.common.files import read_json
from nnunet_xattnres.nnunet.folders import hint_if_unset, nnunet_folder
from nnunet_xattnres.training.checkpoint import FINAL_CHECKPOINT, read_checkpoint

MISSING, UNFINISHED = "missing", "validation not finished"
# Of a plain folder of predictions, which has no fold and no configuration.
ONLY_FOLD = 0
PREDICTIONS = "predictions"
KINDS = "give an nnU-Net result folder TRAINER__PLANS__CONFIGURATION, or a folder of predictions"
# Entries of a state dict that are not parameters, although they are no whole numbers.
BUFFERS = re.compile(r".*\.running_(mean|var)|xattnres\..*\.temperature")


@dataclass(frozen=True)
class Result:
    """A folder of results.

    parts: what it may be named by: trainer, plans and configuration, or the folder's name.
    kind: the set that its cases belong to.
    dataset_json: the file that names its labels. references: the folder of its reference segmentations.
    predictions: the folder with the predictions of every fold.
    trainer_class, planner: as nnU-Net calls them, and planned: columns of the table "cells"; empty if unknown.
    """

    folder: Path
    parts: tuple[str, ...]
    dataset: str
    configuration: str
    kind: str
    dataset_json: Path
    references: Path
    predictions: dict[int, Path]
    trainer_class: str = ""
    planner: str = ""
    planned: dict[str, Any] = field(default_factory=dict)

    def read_references(self, family: str, tolerance: float) -> References:
        """Raises `XAttnResError` if dataset.json is missing or cannot be used."""
        content = read_json(self.dataset_json, "nnU-Net puts it there: copy it from the dataset's folder")
        try:
            return References(self.dataset, family, tolerance, content)
        except KeyError as error:
            raise XAttnResError(f"{self.dataset_json} has no {error.args[0]}: give it as nnU-Net writes it") from None
        except Exception as error:
            raise XAttnResError(f"{self.dataset_json} cannot be used ({reason(error)}): mend it") from None

    def files(self, fold: int, file_ending: str) -> list[Path]:
        """The predictions of a fold."""
        return sorted(self.predictions[fold].glob(f"[!.]*{file_ending}")) if fold in self.predictions else []

    def state(self, fold: int, file_ending: str) -> str:
        """nnU-Net writes summary.json last, when all cases of a fold are predicted."""
        if not self.files(fold, file_ending):
            return MISSING
        is_complete = not self.planned or (self.predictions[fold] / "summary.json").is_file()
        return FINISHED if is_complete else UNFINISHED

    def costs(
        self, cell: dict[str, Any], labels: dict[str, tuple[int, ...]]
    ) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
        """Columns of the table "cells" and rows of the tables of curves of a finished fold, as far as logs tell.

        cell: the columns of `CELL`. labels: those that are compared.
        """
        if not self.planned:
            return {}, {}
        folder = self.predictions[cell["fold"]].parent
        debug = _debug_information(folder)
        gpu = str(debug.get("gpu_name")) if str(debug.get("device")).startswith("cuda") else ""
        recorded = recorded_costs(folder)
        torch_version = f"torch {debug['torch_version']}" if debug.get("torch_version") else ""
        known = recorded | {"device": recorded["device"] or gpu, "versions": recorded["versions"] or torch_version}
        if self.planned["iterations"] is not None:
            # A trainer may ignore the budget in the plans. nnU-Net notes how many iterations it trains.
            noted = str(debug.get("num_iterations_per_epoch"))
            known["iterations"] = int(noted) if noted.isdecimal() else None
        try:
            checkpoint = read_checkpoint(folder / FINAL_CHECKPOINT, "its times and parameters are unknown")
            logged = checkpoint["logging"]
            known |= {**logged_times(logged), "parameters": _number_of_parameters(checkpoint["network_weights"])}
            curves = {"curves": curve_rows(cell, logged), "label_curves": label_curve_rows(cell, logged, labels)}
            return known, {name: list(rows) for name, rows in curves.items()}
        except (XAttnResError, KeyError, ValueError, TypeError) as error:
            print(f"{folder}: no costs ({reason(error)})")
            return known, {}


def read_result(folder: Path, references: Path | None) -> Result:
    """references: as the user has given them.

    Raises `XAttnResError` if `folder` is none of both kinds, and if there are no references for it.
    """
    if not folder.is_dir():
        raise XAttnResError(f"{folder} is no folder: {KINDS}{hint_if_unset('nnUNet_results', folder)}")
    if (folder / MATRIX).exists():
        raise XAttnResError(f"{folder} is the folder of a benchmark: `nnunet-xattnres benchmark report` compares it")
    if references is not None and not references.is_dir():
        raise XAttnResError(
            f"--references: {references} is no folder: give the one of the reference segmentations"
            f"{hint_if_unset('nnUNet_raw', references)}"
        )
    if any(folder.glob("fold_*")):
        return _result_folder(folder, references)
    return _folder_of_predictions(folder, references)


def _result_folder(folder: Path, references: Path | None) -> Result:
    parts = convert_identifier_to_trainer_plans_config(os.path.abspath(folder))
    if len(parts) != 3:
        raise XAttnResError(f"{folder} is not named TRAINER__PLANS__CONFIGURATION, as nnU-Net does: rename it")
    trainer, plans_name, configuration = parts
    plans = read_json(folder / "plans.json", "nnU-Net puts it there: give a complete result folder")
    try:
        dataset = plans["dataset_name"]
        planned = planned_columns(plans, configuration) | {"plans": plans_name}
    except Exception as error:
        raise XAttnResError(f"{folder / 'plans.json'} cannot be used ({reason(error)}): mend it") from None
    if references is None:
        try:
            references = nnunet_folder("nnUNet_preprocessed") / dataset / "gt_segmentations"
        except XAttnResError as error:
            raise XAttnResError(
                f"there are no references of {dataset}: {error}, or give their folder with --references"
            ) from None
        if not references.is_dir():
            raise XAttnResError(
                f"there are no references of {dataset} as {references}: export another nnUNet_preprocessed, or give "
                "their folder with --references"
            )
    # nnU-Net makes the folder of a fold before it refuses a training.
    begun = [
        path for path in sorted(folder.glob("fold_*")) if (path / "validation").is_dir() or any(path.glob("*.pth"))
    ]
    numbers = {path.name.removeprefix("fold_"): path / "validation" for path in begun}
    if "all" in numbers:
        print(f"{folder}: fold_all is left out, because it has trained on the cases that it has predicted")
    return Result(
        folder,
        (trainer, plans_name, configuration),
        dataset,
        configuration,
        "validation",
        folder / "dataset.json",
        references,
        {int(fold): path for fold, path in numbers.items() if fold.isdecimal()},
        trainer,
        plans.get("experiment_planner_used", ""),
        planned,
    )


def _folder_of_predictions(folder: Path, references: Path | None) -> Result:
    if references is None:
        raise XAttnResError(
            f"{folder} has no fold_*: {KINDS}; predictions need the folder of their references, --references"
        )
    references = references.resolve()
    described = [place / "dataset.json" for place in (folder, references, references.parent)]
    dataset_json = next((path for path in described if path.is_file()), None)
    if dataset_json is None:
        raise XAttnResError(
            f"no dataset.json, which names the labels, is in {folder}, in {references} or beside that: copy nnU-Net's "
            "there"
        )
    return Result(
        folder,
        (Path(os.path.abspath(folder)).name,),
        references.parent.name or references.name,
        PREDICTIONS,
        references.name,
        dataset_json,
        references,
        {ONLY_FOLD: folder},
    )


def _debug_information(folder: Path) -> dict[str, Any]:
    """What nnU-Net has noted about a training. Empty if the file is missing or damaged."""
    try:
        return dict(json.loads((folder / "debug.json").read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def _number_of_parameters(weights: dict[str, torch.Tensor]) -> int:
    """A module that is registered twice has its weights in a state dict twice, in the same memory."""
    parameters = {name: w for name, w in weights.items() if w.is_floating_point() and not BUFFERS.fullmatch(name)}
    return sum({w.data_ptr(): w.numel() for w in parameters.values()}.values())
