"""Block-level XAttnRes against its formulas, written a second time in plain PyTorch operations."""

import copy
from collections.abc import Callable
from dataclasses import replace
from math import inf, nan, sqrt

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import Tensor, nn
from torch.nn import functional as F

from helpers.memory import saved_bytes
from helpers.networks import (
    ANISOTROPIC_2D,
    ANISOTROPIC_3D,
    ISOTROPIC_2D,
    ISOTROPIC_3D,
    planned_network,
    projected_elements,
    smallest_image,
)
from nnunet_xattnres.common.errors import XAttnResError
from nnunet_xattnres.model.block_level import (
    EPS,
    BlockXAttnResUNet,
    InputProjection,
    IntraStageAttention,
    MemoryRouting,
)
from nnunet_xattnres.model.build import add_xattnres
from nnunet_xattnres.model.config import BlockXAttnResConfig
from nnunet_xattnres.ops import streaming
from nnunet_xattnres.ops.alignment import project
from nnunet_xattnres.ops.reference import Candidate, attend_reference, attention_weights
from nnunet_xattnres.ops.streaming import attend_streaming

REFERENCE = BlockXAttnResConfig()
INPUT = BlockXAttnResConfig(isar_in_encoder=True, bank_includes_input=True, temperature=0.75, kv_ratio=1.5)
ENCODER = BlockXAttnResConfig(isar_in_encoder=True, isar_in_decoder=False)
CONFIGS = {"reference": REFERENCE, "input": INPUT, "encoder": ENCODER}
PLANS = {  # strides, network, the most features: the last two stages of some have equally many, as in real plans
    "plain-3d": (ISOTROPIC_3D, PlainConvUNet, 320),
    "plain-3d-anisotropic": (ANISOTROPIC_3D, PlainConvUNet, 320),
    "plain-3d-capped": (ISOTROPIC_3D, PlainConvUNet, 8),
    "resenc-3d": (ISOTROPIC_3D, ResidualEncoderUNet, 320),
    "plain-2d": (ISOTROPIC_2D, PlainConvUNet, 320),
    "resenc-2d-anisotropic": (ANISOTROPIC_2D, ResidualEncoderUNet, 320),
    "resenc-2d-capped": (ISOTROPIC_2D, ResidualEncoderUNet, 16),
}


# Every config with every kind of network, in 2D and in 3D.
COVERING = [
    ("plain-3d", "input"),
    ("plain-3d-anisotropic", "reference"),
    ("plain-3d-capped", "input"),
    ("resenc-3d", "encoder"),
    ("resenc-3d", "input"),
    ("plain-2d", "encoder"),
    ("resenc-2d-anisotropic", "reference"),
    ("resenc-2d-anisotropic", "encoder"),
    ("resenc-2d-capped", "input"),
]


@pytest.fixture(params=PLANS)
def plan(request):
    return request.param


def build_planned(plan: str) -> PlainConvUNet | ResidualEncoderUNet:
    strides, network, max_features = PLANS[plan]
    return planned_network(strides, network, max_features=max_features, deep_supervision=True)


def build(plan: str, config: BlockXAttnResConfig, backend: str = "auto") -> tuple[BlockXAttnResUNet, Tensor]:
    strides, planned = PLANS[plan][0], build_planned(plan)
    image = torch.randn(2, 1, *smallest_image(strides, (1, 2, 1)[: len(strides[0])]))
    return BlockXAttnResUNet(planned, replace(config, backend=backend)), image


def randomise(network: nn.Module) -> None:
    """Away from the initialisation, where all weights are equal."""
    torch.manual_seed(1)
    for name, parameter in network.xattnres.named_parameters():
        if name.endswith(("query", "norm_scale")):
            nn.init.normal_(parameter)


def conv1x1(weight: Tensor, x: Tensor) -> Tensor:
    return (F.conv2d if x.ndim == 4 else F.conv3d)(x, weight.reshape(*weight.shape, *(1,) * (x.ndim - 2)))


