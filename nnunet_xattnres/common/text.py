"""Plain text for the terminal."""

import re
import shlex
from pathlib import Path

# A name that becomes part of folder names, in which nnU-Net separates by two underscores.
NAME = re.compile(r"(?!.*__)[A-Za-z0-9][A-Za-z0-9_.-]*")
NAME_RULE = "use letters, digits, points, dashes and single underscores"


def shell_command(*words: str | Path) -> str:
    """The words as a command that can be pasted into a shell: each is quoted if it needs to be."""
    return shlex.join(map(str, words))


def counted(number: int, noun: str) -> str:
    """The number with the noun: "1 case", "2 cases"."""
    return f"{number} {noun}{'s' * (number != 1)}"


def align_columns(rows: list[list[str]]) -> str:
    """One line per row. The first column is aligned to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )
