"""Small configurations in nnU-Net's plans: their patches, stages and channels."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from helpers.plans import ISOTROPIC, planned
from nnunet_xattnres.common.errors import XAttnResError
from nnunet_xattnres.nnunet.derived_configurations import TrainingBudget, add_small_configuration, reduced_patch_size

BUDGET = TrainingBudget(num_epochs=3, num_iterations_per_epoch=5, num_val_iterations_per_epoch=2)
ANISOTROPIC = [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2], [1, 2, 2]]
FLAT = [[1, 1]] + 6 * [[2, 2]]


def add_small(plans, base_features=4, max_patch_voxels=32**3):
    add_small_configuration(
        plans,
        "small",
        "full",
        base_features=base_features,
        max_patch_voxels=max_patch_voxels,
        batch_size=2,
        budget=BUDGET,
    )
    return PlansManager(plans).get_configuration("small")


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize(
    ("strides", "patch_size", "max_patch_voxels"),
    [
        (ISOTROPIC, [128, 128, 128], 40**3),
        (ANISOTROPIC, [20, 160, 112], 40_000),
        (FLAT, [512, 448], 64**2),
        (ISOTROPIC[:4], [40, 56, 40], 100_000),
    ],
    ids=["isotropic", "anisotropic", "2d", "unreduced"],
)
def test_small_network_is_built_and_fits_its_patch(strides, patch_size, max_patch_voxels, residual):
    plans = planned(strides, patch_size, residual)
    small = add_small(plans, max_patch_voxels=max_patch_voxels)
    network = get_network_from_plans(
        small.network_arch_class_name,
        small.network_arch_init_kwargs,
        small.network_arch_init_kwargs_req_import,
        input_channels=1,
        output_channels=3,
        deep_supervision=False,
    )
    with torch.no_grad():
        output = network(torch.zeros(1, 1, *small.patch_size))
    assert list(output.shape) == [1, 3, *small.patch_size]


@pytest.mark.parametrize(
    ("strides", "patch_size"),
    [(ISOTROPIC, [128, 128, 128]), (ISOTROPIC, [128, 224, 160]), (ANISOTROPIC, [20, 320, 256]), (FLAT, [512, 448])],
)
@pytest.mark.parametrize("reduction", [1.5, 4, 20])
def test_reduced_patch_divides_by_the_strides_and_keeps_a_bottleneck(strides, patch_size, reduction):
    plans = planned(strides, patch_size)
    max_voxels = int(np.prod(patch_size) / reduction)
    small = add_small(plans, max_patch_voxels=max_voxels)
    total_strides = np.prod(small.pool_op_kernel_sizes, axis=0)
    bottleneck = np.array(small.patch_size) / total_strides
    assert np.prod(small.patch_size) <= max_voxels
    assert np.all(bottleneck == bottleneck.astype(int))
    assert len(small.pool_op_kernel_sizes) >= 3
    assert np.all(bottleneck >= 4) or len(small.pool_op_kernel_sizes) == 3
    assert small.patch_size == reduced_patch_size(plans, "full", max_voxels)


def test_a_patch_that_is_small_enough_stays_with_all_stages():
    small = add_small(planned(ISOTROPIC[:4], [40, 56, 40]), max_patch_voxels=40 * 56 * 40)
    assert small.patch_size == [40, 56, 40]
    assert small.network_arch_init_kwargs["n_stages"] == 4


def test_features_double_but_never_exceed_the_planned_ones():
    plans = planned(ISOTROPIC, [128, 128, 128])
    small = add_small(plans, base_features=16, max_patch_voxels=128**3)
    assert small.network_arch_init_kwargs["features_per_stage"] == [16, 32, 64, 128, 256, 320]
    wide = add_small(plans, base_features=64, max_patch_voxels=128**3)
    assert wide.network_arch_init_kwargs["features_per_stage"] == [32, 64, 128, 256, 320, 320]


def test_base_configuration_is_untouched_and_the_data_is_shared():
    plans = planned(ISOTROPIC, [128, 128, 128])
    before = deepcopy(plans["configurations"]["full"])
    small = add_small(plans)
    plans["configurations"]["small"]["architecture"]["arch_kwargs"]["strides"][0][0] = 99
    assert plans["configurations"]["full"] == before
    assert small.data_identifier == "nnUNetPlans_full"
    assert small.batch_size == 2
    assert small.configuration["training"] == {
        "num_epochs": 3,
        "num_iterations_per_epoch": 5,
        "num_val_iterations_per_epoch": 2,
    }


def test_a_configuration_that_inherits_can_be_the_base():
    plans = planned(ISOTROPIC[:4], [40, 56, 40])
    plans["configurations"]["batch4"] = {"inherits_from": "full", "batch_size": 4}
    add_small_configuration(
        plans, "small", "batch4", base_features=8, max_patch_voxels=10**6, batch_size=3, budget=BUDGET
    )
    small = PlansManager(plans).get_configuration("small")
    assert small.network_arch_init_kwargs["features_per_stage"] == [8, 16, 32, 64]
    assert small.data_identifier == "nnUNetPlans_full"


def test_unknown_base_configuration_names_the_known_ones():
    with pytest.raises(XAttnResError, match=r"3d_fullres.*full"):
        reduced_patch_size(planned(ISOTROPIC, [128, 128, 128]), "3d_fullres", 1000)


def test_architecture_without_stages_is_refused():
    plans = planned(ISOTROPIC, [128, 128, 128])
    architecture = plans["configurations"]["full"]["architecture"]
    architecture["network_class_name"] = "dynamic_network_architectures.architectures.primus.PrimusM"
    architecture["arch_kwargs"] = {"patch_embed_size": [8, 8, 8]}
    with pytest.raises(XAttnResError, match=r"Primus.*not a U-Net"):
        add_small(plans)
