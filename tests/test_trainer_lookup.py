"""`find_trainer`: the class behind a name, or one line."""

import pytest

from nnunet_xattnres.errors import XAttnResError
from nnunet_xattnres.trainer_lookup import find_trainer


@pytest.mark.parametrize("content", ["raise ValueError('no licence')", "import sys\nsys.exit('no licence')"])
def test_a_file_in_the_way(monkeypatch, tmp_path, content):
    (tmp_path / "a_broken.py").write_text(content)
    monkeypatch.setenv("nnUNet_extTrainer", str(tmp_path))
    with pytest.raises(XAttnResError) as error:
        find_trainer("nnUNetTrainerXAttnRes")
    assert str(error.value) == "nnU-Net cannot load trainer nnUNetTrainerXAttnRes: no licence"
