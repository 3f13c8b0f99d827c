"""The feature matrix as a Markdown table, from pytest's reports: a plugin of pytest's.

A test belongs to the row that its mark `feature` names; a parameter `configuration` makes that several rows, and a
parameter `column` says which column it is in.
"""

from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from integration.raw_datasets import HIPPOCAMPUS, NUM_TEST, NUM_TRAINING, ULTRASOUND

OUTCOMES = ("failed", "skipped", "passed")


class Cell(NamedTuple):
    """row: the feature. column: the label scenario and trainer, or "" for a feature that is tried once."""

    row: str
    column: str
    column_number: int


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--table", type=Path, help="write the feature matrix, as Markdown, to this file")


def pytest_itemcollected(item: pytest.Item) -> None:
    """Note the cell that a test belongs to. Reports carry it along, from other processes too."""
    mark = item.get_closest_marker("feature")
    if mark is not None:
        call = getattr(item, "callspec", None)
        parameters, numbers = (call.params, call.indices) if call else ({}, {})
        row = ": ".join([mark.args[0], *filter(None, [parameters.get("configuration")])])
        cell = Cell(row, parameters.get("column", ""), numbers.get("column", 0))
        item.user_properties.append(("cell", list(cell)))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if "feature" not in config.getoption("markexpr").split():
        return
    table = markdown(report for reports in terminalreporter.stats.values() for report in reports)
    data = ", ".join(
        f"{name}: {'real cases' if folder.is_dir() else 'phantoms'}"
        for name, folder in (("hippocampus", HIPPOCAMPUS), ("ultrasound", ULTRASOUND))
    )
    versions = ", ".join(f"{package} {version(package)}" for package in ("nnunetv2", "torch", "nnunet-xattnres"))
    text = f"{table}\n{versions}; {data}; {NUM_TRAINING} training and {NUM_TEST} test cases each.\n"
    terminalreporter.section("feature matrix")
    terminalreporter.write_line(text)
    path = config.getoption("table")
    if path:
        path.write_text(text)


def markdown(reports: Iterable[Any]) -> str:
    """One table for what every scenario goes through, one for the rest."""
    results = cell_results(reports)
    in_columns = sorted({(cell.column_number, cell.column) for cell in results if cell.column})
    scenarios = [column for _, column in in_columns]
    by_place = {(cell.row, cell.column): result for cell, result in results.items()}
    parts = []
    for columns, heads in ((scenarios, scenarios), ([""], ["result"])):
        rows = list(dict.fromkeys(cell.row for cell in results if cell.column in columns))
        if rows:
            lines = [["feature", *heads], ["---"] * (1 + len(columns))]
            lines += [[row, *(by_place.get((row, column), "") for column in columns)] for row in rows]
            parts.append("".join(f"| {' | '.join(line)} |\n" for line in lines))
    return "\n".join(parts)


def cell_results(reports: Iterable[Any]) -> dict[Cell, str]:
    """What is written into a cell: the worst phase of its tests, or what they have recorded as their result."""
    outcomes: dict[Cell, str] = {}
    recorded: dict[Cell, str] = {}
    for report in reports:
        properties = dict(getattr(report, "user_properties", ()))
        if "cell" in properties:
            cell = Cell(*properties["cell"])
            outcomes[cell] = min(outcomes.get(cell, "passed"), report.outcome, key=OUTCOMES.index)
            recorded[cell] = properties.get("result", "")
    return {
        cell: outcome.upper() if outcome == "failed" else recorded[cell] or outcome
        for cell, outcome in outcomes.items()
    }
