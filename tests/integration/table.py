"""The feature matrix as a Markdown table, from pytest's reports."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pytest

OUTCOMES = ("failed", "skipped", "passed")


@dataclass(frozen=True)
class Cell:
    """row: the feature. column: the label scenario and trainer, or "" for a feature that is tried once."""

    row: str
    column: str

    @classmethod
    def of(cls, item: Any) -> "Cell":
        parameters = dict(item.callspec.params) if hasattr(item, "callspec") else {}
        column = parameters.pop("scenario", "")
        feature = item.function.__doc__.split("\n")[0].rstrip(".")
        return cls(": ".join([feature, *map(str, parameters.values())]), column)


def markdown(reports: Iterable[Any]) -> str:
    """One table for what every scenario goes through, one for the rest. Empty without any cell."""
    results = cell_results(reports)
    scenarios = list(dict.fromkeys(cell.column for cell in results if cell.column))
    parts = []
    for columns, heads in ((scenarios, scenarios), ([""], ["result"])):
        rows = list(dict.fromkeys(cell.row for cell in results if cell.column in columns))
        if rows:
            lines = [["feature", *heads], ["---"] * (1 + len(columns))]
            lines += [[row, *(results.get(Cell(row, column), "") for column in columns)] for row in rows]
            parts.append("".join(f"| {' | '.join(line)} |\n" for line in lines))
    return "\n".join(parts)


def cell_results(reports: Iterable[Any]) -> dict[Cell, str]:
    """What is written into a cell: the worst of its test's phases, and what the test has recorded as its result."""
    outcomes: dict[Cell, str] = {}
    recorded: dict[Cell, str] = {}
    for report in reports:
        if not isinstance(report, pytest.TestReport):
            continue
        properties = dict(report.user_properties)
        if "cell" in properties:
            cell = properties["cell"]
            outcomes[cell] = min(outcomes.get(cell, "passed"), report.outcome, key=OUTCOMES.index)
            recorded[cell] = properties.get("result", "")
    return {
        cell: outcome.upper() if outcome == "failed" else recorded[cell] or outcome
        for cell, outcome in outcomes.items()
    }
