"""The trainers: their presets, budgets and checkpoints."""

import json
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from nnunetv2.training.logging.nnunet_logger import LocalLogger
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.variants.data_augmentation.nnUNetTrainerDA5 import nnUNetTrainerDA5
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from helpers.phantom_dataset import PHANTOM, make_trainer, read_plans
from nnunet_xattnres import BlockXAttnResConfig, XAttnResConfig, XAttnResUNet
from nnunet_xattnres.common.errors import XAttnResError
from nnunet_xattnres.model.planned_unet import PlannedUNet
from nnunet_xattnres.nnunet.installation import list_trainers
from nnunet_xattnres.nnunet.planned_network import PlannedNetwork
from nnunet_xattnres.ops import native_library
from nnunet_xattnres.training import mixin, variables
from nnunet_xattnres.training.mixin import XAttnResTrainerMixin, check_bases

NAMES = [name for name, _ in list_trainers()]
PRESETS = [name for name in NAMES if not name.endswith("epochs")]
CONFIGURATION = "2d_small"


class MyTrainer(XAttnResTrainerMixin, nnUNetTrainerDA5):
    """As the README shows it."""

    xattnres_config = XAttnResConfig(skip_connections=False)


def installed(preset: str) -> type[XAttnResTrainerMixin]:
    """A trainer class of the installed package, where nnU-Net's lookup is not the subject."""
    module = import_module(f"nnunet_xattnres.trainers.nnUNetTrainer{preset}")
    return getattr(module, f"nnUNetTrainer{preset}")


@pytest.fixture
def trainer(nnunet_environment) -> XAttnResTrainerMixin:
    trainer = make_trainer(nnunet_environment, installed("XAttnRes"), CONFIGURATION)
    trainer.initialize()
    return trainer


@pytest.mark.parametrize("name", PRESETS)
def test_nnunet_finds_every_preset_and_trains_it(nnunet_environment, name):
    trainer_class = recursive_find_trainer_class_by_name(name)
    trainer = make_trainer(nnunet_environment, trainer_class, CONFIGURATION)
    trainer.initialize()
    trainer.set_deep_supervision_enabled(True)
    assert isinstance(trainer.network, PlannedUNet) == ("Planned" not in name)
    patch = trainer.configuration_manager.patch_size
    sizes = [output.shape[2:] for output in trainer.network(torch.zeros(2, 1, *patch))]
    batch = {"data": torch.randn(2, 1, *patch), "target": [torch.zeros(2, 1, *size) for size in sizes]}
    trainer.on_train_epoch_start()
    assert trainer.train_step(batch)["loss"] < 10


def test_length_variants_differ_from_their_preset_in_the_number_of_epochs_only():
    variants = sorted(set(NAMES) - set(PRESETS))
    assert variants
    for name in variants:
        preset, _, epochs = name.removeprefix("nnUNetTrainer").rpartition("_")
        variant = getattr(import_module(installed(preset).__module__), name)
        assert variant.__bases__ == (installed(preset),), name
        assert {key for key in vars(variant) if not key.startswith("__")} == {"default_num_epochs"}, name
        assert f"{variant.default_num_epochs}epochs" == epochs


def test_presets_are_what_the_design_says():
    nowhere = {"read_in_encoder": False, "read_in_decoder": False}
    names = [name.removeprefix("nnUNetTrainer") for name in PRESETS]
    assert {name: installed(name).xattnres_config for name in names} == {
        "XAttnRes": XAttnResConfig(),
        "XAttnResNoSkip": XAttnResConfig(skip_connections=False),
        "XAttnResDecoder": XAttnResConfig(read_in_encoder=False),
        "XAttnResFinetune": XAttnResConfig(fusion="residual"),
        "XAttnResBlock": BlockXAttnResConfig(),
        "XAttnResBlockInput": BlockXAttnResConfig(isar_in_encoder=True, bank_includes_input=True),
        "NoSkip": XAttnResConfig(skip_connections=False, **nowhere),
        "Planned": XAttnResConfig(**nowhere),
    }


