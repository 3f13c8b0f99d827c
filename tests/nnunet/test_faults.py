"""What interrupts a training or breaks its files, and what is left to continue from."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.phantom_dataset import PHANTOM
from helpers.training import train
from nnunet_xattnres.common.errors import XAttnResError
from nnunet_xattnres.common.files import (
    folder_written_atomically,
    make_writable_folder,
    why_not_writable,
    write_json_atomically,
    written_atomically,
)
from nnunet_xattnres.routing.recording import RECORD, RoutingHistory

pytestmark = pytest.mark.feature("Interrupted trainings, full disks (simulated)")

MORTAL = """
import os
import signal
from pathlib import Path

import torch

from nnunet_xattnres.training.mixin import XAttnResTrainerMixin


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def die_while_writing(checkpoint, filename):
    Path(filename).write_bytes(b"half a checkpoint")
    die()


class nnUNetTrainerMortal(XAttnResTrainerMixin):
    def __init__(self, plans, configuration, fold, dataset_json, device=torch.device("cuda")):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = 3
        self.save_every = 1

    def train_step(self, batch):
        result = super().train_step(batch)
        if self.current_epoch == 1:
            dies_at = os.environ.get("DIES_AT")
            if dies_at == "training":
                die()
            elif dies_at == "writing":
                torch.save = die_while_writing
        return result
"""


def test_a_killed_training_continues_and_ends(nnunet_environment, tmp_path, monkeypatch):
    trainers = tmp_path / "trainers"
    trainers.mkdir()
    (trainers / "nnUNetTrainerMortal.py").write_text(MORTAL)
    monkeypatch.setenv("nnUNet_extTrainer", str(trainers))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    fold = Path(os.environ["nnUNet_results"], PHANTOM, "nnUNetTrainerMortal__nnUNetPlans__2d_small", "fold_0")
    what = (PHANTOM, "2d_small", "nnUNetTrainerMortal")
    script = Path(__file__).parents[1] / "helpers" / "training.py"
    checkpoints = []
    for dies_at, resume in (("training", ""), ("writing", "--c")):
        environment = os.environ | {"DIES_AT": dies_at}
        ended = subprocess.run([sys.executable, str(script), *what, resume], env=environment)
        assert ended.returncode == -signal.SIGKILL
        checkpoints.append((fold / "checkpoint_latest.pth").read_bytes())
    assert checkpoints[0] == checkpoints[1]
    assert (fold / "checkpoint_latest.pth.tmp").read_bytes() == b"half a checkpoint"
    finished = train(*what, resume=True)
    assert len(finished.logger.get_value("train_losses", None)) == 3
    assert list(RoutingHistory.read(fold / RECORD).epochs) == [0, 1, 2]
    assert (fold / "checkpoint_final.pth").is_file()
    assert not list(fold.glob("*.tmp"))


class TestFullDisk:
    def test_a_file_keeps_its_previous_version(self, tmp_path, monkeypatch):
        path = tmp_path / "plans.json"
        write_json_atomically({"plans": "previous"}, path)
        previous = path.read_bytes()

        def disk_full(self, text):
            self.write_bytes(text.encode()[:5])
            raise OSError("No space left on device")

        monkeypatch.setattr(Path, "write_text", disk_full)
        with pytest.raises(OSError, match="No space left"):
            write_json_atomically({"plans": "next"}, path)
        assert path.read_bytes() == previous
        assert list(tmp_path.iterdir()) == [path]

    def test_a_folder_is_there_whole_or_not_at_all(self, tmp_path):
        path = tmp_path / "model"
        with pytest.raises(OSError, match="No space left"), folder_written_atomically(path) as folder:
            (folder / "plans.json").write_text("{}")
            raise OSError("No space left on device")
        assert not list(tmp_path.iterdir())
        # Of a process that was killed, whose number this one has.
        (tmp_path / f".model.{os.getpid()}.tmp").mkdir()
        (tmp_path / f".model.{os.getpid()}.tmp" / "half").touch()
        with folder_written_atomically(path) as folder:
            (folder / "plans.json").write_text("{}")
        assert [file.name for file in path.iterdir()] == ["plans.json"]
        with pytest.raises(OSError, match="not empty"), folder_written_atomically(path) as folder:
            (folder / "plans.json").write_text("other")
        assert [(file.name, file.read_text()) for file in path.iterdir()] == [("plans.json", "{}")]

    def test_folders_above_it_are_not_left_either(self, tmp_path):
        path = tmp_path / "new" / "model"
        with pytest.raises(OSError, match="No space left"), folder_written_atomically(path):
            raise OSError("No space left on device")
        assert not list(tmp_path.iterdir())
        with folder_written_atomically(path) as folder:
            (folder / "plans.json").write_text("{}")
        assert [file.name for file in path.iterdir()] == ["plans.json"]

    def test_an_empty_folder_stays_the_same_folder(self, tmp_path):
        folder, link = tmp_path / "model", tmp_path / "link"
        folder.mkdir()
        link.symlink_to(folder)
        inode = folder.stat().st_ino
        with folder_written_atomically(link) as temporary:
            (temporary / "plans.json").write_text("{}")
            (temporary / "fold_0").mkdir()
        assert link.is_symlink()
        assert folder.stat().st_ino == inode
        assert sorted(file.name for file in folder.iterdir()) == ["fold_0", "plans.json"]
        assert sorted(file.name for file in tmp_path.iterdir()) == ["link", "model"]

    def test_an_empty_folder_is_filled_whole_or_not_at_all(self, tmp_path, monkeypatch):
        moved = []
        replace = os.replace

        def fail_at_the_second(source, target):
            moved.append(target)
            if len(moved) == 2:
                raise OSError("Input/output error")
            replace(source, target)

        monkeypatch.setattr(os, "replace", fail_at_the_second)
        with pytest.raises(OSError, match="Input/output"), folder_written_atomically(tmp_path) as folder:
            for name in ("a", "b", "c"):
                (folder / name).touch()
        assert not list(tmp_path.iterdir())

    def test_who_cannot_write_where(self, tmp_path):
        file = tmp_path / "file"
        file.touch()
        assert why_not_writable(tmp_path) is None
        assert why_not_writable(tmp_path / "new" / "folder") is None
        assert why_not_writable(file) == why_not_writable(file / "new") == "Not a directory"
        assert why_not_writable(tmp_path / ("long" * 100)) == "File name too long"
        assert list(tmp_path.iterdir()) == [file]
        make_writable_folder(tmp_path / "new" / "folder", "-o")
        assert (tmp_path / "new" / "folder").is_dir()
        for place in (file, file / "new"):
            with pytest.raises(XAttnResError, match=r"cannot write to .*: choose another -o"):
                make_writable_folder(place, "-o")

    def test_a_file_may_be_new(self, tmp_path):
        with written_atomically(tmp_path / "new.txt") as temporary:
            temporary.write_text("new")
        assert [file.read_text() for file in tmp_path.iterdir()] == ["new"]
