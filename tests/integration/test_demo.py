"""`nnunet-xattnres demo` from beginning to end: in this process and, slow, through processes of nnU-Net's commands."""

from pathlib import Path

import matplotlib.image
import pytest

from helpers.in_process import InProcess
from helpers.training import run_in_threads
from nnunet_xattnres.nnunet import datasets, phantom
from nnunet_xattnres.nnunet.commands import NnUNet
from nnunet_xattnres.nnunet.derived_configurations import TrainingBudget
from nnunet_xattnres.tools import demo

TRAINER = "nnUNetTrainerXAttnRes"


@pytest.mark.parametrize("run_by", [pytest.param(NnUNet, marks=pytest.mark.slow), InProcess])
def test_the_demo_ends_with_a_table_and_a_picture_and_does_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], run_by: type[NnUNet]
) -> None:
    if run_by is InProcess:
        run_in_threads(NnUNet(tmp_path, "cpu"), monkeypatch)
    monkeypatch.setattr(datasets, "PHANTOM_CASES", 5)
    monkeypatch.setattr(phantom, "MEDIAN_SHAPE", (16, 24, 16))
    monkeypatch.setattr(demo, "NnUNet", run_by)
    monkeypatch.setattr(demo, "BUDGET", TrainingBudget(1, 1, 1))
    monkeypatch.setattr(demo, "BASE_FEATURES", 2)
    demo.run_demo(None, tmp_path, TRAINER, baseline=True)
    first = capsys.readouterr().out
    table = first[first.index("Dice on") :].splitlines()[2:]
    assert table[0].split() == [TRAINER, "nnUNetTrainerPlanned"]
    assert all(0 <= float(dice) <= 1 for row in table[1:4] for dice in row.split()[-2:])
    (picture,) = tmp_path.rglob("demo.png")
    assert matplotlib.image.imread(picture).std() > 0

    results = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pth")}
    demo.run_demo(None, tmp_path, TRAINER, baseline=True)
    second = capsys.readouterr().out
    assert second.count("Already there") == 8
    assert second[second.index("Dice on") :].splitlines()[2:6] == table[:4]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pth")} == results
