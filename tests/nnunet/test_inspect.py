"""The command `nnunet-xattnres inspect` on models of nnU-Net's trainers."""

import csv
import errno
import json
import re
import shutil
import tracemalloc
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn
from torch.profiler import ProfilerActivity, profile

from helpers.images import phantom, write_oblique_phantom
from helpers.models import save_model
from helpers.phantom_dataset import PHANTOM, make_trainer, read_plans
from helpers.routing import force_to_read, history_of
from nnunet_xattnres import plans_with_xattnres
from nnunet_xattnres.cli import main
from nnunet_xattnres.common.errors import XAttnResError
from nnunet_xattnres.common.processes import environment_with
from nnunet_xattnres.model.config import XAttnResConfig
from nnunet_xattnres.nnunet.commands import NnUNet
from nnunet_xattnres.nnunet.planned_network import PlannedNetwork
from nnunet_xattnres.nnunet.trainer_lookup import find_trainer
from nnunet_xattnres.ops.alignment import resize
from nnunet_xattnres.routing.drawing import draw_case
from nnunet_xattnres.routing.recording import RECORD
from nnunet_xattnres.tools.inspection import case, command, trained_model
from nnunet_xattnres.tools.inspection.knock_out import _sample, share_changed
from nnunet_xattnres.tools.inspection.knock_out_report import OFF_DISTRIBUTION, effect_cell
from nnunet_xattnres.tools.inspection.regions import Regions
from nnunet_xattnres.tools.inspection.trained_model import Model, NetworkWithWeights
from nnunet_xattnres.training.checkpoint import FINAL_CHECKPOINT

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def unlimited_memory(monkeypatch):
    """The command limits that of its process, here pytest's."""
    monkeypatch.setattr(command, "limit_memory", lambda growth: None)


def make_model(
    nnunet: NnUNet,
    trainer: str = "nnUNetTrainerXAttnRes",
    configuration: str = "3d_small",
    forced: tuple[str, str] | None = None,
    dataset: dict[str, Any] | None = None,
    patch_size: list[int] | None = None,
    **plans: Any,
) -> Path:
    """A model's folder as nnU-Net leaves it behind. The network is untrained, its queries random or forced."""
    model = make_trainer(nnunet, find_trainer(trainer), configuration)
    model.dataset_json |= dataset or {}
    model.label_manager = model.plans_manager.get_label_manager(model.dataset_json)
    torch.manual_seed(0)
    model.initialize()
    if hasattr(model.network, "xattnres"):
        for name, parameter in model.network.xattnres.named_parameters():
            if name.endswith("query"):
                nn.init.normal_(parameter)
    if forced:
        force_to_read(model.network, *forced)
    # Numbers of numpy, as nnU-Net logs them.
    model.logger.local_logger.my_fantastic_logging["train_losses"] = [np.float32(1.0), np.float64(0.5)]
    model._best_ema = np.mean([0.5])
    model.plans_manager.plans |= plans
    if patch_size is not None:
        model.plans_manager.plans["configurations"][configuration]["patch_size"] = patch_size
    return save_model(model).parents[1]


def inspect(*arguments: object) -> int:
    return main(["inspect", *map(str, arguments), "--device", "cpu"])


def maps_of(case: Path) -> dict[str, nibabel.Nifti1Image]:
    return {file.name.removesuffix(".nii.gz"): nibabel.load(file) for file in sorted(case.glob("*_from_*.nii.gz"))}


def test_an_apple_gpu_is_used_where_there_is_one(tmp_path, monkeypatch, capsys):
    def see(*arguments):
        *_, device, _ = arguments
        raise XAttnResError(f"device {device}")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(command, "Model", see)
    for options, device in (([], "mps"), (["--device", "mps"], "mps"), (["--device", "cpu"], "cpu")):
        folders = ["-m", str(tmp_path), "-i", str(tmp_path), "-o", str(tmp_path / "out")]
        assert main(["inspect", *folders, "-f", "0", *options]) == 1
        assert f"device {device}" in capsys.readouterr().err


