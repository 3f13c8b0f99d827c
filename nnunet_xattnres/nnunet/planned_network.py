"""One configuration of nnU-Net's plans: where it is read from, and the network and trainer that are made of it."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunet_xattnres.common.errors import XAttnResError, one_line, suggestion
from nnunet_xattnres.common.files import read_json
from nnunet_xattnres.common.text import shell_command
from nnunet_xattnres.model.config import Config
from nnunet_xattnres.model.plan_classes import (
    architecture_with,
    architecture_without,
    carried_config,
    check_architecture,
)
from nnunet_xattnres.nnunet.folders import dataset_folder
from nnunet_xattnres.nnunet.presets import build_preset


@dataclass(frozen=True)
class PlannedNetwork:
    """One configuration of plans.

    name: of the dataset or preset, for tables and figures.
    """

    name: str
    plans: dict[str, Any]
    configuration: str
    dataset_json: dict[str, Any]

    @property
    def manager(self) -> ConfigurationManager:
        """nnU-Net's reader of the configuration."""
        return PlansManager(self.plans).get_configuration(self.configuration)

    @property
    def num_input_channels(self) -> int:
        """The image's channels and, in the second stage of a cascade, one for each foreground label of the first."""
        return int(determine_num_input_channels(PlansManager(self.plans), self.manager, self.dataset_json))

    @property
    def channel_names(self) -> list[str]:
        """Of the image, in order. nnU-Net also reads the older key."""
        names = self.dataset_json["modality" if "modality" in self.dataset_json else "channel_names"]
        return [names[number] for number in sorted(names, key=int)]

    @property
    def num_segmentation_heads(self) -> int:
        """Output channels of the network."""
        return int(PlansManager(self.plans).get_label_manager(self.dataset_json).num_segmentation_heads)

    @property
    def carried(self) -> Config | None:
        """The config of the XAttnRes that the plans carry. None if they carry none."""
        return carried_config(self.manager)

    def without_xattnres(self) -> "PlannedNetwork":
        """The same plans without the XAttnRes that they carry."""
        return self.changed(architecture=architecture_without(self.manager))

    def with_backend(self, backend: str) -> "PlannedNetwork":
        """The same plans with another backend of the XAttnRes that they carry."""
        config = self.carried
        assert config is not None
        return self.changed(architecture=architecture_with(self.manager, replace(config, backend=backend)))

    def changed(self, **entries: Any) -> "PlannedNetwork":
        """The same plans with other entries in the configuration."""
        configurations = self.plans["configurations"]
        changed = {self.configuration: self.manager.configuration | entries}
        return replace(self, plans=self.plans | {"configurations": configurations | changed})

    def build(self, trainer: type[nnUNetTrainer], deep_supervision: bool = True) -> nn.Module:
        """The network that a trainer builds from the plans."""
        return call_as_nnunet(
            trainer.build_network_architecture,
            PlansManager(self.plans),
            self.manager,
            self.num_input_channels,
            self.num_segmentation_heads,
            deep_supervision,
        )

    def make_trainer(self, trainer: type[nnUNetTrainer], fold: int | str, device: str) -> nnUNetTrainer:
        """A trainer on these plans. It writes to the folders of nnU-Net's environment variables."""
        # nnU-Net's trainer expects this key, and removes it.
        plans = self.plans | {"continue_training": False}
        return trainer(plans, self.configuration, fold, self.dataset_json, torch.device(device))

    def title(self) -> str:
        """One line: the plans, the number of stages, the size of a patch and of a batch."""
        size = " x ".join(map(str, self.manager.patch_size))
        stages = self.manager.network_arch_init_kwargs["n_stages"]
        network = self.manager.network_arch_class_name.rpartition(".")[2]
        return (
            f"{self.name}, {self.configuration} of {self.plans['plans_name']}: {network} of {stages} stages, "
            f"patch {size}, batch {self.manager.batch_size}"
        )


def call_as_nnunet(
    build_network_architecture: Callable[..., nn.Module],
    plans: PlansManager,
    configuration: ConfigurationManager,
    num_input_channels: int,
    num_output_channels: int,
    deep_supervision: bool,
) -> nn.Module:
    """Call a trainer's method with the signature that it has. nnU-Net 2.8 also serves that of its earlier versions."""
    if "plans_manager" in inspect.signature(build_network_architecture).parameters:
        planned: tuple[Any, ...] = (plans, configuration)
    else:
        planned = (
            configuration.network_arch_class_name,
            configuration.network_arch_init_kwargs,
            configuration.network_arch_init_kwargs_req_import,
        )
    return build_network_architecture(*planned, num_input_channels, num_output_channels, deep_supervision)


def from_preset(preset: str, configuration: str, plans_name: str) -> PlannedNetwork:
    """One of the Decathlon's tasks. Raises `XAttnResError` if there is no such preset, configuration or plans."""
    plans, dataset_json = build_preset(preset, configuration, plans_name)
    return PlannedNetwork(f"{preset} ({plans['dataset_name'].partition('_')[2]})", plans, configuration, dataset_json)


def from_dataset(dataset: str, configuration: str, plans_name: str) -> PlannedNetwork:
    """The plans of a dataset in nnUNet_preprocessed. dataset: its name or number.

    Raises `XAttnResError` if they do not exist or cannot be used.
    """
    return from_file(plans_of_dataset(dataset, plans_name), configuration)


def plans_of_dataset(dataset: str, plans_name: str) -> Path:
    """The file of the plans of a dataset in nnUNet_preprocessed. Raises `XAttnResError` if there is none."""
    folder = dataset_folder(dataset)
    if not plans_name or "/" in plans_name or "\\" in plans_name:
        option = shell_command("-p", plans_name)
        raise XAttnResError(f"{option} is no name of plans: give that of a file in {folder}, without .json")
    path = folder / f"{plans_name}.json"
    if not path.is_file():
        others = [file.stem for file in sorted(folder.glob("*.json")) if "lans" in file.stem]
        near = suggestion(plans_name, others) or "nnUNetv2_plan_experiment makes them"
        raise XAttnResError(f"{folder.name} has no plans {plans_name}: {near}")
    return path


def all_of_dataset(name: str) -> Iterator[tuple[str, PlannedNetwork]]:
    """Every usable configuration of every plans file of a dataset in nnUNet_preprocessed, with the plans' name."""
    for path in sorted(Path(nnUNet_preprocessed, name).glob("*.json")):
        with suppress(XAttnResError):
            for configuration in read_json(path, "").get("configurations", ()):
                with suppress(XAttnResError):
                    yield path.stem, from_file(path, configuration)


def from_file(path: Path, configuration: str) -> PlannedNetwork:
    """A plans file with dataset.json beside it, as in nnUNet_preprocessed or in the folder of a trained model.

    Raises `XAttnResError` if one of them is missing or cannot be used.
    """
    plans = read_json(path, "give a plans file of nnU-Net")
    dataset_json = read_json(path.parent / "dataset.json", "nnU-Net puts it beside the plans: copy it there")
    return from_content(plans, configuration, dataset_json, f"{path} and its dataset.json")


def from_content(
    plans: dict[str, Any], configuration: str, dataset_json: dict[str, Any], origin: str
) -> PlannedNetwork:
    """The contents of a plans file and of dataset.json. origin: where they were read, for messages.

    Raises `XAttnResError` if they cannot be used.
    """
    try:
        configurations = plans["configurations"]
        if configuration not in configurations:
            near = suggestion(configuration, configurations) or f"choose from {', '.join(configurations)}"
            raise XAttnResError(f"{origin}: no configuration {configuration} in the plans: {near}")
        planned = PlannedNetwork(plans["dataset_name"], plans, configuration, dataset_json)
        check_architecture(planned.manager)
        # Both raise an error for plans that nnU-Net cannot use.
        _ = planned.num_input_channels, planned.title()
    except XAttnResError:
        raise
    except Exception as error:
        reason = one_line(f"{type(error).__name__}: {error}")
        raise XAttnResError(f"{origin} are no plans that nnU-Net can use ({reason})") from None
    return planned


def with_batch_size(planned: PlannedNetwork, batch_size: int) -> PlannedNetwork:
    """The same network with another batch size."""
    return planned.changed(batch_size=batch_size)