def test_plans_of_another_architecture_are_refused_before_they_are_built(nnunet_environment):
    plans = read_plans(nnunet_environment)
    architecture = plans["configurations"][CONFIGURATION]["architecture"]
    architecture["network_class_name"] = "dynamic_network_architectures.architectures.primus.Primus"
    manager = PlansManager(plans)
    with pytest.raises(XAttnResError, match="cannot read in a Primus"):
        MyTrainer.build_network_architecture(manager, manager.get_configuration(CONFIGURATION), 1, 3)


def _named(network_class: str) -> Callable[[dict], None]:
    def change(configuration: dict) -> None:
        configuration["architecture"]["network_class_name"] = network_class

    return change


@pytest.mark.parametrize(
    "change, variables, message",
    [
        (_named("nnunet_xattnres.architectures.PlainConvXAttnResUNet"), {}, "the plans carry XAttnRes already"),
        (_named("dynamic_network_architectures.architectures.primus.Primus"), {}, "cannot read in a Primus"),
        (lambda configuration: configuration.update(training={"epochs": 3}), {}, "and nothing else"),
        (lambda _: None, {"nnUNet_xattnres_record": "maybe"}, "neither true"),
        (lambda _: None, {"nnUNet_xattnres_checkpoint_minutes": "0"}, "is no positive number"),
    ],
)
def test_what_is_refused_leaves_no_folder(nnunet_environment, monkeypatch, change, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    plans = read_plans(nnunet_environment)
    change(plans["configurations"][CONFIGURATION])
    dataset_json = json.loads((nnunet_environment.raw / PHANTOM / "dataset.json").read_text())
    trainer = type("Refused", (XAttnResTrainerMixin,), {})
    with pytest.raises(XAttnResError, match=message):
        PlannedNetwork(PHANTOM, plans, CONFIGURATION, dataset_json).make_trainer(trainer, fold=0, device="cpu")
    assert not list((nnunet_environment.results / PHANTOM).glob("Refused__*"))


class TestBudget:
    def test_the_plans_say_how_long_to_train(self, nnunet_environment):
        trainer = make_trainer(nnunet_environment, MyTrainer, num_epochs=7)
        assert (trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch) == (7, 2, 1)

    def test_without_plans_the_preset_does_and_then_nnunet(self, nnunet_environment):
        preset = recursive_find_trainer_class_by_name("nnUNetTrainerXAttnRes_50epochs")
        assert make_trainer(nnunet_environment, preset, "3d_fullres").num_epochs == 50
        assert make_trainer(nnunet_environment, MyTrainer, "3d_fullres").num_epochs == 1000
        assert make_trainer(nnunet_environment, preset, "3d_fullres", num_epochs=3).num_epochs == 3

    def test_num_epochs_set_last_holds_and_save_every_does_not_follow(self, nnunet_environment):
        class SetLast(XAttnResTrainerMixin):
            def __init__(self, plans, configuration, fold, dataset_json, device):
                super().__init__(plans, configuration, fold, dataset_json, device)
                self.num_epochs = 20

        trainer = make_trainer(nnunet_environment, SetLast, "3d_fullres")
        assert (trainer.num_epochs, trainer.save_every) == (20, 50)
        trainer = make_trainer(nnunet_environment, SetLast, "3d_fullres", num_epochs=60)
        assert (trainer.num_epochs, trainer.save_every) == (20, 3)
        preset = type("Preset", (XAttnResTrainerMixin,), {"default_num_epochs": 60})
        trainer = make_trainer(nnunet_environment, preset, "3d_fullres")
        assert (trainer.num_epochs, trainer.save_every) == (60, 3)

    @pytest.mark.parametrize("budget", [{"epochs": 3}, {"num_epochs": 0}, {"num_epochs": "3"}, {"num_epochs": True}])
    def test_a_budget_that_is_none_is_named(self, nnunet_environment, budget):
        with pytest.raises(XAttnResError, match='"training" of the configuration 3d_small') as error:
            make_trainer(nnunet_environment, MyTrainer, **budget)
        assert next(iter(budget)) in str(error.value)


class TestCheckpointsByTime:
    @pytest.fixture
    def latest(self, trainer, monkeypatch) -> Callable[[list[float]], list[int]]:
        """A function: minutes that each epoch takes -> the epochs after which checkpoint_latest.pth is written."""
        clock, written = [0.0], []

        def save(self, filename: str) -> None:
            if Path(filename).name == "checkpoint_latest.pth":
                written.append(self.current_epoch)

        monkeypatch.setattr(mixin, "monotonic", lambda: clock[0])
        monkeypatch.setattr(nnUNetTrainer, "save_checkpoint", save)
        monkeypatch.setattr(LocalLogger, "plot_progress_png", lambda *arguments: None)
        Path(trainer.output_folder).mkdir(parents=True, exist_ok=True)
        trainer._saved_at = trainer._epoch_ended_at = 0.0
        trainer.num_epochs, trainer.save_every = 1000, 50

        def run(minutes: list[float]) -> list[int]:
            for of_epoch in minutes:
                clock[0] += 60 * of_epoch
                trainer.on_epoch_start()
                for key in ("train_losses", "val_losses", "ema_fg_dice"):
                    trainer.logger.log(key, 0.5, trainer.current_epoch)
                trainer.logger.log("dice_per_class_or_region", [0.5], trainer.current_epoch)
                trainer.on_epoch_end()
                assert trainer.save_every == 50
            return written

        return run

    def test_at_most_half_an_hour_is_lost(self, latest):
        assert latest([12] * 7) == [1, 3, 5]

    def test_it_is_written_after_every_epoch_that_is_longer(self, latest):
        assert latest([1, 1, 45, 45, 1]) == [2, 3]

    def test_short_epochs_are_as_in_nnunet(self, latest):
        assert latest([0.1] * 101) == [49, 99]

    def test_class_and_variable_may_say_otherwise(self, nnunet_environment, monkeypatch):
        rare = type("Rare", (MyTrainer,), {"checkpoint_minutes": float("inf")})
        assert make_trainer(nnunet_environment, rare, CONFIGURATION)._checkpoint_seconds == float("inf")
        monkeypatch.setenv("nnUNet_xattnres_checkpoint_minutes", "90")
        assert make_trainer(nnunet_environment, rare, CONFIGURATION)._checkpoint_seconds == 90 * 60

    @pytest.mark.parametrize("value", ["inf", "120"])
    def test_a_user_may_say_otherwise(self, latest, trainer, monkeypatch, value):
        monkeypatch.setenv("nnUNet_xattnres_checkpoint_minutes", value)
        trainer._checkpoint_seconds = 60 * variables.checkpoint_minutes(trainer.checkpoint_minutes)
        assert latest([45] * 5) == {"inf": [], "120": [1, 3]}[value]

    @pytest.mark.parametrize("value", ["half an hour", "0", "-5", "nan", ""])
    def test_a_time_that_is_none_is_refused_when_the_trainer_is_made(self, nnunet_environment, monkeypatch, value):
        monkeypatch.setenv("nnUNet_xattnres_checkpoint_minutes", value)
        with pytest.raises(XAttnResError, match=f"^nnUNet_xattnres_checkpoint_minutes={value} is no positive number: "):
            make_trainer(nnunet_environment, MyTrainer, CONFIGURATION)

    def test_the_last_epoch_writes_the_final_one_alone(self, latest, trainer):
        trainer.num_epochs = 2
        assert latest([45, 45]) == [0]


class OldSignature(nnUNetTrainer):
    """A trainer with nnU-Net's older signature, which nnU-Net 2.8 still serves."""

    @staticmethod
    def build_network_architecture(
        architecture_class_name,
        arch_init_kwargs,
        arch_init_kwargs_req_import,
        num_input_channels,
        num_output_channels,
        enable_deep_supervision=True,
    ):
        return get_network_from_plans(
            architecture_class_name,
            arch_init_kwargs,
            arch_init_kwargs_req_import,
            num_input_channels,
            num_output_channels,
            allow_init=False,
            deep_supervision=enable_deep_supervision,
        )


class Primus(torch.nn.Module):
    """Any network but a planned U-Net."""


class OwnNetwork(nnUNetTrainer):
    """A trainer that builds its own network, whatever the plans say."""

    @staticmethod
    def build_network_architecture(
        plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision=True
    ):
        return Primus()


class OwnNetworkAfterAll(XAttnResTrainerMixin):
    """A trainer whose own method replaces the mixin's."""

    @staticmethod
    def build_network_architecture(
        plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision=True
    ):
        return nnUNetTrainer.build_network_architecture(
            plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision
        )


class WrongOrder(nnUNetTrainerDA5, XAttnResTrainerMixin):
    """Defining it is no error."""


class TestOrderOfBases:
    def test_the_mixin_comes_first(self, nnunet_environment, tmp_path):
        with pytest.raises(XAttnResError) as error:
            make_trainer(nnunet_environment, WrongOrder, CONFIGURATION)
        assert str(error.value) == (
            "WrongOrder has nnUNetTrainerDA5 before XAttnResTrainerMixin, whose methods it would replace: put the "
            "mixin first, as in class WrongOrder(XAttnResTrainerMixin, nnUNetTrainerDA5)"
        )
        assert not (tmp_path / "results").exists()

    def test_one_that_leaves_out_the_mixins_init_is_refused_when_it_trains(self, nnunet_environment):
        class CallsNnUNet(nnUNetTrainer):
            def __init__(self, plans, configuration, fold, dataset_json, device):
                nnUNetTrainer.__init__(self, plans, configuration, fold, dataset_json, device)

        wrong = type("Mine", (CallsNnUNet, XAttnResTrainerMixin), {})
        trainer = make_trainer(nnunet_environment, wrong, CONFIGURATION)
        with pytest.raises(XAttnResError, match="Mine has CallsNnUNet before"):
            trainer.on_train_start()

    def test_a_preset_comes_first_too_and_what_is_derived_inherits_the_mistake(self):
        preset = installed("XAttnRes")
        check_bases(type("Mine", (preset, nnUNetTrainerDA5), {}))
        for wrong in (type("Mine", (nnUNetTrainerDA5, preset), {}), type("Mine", (WrongOrder,), {})):
            with pytest.raises(XAttnResError, match="Mine has nnUNetTrainerDA5 before"):
                check_bases(wrong)

    def test_what_is_no_trainer_may_come_before_it(self):
        check_bases(type("Mine", (type("Loss", (), {}), XAttnResTrainerMixin), {}))


class TestMixinWithAnotherTrainer:
    def test_the_old_signature_of_the_other_trainer_is_served(self, nnunet_environment):
        trainer = make_trainer(
            nnunet_environment, type("Mine", (XAttnResTrainerMixin, OldSignature), {}), CONFIGURATION
        )
        trainer.initialize()
        assert isinstance(trainer.network, XAttnResUNet)
        plans = read_plans(nnunet_environment)
        planned = PlannedNetwork("old", plans, CONFIGURATION, trainer.dataset_json)
        assert isinstance(planned.build(OldSignature), PlainConvUNet)

    def test_another_network_of_the_other_trainer_is_refused_by_its_name(self, nnunet_environment):
        trainer = make_trainer(nnunet_environment, type("Mine", (MyTrainer, OwnNetwork), {}), CONFIGURATION)
        with pytest.raises(XAttnResError) as error:
            trainer.initialize()
        assert str(error.value) == (
            "XAttnRes cannot read in a Primus, which OwnNetwork builds from these plans: put the mixin before a "
            "trainer that builds the network of the plans"
        )

    def test_it_keeps_what_the_other_trainer_does(self, nnunet_environment):
        trainer = make_trainer(nnunet_environment, MyTrainer, CONFIGURATION)
        trainer.initialize()
        assert not trainer.network.config.skip_connections
        assert trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size.__func__ is (
            nnUNetTrainerDA5.configure_rotation_dummyDA_mirroring_and_inital_patch_size
        )

    def test_it_builds_on_the_network_of_the_other_trainer(self, nnunet_environment):
        batch_norm = recursive_find_trainer_class_by_name("nnUNetTrainerBN")
        trainer = make_trainer(nnunet_environment, type("Mine", (XAttnResTrainerMixin, batch_norm), {}), CONFIGURATION)
        trainer.initialize()
        assert isinstance(trainer.network, XAttnResUNet)
        assert any(isinstance(module, torch.nn.BatchNorm2d) for module in trainer.network.modules())


def read(path: Path) -> dict:
    return torch.load(path, weights_only=False)


class TestCheckpoints:
    def test_it_records_config_and_version_and_loads_what_it_wrote(self, trainer, nnunet_environment, tmp_path):
        path = str(tmp_path / "checkpoint.pth")
        trainer.save_checkpoint(path)
        record = torch.load(path, weights_only=False)["init_args"]["xattnres"]
        assert record["config"] == XAttnResConfig().architecture()
        assert record["version"]
        other = make_trainer(nnunet_environment, type(trainer), CONFIGURATION)
        other.load_checkpoint(path)
        expected = trainer.network.state_dict()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in other.network.state_dict().items())
        assert other.current_epoch == 1

    def test_it_records_the_network_that_is_built(self, nnunet_environment, tmp_path):
        path = str(tmp_path / "checkpoint.pth")
        make_and_save(nnunet_environment, OwnNetworkAfterAll, path)
        record = torch.load(path, weights_only=False)["init_args"]["xattnres"]["config"]
        assert record == installed("Planned").xattnres_config.architecture()
        make_trainer(nnunet_environment, OwnNetworkAfterAll, CONFIGURATION).load_checkpoint(path)

    @pytest.mark.parametrize("keyword", [None, "filename_or_checkpoint", "checkpoint"])
    @pytest.mark.parametrize("form", [str, Path, read])
    def test_every_form_of_a_checkpoint_is_checked_and_loaded(self, nnunet_environment, tmp_path, form, keyword):
        def load(preset, path):
            trainer = make_trainer(nnunet_environment, preset, CONFIGURATION)
            trainer.load_checkpoint(*([] if keyword else [form(path)]), **({keyword: form(path)} if keyword else {}))
            return trainer

        cool, hot = (
            type(name, (XAttnResTrainerMixin,), {"xattnres_config": BlockXAttnResConfig(temperature=temperature)})
            for name, temperature in (("Cool", 1), ("Hot", 5))
        )
        path = tmp_path / "checkpoint.pth"
        make_and_save(nnunet_environment, hot, path)
        with pytest.raises(XAttnResError, match=r"was written by Hot .* with temperature=5 \(here 1\): continue"):
            load(cool, path)
        trainer = load(hot, path)
        assert trainer.current_epoch == 1
        weights = torch.load(path, weights_only=False)["network_weights"]
        assert all(torch.equal(weight, weights[key]) for key, weight in trainer.network.state_dict().items())

    def test_a_dict_that_is_no_checkpoint_is_refused(self, trainer):
        with pytest.raises(
            XAttnResError, match=r"the checkpoint is no nnU-Net checkpoint, but a dict with state_dict; "
        ):
            trainer.load_checkpoint({"state_dict": {}})
        with pytest.raises(TypeError, match="needs a file"):
            trainer.load_checkpoint()

    def test_a_missing_checkpoint_need_not_be_deleted(self, trainer, tmp_path):
        path = tmp_path / "checkpoint_best.pth"
        with pytest.raises(XAttnResError) as error:
            trainer.load_checkpoint(str(path))
        assert str(error.value) == (f"{path} does not exist: leave out --val_best, or give a checkpoint that exists")

    def test_a_base_trainer_that_writes_nothing_leaves_the_previous_checkpoint(self, trainer, tmp_path, monkeypatch):
        path = tmp_path / "checkpoint_best.pth"
        (tmp_path / "checkpoint_best.pth.tmp").write_bytes(b"half a checkpoint")
        for previous in (None, b"previous"):
            if previous:
                path.write_bytes(previous)
            monkeypatch.setattr(nnUNetTrainer, "save_checkpoint", lambda self, filename: None)
            trainer.save_checkpoint(str(path))
            assert (path.read_bytes() if path.exists() else None) == previous

    def test_a_base_trainer_gets_the_name_of_the_file_and_may_write_others(self, trainer, tmp_path, monkeypatch):
        path = tmp_path / "checkpoint_latest.pth"
        path.write_text("previous")

        def save(self, filename):
            assert Path(filename).name == path.name
            assert path.read_text() == "previous"
            for name in (path.name, "checkpoint_latest_ema.pth"):
                Path(filename).with_name(name).write_text("new")

        monkeypatch.setattr(nnUNetTrainer, "save_checkpoint", save)
        trainer.save_checkpoint(path)
        written = {file.name: file.read_text() for file in tmp_path.iterdir() if file.is_file()}
        assert written == dict.fromkeys((path.name, "checkpoint_latest_ema.pth"), "new")
        assert not list(tmp_path.glob(".nnunet_xattnres_*"))

    def test_a_failed_write_leaves_the_previous_checkpoint(self, trainer, tmp_path, monkeypatch):
        path = tmp_path / "checkpoint.pth"
        trainer.save_checkpoint(str(path))
        before = path.read_bytes()

        def disk_full(checkpoint, filename):
            Path(filename).write_bytes(b"half a checkpoint")
            assert path.read_bytes() == before  # what a process that is killed now leaves behind
            raise OSError("No space left on device")

        monkeypatch.setattr(torch, "save", disk_full)
        with pytest.raises(OSError, match="No space left"):
            trainer.save_checkpoint(str(path))
        assert path.read_bytes() == before
        assert list(tmp_path.glob("*.pth*")) == [path]

    def test_disabled_checkpointing_writes_nothing(self, trainer, tmp_path):
        trainer.disable_checkpointing = True
        trainer.save_checkpoint(str(tmp_path / "checkpoint.pth"))
        assert not list(tmp_path.glob("*.pth*"))

    def test_a_checkpoint_of_another_preset_is_refused(self, nnunet_environment, trainer, tmp_path):
        path = str(tmp_path / "checkpoint.pth")
        make_and_save(nnunet_environment, MyTrainer, path)
        with pytest.raises(XAttnResError, match=r"written by MyTrainer .*skip_connections=False \(here True\)"):
            trainer.load_checkpoint(path)

    def test_a_checkpoint_of_plain_nnunet_is_refused(self, nnunet_environment, trainer, tmp_path):
        path = str(tmp_path / "checkpoint.pth")
        make_and_save(nnunet_environment, nnUNetTrainer, path)
        with pytest.raises(XAttnResError, match="written by nnUNetTrainer, which has no XAttnRes"):
            trainer.load_checkpoint(path)

    def test_a_checkpoint_of_another_level_is_refused(self, nnunet_environment, trainer, tmp_path):
        path = str(tmp_path / "checkpoint.pth")
        make_and_save(nnunet_environment, installed("XAttnResBlock"), path)
        with pytest.raises(XAttnResError, match=r"nnUNetTrainerXAttnResBlock .* another kind of preset \(isar"):
            trainer.load_checkpoint(path)

    @pytest.mark.parametrize(
        "config, message",
        [
            ({}, "written by nnunet-xattnres 0.0.1, this is"),
            ({"fusion": "sum"}, r"nnunet-xattnres 0.0.1 with fusion='sum' \(here 'replace'\): continue it with that"),
            (
                {"window": 3},
                r"nnunet-xattnres 0.0.1 with window=3 \(here None\): continue it with that",
            ),
        ],
    )
    def test_a_checkpoint_of_another_version_is_compared(self, trainer, tmp_path, capsys, config, message):
        path = str(tmp_path / "checkpoint.pth")
        trainer.save_checkpoint(path)
        checkpoint = torch.load(path, weights_only=False)
        recorded = XAttnResConfig().architecture() | config
        checkpoint["init_args"]["xattnres"] = {"version": "0.0.1", "config": recorded}
        torch.save(checkpoint, path)
        if config:
            with pytest.raises(XAttnResError, match=message):
                trainer.load_checkpoint(path)
        else:
            trainer.load_checkpoint(path)
            assert message in capsys.readouterr().out

    def test_a_foreign_file_is_refused(self, trainer, tmp_path):
        path = tmp_path / "checkpoint.pth"
        torch.save({"state_dict": trainer.network.state_dict()}, path)
        with pytest.raises(XAttnResError, match=r"no nnU-Net checkpoint, .*: delete it to continue"):
            trainer.load_checkpoint(str(path))

    def test_what_the_trainer_stores_beside_is_read_as_nnunet_reads_it(self, trainer, tmp_path, capsys):
        path = tmp_path / "checkpoint.pth"
        trainer.save_checkpoint(str(path))
        torch.save(torch.load(path, weights_only=False) | {"extra": Path("here")}, path)
        trainer.load_checkpoint(str(path))
        assert "trusted" not in capsys.readouterr().out

    def test_a_truncated_checkpoint_is_refused(self, trainer, tmp_path):
        path = tmp_path / "checkpoint.pth"
        trainer.save_checkpoint(str(path))
        path.write_bytes(path.read_bytes()[:5000])
        with pytest.raises(XAttnResError, match="is damaged") as error:
            trainer.load_checkpoint(str(path))
        assert "\n" not in str(error.value)

    def test_a_checkpoint_of_which_training_cannot_go_on_is_refused(self, trainer, tmp_path):
        path = tmp_path / "checkpoint.pth"
        trainer.save_checkpoint(str(path))
        checkpoint = torch.load(path, weights_only=False)
        for key in ("logging", "optimizer_state"):
            del checkpoint[key]
        torch.save(checkpoint, path)
        with pytest.raises(XAttnResError, match=r"checkpoint\.pth lacks logging and optimizer_state"):
            trainer.load_checkpoint(str(path))


