"""Result folders as nnU-Net leaves them, with tiny predictions, and the references of these."""

import json
from pathlib import Path

import numpy as np

from helpers.benchmark import write_final_checkpoint, write_image

DATASET = "Dataset001_A"
SHAPE = (6, 12, 12)
SPACING = (1.0, 1.0, 3.0)
DATASET_JSON = {"labels": {"background": 0, "a": 1, "b": 2}, "file_ending": ".nii.gz", "channel_names": {"0": "MR"}}
FOLDS = {0: ("case_0", "case_1", "case_2"), 1: ("case_3", "case_4", "case_5")}
CONFIGURATION = {
    "patch_size": [8, 16, 16],
    "batch_size": 2,
    "architecture": {"arch_kwargs": {"features_per_stage": [8, 16]}},
}
SECONDS = {"epoch_start_timestamps": [0.0, 10.0], "epoch_end_timestamps": [3.0, 14.0]}
LOGGED = {
    "train_losses": [1.0, 0.5],
    "val_losses": [1.0, 0.25],
    "mean_fg_dice": [0.1, 0.75],
    "dice_per_class_or_region": [[0.1, 0.1], [0.9, 0.6]],
}


def label_map(error: int = 0) -> np.ndarray:
    """Two blocks. error: by how many voxels the second one is too long, and moved."""
    labels = np.zeros(SHAPE, np.uint8)
    labels[1:5, 2:5, 2:9] = 1
    labels[1:5, 6:10, 1 + error // 2 : 6 + error] = 2
    return labels


def write_references(preprocessed: Path, dataset: str = DATASET) -> Path:
    """The references of all cases, and dataset.json beside their folder, which is returned."""
    folder = preprocessed / dataset / "gt_segmentations"
    for case in (case for cases in FOLDS.values() for case in cases):
        write_image(label_map(), folder / f"{case}.nii.gz", SPACING)
    (folder.parent / "dataset.json").write_text(json.dumps(DATASET_JSON))
    return folder


def write_predictions(folder: Path, cases: tuple[str, ...], seed: int) -> None:
    rng = np.random.default_rng([seed, *map(ord, cases[0])])
    for case in cases:
        write_image(label_map(int(rng.integers(6))), folder / f"{case}.nii.gz", SPACING)


def write_result(
    results: Path,
    trainer: str,
    seed: int,
    plans: str = "nnUNetPlans",
    configuration: str = "small",
    dataset: str = DATASET,
    folds: tuple[int, ...] = (0, 1),
) -> Path:
    """A result folder of two validated folds. seed: of the predictions."""
    model = results / dataset / f"{trainer}__{plans}__{configuration}"
    for fold in folds:
        validation = model / f"fold_{fold}" / "validation"
        write_predictions(validation, FOLDS[fold], seed)
        (validation / "summary.json").write_text("{}")
        write_final_checkpoint(validation.parent, logging=SECONDS | LOGGED)
        debug = {"device": "cuda:0", "gpu_name": "NVIDIA H100", "torch_version": "2.8"}
        (validation.parent / "debug.json").write_text(json.dumps(debug))
    content = {
        "dataset_name": dataset,
        "plans_name": plans,
        "experiment_planner_used": "ExperimentPlanner",
        "configurations": {configuration: CONFIGURATION},
    }
    (model / "plans.json").write_text(json.dumps(content))
    (model / "dataset.json").write_text(json.dumps(DATASET_JSON))
    return model
