"""Errors that users can correct, and the parts of their messages."""

import difflib
from collections.abc import Iterable, Mapping
from textwrap import shorten
from traceback import format_exception_only
from typing import Any


class XAttnResError(ValueError):
    """A mistake that the user can correct. The message is one line: what is wrong and what to do."""


def one_line(text: str) -> str:
    """The text with every run of white space, line breaks included, replaced by one space."""
    return " ".join(text.split())


def reason(error: BaseException) -> str:
    """The error's message in one line, without a file name. Its type where it has no message."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def type_and_message(error: BaseException) -> str:
    """The error's type and message in one line. PyTorch's hints on debugging are cut off."""
    return shorten(format_exception_only(error)[-1], width=240, placeholder=" ...")


def suggestion(name: str, known: Iterable[str], likeness: float = 0.4) -> str:
    """A question that suggests up to three known names. Empty if none of them is as similar as `likeness`."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=likeness)
    return f"did you mean {', '.join(near)}?" if near else ""


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """The values that differ, by name. A missing name counts as None. Empty if nothing differs."""
    names = dict.fromkeys([*here, *there])
    return ", ".join(
        f"{name}={there.get(name)!r} (here {here.get(name)!r})" for name in names if there.get(name) != here.get(name)
    )
