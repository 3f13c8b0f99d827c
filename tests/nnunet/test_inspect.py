import errno
import json
import shutil
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from matplotlib import style
from matplotlib.contour import ContourSet
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO, NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO, SimpleITKIOWithReorient
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from PIL import Image
from scipy.spatial.transform import Rotation
from torch import nn

from helpers.phantom_dataset import PHANTOM, make_trainer
from helpers.routing import assert_no_texts_overlap, force_to_read, history_of
from nnunet_xattnres.cli import main
from nnunet_xattnres.common.errors import XAttnResError
from nnunet_xattnres.model.config import XAttnResConfig
from nnunet_xattnres.ops.alignment import resize
from nnunet_xattnres.routing.drawing import CasePicture, draw_case
from nnunet_xattnres.routing.recording import RECORD
from nnunet_xattnres.tools.inspection import case, command, trained_model
from nnunet_xattnres.tools.inspection.image_files import find_cases
from nnunet_xattnres.tools.inspection.nifti import as_nifti
from nnunet_xattnres.tools.inspection.regions import Regions, on_boundary
from nnunet_xattnres.tools.inspection.slices import Slice
from nnunet_xattnres.tools.inspection.trained_model import Model, NetworkWithWeights, shares
from nnunet_xattnres.training.checkpoint import FINAL_CHECKPOINT

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def unlimited_memory(monkeypatch):
    """The command limits that of its process, here pytest's."""
    monkeypatch.setattr(command, "limit_memory", lambda growth: None)


def make_model(
    nnunet,
    trainer: str = "nnUNetTrainerXAttnRes",
    configuration: str = "3d_small",
    forced: tuple[str, str] | None = None,
    dataset: dict[str, Any] | None = None,
    **plans: Any,
) -> Path:
    """A model's folder as nnU-Net leaves it behind. The network is untrained, its queries random or forced."""
    trained = make_trainer(nnunet, recursive_find_trainer_class_by_name(trainer), configuration)
    trained.dataset_json |= dataset or {}
    trained.label_manager = trained.plans_manager.get_label_manager(trained.dataset_json)
    torch.manual_seed(0)
    trained.initialize()
    network = trained.network
    if hasattr(network, "xattnres"):
        for name, parameter in network.xattnres.named_parameters():
            if name.endswith("query"):
                nn.init.normal_(parameter)
    if forced:
        force_to_read(network, *forced)
    # Numbers of numpy, as nnU-Net logs them.
    trained.logger.local_logger.my_fantastic_logging["train_losses"] = [np.float32(1.0), np.float64(0.5)]
    trained._best_ema = np.mean([0.5])
    folder = Path(trained.output_folder)
    folder.mkdir(parents=True, exist_ok=True)
    trained.save_checkpoint(str(folder / "checkpoint_final.pth"))
    model = folder.parent
    (model / "plans.json").write_text(json.dumps(trained.plans_manager.plans | plans))
    (model / "dataset.json").write_text(json.dumps(trained.dataset_json))
    return model


def rotated_image(nnunet, folder: Path, name: str = "case") -> Path:
    """A phantom in an oblique, flipped and anisotropic geometry, with a margin that nnU-Net crops."""
    phantom = nibabel.load(nnunet.raw / PHANTOM / "imagesTr" / "phantom_000_0000.nii.gz").get_fdata()
    data = np.pad(phantom[:, :, ::2], ((3, 5), (0, 4), (2, 1))).astype(np.float32)
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", (20, -35, 100), degrees=True).as_matrix() @ np.diag((-1.1, 0.9, 2.4))
    affine[:3, 3] = (12.5, -80.25, 33.0)
    folder.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(data, affine)
    image.header["cal_max"] = 500
    nibabel.save(image, folder / f"{name}_0000.nii.gz")
    return folder / f"{name}_0000.nii.gz"


def inspect(*arguments: object) -> int:
    return main(["inspect", *map(str, arguments), "--device", "cpu"])


def maps_of(case: Path) -> dict[str, nibabel.Nifti1Image]:
    return {file.name.removesuffix(".nii.gz"): nibabel.load(file) for file in sorted(case.glob("*_from_*.nii.gz"))}


