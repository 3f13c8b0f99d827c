"""Plain text for the terminal."""


def align_columns(rows: list[list[str]]) -> str:
    """A line per row, the first column on the left, the others on the right of their width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )
