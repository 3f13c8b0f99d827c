"""The command `nnunet-xattnres warm-start`: from a plain nnU-Net to one that computes the same and trains on."""

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from helpers.images import phantom
from helpers.in_process import InProcess
from helpers.memory import limited
from helpers.models import save_model
from helpers.phantom_dataset import PHANTOM, read_plans
from helpers.training import CPU, train
from nnunet_xattnres.cli import main
from nnunet_xattnres.common.errors import XAttnResError
from nnunet_xattnres.common.files import write_json_atomically
from nnunet_xattnres.nnunet.commands import NnUNet
from nnunet_xattnres.nnunet.derived_configurations import add_small_configuration
from nnunet_xattnres.nnunet.planned_network import from_content
from nnunet_xattnres.tools.warm_start import check_same_network, read_trained

pytestmark = pytest.mark.feature("Warm start")

FINETUNE = "nnUNetTrainerXAttnResFinetune"
CONFIGURATION = "2d_small"


class RunsCode:
    """What a malicious checkpoint holds."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, (f"touch {self.victim}",)


def predict(model: Path, checkpoint: str, fold: int | str = 0) -> tuple[np.ndarray, np.ndarray]:
    """Segmentation and probabilities of a phantom."""
    predictor = nnUNetPredictor(device=CPU, perform_everything_on_device=False, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), (fold,), checkpoint)
    return predictor.predict_single_npy_array(phantom().T[None], {"spacing": [1.2, 1.0, 1.0]}, None, None, True)


def gates(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: value for key, value in network.state_dict().items() if key.endswith(".gamma")}


def save_untrained(
    folder: Path,
    trainer: type[nnUNetTrainer],
    preprocessed: Path,
    fold: int | str = 0,
    configuration: str = CONFIGURATION,
    plans_name: str = "nnUNetPlans",
) -> Path:
    """A model folder as a training on the phantoms there would leave it. Returns its checkpoint."""
    plans = json.loads((preprocessed / PHANTOM / f"{plans_name}.json").read_text())
    dataset_json = json.loads((preprocessed / PHANTOM / "dataset.json").read_text())
    untrained = trainer(plans | {"continue_training": False}, configuration, fold, dataset_json, CPU)
    untrained.initialize()
    untrained.inference_allowed_mirroring_axes = (0, 1)
    return save_model(untrained, folder)


def find(trainer: str) -> type[nnUNetTrainer]:
    module = __import__(f"nnunet_xattnres.trainers.{trainer}", fromlist=[trainer])
    return getattr(module, trainer)


@pytest.fixture
def plain_checkpoint(nnunet_environment: NnUNet, tmp_path: Path) -> Path:
    return save_untrained(tmp_path / "plain", nnUNetTrainer, nnunet_environment.preprocessed)


@pytest.fixture
def refuse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the command, which must fail, with one line, and leave nothing behind. Returns the line."""

    def run(source: Path, *options: str) -> str:
        output = tmp_path / "out"
        everything = ["--from", str(source), "-d", "901", "-c", CONFIGURATION, "-o", str(output), *options]
        before = sorted(tmp_path.iterdir())
        assert main(["warm-start", *everything]) == 1
        assert sorted(tmp_path.iterdir()) == before
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        return message

    return run


