"""The command `nnunet-xattnres benchmark report`: tables as Markdown, CSV and JSON, and figures."""

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas

from nnunet_xattnres.benchmark.cells import FINISHED, MATRIX, title_of
from nnunet_xattnres.benchmark.drawing import write_figures
from nnunet_xattnres.benchmark.markdown import markdown
from nnunet_xattnres.benchmark.results import LEARNING, Results, results_of, versions_of
from nnunet_xattnres.benchmark.tables import (
    COLUMNS,
    OPTIONAL,
    Tables,
    begins_a_report,
    has_tables,
    read_tables,
    write_csv,
    write_tables,
)
from nnunet_xattnres.common.errors import XAttnResError, differences
from nnunet_xattnres.common.files import check_writable, make_writable_folder, write_text_atomically
from nnunet_xattnres.nnunet.folders import check_not_of_nnunet
from nnunet_xattnres.nnunet.installation import check_installed

# Files of a report, beside figures and those of `COLUMNS`.
OTHER_FILES = (
    "summary.csv",
    "comparisons.csv",
    "spreads.csv",
    *(f"{name}.csv" for name in LEARNING),
    "report.json",
    "report.md",
)
KEEP_TRAININGS = "let `nnunet-xattnres benchmark run` continue from it first"


def run_report(origin: Path, output: Path) -> None:
    """Write a report to the folder `output`. origin: a benchmark's folder, or one with the CSV files of a report.

    Raises `XAttnResError` if there is nothing to report on, if a file is missing or damaged, if `output` cannot be
    written to, and if `output` holds a report with trainings that this one lacks, or files of others that a report
    would replace.
    """
    check_installed("statsmodels")
    write_report(_read(origin, partial(check_output, output)), output)


def write_report(tables: Tables, output: Path) -> None:
    """Write the files of a report on these tables. `check_output` has passed."""
    make_writable_folder(output, "-o")
    write_tables(tables, output)
    # Read from the files, so that a report on these files is the same.
    tables = read_tables(output)
    results = results_of(tables)
    for name in ("summary", "comparisons", "spreads"):
        write_csv(pandas.DataFrame(getattr(results, name)), output / f"{name}.csv")
    for name, rows in results.learning.items():
        write_csv(pandas.DataFrame(rows), output / f"{name}.csv")
    write_text_atomically(json.dumps(_without_nan(_record(tables, results)), indent=1) + "\n", output / "report.json")
    figures = write_figures(tables, results, output)
    write_text_atomically(markdown(tables, results, figures), output / "report.md")
    print(f"Report: {output / 'report.md'}")


def _read(origin: Path, check: Callable[[Tables], None]) -> Tables:
    """check: is called with what the report will be on, before anything is measured, and may refuse it."""
    if has_tables(origin) and not (origin / MATRIX).exists():
        tables = read_tables(origin)
        check(tables)
        return tables
    # A report on CSV files does without these.
    check_installed("monai", "pydantic", "yaml")
    from nnunet_xattnres.benchmark.collecting import collect

    return collect(origin, check)


def check_output(output: Path, tables: Tables, remedy: str = KEEP_TRAININGS) -> None:
    """Raise `XAttnResError` if a report on these tables cannot be written to `output`, or must not be.

    It must not go into a benchmark's folder, and not replace a report with trainings that the tables lack, or files
    that are not from a report.

    A report may be all that is left of a training. tables: those of the new report, maybe before they are measured.
    remedy: what else than another -o keeps the trainings that the tables lack.
    """
    if (output / MATRIX).exists():
        raise XAttnResError(f"{output} is the folder of a benchmark: choose another -o")
    check_not_of_nnunet(output, "-o", "report")
    check_writable(output, "-o")
    if not all((output / f"{name}.csv").is_file() for name in COLUMNS if name not in OPTIONAL):
        # No report, or one that was interrupted.
        names = (*(f"{name}.csv" for name in COLUMNS), *OTHER_FILES)
        there_already = [output / name for name in names if (output / name).exists()]
        if there_already and not begins_a_report(output):
            raise XAttnResError(f"{there_already[0]} is not from a report, which would replace it: choose another -o")
        return
    try:
        there = read_tables(output).finished
    except XAttnResError:
        raise XAttnResError(f"{output} holds a damaged report, which may be mended: choose another -o") from None
    here = tables.finished
    lost = [key for key, settings in there.items() if here.get(key) != settings]
    if lost:
        example = title_of(lost[0])
        if lost[0] in here:
            example += f" with {differences(there[lost[0]], here[lost[0]])}"
        raise XAttnResError(
            f"{output} is a report with trainings that this one would lack ({len(lost)} of {len(there)}, such as "
            f"{example}): choose another -o, or {remedy}"
        )


def _record(tables: Tables, results: Results) -> dict[str, Any]:
    unfinished = tables.cells[tables.cells.state != FINISHED]
    return {
        "summary": results.summary,
        "comparisons": results.comparisons,
        "spreads": results.spreads,
        **results.learning,
        "unfinished_cells": json.loads(unfinished.to_json(orient="records")),
        "versions": versions_of(tables),
    }


def _without_nan(content: Any) -> Any:
    """The content for JSON, which has no NaN and no infinity: they become null and "inf"."""
    if isinstance(content, dict):
        return {key: _without_nan(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_without_nan(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None if math.isnan(content) else "inf"
    return content
