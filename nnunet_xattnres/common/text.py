"""Plain text for the terminal."""

import shlex
from pathlib import Path


def shell_command(*words: str | Path) -> str:
    """The words as a command that can be pasted into a shell: each is quoted if it needs to be."""
    return shlex.join(map(str, words))


def align_columns(rows: list[list[str]]) -> str:
    """One line per row. The first column is aligned to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )
