"""The network classes that plans name: a planned network and XAttnRes in one class, which nnU-Net itself builds.

nnU-Net finds the class by its path, gives it the arguments in the plans, and initialises the whole network afterwards.
"""

from collections.abc import Mapping
from pydoc import locate
from typing import Any

import dynamic_network_architectures
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

from nnunet_xattnres.common.errors import XAttnResError
from nnunet_xattnres.model.block_level import BlockXAttnResUNet
from nnunet_xattnres.model.config import BlockXAttnResConfig, Config, XAttnResConfig, config_from_fields
from nnunet_xattnres.model.planned_unet import check_class
from nnunet_xattnres.model.stage_level import XAttnResUNet

# The module that plans name. It re-exports the classes.
PATH = "nnunet_xattnres.architectures"
ARGUMENT = "xattnres"

Fields = Mapping[str, Any]


class PlainConvXAttnResUNet(XAttnResUNet):
    """A `PlainConvUNet` with stage-level XAttnRes.

    planned: the arguments of `PlainConvUNet`. xattnres: the fields of `XAttnResConfig`. Those left out have defaults.
    """

    def __init__(self, *planned: Any, xattnres: Fields | None = None, **planned_by_name: Any) -> None:
        config = config_from_fields(XAttnResConfig, xattnres)
        super().__init__(PlainConvUNet(*planned, **planned_by_name), config)


class ResidualEncoderXAttnResUNet(XAttnResUNet):
    """A `ResidualEncoderUNet` with stage-level XAttnRes. See `PlainConvXAttnResUNet`."""

    def __init__(self, *planned: Any, xattnres: Fields | None = None, **planned_by_name: Any) -> None:
        config = config_from_fields(XAttnResConfig, xattnres)
        super().__init__(ResidualEncoderUNet(*planned, **planned_by_name), config)


class PlainConvBlockXAttnResUNet(BlockXAttnResUNet):
    """A `PlainConvUNet` with block-level XAttnRes.

    planned: the arguments of `PlainConvUNet`. xattnres: the fields of `BlockXAttnResConfig`.
    """

    def __init__(self, *planned: Any, xattnres: Fields | None = None, **planned_by_name: Any) -> None:
        config = config_from_fields(BlockXAttnResConfig, xattnres)
        super().__init__(PlainConvUNet(*planned, **planned_by_name), config)


class ResidualEncoderBlockXAttnResUNet(BlockXAttnResUNet):
    """A `ResidualEncoderUNet` with block-level XAttnRes. See `PlainConvBlockXAttnResUNet`."""

    def __init__(self, *planned: Any, xattnres: Fields | None = None, **planned_by_name: Any) -> None:
        config = config_from_fields(BlockXAttnResConfig, xattnres)
        super().__init__(ResidualEncoderUNet(*planned, **planned_by_name), config)


# For every class, the planned one and the kind of its config.
PLAN_CLASSES: dict[type, tuple[type, type[Config]]] = {
    PlainConvXAttnResUNet: (PlainConvUNet, XAttnResConfig),
    ResidualEncoderXAttnResUNet: (ResidualEncoderUNet, XAttnResConfig),
    PlainConvBlockXAttnResUNet: (PlainConvUNet, BlockXAttnResConfig),
    ResidualEncoderBlockXAttnResUNet: (ResidualEncoderUNet, BlockXAttnResConfig),
}


def check_architecture(configuration: ConfigurationManager) -> None:
    """Raise `XAttnResError` unless the plans describe an encoder/decoder U-Net, with XAttnRes or without.

    Nothing is built.
    """
    network_class = _class_of(configuration)
    if network_class in PLAN_CLASSES:
        carried_config(configuration)
    elif network_class is not None:  # nnU-Net itself says that it finds no class
        remedy = "choose plans whose architecture is a PlainConvUNet or ResidualEncoderUNet, such as nnUNetPlans"
        check_class(network_class, f"{remedy} or nnUNetResEncUNetMPlans")


def carried_config(configuration: ConfigurationManager) -> Config | None:
    """The config of the XAttnRes that plans carry. None if they carry none.

    Raises `XAttnResError` if its fields are not those of the config.
    """
    network_class = _class_of(configuration)
    if network_class not in PLAN_CLASSES:
        return None
    _, kind = PLAN_CLASSES[network_class]
    return config_from_fields(kind, configuration.network_arch_init_kwargs.get(ARGUMENT))


def architecture_with(configuration: ConfigurationManager, config: Config) -> dict[str, Any]:
    """The architecture of a configuration, as plans have it, with this XAttnRes in place of any that it carries.

    Raises `XAttnResError` if the architecture is not an encoder/decoder U-Net.
    """
    check_architecture(configuration)
    planned = _planned_class(configuration)
    if planned is None:
        name = configuration.network_arch_class_name
        raise XAttnResError(f"nnU-Net finds no network class {name}: correct the plans, or install what it belongs to")
    if carried_config(configuration) is None and ARGUMENT in configuration.network_arch_init_kwargs:
        raise XAttnResError(f"{planned.__name__} takes no argument {ARGUMENT}: remove it from the plans")
    classes = {planned_and_kind: network_class for network_class, planned_and_kind in PLAN_CLASSES.items()}
    fields = config.architecture()
    if config.backend != "auto":
        fields["backend"] = config.backend
    name = f"{PATH}.{classes[planned, type(config)].__name__}"
    arguments = configuration.network_arch_init_kwargs | {ARGUMENT: fields}
    return configuration.configuration["architecture"] | {"network_class_name": name, "arch_kwargs": arguments}


def architecture_without(configuration: ConfigurationManager) -> dict[str, Any]:
    """The architecture of a configuration, as plans have it, without the XAttnRes that it carries."""
    architecture: dict[str, Any] = configuration.configuration["architecture"]
    if carried_config(configuration) is None:
        return architecture
    planned = _planned_class(configuration)
    assert planned is not None
    arguments = {name: value for name, value in architecture["arch_kwargs"].items() if name != ARGUMENT}
    name = f"{planned.__module__}.{planned.__name__}"
    return architecture | {"network_class_name": name, "arch_kwargs": arguments}


def _planned_class(configuration: ConfigurationManager) -> type | None:
    network_class = _class_of(configuration)
    return PLAN_CLASSES[network_class][0] if network_class in PLAN_CLASSES else network_class


def _class_of(configuration: ConfigurationManager) -> type | None:
    """The network class that nnU-Net finds. None if it finds none."""
    name = configuration.network_arch_class_name
    found = locate(name)
    if found is None:
        # The class may have moved, as that of old plans with a residual encoder has. nnU-Net searches as follows.
        folder = f"{dynamic_network_architectures.__path__[0]}/architectures"
        module = "dynamic_network_architectures.architectures"
        found = recursive_find_python_class(folder, name.rpartition(".")[2], module)
    return found if isinstance(found, type) else None
