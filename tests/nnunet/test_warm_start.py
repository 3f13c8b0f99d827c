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
from helpers.tiny_dataset import write_raw_dataset
from helpers.training import CPU, train
from nnunet_xattnres.cli import main
from nnunet_xattnres.common.errors import XAttnResError
from nnunet_xattnres.common.files import write_json_atomically
from nnunet_xattnres.common.processes import environment_with
from nnunet_xattnres.nnunet.commands import NnUNet
from nnunet_xattnres.nnunet.derived_configurations import add_small_configuration
from nnunet_xattnres.nnunet.planned_network import from_content
from nnunet_xattnres.tools.warm_start import TrainedNetwork, check_same_network, read_trained

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


def warm_start(source: Path, output: Path, *options: str) -> int:
    """Run the command. Later options replace earlier ones."""
    everything = ["--from", str(source), "-d", "901", "-c", CONFIGURATION, "-o", str(output), *options]
    return main(["warm-start", *everything])


def gates(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: value for key, value in network.state_dict().items() if key.endswith(".gamma")}


def save_untrained(
    folder: Path,
    trainer: type[nnUNetTrainer],
    preprocessed: Path,
    fold: int | str = 0,
    configuration: str = CONFIGURATION,
    plans_name: str = "nnUNetPlans",
    plans: dict[str, Any] | None = None,
    dataset_json: dict[str, Any] | None = None,
) -> Path:
    """A model folder as a training on the phantoms there would leave it. Returns its checkpoint.

    plans, dataset_json: those of the training, if it was another than that.
    """
    plans = plans or json.loads((preprocessed / PHANTOM / f"{plans_name}.json").read_text())
    dataset_json = dataset_json or json.loads((preprocessed / PHANTOM / "dataset.json").read_text())
    here = plans | {"continue_training": False, "dataset_name": PHANTOM}
    with environment_with(nnUNet_preprocessed=str(preprocessed)):
        untrained = trainer(here, configuration, fold, dataset_json, CPU)
        untrained.initialize()
    untrained.plans_manager.plans = untrained.my_init_kwargs["plans"] = plans
    untrained.inference_allowed_mirroring_axes = (0, 1)
    return save_model(untrained, folder)


def read_dataset_json(nnunet: NnUNet) -> dict[str, Any]:
    return json.loads((nnunet.raw / PHANTOM / "dataset.json").read_text())


@pytest.fixture
def trained_with(tmp_path: Path) -> Callable[..., TrainedNetwork]:
    """A trained network as its plans describe it, without a checkpoint."""

    def make(plans: dict[str, Any], configuration: str, dataset_json: dict[str, Any]) -> TrainedNetwork:
        planned = from_content(plans, configuration, dataset_json, "there")
        return TrainedNetwork(tmp_path / "fold_0" / "checkpoint_final.pth", planned, 0, {})

    return make


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
        before = sorted(tmp_path.iterdir())
        assert warm_start(source, output, *options) == 1
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
    subprocess.run(["sh", "-c", copy_command], check=True)
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


