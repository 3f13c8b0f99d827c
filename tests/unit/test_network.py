"""Stage-level XAttnRes in networks as nnU-Net plans them: against the formulas, and beside the planned network."""

import copy
import re
from dataclasses import replace
from itertools import accumulate, pairwise
from operator import floordiv
from pathlib import Path

import numpy as np
import pytest
import torch
import torchgen
import yaml
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet, ResidualUNet
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helpers import formulas
from helpers.networks import (
    ANISOTROPIC_2D,
    ANISOTROPIC_3D,
    ISOTROPIC_2D,
    ISOTROPIC_3D,
    planned_network,
    projected_elements,
    smallest_image,
)
from nnunet_xattnres import BlockXAttnResConfig, XAttnResConfig, XAttnResUNet
from nnunet_xattnres.common.errors import XAttnResError
from nnunet_xattnres.model import stage_level
from nnunet_xattnres.model.build import add_xattnres
from nnunet_xattnres.model.stage_level import HistoryAttention, HistoryPool
from nnunet_xattnres.ops import alignment, native_library
from nnunet_xattnres.ops.reference import attention_weights

ARRANGEMENTS = {
    "skips": XAttnResConfig(),
    "no-skips": XAttnResConfig(skip_connections=False),
    "decoder": XAttnResConfig(read_in_encoder=False),
    "encoder": XAttnResConfig(read_in_decoder=False),
    "no-skips-no-reading": XAttnResConfig(skip_connections=False, read_in_encoder=False, read_in_decoder=False),
    "residual": XAttnResConfig(fusion="residual"),
    "residual-no-skips": XAttnResConfig(fusion="residual", skip_connections=False),
}
PLANS = {  # strides, network, input channels, classes, bottleneck
    "plain-3d": (ISOTROPIC_3D, PlainConvUNet, 1, 3, (1, 2, 1)),
    "plain-3d-anisotropic": (ANISOTROPIC_3D, PlainConvUNet, 2, 2, (1, 2, 1)),
    "resenc-3d": (ISOTROPIC_3D, ResidualEncoderUNet, 1, 2, (2, 1, 1)),
    "plain-2d": (ISOTROPIC_2D, PlainConvUNet, 1, 4, (1, 2)),
    "resenc-2d-anisotropic": (ANISOTROPIC_2D, ResidualEncoderUNet, 3, 2, (2, 1)),
}
# Every plan, every arrangement, and every plan with and without skip connections.
COVERING = [
    ("plain-3d", "skips"),
    ("plain-3d", "residual-no-skips"),
    ("plain-3d-anisotropic", "residual"),
    ("plain-3d-anisotropic", "no-skips"),
    ("resenc-3d", "encoder"),
    ("resenc-3d", "no-skips"),
    ("plain-2d", "decoder"),
    ("plain-2d", "no-skips-no-reading"),
    ("resenc-2d-anisotropic", "skips"),
    ("resenc-2d-anisotropic", "residual-no-skips"),
]
# strides, config, batch sizes: the last batch of nnU-Net's predictor is smaller. Compiling takes seconds per stage.
COMPILED = {
    "2d-skips": (ISOTROPIC_2D[:3], XAttnResConfig(), [2]),
    "3d-skips": (ISOTROPIC_3D[:2], XAttnResConfig(), [2, 1]),
    "2d-no-skips": (ISOTROPIC_2D[:2], XAttnResConfig(skip_connections=False), [2, 1]),
    "3d-residual": (ISOTROPIC_3D[:2], XAttnResConfig(fusion="residual"), [2]),
    "2d-encoder": (ISOTROPIC_2D[:3], XAttnResConfig(read_in_decoder=False), [2, 1]),
    "2d-block": (ISOTROPIC_2D[:2], BlockXAttnResConfig(bank_includes_input=True), [2]),
}


class Operations(TorchDispatchMode):
    """Notes the names of the operations and the types of what they put out."""

    def __init__(self):
        super().__init__()
        self.names, self.dtypes = set(), set()

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        out = operation(*arguments, **(options or {}))
        self.names.add(operation.name().removeprefix("aten::"))
        self.dtypes |= {tensor.dtype for tensor in tree_leaves(out) if isinstance(tensor, torch.Tensor)}
        return out


