"""Files that are there whole or not at all, and folders that can be written to."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

from nnunet_xattnres.errors import XAttnResError


@contextmanager
def written_atomically(path: Path) -> Iterator[Path]:
    """A temporary path to write to, which becomes `path` at the end: nobody, and no interruption, sees half a file."""
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
    """A temporary folder to fill, which becomes `path` at the end; `path` may be there already if it is empty."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def make_writable_folder(folder: Path, option: str) -> None:
    """Make the folder if it is not there. Raises `XAttnResError` where nothing can be written, naming its option."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise XAttnResError(f"cannot write to {folder} ({error.strerror}): choose another {option}") from None
