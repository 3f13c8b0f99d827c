"""A dataset of five tiny cases, as nnU-Net's raw dataset and as a task of the Medical Segmentation Decathlon."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

SHAPE = (8, 9, 10)
NUM_CASES = 5


def write_image(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(sitk.GetImageFromArray(array), str(path))


def write_raw_dataset(folder: Path) -> Path:
    """folder: named DatasetNNN_Name."""
    _write_cases(folder, "_0000")
    dataset_json = {
        "channel_names": {"0": "noise"},
        "labels": {"background": 0, "large": 1, "small": 2},
        "numTraining": NUM_CASES,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(dataset_json))
    return folder


def write_msd_task(folder: Path) -> Path:
    """folder: named TaskNN_Name."""
    _write_cases(folder, "")
    (folder / "imagesTs").mkdir()
    dataset_json = {
        "modality": {"0": "noise"},
        "labels": {"0": "background", "1": "large", "2": "small"},
        "numTraining": NUM_CASES,
        "training": [],
        "test": [],
    }
    (folder / "dataset.json").write_text(json.dumps(dataset_json))
    return folder


def edit_dataset_json(folder: Path, **changes: Any) -> None:
    """Change or, with None, remove entries."""
    path = folder / "dataset.json"
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def _write_cases(folder: Path, suffix: str) -> None:
    """Noise, with a block of label 1 and one of label 2 in each case."""
    rng = np.random.default_rng(0)
    labels = np.zeros(SHAPE, np.uint8)
    labels[2:5, 2:5, 2:5] = 1
    labels[5:7, 5:7, 5:7] = 2
    for case in range(NUM_CASES):
        write_image(folder / "imagesTr" / f"case_{case}{suffix}.nii.gz", rng.normal(size=SHAPE).astype(np.float32))
        write_image(folder / "labelsTr" / f"case_{case}.nii.gz", labels)
