"""`find_trainer`: the class behind a name, or one line."""

import pytest

from nnunet_xattnres.common.errors import XAttnResError
from nnunet_xattnres.nnunet.trainer_lookup import find_trainer


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
