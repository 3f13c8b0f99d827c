"""Plans of the Decathlon's tasks: the published sizes, and networks that nnU-Net builds from them."""

import numpy as np
import pytest
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_xattnres.common.errors import XAttnResError
from nnunet_xattnres.model.build import build_network_from_plans
from nnunet_xattnres.model.config import XAttnResConfig
from nnunet_xattnres.nnunet.planned_network import from_preset, with_batch_size
from nnunet_xattnres.nnunet.presets import DEFAULT_PLANS, RESENC_PATCHES, TASKS, build_preset

PUBLISHED = {
    ("msd01", "3d_fullres"): ((128, 128, 128), 2),
    ("msd02", "3d_fullres"): ((80, 192, 160), 2),
    ("msd03", "3d_fullres"): ((128, 128, 128), 2),
    ("msd04", "3d_fullres"): ((40, 56, 40), 9),
    ("msd05", "3d_fullres"): ((20, 320, 256), 2),
    ("msd06", "3d_fullres"): ((80, 192, 160), 2),
    ("msd07", "3d_fullres"): ((40, 224, 224), 2),
    ("msd08", "3d_fullres"): ((64, 192, 192), 2),
    ("msd09", "3d_fullres"): ((64, 192, 160), 2),
    ("msd10", "3d_fullres"): ((56, 192, 160), 2),
    ("msd01", "2d"): ((192, 160), 107),
    ("msd02", "2d"): ((320, 256), 40),
    ("msd03", "2d"): ((512, 512), 12),
    ("msd04", "2d"): ((56, 40), 366),
    ("msd05", "2d"): ((320, 320), 32),
    ("msd06", "2d"): ((512, 512), 12),
    ("msd07", "2d"): ((512, 512), 12),
    ("msd08", "2d"): ((512, 512), 12),
    ("msd09", "2d"): ((512, 512), 12),
    ("msd10", "2d"): ((512, 512), 12),
}
ALL = [(*which, DEFAULT_PLANS) for which in PUBLISHED]
ALL += [(preset, "3d_fullres", plans_name) for preset, plans_name in RESENC_PATCHES]
# Every number of dimensions, channels and classes, iso- and anisotropic strides, both kinds of encoders.
COVERING = [
    ("msd01", "3d_fullres", DEFAULT_PLANS),
    ("msd05", "3d_fullres", DEFAULT_PLANS),
    ("msd04", "2d", DEFAULT_PLANS),
    ("msd07", "3d_fullres", "nnUNetResEncUNetMPlans"),
]


def test_every_task_has_both_configurations():
    assert {preset for preset, _ in PUBLISHED} == set(TASKS)


@pytest.mark.parametrize("preset, configuration, plans_name", ALL)
def test_sizes_are_the_published_ones_and_divide_by_the_strides(preset, configuration, plans_name):
    plans, dataset_json = build_preset(preset, configuration, plans_name)
    manager = PlansManager(plans).get_configuration(configuration)
    if plans_name == DEFAULT_PLANS:
        assert (tuple(manager.patch_size), manager.batch_size) == PUBLISHED[preset, configuration]
    bottleneck = np.array(manager.patch_size) / np.prod(manager.pool_op_kernel_sizes, axis=0)
    assert np.all(bottleneck == bottleneck.astype(int))
    assert np.all(bottleneck >= 4)
    assert np.all(bottleneck < 12)
    classes = PlansManager(plans).get_label_manager(dataset_json).num_segmentation_heads
    assert classes == TASKS[preset].classes
    assert len(dataset_json["channel_names"]) == TASKS[preset].channels
    assert ("ResidualEncoder" in manager.network_arch_class_name) == (plans_name != DEFAULT_PLANS)


@pytest.mark.parametrize(
    "preset, configuration, plans_name",
    [which if which in COVERING else pytest.param(*which, marks=pytest.mark.slow) for which in ALL],
)
def test_presets_are_plans_that_nnunet_builds(preset, configuration, plans_name):
    plans, dataset_json = build_preset(preset, configuration, plans_name)
    manager = PlansManager(plans).get_configuration(configuration)
    classes, channels = TASKS[preset].classes, len(dataset_json["channel_names"])
    with torch.device("meta"):
        network = build_network_from_plans(manager, channels, classes, XAttnResConfig())
        full_resolution = network(torch.empty(1, channels, *manager.patch_size))[0]
    assert full_resolution.shape == (1, classes, *manager.patch_size)


def test_the_default_3d_network_has_its_known_size():
    plans, _ = build_preset("msd03")
    planned = XAttnResConfig(read_in_encoder=False, read_in_decoder=False)
    with torch.device("meta"):
        network = build_network_from_plans(PlansManager(plans).get_configuration("3d_fullres"), 1, 3, planned)
    # nnU-Net's 3D U-Net of six stages: 31.2 million.
    assert sum(parameter.numel() for parameter in network.parameters()) == 31_196_399


def test_unknown_preset_is_an_error_for_python_too():
    with pytest.raises(XAttnResError, match="there is no preset"):
        build_preset("msd00")


def test_another_batch_size_leaves_the_planned_network_as_it_is():
    planned = from_preset("msd04", "3d_fullres", DEFAULT_PLANS)
    changed = with_batch_size(planned, 5)
    assert (changed.manager.batch_size, planned.manager.batch_size) == (5, 9)
