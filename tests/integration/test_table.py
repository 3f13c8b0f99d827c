import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from integration.table import Cell, markdown

ROOT = Path(__file__).resolve().parents[2]


def report(outcome: str, row: str, column: str = "", **properties: str) -> Any:
    cell = ("cell", list(Cell(row, column)))
    return SimpleNamespace(outcome=outcome, user_properties=[cell, *properties.items()])


def test_scenarios_are_columns_and_other_features_rows():
    table = markdown(
        [
            report("passed", "train", "regions", result="0.40 (0.04)"),
            report("passed", "resume"),
            report("passed", "train", "standard", result="0.50 (0.04)"),
            report("skipped", "predict", "standard"),
            SimpleNamespace(outcome="passed", user_properties=[]),  # of no feature
            SimpleNamespace(user_properties=[("cell", ["train", "regions"])]),  # deselected
            "a warning",
        ]
    )
    assert table == (
        "| feature | regions | standard |\n| --- | --- | --- |\n"
        "| train | 0.40 (0.04) | 0.50 (0.04) |\n| predict |  | skipped |\n"
        "\n| feature | result |\n| --- | --- |\n| resume | passed |\n"
    )


def test_the_worst_of_a_cells_tests_and_phases_counts():
    failed, passed = report("failed", "resume", result="0.50 (0.04)"), report("passed", "resume", result="0.50 (0.04)")
    for reports in ([passed, failed, passed], [failed, passed], [passed, report("failed", "resume")]):
        assert "| resume | FAILED |" in markdown(reports)


def test_the_command_of_the_makefile_takes_a_table_that_exists_already():
    # As two words, pytest takes an existing file for a test, and does not load what adds the option.
    make = ["make", "-n", "--no-print-directory", "test-slow", "TABLE=docs/feature_matrix.md"]
    command = subprocess.run(make, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    _, arguments = command.split("/pytest ")
    pytest_help = [sys.executable, "-m", "pytest", *shlex.split(arguments), "--help"]
    assert "feature matrix" in subprocess.run(pytest_help, cwd=ROOT, capture_output=True, text=True).stdout