class TestInspect:
    @pytest.mark.parametrize("configuration", ["3d_small", "2d_small"])
    def test_maps_lie_over_the_image_and_sum_to_one(self, nnunet_environment, tmp_path, configuration):
        patch_size = {"2d_small": [64, 48], "3d_small": [24, 40, 40]}[configuration]
        model = make_model(nnunet_environment, configuration=configuration, patch_size=patch_size)
        image = write_oblique_phantom(tmp_path / "images")
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
        model = make_model(nnunet_environment, patch_size=[16, 32, 32])
        file = model / "fold_0" / "checkpoint_final.pth"
        checkpoint = torch.load(file, weights_only=False)
        for name, parameter in checkpoint["network_weights"].items():
            if name.endswith("query"):
                parameter.zero_()
        torch.save(checkpoint, file)
        image = tmp_path / "case_0000.nii.gz"
        nibabel.save(nibabel.Nifti1Image(phantom(), np.eye(4)), image)
        assert inspect("-m", model, "-f", 0, "-i", image, "-o", tmp_path / "out", "--targets", "D1") == 0
        maps = maps_of(tmp_path / "out" / "case")
        for weights in maps.values():
            np.testing.assert_allclose(weights.get_fdata(), 1 / len(maps), atol=0.01)

    def test_the_prediction_is_that_of_nnunet(self, nnunet_environment, tmp_path):
        model = make_model(nnunet_environment, patch_size=[16, 40, 40])
        image = write_oblique_phantom(tmp_path / "images")
        assert inspect("-m", model, "-f", 0, "-i", image, "-o", tmp_path / "out", "--targets", "D0") == 0
        predictor = nnUNetPredictor(device=CPU, allow_tqdm=False)
        predictor.initialize_from_trained_model_folder(str(model), (0,))
        expected = predictor.predict_single_npy_array(*SimpleITKIO().read_images([str(image)]))
        prediction, _ = SimpleITKIO().read_seg(str(tmp_path / "out" / "case" / "prediction.nii.gz"))
        assert len(np.unique(expected)) > 1
        assert np.array_equal(prediction[0], expected)

    def test_a_model_of_plans_that_carry_xattnres(self, nnunet_environment, tmp_path):
        plans = plans_with_xattnres(read_plans(nnunet_environment), "carrying", configurations=["2d_small"])
        dataset_json = json.loads((nnunet_environment.raw / PHANTOM / "dataset.json").read_text())
        model = PlannedNetwork(PHANTOM, plans, "2d_small", dataset_json).make_trainer(nnUNetTrainer, 0, "cpu")
        model.initialize()
        folder = save_model(model).parents[1]
        image = write_oblique_phantom(tmp_path / "images")
        assert inspect("-m", folder, "-f", 0, "-i", image, "-o", tmp_path / "out", "--targets", "D0") == 0
        for weights in maps_of(tmp_path / "out" / "case").values():
            assert 0 < weights.get_fdata().mean() < 1

    def test_the_source_that_is_read_is_the_one_that_is_shown(self, nnunet_environment, tmp_path, monkeypatch):
        pictures = []
        monkeypatch.setattr(case, "draw_case", lambda picture: pictures.append(picture) or draw_case(picture))
        model = make_model(nnunet_environment, forced=("D1", "E1"), patch_size=[24, 40, 40])
        image = write_oblique_phantom(tmp_path / "images")
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
        write_oblique_phantom(tmp_path / "images", "a")
        write_oblique_phantom(tmp_path / "images", "b")
        out = tmp_path / "out"
        arguments = ("-m", model, "-f", 0, "-i", tmp_path / "images", "-o", out, "--targets", "D0_memory,E0_block2")
        assert inspect(*arguments, "--pdf") == 0
        printed, progress = capsys.readouterr()
        assert printed.endswith(f"\n{out}: 2 cases. Look at routing.png in the folder of a case first\n")
        assert "2/2" in progress and "case=" not in progress and "map" not in progress
        assert re.search(r"1/2 \[[\d:]+<[\d:]+, ", progress)  # the time that remains, after the first case
        assert sorted(file.name for file in out.iterdir()) == ["a", "b", "training.pdf"]
        assert maps_of(out / "b").keys() == {
            *(f"D0_memory_from_block{i}" for i in (1, 2)),
            *(f"E0_block2_from_{source}" for source in ("input", "block1", "current")),
        }
        assert (out / "a" / "routing.pdf").read_bytes().startswith(b"%PDF")
        arguments = (
            "-m",
            model,
            "-f",
            0,
            "-i",
            tmp_path / "images" / "a_0000.nii.gz",
            "-o",
            out,
            "--targets",
            "D0_memory",
        )
        assert inspect(*arguments) == 0  # earlier results of the case are replaced
        assert not (out / "a" / "routing.pdf").exists()
        assert maps_of(out / "a").keys() == {f"D0_memory_from_block{i}" for i in (1, 2)}
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
        image = write_oblique_phantom(tmp_path / "images")
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
        image = write_oblique_phantom(tmp_path / "images")
        arguments = ("-m", model, "-f", 0, "-i", image, "-o", tmp_path / "out", "--targets", "E2")
        assert inspect(*arguments, "-chk", "checkpoint_best.pth") == 0
        record = json.loads((tmp_path / "out" / "case" / "routing.json").read_text())
        assert record["checkpoint"] == "checkpoint_best.pth"
        progress = capsys.readouterr().err
        slices = nibabel.load(image).shape[2] - 3
        assert f"{slices}/{slices}" in progress and "2/2" in progress and "case" not in progress

    def test_a_map_is_what_the_network_reads_there(self, nnunet_environment, tmp_path):
        folder, axes = make_model(nnunet_environment, patch_size=[16, 32, 24]), (0, 2)
        file = folder / "fold_0" / FINAL_CHECKPOINT
        torch.save(torch.load(file, weights_only=False) | {"inference_allowed_mirroring_axes": axes}, file)
        model = Model(folder, "0", FINAL_CHECKPOINT, ["E2", "D1"], CPU)
        # A single tile, not resampled, nothing to crop.
        patch, spacing = model.configuration.patch_size, model.configuration.spacing
        data = np.resize(phantom().T, patch)
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


