"""Raw datasets of the feature matrix: real cases where the data is there, phantoms where it is not."""

import json
import shutil
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from nnunetv2.dataset_conversion.generate_dataset_json import generate_dataset_json
from PIL import Image

from integration.real_data import HIPPOCAMPUS, ULTRASOUND
from nnunet_xattnres.common.files import write_json_atomically
from nnunet_xattnres.nnunet.phantom import phantom_case, write_phantom_dataset

HIPPOCAMPUS_LABELS = {"background": 0, "Anterior": 1, "Posterior": 2}


def write_hippocampus(folder: Path, num_training: int, num_test: int) -> None:
    """3D NIfTI, one channel, two labels; the test cases have references too, in `labelsTs`."""
    number = num_training + num_test
    if HIPPOCAMPUS.is_dir():
        labels = sorted((HIPPOCAMPUS / "labelsTr").glob("[!._]*.nii.gz"))[:number]
        for label in labels:
            case = label.name.removesuffix(".nii.gz")
            _copy(HIPPOCAMPUS / "imagesTr" / label.name, folder / "imagesTr" / f"{case}_0000.nii.gz")
            _copy(label, folder / "labelsTr" / label.name)
    else:
        write_phantom_dataset(folder, number, seed=0)
    generate_dataset_json(str(folder), {0: "MRI"}, dict(HIPPOCAMPUS_LABELS), num_training, ".nii.gz")
    _hold_out(folder, num_test, ".nii.gz")


def write_ultrasound(folder: Path, num_training: int, num_test: int) -> None:
    """2D PNG, one channel, two labels; the test cases have references too, in `labelsTs`."""
    number = num_training + num_test
    if ULTRASOUND.is_dir():
        labels = json.loads((ULTRASOUND / "dataset.json").read_text())["labels"]
        for label in sorted((ULTRASOUND / "labelsTr").glob("*.png"))[:number]:
            image = f"{label.stem}_0000.png"
            _copy(ULTRASOUND / "imagesTr" / image, folder / "imagesTr" / image)
            _copy(label, folder / "labelsTr" / label.name)
    else:
        labels = {"background": 0, "head": 1, "tail": 2}
        for case in range(number):
            _write_phantom_slice(folder, case)
    generate_dataset_json(str(folder), {0: "ultrasound"}, labels, num_training, ".png")
    _hold_out(folder, num_test, ".png")


def add_smoothed_channel(source: Path, folder: Path) -> None:
    """Write to `folder` the dataset `source` with a second channel, every image smoothed."""
    shutil.copytree(source, folder)
    for image in sorted(folder.glob("images*/*_0000.nii.gz")):
        smoothed = sitk.SmoothingRecursiveGaussian(sitk.ReadImage(image), 2.0)
        sitk.WriteImage(smoothed, image.with_name(image.name.replace("_0000", "_0001")))
    dataset_json = json.loads((folder / "dataset.json").read_text())
    dataset_json["channel_names"] = {"0": "MRI", "1": "smoothed"}
    write_json_atomically(dataset_json, folder / "dataset.json")


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    # Without its permissions: nnU-Net's dataset scripts overwrite references.
    shutil.copyfile(source, target)


def _write_phantom_slice(folder: Path, case: int) -> None:
    image, label = phantom_case(np.random.default_rng([0, case]))
    smaller_part = np.minimum((label == 1).sum((1, 2)), (label == 2).sum((1, 2)))
    z = int(smaller_part.argmax())
    for kind, suffix, pixels in (
        ("imagesTr", "_0000", np.clip(image[z] / 5, 0, 255)),
        ("labelsTr", "", label[z]),
    ):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / kind / f"phantom_{case:03d}{suffix}.png")


def _hold_out(folder: Path, num_test: int, ending: str) -> None:
    """Make the last cases the test set."""
    for kind in ("images", "labels"):
        (folder / f"{kind}Ts").mkdir()
    for label in sorted((folder / "labelsTr").iterdir())[-num_test:]:
        image = label.name.replace(ending, f"_0000{ending}")
        (folder / "imagesTr" / image).rename(folder / "imagesTs" / image)
        label.rename(folder / "labelsTs" / label.name)