@pytest.mark.parametrize(
    "config", [ARRANGEMENTS["skips"], ARRANGEMENTS["residual"], BlockXAttnResConfig(bank_includes_input=True)]
)
def test_an_apple_gpu_can_compute_it(config, monkeypatch):
    """There is none here. PyTorch's own list says which operations MPS has; it has no float64."""
    path = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native" / "native_functions.yaml"
    listed = {entry["func"].partition("(")[0]: entry for entry in yaml.load(path.read_text(), yaml.CSafeLoader)}

    def has_mps(name):
        entry = listed[listed[name].get("structured_delegate", name)]
        return "dispatch" not in entry or any(re.search("MPS|Composite", kernels) for kernels in entry["dispatch"])

    # What is of a CPU alone: the compiled library, and what "auto" chooses.
    monkeypatch.setattr(native_library, "is_available", lambda: False)
    network = add_xattnres(planned_network(ISOTROPIC_3D, ResidualEncoderUNet), replace(config, backend="streaming"))
    with Operations() as operations, network.routing():
        network(torch.randn(2, 1, *smallest_image(ISOTROPIC_3D, (2, 2, 2)))).sum().backward()
    assert "convolution_backward" in operations.names
    assert [name for name in operations.names if not has_mps(name)] == []
    assert torch.float64 not in operations.dtypes


@pytest.fixture(params=PLANS)
def plan(request):
    return request.param


def build(plan: str, deep_supervision: bool = False) -> tuple[nn.Module, torch.Tensor]:
    """A planned network and an image for it"""
    strides, network, input_channels, classes, bottleneck = PLANS[plan]
    planned = planned_network(
        strides, network, input_channels=input_channels, classes=classes, deep_supervision=deep_supervision
    )
    return planned, torch.randn(2, input_channels, *smallest_image(strides, bottleneck))


def randomise(network: XAttnResUNet) -> None:
    """Away from the initialisation, where all weights are equal."""
    for name, parameter in network.xattnres.named_parameters():
        if "projections" not in name:
            nn.init.normal_(parameter)


