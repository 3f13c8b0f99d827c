"""What the networks keep for the backward pass, beside the planned network: upper bounds, to be lowered and not raised.

What one more image of the batch adds is compared. Other than the whole, it does not depend on the size of the patch:
copies of parameters in lower precision are left out.
"""

from contextlib import nullcontext
from functools import cache

import pytest
import torch

from nnunet_xattnres.model.build import build_network_from_plans
from nnunet_xattnres.model.config import XAttnResConfig
from nnunet_xattnres.nnunet.planned_network import from_preset
from nnunet_xattnres.nnunet.presets import DEFAULT_PLANS
from nnunet_xattnres.overhead.measurement import kept_for_backward

CONFIGS = {
    "XAttnRes": XAttnResConfig(),
    "XAttnResNoSkip": XAttnResConfig(skip_connections=False),
    "XAttnResDecoder": XAttnResConfig(read_in_encoder=False),
    "XAttnResFinetune": XAttnResConfig(fusion="residual"),
    "NoSkip": XAttnResConfig(skip_connections=False, read_in_encoder=False, read_in_decoder=False),
}
# Small patches that leave more than one voxel at the bottleneck, for its norm. In 2D, the network has half of its
# channels, the image's included, which halves all that it keeps.
NETWORKS = {("msd04", "3d_fullres"): (1, (16, 16, 16)), ("msd05", "2d"): (2, (128, 64))}
# Beside what the planned network keeps, there are the encoder's mixtures, which are new inputs of convolutions. With
# residual fusion, the mixtures themselves are kept too, for the gradients of the gates.
BOUNDS = {
    ("msd04", "3d_fullres", "float32"): {
        "XAttnRes": 1.0255,
        "XAttnResNoSkip": 0.9265,
        "XAttnResDecoder": 1.002,
        "XAttnResFinetune": 1.148,
        "NoSkip": 0.9015,
    },
    ("msd04", "3d_fullres", "bfloat16"): {
        "XAttnRes": 1.0255,
        "XAttnResNoSkip": 0.9265,
        "XAttnResDecoder": 1.002,
        "XAttnResFinetune": 1.148,
        "NoSkip": 0.902,
    },
    ("msd05", "2d", "float32"): {
        "XAttnRes": 1.0505,
        "XAttnResNoSkip": 0.9515,
        "XAttnResDecoder": 1.002,
        "XAttnResFinetune": 1.198,
        "NoSkip": 0.9015,
    },
    ("msd05", "2d", "bfloat16"): {
        "XAttnRes": 1.0505,
        "XAttnResNoSkip": 0.9515,
        "XAttnResDecoder": 1.002,
        "XAttnResFinetune": 1.198,
        "NoSkip": 0.902,
    },
}


@cache
def network(preset, configuration, config):
    narrower, _ = NETWORKS[preset, configuration]
    planned = from_preset(preset, configuration, DEFAULT_PLANS)
    manager = planned.manager
    architecture = manager.network_arch_init_kwargs
    architecture["features_per_stage"] = [features // narrower for features in architecture["features_per_stage"]]
    channels = planned.num_input_channels // narrower
    with torch.device("meta"):
        empty = build_network_from_plans(manager, channels, planned.num_segmentation_heads, config)
    # What the parameters are does not matter. Drawing them takes longer than the forward pass.
    zeros = {name: torch.zeros_like(value, device="cpu") for name, value in empty.state_dict().items()}
    empty.load_state_dict(zeros, assign=True)
    return empty, channels


def kept_per_image(preset, configuration, config, dtype, deep_supervision):
    net, channels = network(preset, configuration, config)
    net.decoder.deep_supervision = deep_supervision
    _, patch_size = NETWORKS[preset, configuration]
    with torch.autocast("cpu", torch.bfloat16) if dtype == "bfloat16" else nullcontext():
        one, two = (kept_for_backward(net, torch.zeros(batch_size, channels, *patch_size)) for batch_size in (1, 2))
    return two - one


@pytest.mark.parametrize("deep_supervision", [True, False], ids=["deep supervision", "one head"])
@pytest.mark.parametrize("preset, configuration, dtype", BOUNDS)
def test_bounds(preset, configuration, dtype, deep_supervision):
    planned = XAttnResConfig.of_planned_network()
    reference = kept_per_image(preset, configuration, planned, dtype, deep_supervision)
    for name, bound in BOUNDS[preset, configuration, dtype].items():
        kept = kept_per_image(preset, configuration, CONFIGS[name], dtype, deep_supervision) / reference
        assert kept <= bound, f"{name} keeps {kept:.4f} of what the planned network keeps"
