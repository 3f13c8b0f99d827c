"""Files and folders: written as a whole or not at all, whatever interrupts the writing; JSON that is read."""

import json
import os
from pathlib import Path

import pytest

from nnunet_xattnres.common.errors import XAttnResError
from nnunet_xattnres.common.files import (
    check_writable,
    folder_written_atomically,
    link_or_copy,
    make_writable_folder,
    read_json,
    temporary_folder,
    why_not_writable,
    write_json_atomically,
    written_atomically,
)

pytestmark = pytest.mark.feature("Interrupted trainings, full disks (simulated)")


class TestFiles:
    def test_a_file_may_be_new(self, tmp_path):
        with written_atomically(tmp_path / "new.txt") as temporary:
            temporary.write_text("new")
        assert [file.read_text() for file in tmp_path.iterdir()] == ["new"]

    def test_processes_with_the_same_number_on_two_machines_may_write_it(self, tmp_path):
        with written_atomically(tmp_path / "new.txt") as first, written_atomically(tmp_path / "new.txt") as second:
            first.write_text("one")
            second.write_text("other")
        assert [file.read_text() for file in tmp_path.iterdir()] == ["one"]

    def test_on_a_full_disk_a_file_keeps_its_previous_version(self, tmp_path, monkeypatch):
        path = tmp_path / "plans.json"
        write_json_atomically({"plans": "previous"}, path)
        previous = path.read_bytes()

        def disk_full(self, text, encoding):
            self.write_bytes(text.encode()[:5])
            raise OSError("No space left on device")

        monkeypatch.setattr(Path, "write_text", disk_full)
        with pytest.raises(OSError, match="No space left"):
            write_json_atomically({"plans": "next"}, path)
        assert path.read_bytes() == previous
        assert list(tmp_path.iterdir()) == [path]

    def test_what_cannot_be_linked_is_copied(self, tmp_path, monkeypatch):
        """Windows allows links to administrators only."""

        def refuse(self, target):
            raise OSError(1314, "A required privilege is not held by the client")

        folder = tmp_path / "data"
        (folder / "images").mkdir(parents=True)
        (folder / "images" / "image").write_text("voxels")
        link_or_copy(folder, tmp_path / "link")
        assert (tmp_path / "link").is_symlink()
        monkeypatch.setattr(Path, "symlink_to", refuse)
        link_or_copy(folder, tmp_path / "copy")
        link_or_copy(folder / "images" / "image", tmp_path / "image")
        assert (tmp_path / "copy" / "images" / "image").read_text() == (tmp_path / "image").read_text() == "voxels"
        assert not (tmp_path / "copy").is_symlink()

    def test_json_is_utf_8_whatever_the_system_s_encoding(self, tmp_path, monkeypatch):
        read_text = Path.read_text
        monkeypatch.setattr(Path, "read_text", lambda path, encoding="cp1252", *_: read_text(path, encoding))
        (tmp_path / "dataset.json").write_bytes('{"name": "Œdeme ≥ 1"}'.encode())
        assert read_json(tmp_path / "dataset.json", "") == {"name": "Œdeme ≥ 1"}


class TestFolders:
    def test_a_folder_is_there_whole_or_not_at_all(self, tmp_path):
        path = tmp_path / "model"
        with pytest.raises(OSError, match="No space left"), folder_written_atomically(path) as folder:
            (folder / "plans.json").write_text("{}")
            raise OSError("No space left on device")
        assert not list(tmp_path.iterdir())
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

    def test_where_nothing_can_be_written(self, tmp_path):
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
            for refuse in (make_writable_folder, check_writable):
                with pytest.raises(XAttnResError, match=r"cannot write to .*: choose another -o"):
                    refuse(place, "-o")


class TestTemporaryFolders:
    def test_what_is_moved_out_of_it_stays(self, tmp_path):
        parent = tmp_path / "new" / "results"
        with temporary_folder(parent) as first, temporary_folder(parent) as second:
            assert first != second
            assert first.parent == second.parent == parent
            (first / "finished").touch()
            (first / "half").touch()
            (first / "finished").rename(parent / "finished")
        assert list(parent.iterdir()) == [parent / "finished"]

    def test_it_leaves_no_empty_folder_of_its_own(self, tmp_path):
        with pytest.raises(KeyError), temporary_folder(tmp_path / "new" / "results") as folder:
            (folder / "half").touch()
            raise KeyError
        assert not list(tmp_path.iterdir())
        (tmp_path / "mine").mkdir()
        with temporary_folder(tmp_path / "mine"):
            pass
        assert list(tmp_path.iterdir()) == [tmp_path / "mine"]

    def test_under_a_name_what_a_killed_process_left_is_removed(self, tmp_path):
        (tmp_path / ".staging").mkdir()
        (tmp_path / ".staging" / "half").touch()
        with temporary_folder(tmp_path, ".staging") as folder:
            assert folder == tmp_path / ".staging"
            assert not list(folder.iterdir())
        assert not list(tmp_path.iterdir())

    def test_where_nothing_can_be_written_it_is_an_error(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(OSError, match="Not a directory"), temporary_folder(tmp_path / "file" / "new"):
            pass


def test_json_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "plans.json"
    write_json_atomically({"version": 1}, path)
    with pytest.raises(TypeError):
        write_json_atomically({"version": 2, "unwritable": object()}, path)
    assert json.loads(path.read_text()) == {"version": 1}
    with path.open() as reader:
        write_json_atomically({"version": 2}, path)
        assert json.load(reader) == {"version": 1}
    assert json.loads(path.read_text()) == {"version": 2}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "content, complaint",
    [
        (None, "cannot read {path} (No such file or directory): copy it there"),
        (b"{", "{path} is not valid JSON (Expecting property name"),
        (b'"\xff"', "{path} is not valid JSON ("),
        (b"[]", "{path} holds no JSON object: copy it there"),
    ],
)
def test_json_that_cannot_be_used_is_refused_with_the_remedy(content, complaint, tmp_path):
    path = tmp_path / "plans.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(XAttnResError) as error:
        read_json(path, "copy it there")
    assert complaint.format(path=path) in str(error.value)
    assert str(error.value).endswith(": copy it there")
