"""The attention weights of the calls of a network, collected beside what it computes."""

from collections.abc import Sequence

import pytest
import torch

from helpers.networks import ISOTROPIC_3D, planned_network
from helpers.routing import force_to_read
from nnunet_xattnres import BlockXAttnResConfig, XAttnResConfig
from nnunet_xattnres.common.errors import XAttnResError
from nnunet_xattnres.model.build import add_xattnres
from nnunet_xattnres.model.planned_unet import PlannedUNet
from nnunet_xattnres.routing.recording import WeightMeans

CONFIGS = {
    "stage": XAttnResConfig(),
    "decoder": XAttnResConfig(skip_connections=False, read_in_encoder=False),
    "residual": XAttnResConfig(fusion="residual"),
    "block": BlockXAttnResConfig(),
    "block-input": BlockXAttnResConfig(isar_in_encoder=True, bank_includes_input=True),
}
SOURCES = {  # of a planned network with three stages
    "stage": {
        "E2": ["E0", "current"],
        "D0": ["E0", "E1", "E2", "current"],
        "D1": ["E0", "E1", "E2", "D0", "current"],
    },
    "decoder": {"D0": ["E0", "E1", "E2", "current"], "D1": ["E0", "E1", "E2", "D0", "current"]},
    "residual": {"E2": ["E0"], "D0": ["E0", "E1", "E2"], "D1": ["E0", "E1", "E2", "D0"]},
    "block": {"D0_memory": ["block1", "block2"], "D1_memory": ["block1", "block2"]},
    "block-input": {
        **{f"E{i}_block2": ["input", "block1", "current"] for i in range(3)},
        **{
            f"D{d}_{part}": sources
            for d in range(2)
            for part, sources in (("memory", ["block1", "block2"]), ("block2", ["input", "block1", "current"]))
        },
    },
}


def network_of(config: str, strides: Sequence[Sequence[int]] = ISOTROPIC_3D) -> PlannedUNet:
    network = add_xattnres(planned_network(strides), CONFIGS[config])
    assert isinstance(network, PlannedUNet)
    return network


def with_random_queries(network: PlannedUNet) -> PlannedUNet:
    """Its weights differ from position to position."""
    for name, parameter in network.xattnres.named_parameters():
        if name.endswith("query"):
            torch.nn.init.normal_(parameter)
    return network


@pytest.mark.parametrize("config", CONFIGS)
def test_every_target_has_weights_over_its_sources(config):
    network, image = with_random_queries(network_of(config)), torch.randn(2, 1, 8, 8, 8)
    expected = network(image)
    with network.routing() as weights:
        logits = network(image)
    assert network.routing_sources == SOURCES[config]
    assert weights.keys() == SOURCES[config].keys()
    for target, (of_call,) in weights.items():
        stage = target.partition("_")[0]
        # Encoder stages read at the resolution of the stage before, but inside a stage at its own.
        size = {"E0": 8, "E1": 4, "E2": 4 if target == "E2" else 2, "D0": 4, "D1": 8}[stage]
        assert of_call.shape == (len(SOURCES[config][target]), 2, size, size, size)
        assert not of_call.requires_grad
        torch.testing.assert_close(of_call.sum(dim=0), torch.ones(2, size, size, size))
    assert torch.equal(logits, expected)
    assert all(any(of_call[0].std() > 1e-3 for of_call in weights[target]) for target in list(weights)[1:])


def test_queries_that_force_a_source_find_it():
    network = network_of("stage")
    force_to_read(network, "D1", "E1")
    with network.routing() as weights:
        network(torch.rand(1, 1, 8, 8, 8))
    assert weights["D1"][0][1].min() > 0.99
    assert weights["D0"][0].flatten(1).mean(dim=1) == pytest.approx(0.25)


def test_calls_add_up_and_end_with_the_context():
    network, image = network_of("stage"), torch.randn(1, 1, 8, 8, 8)
    backends = {name: attention.attend for name, attention in network.xattnres.items()}
    means = WeightMeans(network.routing_sources)
    with pytest.raises(KeyError), network.routing(["D1"]) as weights, network.routing(receive=means.add):
        network(image)
        network(image)
        raise KeyError
    network(image)
    assert [len(calls) for calls in weights.values()] == [2]
    assert {name: attention.attend for name, attention in network.xattnres.items()} == backends
    assert means.calls == dict.fromkeys(network.routing_sources, 2)
    torch.testing.assert_close(means.sums["D1"] / 2, torch.full((5,), 0.2))


def test_means_are_over_calls_and_positions():
    means = WeightMeans({"D0": ["E0", "E1"]})
    means.add("D0", torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]))
    means.add("D0", torch.tensor([[[1.0, 1.0]], [[0.0, 0.0]]]))
    assert (means.sums["D0"] / means.calls["D0"]).tolist() == [0.75, 0.25]


def test_an_unknown_target_is_named_beside_the_known_ones():
    network = network_of("stage")
    with pytest.raises(XAttnResError, match="no target D7: choose from E2, D0, D1"), network.routing(["D7"]):
        pass


def test_a_name_without_a_list_is_an_error():
    with pytest.raises(XAttnResError, match=r"routing\(\['D0'\]\)"), network_of("stage").routing("D0"):
        pass


def test_a_compiled_network_gives_its_weights_inside_the_context_only():
    torch._dynamo.reset()
    # Two stages: tracing takes a second for every stage.
    network, image = with_random_queries(network_of("stage", ((1, 1), (2, 2)))), torch.randn(1, 1, 8, 8)
    compiled = torch.compile(network, backend="eager")
    with torch.no_grad():
        compiled(image)
        with network.routing() as expected:
            network(image)
        with network.routing() as weights:
            compiled(image)
        compiled(image)
    torch.testing.assert_close(weights, expected)


def test_the_planned_network_without_skips_has_no_targets():
    control = XAttnResConfig(skip_connections=False, read_in_encoder=False, read_in_decoder=False)
    assert add_xattnres(planned_network(), control).routing_sources == {}