def test_from_a_trained_network_to_finetuned_ones(nnunet_environment, tmp_path, capsys):
    results = Path(os.environ["nnUNet_results"])
    plain = Path(train(PHANTOM, CONFIGURATION, "nnUNetTrainerPlanned").output_folder_base)
    model = tmp_path / "warm start"
    arguments = ["--from", str(plain), "--trainer", FINETUNE, "-d", "901", "-c", CONFIGURATION]
    capsys.readouterr()
    assert main(["warm-start", *arguments, "-o", str(model)]) == 0
    printed = capsys.readouterr().out
    assert sorted(str(file.relative_to(model)) for file in model.rglob("*") if file.is_file()) == [
        "dataset.json",
        "fold_0/checkpoint_latest.pth",
        "plans.json",
        "pretrained.pth",
    ]
    assert [path.name for path in results.joinpath(PHANTOM).iterdir()] == [plain.name]

    expected_segmentation, expected_probabilities = predict(plain, "checkpoint_final.pth")
    segmentation, probabilities = predict(model, "checkpoint_latest.pth")
    assert np.array_equal(segmentation, expected_segmentation)
    assert np.array_equal(probabilities, expected_probabilities)
    assert len(np.unique(probabilities)) > 1000

    predict_command, copy_command, continue_command, pretrained_command = (
        line.strip() for line in printed.splitlines() if line.startswith("  ")
    )
    image = sitk.GetImageFromArray(phantom().T)
    image.SetSpacing((1.0, 1.0, 1.2))
    (tmp_path / "images").mkdir()
    sitk.WriteImage(image, tmp_path / "images" / "case_0000.nii.gz")
    folders = {"IMAGES": tmp_path / "images", "PREDICTIONS": tmp_path / "predictions"}
    command = [str(folders.get(word, word)) for word in shlex.split(predict_command)]
    InProcess(nnunet_environment.workdir, "cpu").run(*command, "-device", "cpu", log="predict")
    predicted = sitk.GetArrayFromImage(sitk.ReadImage(tmp_path / "predictions" / "case.nii.gz"))
    assert np.array_equal(predicted, segmentation)

    _, pretrained = pretrained_command.split(" -pretrained_weights ")
    finetuned = train(PHANTOM, CONFIGURATION, FINETUNE, pretrained=shlex.split(pretrained)[0])
    assert all(gate.any() for gate in gates(finetuned.network).values())

    shutil.rmtree(finetuned.output_folder_base)
    subprocess.run(copy_command, shell=True, check=True)
    assert continue_command == f"nnUNetv2_train {PHANTOM} {CONFIGURATION} 0 -tr {FINETUNE} -p nnUNetPlans --c"
    continued = train(PHANTOM, CONFIGURATION, FINETUNE, resume=True)
    assert all(gate.any() for gate in gates(continued.network).values())
    assert len(continued.logger.get_value("train_losses", None)) == 1
    final = torch.load(Path(continued.output_folder) / "checkpoint_final.pth", weights_only=False)
    assert final["current_epoch"] == 1


def test_continuing_starts_from_the_trained_weights_heads_included(plain_checkpoint, nnunet_environment, tmp_path):
    model = Path(os.environ["nnUNet_results"], PHANTOM, f"{FINETUNE}__nnUNetPlans__{CONFIGURATION}")
    arguments = ["--from", str(plain_checkpoint), "-d", "901", "-c", CONFIGURATION, "-o", str(model)]
    assert main(["warm-start", *arguments]) == 0
    training = get_trainer_from_args(PHANTOM, CONFIGURATION, 0, FINETUNE, "nnUNetPlans", True, CPU)
    maybe_load_checkpoint(training, True, False)
    weights = torch.load(plain_checkpoint, weights_only=False)["network_weights"]
    loaded = training.network.state_dict()
    assert any("seg_layers" in key for key in weights)
    assert all(torch.equal(loaded[key], weight) for key, weight in weights.items())
    assert gates(training.network)
    assert not any(gate.any() for gate in gates(training.network).values())
    assert training.current_epoch == 0
    assert training.inference_allowed_mirroring_axes == (0, 1)


def test_where_the_output_is_what_nnunet_looks_for_nothing_is_to_be_copied(plain_checkpoint, capsys):
    model = Path(os.environ["nnUNet_results"], PHANTOM, f"{FINETUNE}__nnUNetPlans__{CONFIGURATION}")
    arguments = ["--from", str(plain_checkpoint), "-d", "901", "-c", CONFIGURATION, "-o", str(model)]
    assert main(["warm-start", *arguments]) == 0
    assert "cp " not in capsys.readouterr().out


