"""The attention weights of the calls of a network, collected beside what it computes, and sources left out."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from helpers.networks import ISOTROPIC_3D, planned_network
from helpers.routing import force_to_read
from nnunet_xattnres import BlockXAttnResConfig, XAttnResConfig
from nnunet_xattnres.common.errors import XAttnResError
from nnunet_xattnres.model.build import add_xattnres
from nnunet_xattnres.model.planned_unet import PlannedUNet
from nnunet_xattnres.ops.alignment import align
from nnunet_xattnres.ops.reference import EPS, attention_weights, computed
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


def test_a_compiled_network_gives_its_weights_and_leaves_sources_out_inside_the_context_only():
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
        with network.without("D0", "E1"):
            torch.testing.assert_close(compiled(image), network(image))
        torch.testing.assert_close(compiled(image), network(image))
    torch.testing.assert_close(weights, expected)


def test_the_planned_network_without_skips_has_no_targets():
    control = XAttnResConfig(skip_connections=False, read_in_encoder=False, read_in_decoder=False)
    assert add_xattnres(planned_network(), control).routing_sources == {}


class TestWithout:
    @pytest.mark.parametrize("backend", ["reference", "streaming", "auto"])
    @pytest.mark.parametrize("config", ["stage", "decoder", "residual", "block-input"])
    def test_it_equals_a_score_of_minus_infinity(self, config, backend, monkeypatch):
        network = with_random_queries(add_xattnres(planned_network(), replace(CONFIGS[config], backend=backend)))
        for attention in network.xattnres.values():
            if getattr(attention, "gamma", None) is not None:
                torch.nn.init.normal_(attention.gamma)
        image = torch.randn(2, 1, 8, 8, 8)
        for target, sources in network.routing_sources.items():
            for index, source in enumerate(sources):
                if len(sources) == 1:
                    continue
                with network.without(target, source):
                    without = network(image)
                with monkeypatch.context() as patch:
                    silenced(patch, network.xattnres[target], index)
                    expected = network(image)
                torch.testing.assert_close(without, expected, atol=1e-4, rtol=1e-4)
                assert not torch.allclose(without, network(image), atol=1e-4)

    def test_a_residual_target_whose_only_source_goes_returns_its_input(self):
        network = network_of("residual")
        torch.nn.init.normal_(network.xattnres["E2"].gamma)
        calls = []
        network.xattnres["E2"].register_forward_hook(lambda module, read, out: calls.append((read[0], out)))
        with network.without("E2", "E0"), network.routing(["E2"]) as weights:
            network(torch.randn(1, 1, 8, 8, 8))
        assert torch.equal(*calls[0])
        assert weights == {"E2": []}

    @pytest.mark.parametrize("sources", [("E0", "E1"), ("E1", "E0")])
    def test_several_sources_in_any_order_and_with_weights(self, sources):
        network, image = with_random_queries(network_of("stage")), torch.randn(1, 1, 8, 8, 8)
        with network.routing(["D1"]) as of_all:
            before = network(image)
        first, second = sources
        with network.routing(["D1"]) as outside, network.without("D1", first):
            with network.without("D1", second), network.routing(["D1"]) as inside:
                network(image)
            with network.routing(["D1"]) as one_left_out:
                network(image)
        kept = of_all["D1"][0].clone()
        kept[:2] = 0
        for weights in (outside, inside):
            torch.testing.assert_close(weights["D1"][0], kept / kept.sum(dim=0))
        assert one_left_out["D1"][0][["E0", "E1"].index(second)].min() > 0
        assert torch.equal(network(image), before)

    def test_the_network_is_as_it_was_after_an_error(self):
        network = network_of("stage")
        backends = {name: attention.attend for name, attention in network.xattnres.items()}
        with pytest.raises(KeyError), network.without("D0", "E0"), network.without("D0", "E1"):
            raise KeyError
        assert {name: attention.attend for name, attention in network.xattnres.items()} == backends

    def test_what_cannot_be_left_out_is_named(self):
        network = network_of("stage")
        with pytest.raises(XAttnResError, match="no target D7: choose from E2, D0, D1"), network.without("D7", "E0"):
            pass
        complaint = "D0 has no source D1: choose from E0, E1, E2, current"
        with pytest.raises(XAttnResError, match=complaint), network.without("D0", "D1"):
            pass
        complaint = "without current nothing is left that E2 can read"
        with (
            network.without("E2", "E0"),
            pytest.raises(XAttnResError, match=complaint),
            network.without("E2", "current"),
        ):
            pass


def silenced(patch: pytest.MonkeyPatch, attention: torch.nn.Module, index: int) -> None:
    """The formulas with the score of one candidate lowered to minus infinity."""

    def attend(query, norm_scale, candidates, size, key_channels=None, eps=EPS):
        aligned = torch.stack([align(features, projection, size) for features, projection, _ in computed(candidates)])
        keys, values = (aligned, aligned) if key_channels is None else aligned.tensor_split([key_channels], dim=2)
        weights = attention_weights(query, norm_scale, keys, eps).log()
        weights[index] = -torch.inf
        return (weights.softmax(dim=0).unsqueeze(2) * values).sum(dim=0)

    patch.setattr(attention, "attend", attend)
