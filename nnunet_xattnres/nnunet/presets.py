"""nnU-Net's plans for the tasks of the Medical Segmentation Decathlon, without the data.

Spacing, patch and batch size are those of nnU-Net's published plans: Isensee et al., Nature Methods 18 (2021),
supplement, and its pretrained models. The 3D patch sizes and spacings are also in NVIDIA DeepLearningExamples,
nnUNet/data_preprocessing/configs.py. The patch sizes of the ResEnc plans are those that nnU-Net 2.8's planners
nnUNetPlannerResEncM and L compute for the published median shapes, 482 x 512 x 512 for msd03 and 96 x 512 x 512 for
msd07. The number of stages, strides, kernel sizes and channels follow by nnU-Net's own rules.
"""

from dataclasses import dataclass
from typing import Any

from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from dynamic_network_architectures.building_blocks.helper import convert_dim_to_conv_op, get_matching_instancenorm
from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props

from nnunet_xattnres.common.errors import XAttnResError, suggestion

DEFAULT_PLANS = "nnUNetPlans"


@dataclass(frozen=True)
class Patches:
    """size: of a patch in voxels. batch_size: patches per training step."""

    size: tuple[int, ...]
    batch_size: int


@dataclass(frozen=True)
class Task:
    """One task of the Decathlon in nnU-Net's default plans.

    classes: their number, with the background.
    spacing: of the resampled images in mm. The axis with the lowest resolution is the first.
    """

    name: str
    channels: int
    classes: int
    spacing: tuple[float, float, float]
    patches_3d: Patches
    patches_2d: Patches


TASKS = {
    "msd01": Task("BrainTumour", 4, 4, (1, 1, 1), Patches((128, 128, 128), 2), Patches((192, 160), 107)),
    "msd02": Task("Heart", 1, 2, (1.37, 1.25, 1.25), Patches((80, 192, 160), 2), Patches((320, 256), 40)),
    "msd03": Task("Liver", 1, 3, (1, 0.7676, 0.7676), Patches((128, 128, 128), 2), Patches((512, 512), 12)),
    "msd04": Task("Hippocampus", 1, 3, (1, 1, 1), Patches((40, 56, 40), 9), Patches((56, 40), 366)),
    "msd05": Task("Prostate", 2, 3, (3.6, 0.62, 0.62), Patches((20, 320, 256), 2), Patches((320, 320), 32)),
    "msd06": Task("Lung", 1, 2, (1.24, 0.79, 0.79), Patches((80, 192, 160), 2), Patches((512, 512), 12)),
    "msd07": Task("Pancreas", 1, 3, (2.5, 0.8, 0.8), Patches((40, 224, 224), 2), Patches((512, 512), 12)),
    "msd08": Task("HepaticVessel", 1, 3, (1.5, 0.8, 0.8), Patches((64, 192, 192), 2), Patches((512, 512), 12)),
    "msd09": Task("Spleen", 1, 2, (1.6, 0.79, 0.79), Patches((64, 192, 160), 2), Patches((512, 512), 12)),
    "msd10": Task("Colon", 1, 2, (3, 0.78, 0.78), Patches((56, 192, 160), 2), Patches((512, 512), 12)),
}
# 3d_fullres of other plans.
RESENC_PATCHES = {
    ("msd03", "nnUNetResEncUNetMPlans"): Patches((128, 128, 128), 2),
    ("msd03", "nnUNetResEncUNetLPlans"): Patches((192, 192, 192), 2),
    ("msd07", "nnUNetResEncUNetMPlans"): Patches((40, 224, 192), 2),
    ("msd07", "nnUNetResEncUNetLPlans"): Patches((56, 320, 256), 2),
}

# Attributes of nnU-Net 2.8's planners. Their constructors, which set them, need a raw dataset.
MINIMUM_FEATURE_MAP = 4
BASE_FEATURES = 32
MAX_FEATURES = {2: 512, 3: 320}  # by the number of dimensions
CONVOLUTIONS_PER_STAGE = 2
RESENC_BLOCKS_PER_STAGE = (1, 3, 4, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6)
RESENC_CONVOLUTIONS_PER_DECODER_STAGE = 1