@pytest.mark.parametrize("config", ARRANGEMENTS.values(), ids=ARRANGEMENTS)
def test_it_computes_the_formulas(plan, config):
    planned, image = build(plan)
    network = XAttnResUNet(planned, config).double()
    randomise(network)
    with torch.no_grad():
        expected = forward_by_formulas(network, image[:1].double())
        torch.testing.assert_close(network(image[:1].double()), expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("plan, arrangement", COVERING)
class TestBesideThePlannedNetwork:
    def test_it_keeps_names_and_shapes(self, plan, arrangement):
        config = ARRANGEMENTS[arrangement]
        planned, _ = build(plan)
        planned_shapes = {key: tensor.shape for key, tensor in planned.state_dict().items()}
        network = XAttnResUNet(planned, config)
        shapes = {key: tensor.shape for key, tensor in network.state_dict().items() if not key.startswith("xattnres.")}
        assert shapes.keys() == planned_shapes.keys()
        changed = {key for key, shape in shapes.items() if shape != planned_shapes[key]}
        if config.skip_connections:
            assert not changed
        else:
            first_convolutions = (".convs.0.conv.weight", ".convs.0.all_modules.0.weight")
            num_decoder_stages = len(planned.decoder.stages)
            assert changed == {
                f"decoder.stages.{d}{end}" for d in range(num_decoder_stages) for end in first_convolutions
            }
        reads = config.read_in_encoder or config.read_in_decoder
        assert any(key.startswith("xattnres.") for key in network.state_dict()) == reads

    def test_deep_supervision_is_switched_at_run_time(self, plan, arrangement):
        planned, image = build(plan, deep_supervision=True)
        network = XAttnResUNet(planned, ARRANGEMENTS[arrangement]).eval()
        with torch.no_grad():
            outputs = network(image)
            network.decoder.deep_supervision = False
            output = network(image)
        assert torch.equal(output, outputs[0])
        assert len(outputs) == len(planned.decoder.stages)
        assert output.shape[2:] == image.shape[2:]
        assert all(finer.shape[2] >= coarser.shape[2] for finer, coarser in pairwise(outputs))

    def test_compute_conv_feature_map_size_adds_the_projections(self, plan, arrangement):
        config = replace(ARRANGEMENTS[arrangement], backend="reference")
        planned, image = build(plan)
        planned_size = planned.compute_conv_feature_map_size(image.shape[2:])
        network = XAttnResUNet(planned, config)
        with torch.no_grad(), projected_elements() as elements:
            network(image)
        assert network.compute_conv_feature_map_size(image.shape[2:]) == planned_size + sum(elements)


def test_an_indivisible_image_is_an_error(plan):
    planned, image = build(plan)
    network = XAttnResUNet(planned, XAttnResConfig())
    with pytest.raises(XAttnResError, match="must be divisible"):
        network(image[..., :-1])


@pytest.mark.parametrize(
    "config, silent_at_first, silent_then",
    [
        (XAttnResConfig(), {"norm_scale"}, set()),
        (XAttnResConfig(skip_connections=False), {"norm_scale"}, set()),
        (XAttnResConfig(fusion="residual"), {"query", "norm_scale", "projections"}, {"norm_scale"}),
    ],
)
def test_gradients_wake_in_the_order_of_the_formulas(plan, config, silent_at_first, silent_then):
    planned, image = build(plan, deep_supervision=True)
    network = XAttnResUNet(planned, config)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    for expected in (silent_at_first, silent_then):
        optimizer.zero_grad()
        sum(output.square().mean() for output in network(image)).backward()
        optimizer.step()
        for stage, attention in network.xattnres.items():
            # The mixture over a single source has nothing to choose.
            idle = {"query", "norm_scale"} if config.fusion == "residual" and len(attention.projections) == 1 else set()
            for name, parameter in attention.named_parameters():
                assert parameter.grad is not None
                assert parameter.grad.any().item() == (name.split(".")[0] not in expected | idle), (stage, name)


def forward_by_formulas(network: XAttnResUNet, image: torch.Tensor) -> torch.Tensor:
    """The network's output for one image. What its stages read is computed by `helpers.formulas`."""

    def read(stage: str, x: torch.Tensor, pool: list[torch.Tensor]) -> torch.Tensor:
        prefix = f"xattnres.{stage}."
        own = {key[len(prefix) :]: t.numpy() for key, t in network.state_dict().items() if key.startswith(prefix)}
        if not own:
            return x
        projections = [own[f"projections.{k}"] for k in range(len(pool))]
        assert f"projections.{len(pool)}" not in own
        arrays = [h[0].numpy() for h in pool]
        out = formulas.read(x[0].numpy(), arrays, projections, own["query"], own["norm_scale"], own.get("gamma"))
        return torch.from_numpy(out)[None]

    encoder, decoder, config = network.encoder, network.decoder, network.config
    h = []
    x = image if not hasattr(encoder, "stem") else encoder.stem(image)
    for i in range(len(encoder.stages)):
        if i >= 2:
            x = read(f"E{i}", x, h[: i - 1])
        x = encoder.stages[i](x)
        h.append(x)
    bottleneck = len(h) - 1
    for d in range(bottleneck):
        x = read(f"D{d}", decoder.transpconvs[d](h[-1]), h)
        x = decoder.stages[d](torch.cat((x, h[bottleneck - 1 - d]), dim=1) if config.skip_connections else x)
        h.append(x)
    return decoder.seg_layers[-1](x)


def test_backends_agree(plan):
    planned, image = build(plan)
    planned, image = planned.double(), image.double()
    outputs = []
    for backend in ("reference", "streaming", "native", "auto"):
        torch.manual_seed(0)
        network = XAttnResUNet(copy.deepcopy(planned), XAttnResConfig(backend=backend)).double()
        randomise(network)
        outputs.append(network(image))
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], atol=1e-9, rtol=0)
    assert torch.equal(outputs[3], outputs[2])


def test_residual_fusion_starts_as_the_planned_network(plan):
    planned, image = build(plan, deep_supervision=True)
    expected = planned(image)
    outputs = XAttnResUNet(planned, XAttnResConfig(fusion="residual"))(image)
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))


def test_attention_starts_with_equal_weights_and_survives_nnunets_initialisation(plan):
    network = XAttnResUNet(build(plan)[0], XAttnResConfig())
    before = copy.deepcopy(network.xattnres.state_dict())
    network.apply(network.initialize)
    for key, tensor in network.xattnres.state_dict().items():
        assert torch.equal(tensor, before[key])
    for attention in network.xattnres.values():
        num_candidates = len(attention.projections) + 1
        values = torch.randn(num_candidates, 2, len(attention.query), 3, 3)
        weights = attention_weights(attention.query, attention.norm_scale, values)
        torch.testing.assert_close(weights, torch.full_like(weights, 1 / num_candidates), atol=1e-7, rtol=0)