def rms_norm(v: Tensor, scale: Tensor) -> Tensor:
    return scale.reshape(-1, *(1,) * (v.ndim - 2)) * v / torch.sqrt((v**2).mean(1, keepdim=True) + 1e-8)


def isar_by_formulas(
    parts: nn.ModuleDict, stage: str, stage_input: Tensor, outputs: list[Tensor], config: BlockXAttnResConfig
) -> Tensor:
    """The input of the block after `outputs`."""
    part = parts[f"{stage}_block{len(outputs) + 1}"]
    stack = [*outputs, outputs[-1]]
    if config.bank_includes_input:
        factors = [a // b for a, b in zip(stage_input.shape[2:], outputs[0].shape[2:], strict=True)]
        pooled = (F.avg_pool2d if len(factors) == 2 else F.avg_pool3d)(stage_input, factors)
        same_channels = stage_input.shape[1] == outputs[0].shape[1]
        stack.insert(0, pooled if same_channels else conv1x1(parts[f"{stage}_input"].projection, pooled))
    W = conv1x1(part.query, outputs[-1])
    logits = [(W * rms_norm(v, part.norm_scale)).sum(1) / (sqrt(W.shape[1]) * config.temperature) for v in stack]
    a = torch.softmax(torch.stack(logits), dim=0)
    return sum(a[k].unsqueeze(1) * v for k, v in enumerate(stack))


def dkvmr_by_formulas(part: MemoryRouting, x: Tensor, memory: list[Tensor], kv_ratio: float) -> Tensor:
    channels = x.shape[1]
    if len(memory) == 1:
        return conv1x1(part.key_value, memory[0])
    d = max(8, int(kv_ratio * channels))
    assert part.key_value.shape == (d + channels, channels)
    keys, values = zip(*(conv1x1(part.key_value, m).split([d, channels], dim=1) for m in memory), strict=True)
    Q = conv1x1(part.query, x)
    a = torch.softmax(torch.stack([(Q * rms_norm(K, part.norm_scale)).sum(1) / sqrt(d) for K in keys]), dim=0)
    return sum(a[j].unsqueeze(1) * V for j, V in enumerate(values))


def forward_by_formulas(network: BlockXAttnResUNet, config: BlockXAttnResConfig, image: Tensor) -> list[Tensor]:
    def run(name: str, blocks: nn.Sequential, x: Tensor, isar: bool) -> list[Tensor]:
        outputs = []
        for block in blocks:
            if isar and len(outputs) >= (1 if config.bank_includes_input else 2):
                outputs.append(block(isar_by_formulas(network.xattnres, name, x, outputs, config)))
            else:
                outputs.append(block(outputs[-1] if outputs else x))
        return outputs

    x = network.encoder.stem(image) if hasattr(network.encoder, "stem") else image
    memories = []
    for i, stage in enumerate(network.encoder.stages):
        blocks = stage.blocks if hasattr(stage, "blocks") else stage[0].convs
        memories.append(run(f"E{i}", blocks, x, config.isar_in_encoder))
        x = memories[-1][-1]
    logits = []
    for d, stage in enumerate(network.decoder.stages):
        x = network.decoder.transpconvs[d](x)
        skip = dkvmr_by_formulas(network.xattnres[f"D{d}_memory"], x, memories[-2 - d], config.kv_ratio)
        x = run(f"D{d}", stage.convs, torch.cat((x, skip), 1), config.isar_in_decoder)[-1]
        logits.insert(0, network.decoder.seg_layers[d](x))
    return logits


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_it_computes_the_formulas_and_their_gradients(plan, config):
    network, image = build(plan, config)
    network, image = network.double(), image.double()
    randomise(network)
    other = copy.deepcopy(network)
    outputs, expected = network(image), forward_by_formulas(other, config, image)
    for output, value in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, value, atol=1e-9, rtol=0)
    for logits in (outputs, expected):
        sum(output.square().mean() for output in logits).backward()
    for (name, parameter), exact in zip(network.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, exact.grad, atol=1e-9, rtol=0, msg=name)