def build_preset(
    preset: str, configuration: str = "3d_fullres", plans_name: str = DEFAULT_PLANS
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Plans and dataset.json of a Decathlon task, with all that building and training a network needs.

    Raises `XAttnResError` if there is no such preset, configuration or plans.
    """
    if preset not in TASKS:
        near = suggestion(preset, TASKS) or f"choose from {', '.join(TASKS)}"
        raise XAttnResError(f"there is no preset {preset}: {near}")
    task = TASKS[preset]
    patches = _patches(preset, configuration, plans_name)
    spacing = task.spacing[-len(patches.size) :]
    dataset = f"Dataset{int(preset.removeprefix('msd')):03d}_{task.name}"
    plans = {
        "dataset_name": dataset,
        "plans_name": plans_name,
        "label_manager": "LabelManager",
        "configurations": {
            configuration: {
                "data_identifier": f"{DEFAULT_PLANS}_{configuration}",
                "batch_size": patches.batch_size,
                "patch_size": list(patches.size),
                "spacing": list(spacing),
                "batch_dice": len(spacing) == 2,
                "architecture": _architecture(spacing, patches.size, residual=plans_name != DEFAULT_PLANS),
            }
        },
    }
    dataset_json = {
        "channel_names": {str(channel): f"channel {channel}" for channel in range(task.channels)},
        "labels": {"background": 0} | {f"class {label}": label for label in range(1, task.classes)},
        "file_ending": ".nii.gz",
    }
    return plans, dataset_json


def _patches(preset: str, configuration: str, plans_name: str) -> Patches:
    task = TASKS[preset]
    available = {(DEFAULT_PLANS, "3d_fullres"): task.patches_3d, (DEFAULT_PLANS, "2d"): task.patches_2d}
    for (of_preset, name), patches in RESENC_PATCHES.items():
        if of_preset == preset:
            available[name, "3d_fullres"] = patches
    if (plans_name, configuration) not in available:
        choices = ", ".join(f"-p {name} -c {configuration}" for name, configuration in available)
        elsewhere = ", ".join(other for other, name in RESENC_PATCHES if name == plans_name)
        hint = f" ({plans_name} are there for {elsewhere})" if elsewhere else ""
        raise XAttnResError(f"{preset} has no configuration {configuration} of {plans_name}: choose {choices}{hint}")
    return available[plans_name, configuration]


def _architecture(spacing: tuple[float, ...], patch_size: tuple[int, ...], residual: bool) -> dict[str, Any]:
    """What nnU-Net's planner writes for this spacing and patch size."""
    dimensions = len(patch_size)
    _, strides, kernel_sizes, _, _ = get_pool_and_conv_props(spacing, patch_size, MINIMUM_FEATURE_MAP, 999999)
    n_stages = len(strides)
    conv_op = convert_dim_to_conv_op(dimensions)
    norm_op = get_matching_instancenorm(conv_op)
    network: type = ResidualEncoderUNet if residual else PlainConvUNet
    if residual:
        blocks = {
            "n_blocks_per_stage": list(RESENC_BLOCKS_PER_STAGE[:n_stages]),
            "n_conv_per_stage_decoder": [RESENC_CONVOLUTIONS_PER_DECODER_STAGE] * (n_stages - 1),
        }
    else:
        blocks = {
            "n_conv_per_stage": [CONVOLUTIONS_PER_STAGE] * n_stages,
            "n_conv_per_stage_decoder": [CONVOLUTIONS_PER_STAGE] * (n_stages - 1),
        }
    return {
        "network_class_name": f"{network.__module__}.{network.__name__}",
        "arch_kwargs": {
            "n_stages": n_stages,
            "features_per_stage": [min(MAX_FEATURES[dimensions], BASE_FEATURES * 2**i) for i in range(n_stages)],
            "conv_op": f"{conv_op.__module__}.{conv_op.__name__}",
            "kernel_sizes": [list(sizes) for sizes in kernel_sizes],
            "strides": [list(factors) for factors in strides],
            **blocks,
            "conv_bias": True,
            "norm_op": f"{norm_op.__module__}.{norm_op.__name__}",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }
