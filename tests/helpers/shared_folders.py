"""Folders that are made once per run of pytest and read by all workers of pytest-xdist."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from nnunetv2.utilities.crossval_split import generate_crossval_split

from helpers.in_process import InProcess
from helpers.phantom_dataset import ONE_SHORT_EPOCH, PHANTOM, plans_file, read_plans
from helpers.training import train
from nnunet_xattnres.common.files import write_json_atomically
from nnunet_xattnres.common.processes import environment_with
from nnunet_xattnres.nnunet.commands import NnUNet
from nnunet_xattnres.nnunet.derived_configurations import add_small_configuration
from nnunet_xattnres.nnunet.phantom import write_phantom_dataset
from nnunet_xattnres.training.checkpoint import FINAL_CHECKPOINT


@contextmanager
def shared_folder(temporary_folders: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Iterator[Path]:
    """A folder that the first worker fills with `make`, while the others wait for it.

    Nothing may be written to it afterwards: an error at the end says what has changed.
    """
    place = temporary_folders.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        place = place.parent  # every worker has a folder of its own in it
    folder, record = place / name, place / f"{name}.json"
    with FileLock(place / f"{name}.lock"):
        if not record.exists():
            shutil.rmtree(folder, ignore_errors=True)
            make(folder)
            record.write_text(json.dumps(_sizes_and_times(folder)))
    yield folder
    before, now = json.loads(record.read_text()), _sizes_and_times(folder)
    changed = [file for file in before | now if before.get(file) != now.get(file)]
    assert not changed, f"tests have written to {folder}, which others read: {changed}"


def _sizes_and_times(folder: Path) -> dict[str, list[int]]:
    files = {file: file.stat() for file in folder.rglob("*") if file.is_file()}
    return {str(file.relative_to(folder)): [stat.st_size, stat.st_mtime_ns] for file, stat in files.items()}


def plan_phantoms(workdir: Path) -> None:
    """Fill a working directory as the fixture `nnunet` describes it."""
    nnunet = InProcess(workdir, "cpu")
    write_phantom_dataset(nnunet.raw / PHANTOM, num_cases=6, seed=0)
    nnunet.run("nnUNetv2_plan_and_preprocess", "-d", "901", "-c", "2d", "3d_fullres", "-npfp", "2", log="plan")
    nnunet.run("nnUNetv2_plan_experiment", "-d", "901", "-pl", "nnUNetPlannerResEncM", log="plan_resenc")
    plans = read_plans(nnunet)
    for name, base in (("2d_small", "2d"), ("3d_small", "3d_fullres")):
        add_small_configuration(
            plans, name, base, base_features=4, max_patch_voxels=64**3, batch_size=2, budget=ONE_SHORT_EPOCH
        )
    write_json_atomically(plans, plans_file(nnunet))
    cases = [f"phantom_{case:03d}" for case in range(6)]
    # Otherwise the first training would write it.
    write_json_atomically(generate_crossval_split(cases), plans_file(nnunet).with_name("splits_final.json"))


def train_two_folds(nnunet: NnUNet, results: Path) -> None:
    """Fill a results folder as the fixture `trained_model` describes it."""
    own = {"nnUNet_results": str(results), "nnUNet_n_proc_DA": "0"}
    with environment_with(**nnunet.folders() | own):
        fold_0 = Path(train(PHANTOM, "2d_small", "nnUNetTrainerXAttnRes").output_folder)
    checkpoint = torch.load(fold_0 / FINAL_CHECKPOINT, weights_only=False)
    torch.manual_seed(0)
    for weight in checkpoint["network_weights"].values():
        weight += 0.1 * torch.randn_like(weight)
    fold_1 = fold_0.with_name("fold_1")
    fold_1.mkdir()
    torch.save(checkpoint, fold_1 / FINAL_CHECKPOINT)
