"""Files and folders that are written as a whole or not at all, and JSON."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from nnunet_xattnres.common.errors import XAttnResError, reason


@contextmanager
def written_atomically(path: Path) -> Iterator[Path]:
    """A temporary path to write to. It becomes `path` at the end, so that nobody ever sees half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text_atomically(text: str, path: Path) -> None:
    with written_atomically(path) as temporary:
        temporary.write_text(text)


@contextmanager
def folder_written_atomically(path: Path) -> Iterator[Path]:
    """A temporary folder to fill, which becomes `path` at the end.

    `path` may be there already if it is empty. It stays the folder that it is then, for it may be a link, a mount point
    or the current one: what the temporary folder holds is moved into it.

    Raises `OSError` where it cannot be written, or where `path` has been filled meanwhile.
    """
    path = path.resolve()
    parent = next(folder for folder in (path, *path.parents) if folder.is_dir())
    temporary = parent / f".{path.name}.{os.getpid()}.tmp"
    # A killed process with the same number may have left a folder.
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        if parent == path:
            _move_entries(temporary, path)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _move_entries(source: Path, target: Path) -> None:
    """All of them or none. source: the only thing in `target`."""
    if list(target.iterdir()) != [source]:
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), os.fspath(target))
    names = os.listdir(source)
    try:
        for name in names:
            os.replace(source / name, target / name)
    except BaseException:
        for name in names:
            if (target / name).exists():
                os.replace(target / name, source / name)
        raise


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
        content = json.loads(path.read_text())
    except OSError as error:
        raise XAttnResError(f"cannot read {path} ({error.strerror}): {remedy}") from None
    except ValueError as error:
        raise XAttnResError(f"{path} is not valid JSON ({error}): {remedy}") from None
    if not isinstance(content, dict):
        raise XAttnResError(f"{path} holds no JSON object: {remedy}")
    return content
