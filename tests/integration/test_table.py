from types import SimpleNamespace
from typing import Any

from integration.table import Cell, markdown


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
