"""Networks with XAttnRes, built from nnU-Net's plans."""

from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from torch import nn

from nnunet_xattnres.model.block_level import BlockXAttnResUNet
from nnunet_xattnres.model.config import BlockXAttnResConfig, Config, XAttnResConfig
from nnunet_xattnres.model.planned_unet import check_architecture
from nnunet_xattnres.model.stage_level import XAttnResUNet


def build_network_from_plans(
    configuration: ConfigurationManager,
    num_input_channels: int,
    num_output_channels: int,
    config: Config | None = None,
    deep_supervision: bool = True,
) -> nn.Module:
    """Build the network of a planned configuration, with XAttnRes.

    configuration: `PlansManager("nnUNetPlans.json").get_configuration("3d_fullres")`, from nnU-Net.
    config: `XAttnResConfig()` by default. A config that changes nothing gives the planned network.

    Raises `XAttnResError` if the planned architecture is not an encoder/decoder U-Net.
    """
    check_architecture(configuration)
    planned = get_network_from_plans(
        configuration.network_arch_class_name,
        configuration.network_arch_init_kwargs,
        configuration.network_arch_init_kwargs_req_import,
        num_input_channels,
        num_output_channels,
        deep_supervision=deep_supervision,
    )
    return add_xattnres(planned, config or XAttnResConfig())


def add_xattnres(planned: PlainConvUNet | ResidualEncoderUNet, config: Config) -> nn.Module:
    """Add XAttnRes to a planned network. If `config` changes nothing, the network itself is returned."""
    if isinstance(config, BlockXAttnResConfig):
        return BlockXAttnResUNet(planned, config)
    return planned if config.is_planned_network else XAttnResUNet(planned, config)
