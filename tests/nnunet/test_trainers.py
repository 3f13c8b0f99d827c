"""The trainers: their presets, budgets and checkpoints."""

import subprocess
import sys
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.variants.data_augmentation.nnUNetTrainerDA5 import nnUNetTrainerDA5
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from helpers.phantom_dataset import make_trainer, read_plans
from nnunet_xattnres import BlockXAttnResConfig, XAttnResConfig, XAttnResUNet
from nnunet_xattnres.common.errors import XAttnResError
from nnunet_xattnres.model.planned_unet import PlannedUNet
from nnunet_xattnres.nnunet.installation import list_trainers
from nnunet_xattnres.training.mixin import XAttnResTrainerMixin

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


class TestBudget:
    def test_the_plans_say_how_long_to_train(self, nnunet_environment):
        trainer = make_trainer(nnunet_environment, MyTrainer, num_epochs=7)
        assert (trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch) == (7, 2, 1)

    def test_without_plans_the_preset_does_and_then_nnunet(self, nnunet_environment):
        preset = recursive_find_trainer_class_by_name("nnUNetTrainerXAttnRes_50epochs")
        assert make_trainer(nnunet_environment, preset, "3d_fullres").num_epochs == 50
        assert make_trainer(nnunet_environment, MyTrainer, "3d_fullres").num_epochs == 1000
        assert make_trainer(nnunet_environment, preset, "3d_fullres", num_epochs=3).num_epochs == 3

    @pytest.mark.parametrize("budget", [{"epochs": 3}, {"num_epochs": 0}, {"num_epochs": "3"}, {"num_epochs": True}])
    def test_a_budget_that_is_none_is_named(self, nnunet_environment, budget):
        with pytest.raises(XAttnResError, match='"training" of the configuration 3d_small') as error:
            make_trainer(nnunet_environment, MyTrainer, **budget)
        assert next(iter(budget)) in str(error.value)


class TestMixinWithAnotherTrainer:
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
        with pytest.raises(XAttnResError, match=r"no nnU-Net checkpoint \('trainer_name'\): delete it to continue"):
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
