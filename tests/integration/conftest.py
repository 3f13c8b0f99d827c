"""Datasets of the feature matrix, planned and CPU-sized; and the table that is printed at the end."""

from importlib.metadata import version
from pathlib import Path

import pytest

from integration.pipeline import make_label_scenarios, plan_and_preprocess, plan_resenc
from integration.raw_datasets import (
    HIPPOCAMPUS,
    ULTRASOUND,
    add_smoothed_channel,
    write_hippocampus,
    write_ultrasound,
)
from integration.table import Cell, markdown
from nnunet_xattnres.commands import NnUNet

NUM_TRAINING = 8
NUM_TEST = 3
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
def nnunet(tmp_path_factory: pytest.TempPathFactory) -> NnUNet:
    return NnUNet(tmp_path_factory.mktemp("matrix"), "cpu")


@pytest.fixture(scope="session")
def hippocampus(nnunet: NnUNet) -> Path:
    """The raw dataset that all label scenarios are made from."""
    folder = nnunet.raw / HIPPOCAMPUS_DATASET
    write_hippocampus(folder, NUM_TRAINING, NUM_TEST)
    return folder


@pytest.fixture(scope="session")
def label_scenarios(nnunet: NnUNet, hippocampus: Path) -> NnUNet:
    """The datasets of `SCENARIOS`."""
    make_label_scenarios(nnunet, SCENARIOS.values())
    return nnunet


@pytest.fixture(scope="session")
def resenc(label_scenarios: NnUNet) -> str:
    plan_resenc(label_scenarios, SCENARIOS["standard"], "3d_fullres")
    return SCENARIOS["standard"]


@pytest.fixture(scope="session")
def two_channels(nnunet: NnUNet, hippocampus: Path) -> str:
    add_smoothed_channel(hippocampus, nnunet.raw / TWO_CHANNELS)
    plan_and_preprocess(nnunet, TWO_CHANNELS, "3d_fullres")
    return TWO_CHANNELS


@pytest.fixture(scope="session")
def png(nnunet: NnUNet) -> str:
    write_ultrasound(nnunet.raw / PNG, NUM_TRAINING, NUM_TEST)
    plan_and_preprocess(nnunet, PNG, "2d")
    return PNG


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--table", type=Path, help="write the feature matrix, as Markdown, to this file")


def pytest_itemcollected(item: pytest.Item) -> None:
    """Say which cell of the table a test is. Reports carry it along."""
    if "slow" in item.keywords:
        item.user_properties.append(("cell", Cell.of(item)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    table = markdown(reports)
    if not table:
        return
    data = ", ".join(
        f"{name}: {'real cases' if folder.is_dir() else 'phantoms'}"
        for name, folder in (("hippocampus", HIPPOCAMPUS), ("ultrasound", ULTRASOUND))
    )
    versions = ", ".join(f"{package} {version(package)}" for package in ("nnunetv2", "torch", "nnunet-xattnres"))
    text = f"{table}\n{versions}; {data}; {NUM_TRAINING} training and {NUM_TEST} test cases each.\n"
    terminalreporter.section("feature matrix")
    terminalreporter.write_line(text)
    path = config.getoption("table")
    if path:
        path.write_text(text)