class TestKnockOut:
    @pytest.fixture
    def model(self, nnunet_environment) -> Path:
        return make_model(nnunet_environment, configuration="2d_small")

    @pytest.fixture
    def images(self, tmp_path) -> Path:
        return write_oblique_phantom(tmp_path / "images", "a").parent

    def knock_out(self, model: Path, images: Path, out: Path, *more: object) -> dict[str, dict[str, str]]:
        """Rows of knock_out.csv by label, for one source of one target."""
        arguments = ("-m", model, "-f", 0, "-i", images, "-o", out, "--knock-out", "--targets", "D2", "--sources", "E1")
        assert inspect(*arguments, *more) == 0
        assert (out / "knock_out.png").read_bytes().startswith(b"\x89PNG")
        with (out / "knock_out.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert {(row["target"], row["source"]) for row in rows} == {("D2", "E1")}
        return {row["label"]: row for row in rows}

    def test_the_change_in_dice_is_that_of_a_prediction_without_the_source(self, model, images, tmp_path, capsys):
        labels, out = tmp_path / "labels", tmp_path / "out"
        labels.mkdir()
        write_oblique_phantom(images, "b")
        image = nibabel.load(images / "a_0000.nii.gz")
        reference = np.digitize(image.get_fdata(), np.quantile(image.get_fdata(), (0.5, 0.8)))
        for name in ("a", "b"):
            nibabel.save(nibabel.Nifti1Image(reference.astype(np.uint8), image.affine), labels / f"{name}.nii.gz")
        rows = self.knock_out(model, images, out, "--labels", labels)
        printed = capsys.readouterr().out
        assert "--knock-out: 1 pair of target and source x 2 cases = 2 predictions" in printed
        assert OFF_DISTRIBUTION in printed and "| D2 | E1 | " in printed
        summary = f"{out}: 2 cases. Look at routing.png in the folder of a case first\n"
        assert printed.endswith((out / "knock_out.md").read_text() + summary)
        # The network is whole again for the second case, which is the same.
        for file in (out / "a").glob("*.nii.gz"):
            other = nibabel.load(out / "b" / file.name).get_fdata()
            assert np.array_equal(nibabel.load(file).get_fdata(), other)

        inspected = Model(model, "0", FINAL_CHECKPOINT, ["D2"], CPU)
        data, properties = inspected.read([str(images / "a_0000.nii.gz")])
        with inspected.predictor.network.network.without("D2", "E1"):
            logits, _ = inspected.predict(data, properties)
        after = inspected.segmentation(logits, properties).T
        before = np.asarray(nibabel.load(out / "a" / "prediction.nii.gz").dataobj)
        record = json.loads((out / "a" / "routing.json").read_text())["dice_change"]["D2"]["E1"]
        values = {name: value for name, value in inspected.dataset_json["labels"].items() if value}
        assert rows.keys() == values.keys()
        for label, value in values.items():
            dice = [
                2 * ((seg == value) & (reference == value)).sum() / ((seg == value).sum() + (reference == value).sum())
                for seg in (before, after)
            ]
            row = rows[label]
            assert row["cases"] == "2" and 0 < float(row["mean_weight"]) < 1
            assert float(row["dice_change"]) == pytest.approx(dice[1] - dice[0], abs=1e-5)
            assert row["low"] == row["high"] == row["dice_change"]
            assert record[label] == pytest.approx(dice[1] - dice[0], abs=1e-5)
        assert any(record.values())

    def test_without_references_it_is_the_share_of_labelled_voxels_that_change(self, model, images, tmp_path):
        rows = self.knock_out(model, images, tmp_path / "out")
        assert 0 < float(rows["changed"]["share_changed"]) <= 1
        assert rows["changed"]["low"] == rows["changed"]["high"] == ""  # a single case has no interval
        assert share_changed(np.array([0, 1, 1, 2, 0]), np.array([0, 1, 2, 0, 0])) == pytest.approx(2 / 3)

    def test_at_block_level(self, nnunet_environment, images, tmp_path):
        model = make_model(nnunet_environment, "nnUNetTrainerXAttnResBlockInput", "2d_small")
        arguments = ("-m", model, "-f", 0, "-i", images, "-o", tmp_path / "out", "--knock-out")
        assert inspect(*arguments, "--targets", "D0_memory", "--sources", "block1") == 0
        assert "| D0_memory | block1 | " in (tmp_path / "out" / "knock_out.md").read_text()

    @pytest.mark.parametrize(
        "options, message",
        [
            (["--sources", "E0"], "--sources is for --knock-out: add that, or leave --sources out"),
            (["--labels", "."], "--labels is for --knock-out"),
            (["--knock-out", "--sources", "E9"], "no chosen target has a source E9: choose from E0, "),
            (
                ["--knock-out", "--labels", "nowhere"],
                "nowhere/a.nii.gz does not exist (1 of 1 reference missing): --labels takes ",
            ),
        ],
    )
    def test_mistakes(self, model, images, tmp_path, capsys, options, message):
        assert inspect("-m", model, "-f", 0, "-i", images, "-o", tmp_path / "out", *options) == 1
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("nnunet-xattnres: ")]
        assert message in line
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        "damage, message",
        [
            (lambda labels, affine: (labels[:-1], affine), "b.nii.gz has the shape ("),
            (lambda labels, affine: (labels, affine @ np.diag([3, 3, 3, 1])), "b.nii.gz has the spacing ("),
            (lambda labels, affine: (50 * labels, affine), "b.nii.gz holds the values 50, which are no labels"),
        ],
    )
    def test_references_of_other_images_are_told_before_the_first_prediction(
        self, model, images, tmp_path, capsys, damage, message
    ):
        write_oblique_phantom(images, "b")
        (tmp_path / "labels").mkdir()
        image = nibabel.load(images / "a_0000.nii.gz")
        labels = (image.get_fdata() > np.median(image.get_fdata())).astype(np.uint8)
        nibabel.save(nibabel.Nifti1Image(labels, image.affine), tmp_path / "labels" / "a.nii.gz")
        nibabel.save(nibabel.Nifti1Image(*damage(labels, image.affine)), tmp_path / "labels" / "b.nii.gz")
        arguments = ("-m", model, "-f", 0, "-i", images, "-o", tmp_path / "out")
        assert inspect(*arguments, "--knock-out", "--labels", tmp_path / "labels") == 1
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    def test_what_is_undefined_is_left_out(self):
        assert effect_cell(_sample([np.nan]), is_signed=True) == "undefined"
        assert effect_cell(_sample([np.nan, -0.25]), is_signed=True) == "-0.250"
        assert effect_cell(_sample([-0.0001, -0.0002]), is_signed=True) == "+0.000 [+0.000, +0.000]"

    def test_where_nothing_is_predicted_it_is_said(self, model, images, tmp_path, monkeypatch, capsys):
        """There is no mean over the foreground, and no voxel of it that could change."""
        segmentation = Model.segmentation
        monkeypatch.setattr(Model, "segmentation", lambda *arguments: np.zeros_like(segmentation(*arguments)))
        pictures = []
        monkeypatch.setattr(case, "draw_case", lambda picture: pictures.append(draw_case(picture)) or pictures[0])
        (row,) = self.knock_out(model, images, tmp_path / "out").values()
        assert row["mean_weight"] == row["share_changed"] == "" and row["cases"] == "0"
        printed = capsys.readouterr().out
        assert "Nothing is predicted as foreground in 1 case: no mean weight." in printed
        assert "| D2 | E1 | undefined | undefined |" in printed
        texts = [text.get_text() for axis in pictures[0].axes for text in axis.texts]
        notes = " ".join(text.get_text() for text in pictures[0].texts)
        assert not any(texts) and "no numbers: nothing is predicted as foreground" in notes

    def test_an_earlier_report_is_replaced_as_a_whole(self, model, images, tmp_path):
        out = tmp_path / "out"
        for name in ("a/routing.json", "knock_out.csv", "knock_out.pdf"):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_text("of an earlier inspection")
        self.knock_out(model, images, out)
        assert sorted(file.name for file in out.iterdir()) == ["a", "knock_out.csv", "knock_out.md", "knock_out.png"]

    @pytest.mark.parametrize("name", ["knock_out.md", "knock_out.pdf", "training.pdf"])
    def test_a_file_that_is_not_from_inspect_is_not_replaced(self, model, images, tmp_path, capsys, name):
        history_of(4, 2).write(model / "fold_0" / RECORD)
        mine = tmp_path / "out" / name
        mine.parent.mkdir()
        mine.write_text("two years of work")
        assert inspect("-m", model, "-f", 0, "-i", images, "-o", mine.parent, "--knock-out", "--pdf") == 1
        assert f"{mine} is not from inspect, which would replace it: choose another -o" in capsys.readouterr().err
        assert mine.read_text() == "two years of work"
        assert list(mine.parent.iterdir()) == [mine]