def test_a_training_that_is_there_already_is_not_merged_with(plain_checkpoint, tmp_path, capsys):
    model = Path(os.environ["nnUNet_results"], PHANTOM, f"{FINETUNE}__nnUNetPlans__{CONFIGURATION}")
    for fold, is_in_the_way in ((1, False), (0, True)):
        (model / f"fold_{fold}").mkdir(parents=True)
        output = tmp_path / f"out_{fold}"
        arguments = ["--from", str(plain_checkpoint), "-d", "901", "-c", CONFIGURATION, "-o", str(output)]
        assert main(["warm-start", *arguments]) == 0
        assert (f"{model}/fold_0 is there already: move it away first" in capsys.readouterr().out) == is_in_the_way


def test_an_empty_folder_that_is_there_is_filled(plain_checkpoint, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "other")
    monkeypatch.chdir(tmp_path / "empty")
    for output, folder in ((".", tmp_path / "empty"), (str(tmp_path / "link"), tmp_path / "other")):
        arguments = ["--from", str(plain_checkpoint), "-d", "901", "-c", CONFIGURATION, "-o", output]
        assert main(["warm-start", *arguments]) == 0
        assert sorted(os.listdir(folder)) == ["dataset.json", "fold_0", "plans.json", "pretrained.pth"]
    assert os.listdir() == os.listdir(tmp_path / "empty")


def test_until_it_is_trained_the_model_preprocesses_as_the_source(plain_checkpoint, nnunet_environment, tmp_path):
    folder = plain_checkpoint.parents[1]
    plans = json.loads((folder / "plans.json").read_text())
    plans["configurations"]["3d_other"] = plans["configurations"].pop(CONFIGURATION) | {"spacing": [2.0, 2.0]}
    (folder / "plans.json").write_text(json.dumps(plans))
    checkpoint = torch.load(plain_checkpoint, weights_only=False)
    checkpoint["init_args"]["configuration"] = "3d_other"
    torch.save(checkpoint, plain_checkpoint)
    model = tmp_path / "out"
    arguments = ["--from", str(folder), "-d", "901", "-c", CONFIGURATION, "-o", str(model)]
    assert main(["warm-start", *arguments]) == 0
    predictor = nnUNetPredictor(device=CPU, perform_everything_on_device=False)
    predictor.initialize_from_trained_model_folder(str(model), (0,), "checkpoint_latest.pth")
    assert predictor.configuration_manager.spacing == [2.0, 2.0]


