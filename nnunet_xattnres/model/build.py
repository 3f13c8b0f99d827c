"""Networks with XAttnRes, built from nnU-Net's plans."""

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from torch import nn

from nnunet_xattnres.common.errors import XAttnResError
from nnunet_xattnres.model.block_level import BlockXAttnResUNet
from nnunet_xattnres.model.config import BlockXAttnResConfig, Config, XAttnResConfig
from nnunet_xattnres.model.plan_classes import carried_config, check_architecture
from nnunet_xattnres.model.planned_unet import PlannedUNet
from nnunet_xattnres.model.stage_level import XAttnResUNet

CARRY_ALREADY = (
    "the plans carry XAttnRes already, as a {}: train them with nnUNetTrainerPlanned or with any trainer of nnU-Net's "
    "own, or choose the plans that they were made from"
)


def build_network_from_plans(
    configuration: ConfigurationManager,
    num_input_channels: int,
    num_output_channels: int,
    config: Config | None = None,
    deep_supervision: bool = True,
) -> nn.Module:
    """Build the network of a planned configuration, with XAttnRes.

    configuration: `PlansManager("nnUNetPlans.json").get_configuration("3d_fullres")`, from nnU-Net.
    config: by default that of the plans or, if they carry none, `XAttnResConfig()`. A config that changes nothing gives
        the network of the plans.

    Raises `XAttnResError` if the planned architecture is not an encoder/decoder U-Net, and for a config on plans that
    carry XAttnRes already.
    """
    check_architecture(configuration)
    if config is None:
        carries = carried_config(configuration) is not None
        config = XAttnResConfig.of_planned_network() if carries else XAttnResConfig()
    planned = get_network_from_plans(
        configuration.network_arch_class_name,
        configuration.network_arch_init_kwargs,
        configuration.network_arch_init_kwargs_req_import,
        num_input_channels,
        num_output_channels,
        deep_supervision=deep_supervision,
    )
    return add_xattnres(planned, config)


def check_can_be_built(configuration: ConfigurationManager) -> None:
    """Build the network without memory for its weights. Raises what building it raises.

    The numbers of channels and labels, which plans do not hold, make no difference.
    """
    with torch.device("meta"):
        build_network_from_plans(configuration, 1, 2)


def check_plans(configuration: ConfigurationManager, config: Config) -> None:
    """Raise `XAttnResError` if XAttnRes cannot be added to what the plans describe. Nothing is built."""
    check_architecture(configuration)
    if carried_config(configuration) is not None and not config.is_planned_network:
        raise XAttnResError(CARRY_ALREADY.format(configuration.network_arch_class_name.rpartition(".")[2]))


def add_xattnres(planned: PlainConvUNet | ResidualEncoderUNet | PlannedUNet, config: Config) -> nn.Module:
    """Add XAttnRes to a planned network. If `config` changes nothing, the network itself is returned.

    Raises `XAttnResError` if the network has XAttnRes already, from its plans.
    """
    if config.is_planned_network:
        return planned
    if isinstance(planned, PlannedUNet):
        raise XAttnResError(CARRY_ALREADY.format(type(planned).__name__))
    return (
        BlockXAttnResUNet(planned, config) if isinstance(config, BlockXAttnResConfig) else XAttnResUNet(planned, config)
    )
