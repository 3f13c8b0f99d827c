"""Reading checkpoints that nnU-Net did not write, that are no checkpoints, or that cannot be read now."""

import resource
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from helpers.memory import limited
from nnunet_xattnres.common.errors import XAttnResError
from nnunet_xattnres.training.checkpoint import read_checkpoint, read_checkpoint_as_nnunet

CONTENT: dict[str, Any] = {
    "trainer_name": "nnUNetTrainer",
    "init_args": {"fold": 0},
    "network_weights": {"weight": torch.arange(6.0)},
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "checkpoint_final.pth"


def complaint(path: Path, trusted: bool | None = None) -> str:
    with pytest.raises(XAttnResError) as error:
        read_checkpoint(path, "delete it", trusted)
    assert "\n" not in str(error.value)
    return str(error.value)


class TestWhatCannotBeReadNow:
    """The file may be whole: nobody is told to delete it."""

    def test_a_folder(self, path):
        path.mkdir()
        assert complaint(path) == f"cannot read {path} (Is a directory): mend that and run again"

    def test_a_link_to_itself(self, path):
        path.symlink_to(path)
        assert complaint(path) == f"cannot read {path} (Too many levels of symbolic links): mend that and run again"

    def test_too_little_memory_to_map_it(self, path):
        torch.save(CONTENT | {"network_weights": {"weight": torch.zeros(2**24)}}, path)
        with limited(resource.RLIMIT_AS, psutil.Process().memory_info().vms + 2**25):
            message = complaint(path)
        assert message.startswith(f"cannot read {path} (unable to mmap ")
        assert message.endswith("Cannot allocate memory (12)): mend that and run again")
        assert read_checkpoint(path, "")["trainer_name"] == "nnUNetTrainer"

    @pytest.mark.parametrize(
        "error, what", [(MemoryError(), "MemoryError"), (PermissionError(13, "Permission denied"), "Permission denied")]
    )
    def test_while_it_is_read(self, path, monkeypatch, error, what):
        def refuse(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(torch, "load", refuse)
        assert complaint(path) == f"cannot read {path} ({what}): mend that and run again"


class TestOtherFiles:
    def test_pytorchs_older_format_is_read(self, path):
        torch.save(CONTENT, path, _use_new_zipfile_serialization=False)
        read = read_checkpoint(path, "delete it")
        assert torch.equal(read["network_weights"]["weight"], CONTENT["network_weights"]["weight"])

    @pytest.mark.parametrize("new_format", [True, False])
    @pytest.mark.parametrize("left", [0, 0.1, 0.5, 0.95])
    def test_a_truncated_one_is_damaged(self, path, new_format, left):
        larger = CONTENT | {"network_weights": {"weight": torch.zeros(10_000)}}
        torch.save(larger, path, _use_new_zipfile_serialization=new_format)
        path.write_bytes(path.read_bytes()[: int(left * path.stat().st_size)])
        assert f"{path} is damaged or no nnU-Net checkpoint (" in complaint(path)
        assert complaint(path).endswith("): delete it")

    def test_text_is_no_checkpoint(self, path):
        path.write_text("no checkpoint")
        assert complaint(path) == f"{path} is damaged or no nnU-Net checkpoint (not written by torch.save): delete it"

    @pytest.mark.parametrize(
        "foreign, what",
        [
            ({"trainer_name": None}, "trainer_name is no str"),
            ({"init_args": [1]}, "init_args is no dict"),
            ({"network_weights": [1, 2]}, "network_weights is no dict"),
            ({"network_weights": {"a": 3}}, "a in network_weights is no tensor"),
            *(
                ({"init_args": {"xattnres": record}}, "xattnres in init_args is not what our trainers store")
                for record in ({"config": {}}, {"version": 1, "config": {}}, {"version": "1", "config": []}, "1")
            ),
        ],
    )
    def test_the_right_keys_with_other_things(self, path, foreign, what):
        torch.save(CONTENT | foreign, path)
        assert complaint(path) == f"{path} is damaged or no nnU-Net checkpoint ({what}): delete it"

    @pytest.mark.parametrize(
        "content, found",
        [
            ([1], "a list; nnU-Net's trainers store a dict"),
            ({}, "a dict with no keys; nnU-Net's trainers also store trainer_name, init_args, network_weights"),
            (
                CONTENT["network_weights"],
                "a bare state dict of 1 tensors; nnU-Net's trainers also store trainer_name, init_args, "
                "network_weights",
            ),
            (
                {"epoch": 3, "state_dict": {}, "pytorch-lightning_version": "2.5.0"},
                "a checkpoint of PyTorch Lightning; nnU-Net's trainers also store trainer_name, init_args, "
                "network_weights",
            ),
            (
                {"network_weights": {}, "citations": [], "nnssl_adaptation_plan": {}},
                "a pretrained encoder of nnssl; nnU-Net's trainers also store trainer_name, init_args",
            ),
            (
                {"epoch": 3, "state_dict": {}},
                "a dict with epoch, state_dict; nnU-Net's trainers also store trainer_name, init_args, network_weights",
            ),
        ],
    )
    def test_files_of_other_tools_are_told_by_what_they_hold(self, path, content, found):
        torch.save(content, path)
        assert complaint(path) == f"{path} is no nnU-Net checkpoint, but {found}: delete it"

    @pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
    def test_names_of_wrappers_are_removed_from_keys(self, path, prefix):
        torch.save(CONTENT | {"network_weights": {f"{prefix}module_0.weight": torch.zeros(1)}}, path)
        assert read_checkpoint(path, "delete it")["network_weights"].keys() == {"module_0.weight"}


class TestWhatNeedsTrust:
    STORES_MORE = CONTENT | {"extra": Path("here")}

    def test_the_option_is_named_where_there_is_one(self, path):
        torch.save(self.STORES_MORE, path)
        problem = "that nnU-Net does not store and that may run any code when it is read"
        assert problem in complaint(path)
        assert complaint(path).endswith(": let its trainer store numbers and tensors only")
        assert complaint(path, trusted=False).endswith(", or add --trust-checkpoint if you trust its origin")

    def test_what_nnunet_reads_anyway_is_read_without_a_word(self, path, capsys):
        torch.save(self.STORES_MORE, path)
        assert read_checkpoint_as_nnunet(path, "delete it", "find it")["extra"] == Path("here")
        assert capsys.readouterr().out == ""
        assert read_checkpoint(path, "delete it", trusted=True)["extra"] == Path("here")
        assert capsys.readouterr().out == f"{path} is trusted and read without restrictions\n"
