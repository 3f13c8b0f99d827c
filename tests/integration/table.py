"""The feature matrix as a Markdown table, from pytest's reports: a plugin of pytest's.

A test belongs to the row that its mark `feature` names; a parameter `configuration` makes that several rows. Its class
may have a `column`.
"""

from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from integration.real_data import HIPPOCAMPUS, NUM_TEST, NUM_TRAINING, ULTRASOUND

TITLE = """# The feature matrix

`make test-slow TABLE=docs/feature_matrix.md` has written this: what nnU-Net does, tried with this plugin's trainers,
networks and trainings of a size for two CPU cores. Everything ran on a CPU. `-num_gpus` was tried as two CPU processes.

The first table, and what has a number in the second, is nnU-Net's own commands with `-tr nnUNetTrainerXAttnRes`
(NoSkip: `nnUNetTrainerXAttnResNoSkip`). A column is a kind of labels: plain ones (standard), regions, with an ignore
label, both. The other rows of the second table are tests that the mark `feature` gives that name: short trainings of
these and other trainers on generated data, some of them without the commands.

A number is the mean foreground Dice on the validation or test cases, in brackets chance: what the segmentation of
another case scores at a random place. It must be exceeded; beyond that the numbers say nothing about the method.

"""
OUTCOMES = ("failed", "skipped", "passed")


class Cell(NamedTuple):
    """row: the feature. column: the label scenario and trainer, or "" for a feature that is tried once."""

    row: str
    column: str


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--table", type=Path, help="write the feature matrix, as Markdown, to this file")


def pytest_itemcollected(item: pytest.Function) -> None:
    """Note the cell that a test belongs to. Reports carry it along, from other processes too."""
    mark = item.get_closest_marker("feature")
    if mark is not None:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        row = ": ".join([mark.args[0], *filter(None, [parameters.get("configuration")])])
        column = mark.kwargs.get("column", getattr(item.cls, "column", ""))
        item.user_properties.append(("cell", list(Cell(row, column))))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if "feature" not in config.getoption("markexpr").split():
        return
    table = markdown(report for reports in terminalreporter.stats.values() for report in reports)
    data = ", ".join(
        f"{name}: {'real cases' if folder.is_dir() else 'phantoms'}"
        for name, folder in (("hippocampus", HIPPOCAMPUS), ("ultrasound", ULTRASOUND))
    )
    versions = ", ".join(f"{package} {version(package)}" for package in ("nnunetv2", "torch", "nnunet-xattnres"))
    text = f"{table}\n{versions}; {data}; what has a number: {NUM_TRAINING} training and {NUM_TEST} test cases.\n"
    terminalreporter.section("feature matrix")
    terminalreporter.write_line(text)
    path = config.getoption("table")
    if path:
        path.write_text(TITLE + text)


def markdown(reports: Iterable[Any]) -> str:
    """One table for what every scenario goes through, one for the rest."""
    results = cell_results(reports)
    scenarios = sorted({cell.column for cell in results if cell.column})
    parts = []
    for columns, heads in ((scenarios, scenarios), ([""], ["result"])):
        rows = list(dict.fromkeys(cell.row for cell in results if cell.column in columns))
        if rows:
            lines = [["feature", *heads], ["---"] * (1 + len(columns))]
            lines += [[row, *(results.get(Cell(row, column), "") for column in columns)] for row in rows]
            parts.append("".join(f"| {' | '.join(line)} |\n" for line in lines))
    return "\n".join(parts)


def cell_results(reports: Iterable[Any]) -> dict[Cell, str]:
    """What is written into a cell: the worst phase of its tests, or what they have recorded as their result."""
    outcomes: dict[Cell, str] = {}
    recorded: dict[Cell, str] = {}
    for report in reports:
        properties = dict(getattr(report, "user_properties", ()))
        # Tests that were deselected are among the reports, and have no outcome.
        if "cell" in properties and hasattr(report, "outcome"):
            cell = Cell(*properties["cell"])
            outcomes[cell] = min(outcomes.get(cell, "passed"), report.outcome, key=OUTCOMES.index)
            recorded[cell] = properties.get("result", "")
    return {
        cell: outcome.upper() if outcome == "failed" else recorded[cell] or outcome
        for cell, outcome in outcomes.items()
    }
