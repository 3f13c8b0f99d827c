"""Fixtures of all tests. They import what they need on demand, so that tests/unit starts quickly."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from nnunet_xattnres.nnunet.commands import NnUNet

pytest_plugins = ["integration.table"]

# The benchmark needs locks and process groups of POSIX.
collect_ignore_glob = ["unit/test_benchmark_*"] if sys.platform == "win32" else []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long tests begin first: of several workers, all but one would be idle beside a long test that begins last."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture(scope="session")
def nnunet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NnUNet]:
    """A working directory with a phantom dataset, planned and preprocessed by nnU-Net's own entry points.

    Plans: nnUNetPlans and nnUNetResEncUNetMPlans with 2d and 3d_fullres; nnUNetPlans also with 2d_small and 3d_small,
    which train for one short epoch. All tests share it: trainings write to results folders of their own.
    """
    from helpers.shared_folders import plan_phantoms, shared_folder
    from nnunet_xattnres.nnunet.commands import NnUNet

    with shared_folder(tmp_path_factory, "nnunet", plan_phantoms) as workdir:
        yield NnUNet(workdir, "cpu")


@pytest.fixture(scope="session")
def trained_model(nnunet: NnUNet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The model folder of nnUNetTrainerXAttnRes with 2d_small: fold 0 is trained, fold 1 differs from it at random."""
    from helpers.shared_folders import PHANTOM, shared_folder, train_two_folds

    with shared_folder(tmp_path_factory, "trained", lambda results: train_two_folds(nnunet, results)) as results:
        yield results / PHANTOM / "nnUNetTrainerXAttnRes__nnUNetPlans__2d_small"


@pytest.fixture
def nnunet_environment(nnunet: NnUNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NnUNet:
    """The environment variables of `nnunet` in this process; results go to a folder of the test's own.

    Trainings augment their data in this process.
    """
    folders = nnunet.folders() | {"nnUNet_results": str(tmp_path / "results")}
    for name, value in (folders | {"nnUNet_n_proc_DA": "0"}).items():
        monkeypatch.setenv(name, value)
    return nnunet