@pytest.mark.parametrize("plan", ["plain-2d", "resenc-3d"])
def test_backends_agree(plan):
    config, outputs = INPUT, []
    for backend in ("reference", "streaming"):
        network, _ = build(plan, config, backend)
        randomise(network)
        torch.manual_seed(2)
        image = torch.randn(2, 1, *build(plan, config)[1].shape[2:], dtype=torch.float64)
        outputs.append(network.double()(image)[0])
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-9, rtol=0)


@pytest.mark.parametrize("key_channels", [None, 2])
def test_a_query_field_streams_like_the_reference_with_every_gradient(key_channels, monkeypatch):
    monkeypatch.setitem(streaming.CHUNK_ELEMENTS, "cpu", 60)
    torch.manual_seed(0)
    channels = 5
    num_keys = channels if key_channels is None else key_channels
    query = torch.randn(2, num_keys, 4, 6, dtype=torch.float64, requires_grad=True)
    norm_scale = torch.rand(num_keys, dtype=torch.float64, requires_grad=True)
    features = [torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True) for size in [(4, 6), (2, 3), (1, 2)]]
    projection = torch.randn(channels, 3, dtype=torch.float64, requires_grad=True)
    candidates = [Candidate(h, projection) for h in features]
    inputs = [query, norm_scale, projection, *features]

    def run(attend):
        return attend(query, norm_scale, candidates, (4, 6), key_channels, EPS)

    expected, streamed = run(attend_reference), run(attend_streaming)
    assert streamed.shape == (2, channels - (key_channels or 0), 4, 6)
    torch.testing.assert_close(streamed, expected, atol=1e-9, rtol=0)
    gradient = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad(streamed, inputs, gradient), torch.autograd.grad(expected, inputs, gradient), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=0)


def test_no_part_exists_where_it_could_change_nothing():
    def parts(plan: str, config: BlockXAttnResConfig) -> set[str]:
        return set(build(plan, config)[0].xattnres)

    memories = {"D0_memory", "D1_memory"}
    assert parts("plain-3d", REFERENCE) == memories
    assert parts("plain-3d", ENCODER) == memories
    assert parts("resenc-3d", REFERENCE) == memories
    # E1 of the residual encoder is the only stage with three blocks.
    assert parts("resenc-3d", ENCODER) == memories | {"E1_block3"}
    stages = ("E0", "E1", "E2", "D0", "D1")
    isar = {f"{stage}_block2" for stage in stages}
    assert parts("plain-3d", INPUT) == memories | isar | {f"{stage}_input" for stage in stages}
    isar = {"E1_block2", "E1_block3", "E2_block2"}
    assert parts("resenc-3d", INPUT) == memories | isar | {"E1_input", "E2_input"}


def test_a_stage_input_of_as_many_channels_enters_the_bank_as_it_is():
    assert {"E2_block2", "E1_input"} < set(build("plain-3d-capped", INPUT)[0].xattnres)
    assert "E2_input" not in build("plain-3d-capped", INPUT)[0].xattnres
    assert {"E3_block2", "E2_input"} < set(build("resenc-2d-capped", INPUT)[0].xattnres)
    assert "E3_input" not in build("resenc-2d-capped", INPUT)[0].xattnres


def test_what_has_nothing_to_choose_is_not_said_to_read():
    # Stage 0 of the residual encoder has one block.
    assert list(build("resenc-3d", REFERENCE)[0].routing_sources) == ["D0_memory"]
    assert list(build("resenc-3d", INPUT)[0].routing_sources) == ["E1_block2", "E1_block3", "E2_block2", "D0_memory"]
    assert list(build("plain-3d", REFERENCE)[0].routing_sources) == ["D0_memory", "D1_memory"]