class TestPlansThatCarryXAttnRes:
    @pytest.fixture
    def carrying(self, small_plans: Path) -> str:
        assert main(["plans", "-d", "901", "--preset", "Finetune", "-c", CONFIGURATION]) == 0
        return "nnUNetXAttnResFinetunePlans"

    def test_start_as_the_plain_network_with_any_trainer(self, carrying, small_plans, tmp_path, capsys):
        plain = save_untrained(tmp_path / "plain", nnUNetTrainer, small_plans)
        output = tmp_path / "out"
        assert warm_start(plain.parents[1], output, "-p", carrying, "--trainer", "nnUNetTrainer") == 0
        expected_segmentation, expected_probabilities = predict(plain.parents[1], "checkpoint_final.pth")
        segmentation, probabilities = predict(output, "checkpoint_latest.pth")
        assert np.array_equal(segmentation, expected_segmentation)
        assert np.array_equal(probabilities, expected_probabilities)
        weights = torch.load(output / "pretrained.pth", weights_only=False)["network_weights"]
        assert any(key.startswith("xattnres.") for key in weights)
        assert f"-tr nnUNetTrainer -p {carrying} --c" in capsys.readouterr().out

    def test_are_not_for_trainers_that_add_it_themselves(self, carrying, small_plans, tmp_path, refuse):
        plain = save_untrained(tmp_path / "plain", nnUNetTrainer, small_plans)
        assert "the plans carry XAttnRes already" in refuse(plain, "-p", carrying)

    def test_without_residual_fusion_are_refused(self, small_plans, tmp_path, refuse):
        plain = save_untrained(tmp_path / "plain", nnUNetTrainer, small_plans)
        assert main(["plans", "-d", "901", "-c", CONFIGURATION]) == 0
        message = refuse(plain, "-p", "nnUNetXAttnResPlans", "--trainer", "nnUNetTrainer")
        assert "the network of nnUNetTrainer is not the planned one at the start" in message

    def test_a_remedy_names_plans_that_carry_the_same(self, carrying, small_plans, tmp_path, refuse):
        plans = "nnUNetResEncUNetMPlans"
        plain = save_untrained(tmp_path / "plain", nnUNetTrainer, small_plans, plans_name=plans)
        options = ("-p", carrying, "--trainer", "nnUNetTrainer")
        assert f"then run nnunet-xattnres plans with -p {plans}From" in refuse(plain.parents[1], *options)
        assert f"choose -p {plans} -c {CONFIGURATION}" in refuse(plain.parents[1])
        assert main(["plans", "-d", "901", "--preset", "Finetune", "-p", plans, "-o", "fitting"]) == 0
        assert f"choose -p fitting -c {CONFIGURATION}" in refuse(plain.parents[1], *options)
        assert main(["plans", "-d", "901", "--preset", "Finetune", "-p", plans, "-o", "other"]) == 0
        both = [f"-p {name} -c {CONFIGURATION}" for name in ("fitting", "other")]
        assert refuse(plain.parents[1], *options).endswith(f"; choose {' or '.join(both)}\n")


class TestReadingCheckpoints:
    def test_one_that_runs_code_is_refused_before_it_runs_any(self, plain_checkpoint, tmp_path, refuse):
        victim = tmp_path / "victim"
        checkpoint = torch.load(plain_checkpoint, weights_only=False)
        torch.save(checkpoint | {"extra": RunsCode(victim)}, plain_checkpoint)
        for source in (plain_checkpoint, plain_checkpoint.parents[1]):
            message = refuse(source)
            assert f"holds {os.system.__module__}.system that nnU-Net does not store" in message
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

    def test_a_path_that_was_written_with_an_unset_variable(self, nnunet_environment, tmp_path, refuse, monkeypatch):
        monkeypatch.delenv("nnUNet_results")
        message = refuse(tmp_path / "nowhere")
        assert "nowhere does not exist: choose another --from (nnUNet_results is not set in this shell)" in message

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
        message = refuse(plain_checkpoint)
        assert "is no nnU-Net checkpoint, but a dict with state_dict; nnU-Net's trainers also store trainer" in message
        assert message.endswith("choose another --from\n")

    @pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
    def test_names_of_wrappers_are_removed(self, plain_checkpoint, tmp_path, prefix):
        checkpoint = torch.load(plain_checkpoint, weights_only=False)
        weights = checkpoint["network_weights"]
        wrapped = {prefix + key: weight for key, weight in weights.items()}
        torch.save(checkpoint | {"network_weights": wrapped}, plain_checkpoint)
        assert warm_start(plain_checkpoint, tmp_path / "out") == 0
        written = torch.load(tmp_path / "out" / "pretrained.pth", weights_only=False)["network_weights"]
        assert all(torch.equal(written[key], weight) for key, weight in weights.items())

    def test_a_wrong_source_is_told_before_anything_else(self, tmp_path, refuse, monkeypatch):
        monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "nowhere"))
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine.txt").touch()
        message = refuse(tmp_path / "no_model", "--trainer", "nnUNetTrainer", "-d", "999")
        assert "no_model does not exist: choose another --from" in message


class TestRefusals:
    def test_other_networks_are_listed_with_all_differences(self, nnunet, nnunet_environment, trained_with):
        here = from_content(read_plans(nnunet), "3d_small", read_dataset_json(nnunet), "here")
        other = read_plans(nnunet)
        other["configurations"]["3d_small"]["architecture"]["arch_kwargs"]["strides"][1] = [1, 2, 2]
        channels = {"channel_names": {"0": "T1", "1": "T2"}}
        with pytest.raises(XAttnResError) as error:
            check_same_network(trained_with(other, "3d_small", read_dataset_json(nnunet) | channels), here)
        message = str(error.value)
        assert message.startswith("the trained network is not the one that 3d_small of nnUNetPlans plans for ")
        assert "input channels=2 (here 1), strides=[[1, 1, 1], [1, 2, 2]" in message
        check_same_network(trained_with(here.plans, "3d_small", here.dataset_json), here)

    def test_a_residual_encoder_is_no_plain_one(self, nnunet, nnunet_environment, trained_with):
        plain = from_content(read_plans(nnunet), "3d_fullres", read_dataset_json(nnunet), "plain")
        trained = trained_with(read_plans(nnunet, "nnUNetResEncUNetMPlans"), "3d_fullres", plain.dataset_json)
        with pytest.raises(XAttnResError, match=r"network='ResidualEncoderUNet' \(here 'PlainConvUNet'\)"):
            check_same_network(trained, plain)

    def test_other_channels_are_refused_because_plans_do_not_help(self, nnunet, nnunet_environment, tmp_path, refuse):
        channels = {"channel_names": {"0": "T1", "1": "T2"}}
        two_channels = save_untrained(
            tmp_path / "plain", nnUNetTrainer, nnunet.preprocessed, dataset_json=read_dataset_json(nnunet) | channels
        )
        message = refuse(two_channels)
        assert "input channels=2 (here 1); no plans change the input channels of Dataset901_Phantom" in message
        assert "move_plans" not in message

    def test_a_source_with_xattnres(self, nnunet_environment, tmp_path, refuse):
        checkpoint = save_untrained(
            tmp_path / "xattnres", find("nnUNetTrainerXAttnRes"), nnunet_environment.preprocessed
        )
        message = refuse(checkpoint)
        assert "was written by nnUNetTrainerXAttnRes and has XAttnRes already" in message
        assert message.endswith("or from it with -tr nnUNetTrainerXAttnRes and -pretrained_weights\n")
        training = get_trainer_from_args(PHANTOM, CONFIGURATION, 0, "nnUNetTrainerXAttnRes", "nnUNetPlans", False, CPU)
        maybe_load_checkpoint(training, False, False, str(checkpoint))
        weights = torch.load(checkpoint, weights_only=False)["network_weights"]
        key = next(key for key in weights if key.startswith("xattnres."))
        assert torch.equal(training.network.state_dict()[key], weights[key])

    def test_a_source_that_is_not_the_planned_network(self, nnunet_environment, tmp_path, refuse):
        checkpoint = save_untrained(tmp_path / "no_skip", find("nnUNetTrainerNoSkip"), nnunet_environment.preprocessed)
        message = refuse(checkpoint)
        assert "was written by nnUNetTrainerNoSkip, whose network is not the planned one: decoder.stages" in message

    @pytest.mark.parametrize("trainer", ["nnUNetTrainer", "nnUNetTrainerXAttnRes", "nnUNetTrainerXAttnResBlock"])
    def test_a_trainer_that_starts_as_another_network(self, trainer, plain_checkpoint, refuse):
        message = refuse(plain_checkpoint, "--trainer", trainer)
        assert f"the network of {trainer} is not the planned one at the start: choose {FINETUNE}" in message

    def test_a_trainer_without_skip_connections(self, plain_checkpoint, tmp_path, refuse, monkeypatch):
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "mine.py").write_text(
            "from nnunet_xattnres import XAttnResConfig\nfrom nnunet_xattnres.trainer import XAttnResTrainerMixin\n"
            "class Mine(XAttnResTrainerMixin):\n"
            '    xattnres_config = XAttnResConfig(fusion="residual", skip_connections=False)\n'
        )
        monkeypatch.setenv("nnUNet_extTrainer", str(tmp_path / "mine"))
        assert "the network of Mine is not the planned one" in refuse(plain_checkpoint, "--trainer", "Mine")

    def test_a_misspelt_trainer(self, plain_checkpoint, refuse):
        message = refuse(plain_checkpoint, "--trainer", "nnUNetTrainerXAttnResFintune")
        assert f"did you mean {FINETUNE}" in message

    def test_an_output_that_is_not_empty(self, plain_checkpoint, tmp_path, refuse):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine.txt").touch()
        assert "out is there already and not an empty folder: choose another -o" in refuse(plain_checkpoint)

    def test_an_output_that_is_nnunets_own(self, plain_checkpoint, nnunet_environment, refuse):
        results = os.environ["nnUNet_results"]
        assert f"{results} is nnU-Net's own folder (nnUNet_results)" in refuse(plain_checkpoint, "-o", results)

    def test_which_fold(self, nnunet_environment, tmp_path, refuse):
        model = tmp_path / "model"
        for fold in (0, 3):
            save_untrained(model, nnUNetTrainer, nnunet_environment.preprocessed, fold)
        assert "has checkpoint_final.pth in several folds: choose one with -f: 0, 3" in refuse(model)
        assert "has no finished fold 1: choose from 0, 3" in refuse(model, "-f", "1")
        checkpoint = model / "fold_0" / "checkpoint_final.pth"
        assert "-f chooses a fold of a model folder" in refuse(checkpoint, "-f", "3")
        assert "has no fold_*/checkpoint_final.pth" in refuse(tmp_path)
        arguments = ["-d", "901", "-c", CONFIGURATION, "-o", str(tmp_path / "out")]
        assert main(["warm-start", "--from", str(model), "-f", "3", *arguments]) == 0
        assert (tmp_path / "out" / "fold_3" / "checkpoint_latest.pth").is_file()

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


