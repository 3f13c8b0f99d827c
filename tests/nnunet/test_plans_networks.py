"""XAttnRes in networks that nnU-Net itself has planned."""

from copy import deepcopy

import pytest
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from helpers.phantom_dataset import plans_file, read_plans
from nnunet_xattnres import BlockXAttnResConfig, XAttnResConfig, build_network_from_plans
from nnunet_xattnres.common.errors import XAttnResError
from nnunet_xattnres.model.planned_unet import PlannedUNet
from nnunet_xattnres.nnunet.presets import build_preset

CONFIGS = {
    "skips": XAttnResConfig(),
    "no-skips": XAttnResConfig(skip_connections=False),
    "residual": XAttnResConfig(fusion="residual"),
    "block": BlockXAttnResConfig(),
    "block-encoder": BlockXAttnResConfig(isar_in_encoder=True),
    "block-input": BlockXAttnResConfig(isar_in_encoder=True, bank_includes_input=True),
}
# The others have the parts of these, or fewer.
DIFFERENT_SHAPES = ("skips", "no-skips", "block-input")


@pytest.mark.parametrize("config", DIFFERENT_SHAPES)
@pytest.mark.parametrize("identifier", ["nnUNetPlans", "nnUNetResEncUNetMPlans"])
@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_every_plan_becomes_a_network(nnunet, identifier, configuration, config):
    manager = PlansManager(str(plans_file(nnunet, identifier))).get_configuration(configuration)
    with torch.device("meta"):  # shapes without arithmetic
        network = build_network_from_plans(manager, 2, 3, CONFIGS[config])
        outputs = network(torch.empty(1, 2, *manager.patch_size))
    assert isinstance(network, PlannedUNet)
    assert outputs[0].shape == (1, 3, *manager.patch_size)
    assert len(outputs) == len(manager.pool_op_kernel_sizes) - 1


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_planned_network_runs(nnunet, config):
    manager = PlansManager(str(plans_file(nnunet))).get_configuration("2d")
    network = build_network_from_plans(manager, 2, 3, config)
    with torch.no_grad():
        outputs = network(torch.randn(1, 2, *manager.patch_size))
    assert all(output.isfinite().all() for output in outputs)


@pytest.mark.parametrize("config", DIFFERENT_SHAPES)
def test_2d_plans_with_many_stages(config):
    plans, _ = build_preset("msd03", "2d")
    manager = PlansManager(plans).get_configuration("2d")
    assert len(manager.pool_op_kernel_sizes) >= 7
    with torch.device("meta"):
        network = build_network_from_plans(manager, 1, 2, CONFIGS[config], deep_supervision=False)
        assert network(torch.empty(2, 1, 512, 512)).shape == (2, 2, 512, 512)


@pytest.mark.parametrize("identifier", ["nnUNetPlans", "nnUNetResEncUNetMPlans"])
@pytest.mark.parametrize("config, first", [("block", None), ("block-encoder", 3), ("block-input", 2)])
def test_isar_acts_where_the_readme_says(nnunet, identifier, config, first):
    manager = PlansManager(str(plans_file(nnunet, identifier))).get_configuration("3d_fullres")
    with torch.device("meta"):
        network = build_network_from_plans(manager, 1, 3, CONFIGS[config])
    architecture = manager.network_arch_init_kwargs
    stages = len(architecture["strides"])
    if identifier == "nnUNetPlans":
        blocks = {f"{side}{i}": 2 for side, count in (("E", stages), ("D", stages - 1)) for i in range(count)}
    else:
        blocks = {f"E{i}": count for i, count in enumerate([1, 3, 4, *[6] * (stages - 3)])}
    expected = {f"{stage}_block{b}" for stage, count in blocks.items() for b in range(first or 9, count + 1)}
    assert {name for name in network.routing_sources if "block" in name} == expected


def test_where_nothing_changes_the_planned_network_is_returned(nnunet):
    manager = PlansManager(str(plans_file(nnunet))).get_configuration("2d")
    network = build_network_from_plans(manager, 1, 3, XAttnResConfig(read_in_encoder=False, read_in_decoder=False))
    assert type(network).__name__ == "PlainConvUNet"


def test_plans_of_another_architecture_are_an_error(nnunet):
    plans = deepcopy(read_plans(nnunet))
    plans["configurations"]["primus"] = {
        "inherits_from": "3d_fullres",
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.primus.Primus",
            "arch_kwargs": {
                "embed_dim": 48,
                "patch_embed_size": [8, 8, 8],
                "eva_depth": 1,
                "eva_numheads": 4,
                "input_shape": [16, 16, 16],
            },
            "_kw_requires_import": [],
        },
    }
    manager = PlansManager(plans).get_configuration("primus")
    with pytest.raises(XAttnResError, match="cannot read in a Primus"):
        build_network_from_plans(manager, 1, 3)
