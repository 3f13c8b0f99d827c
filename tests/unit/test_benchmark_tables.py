"""The tables of a report as CSV files: what is read, and what is refused as damaged."""

from pathlib import Path

import pytest

from helpers.benchmark import OURS, edit, two_trainers
from nnunet_xattnres.benchmark.tables import COLUMNS, Tables, read_tables, write_tables
from nnunet_xattnres.common.errors import XAttnResError


@pytest.fixture(scope="module")
def tables() -> Tables:
    return two_trainers()


def test_tables_are_read_as_they_were_written(tables, tmp_path):
    write_tables(tables, tmp_path / "one")
    once = read_tables(tmp_path / "one")
    write_tables(once, tmp_path / "two")
    for name in COLUMNS:
        assert (tmp_path / "one" / f"{name}.csv").read_bytes() == (tmp_path / "two" / f"{name}.csv").read_bytes()
        assert getattr(read_tables(tmp_path / "two"), name).equals(getattr(once, name))
    # A case called 0003 is no number, and numbers have six digits.
    assert once.cases.case[0] == "0000"
    assert once.cases.dice.to_numpy() == pytest.approx(tables.cases.dice.to_numpy(), rel=1e-5)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda folder: (folder / "cells.csv").unlink(), "cannot read"),
        (lambda folder: edit(folder / "cases.csv", ",nsd,", ",surface,"), "cases.csv has no column nsd"),
        (lambda folder: edit(folder / "cases.csv", ",10,10\n", ",ten,10\n"), "cases.csv is damaged"),
        (
            lambda folder: edit(folder / "cells.csv", "Dataset003", "Dataset009"),
            "fold 0 seed 0, finished, and cells.csv has not: take files of one report",
        ),
        (lambda folder: edit(folder / "datasets.csv", "Sarcoma", "other"), "of family Sarcoma"),
        (lambda folder: edit(folder / "trainers.csv", f"{OURS},{OURS}", "b,b"), f"lacks {OURS}"),
        (lambda folder: edit(folder / "cells.csv", "finished", "failed"), "no cell is finished"),
        (lambda folder: edit(folder / "cases.csv", "0003", "0002"), "twice"),
        (lambda folder: (folder / "cases.csv").write_text(""), "cases.csv is damaged"),
    ],
)
def test_damage_is_said_in_one_line(tables: Tables, tmp_path: Path, damage, message):
    write_tables(tables, tmp_path)
    damage(tmp_path)
    with pytest.raises(XAttnResError) as error:
        read_tables(tmp_path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