def test_a_memory_of_one_entry_has_neither_query_nor_keys():
    network = BlockXAttnResUNet(planned_network(ISOTROPIC_3D, ResidualEncoderUNet, features=32), REFERENCE)
    assert dict(network.xattnres["D1_memory"].named_parameters()).keys() == {"key_value"}
    assert network.xattnres["D1_memory"].key_value.shape == (32, 32)
    assert network.xattnres["D0_memory"].key_value.shape == (32 + 64, 64)


def test_isar_starts_with_equal_weights_over_the_doubled_stack_and_survives_initialisation(plan):
    network, _ = build(plan, INPUT)
    before = copy.deepcopy(network.xattnres.state_dict())
    network.apply(network.initialize)
    for key, tensor in network.xattnres.state_dict().items():
        assert torch.equal(tensor, before[key])
    stack = torch.randn(3, 2, 4, 5, 5)
    part = IntraStageAttention(4, INPUT)
    query = conv1x1(part.query, stack[-1])
    assert torch.allclose(attention_weights(query, part.norm_scale, stack, EPS), torch.tensor(1 / 3))
    out = part([stack[0], stack[1]])
    torch.testing.assert_close(out, (stack[0] + 2 * stack[1]) / 3)


@pytest.mark.parametrize("plan, config", COVERING)
def test_every_part_learns(plan, config):
    network, image = build(plan, CONFIGS[config])
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        sum(output.square().mean() for output in network(image)).backward()
        for name, parameter in network.xattnres.named_parameters():
            # The norm's scale of ISAR meets a query that is still zero.
            asleep = step == 0 and "block" in name and name.endswith("norm_scale")
            assert parameter.grad.any().item() != asleep, name
        optimizer.step()


def test_names_of_the_planned_network_stay(plan):
    planned = build_planned(plan).state_dict()
    state = build(plan, INPUT)[0].state_dict()
    rest = {key: tensor.shape for key, tensor in state.items() if not key.startswith("xattnres.")}
    assert rest == {key: tensor.shape for key, tensor in planned.items()}


def test_a_saved_temperature_stays_with_the_weights():
    hot = BlockXAttnResUNet(planned_network(ISOTROPIC_2D), INPUT)
    cold = BlockXAttnResUNet(planned_network(ISOTROPIC_2D), replace(INPUT, temperature=5.0))
    cold.load_state_dict(hot.state_dict())
    image = torch.randn(1, 1, 16, 16)
    randomise(hot)
    randomise(cold)
    assert torch.equal(cold(image), hot(image))


def test_a_temperature_is_as_exact_as_float32():
    config = replace(REFERENCE, temperature=0.1)
    parts = nn.ModuleDict({"E0_block3": IntraStageAttention(4, config)}).double()
    nn.init.normal_(parts["E0_block3"].query)
    bank = [torch.randn(2, 4, 5, 5, dtype=torch.float64) for _ in range(2)]
    expected = isar_by_formulas(parts, "E0", bank[0], bank, config)
    torch.testing.assert_close(parts["E0_block3"](bank), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("plan, config", COVERING)
def test_compute_conv_feature_map_size_adds_the_1x1_convolutions(plan, config):
    network, image = build(plan, CONFIGS[config], "reference")
    with torch.no_grad(), projected_elements() as elements:
        network(image)
    size = image.shape[2:]
    expected = build_planned(plan).compute_conv_feature_map_size(size) + sum(elements)
    assert network.compute_conv_feature_map_size(size) == expected


def isar(backend: str) -> tuple[IntraStageAttention, Callable[[nn.Module, list[Tensor]], Tensor]]:
    """The part, and how to run it on three feature maps of eight channels."""
    return IntraStageAttention(8, replace(REFERENCE, backend=backend)), lambda part, features: part(features)


def dkvmr(backend: str) -> tuple[MemoryRouting, Callable[[nn.Module, list[Tensor]], Tensor]]:
    part = MemoryRouting(8, 2, replace(REFERENCE, backend=backend))
    return part, lambda part, features: part(features[0], features[1:])


@pytest.mark.parametrize("backend", ["reference", "streaming"])
@pytest.mark.parametrize("part_of", [isar, dkvmr])
def test_float16_features_of_thousands_come_close_to_float64_under_autocast(part_of, backend):
    torch.manual_seed(0)
    part, run = part_of(backend)
    # Scores of some units, which make weights neither uniform nor all but zero.
    nn.init.normal_(part.query, std=1e-3)
    nn.init.uniform_(part.norm_scale, 0.5, 1.5)
    features = [1000 * torch.randn(2, 8, 4, 6) for _ in range(3)]
    exact = copy.deepcopy(part).double()
    expected = run(exact, [h.double() for h in features])
    with torch.autocast("cpu", torch.float16):
        out = run(part, [h.half() for h in features])
    assert out.dtype == torch.float16
    torch.testing.assert_close(out.double(), expected, atol=0.02 * expected.abs().max().item(), rtol=0)
    gradient = torch.randn_like(expected) / expected.numel()
    out.backward(gradient.half())
    expected.backward(gradient)
    for (name, parameter), other in zip(part.named_parameters(), exact.parameters(), strict=True):
        assert parameter.grad.any(), name
        tolerance = 0.02 * other.grad.abs().max().item()
        torch.testing.assert_close(parameter.grad.double(), other.grad, atol=tolerance, rtol=0, msg=name)


@pytest.mark.parametrize("part_of", [isar, dkvmr])
def test_a_part_keeps_its_query_field_alone_for_the_backward_pass(part_of):
    part, run = part_of("streaming")
    features = [torch.randn(2, 8, 8, 8, 8, requires_grad=True) for _ in range(3)]
    assert saved_bytes(lambda: run(part, features), features) < 1.1 * features[0].nbytes


def test_projections_preserve_variance():
    torch.manual_seed(0)
    routing = MemoryRouting(512, 2, REFERENCE)
    keys, values = routing.key_value.split([256, 512])
    single = MemoryRouting(512, 1, REFERENCE).key_value
    stage_input = InputProjection(512, 64).projection
    for projection in (keys, values, routing.query, single, stage_input):
        projected = project(torch.randn(4, projection.shape[1], 32, 32), projection)
        assert projected.var().item() == pytest.approx(1, rel=0.1)


def test_defaults_are_those_of_the_reference():
    assert BlockXAttnResConfig().architecture() == {
        "isar_in_encoder": False,
        "isar_in_decoder": True,
        "bank_includes_input": False,
        "kv_ratio": 0.5,
        "temperature": 1.0,
    }


@pytest.mark.parametrize(
    "field, value",
    [
        *(("kv_ratio", 0), ("kv_ratio", -1.0), ("kv_ratio", True), ("kv_ratio", 1e9), ("kv_ratio", 9)),
        *(("temperature", 0.0), ("temperature", "hot"), ("temperature", inf), ("temperature", nan)),
        *(("temperature", 1e-300), ("temperature", 1e9)),
        *(("isar_in_encoder", 1), ("backend", "cuda")),
    ],
)
def test_a_bad_value_is_named(field, value):
    with pytest.raises(XAttnResError, match=rf"BlockXAttnResConfig\.{field} .*{value!r}"):
        BlockXAttnResConfig(**{field: value})


def test_a_field_that_does_not_exist_is_named():
    with pytest.raises(TypeError, match="isar_everywhere"):
        BlockXAttnResConfig(isar_everywhere=True)


def test_add_xattnres_builds_it():
    assert isinstance(add_xattnres(planned_network(ISOTROPIC_2D), REFERENCE), BlockXAttnResUNet)
