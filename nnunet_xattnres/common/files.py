"""Files and folders that are written as a whole or not at all, and JSON."""

import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile, mkdtemp
from typing import Any

from nnunet_xattnres.common.errors import XAttnResError, reason

# What is temporary is beside its final place, under a new name: processes on several machines may share a folder.
TEMPORARY_PREFIX = ".nnunet_xattnres_"


@contextmanager
def written_atomically(path: Path) -> Iterator[Path]:
    """A temporary path to write to. It becomes `path` at the end, so that nobody ever sees half a file."""
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{secrets.token_hex(4)}_{path.name}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text_atomically(text: str, path: Path) -> None:
    with written_atomically(path) as temporary:
        temporary.write_text(text, "utf-8")


@contextmanager
def temporary_folder(parent: Path, name: str | None = None) -> Iterator[Path]:
    """An empty folder inside `parent`, removed at the end. Finished results are moved from it to their final places.

    The final places are on the same file system, so moving is renaming.

    parent: made if it does not exist. If nothing else is in it at the end, it is removed again.
    name: of the folder. What a killed process has left under this name is removed first. None: a new name, so that
        several processes can work in `parent` at the same time.

    Raises `OSError` if nothing can be written to `parent`.
    """
    new = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    temporary = None if name is None else parent / name
    try:
        parent.mkdir(parents=True, exist_ok=True)
        if temporary is None:
            temporary = Path(mkdtemp(prefix=TEMPORARY_PREFIX, dir=parent))
        else:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
        yield temporary
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        for folder in new:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


@contextmanager
def files_written_atomically(path: Path) -> Iterator[Path]:
    """A path in a temporary folder, with the name of `path`. What is written into the folder is moved at the end.

    The file at the temporary path, if there is one, is moved last. After an error, nothing is moved.
    """
    with temporary_folder(path.parent) as folder:
        yield folder / path.name
        written = [file for file in folder.rglob("*") if file.is_file()]
        for file in sorted(written, key=lambda file: file.name == path.name):
            target = path.parent / file.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes have left of temporary files and folders. Nobody else may write to `folder` now."""
    for left in folder.glob(f"{TEMPORARY_PREFIX}*"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


@contextmanager
def folder_written_atomically(path: Path) -> Iterator[Path]:
    """A temporary folder to fill, which becomes `path` at the end.

    `path` may exist if it is empty. It is then kept, because it can be a link, a mount point or the current folder: the
    content of the temporary folder is moved into it.

    Raises `OSError` if it cannot be written, or if `path` has been filled meanwhile.
    """
    path = path.resolve()
    exists = path.is_dir()
    with temporary_folder(path if exists else path.parent) as temporary:
        filled = temporary / path.name
        filled.mkdir()
        yield filled
        if exists:
            _move_entries(filled, path)
        else:
            os.replace(filled, path)


def _move_entries(filled: Path, target: Path) -> None:
    """Move all entries or none. `target` must hold nothing but the folder that `filled` is in."""
    if list(target.iterdir()) != [filled.parent]:
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), os.fspath(target))
    names = os.listdir(filled)
    try:
        for name in names:
            os.replace(filled / name, target / name)
    except BaseException:
        for name in names:
            if (target / name).exists():
                os.replace(target / name, filled / name)
        raise


def link_or_copy(source: Path, place: Path) -> None:
    """Make `place` a link to a file or a folder, or a copy where links are not allowed, as on Windows by default."""
    try:
        place.symlink_to(source)
    except OSError:
        if source.is_dir():
            shutil.copytree(source, place)
        else:
            shutil.copy(source, place)


def check_writable(folder: Path, option: str) -> None:
    """Raise `XAttnResError`, which names `option`, if the folder cannot be written to or made."""
    if problem := why_not_writable(folder):
        raise XAttnResError(f"cannot write to {folder} ({problem}): choose another {option}")


def why_not_writable(folder: Path) -> str | None:
    """The reason why the folder cannot be written to or, if it does not exist, be made. None if it can."""
    try:
        there = next(place for place in (folder, *folder.parents) if place.exists())
        with TemporaryFile(dir=there):
            return None
    except OSError as error:
        return reason(error)


def make_writable_folder(folder: Path, option: str) -> None:
    """Make the folder if it does not exist. Raises `XAttnResError`, naming the option, if it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        problem = why_not_writable(folder)
    except OSError as error:
        problem = reason(error)
    if problem:
        raise XAttnResError(f"cannot write to {folder} ({problem}): choose another {option}")


def write_json_atomically(content: Any, path: Path) -> None:
    """Write the content as JSON, indented."""
    write_text_atomically(json.dumps(content, indent=4), path)


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """Read a JSON object. Raises `XAttnResError`, with the remedy, if the file is missing, unreadable or no object."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise XAttnResError(f"cannot read {path} ({error.strerror}): {remedy}") from None
    except ValueError as error:
        raise XAttnResError(f"{path} is not valid JSON ({error}): {remedy}") from None
    if not isinstance(content, dict):
        raise XAttnResError(f"{path} holds no JSON object: {remedy}")
    return content
