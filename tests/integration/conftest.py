"""Datasets of the feature matrix, planned and CPU-sized; and the table that is printed at the end."""

from importlib.metadata import version
from pathlib import Path

import pytest

from integration.pipeline import run_module, shrink, write_two_folds
from integration.raw_datasets import (
    HIPPOCAMPUS,
    ULTRASOUND,
    add_smoothed_channel,
    write_hippocampus,
    write_ultrasound,
)
from integration.table import Cell, markdown
from nnunet_xattnres.commands import NnUNet

NUM_TRAINING = 12
NUM_TEST = 4
SCENARIOS = {
    "standard": "Dataset999_IntegrationTest_Hippocampus",
    "regions": "Dataset997_IntegrationTest_Hippocampus_regions",
    "ignore": "Dataset998_IntegrationTest_Hippocampus_ignore",
    "regions_ignore": "Dataset996_IntegrationTest_Hippocampus_regions_ignore",
}
HIPPOCAMPUS_DATASET = "Dataset004_Hippocampus"
TWO_CHANNELS = "Dataset995_TwoChannels"
PNG = "Dataset994_Ultrasound"
RESENC_PLANS = "nnUNetResEncUNetMPlans"


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
    """The datasets of `SCENARIOS`, made, planned and given lowres and cascade configurations by nnU-Net's scripts."""
    for dataset in SCENARIOS.values():
        run_module(nnunet, f"nnunetv2.dataset_conversion.datasets_for_integration_tests.{dataset}")
    numbers = [dataset[7:10] for dataset in SCENARIOS.values()]
    nnunet.run("nnUNetv2_plan_and_preprocess", "-d", *numbers, "--no_pp", "-npfp", "2", log="plan")
    run_module(nnunet, "nnunetv2.tests.integration_tests.add_lowres_and_cascade", "-d", *numbers)
    for dataset in SCENARIOS.values():
        shrink(nnunet, dataset, "nnUNetPlans", ["2d", "3d_lowres", "3d_fullres"])
        write_two_folds(nnunet, dataset)
    configurations = ("-c", "2d", "3d_lowres", "3d_fullres")
    nnunet.run("nnUNetv2_preprocess", "-d", *numbers, *configurations, "-np", "2", log="preprocess")
    return nnunet


@pytest.fixture(scope="session")
def resenc(label_scenarios: NnUNet) -> str:
    """A dataset with plans for residual encoders. They share the preprocessed images of the others."""
    dataset = SCENARIOS["standard"]
    number = dataset[7:10]
    label_scenarios.run("nnUNetv2_plan_experiment", "-d", number, "-pl", "nnUNetPlannerResEncM", log="plan_resenc")
    shrink(label_scenarios, dataset, RESENC_PLANS, ["3d_fullres"])
    return dataset


@pytest.fixture(scope="session")
def two_channels(nnunet: NnUNet, hippocampus: Path) -> str:
    add_smoothed_channel(hippocampus, nnunet.raw / TWO_CHANNELS)
    return _planned(nnunet, TWO_CHANNELS, "3d_fullres")


@pytest.fixture(scope="session")
def png(nnunet: NnUNet) -> str:
    write_ultrasound(nnunet.raw / PNG, NUM_TRAINING, NUM_TEST)
    return _planned(nnunet, PNG, "2d")


def _planned(nnunet: NnUNet, dataset: str, configuration: str) -> str:
    command = ("nnUNetv2_plan_and_preprocess", "-d", dataset[7:10], "-c", configuration)
    nnunet.run(*command, "-npfp", "2", "-np", "2", log=f"{dataset}_plan")
    shrink(nnunet, dataset, "nnUNetPlans", [configuration])
    write_two_folds(nnunet, dataset)
    return dataset


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