def test_projections_preserve_variance():
    torch.manual_seed(0)
    attention = HistoryAttention(512, [64, 512], XAttnResConfig())
    for projection in attention.projections:
        projected = alignment.project(torch.randn(4, projection.shape[1], 32, 32), projection)
        assert projected.var().item() == pytest.approx(1, rel=0.1)


def test_pools_hold_everything_computed_before():
    network = XAttnResUNet(planned_network(ANISOTROPIC_3D), XAttnResConfig())
    sources = {stage: len(attention.projections) for stage, attention in network.xattnres.items()}
    assert sources == {"E2": 1, "E3": 2, "E4": 3, "D0": 5, "D1": 6, "D2": 7, "D3": 8}


@pytest.mark.parametrize("strides", [ISOTROPIC_2D, ANISOTROPIC_3D], ids=["2d", "3d-anisotropic"])
def test_the_pool_gives_every_stage_what_the_formula_says(strides):
    """Outputs that are finer than the stage are averaged to its resolution, the others are given as they are."""
    image = smallest_image(strides, (1, 2, 1)[: len(strides[0])])
    encoder = list(accumulate(strides, lambda size, stride: tuple(map(floordiv, size, stride)), initial=image))[1:]
    sizes = [*encoder, *encoder[-2::-1]]  # of all stages, in the order of computation
    torch.manual_seed(0)
    outputs = [torch.randn(1, 2, *size, dtype=torch.float64) for size in sizes]
    pool = HistoryPool()
    for count, h in enumerate(outputs, start=1):
        pool.append(h)
        for size in sizes[:count]:
            for number in (count - 1, count):  # an encoder stage does not read the newest output
                given = pool.at(size, number)
                assert len(given) == number
                for source, features in zip(outputs, given, strict=False):
                    if source[0, 0].numel() <= np.prod(size):
                        assert features is source
                    else:
                        np.testing.assert_allclose(features[0], formulas.resize(source[0].numpy(), size), atol=1e-12)


