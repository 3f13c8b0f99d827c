"""Plans that carry XAttnRes: the command that writes them, and the networks that nnU-Net builds from them."""

import json
import shutil
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import dynamic_network_architectures
import pytest
import torch
from nnunetv2.experiment_planning.plans_for_pretraining.move_plans_between_datasets import move_plans_between_datasets
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from helpers.in_process import InProcess
from helpers.phantom_dataset import PHANTOM, plans_file, read_plans
from nnunet_xattnres import XAttnResConfig, architectures, build_network_from_plans, plans_with_xattnres
from nnunet_xattnres.cli import main
from nnunet_xattnres.common.errors import XAttnResError
from nnunet_xattnres.model.plan_classes import PLAN_CLASSES
from nnunet_xattnres.nnunet.phantom import write_phantom_dataset
from nnunet_xattnres.nnunet.planned_network import PlannedNetwork
from nnunet_xattnres.nnunet.trainer_lookup import find_trainer
from nnunet_xattnres.nnunet.xattnres_plans import preset_config, preset_names

pytestmark = pytest.mark.feature("Plans that carry XAttnRes")

PLANS = ("nnUNetPlans", "nnUNetResEncUNetMPlans")
OLD_NAMES = {
    "UNet_class_name": "PlainConvUNet",
    "UNet_base_num_features": 4,
    "unet_max_num_features": 8,
    "n_conv_per_stage_encoder": [2, 2, 2],
    "n_conv_per_stage_decoder": [2, 2],
    "num_pool_per_axis": [2, 2],
    "pool_op_kernel_sizes": [[1, 1], [2, 2], [2, 2]],
    "conv_kernel_sizes": [[3, 3], [3, 3], [3, 3]],
}


class NotInstalled:
    """An importer for which this package is not there."""

    def find_spec(self, name: str, *_: object) -> None:
        if name.partition(".")[0] == "nnunet_xattnres":
            raise ModuleNotFoundError(name=name)