class TestMistakes:
    @pytest.fixture(scope="class")
    def untouched_model(self, nnunet, tmp_path_factory) -> Path:
        results = str(tmp_path_factory.mktemp("results"))
        with environment_with(**nnunet.folders() | {"nnUNet_results": results}):
            return make_model(nnunet, configuration="2d_small")

    @pytest.fixture
    def model(self, untouched_model, nnunet_environment, tmp_path) -> Path:
        """A model's folder to spoil."""
        return shutil.copytree(untouched_model, tmp_path / "results" / untouched_model.name)

    @pytest.fixture
    def image(self, nnunet_environment, tmp_path) -> Path:
        return write_oblique_phantom(tmp_path / "images")

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

    def test_paths_that_were_written_with_unset_variables(self, model, image, tmp_path, capsys, monkeypatch):
        for variable in ("nnUNet_results", "nnUNet_raw"):
            monkeypatch.delenv(variable, raising=False)
        nowhere = tmp_path / "nowhere"
        error = self.complaint(capsys, tmp_path, "-m", nowhere, "-f", 0, "-i", image)
        assert f"{nowhere} does not exist: -m takes a model's folder" in error
        assert error.endswith("(nnUNet_results is not set in this shell)")
        error = self.complaint(capsys, tmp_path, "-m", model, "-f", 0, "-i", nowhere)
        assert error.endswith("(nnUNet_raw is not set in this shell)")
        knock_out = ("--knock-out", "--labels", nowhere)
        error = self.complaint(capsys, tmp_path, "-m", model, "-f", 0, "-i", image, *knock_out)
        assert error.endswith("(nnUNet_raw is not set in this shell)")

    def test_the_folder_of_the_images_is_not_written_to(self, model, image, tmp_path, capsys):
        before = sorted(image.parent.iterdir())
        for images in (image.parent, image):
            output = image.parent / ".." / image.parent.name
            assert inspect("-m", model, "-f", 0, "-i", images, "-o", output) == 1
            assert "is the folder of the images: choose another -o" in capsys.readouterr().err
        assert sorted(image.parent.iterdir()) == before

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

    def test_which_fold(self, model, image, tmp_path, capsys):
        shutil.copytree(model / "fold_0", model / "fold_3")
        error = self.complaint(capsys, tmp_path, "-m", model, "-i", image)
        assert error.endswith("has checkpoint_final.pth in several folds: choose one with -f: 0, 3")
        (model / "fold_3" / FINAL_CHECKPOINT).rename(model / "fold_3" / "checkpoint_best.pth")
        for options, fold in (((), "0"), (("-chk", "checkpoint_best.pth"), "3")):
            error = self.complaint(capsys, tmp_path, "-m", model, "-i", image, "--targets", "D9", *options)
            assert "no target D9" in error
            checkpoint = options[1] if options else FINAL_CHECKPOINT
            assert Model(model, None, checkpoint, None, CPU).fold == fold
        error = self.complaint(capsys, tmp_path, "-m", model, "-i", image, "-chk", "checkpoint_latest.pth")
        assert error.endswith("from fold_0/checkpoint_final.pth, fold_3/checkpoint_best.pth")

    @pytest.mark.parametrize("variable", ["nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"])
    def test_the_folders_of_nnunet_stay_its_own(self, model, image, tmp_path, capsys, monkeypatch, variable):
        dataset = tmp_path / "nnunet" / PHANTOM
        dataset.mkdir(parents=True)
        monkeypatch.setenv(variable, str(dataset.parent))
        for output in (dataset.parent, dataset):
            assert inspect("-m", model, "-i", image, "-o", output) == 1
            assert capsys.readouterr().err.endswith(
                f"{output} is nnU-Net's own folder ({variable}): choose another -o, such as -o attention_maps\n"
            )
        assert list(dataset.parent.rglob("*")) == [dataset]

    def test_a_checkpoint_of_a_trainer_that_nobody_knows(self, model, image, tmp_path, capsys):
        file = model / "fold_0" / FINAL_CHECKPOINT
        checkpoint = torch.load(file, weights_only=False)
        torch.save(checkpoint | {"trainer_name": "nnUNetTrainerXAttnResNoSkips"}, file)
        error = self.complaint(capsys, tmp_path, "-m", model, "-f", 0, "-i", image)
        assert "finds no trainer nnUNetTrainerXAttnResNoSkips: did you mean nnUNetTrainerXAttnResNoSkip" in error

    def test_a_checkpoint_of_another_tool(self, model, image, tmp_path, capsys):
        torch.save({"state_dict": {}}, model / "fold_0" / FINAL_CHECKPOINT)
        error = self.complaint(capsys, tmp_path, "-m", model, "-f", 0, "-i", image)
        assert "is no nnU-Net checkpoint, but a dict with state_dict" in error
        assert error.endswith(": choose another -chk, or get it again")

    def test_a_checkpoint_that_would_run_code(self, model, image, tmp_path, capsys):
        file = model / "fold_0" / "checkpoint_final.pth"
        checkpoint = torch.load(file, weights_only=False)
        torch.save(checkpoint | {"trap": Trap(tmp_path / "sprung")}, file)
        error = self.complaint(capsys, tmp_path, "-m", model, "-f", 0, "-i", image)
        assert "nnU-Net does not store" in error and "--trust-checkpoint" in error

    @pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
    def test_names_of_wrappers_are_no_mistake(self, model, prefix):
        file = model / "fold_0" / FINAL_CHECKPOINT
        checkpoint = torch.load(file, weights_only=False)
        weights = checkpoint["network_weights"]
        torch.save(checkpoint | {"network_weights": {prefix + key: value for key, value in weights.items()}}, file)
        loaded = Model(model, "0", FINAL_CHECKPOINT, ["D0"], CPU).predictor.network.network.state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in weights.items())

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

    @pytest.mark.parametrize("key", ["channel_names", "modality"])
    def test_a_channel_too_many(self, model, image, tmp_path, capsys, key):
        shutil.copy(image, image.with_name("case_0001.nii.gz"))
        model = shutil.copytree(model, tmp_path / "model")
        dataset_json = json.loads((model / "dataset.json").read_text())
        dataset_json[key] = dataset_json.pop("channel_names")
        (model / "dataset.json").write_text(json.dumps(dataset_json))
        error = self.complaint(capsys, tmp_path, "-m", model, "-f", 0, "-i", image.parent)
        assert "comes with 2 channels, but the model reads 1: _0000 phantom" in error

    def test_a_missing_channel(self, nnunet_environment, model, image):
        model = Model(model, "0", FINAL_CHECKPOINT, ["D0"], CPU)
        model.channel_names = ["T1", "T2"]
        with pytest.raises(XAttnResError, match=r"comes with 1 channel, but the model reads 2: add _0001 T2$"):
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
    def test_too_little_memory(self, model, image, tmp_path, capsys, monkeypatch, where):
        def fail(*arguments: object) -> None:
            raise MemoryError("Unable to allocate 5.25 GiB")

        monkeypatch.setattr(*where, fail)
        error = self.complaint(capsys, tmp_path, "-m", model, "-f", 0, "-i", image)
        assert "too little memory for case (Unable to allocate 5.25 GiB): choose fewer --targets" in error

    def test_too_little_memory_is_told_before_the_first_tile(self, model, image, tmp_path, capsys, monkeypatch):
        def predict(*arguments: object) -> None:
            raise AssertionError("tiles are predicted")

        monkeypatch.setattr(nnUNetPredictor, "predict_sliding_window_return_logits", predict)
        monkeypatch.setattr(trained_model, "free_memory", lambda: 1_000_000)
        error = self.complaint(capsys, tmp_path, "-m", model, "-f", 0, "-i", image)
        told = r"too little memory for case \(\d+\.\d GB are needed, 0\.0 GB are free\): choose fewer --targets"
        assert re.search(told, error)

    @pytest.mark.parametrize(
        "error, detail, remedy_on_gpu",
        [
            (MemoryError("Unable to allocate 5.25 GiB"), " (Unable to allocate 5.25 GiB)", ""),
            (MemoryError(), "", ""),
            (
                RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 5637144576 bytes."),
                "",
                ", or --device cpu",
            ),
            (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 5.25 GiB"), "", ", or --device cpu"),
        ],
    )
    def test_every_kind_of_too_little_memory(self, error, detail, remedy_on_gpu):
        message = f"too little memory for case{detail}: choose fewer --targets"
        for device, remedy in (("cpu", ""), ("cuda", remedy_on_gpu)):
            with pytest.raises(XAttnResError) as raised, command._errors_explained("case", torch.device(device)):
                raise error
            assert str(raised.value) == message + remedy

    def test_another_failure_is_not_taken_for_want_of_memory(self, model, image, tmp_path, monkeypatch):
        def fail(*arguments: object) -> None:
            raise RuntimeError("Encountered inf in predicted array")

        monkeypatch.setattr(Model, "predict", fail)
        with pytest.raises(RuntimeError, match="Encountered inf"):
            inspect("-m", model, "-f", 0, "-i", image, "-o", tmp_path / "out")

    def test_a_failure_midway_keeps_the_finished_cases_whole(self, model, nnunet_environment, tmp_path, monkeypatch):
        write_oblique_phantom(tmp_path / "images", "a")
        write_oblique_phantom(tmp_path / "images", "b")

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
    file = write_oblique_phantom(tmp_path)
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
    folder = make_model(nnunet_environment, patch_size=[16, 24, 24])
    model = Model(folder, "0", FINAL_CHECKPOINT, ["E2", "D0"], CPU)
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


def test_weights_stay_in_half_precision_until_they_are_written(nnunet_environment, tmp_path):
    folder = make_model(nnunet_environment, patch_size=[16, 24, 24])
    model = Model(folder, "0", FINAL_CHECKPOINT, ["E2", "D0"], CPU)
    image, properties = model.read([str(write_oblique_phantom(tmp_path))])
    _, weights = model.predict(image, properties)
    assert {target: (len(of_target), of_target.dtype) for target, of_target in weights.items()} == {
        target: (len(model.sources[target]), torch.half) for target in ("E2", "D0")
    }


class OnesEverywhere(nn.Module):
    """In place of a network, whose own memory would hide that of the blended channels."""

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.num_channels = num_channels

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image.new_ones(1, self.num_channels, *image.shape[2:])


@pytest.mark.parametrize("targets", [None, ["E2"]])
@pytest.mark.parametrize("zoom", [1.0, 0.7])
def test_the_memory_that_is_asked_for_is_what_is_used(nnunet_environment, monkeypatch, targets, zoom):
    folder = make_model(nnunet_environment, patch_size=[16, 16, 16])
    model = Model(folder, "0", FINAL_CHECKPOINT, targets, CPU)
    channels = model.num_heads + model.num_maps
    model.predictor.network = OnesEverywhere(channels)
    image = np.random.default_rng(0).random((1, 64, 64, 64), np.float32) + 1
    properties: dict[str, Any] = {"spacing": [zoom * spacing for spacing in model.configuration.spacing]}
    preprocessed = [round(64 * zoom)] * 3
    blending, returning = model.memory_needed(preprocessed, image.shape[1:])
    monkeypatch.setattr(trained_model, "free_memory", lambda: max(blending, returning) - 1)
    with pytest.raises(MemoryError, match="GB are needed"):
        model.predict(image, properties)

    monkeypatch.setattr(trained_model, "free_memory", lambda: max(blending, returning))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        logits, weights = model.predict(image, properties)
    events = profiled.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    peak = max(accumulate(change for _, change in changes))
    of_tiles = 10 * channels * 16**3 * 4
    assert 0.95 * blending < peak < blending + of_tiles

    tracemalloc.start()
    try:
        prediction = model.segmentation(logits, properties)
        inside = model.in_image_geometry(np.ones(logits.shape[1:], np.float32), properties) > 0.5
        regions = Regions(prediction, inside, model.labels)
        for _, _, weight_map in islice(model.maps(weights, properties), 2):
            assert regions.means(weight_map)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < returning - 2 * channels * logits[0].numel()


@pytest.mark.parametrize("gpu_memory, on_gpu", [(10**12, True), (10**6, False)])
def test_tiles_are_blended_on_the_gpu_only_if_they_fit_to_the_end(nnunet_environment, monkeypatch, gpu_memory, on_gpu):
    model = Model(make_model(nnunet_environment), "0", FINAL_CHECKPOINT, ["D0"], CPU)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (gpu_memory, gpu_memory))
    model.predictor.device = torch.device("cuda")
    model._check_memory((64, 64, 64), (64, 64, 64))
    assert model.predictor.perform_everything_on_device == on_gpu
