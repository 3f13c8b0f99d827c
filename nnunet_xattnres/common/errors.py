"""Mistakes that a user can mend, and what their messages are made of."""

import difflib
from collections.abc import Iterable, Mapping
from textwrap import shorten
from traceback import format_exception_only
from typing import Any


class XAttnResError(ValueError):
    """A mistake that its reader can mend: the message is one line that says what is wrong and what to do."""


def one_line(text: str) -> str:
    return " ".join(text.split())


def reason(error: BaseException) -> str:
    """What an error says, without its place and in one line."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def type_and_message(error: BaseException) -> str:
    """One line. What PyTorch adds on debugging is cut off."""
    return shorten(format_exception_only(error)[-1], width=240, placeholder=" ...")


def suggestion(name: str, known: Iterable[str], likeness: float = 0.4) -> str:
    """A question that names what `name` may have been meant to be; empty where nothing is as near as `likeness`."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=likeness)
    return f"did you mean {', '.join(near)}?" if near else ""


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """What differs, by name; a name that one of the two lacks counts as None. Empty where nothing does."""
    names = dict.fromkeys([*here, *there])
    return ", ".join(
        f"{name}={there.get(name)!r} (here {here.get(name)!r})" for name in names if there.get(name) != here.get(name)
    )
