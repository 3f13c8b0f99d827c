"""Data that is odd but legal, from raw images to a prediction, with nnU-Net's own functions in this process."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.dataset_conversion.generate_dataset_json import generate_dataset_json
from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, plan_experiments, preprocess
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from helpers.phantom_dataset import ONE_SHORT_EPOCH
from helpers.training import CPU, run_in_threads, train
from integration.checks import check_geometry
from nnunet_xattnres.common.files import write_json_atomically
from nnunet_xattnres.nnunet.commands import NnUNet
from nnunet_xattnres.nnunet.derived_configurations import add_small_configuration

pytestmark = pytest.mark.feature("Odd but legal data (nnU-Net's functions)")

OBLIQUE = (0.8, 0.6, 0.0, -0.6, 0.8, 0.0, 0.0, 0.0, -1.0)


@dataclass(frozen=True)
class OddDataset:
    """Three cases: one to train on, one to validate on, one to predict.

    sizes: of the three. without_foreground: which of them. spacing: as sizes, (z, y, x).
    """

    file_ending: str
    dtype: type[np.generic]
    sizes: tuple[tuple[int, ...], ...]
    spacing: tuple[float, ...]
    without_foreground: tuple[int, ...]
    labels: dict[str, int]
    trainer: str
    patch_size: list[int] | None = None

    @property
    def base(self) -> str:
        return "2d" if len(self.spacing) == 2 else "3d_fullres"


DATASETS = {
    "one class, uint8, png, larger than the patch": OddDataset(
        file_ending=".png",
        dtype=np.uint8,
        sizes=((70, 50), (64, 64), (150, 90)),
        spacing=(1, 1),
        without_foreground=(),
        labels={"background": 0, "lesion": 1},
        trainer="nnUNetTrainerXAttnResNoSkip",
        patch_size=[32, 32],
    ),
    "spacing 1:10, int16, nrrd, trained without foreground": OddDataset(
        file_ending=".nrrd",
        dtype=np.int16,
        sizes=((9, 50, 40), (12, 48, 48), (7, 40, 60)),
        spacing=(10.0, 1.0, 1.0),
        without_foreground=(0, 2),
        labels={"background": 0, "a": 1, "b": 2},
        trainer="nnUNetTrainerXAttnRes",
    ),
    "smaller than the patch, float64, mha, validated without foreground": OddDataset(
        file_ending=".mha",
        dtype=np.float64,
        sizes=((24, 20, 22), (12, 10, 9), (5, 7, 1)),
        spacing=(1.0, 1.5, 1.2),
        without_foreground=(1,),
        labels={"background": 0, "lesion": 1},
        trainer="nnUNetTrainerXAttnResBlockInput",
        patch_size=[32, 32, 32],
    ),
    "one class, float32, nii.gz": OddDataset(
        file_ending=".nii.gz",
        dtype=np.float32,
        sizes=((20, 24, 22), (24, 20, 22), (22, 23, 24)),
        spacing=(1.0, 1.0, 1.0),
        without_foreground=(),
        labels={"background": 0, "lesion": 1},
        trainer="nnUNetTrainerXAttnResFinetune",
    ),
}


@pytest.fixture
def nnunet_of_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NnUNet:
    nnunet = NnUNet(tmp_path, "cpu")
    run_in_threads(nnunet, monkeypatch)
    return nnunet


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if "png" in name else pytest.mark.slow) for name in DATASETS]
)
def test_from_raw_images_to_a_prediction(nnunet_of_threads, name, tmp_path, monkeypatch):
    odd = DATASETS[name]
    dataset = "Dataset903_Odd"
    rng = np.random.default_rng(0)
    images = write_dataset(odd, nnunet_of_threads.raw / dataset, rng)

    extract_fingerprints([903], num_processes=1, check_dataset_integrity=True)
    plan_experiments([903])
    plans_file = nnunet_of_threads.preprocessed / dataset / "nnUNetPlans.json"
    plans = json.loads(plans_file.read_text())
    add_small_configuration(
        plans, "small", odd.base, base_features=4, max_patch_voxels=32**3, batch_size=2, budget=ONE_SHORT_EPOCH
    )
    if odd.patch_size:
        plans["configurations"]["small"]["patch_size"] = odd.patch_size
    write_json_atomically(plans, plans_file)
    preprocess([903], configurations=["small"], num_processes=[1])
    write_json_atomically([{"train": ["case0"], "val": ["case1"]}], plans_file.with_name("splits_final.json"))

    monkeypatch.setenv("nnUNet_n_proc_DA", "0")  # not before, the planner asks for as many threads
    training = train(dataset, "small", odd.trainer)
    training.perform_actual_validation(False)
    for losses in ("train_losses", "val_losses"):
        assert np.isfinite(training.logger.get_value(losses, None)).all()
    predictor = nnUNetPredictor(device=CPU, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(training.output_folder_base, (0,))
    (tmp_path / "predicted").mkdir()
    predictor.predict_from_files_sequential([[str(images[2])]], [str(tmp_path / "predicted" / "case2")])

    validated = Path(training.output_folder, "validation", f"case1{odd.file_ending}")
    for image, segmentation in (
        (images[1], validated),
        (images[2], tmp_path / "predicted" / f"case2{odd.file_ending}"),
    ):
        check_segmentation(segmentation, image, odd)


def write_dataset(odd: OddDataset, folder: Path, rng: np.random.Generator) -> list[Path]:
    """Returns the image files; the third case is for prediction."""
    for kind in ("imagesTr", "labelsTr", "imagesTs"):
        (folder / kind).mkdir(parents=True)
    images = []
    for case, size in enumerate(odd.sizes):
        segmentation = np.zeros(size, np.uint8)
        if case not in odd.without_foreground:
            for label in sorted(odd.labels.values()):
                segmentation[tuple(slice(extent // 4, extent // 2 + label) for extent in size)] = label
        image = (rng.uniform(0, 100, size) + 50 * segmentation).astype(odd.dtype)
        images.append(folder / ("imagesTs" if case == 2 else "imagesTr") / f"case{case}_0000{odd.file_ending}")
        write(image, images[-1], odd)
        if case < 2:
            write(segmentation, folder / "labelsTr" / f"case{case}{odd.file_ending}", odd)
    generate_dataset_json(str(folder), {0: "modality"}, dict(odd.labels), 2, odd.file_ending)
    return images


def write(array: np.ndarray, file: Path, odd: OddDataset) -> None:
    image = sitk.GetImageFromArray(array)
    if array.ndim == 3:
        image.SetSpacing(odd.spacing[::-1])
        image.SetOrigin((-3.5, 20.0, 7.25))
        image.SetDirection(OBLIQUE)
    sitk.WriteImage(image, file)


def check_segmentation(file: Path, image_file: Path, odd: OddDataset) -> None:
    segmentation, image = sitk.ReadImage(file), sitk.ReadImage(image_file)
    check_geometry(segmentation, image)
    assert segmentation.GetPixelID() == sitk.sitkUInt8
    assert set(np.unique(sitk.GetArrayFromImage(segmentation))) <= set(odd.labels.values())