@pytest.mark.parametrize(
    "size, factor, is_kept, expected",
    [
        ((16, 16), 1, True, False),
        ((16, 16), 2, True, True),
        ((16, 16), 4, True, True),
        ((16, 16), 8, True, False),
        ((8, 8, 8), 2, True, True),
        ((8, 8, 8), 4, True, False),
        ((8, 8, 8), 2, False, False),
    ],
)
def test_large_averages_of_what_is_kept_anyway_are_computed_again(size, factor, is_kept, expected):
    """Of what is not kept, the average takes less memory."""
    h = torch.zeros(1, 2, *size)
    features = alignment.resize(h, [extent // factor for extent in size])
    assert stage_level._averaged_from(features, h, is_kept) is (h if expected else None)


@pytest.mark.parametrize(
    "config, averaged",
    [
        # Sizes 16, 8, 4, 2: E2 reads at 8, E3 at 4, decoder stages at 4, 8, 16.
        (XAttnResConfig(), [(16, 8), (8, 4), (8, 4)]),
        (XAttnResConfig(read_in_encoder=False), [(16, 8), (8, 4), (8, 4)]),
        (XAttnResConfig(skip_connections=False, read_in_encoder=False, read_in_decoder=False), []),
    ],
)
def test_outputs_are_averaged_once_per_resolution_and_only_for_who_reads(config, averaged, monkeypatch):
    sizes = []
    average = alignment._average

    def recording_average(features: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
        sizes.append((features.shape[-1], size[-1]))
        return average(features, size)

    monkeypatch.setattr(alignment, "_average", recording_average)
    XAttnResUNet(planned_network(ISOTROPIC_2D), config)(torch.randn(1, 1, 16, 16))
    assert sizes == averaged


def assert_compiled_computes_the_same(name: str, backend: str) -> None:
    strides, config, batch_sizes = COMPILED[name]
    torch._dynamo.reset()
    network = add_xattnres(planned_network(strides, deep_supervision=True), config).double()
    for parameter_name, parameter in network.xattnres.named_parameters():
        if "query" in parameter_name or "gamma" in parameter_name:
            nn.init.normal_(parameter)
    compiled = torch.compile(network, fullgraph=True, backend=backend)
    for batch_size in batch_sizes:
        image = torch.randn(batch_size, 1, *smallest_image(strides, (2,) * len(strides[0])), dtype=torch.float64)
        results = []
        for computes in (compiled, network):
            outputs = computes(image)
            gradients = torch.autograd.grad(sum(x.square().mean() for x in outputs), list(network.parameters()))
            results.append([*outputs, *gradients])
        for computed, expected in zip(*results, strict=True):
            torch.testing.assert_close(computed, expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", ["2d-encoder", "3d-residual", "2d-block"])
def test_traced_as_one_graph_it_computes_the_same(name):
    assert_compiled_computes_the_same(name, "eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_as_one_graph_it_computes_the_same(name):
    assert_compiled_computes_the_same(name, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize(
    "config", [XAttnResConfig(), XAttnResConfig(skip_connections=False)], ids=["skips", "no-skips"]
)
def test_compiled_by_inductor_it_computes_nearly_the_same(config):
    torch._dynamo.reset()
    network = add_xattnres(planned_network(ISOTROPIC_3D, deep_supervision=True), config)
    randomise(network)
    image = torch.randn(2, 1, *smallest_image(ISOTROPIC_3D, (2, 2, 2)))
    results = []
    for computes in (torch.compile(network, fullgraph=True), network):
        outputs = computes(image)
        gradients = torch.autograd.grad(sum(x.square().mean() for x in outputs), list(network.parameters()))
        results.append([*outputs, *gradients])
    for computed, expected in zip(*results, strict=True):
        torch.testing.assert_close(computed, expected, atol=1e-4 * max(1, expected.abs().max().item()), rtol=1e-3)


def test_odd_feature_maps_at_the_bottleneck():
    planned = planned_network(ISOTROPIC_3D)
    image = torch.randn(1, 1, *smallest_image(ISOTROPIC_3D, (5, 7, 5)))
    assert XAttnResUNet(planned, XAttnResConfig())(image).shape == (1, 3, 20, 28, 20)


def test_a_half_precision_network_keeps_its_precision():
    network = XAttnResUNet(planned_network(ISOTROPIC_2D), XAttnResConfig()).bfloat16()
    output = network(torch.randn(1, 1, 16, 16).bfloat16())
    output.float().square().mean().backward()
    assert output.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.bfloat16 for p in network.xattnres.parameters())


@pytest.mark.parametrize("backend", ["reference", "streaming"])
def test_residual_fusion_keeps_the_largest_half_precision_values_finite(backend):
    attention = HistoryAttention(4, [4, 4], XAttnResConfig(fusion="residual", backend=backend))
    nn.init.normal_(attention.query)
    nn.init.constant_(attention.gamma, 0.5)
    for projection in attention.projections:
        nn.init.eye_(projection)
    pool = [torch.empty(1, 4, *size).uniform_(-60000, 60000).half().requires_grad_() for size in [(2, 2), (8, 8)]]
    x = torch.randn(1, 4, 4, 4).half().requires_grad_()
    with torch.autocast("cpu", torch.float16):
        out = attention(x, [pool[0], alignment.resize(pool[1], (4, 4))])
    assert out.isfinite().all()
    for gradient in torch.autograd.grad(out.float().mean(), [x, *pool, *attention.parameters()]):
        assert gradient.isfinite().all()
        assert gradient.any()


def test_an_architecture_without_encoder_and_decoder_is_an_error():
    residual_decoder = planned_network(ISOTROPIC_2D, ResidualUNet)
    for network in (residual_decoder, nn.Sequential()):
        with pytest.raises(XAttnResError, match=rf"cannot read in a {type(network).__name__}.*PlainConvUNet"):
            XAttnResUNet(network, XAttnResConfig())


def test_the_formulas_of_the_tests_give_the_mean_for_a_query_of_zero():
    values = [np.random.default_rng(k).normal(size=(3, 2, 2)) for k in range(2)]
    np.testing.assert_allclose(formulas.mixture(values, np.zeros(3), np.ones(3)), (values[0] + values[1]) / 2)
