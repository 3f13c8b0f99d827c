"""What the networks keep for the backward pass, beside the planned network: upper bounds, to be lowered and not raised.

What one more image of the batch adds is compared. Other than the whole, it does not depend on the size of the patch:
copies of parameters in lower precision are left out.
"""

from contextlib import contextmanager, nullcontext
from functools import cache

import pytest
import torch
from packaging.version import Version

from helpers.memory import peak_and_live_bytes
from helpers.networks import planned_network
from nnunet_xattnres.model.build import build_network_from_plans
from nnunet_xattnres.model.config import XAttnResConfig
from nnunet_xattnres.model.stage_level import XAttnResUNet
from nnunet_xattnres.nnunet.planned_network import from_preset
from nnunet_xattnres.nnunet.presets import DEFAULT_PLANS
from nnunet_xattnres.ops import native_library
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

# The planned network keeps nothing of a frozen encoder. Projections, which are trained, need its outputs.
BOUNDS_WITH_FROZEN_ENCODER = {
    ("msd04", "3d_fullres"): {"XAttnRes": 1.24, "XAttnResNoSkip": 1.074},
    ("msd05", "2d"): {"XAttnRes": 1.371, "XAttnResNoSkip": 1.205},
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


def kept_per_image(preset, configuration, config, dtype="float32", deep_supervision=True):
    net, channels = network(preset, configuration, config)
    net.decoder.deep_supervision = deep_supervision
    _, patch_size = NETWORKS[preset, configuration]
    with autocast(dtype):
        one, two = (kept_for_backward(net, torch.zeros(batch_size, channels, *patch_size)) for batch_size in (1, 2))
    return two - one


def autocast(dtype):
    return torch.autocast("cpu", torch.bfloat16) if dtype == "bfloat16" else nullcontext()


@contextmanager
def frozen_encoder(net):
    net.encoder.requires_grad_(False)
    try:
        yield
    finally:
        net.encoder.requires_grad_(True)


@pytest.mark.parametrize("deep_supervision", [True, False], ids=["deep supervision", "one head"])
@pytest.mark.parametrize("preset, configuration, dtype", BOUNDS)
def test_bounds(preset, configuration, dtype, deep_supervision):
    planned = XAttnResConfig.of_planned_network()
    reference = kept_per_image(preset, configuration, planned, dtype, deep_supervision)
    for name, bound in BOUNDS[preset, configuration, dtype].items():
        kept = kept_per_image(preset, configuration, CONFIGS[name], dtype, deep_supervision) / reference
        assert kept <= bound, f"{name} keeps {kept:.4f} of what the planned network keeps"


@pytest.mark.parametrize(
    "preset, configuration, dtype, name",
    [
        ("msd04", "3d_fullres", "float32", "XAttnRes"),
        ("msd04", "3d_fullres", "bfloat16", "XAttnResFinetune"),
        ("msd05", "2d", "float32", "XAttnResNoSkip"),
    ],
)
def test_nothing_else_lives_on_after_the_forward_pass(preset, configuration, dtype, name):
    net, channels = network(preset, configuration, CONFIGS[name])
    net.decoder.deep_supervision = True
    images = torch.zeros(1, channels, *NETWORKS[preset, configuration][1])

    def compute():
        with autocast(dtype):
            return net(images)

    with autocast(dtype):
        kept = kept_for_backward(net, images)
    _, live = peak_and_live_bytes(compute)
    assert live <= kept


def test_recording_of_weights_keeps_nothing_more():
    of_network = ("msd04", "3d_fullres", CONFIGS["XAttnRes"])
    kept = kept_per_image(*of_network)
    with network(*of_network)[0].routing(receive=lambda target, weights: None):
        assert kept_per_image(*of_network) == kept


@pytest.mark.parametrize("preset, configuration", NETWORKS)
def test_bounds_with_a_frozen_encoder(preset, configuration):
    def kept(config):
        with frozen_encoder(network(preset, configuration, config)[0]):
            return kept_per_image(preset, configuration, config)

    reference = kept(XAttnResConfig.of_planned_network())
    for name, bound in BOUNDS_WITH_FROZEN_ENCODER[preset, configuration].items():
        ratio = kept(CONFIGS[name]) / reference
        assert ratio <= bound, f"{name} keeps {ratio:.4f} of what the planned network keeps"


@pytest.mark.skipif(Version(torch.__version__) < Version("2.14"), reason="older compilers have not been tried")
@pytest.mark.skipif(not native_library.is_available(), reason="no compiled library")
def test_a_compiled_network_keeps_no_more():
    """What the partitioner of the compiler passes from the forward to the backward graph."""
    torch._dynamo.reset()
    net = XAttnResUNet(planned_network(), XAttnResConfig(backend="native"))
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager_decomp_partition")
    images = torch.zeros(1, 1, 16, 16, 16)
    assert kept_for_backward(compiled, images) <= kept_for_backward(net, images)
