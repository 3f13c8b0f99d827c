"""Configurations that are derived from one in nnU-Net's plans: smaller, to be trained on a CPU, or wider."""

from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_xattnres.common.errors import XAttnResError

# nnU-Net's planner stops downsampling an axis before a feature map gets smaller than this.
MINIMUM_BOTTLENECK = 4
PER_ENCODER_STAGE = ("features_per_stage", "kernel_sizes", "strides", "n_conv_per_stage", "n_blocks_per_stage")
PER_DECODER_STAGE = ("n_conv_per_stage_decoder",)


@dataclass(frozen=True)
class TrainingBudget:
    """The length of a training: the optional key `training` of a configuration. Only this plugin's trainers read it."""

    num_epochs: int
    num_iterations_per_epoch: int
    num_val_iterations_per_epoch: int


def add_small_configuration(
    plans: dict[str, Any],
    name: str,
    base: str,
    *,
    base_features: int | None = None,
    max_patch_voxels: int | None = None,
    batch_size: int | None = None,
    budget: TrainingBudget | None = None,
) -> None:
    """Add the configuration `name` to `plans`, in place: `base` with a smaller network and a shorter training.

    It uses the preprocessed data of `base`. An argument that is None changes nothing.

    base_features: channels of the first stage. They double from stage to stage, up to the planned number.
    max_patch_voxels: see `reduced_patch_size`.
    batch_size: patches per training step.

    Raises `XAttnResError` if `base` is not in the plans or its architecture is not a U-Net.
    """
    planned = _resolved_configuration(plans, base)
    added: dict[str, Any] = {"inherits_from": base}
    architecture = deepcopy(planned["architecture"])
    if max_patch_voxels is not None:
        added["patch_size"], n_stages = _reduced_patch_size_and_stages(planned, max_patch_voxels)
        _truncate_stages(architecture["arch_kwargs"], n_stages)
    if base_features is not None:
        architecture["arch_kwargs"]["features_per_stage"] = [
            min(planned_features, base_features * 2**stage)
            for stage, planned_features in enumerate(architecture["arch_kwargs"]["features_per_stage"])
        ]
    if batch_size is not None:
        added["batch_size"] = batch_size
    # nnU-Net inherits by a shallow dict.update, so the whole architecture must be given.
    added["architecture"] = architecture
    if budget is not None:
        added["training"] = asdict(budget)
    plans["configurations"][name] = added


def add_wide_configuration(plans: dict[str, Any], name: str, base: str, width: float) -> None:
    """Add the configuration `name` to `plans`, in place: `base` with `width` times the channels in every stage.

    Raises `XAttnResError` if `base` is not in the plans or its architecture is not a U-Net.
    """
    architecture = deepcopy(_resolved_configuration(plans, base)["architecture"])
    features = architecture["arch_kwargs"]["features_per_stage"]
    architecture["arch_kwargs"]["features_per_stage"] = [max(1, round(width * channels)) for channels in features]
    plans["configurations"][name] = {"inherits_from": base, "architecture": architecture}


def reduced_patch_size(plans: dict[str, Any], base: str, max_voxels: int) -> list[int]:
    """The patch size of configuration `base`, scaled down to at most `max_voxels` voxels.

    All axes are scaled by the same factor and stay multiples of the network's strides. If the bottleneck would get
    smaller than 4 voxels along an axis, the network loses its deepest stages. A patch that is small enough stays as it
    is.
    """
    return _reduced_patch_size_and_stages(_resolved_configuration(plans, base), max_voxels)[0]


def _resolved_configuration(plans: dict[str, Any], name: str) -> dict[str, Any]:
    if name not in plans["configurations"]:
        available = ", ".join(plans["configurations"])
        raise XAttnResError(f"the plans have no configuration {name}: choose one of {available}")
    configuration = PlansManager(plans).get_configuration(name).configuration
    if "features_per_stage" not in configuration["architecture"]["arch_kwargs"]:
        network = configuration["architecture"]["network_class_name"]
        raise XAttnResError(
            f"configuration {name} plans {network}, which is not a U-Net: "
            "plan with ExperimentPlanner or nnUNetPlannerResEnc(M/L/XL)"
        )
    return configuration


def _reduced_patch_size_and_stages(planned: dict[str, Any], max_voxels: int) -> tuple[list[int], int]:
    patch_size = np.array(planned["patch_size"])
    strides_per_depth = np.cumprod(planned["architecture"]["arch_kwargs"]["strides"], axis=0)
    if np.prod(patch_size) <= max_voxels:
        return patch_size.tolist(), len(strides_per_depth)
    scaled = patch_size * (max_voxels / np.prod(patch_size)) ** (1 / len(patch_size))
    scaled = np.maximum(scaled, np.minimum(patch_size, MINIMUM_BOTTLENECK)).astype(int)
    smallest_bottleneck = np.minimum(patch_size // strides_per_depth[-1], MINIMUM_BOTTLENECK)
    deep_enough = [
        depth
        for depth, strides in enumerate(strides_per_depth, start=1)
        if np.all(scaled // strides >= smallest_bottleneck)
    ]
    # nnU-Net's deep supervision ignores the coarsest output, so that two decoder stages are needed.
    n_stages = max([min(3, len(strides_per_depth)), *deep_enough])
    strides = strides_per_depth[n_stages - 1]
    return (np.maximum(scaled // strides, 1) * strides).tolist(), n_stages


def _truncate_stages(arch_kwargs: dict[str, Any], n_stages: int) -> None:
    arch_kwargs["n_stages"] = n_stages
    for keys, length in ((PER_ENCODER_STAGE, n_stages), (PER_DECODER_STAGE, n_stages - 1)):
        for key in keys:
            if isinstance(arch_kwargs.get(key), (list, tuple)):
                arch_kwargs[key] = list(arch_kwargs[key])[:length]
