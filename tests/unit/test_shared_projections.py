"""The study `studies/shared_projections.py`."""

import pytest
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from helpers.plans import planned
from helpers.studies import load_study
from nnunet_xattnres.nnunet.presets import build_preset


@pytest.fixture(scope="module")
def study():
    return load_study("shared_projections")


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_shared_and_factorised_projections_are_fewer_parameters(study, configuration):
    plans, dataset_json = build_preset("msd02", configuration)
    count = {arm: study._parameters(trainer, plans, configuration, dataset_json) for arm, trainer in study.ARMS.items()}
    assert count["planned"] < count["shared"] < count["full"]
    assert count["planned"] < count["factorised"] < count["full"]


@pytest.mark.parametrize("arm", ["full", "shared", "factorised"])
def test_a_training_step_moves_every_projection(study, arm):
    torch.manual_seed(0)
    manager = PlansManager(planned([[1, 1], [2, 2], [2, 2]], [16, 16]))
    network = study.ARMS[arm].build_network_architecture(manager, manager.get_configuration("full"), 1, 3, False)
    before = {name: weights.detach().clone() for name, weights in network.named_parameters()}
    network(torch.randn(2, 1, 16, 16)).square().mean().backward()
    torch.optim.SGD(network.parameters(), lr=1).step()
    projections = {name: weights for name, weights in network.named_parameters() if ".projections." in name}
    assert projections
    assert [name for name, weights in projections.items() if torch.equal(weights, before[name])] == []