def make_and_save(nnunet, trainer_class: type[nnUNetTrainer], path: str) -> None:
    other = make_trainer(nnunet, trainer_class, CONFIGURATION)
    other.initialize()
    other.save_checkpoint(path)


class TestStartOfATraining:
    @pytest.fixture(autouse=True)
    def short_start(self, monkeypatch):
        monkeypatch.setattr(nnUNetTrainer, "on_train_start", lambda self: None)

    def test_what_killed_processes_have_left_is_removed(self, trainer, monkeypatch):
        folder = Path(trainer.output_folder)
        kept = set(folder.iterdir())

        class Killed(BaseException):
            pass

        def leave(*_, **__):
            raise Killed

        # A killed process removes nothing.
        with monkeypatch.context() as patch:
            patch.setattr("nnunet_xattnres.common.files.shutil.rmtree", lambda *_, **__: None)
            patch.setattr(torch, "save", leave)
            with pytest.raises(Killed):
                trainer.save_checkpoint(str(folder / "checkpoint_latest.pth"))
        (folder / ".nnunet_xattnres_12345678_xattnres_routing.json.tmp").write_text("{")
        assert len(set(folder.iterdir()) - kept) == 2
        # On another node of the training, a process may be writing there.
        trainer.global_rank = 1
        trainer.on_train_start()
        assert len(set(folder.iterdir()) - kept) == 2
        trainer.global_rank = 0
        trainer.on_train_start()
        assert set(folder.iterdir()) == kept

    def test_the_log_says_what_the_network_is(self, trainer, nnunet_environment):
        trainer.on_train_start()
        planned = make_trainer(nnunet_environment, installed("Planned"), CONFIGURATION)
        planned.initialize()
        planned.on_train_start()
        expected = sum(parameter.numel() for parameter in planned.network.parameters())
        count = sum(parameter.numel() for parameter in trainer.network.parameters())
        backend = "native" if native_library.is_available() else "streaming"
        assert f"XAttnRes: the planned network, nothing added; {expected:,} parameters" in log_of(planned)
        assert (
            "XAttnRes: XAttnResConfig(skip_connections=True, read_in_encoder=True, read_in_decoder=True, "
            f"fusion='replace', backend='auto'), computed by {backend}; {count:,} parameters, "
            f"{count / expected:.3f}x the {expected:,} of the planned network"
        ) in log_of(trainer)

    @pytest.mark.parametrize(
        ("config", "computed"),
        [
            (BlockXAttnResConfig(backend="triton"), ", computed by streaming;"),
            (XAttnResConfig(read_in_encoder=False, read_in_decoder=False, backend="triton"), "nothing added;"),
        ],
    )
    def test_a_backend_that_is_not_here_does_not_matter_where_it_would_compute_nothing(
        self, nnunet_environment, config, computed
    ):
        own = type("Own", (XAttnResTrainerMixin, nnUNetTrainer), {"xattnres_config": config})
        trainer = make_trainer(nnunet_environment, own, CONFIGURATION)
        trainer.initialize()
        trainer.on_train_start()
        assert computed in log_of(trainer)

    def test_pretrained_weights_of_another_temperature_are_refused(self, nnunet_environment):
        trainer = make_trainer(nnunet_environment, installed("XAttnResBlockInput"), CONFIGURATION)
        trainer.initialize()
        trainer.on_train_start()
        loaded = {key: torch.tensor(5.0) for key in trainer.network.state_dict() if key.endswith("temperature")}
        trainer.network.load_state_dict(loaded, strict=False)
        with pytest.raises(XAttnResError, match=r"come with temperature=5 \(here 1\): choose weights of the same"):
            trainer.on_train_start()


def log_of(trainer: nnUNetTrainer) -> str:
    return Path(trainer.log_file).read_text()


def test_finetuning_warms_up_and_decays(nnunet_environment):
    trainer = make_trainer(nnunet_environment, installed("XAttnResFinetune"), "3d_fullres")
    trainer.network = torch.nn.Linear(1, 1)
    trainer.optimizer, trainer.lr_scheduler = trainer.configure_optimizers()
    rates = []
    for epoch in range(trainer.num_epochs):
        trainer.current_epoch = epoch
        trainer.on_train_epoch_start()
        rates.append(trainer.optimizer.param_groups[0]["lr"])
    peak = trainer.warmup_epochs
    assert trainer.num_epochs == 250
    assert rates[: peak + 1] == pytest.approx([1e-3 * min(1, (epoch + 1) / peak) for epoch in range(peak + 1)])
    assert all(later < earlier for earlier, later in pairwise(rates[peak:]))


def test_listing_trainers_imports_neither_torch_nor_nnunet():
    code = "import sys; from nnunet_xattnres.cli import main; main(['trainers', '--list']); main(['trainers']); "
    code += "assert not {'torch', 'nnunetv2'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
