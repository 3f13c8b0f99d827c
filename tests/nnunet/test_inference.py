"""Inference with nnU-Net's predictor and command: folds, tiles, mirroring, probabilities, continuing."""

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from helpers.in_process import InProcess
from helpers.phantom_dataset import PHANTOM
from helpers.training import CPU
from nnunet_xattnres.common.processes import environment_with
from nnunet_xattnres.nnunet.installation import external_trainers

pytestmark = pytest.mark.feature("Folds, tiles, mirroring, probabilities, continued prediction (nnU-Net's predictor)")


def load(model: Path, *folds: int, mirroring: bool = False, step_size: float = 0.5) -> nnUNetPredictor:
    predictor = nnUNetPredictor(step_size, use_mirroring=mirroring, device=CPU, allow_tqdm=False)
    with environment_with(nnUNet_extTrainer=external_trainers()):
        predictor.initialize_from_trained_model_folder(str(model), folds)
    return predictor


def preprocess(predictor: nnUNetPredictor, image: Path) -> tuple[torch.Tensor, dict]:
    manager = predictor.configuration_manager
    case = manager.preprocessor_class(verbose=False).run_case(
        [str(image)], None, predictor.plans_manager, manager, predictor.dataset_json
    )
    return torch.from_numpy(case[0]), case[-1]


def test_the_command_with_several_folds_and_all_its_options(trained_model, nnunet, tmp_path):
    images, predictions = tmp_path / "images", tmp_path / "predictions"
    images.mkdir()
    predictions.mkdir()
    whole = sitk.ReadImage(nnunet.raw / PHANTOM / "imagesTr" / "phantom_000_0000.nii.gz")
    finished, missing = images / "finished_0000.nii.gz", images / "missing_0000.nii.gz"
    for image in (finished, missing):
        sitk.WriteImage(whole[:, :, 16:24], image)
    of_finished = [predictions / f"finished{ending}" for ending in (".nii.gz", ".npz")]
    for file in of_finished:
        file.write_bytes(b"finished")

    which = ("-d", "901", "-c", "2d_small", "-tr", "nnUNetTrainerXAttnRes", "-f", "0", "1")
    options = ("--disable_tta", "-step_size", "0.75", "--save_probabilities", "--continue_prediction")
    folders = ("-i", str(images), "-o", str(predictions))
    results = {"nnUNet_results": str(trained_model.parents[1])}
    here = InProcess(nnunet.workdir, "cpu")
    here.run("nnUNetv2_predict", *which, *options, *folders, "-device", "cpu", log="predict", environment=results)

    assert all(file.read_bytes() == b"finished" for file in of_finished)
    probabilities = np.load(predictions / "missing.npz")["probabilities"]
    logits = []
    for fold in (0, 1):
        predictor = load(trained_model, fold, step_size=0.75)
        data, properties = preprocess(predictor, missing)
        logits.append(predictor.predict_logits_from_preprocessed_data(data))
    assert not torch.allclose(*logits, atol=0.1)
    _, expected = convert_predicted_logits_to_segmentation_with_correct_shape(
        sum(logits) / 2,
        predictor.plans_manager,
        predictor.configuration_manager,
        predictor.label_manager,
        properties,
        return_probabilities=True,
    )
    np.testing.assert_allclose(probabilities, expected, atol=2e-3)
    segmentation = sitk.GetArrayFromImage(sitk.ReadImage(predictions / "missing.nii.gz"))
    assert np.array_equal(segmentation, probabilities.argmax(axis=0))


def test_mirroring_averages_over_the_flips(trained_model):
    predictor = load(trained_model, 0, mirroring=True)
    assert predictor.allowed_mirroring_axes == (0, 1)
    patch = torch.randn(1, 1, *predictor.configuration_manager.patch_size)
    with torch.no_grad():
        plain, *others = (predictor.network(patch.flip(axes)).flip(axes)[0] for axes in ((), (2,), (3,), (2, 3)))
    mirrored = predictor.predict_sliding_window_return_logits(patch)[:, 0].float()
    # nnU-Net sums tiles up in half precision, weighted next to nothing at the corners.
    torch.testing.assert_close(mirrored, (plain + sum(others)) / 4, atol=0.05, rtol=0)
    without = load(trained_model, 0).predict_sliding_window_return_logits(patch)[:, 0].float()
    torch.testing.assert_close(without, plain, atol=0.05, rtol=0)
    assert not torch.allclose(mirrored, without, atol=0.1)


@pytest.mark.parametrize("step_size, tiles", [(1.0, 2), (0.5, 3), (0.25, 5)])
def test_the_step_size_decides_on_the_tiles(trained_model, step_size, tiles):
    predictor = load(trained_model, 0, step_size=step_size)
    height, width = predictor.configuration_manager.patch_size
    calls = []
    predictor.network.register_forward_hook(lambda network, images, logits: calls.append(len(logits)))
    logits = predictor.predict_sliding_window_return_logits(torch.randn(1, 1, 2 * height, width))
    assert logits.shape == (3, 1, 2 * height, width)
    assert logits.isfinite().all()
    assert sum(calls) == tiles


def test_without_the_plugin_nnunet_says_so_and_the_readme_what_it_means(trained_model, monkeypatch):
    monkeypatch.delenv("nnUNet_extTrainer", raising=False)
    predictor = nnUNetPredictor(device=CPU, allow_tqdm=False)
    with pytest.raises(RuntimeError, match="Could not find requested nnunet trainer nnUNetTrainerXAttnRes") as error:
        predictor.initialize_from_trained_model_folder(str(trained_model), (0,))
    readme = " ".join(Path(__file__).parents[2].joinpath("README.md").read_text().split())
    assert str(error.value).partition(" nnUNetTrainerXAttnRes")[0] in readme
