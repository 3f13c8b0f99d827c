"""A cell of a matrix, a tiny dataset with a spec, and the tables of a made-up benchmark."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas
import SimpleITK as sitk
import torch
import yaml

from nnunet_xattnres.benchmark.cells import Cell
from nnunet_xattnres.benchmark.tables import Tables, make_table

ROOT = Path(__file__).parents[2]
PLANNED, OURS = "nnUNetTrainerPlanned", "nnUNetTrainerXAttnRes"

CELL = Cell(
    dataset="Dataset123_Tiny",
    configuration="small",
    trainer="wide",
    trainer_class=PLANNED,
    plans="nnUNetPlans",
    planned_configuration="small_wide",
    fold=1,
    seed=7,
    num_epochs=3,
    parameters=1234,
    test=True,
)

TINY = "Dataset123_Tiny"
TINY_SHAPE = (8, 9, 10)
TINY_SPEC = {
    "datasets": [{"path": f"data/{TINY}"}],
    "configurations": {"small": {"base": "3d_fullres", "features": 4, "epochs": 1}},
    "trainers": [PLANNED, OURS],
    "folds": [0, 1],
    "seeds": [0],
}

# The datasets of a made-up benchmark, with their families.
DATASETS = {"Dataset001_A": "Dataset001_A", "Dataset002_CT": "Sarcoma", "Dataset003_MR": "Sarcoma"}


def eventually(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def folder_of_cell(root: Path) -> Path:
    """The folder of `CELL`, which is made."""
    folder = CELL.folder(root)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_final_checkpoint(folder: Path, **content: object) -> None:
    """The checkpoint of a training that took 2, 3 and 9 seconds for its epochs. content: further entries."""
    logging = {"epoch_start_timestamps": [0.0, 10.0, 20.0], "epoch_end_timestamps": [2.0, 13.0, 29.0]}
    needed = {"trainer_name": PLANNED, "init_args": {}, "network_weights": {}, "logging": logging}
    torch.save(needed | content, folder / "checkpoint_final.pth")


def write_image(array: np.ndarray, path: Path, spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> None:
    """spacing: of x, y and z."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing)
    sitk.WriteImage(image, str(path))


def write_tiny_dataset(folder: Path) -> None:
    """A tiny dataset in nnU-Net's raw format, five cases without a test set."""
    for case in range(5):
        write_image(np.zeros(TINY_SHAPE, np.float32), folder / "imagesTr" / f"case_{case}_0000.nii.gz")
        write_image(np.ones(TINY_SHAPE, np.uint8), folder / "labelsTr" / f"case_{case}.nii.gz")
    dataset_json = {
        "channel_names": {"0": "nothing"},
        "labels": {"background": 0, "all": 1},
        "numTraining": 5,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(dataset_json))


def write_spec_file(content: dict, folder: Path) -> Path:
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def case_row(
    dataset: str, trainer: str, fold: int, seed: int, case: str, dice: float, label: str = "a", **more: object
) -> dict:
    """A row of cases.csv."""
    row = {
        "dataset": dataset,
        "family": DATASETS.get(dataset, dataset),
        "configuration": "small",
        "trainer": trainer,
        "fold": fold,
        "seed": seed,
        "set": "validation",
        "case": case,
        "label": label,
        "dice": dice,
        "nsd": dice,
        "hd95": 1.0,
        "reference_voxels": 10,
        "predicted_voxels": 10,
    }
    return row | more


def tables_of(case_rows: list[dict], unfinished: tuple = (), trainers: tuple = ()) -> Tables:
    """The tables of a benchmark with these cases. trainers: as the spec orders them; by default as they appear."""
    cases = make_table("cases", case_rows)
    keys = cases[["dataset", "configuration", "trainer", "fold", "seed"]].drop_duplicates()
    cells = [
        {
            **key,
            "state": "finished",
            "epochs": 4,
            "seconds_per_epoch": 10.0 if key["trainer"] == PLANNED else 15.0,
            "parameters": 1_234_567 if key["trainer"] == PLANNED else 2_469_134,
            "peak_memory_gb": math.nan,
            "plans": "nnUNetPlans",
            "patch_size": "40x40",
            "batch_size": 2,
            "features": "8 16",
            "iterations": 50,
            "device": "cpu",
            "versions": "torch 2.8",
        }
        for key in keys.to_dict("records")
    ]
    curves = [
        {**key, "epoch": epoch, "train_loss": -epoch, "val_loss": -epoch, "pseudo_dice": epoch / 4}
        for key in keys.to_dict("records")
        for epoch in range(4)
    ]
    datasets = [
        {"dataset": name, "family": family, "nsd_tolerance_mm": 1.5, "labels": "1:a"}
        for name, family in dict(zip(cases.dataset, cases.family, strict=True)).items()
    ]
    blank = dict.fromkeys(("plans", "patch_size", "features", "device", "versions"), "")
    all_cells = make_table("cells", [*cells, *(cell | blank for cell in unfinished)])
    arms = [
        {"trainer": name, "trainer_class": name, "planner": "ExperimentPlanner", "parameters_of": ""}
        for name in trainers or all_cells.trainer.unique()
    ]
    return Tables(
        cases,
        all_cells,
        make_table("curves", curves),
        make_table("datasets", datasets),
        make_table("trainers", arms),
        make_table("versions", [{"package": "monai", "version": "1.5"}]),
        make_table("label_curves", ({**row, "label": label} for row in curves for label in cases.label.unique())),
    )


def two_trainers() -> Tables:
    """Two trainers, three datasets of two families, two folds of six cases, two seeds; ours is better in the first."""
    rng = np.random.default_rng(0)
    rows = []
    for dataset in DATASETS:
        for fold in range(2):
            for case in range(6):
                difficulty = rng.uniform(0.4, 0.8)
                for trainer in (PLANNED, OURS):
                    for seed in range(2):
                        gain = 0.05 if trainer == OURS and dataset == "Dataset001_A" else 0
                        dice = difficulty + gain + rng.normal(0, 0.01)
                        rows.append(case_row(dataset, trainer, fold, seed, f"00{fold}{case}", dice))
    return tables_of(rows)


def cells_of(table: pandas.DataFrame, **values: object) -> pandas.Series:
    """Which rows have these values."""
    return (table[list(values)] == pandas.Series(values)).all(axis=1)