@pytest.fixture
def small_plans(nnunet_environment: NnUNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An nnUNet_preprocessed where both plans have 2d_small and 3d_small."""
    preprocessed = tmp_path / "preprocessed"
    (preprocessed / PHANTOM).mkdir(parents=True)
    shutil.copy(nnunet_environment.preprocessed / PHANTOM / "dataset.json", preprocessed / PHANTOM)
    for data in ("nnUNetPlans_2d", "nnUNetPlans_3d_fullres"):
        (preprocessed / PHANTOM / data).symlink_to(nnunet_environment.preprocessed / PHANTOM / data)
    for plans_name in ("nnUNetPlans", "nnUNetResEncUNetMPlans"):
        plans = read_plans(nnunet_environment, plans_name)
        for name, base in (("2d_small", "2d"), ("3d_small", "3d_fullres")):
            add_small_configuration(plans, name, base, base_features=4, max_patch_voxels=32**3, batch_size=2)
        write_json_atomically(plans, preprocessed / PHANTOM / f"{plans_name}.json")
    monkeypatch.setenv("nnUNet_preprocessed", str(preprocessed))
    return preprocessed


@pytest.mark.parametrize(
    "plans_name, configuration, fold, regions",
    [
        ("nnUNetPlans", "3d_small", 0, True),
        ("nnUNetPlans", "2d_small", "all", False),
        ("nnUNetResEncUNetMPlans", "3d_small", "all", False),
        ("nnUNetResEncUNetMPlans", "2d_small", 0, True),
    ],
)
def test_every_plain_network_predicts_the_same(
    small_plans, nnunet_environment, tmp_path, plans_name, configuration, fold, regions
):
    if regions:
        file = small_plans / PHANTOM / "dataset.json"
        labels = {"background": 0, "whole": [1, 2], "core": [2]}
        file.write_text(json.dumps(json.loads(file.read_text()) | {"labels": labels, "regions_class_order": [1, 2]}))
    plain = save_untrained(tmp_path / "plain", nnUNetTrainer, small_plans, fold, configuration, plans_name)
    checkpoint = torch.load(plain, weights_only=False)
    torch.manual_seed(0)
    for weight in checkpoint["network_weights"].values():
        weight += 0.1 * torch.randn_like(weight)
    torch.save(checkpoint | {"inference_allowed_mirroring_axes": (0,)}, plain)

    model = tmp_path / "out"
    arguments = ["--from", str(plain.parents[1]), "-d", "901", "-c", configuration, "-p", plans_name, "-o", str(model)]
    assert main(["warm-start", *arguments]) == 0
    expected_segmentation, expected_probabilities = predict(plain.parents[1], "checkpoint_final.pth", fold)
    segmentation, probabilities = predict(model, "checkpoint_latest.pth", fold)
    assert np.array_equal(segmentation, expected_segmentation)
    assert np.array_equal(probabilities, expected_probabilities)
    assert len(probabilities) == (2 if regions else 3)
    assert len(np.unique(probabilities)) > 1000


class TestReadingCheckpoints:
    def test_one_that_runs_code_is_refused_before_it_runs_any(self, plain_checkpoint, tmp_path, refuse):
        victim = tmp_path / "victim"
        checkpoint = torch.load(plain_checkpoint, weights_only=False)
        torch.save(checkpoint | {"extra": RunsCode(victim)}, plain_checkpoint)
        for source in (plain_checkpoint, plain_checkpoint.parents[1]):
            message = refuse(source)
            assert "holds posix.system that nnU-Net does not store" in message
            assert "--trust-checkpoint" in message
        assert not victim.exists()

    def test_what_nnunet_does_not_store_is_read_on_request(self, plain_checkpoint, tmp_path, capsys):
        checkpoint = torch.load(plain_checkpoint, weights_only=False)
        torch.save(checkpoint | {"extra": Path("here")}, plain_checkpoint)
        arguments = ["--from", str(plain_checkpoint), "-d", "901", "-c", CONFIGURATION, "-o", str(tmp_path / "out")]
        assert main(["warm-start", *arguments]) == 1
        assert "--trust-checkpoint" in capsys.readouterr().err
        assert main(["warm-start", *arguments, "--trust-checkpoint"]) == 0
        assert f"{plain_checkpoint} is trusted and read without restrictions" in capsys.readouterr().out

    @pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
    def test_numbers_of_numpy_1_and_2_are_read(self, plain_checkpoint, module, monkeypatch):
        checkpoint = torch.load(plain_checkpoint, weights_only=False)
        checkpoint["logging"] = {"train_losses": [kind(0.5) for kind in (np.float64, np.float32, np.float16)]}
        checkpoint["_best_ema"] = np.float64(0.25)
        scalar = np.float64(0).__reduce__()[0]
        monkeypatch.setattr(scalar, "__module__", module, raising=False)
        torch.save(checkpoint, plain_checkpoint)
        assert f"{module}\nscalar\n".encode() in plain_checkpoint.read_bytes()
        read = read_trained(plain_checkpoint, None, False).checkpoint
        assert read["_best_ema"] == 0.25
        assert read["logging"] == {"train_losses": [0.5, 0.5, 0.5]}

    @pytest.mark.parametrize("options", [(), ("-f", "0")])
    def test_a_missing_file_is_named(self, nnunet_environment, tmp_path, refuse, options):
        assert "nowhere does not exist: choose another --from" in refuse(tmp_path / "nowhere", *options)

    def test_what_it_records_cannot_lead_out_of_the_output(self, plain_checkpoint, refuse):
        checkpoint = torch.load(plain_checkpoint, weights_only=False)
        checkpoint["init_args"]["fold"] = "0/../../elsewhere"
        torch.save(checkpoint, plain_checkpoint)
        assert "records fold '0/../../elsewhere', which nnU-Net does not have" in refuse(plain_checkpoint)

    def test_a_truncated_file_is_damaged(self, plain_checkpoint, refuse):
        plain_checkpoint.write_bytes(plain_checkpoint.read_bytes()[:5000])
        assert "is damaged or no nnU-Net checkpoint" in refuse(plain_checkpoint)

    def test_another_checkpoint_is_none_of_nnunet(self, plain_checkpoint, refuse):
        torch.save({"state_dict": {}}, plain_checkpoint)
        assert "is damaged or no nnU-Net checkpoint ('trainer_name')" in refuse(plain_checkpoint)


class TestRefusals:
    def test_other_networks_are_listed_with_all_differences(self, nnunet):
        plans = read_plans(nnunet)
        dataset_json = json.loads((nnunet.raw / PHANTOM / "dataset.json").read_text())
        here = from_content(plans, "3d_small", dataset_json, "here")
        other = json.loads(json.dumps(plans))
        other["configurations"]["3d_small"]["architecture"]["arch_kwargs"]["strides"][1] = [1, 2, 2]
        labels = {"background": 0, "organ": 1}
        other_data = dataset_json | {"labels": labels, "channel_names": {"0": "T1", "1": "T2"}}
        there = from_content(other, "3d_small", other_data, "there")
        with pytest.raises(XAttnResError) as error:
            check_same_network(there, here)
        message = str(error.value)
        assert "input channels=2 (here 1), segmentation heads=2 (here 3), strides=[[1, 1, 1], [1, 2, 2]" in message
        check_same_network(here, here)

    def test_a_residual_encoder_is_no_plain_one(self, nnunet):
        dataset_json = json.loads((nnunet.raw / PHANTOM / "dataset.json").read_text())
        plain = from_content(read_plans(nnunet), "3d_fullres", dataset_json, "plain")
        residual = from_content(read_plans(nnunet, "nnUNetResEncUNetMPlans"), "3d_fullres", dataset_json, "residual")
        with pytest.raises(XAttnResError, match=r"network='ResidualEncoderUNet' \(here 'PlainConvUNet'\)"):
            check_same_network(residual, plain)

    def test_the_command_lists_them_too(self, plain_checkpoint, refuse):
        message = refuse(plain_checkpoint, "-c", "3d_small")
        assert "is not the one that 3d_small of nnUNetPlans plans for Dataset901_Phantom: " in message
        assert "conv_op='torch.nn.modules.conv.Conv2d' (here 'torch.nn.modules.conv.Conv3d')" in message

    def test_a_source_with_xattnres(self, nnunet_environment, tmp_path, refuse):
        checkpoint = save_untrained(
            tmp_path / "xattnres", find("nnUNetTrainerXAttnRes"), nnunet_environment.preprocessed
        )
        assert "was written by nnUNetTrainerXAttnRes and has XAttnRes already" in refuse(checkpoint)

    def test_a_source_that_is_not_the_planned_network(self, nnunet_environment, tmp_path, refuse):
        checkpoint = save_untrained(tmp_path / "no_skip", find("nnUNetTrainerNoSkip"), nnunet_environment.preprocessed)
        message = refuse(checkpoint)
        assert "was written by nnUNetTrainerNoSkip, whose network is not the planned one: decoder.stages" in message

    @pytest.mark.parametrize("trainer", ["nnUNetTrainer", "nnUNetTrainerXAttnRes", "nnUNetTrainerXAttnResBlock"])
    def test_a_trainer_that_starts_as_another_network(self, trainer, nnunet_environment, tmp_path, refuse):
        message = refuse(tmp_path, "--trainer", trainer)
        assert f"the network of {trainer} is not the planned one at the start: choose {FINETUNE}" in message

    def test_a_trainer_without_skip_connections(self, nnunet_environment, tmp_path, refuse, monkeypatch):
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "mine.py").write_text(
            "from nnunet_xattnres import XAttnResConfig\nfrom nnunet_xattnres.trainer import XAttnResTrainerMixin\n"
            "class Mine(XAttnResTrainerMixin):\n"
            '    xattnres_config = XAttnResConfig(fusion="residual", skip_connections=False)\n'
        )
        monkeypatch.setenv("nnUNet_extTrainer", str(tmp_path / "mine"))
        assert "the network of Mine is not the planned one" in refuse(tmp_path, "--trainer", "Mine")

    def test_a_misspelt_trainer(self, nnunet_environment, tmp_path, refuse):
        message = refuse(tmp_path, "--trainer", "nnUNetTrainerXAttnResFintune")
        assert f"did you mean {FINETUNE}" in message

    def test_an_output_that_is_not_empty(self, plain_checkpoint, tmp_path, refuse):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine.txt").touch()
        assert "out is there already and not an empty folder: choose another -o" in refuse(plain_checkpoint)

    def test_which_fold(self, nnunet_environment, tmp_path, refuse):
        model = tmp_path / "model"
        for fold in (0, 3):
            save_untrained(model, nnUNetTrainer, nnunet_environment.preprocessed, fold)
        assert "has several folds: choose one of them with -f: 0, 3" in refuse(model)
        assert "has no finished fold 1: choose from 0, 3" in refuse(model, "-f", "1")
        checkpoint = model / "fold_0" / "checkpoint_final.pth"
        assert "-f chooses a fold of a model folder" in refuse(checkpoint, "-f", "3")
        assert "has no fold_*/checkpoint_final.pth" in refuse(tmp_path)
        arguments = ["-d", "901", "-c", CONFIGURATION, "-o", str(tmp_path / "out")]
        assert main(["warm-start", "--from", str(model), "-f", "3", *arguments]) == 0
        assert (tmp_path / "out" / "fold_3" / "checkpoint_latest.pth").is_file()

    def test_a_dataset_that_is_not_preprocessed(self, plain_checkpoint, nnunet, refuse, monkeypatch, tmp_path):
        preprocessed = tmp_path / "preprocessed"
        shutil.copytree(nnunet.preprocessed, preprocessed, ignore=shutil.ignore_patterns("nnUNetPlans_*"))
        monkeypatch.setenv("nnUNet_preprocessed", str(preprocessed))
        assert "nnUNetPlans_2d does not exist: run nnUNetv2_preprocess first" in refuse(plain_checkpoint)

    @pytest.mark.parametrize("room", [5_000, 100_000])
    def test_a_full_disk_leaves_nothing(self, plain_checkpoint, refuse, room):
        """Too full for plans.json, or for a checkpoint only, about which PyTorch has its own error."""
        resource = pytest.importorskip("resource")  # not on Windows
        with limited(resource.RLIMIT_FSIZE, room):
            message = refuse(plain_checkpoint)
        assert re.search(r"cannot write .*out \(.+\): make room or choose another -o", message)
        assert ("File too large" in message) == (room == 5_000)

    def test_an_output_where_nothing_can_be_written(self, plain_checkpoint, tmp_path, refuse):
        (tmp_path / "file").touch()
        message = refuse(plain_checkpoint, "-o", str(tmp_path / "file" / "out"))
        assert f"{Path('file', 'out')} (" in message
        assert "): choose another -o" in message
