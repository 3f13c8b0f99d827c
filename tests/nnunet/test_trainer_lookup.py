"""`find_trainer`: the class behind a name, or one line."""

import os
import re
from pathlib import Path

import pytest

import nnunet_xattnres
from nnunet_xattnres.benchmark.spec import Arm
from nnunet_xattnres.benchmark.spec_check import _check_arm
from nnunet_xattnres.cli import main
from nnunet_xattnres.common.errors import XAttnResError
from nnunet_xattnres.nnunet.trainer_lookup import find_trainer
from nnunet_xattnres.tools.demo import check_trainer


@pytest.mark.parametrize(
    "content, reason",
    [
        ("raise ValueError('no licence')", "ValueError: no licence"),
        ("raise RuntimeError('no licence')", "RuntimeError: no licence"),
        ("raise ValueError", "ValueError"),
        ("import sys\nsys.exit(3)", "SystemExit: 3"),
    ],
)
def test_a_file_in_the_way(monkeypatch, tmp_path, content, reason):
    broken = tmp_path / "a_broken.py"
    broken.write_text(content)
    monkeypatch.setenv("nnUNet_extTrainer", str(tmp_path))
    with pytest.raises(XAttnResError) as error:
        find_trainer("nnUNetTrainerXAttnRes")
    assert str(error.value) == (
        f"nnU-Net cannot load trainer nnUNetTrainerXAttnRes, because {broken} fails ({reason}): mend that, or remove it"
    )


@pytest.mark.parametrize("name", ["nnUNetTrainerMine", "Zyx"])
def test_a_trainer_that_is_not_found_while_the_variable_is_not_set(monkeypatch, name):
    monkeypatch.delenv("nnUNet_extTrainer", raising=False)
    with pytest.raises(XAttnResError, match=rf"no trainer {name}: .* \(nnUNet_extTrainer is not set in this shell\)$"):
        find_trainer(name)


def test_a_file_in_the_way_where_a_searched_folder_holds_this_plugin(monkeypatch, tmp_path):
    broken = tmp_path / "a_broken.py"
    broken.write_text("raise ValueError('no licence')")
    monkeypatch.setenv("nnUNet_extTrainer", f"{tmp_path}{os.pathsep}{Path(nnunet_xattnres.__file__).parents[1]}")
    with pytest.raises(XAttnResError, match=re.escape(f"because {broken} fails")):
        find_trainer("nnUNetTrainerXAttnRes")


def test_a_class_whose_bases_are_in_the_wrong_order_is_in_nobodys_way(monkeypatch, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(
        "from nnunet_xattnres.trainer import XAttnResTrainerMixin\n"
        "from nnunetv2.training.nnUNetTrainer.variants.network_architecture.nnUNetTrainerBN import nnUNetTrainerBN\n"
        "class Wrong(nnUNetTrainerBN, XAttnResTrainerMixin):\n    pass\n"
        "class Right(XAttnResTrainerMixin, nnUNetTrainerBN):\n    pass\n"
    )
    monkeypatch.setenv("nnUNet_extTrainer", str(tmp_path))
    check_trainer("Right")
    _check_arm(Arm(trainer="Right"), ())
    # The commands refuse it before they begin.
    with pytest.raises(XAttnResError, match="Wrong has nnUNetTrainerBN before XAttnResTrainerMixin"):
        check_trainer("Wrong")
    with pytest.raises(XAttnResError, match="put the mixin first"):
        _check_arm(Arm(trainer="Wrong"), ())
    assert main(["overhead", "--preset", "msd04", "--device", "cpu", "--trainer", "Wrong"]) != 0
    assert "put the mixin first" in capsys.readouterr().err