class TestInspect:
    @pytest.mark.parametrize("configuration", ["3d_small", "2d_small"])
    def test_maps_lie_over_the_image_and_sum_to_one(self, nnunet_environment, tmp_path, configuration):
        model = make_model(nnunet_environment, configuration=configuration)
        image = rotated_image(nnunet_environment, tmp_path / "images")
        out = tmp_path / "out"
        assert inspect("-m", model, "-f", 0, "-i", image, "-o", out, "--targets", "E2,D1") == 0
        assert sorted(file.name for file in out.iterdir()) == ["case"]
        original, maps = nibabel.load(image), maps_of(out / "case")
        encoder = ("E0", "E1", "E2", "E3", "E4", "E5", "E6")
        record = json.loads((out / "case" / "routing.json").read_text())
        sources = {target: list(means["background"]["interior"]) for target, means in record["mean_weights"].items()}
        assert sources["E2"] == ["E0", "current"]
        assert sources["D1"] == [*encoder[: len(sources["D1"]) - 2], "D0", "current"]
        assert maps.keys() == {f"{target}_from_{source}" for target in sources for source in sources[target]}
        cropped = np.asarray(original.dataobj) != 0
        for target, names in sources.items():
            total = np.zeros(original.shape)
            for source in names:
                weights = maps[f"{target}_from_{source}"]
                assert np.array_equal(weights.affine, original.affine)
                assert weights.header.get_zooms() == original.header.get_zooms()
                assert weights.get_data_dtype() == np.float32
                assert weights.header["cal_max"] == 0
                total += weights.get_fdata()
            np.testing.assert_allclose(total[cropped], 1, atol=1e-5)
            assert set(np.unique(total[:3])) == {0}
            assert maps[f"{target}_from_{names[0]}"].get_fdata()[cropped].std() > 1e-3
        assert (out / "case" / "routing.png").read_bytes().startswith(b"\x89PNG")

    def test_equal_weights_stay_equal_up_to_the_corners_of_a_tile(self, nnunet_environment, tmp_path):
        model = make_model(nnunet_environment)
        file = model / "fold_0" / "checkpoint_final.pth"
        checkpoint = torch.load(file, weights_only=False)
        for name, parameter in checkpoint["network_weights"].items():
            if name.endswith("query"):
                parameter.zero_()
        torch.save(checkpoint, file)
        image = nnunet_environment.raw / PHANTOM / "imagesTr" / "phantom_000_0000.nii.gz"
        assert inspect("-m", model, "-f", 0, "-i", image, "-o", tmp_path / "out", "--targets", "D1") == 0
        maps = maps_of(tmp_path / "out" / "phantom_000")
        for weights in maps.values():
            np.testing.assert_allclose(weights.get_fdata(), 1 / len(maps), atol=0.01)

    def test_the_prediction_is_that_of_nnunet(self, nnunet_environment, tmp_path):
        model = make_model(nnunet_environment)
        image = rotated_image(nnunet_environment, tmp_path / "images")
        assert inspect("-m", model, "-f", 0, "-i", image, "-o", tmp_path / "out", "--targets", "D0") == 0
        predictor = nnUNetPredictor(device=CPU, allow_tqdm=False)
        predictor.initialize_from_trained_model_folder(str(model), (0,))
        expected = predictor.predict_single_npy_array(*SimpleITKIO().read_images([str(image)]))
        prediction, _ = SimpleITKIO().read_seg(str(tmp_path / "out" / "case" / "prediction.nii.gz"))
        assert len(np.unique(expected)) > 1
        assert np.array_equal(prediction[0], expected)

    def test_the_source_that_is_read_is_the_one_that_is_shown(self, nnunet_environment, tmp_path, monkeypatch):
        pictures = []
        monkeypatch.setattr(case, "draw_case", lambda picture: pictures.append(picture) or draw_case(picture))
        model = make_model(nnunet_environment, forced=("D1", "E1"))
        image = rotated_image(nnunet_environment, tmp_path / "images")
        assert inspect("-m", model, "-f", 0, "-i", image, "-o", tmp_path / "out", "--targets", "D1") == 0
        weights = maps_of(tmp_path / "out" / "case")["D1_from_E1"].get_fdata()
        assert weights[np.asarray(nibabel.load(image).dataobj) != 0].mean() > 0.99
        shown = {source: mean for source, (_, mean) in pictures[0].maps["D1"].items()}
        assert max(shown, key=lambda source: shown[source]) == "E1"
        record = json.loads((tmp_path / "out" / "case" / "routing.json").read_text())
        for places in record["mean_weights"]["D1"].values():
            for weights in places.values():
                assert weights["E1"] > 0.95
                assert sum(weights.values()) == pytest.approx(1, abs=1e-4)

    def test_block_level_and_a_folder_and_vectors(self, nnunet_environment, tmp_path, capsys):
        model = make_model(nnunet_environment, "nnUNetTrainerXAttnResBlockInput", "2d_small")
        history_of(4, 2).write(model / "fold_0" / "xattnres_routing.json")
        rotated_image(nnunet_environment, tmp_path / "images", "a")
        rotated_image(nnunet_environment, tmp_path / "images", "b")
        out = tmp_path / "out"
        arguments = ("-m", model, "-f", 0, "-i", tmp_path / "images", "-o", out, "--targets", "D0_memory,E0_block2")
        assert inspect(*arguments, "--pdf") == 0
        progress = capsys.readouterr().err
        assert "2/2" in progress and "case=" not in progress and "map" not in progress
        assert sorted(file.name for file in out.iterdir()) == ["a", "b", "training.pdf"]
        assert maps_of(out / "b").keys() == {
            *(f"D0_memory_from_block{i}" for i in (1, 2)),
            *(f"E0_block2_from_{source}" for source in ("input", "block1", "current")),
        }
        assert (out / "a" / "routing.pdf").read_bytes().startswith(b"%PDF")
        assert inspect(*arguments) == 0  # again: earlier results are replaced
        assert not list(out.glob("*/routing.pdf"))
        assert not list(out.glob(".*"))

    def test_regions_and_two_channels(self, nnunet_environment, tmp_path):
        labels = {"background": 0, "whole": [1, 2], "tail": [2]}
        dataset = {"labels": labels, "regions_class_order": [1, 2], "channel_names": {"0": "T1", "1": "T2"}}
        model = make_model(nnunet_environment, configuration="2d_small", dataset=dataset)
        plans = json.loads((model / "plans.json").read_text())
        for by_channel in ("normalization_schemes", "use_mask_for_norm"):
            plans["configurations"]["2d"][by_channel] *= 2
        intensities = plans["foreground_intensity_properties_per_channel"]
        intensities["1"] = intensities["0"]
        (model / "plans.json").write_text(json.dumps(plans))
        image = rotated_image(nnunet_environment, tmp_path / "images")
        shutil.copy(image, image.with_name("case_0001.nii.gz"))
        out = tmp_path / "out"
        assert inspect("-m", model, "-f", 0, "-i", image.parent, "-o", out, "--targets", "D0") == 0
        predicted = {int(value) for value in np.unique(nibabel.load(out / "case" / "prediction.nii.gz").dataobj)}
        assert predicted - {0}
        record = json.loads((out / "case" / "routing.json").read_text())
        names = {0: "background", 1: "label 1", 2: "label 2"}
        assert record["mean_weights"]["D0"].keys() == {names[value] for value in predicted}
        assert len(record["images"]) == 2

    def test_another_checkpoint_and_progress_of_a_single_case(self, nnunet_environment, tmp_path, capsys):
        model = make_model(nnunet_environment, configuration="2d_small")
        (model / "fold_0" / FINAL_CHECKPOINT).rename(model / "fold_0" / "checkpoint_best.pth")
        image = rotated_image(nnunet_environment, tmp_path / "images")
        arguments = ("-m", model, "-f", 0, "-i", image, "-o", tmp_path / "out", "--targets", "E2")
        assert inspect(*arguments, "-chk", "checkpoint_best.pth") == 0
        record = json.loads((tmp_path / "out" / "case" / "routing.json").read_text())
        assert record["checkpoint"] == "checkpoint_best.pth"
        progress = capsys.readouterr().err
        slices = nibabel.load(image).shape[2] - 3
        assert f"{slices}/{slices}" in progress and "2/2" in progress and "case" not in progress

    def test_a_map_is_what_the_network_reads_there(self, nnunet_environment, tmp_path):
        folder, axes = make_model(nnunet_environment), (0, 2)
        file = folder / "fold_0" / FINAL_CHECKPOINT
        torch.save(torch.load(file, weights_only=False) | {"inference_allowed_mirroring_axes": axes}, file)
        model = Model(folder, "0", FINAL_CHECKPOINT, ["E2", "D1"], CPU)
        # A single tile, not resampled, nothing to crop.
        patch, spacing = model.configuration.patch_size, model.configuration.spacing
        phantom = nibabel.load(nnunet_environment.raw / PHANTOM / "imagesTr" / "phantom_000_0000.nii.gz").get_fdata()
        data = np.resize(phantom[phantom != 0], patch).astype(np.float32)
        image = tmp_path / "case_0000.nii.gz"
        nibabel.save(nibabel.Nifti1Image(data.T, np.diag([*spacing[::-1], 1])), image)
        assert inspect("-m", folder, "-f", 0, "-i", image, "-o", tmp_path / "out", "--targets", "E2,D1") == 0

        network = model.predictor.network.network
        preprocessed = torch.from_numpy((data - data.mean()) / data.std())[None, None]
        for target, sources in model.sources.items():
            expected = torch.zeros(len(sources), *patch)
            for mirrored in ([], [0], [2], [0, 2]):
                with torch.no_grad(), network.routing([target]) as weights:
                    network(preprocessed.flip([2 + axis for axis in mirrored]))
                of_image = resize(weights[target][0].transpose(0, 1), patch)[0]
                expected += of_image.flip([1 + axis for axis in mirrored]) / 4
            maps = maps_of(tmp_path / "out" / "case")
            written = np.stack([maps[f"{target}_from_{source}"].get_fdata().T for source in sources])
            # Near the border half precision has few digits left for what a tile adds there.
            centre = (slice(None), *(slice(extent // 4, -extent // 4) for extent in patch))
            np.testing.assert_allclose(written, expected, atol=0.01)
            np.testing.assert_allclose(written[centre], expected[centre], atol=1e-3)
            assert expected[centre].std(dim=(1, 2, 3)).min() > 0.02


class TestMistakes:
    @pytest.fixture
    def model(self, nnunet_environment) -> Path:
        return make_model(nnunet_environment, configuration="2d_small")

    @pytest.fixture
    def image(self, nnunet_environment, tmp_path) -> Path:
        return rotated_image(nnunet_environment, tmp_path / "images")

    def complaint(self, capsys, tmp_path: Path, *arguments: object) -> str:
        """The one line of an inspection that fails and leaves nothing behind."""
        before = sorted(tmp_path.iterdir())
        assert inspect(*arguments, "-o", tmp_path / "out") == 1
        captured = capsys.readouterr().err
        lines = [line for line in captured.splitlines() if line.startswith("nnunet-xattnres: ")]
        assert len(lines) == 1 and captured.endswith(lines[0] + "\n")
        assert sorted(tmp_path.iterdir()) == before
        return lines[0]

    def test_an_unknown_target(self, model, image, tmp_path, capsys):
        error = self.complaint(capsys, tmp_path, "-m", model, "-f", 0, "-i", image, "--targets", "D0,D9")
        assert "no target D9: choose from E2, E3" in error

    @pytest.mark.parametrize("trainer", ["nnUNetTrainer", "nnUNetTrainerPlanned", "nnUNetTrainerNoSkip"])
    def test_a_model_without_attention(self, nnunet_environment, image, tmp_path, capsys, trainer):
        model = make_model(nnunet_environment, trainer, "2d_small")
        error = self.complaint(capsys, tmp_path, "-m", model, "-f", 0, "-i", image)
        assert f"was trained by {trainer}, whose network has no attention" in error

    def test_a_folder_that_is_no_model(self, image, tmp_path, capsys):
        error = self.complaint(capsys, tmp_path, "-m", tmp_path, "-f", 0, "-i", image)
        assert f"{tmp_path} holds no fold_*/*.pth: -m takes a model's folder" in error

    def test_plans_that_are_not_those_of_the_model(self, model, image, tmp_path, capsys):
        plans = json.loads((model / "plans.json").read_text())
        del plans["configurations"]["2d_small"]
        (model / "plans.json").write_text(json.dumps(plans))
        error = self.complaint(capsys, tmp_path, "-m", model, "-f", 0, "-i", image)
        assert "no configuration 2d_small in the plans" in error

    @pytest.mark.parametrize("choice", [("-f", 3), ("-f", 0, "-chk", "checkpoint_latest.pth")])
    def test_a_checkpoint_that_is_not_there(self, model, image, tmp_path, capsys, choice):
        shutil.copy(model / "fold_0" / FINAL_CHECKPOINT, model / "fold_0" / "checkpoint_best.pth")
        error = self.complaint(capsys, tmp_path, "-m", model, *choice, "-i", image)
        assert "does not exist: choose with -f and -chk from " in error
        assert error.endswith("from fold_0/checkpoint_best.pth, fold_0/checkpoint_final.pth")

    def test_a_checkpoint_of_a_trainer_that_nobody_knows(self, model, image, tmp_path, capsys):
        file = model / "fold_0" / FINAL_CHECKPOINT
        checkpoint = torch.load(file, weights_only=False)
        torch.save(checkpoint | {"trainer_name": "nnUNetTrainerXAttnResNoSkips"}, file)
        error = self.complaint(capsys, tmp_path, "-m", model, "-f", 0, "-i", image)
        assert "finds no trainer nnUNetTrainerXAttnResNoSkips: did you mean nnUNetTrainerXAttnResNoSkip" in error

    def test_a_checkpoint_that_would_run_code(self, model, image, tmp_path, capsys):
        file = model / "fold_0" / "checkpoint_final.pth"
        checkpoint = torch.load(file, weights_only=False)
        torch.save(checkpoint | {"trap": Trap(tmp_path / "sprung")}, file)
        error = self.complaint(capsys, tmp_path, "-m", model, "-f", 0, "-i", image)
        assert "nnU-Net does not store" in error and "--trust-checkpoint" in error

    def test_weights_of_another_network(self, model, image, tmp_path, capsys):
        file = model / "fold_0" / "checkpoint_final.pth"
        checkpoint = torch.load(file, weights_only=False)
        del checkpoint["network_weights"]["xattnres.D0.query"]
        torch.save(checkpoint, file)
        assert "not those of today's" in self.complaint(capsys, tmp_path, "-m", model, "-f", 0, "-i", image)

    @pytest.mark.parametrize("content", [b"", b"no image", None])
    def test_an_image_that_cannot_be_read(self, model, image, tmp_path, capsys, content):
        damaged = image.with_name("damaged_0000.nii.gz")
        damaged.write_bytes(image.read_bytes()[:-5000] if content is None else content)
        error = self.complaint(capsys, tmp_path, "-m", model, "-f", 0, "-i", image, damaged)
        assert "damaged_0000.nii.gz" in error and "get the file again" in error

    def test_an_image_with_values_that_are_no_numbers(self, model, image, tmp_path, capsys, monkeypatch):
        read_images = SimpleITKIO.read_images

        def read_nan(*arguments: object) -> tuple:
            data, properties = read_images(*arguments)
            data[0, 0, 0, 0] = np.nan
            return data, properties

        monkeypatch.setattr(SimpleITKIO, "read_images", read_nan)  # SimpleITK itself makes a NIfTI's zero
        assert "values that are no numbers" in self.complaint(capsys, tmp_path, "-m", model, "-f", 0, "-i", image)

    def test_a_folder_of_the_users_stays(self, model, image, tmp_path, capsys, monkeypatch):
        (tmp_path / "out").mkdir()
        self.complaint(capsys, tmp_path, "-m", model, "-f", 3, "-i", image)
        monkeypatch.setattr(command, "inspect_case", lambda *arguments: 1 / 0)
        monkeypatch.chdir(tmp_path / "out")
        with pytest.raises(ZeroDivisionError):
            inspect("-m", model, "-f", 0, "-i", image, "-o", ".")
        assert list((tmp_path / "out").iterdir()) == []

    def test_new_folders_go_with_what_was_to_be_in_them(self, model, image, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(command, "inspect_case", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            inspect("-m", model, "-f", 0, "-i", image, "-o", tmp_path / "new" / "also" / "out")
        assert not (tmp_path / "new").exists()

    def test_a_channel_too_many(self, model, image, tmp_path, capsys):
        shutil.copy(image, image.with_name("case_0001.nii.gz"))
        error = self.complaint(capsys, tmp_path, "-m", model, "-f", 0, "-i", image.parent)
        assert "comes with 2 channels, but the model reads 1: _0000 phantom" in error

    def test_a_missing_channel(self, nnunet_environment, model, image):
        model = Model(model, "0", FINAL_CHECKPOINT, ["D0"], CPU)
        model.num_channels, model.dataset_json["channel_names"] = 2, {"0": "T1", "1": "T2"}
        with pytest.raises(XAttnResError, match=r"comes with 1 channels, but the model reads 2: add _0001 T2$"):
            model.read([str(image)])

    def test_channels_that_do_not_fit_each_other(self, model, image, tmp_path, capsys):
        other = image.with_name("case_0001.nii.gz")
        nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 4), np.float32), np.eye(4)), other)
        assert "same shape" in self.complaint(capsys, tmp_path, "-m", model, "-f", 0, "-i", image.parent)

    def test_a_second_stage_of_a_cascade(self, nnunet_environment, model, image, tmp_path, capsys):
        plans = json.loads((model / "plans.json").read_text())
        plans["configurations"]["2d_small"]["previous_stage"] = "3d_lowres"
        (model / "plans.json").write_text(json.dumps(plans))
        error = self.complaint(capsys, tmp_path, "-m", model, "-f", 0, "-i", image)
        assert "inspect the model of 3d_lowres" in error

    def test_a_full_disk(self, model, image, tmp_path, capsys, monkeypatch):
        def disk_full(*arguments: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(nibabel, "save", disk_full)
        error = self.complaint(capsys, tmp_path, "-m", model, "-f", 0, "-i", image)
        assert "cannot go on with case ([Errno 28] No space left on device): make room" in error

    def test_an_image_that_is_gone_midway_is_not_taken_for_a_full_disk(
        self, model, image, tmp_path, capsys, monkeypatch
    ):
        def gone(*arguments: object) -> None:
            raise FileNotFoundError(errno.ENOENT, "No such file", str(image))

        monkeypatch.setattr(case, "as_nifti", gone)
        error = self.complaint(capsys, tmp_path, "-m", model, "-f", 0, "-i", image)
        assert str(image) in error and "make room" not in error

    @pytest.mark.parametrize("name", ["thesis.txt", "routing.json.bak"])
    def test_a_folder_with_something_else_is_not_replaced(self, model, image, tmp_path, capsys, name):
        mine = tmp_path / "out" / "case" / name
        mine.parent.mkdir(parents=True)
        mine.write_text("two years of work")
        assert inspect("-m", model, "-f", 0, "-i", image, "-o", tmp_path / "out") == 1
        assert f"{mine} is not from inspect" in capsys.readouterr().err
        assert mine.read_text() == "two years of work"

    def test_a_network_that_has_diverged(self, model, image, tmp_path, capsys):
        file = model / "fold_0" / FINAL_CHECKPOINT
        checkpoint = torch.load(file, weights_only=False)
        checkpoint["network_weights"]["xattnres.D0.query"].fill_(torch.nan)
        torch.save(checkpoint, file)
        error = self.complaint(capsys, tmp_path, "-m", model, "-f", 0, "-i", image)
        assert "has not diverged" in error

    def test_a_checkpoint_of_another_preset(self, model, image, tmp_path, capsys):
        file = model / "fold_0" / FINAL_CHECKPOINT
        checkpoint = torch.load(file, weights_only=False)
        config = XAttnResConfig(fusion="residual").architecture()
        checkpoint["init_args"]["xattnres"] = {"version": "0.0.1", "config": config}
        torch.save(checkpoint, file)
        error = self.complaint(capsys, tmp_path, "-m", model, "-f", 0, "-i", image)
        assert "nnunet-xattnres 0.0.1 with fusion" in error

    @pytest.mark.parametrize("content", ["nothing", '{"sources": {}, "epochs": {}}'])
    def test_a_damaged_record_of_the_training(self, model, image, tmp_path, capsys, monkeypatch, content):
        monkeypatch.setattr(command, "inspect_case", lambda *arguments: 1 / 0)  # it is read before
        (model / "fold_0" / RECORD).write_text(content)
        error = self.complaint(capsys, tmp_path, "-m", model, "-f", 0, "-i", image, "--pdf")
        assert "no record of attention weights" in error

    def test_no_memory_to_check_images(self, model, image, tmp_path, capsys, monkeypatch):
        def fail(*arguments: object) -> None:
            raise MemoryError

        monkeypatch.setattr(nibabel, "load", fail)
        error = self.complaint(capsys, tmp_path, "-m", model, "-f", 0, "-i", image)
        assert "too little memory for the images" in error

    @pytest.mark.parametrize("where", [(SimpleITKIO, "read_images"), (Model, "predict"), (Model, "maps")])
    @pytest.mark.parametrize(
        "want",
        [
            MemoryError("Unable to allocate 5.25 GiB"),
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 5637144576 bytes."),
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 5.25 GiB"),
        ],
    )
    def test_too_little_memory(self, model, image, tmp_path, capsys, monkeypatch, where, want):
        def fail(*arguments: object) -> None:
            raise want

        monkeypatch.setattr(*where, fail)
        error = self.complaint(capsys, tmp_path, "-m", model, "-f", 0, "-i", image)
        assert "too little memory for case: choose fewer --targets" in error

    def test_another_failure_is_not_taken_for_want_of_memory(self, model, image, tmp_path, monkeypatch):
        def fail(*arguments: object) -> None:
            raise RuntimeError("Encountered inf in predicted array")

        monkeypatch.setattr(Model, "predict", fail)
        with pytest.raises(RuntimeError, match="Encountered inf"):
            inspect("-m", model, "-f", 0, "-i", image, "-o", tmp_path / "out")

    def test_a_failure_midway_keeps_the_finished_cases_whole(self, model, nnunet_environment, tmp_path, monkeypatch):
        rotated_image(nnunet_environment, tmp_path / "images", "a")
        rotated_image(nnunet_environment, tmp_path / "images", "b")

        save = nibabel.save

        def save_one_case(volume, path):
            save(volume, path)
            if path.parent.name == "b":
                raise KeyboardInterrupt

        monkeypatch.setattr(nibabel, "save", save_one_case)
        arguments = ("-m", model, "-f", 0, "-i", tmp_path / "images", "-o", tmp_path / "out", "--targets", "D0")
        assert inspect(*arguments) == 130
        assert sorted(file.name for file in tmp_path.iterdir() if file.name != "results") == ["images", "out"]
        assert [file.name for file in (tmp_path / "out").iterdir()] == ["a"]


class Trap:
    """Something that a pickle can do: touch a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("transpose", [(0, 1, 2), (2, 0, 1)])
def test_what_is_computed_of_the_preprocessed_image_returns_to_its_place(nnunet_environment, tmp_path, transpose):
    plans = {"transpose_forward": list(transpose), "transpose_backward": np.argsort(transpose).tolist()}
    folder = make_model(nnunet_environment, **plans)
    file = rotated_image(nnunet_environment, tmp_path)
    model = Model(folder, "0", FINAL_CHECKPOINT, ["D0"], CPU)
    image, properties = model.read([str(file)])
    data, _, _ = model.preprocessor.run_case_npy(
        image, None, properties, model.plans, model.configuration, model.dataset_json
    )
    returned = model.in_image_geometry(data[0], properties)
    assert returned.shape == image.shape[1:]
    inside = image[0] != 0
    assert np.corrcoef(returned[inside], image[0][inside])[0, 1] > 0.95
    assert not returned[:2].any()


def test_the_network_puts_weights_behind_its_logits(nnunet_environment):
    model = Model(make_model(nnunet_environment), "0", FINAL_CHECKPOINT, ["E2", "D0"], CPU)
    wrapped = model.predictor.network
    assert isinstance(wrapped, NetworkWithWeights)
    image = torch.randn(2, 1, *model.configuration.patch_size)
    with torch.no_grad(), wrapped.network.routing() as weights:
        logits = wrapped.network(image)
        channels = wrapped(image)
    assert torch.equal(channels[:, : model.num_heads], logits)
    assert channels.shape[1] == model.num_heads + len(weights["E2"][0]) + len(weights["D0"][0])
    mean = trained_model.BLENDING_SCALE * weights["E2"][0][1].mean()
    torch.testing.assert_close(channels[:, model.num_heads + 1].mean(), mean, atol=0.1, rtol=0)


def test_weights_sum_to_one_whatever_half_precision_has_made_of_them():
    blended = (trained_model.BLENDING_SCALE * torch.rand(15, 4, 5)).half()
    each = list(shares(blended))
    assert {weights.dtype for weights in each} == {torch.float32}
    torch.testing.assert_close(sum(each), torch.ones(4, 5))
    torch.testing.assert_close(each[3] / each[7], blended[3].float() / blended[7].float())


def test_weights_stay_in_half_precision_until_they_are_written(nnunet_environment, tmp_path):
    model = Model(make_model(nnunet_environment), "0", FINAL_CHECKPOINT, ["E2", "D0"], CPU)
    image, properties = model.read([str(rotated_image(nnunet_environment, tmp_path))])
    _, weights = model.predict(image, properties)
    assert {target: (len(of_target), of_target.dtype) for target, of_target in weights.items()} == {
        target: (len(model.sources[target]), torch.half) for target in ("E2", "D0")
    }


@pytest.mark.parametrize("reader", [SimpleITKIO, SimpleITKIOWithReorient, NibabelIO, NibabelIOWithReorient])
@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1)])
def test_what_any_reader_reads_is_written_over_the_image(nnunet, tmp_path, reader, axes):
    file = rotated_image(nnunet, tmp_path)
    image = nibabel.load(file)
    permuted = nibabel.Nifti1Image(
        np.asarray(image.dataobj).transpose(axes), image.affine[:, [*axes, 3]], dtype=np.float32
    )
    nibabel.save(permuted, file)
    volume, properties = reader().read_images([str(file)])
    nibabel.save(as_nifti(volume[0], properties, file), tmp_path / "map.nii.gz")
    written, original = nibabel.load(tmp_path / "map.nii.gz"), nibabel.load(file)
    assert np.array_equal(written.affine, original.affine)
    assert np.array_equal(written.get_fdata(), original.get_fdata())


def test_an_image_in_another_format_keeps_its_geometry(nnunet, tmp_path):
    file = rotated_image(nnunet, tmp_path)
    sitk.WriteImage(sitk.ReadImage(file), tmp_path / "case_0000.nrrd")
    volume, properties = SimpleITKIO().read_images([str(tmp_path / "case_0000.nrrd")])
    written, original = as_nifti(volume[0], properties, tmp_path / "case_0000.nrrd"), nibabel.load(file)
    np.testing.assert_allclose(written.affine, original.affine, atol=1e-4)
    assert np.array_equal(written.get_fdata(), original.get_fdata())


class TestSlice:
    # Numbers that tell voxels apart, along axes that run to the right, to the front and up.
    VOLUME = np.arange(6 * 8 * 10, dtype=np.float32).reshape(6, 8, 10)
    FOREGROUND = np.zeros_like(VOLUME)
    FOREGROUND[4, 1:7, 1:9] = FOREGROUND[1:5, 2:6, 3] = FOREGROUND[2:4, 5, 2:6] = 1

    def stored(self, volume: np.ndarray, axes: str, spacing: tuple[float, ...] = (1, 1, 1)) -> nibabel.Nifti1Image:
        """As if it had been acquired along the given axes, and obliquely."""
        affine = np.eye(4)
        affine[:3, :3] = Rotation.from_euler("xyz", (10, -15, 20), degrees=True).as_matrix() @ np.diag(spacing)
        image = nibabel.Nifti1Image(volume, affine)
        return image.as_reoriented(ornt_transform(io_orientation(affine), axcodes2ornt(axes)))

    @pytest.mark.parametrize(
        "axes, place", [("RAS", "k = 3"), ("LPS", "k = 3"), ("LPI", "k = 6"), ("PSR", "j = 3"), ("IRA", "i = 6")]
    )
    def test_the_front_is_up_and_the_right_on_the_left_however_it_is_stored(self, axes, place):
        shown = Slice(self.stored(self.FOREGROUND, axes))
        assert np.array_equal(shown.of(self.stored(self.VOLUME, axes)), self.VOLUME[::-1, ::-1, 3].T)
        assert shown.name == f"axial slice, {place}"
        assert shown.spacing == pytest.approx((1, 1))

    @pytest.mark.parametrize("axes", ["RAS", "PSR"])
    def test_thick_slices_are_shown_as_they_were_acquired(self, axes):
        sagittal = Slice(self.stored(self.FOREGROUND, axes, (4, 0.7, 0.5)))
        assert np.array_equal(sagittal.of(self.stored(self.VOLUME, axes)), self.VOLUME[4, ::-1, ::-1].T)
        assert sagittal.name == f"sagittal slice, {'ijk'[axes.index('R')]} = 4"
        assert sagittal.spacing == pytest.approx((0.5, 0.7))
        coronal = Slice(self.stored(self.FOREGROUND, axes, (0.7, 4, 0.5)))
        assert np.array_equal(coronal.of(self.stored(self.VOLUME, axes)), self.VOLUME[::-1, 5, ::-1].T)

    def test_without_foreground_it_is_in_the_middle(self):
        shown = Slice(self.stored(np.zeros_like(self.VOLUME), "RAS"))
        assert shown.name == "axial slice, k = 4"

    @pytest.mark.parametrize("shape", [(6, 8), (6, 8, 1)])
    def test_where_there_is_only_one_slice_it_is_shown(self, tmp_path, shape):
        nibabel.save(
            nibabel.Nifti1Image(self.VOLUME[:, :, 3].reshape(shape), np.diag([-2, -3, 1, 1])), tmp_path / "x.nii"
        )
        volume, properties = SimpleITKIO().read_images([str(tmp_path / "x.nii")])
        image = as_nifti(volume[0], properties, tmp_path / "x.nii")
        assert np.array_equal(Slice(image).of(image), self.VOLUME[:, :, 3].T)
        assert Slice(image).spacing == (3, 2)
        assert Slice(image).name == ""


def test_a_map_lies_over_a_picture_without_orientation_as_viewers_read_it(tmp_path):
    file = tmp_path / "case_0000.png"
    Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4)).save(file)
    volume, properties = NaturalImage2DIO().read_images([str(file)])
    image = as_nifti(volume[0], properties, file)
    nibabel.save(image, tmp_path / "map.nii.gz")
    assert np.array_equal(Slice(image).of(image), volume[0, 0])
    written, original = sitk.ReadImage(tmp_path / "map.nii.gz"), sitk.ReadImage(file)
    assert np.array_equal(sitk.GetArrayFromImage(written)[0], sitk.GetArrayFromImage(original))
    for pixel in ((0, 0), (3, 2)):
        place = written.TransformIndexToPhysicalPoint((*pixel, 0))
        assert place[:2] == pytest.approx(original.TransformIndexToPhysicalPoint(pixel))


def test_boundary_voxels_have_a_neighbour_of_another_label():
    labels = np.zeros((1, 5, 5), np.uint8)
    labels[0, 1:4, 1:4] = 2
    boundary = on_boundary(labels)
    assert boundary.sum() == 8 + 12
    assert not boundary[0, 2, 2] and not boundary[0, 0, 0]


def test_means_are_taken_by_label_and_place_inside_only():
    labels = np.zeros((1, 5, 5), np.uint8)
    labels[0, 1:4, 1:4] = 2
    inside = np.ones(labels.shape, bool)
    inside[:, 0] = False
    regions = Regions(labels, inside, {0: "background", 1: "head", 2: "tail"})
    assert regions.voxels == {
        "background": {"interior": 2, "boundary": 9},
        "tail": {"interior": 1, "boundary": 8},
    }
    weights = np.where(on_boundary(labels), 0.25, 1.0)
    weights[0, 2, 2] = 0.5
    weights[:, 0] = 100
    assert regions.means(weights) == {
        "background": {"interior": 1.0, "boundary": 0.25},
        "tail": {"interior": 0.5, "boundary": 0.25},
    }
    assert regions.foreground_mean(weights) == pytest.approx((0.5 + 8 * 0.25) / 9)


class TestCases:
    def test_channels_of_a_case_belong_together(self, tmp_path):
        foreign = ("notes.txt", "b.nii.gz", "._b_0000.nii.gz", "b_000.nii.gz", "b_0000.nrrd")
        for name in ("b_0001.nii.gz", "b_0000.nii.gz", "a_1_0000.nii.gz", *foreign):
            (tmp_path / name).touch()
        cases = find_cases([tmp_path, tmp_path / "b_0001.nii.gz"], ".nii.gz")
        names = {case: [Path(file).name for file in files] for case, files in cases.items()}
        assert names == {"a_1": ["a_1_0000.nii.gz"], "b": ["b_0000.nii.gz", "b_0001.nii.gz"]}
        assert find_cases([tmp_path / "b_0000.nii.gz", tmp_path / "b_0001.nii.gz"], ".nii.gz")["b"] == cases["b"]

    @pytest.mark.parametrize(
        "there, missing", [("1", "case_0000.nii.gz"), ("03", "case_0001.nii.gz, case_0002.nii.gz")]
    )
    def test_a_gap_in_the_channels_is_named(self, tmp_path, there, missing):
        for channel in there:
            (tmp_path / f"case_000{channel}.nii.gz").touch()
        with pytest.raises(XAttnResError, match=f"case_000{there[-1]}.nii.gz comes without {missing}: add"):
            find_cases([tmp_path], ".nii.gz")

    def test_two_images_for_one_channel_are_an_error(self, tmp_path):
        files = [tmp_path / folder / "case_0000.nii.gz" for folder in "ab"]
        for file in files:
            file.parent.mkdir()
            file.touch()
        with pytest.raises(XAttnResError, match="are the same channel of case: leave one out"):
            find_cases([file.parent for file in files], ".nii.gz")

    @pytest.mark.parametrize(
        "name, complaint", [("case.nii.gz", "not named"), ("case_0000.png", "not named"), (None, "does not exist")]
    )
    def test_a_name_that_is_none_is_an_error(self, tmp_path, name, complaint):
        file = tmp_path / (name or "missing_0000.nii.gz")
        if name:
            file.touch()
        with pytest.raises(XAttnResError, match=complaint):
            find_cases([file], ".nii.gz")

    def test_an_empty_folder_is_an_error(self, tmp_path):
        with pytest.raises(XAttnResError, match="no image that ends in _0000"):
            find_cases([tmp_path], ".nii.gz")


@pytest.mark.parametrize(
    "num_stages, shape, num_labels", [(8, (40, 50), 2), (3, (80, 20), 2), (3, (20, 90), 2), (6, (40, 50), 117)]
)
def test_no_texts_of_a_case_overlap(num_stages, shape, num_labels):
    sources = history_of(num_stages, 1).sources
    rng = np.random.default_rng(0)
    prediction = np.zeros(shape, np.uint8)
    prediction.flat[: num_labels + 1] = range(num_labels + 1)
    labels = {0: "background"} | {value: f"structure {value}" for value in range(1, num_labels + 1)}
    picture = CasePicture("hippocampus_020, axial slice, k = 17", rng.random(shape), prediction, (1.0, 1.2), labels)
    for target, names in sources.items():
        picture.maps[target] = {name: (rng.random(shape), 0.12) for name in names}
    with style.context("default"):
        assert_no_texts_overlap(draw_case(picture))


@pytest.mark.parametrize("zoom", [1, 4])
def test_the_outline_is_where_the_foreground_is(zoom):
    prediction = np.zeros((100 * zoom, 80 * zoom), int)
    prediction[20 * zoom : 60 * zoom, 30 * zoom : 70 * zoom] = 1
    maps = {"D0": {"E0": (np.ones(prediction.shape), 1.0)}}
    figure = draw_case(CasePicture("case", np.ones(prediction.shape), prediction, (1.0, 1.0), {1: "head"}, maps))
    (outline,) = [line for axis in figure.axes for line in axis.collections if isinstance(line, ContourSet)]
    corners = np.array([outline.get_paths()[0].vertices.min(axis=0), outline.get_paths()[0].vertices.max(axis=0)])
    np.testing.assert_allclose(corners, np.array([[30, 20], [70, 60]]) * zoom - 0.5, atol=zoom)