@pytest.fixture
def preprocessed(nnunet_environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the phantoms in an nnUNet_preprocessed of the test's own."""
    folder = tmp_path / "preprocessed" / PHANTOM
    folder.mkdir(parents=True)
    for file in plans_file(nnunet_environment).parent.iterdir():
        if file.suffix == ".json":
            shutil.copy(file, folder)
        else:
            (folder / file.name).symlink_to(file)
    monkeypatch.setenv("nnUNet_preprocessed", str(folder.parent))
    return folder


@pytest.fixture
def refuse(preprocessed: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the command, which must fail with one line and write nothing. Returns the line."""

    def run(*options: str) -> str:
        before = {file: file.read_bytes() for file in preprocessed.glob("*.json")}
        assert main(["plans", "-d", "901", *options]) == 1
        assert {file: file.read_bytes() for file in preprocessed.glob("*.json")} == before
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        return message

    return run


def read(preprocessed: Path, name: str) -> dict[str, Any]:
    return json.loads((preprocessed / f"{name}.json").read_text())


def edit(preprocessed: Path, change: Callable[[dict[str, Any]], None], name: str = "nnUNetPlans") -> None:
    plans = read(preprocessed, name)
    change(plans["configurations"])
    (preprocessed / f"{name}.json").write_text(json.dumps(plans))


def arguments_of(configuration: dict[str, Any]) -> dict[str, Any]:
    return configuration["architecture"]["arch_kwargs"]


def small_plans(nnunet, plans_name: str) -> dict[str, Any]:
    """2d with few channels."""
    plans = read_plans(nnunet, plans_name)
    arguments = arguments_of(plans["configurations"]["2d"])
    arguments["features_per_stage"] = [4 * 2 ** min(i, 2) for i in range(arguments["n_stages"])]
    return plans


def both_routes(nnunet, plans_name: str, preset: str) -> tuple[torch.nn.Module, torch.nn.Module, list[int]]:
    """The network of the preset's trainer, that of nnU-Net's trainer with plans of the preset, and the patch size."""
    plans = small_plans(nnunet, plans_name)
    dataset_json = json.loads((nnunet.raw / PHANTOM / "dataset.json").read_text())
    carrying = plans_with_xattnres(plans, "carrying", preset_config(preset), ["2d"])
    trainer = find_trainer(f"nnUNetTrainerXAttnRes{preset if preset != 'XAttnRes' else ''}")
    torch.manual_seed(0)
    ours = PlannedNetwork(PHANTOM, plans, "2d", dataset_json).build(trainer)
    planned = PlannedNetwork(PHANTOM, carrying, "2d", dataset_json)
    return ours, planned.build(nnUNetTrainer), planned.manager.patch_size


class TestNetwork:
    @pytest.mark.parametrize("preset", preset_names())
    @pytest.mark.parametrize("plans_name", PLANS)
    def test_is_that_of_the_trainer(self, nnunet, plans_name, preset):
        ours, theirs, patch = both_routes(nnunet, plans_name, preset)
        assert theirs.config == ours.config
        assert theirs.routing_sources == ours.routing_sources
        state, other = ours.state_dict(), theirs.state_dict()
        assert {key: value.shape for key, value in state.items()} == {key: value.shape for key, value in other.items()}
        for key, value in state.items():
            if key.endswith((".query", ".gamma")) and "memory" not in key:
                assert not other[key].any(), key
            # Two draws of one distribution, or the same constant.
            if value.numel() < 500:
                assert value.numel() < 2 or (value.std() > 0) == (other[key].std() > 0), key
            else:
                assert other[key].std().item() == pytest.approx(value.std().item(), rel=0.2), key
        theirs.load_state_dict(state)
        image = torch.randn(2, 1, *patch)
        with torch.no_grad():
            assert all(map(torch.equal, ours(image), theirs(image)))

    @pytest.mark.parametrize("plans_name", PLANS)
    def test_with_residual_fusion_starts_as_its_planned_part(self, nnunet, plans_name):
        _, network, patch = both_routes(nnunet, plans_name, "Finetune")
        manager = PlansManager(small_plans(nnunet, plans_name)).get_configuration("2d")
        planned = build_network_from_plans(manager, 1, 3, XAttnResConfig.of_planned_network())
        state = {key: value for key, value in network.state_dict().items() if not key.startswith("xattnres.")}
        planned.load_state_dict(state)
        image = torch.randn(1, 1, *patch)
        with torch.no_grad():
            assert all(map(torch.equal, network(image), planned(image)))

    def test_has_a_name_that_nothing_else_has(self):
        # nnU-Net looks in these folders for a class that it does not find at its path.
        folder = f"{dynamic_network_architectures.__path__[0]}/architectures"
        for network_class in PLAN_CLASSES:
            assert getattr(architectures, network_class.__name__) is network_class
            module = "dynamic_network_architectures.architectures"
            assert recursive_find_python_class(folder, network_class.__name__, module) is None

    @pytest.mark.parametrize(
        "fields, message",
        [
            ({"fusoin": "residual"}, "has fusoin, which XAttnResConfig does not have: did you mean fusion?"),
            ({"fusion": "both"}, "XAttnResConfig.fusion must be one of replace, residual, not 'both'"),
            ("NoSkip", "xattnres in the plans must hold skip_connections, .*, not 'NoSkip'"),
        ],
    )
    def test_with_other_fields_is_refused(self, nnunet, fields, message):
        plans = plans_with_xattnres(read_plans(nnunet), "carrying", configurations=["2d"])
        arguments_of(plans["configurations"]["2d"])["xattnres"] = fields
        with pytest.raises(XAttnResError, match=message):
            build_network_from_plans(PlansManager(plans).get_configuration("2d"), 1, 3)

    def test_without_the_package_is_not_found(self, nnunet, monkeypatch):
        plans = plans_with_xattnres(small_plans(nnunet, "nnUNetPlans"), "carrying", configurations=["2d"])
        manager = PlansManager(plans).get_configuration("2d")
        for module in [name for name in sys.modules if name.partition(".")[0] == "nnunet_xattnres"]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setattr(sys, "meta_path", [NotInstalled(), *sys.meta_path])
        with (
            pytest.warns(UserWarning, match="not found"),
            pytest.raises(ImportError, match="Network class could not be found, please check/correct your plans file"),
        ):
            nnUNetTrainer.build_network_architecture(manager, manager, 1, 3)

    def test_is_built_from_plans_without_a_trainer(self, nnunet):
        plans = plans_with_xattnres(small_plans(nnunet, "nnUNetPlans"), "carrying", configurations=["2d"])
        manager = PlansManager(plans).get_configuration("2d")
        assert isinstance(build_network_from_plans(manager, 1, 3), architectures.PlainConvXAttnResUNet)
        with pytest.raises(XAttnResError, match="the plans carry XAttnRes already, as a PlainConvXAttnResUNet"):
            build_network_from_plans(manager, 1, 3, XAttnResConfig())


class TestTrainersOfOurs:
    def test_the_planned_one_trains_what_the_plans_say(self, nnunet):
        plans = plans_with_xattnres(small_plans(nnunet, "nnUNetPlans"), "carrying", configurations=["2d"])
        manager = PlansManager(plans)
        trainer = find_trainer("nnUNetTrainerPlanned")
        network = trainer.build_network_architecture(manager, manager.get_configuration("2d"), 1, 3)
        assert isinstance(network, architectures.PlainConvXAttnResUNet)

    def test_the_backend_that_the_plans_name_must_be_there(self, nnunet):
        config = XAttnResConfig(backend="native")
        plans = plans_with_xattnres(small_plans(nnunet, "nnUNetPlans"), "carrying", config, ["2d"])
        trainer = find_trainer("nnUNetTrainerPlanned")
        with pytest.raises(XAttnResError, match="'native' runs on a CPU, and the network is on cuda"):
            trainer(plans, "2d", 0, {}, torch.device("cuda"))

    @pytest.mark.parametrize("preset", ["XAttnRes", "NoSkip", "XAttnResBlock"])
    def test_other_presets_refuse_them(self, nnunet, preset):
        plans = plans_with_xattnres(small_plans(nnunet, "nnUNetPlans"), "carrying", configurations=["2d"])
        manager = PlansManager(plans)
        trainer = find_trainer(f"nnUNetTrainer{preset}")
        with pytest.raises(XAttnResError, match=r"carry XAttnRes already.*: train them with nnUNetTrainerPlanned"):
            trainer.build_network_architecture(manager, manager.get_configuration("2d"), 1, 3)


class TestCommand:
    @pytest.mark.parametrize(
        "options, name, network, fields",
        [
            ([], "nnUNetXAttnResPlans", "PlainConvXAttnResUNet", {}),
            (["--preset", "NoSkip"], "nnUNetXAttnResNoSkipPlans", "PlainConvXAttnResUNet", {"skip_connections": False}),
            (["--preset", "XAttnResNoSkip"], "nnUNetXAttnResNoSkipPlans", None, {"skip_connections": False}),
            (
                ["--preset", "nnUNetTrainerXAttnResNoSkip"],
                "nnUNetXAttnResNoSkipPlans",
                None,
                {"skip_connections": False},
            ),
            (["--preset", "nnUNetTrainerXAttnRes"], "nnUNetXAttnResPlans", None, {"skip_connections": True}),
            (["--no-skip-connections"], "nnUNetXAttnResNoSkipPlans", None, {"skip_connections": False}),
            (["--fusion", "residual"], "nnUNetXAttnResFinetunePlans", None, {"fusion": "residual"}),
            (["--preset", "Block"], "nnUNetXAttnResBlockPlans", "PlainConvBlockXAttnResUNet", {"kv_ratio": 0.5}),
            (
                ["--preset", "Block", "--kv-ratio", "0.25", "-p", "nnUNetResEncUNetMPlans", "-o", "mine"],
                "mine",
                "ResidualEncoderBlockXAttnResUNet",
                {"kv_ratio": 0.25},
            ),
            (["-p", "nnUNetResEncUNetMPlans"], "nnUNetResEncUNetMXAttnResPlans", "ResidualEncoderXAttnResUNet", {}),
        ],
    )
    def test_writes_plans_on_the_same_data(self, preprocessed, capsys, options, name, network, fields):
        before = set(preprocessed.iterdir())
        assert main(["plans", "-d", "901", *options]) == 0
        assert set(preprocessed.iterdir()) - before == {preprocessed / f"{name}.json"}
        written = read(preprocessed, name)
        source = read(preprocessed, "nnUNetResEncUNetMPlans" if "-p" in options else "nnUNetPlans")
        assert written["plans_name"] == name
        assert list(written["configurations"]) == list(source["configurations"])
        for configuration, entry in written["configurations"].items():
            architecture = entry.pop("architecture")
            planned = PlansManager(source).get_configuration(configuration)
            if network is not None:
                assert architecture["network_class_name"] == f"nnunet_xattnres.architectures.{network}"
            added = architecture["arch_kwargs"].pop("xattnres")
            assert added | fields == added
            assert architecture["arch_kwargs"] == planned.network_arch_init_kwargs
            source["configurations"][configuration].pop("architecture", None)
            assert entry == source["configurations"][configuration]
        printed = capsys.readouterr().out
        assert f"nnUNetv2_train {PHANTOM} 2d 0 -p {name}\n" in printed
        assert f"Do not run nnUNetv2_preprocess with -plans_name {name}: it would delete that data" in printed

    def test_again_changes_nothing(self, preprocessed):
        assert main(["plans", "-d", "901"]) == 0
        file = preprocessed / "nnUNetXAttnResPlans.json"
        time = file.stat().st_mtime_ns
        assert main(["plans", "-d", "901"]) == 0
        assert file.stat().st_mtime_ns == time

    def test_a_chosen_configuration_brings_what_it_needs(self, preprocessed):
        def add_cascade(configurations: dict[str, Any]) -> None:
            configurations["3d_lowres"] = {"inherits_from": "3d_fullres", "next_stage": "3d_cascade_fullres"}
            configurations["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}

        edit(preprocessed, add_cascade)
        for chosen, expected, next_stages in (
            ("3d_cascade_fullres", ["3d_fullres", "3d_lowres", "3d_cascade_fullres"], "3d_cascade_fullres"),
            ("3d_lowres", ["3d_fullres", "3d_lowres"], []),
        ):
            assert main(["plans", "-d", "901", "-c", chosen, "-o", chosen]) == 0
            configurations = read(preprocessed, chosen)["configurations"]
            assert list(configurations) == expected
            assert configurations["3d_lowres"]["next_stage"] == next_stages
            names = {entry["architecture"]["network_class_name"] for entry in configurations.values()}
            assert names == {"nnunet_xattnres.architectures.PlainConvXAttnResUNet"}

    @pytest.mark.parametrize("old, new", [("PlainConvUNet", "PlainConv"), ("ResidualEncoderUNet", "ResidualEncoder")])
    def test_plans_of_the_older_format_are_converted(self, preprocessed, old, new):
        def to_old_format(configurations: dict[str, Any]) -> None:
            del configurations["2d"]["architecture"], configurations["2d_small"]["architecture"]
            configurations["2d"].update(OLD_NAMES | {"UNet_class_name": old})

        edit(preprocessed, to_old_format)
        assert main(["plans", "-d", "901", "-c", "2d_small"]) == 0
        written = read(preprocessed, "nnUNetXAttnResPlans")
        assert list(written["configurations"]) == ["2d", "2d_small"]
        assert not OLD_NAMES.keys() & written["configurations"]["2d"].keys()
        network = build_network_from_plans(PlansManager(written).get_configuration("2d_small"), 1, 3)
        assert type(network).__name__ == f"{new}XAttnResUNet"
        assert network.encoder_channels == [4, 8, 8]

    def test_what_it_prints_leads_to_another_dataset(self, preprocessed, nnunet_environment, tmp_path, monkeypatch):
        other = "Dataset902_Others"
        nnunet = InProcess(tmp_path, "cpu")
        write_phantom_dataset(nnunet.raw / other, num_cases=2, seed=1)
        (tmp_path / "preprocessed").rename(nnunet.preprocessed)
        for name, value in nnunet.folders().items():
            monkeypatch.setenv(name, value)
        folder = nnunet.preprocessed / other
        folder.mkdir()
        shutil.copy(nnunet.raw / other / "dataset.json", folder)
        move_plans_between_datasets(901, 902, "nnUNetPlans", "nnUNetPlansFrom901")
        nnunet.run(
            "nnUNetv2_preprocess", "-d", "902", "-plans_name", "nnUNetPlansFrom901", "-c", "2d", log="preprocess"
        )
        data = sorted(folder.rglob("*.b2nd"))
        assert main(["plans", "-d", "902", "-p", "nnUNetPlansFrom901", "-c", "2d"]) == 0
        plans = json.loads((folder / "nnUNetPlansFrom901XAttnResPlans.json").read_text())
        assert plans["dataset_name"] == other
        manager = PlansManager(plans).get_configuration("2d")
        assert data
        assert all(file.parent == folder / manager.data_identifier for file in data)


class TestRefusals:
    def test_plans_that_carry_it_already(self, preprocessed, refuse):
        assert main(["plans", "-d", "901"]) == 0
        message = refuse("-p", "nnUNetXAttnResPlans", "--preset", "NoSkip", "-o", "twice")
        assert "of nnUNetXAttnResPlans carries XAttnRes already: choose the plans that they were made from" in message

    def test_an_unknown_preset(self, refuse):
        assert "there is no preset NoSkips of XAttnRes: did you mean NoSkip" in refuse("--preset", "NoSkips")
        assert "XAttnResNoSkips of XAttnRes: did you mean NoSkip" in refuse("--preset", "nnUNetTrainerXAttnResNoSkips")

    def test_a_control_as_a_preset(self, refuse):
        message = refuse("--preset", "nnUNetTrainerNoSkip")
        assert "nnUNetTrainerNoSkip is a control and adds no XAttnRes: train with -tr nnUNetTrainerNoSkip" in message

    @pytest.mark.parametrize(
        "change",
        [
            {"features_per_stage": [4, 8]},
            {"n_stages": "six"},
            {"strides": None},
            {"kernel_size": 3},
        ],
    )
    def test_a_network_that_cannot_be_built(self, preprocessed, refuse, change):
        edit(preprocessed, lambda configurations: arguments_of(configurations["2d"]).update(change))
        assert "the network of configuration 2d cannot be built (" in refuse("-c", "2d")

    def test_a_number_out_of_range(self, refuse):
        message = refuse("--preset", "Block", "--kv-ratio", "1e9")
        assert "kv_ratio must be a number from 0.001 to 8, not 1000000000.0" in message

    def test_an_unknown_configuration(self, refuse):
        assert "no configuration 3d_fulres in the plans: did you mean 3d_fullres" in refuse("-c", "3d_fulres")

    def test_another_architecture(self, preprocessed, refuse):
        def to_primus(configurations: dict[str, Any]) -> None:
            name = "dynamic_network_architectures.architectures.primus.Primus"
            configurations["2d"]["architecture"]["network_class_name"] = name

        edit(preprocessed, to_primus)
        assert "configuration 2d: XAttnRes cannot read in a Primus: choose plans whose architecture" in refuse()

    def test_a_class_that_is_not_installed(self, preprocessed, refuse):
        def to_unknown(configurations: dict[str, Any]) -> None:
            configurations["2d"]["architecture"]["network_class_name"] = "somewhere.else.UNet3000"

        edit(preprocessed, to_unknown)
        assert "nnU-Net finds no network class somewhere.else.UNet3000" in refuse("-c", "2d")

    @pytest.mark.parametrize("name", ["nnUNetPlans", "nnUNetResEncUNetMPlans"])
    def test_a_name_of_other_plans(self, refuse, name):
        assert f"{name}.json is there already and differs: choose another -o" in refuse("-o", name)

    @pytest.mark.parametrize("name", ["a__b", "../mine", "''", "dataset", "Dataset", "splits_final"])
    def test_a_name_that_is_none(self, refuse, name):
        assert f"-o {name} is no name for plans: use letters" in refuse("-o", name.strip("'"))

    @pytest.mark.parametrize("name", ["../Dataset901_Phantom/nnUNetPlans", "''"])
    def test_a_name_of_the_original_plans_that_is_none(self, refuse, name):
        assert f"-p {name} is no name of plans: give that of a file in" in refuse("-p", name.strip("'"), "-o", "mine")

    def test_options_that_do_not_go_together(self, refuse):
        assert "--kv-ratio is an option of block-level presets, and NoSkip is none" in refuse(
            "--preset", "NoSkip", "--kv-ratio", "0.25"
        )
        assert "--fusion is an option of stage-level presets, and Block is none" in refuse(
            "--preset", "Block", "--fusion", "residual"
        )
        assert "these options are those of no preset: give the plans a name with -o" in refuse(
            "--no-skip-connections", "--no-read-in-encoder"
        )
        assert "adds nothing to the planned network" in refuse(
            "--no-read-in-encoder", "--no-read-in-decoder", "-o", "same"
        )

    def test_plans_without_configurations(self, preprocessed, refuse):
        plans = read(preprocessed, "nnUNetPlans")
        (preprocessed / "nnUNetPlans.json").write_text(json.dumps(plans | {"configurations": {}}))
        assert "nnUNetPlans.json has no configurations" in refuse()

    def test_a_previous_stage_that_is_missing(self, nnunet):
        plans = deepcopy(read_plans(nnunet))
        plans["configurations"]["3d_fullres"]["previous_stage"] = "3d_lowres"
        with pytest.raises(XAttnResError, match="no configuration 3d_lowres in the plans"):
            plans_with_xattnres(plans, "carrying", configurations=["3d_fullres"])

    def test_a_parent_that_is_no_name(self, nnunet):
        plans = deepcopy(read_plans(nnunet))
        plans["configurations"]["2d"]["inherits_from"] = ["3d_fullres"]
        with pytest.raises(XAttnResError, match=r"name the configuration \['3d_fullres'\], which is no name"):
            plans_with_xattnres(plans, "carrying", configurations=["2d"])

    def test_one_name_instead_of_a_list(self, nnunet):
        with pytest.raises(XAttnResError, match=r"must be a list of names: \['2d'\]"):
            plans_with_xattnres(read_plans(nnunet), "carrying", configurations="2d")

    def test_the_argument_on_a_class_that_does_not_take_it(self, nnunet):
        plans = deepcopy(read_plans(nnunet))
        arguments_of(plans["configurations"]["2d"])["xattnres"] = {}
        with pytest.raises(XAttnResError, match="PlainConvUNet takes no argument xattnres: remove it from the plans"):
            plans_with_xattnres(plans, "carrying", configurations=["2d"])
