"""Datasets of the feature matrix, planned and CPU-sized, each made when it is first asked for."""

from collections.abc import Callable
from pathlib import Path

import pytest

from integration.pipeline import make_label_scenario, once, plan_and_preprocess, plan_resenc
from integration.raw_datasets import add_smoothed_channel, write_hippocampus, write_ultrasound
from integration.real_data import NUM_TEST, NUM_TRAINING
from nnunet_xattnres.nnunet.commands import NnUNet

SCENARIOS = {
    "standard": "Dataset999_IntegrationTest_Hippocampus",
    "regions": "Dataset997_IntegrationTest_Hippocampus_regions",
    "ignore": "Dataset998_IntegrationTest_Hippocampus_ignore",
    "regions_ignore": "Dataset996_IntegrationTest_Hippocampus_regions_ignore",
}
HIPPOCAMPUS_DATASET = "Dataset004_Hippocampus"
TWO_CHANNELS = "Dataset995_TwoChannels"
PNG = "Dataset994_Ultrasound"


@pytest.fixture(scope="session")
def empty_nnunet(tmp_path_factory: pytest.TempPathFactory) -> NnUNet:
    return NnUNet(tmp_path_factory.mktemp("matrix"), "cpu")


@pytest.fixture(scope="session")
def hippocampus(empty_nnunet: NnUNet) -> Path:
    """The raw dataset that all label scenarios are made from."""
    folder = empty_nnunet.raw / HIPPOCAMPUS_DATASET
    write_hippocampus(folder, NUM_TRAINING, NUM_TEST)
    return folder


@pytest.fixture(scope="session")
def label_scenario(empty_nnunet: NnUNet, hippocampus: Path) -> Callable[[str], str]:
    """The name of the dataset for one of `SCENARIOS`."""

    @once
    def make(scenario: str) -> str:
        make_label_scenario(empty_nnunet, SCENARIOS[scenario])
        return SCENARIOS[scenario]

    return make


@pytest.fixture(scope="session")
def resenc(empty_nnunet: NnUNet, label_scenario: Callable[[str], str]) -> str:
    dataset = label_scenario("standard")
    plan_resenc(empty_nnunet, dataset, "3d_fullres")
    return dataset


@pytest.fixture(scope="session")
def two_channels(empty_nnunet: NnUNet, hippocampus: Path) -> str:
    add_smoothed_channel(hippocampus, empty_nnunet.raw / TWO_CHANNELS)
    plan_and_preprocess(empty_nnunet, TWO_CHANNELS, "3d_fullres")
    return TWO_CHANNELS


@pytest.fixture(scope="session")
def png(empty_nnunet: NnUNet) -> str:
    write_ultrasound(empty_nnunet.raw / PNG, NUM_TRAINING, NUM_TEST)
    plan_and_preprocess(empty_nnunet, PNG, "2d")
    return PNG