@pytest.fixture
def own_folders(nnunet: NnUNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> InProcess:
    """nnU-Net's folders of the test's own, to write to: the phantoms raw and planned, but not preprocessed."""
    own = InProcess(tmp_path / "own", "cpu")
    (own.preprocessed / PHANTOM).mkdir(parents=True)
    own.results.mkdir()
    own.raw.mkdir()
    (own.raw / PHANTOM).symlink_to(nnunet.raw / PHANTOM)
    for file in (nnunet.preprocessed / PHANTOM).glob("*.json"):
        shutil.copy(file, own.preprocessed / PHANTOM)
    for name, value in (own.folders() | {"nnUNet_n_proc_DA": "0"}).items():
        monkeypatch.setenv(name, value)
    return own


@pytest.fixture
def preprocessed(own_folders: InProcess, nnunet: NnUNet) -> InProcess:
    """The same with the preprocessed phantoms."""
    for data in ("nnUNetPlans_2d", "nnUNetPlans_3d_fullres"):
        (own_folders.preprocessed / PHANTOM / data).symlink_to(nnunet.preprocessed / PHANTOM / data)
    return own_folders


def choice(message: str) -> list[str]:
    """The options that a message tells to choose."""
    return shlex.split(message.rpartition("choose ")[2])


class TestRemedies:
    """What a message tells to do is done, and then the command works."""

    @pytest.mark.parametrize(
        "of_model, wrong, right",
        [
            ("3d_small", ["-c", "2d_small"], ["-p", "nnUNetPlans", "-c", "3d_small"]),
            ("3d_small", ["-c", "3d_fullres"], ["-p", "nnUNetPlans", "-c", "3d_small"]),
            ("2d_small", ["-p", "nnUNetResEncUNetMPlans", "-c", "2d"], ["-p", "nnUNetPlans", "-c", "2d_small"]),
        ],
    )
    def test_another_configuration_or_plans_of_the_dataset(
        self, nnunet, preprocessed, tmp_path, refuse, of_model, wrong, right
    ):
        plain = save_untrained(tmp_path / "plain", nnUNetTrainer, nnunet.preprocessed, configuration=of_model)
        message = refuse(plain, *wrong)
        assert choice(message) == right
        assert "move_plans" not in message
        assert warm_start(plain, tmp_path / "out", *right) == 0

    @pytest.mark.parametrize(
        "source, is_planned_here",
        [("Dataset902_Source", True), ("Dataset902_Source", False), ("Dataset901_Elsewhere", False), (PHANTOM, False)],
    )
    def test_the_plans_of_the_model_are_moved_where_no_others_fit(
        self, nnunet, own_folders, tmp_path, refuse, source, is_planned_here
    ):
        plans = read_plans(nnunet)
        plans["dataset_name"] = source
        kwargs = plans["configurations"][CONFIGURATION]["architecture"]["arch_kwargs"]
        kwargs["features_per_stage"] = [5] * len(kwargs["features_per_stage"])
        plain = save_untrained(tmp_path / "a model", nnUNetTrainer, nnunet.preprocessed, plans=plans)
        if is_planned_here:
            (own_folders.preprocessed / source).mkdir()
            for file in ("plans.json", "dataset.json"):
                name = file.replace("plans", "nnUNetPlans")
                shutil.copy(plain.parents[1] / file, own_folders.preprocessed / source / name)
        message = refuse(plain)
        commands = message.partition(f"to plan it for {PHANTOM}: ")[2].rpartition("; then choose ")[0].split(" && ")
        assert len(commands) == (2 if is_planned_here else 3)
        for command in map(shlex.split, commands):
            if command[0] == "cp":
                subprocess.run(command, check=True)
            else:
                own_folders.run(*command, log="")
        right = choice(message)
        assert right == ["-p", f"nnUNetPlansFrom{source}", "-c", CONFIGURATION]
        assert warm_start(plain, tmp_path / "out", *right) == 0
        training = get_trainer_from_args(PHANTOM, CONFIGURATION, 0, FINETUNE, right[1], False, CPU)
        maybe_load_checkpoint(training, False, False, str(tmp_path / "out" / "pretrained.pth"))
        training.on_train_start()
        assert training.train_step(next(training.dataloader_train))["loss"] > -1

    def test_plans_that_are_in_the_checkpoint_only(self, nnunet, own_folders, tmp_path, refuse, monkeypatch):
        plans = read_plans(nnunet)
        plans["configurations"][CONFIGURATION]["architecture"]["arch_kwargs"]["conv_bias"] = False
        plain = save_untrained(tmp_path / "plain", nnUNetTrainer, nnunet.preprocessed, plans=plans)
        alone = shutil.copy(plain, tmp_path / "alone.pth")
        assert "; give the model folder, with its plans.json, as --from" in refuse(alone)
        monkeypatch.chdir(plain.parent)
        assert f"cp {plain.parents[1]}/plans.json" in refuse(Path(plain.name))

    def test_a_dataset_that_is_not_preprocessed(self, nnunet, own_folders, tmp_path, refuse):
        plain = save_untrained(tmp_path / "plain", nnUNetTrainer, nnunet.preprocessed)
        message = refuse(plain)
        assert f"{PHANTOM}/nnUNetPlans_2d: run nnUNetv2_preprocess -d 901" in message
        # A preprocessing that was interrupted at once leaves an empty folder.
        (own_folders.preprocessed / PHANTOM / "nnUNetPlans_2d").mkdir()
        assert refuse(plain) == message
        own_folders.run(*shlex.split(message.partition(": run ")[2]), log="")
        assert warm_start(plain, tmp_path / "out") == 0

    def test_a_dataset_that_is_not_planned(self, nnunet, own_folders, tmp_path, refuse, capsys):
        write_raw_dataset(own_folders.raw / "Dataset903_Tiny")
        plain = save_untrained(tmp_path / "plain", nnUNetTrainer, nnunet.preprocessed)
        arguments = ("-d", "903", "-c", "2d")
        message = refuse(plain, *arguments)
        assert f"Dataset903_Tiny is in nnUNet_raw and not in {own_folders.preprocessed}: " in message
        assert "nnUNetv2_plan_and_preprocess -d 903 plans it" in message
        own_folders.run("nnUNetv2_plan_and_preprocess", "-d", "903", "-c", "2d", "-npfp", "2", log="")
        capsys.readouterr()
        (own_folders.preprocessed / "Dataset903_Tiny" / "nnUNetPlans.json").unlink()
        assert "has no plans nnUNetPlans: nnUNetv2_plan_experiment makes them" in refuse(plain, *arguments)
        own_folders.run("nnUNetv2_plan_experiment", "-d", "903", log="")
        assert "to plan it for Dataset903_Tiny" in refuse(plain, *arguments)

    def test_a_fold_of_a_checkpoint_is_left_out(self, plain_checkpoint, tmp_path, refuse):
        assert "leave -f out" in refuse(plain_checkpoint, "-f", "0")
        assert warm_start(plain_checkpoint, tmp_path / "out") == 0


@pytest.mark.parametrize(
    "labels, heads",
    [
        ({"background": 0, "organ": 1}, "background, organ"),
        ({"background": 0, "one": 1, "two": 2, "three": 3}, "background, one, two, three"),
        ({"background": 0, "tumour": 1, "organ": 2, "ignore": 3}, "background, tumour, organ"),
        ({"background": 0, "whole": [1, 2, 3], "core": [2, 3], "rim": 3}, "whole, core, rim"),
    ],
)
def test_heads_of_another_meaning_start_anew(nnunet_environment, tmp_path, capsys, labels, heads):
    """As many heads may stand for other labels."""
    dataset_json = read_dataset_json(nnunet_environment) | {"labels": labels, "regions_class_order": [1, 2, 3]}
    plain = save_untrained(
        tmp_path / "plain", nnUNetTrainer, nnunet_environment.preprocessed, dataset_json=dataset_json
    )
    assert warm_start(plain, tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert os.listdir(tmp_path / "out") == ["pretrained.pth"]
    (command,) = (line for line in printed.splitlines() if line.startswith("  "))
    assert f"The segmentation heads of {PHANTOM} start anew" in printed
    assert f"have another meaning: {heads} (here " in printed
    assert shlex.split(command) == [
        *("nnUNetv2_train", PHANTOM, CONFIGURATION, "0", "-tr", FINETUNE, "-p", "nnUNetPlans"),
        *("-pretrained_weights", str(tmp_path / "out" / "pretrained.pth")),
    ]
    written = torch.load(tmp_path / "out" / "pretrained.pth", weights_only=False)["network_weights"]
    for key, weight in torch.load(plain, weights_only=False)["network_weights"].items():
        if ".seg_layers." not in key:
            assert torch.equal(written[key], weight)
        elif key.endswith(".weight"):
            assert not torch.equal(written[key], weight)
    training = get_trainer_from_args(PHANTOM, CONFIGURATION, 0, FINETUNE, "nnUNetPlans", False, CPU)
    maybe_load_checkpoint(training, False, False, shlex.split(command)[-1])
    network = training.network.state_dict()
    assert network.keys() == written.keys()
    assert all(torch.equal(network[key], weight) for key, weight in written.items() if ".seg_layers." not in key)


def test_the_names_of_labels_decide_and_not_their_order_in_the_file(nnunet_environment, tmp_path, capsys):
    dataset_json = read_dataset_json(nnunet_environment)
    dataset_json["labels"] = dict(reversed(dataset_json["labels"].items()))
    dataset_json["channel_names"] = {"0": "CT"}
    plain = save_untrained(
        tmp_path / "plain", nnUNetTrainer, nnunet_environment.preprocessed, dataset_json=dataset_json
    )
    assert warm_start(plain, tmp_path / "out") == 0
    assert (tmp_path / "out" / "fold_0").is_dir()
    assert f"reads the channels CT, those of {PHANTOM} are phantom: check" in capsys.readouterr().out
