"""The differences between trainers, in pairs, and how certain they are.

The value of a case is its mean over the labels that its reference contains. Differences are paired: a case counts in
the folds and seeds that both trainers have finished, and its values are averaged over these first. A label that the
reference of a case lacks has no part in any mean; what was predicted there is counted separately (`summarise`).

Datasets of one family are the same patients, and therefore one hypothesis. A patient is a case's name within validation
or test: datasets often number both from the same start. Its value is the mean of its differences over the datasets and
configurations of the family, and the family has one test. Holm's correction is over families, for every pair of
trainers and metric by itself. A second one is over families and pairs: over all pairs with the first trainer that has
results, and by itself over all other pairs.
"""

from collections.abc import Iterator
from itertools import combinations
from typing import Any

import numpy as np
import pandas
from numpy.typing import NDArray

from nnunet_xattnres.benchmark.costs import cost_ratios
from nnunet_xattnres.benchmark.statistics import (
    NO_DIFFERENCE,
    SIGNIFICANCE,
    direction,
    equivalence,
    holm,
    interval_over_trainings,
    wilcoxon,
)
from nnunet_xattnres.benchmark.tables import CELL, SET, Tables
from nnunet_xattnres.common.samples import DIGITS, sample

# Of equivalence, in Dice.
MARGIN = 0.005
METRICS = ("dice", "nsd")


def case_values(cases: pandas.DataFrame) -> pandas.DataFrame:
    """A row per prediction: its metrics, each the mean over the labels that the reference contains."""
    present = cases[cases.reference_voxels > 0]
    return present.groupby(["family", *CELL, "set", "case"], sort=False)[list(METRICS)].mean().reset_index()


def compare(tables: Tables) -> list[dict[str, Any]]:
    """For every pair of trainers and every metric: a row per set, and a row per family of several sets.

    first, second: the trainers; first is the later one in the spec. Differences are first - second, ratios of costs
        first / second.
    cells: the number of folds and seeds that both have finished. Those whose costs are compared: see `cost_ratios`.
    cells_ahead: the number of these with a positive mean difference.
    low, high: over cases. low_of_trainings, high_of_trainings: over trainings and cases within them; NaN for a single
        training and for families.
    p_holm, p_of_pairs, verdict: of the family's test; None in the rows of sets whose family has several. p_of_pairs is
        corrected over families and pairs, p_holm and so the verdict over families.
    p_equivalence, equivalence: of two one-sided tests within +-`MARGIN`; None for NSD.
    """
    values = case_values(tables.cases)
    rows = []
    for second, first in combinations(tables.trainers.trainer, 2):
        paired = _pair(values, first, second)
        for metric in METRICS:
            rows += [
                {"first": first, "second": second, "metric": metric} | row
                for row in _with_verdicts(_rows_of_pair(paired, metric, tables.cells, first, second))
            ]
    return _corrected_over_pairs(rows)


def unrelated_datasets(cases: pandas.DataFrame) -> list[tuple[str, str, str, str]]:
    """The pairs of datasets of one family whose validation or test cases have no name in common.

    As family, set and two names of datasets.

    Only common folds are compared, because different folds have different patients.
    """
    found = []
    for (family, kind), of_family in cases.groupby(["family", "set"], sort=False):
        names = of_family.groupby(["dataset", "fold"], sort=False)["case"].agg(set)
        for one, other in combinations(of_family.dataset.unique(), 2):
            common = names[one].index.intersection(names[other].index)
            if len(common) and not any(names[one][fold] & names[other][fold] for fold in common):
                found.append((family, kind, one, other))
    return found


def lacking_cases(cases: pandas.DataFrame) -> list[dict[str, Any]]:
    """A row per set and trainer that lacks cases of others in folds and seeds that both have: SET, trainer, cases."""
    rows = []
    for key, of_set in cases.groupby(SET, sort=False):
        lacking: dict[str, list[str]] = {}
        for _, of_cell in of_set.groupby(["fold", "seed"], sort=False):
            for trainer, own in of_cell.groupby("trainer", sort=False)["case"]:
                lacking.setdefault(trainer, []).extend(sorted(set(of_cell["case"]) - set(own)))
        identity = dict(zip(SET, key, strict=True))
        rows += [identity | {"trainer": trainer, "cases": names} for trainer, names in lacking.items() if names]
    return rows


def cases_left_empty(tables: Tables, first: str, second: str) -> pandas.DataFrame:
    """A row per set: `SET`, the common cases of two trainers, and the number that both leave empty.

    Left empty: in all common folds and seeds, nothing is predicted of the labels that the reference contains.
    """
    present = tables.cases[tables.cases.reference_voxels > 0]
    predicted = present.groupby([*CELL, "set", "case"], sort=False).predicted_voxels.sum().reset_index()
    ours, theirs = (predicted[predicted.trainer == trainer] for trainer in (first, second))
    both = ours.merge(theirs, on=[*SET, "fold", "seed", "case"], suffixes=("", "_of_second"))
    both["empty"] = both.predicted_voxels + both.predicted_voxels_of_second == 0
    per_case = both.groupby([*SET, "case"], sort=False)["empty"].all()
    return per_case.groupby(SET, sort=False).agg(cases="size", empty="sum").reset_index()


def _pair(values: pandas.DataFrame, first: str, second: str) -> pandas.DataFrame:
    """A row per case, fold and seed that both trainers have, with the differences of the metrics."""
    keys = ["family", *SET, "fold", "seed", "case"]
    ours, theirs = (values[values.trainer == trainer] for trainer in (first, second))
    both = ours.merge(theirs, on=keys, suffixes=("", "_of_second"))
    for metric in METRICS:
        both[metric] -= both[f"{metric}_of_second"]
    return both


def _rows_of_pair(
    paired: pandas.DataFrame, metric: str, cells: pandas.DataFrame, first: str, second: str
) -> Iterator[dict[str, Any]]:
    for family, of_family in paired.groupby("family", sort=False):
        sets = list(of_family.groupby(SET, sort=False))
        for key, of_set in sets:
            identity = {"family": family, **dict(zip(SET, key, strict=True)), "sets_of_family": len(sets)}
            of_cells = of_set.groupby(["fold", "seed"], sort=False)[metric].mean()
            num_cells = {"cells": len(of_cells), "cells_ahead": int((of_cells > 0).sum())}
            per_case = of_set.groupby("case", sort=False)[metric].mean()
            ratios = cost_ratios(cells, key[0], key[1], first, second)
            over_trainings = interval_over_trainings(of_set.rename(columns={metric: "value"}))
            yield identity | num_cells | _test(per_case.to_numpy(), metric, over_trainings) | ratios
        if len(sets) > 1:
            identity = {"family": family, **dict.fromkeys(SET, ""), "sets_of_family": len(sets)}
            per_set = of_family.groupby([*SET, "case"], sort=False)[metric].mean()
            per_patient = per_set.groupby(["set", "case"], sort=False).mean()
            of_family_alone = {"cells": None, "cells_ahead": None}
            yield identity | of_family_alone | _test(per_patient.to_numpy(), metric) | dict.fromkeys(ratios)


def _test(
    differences: NDArray[np.floating], metric: str, over_trainings: tuple[float, float] = (np.nan, np.nan)
) -> dict[str, Any]:
    """over_trainings: the interval."""
    differences = differences.round(DIGITS)
    of_cases = sample(differences)
    p_equivalence, verdict = equivalence(differences, MARGIN) if metric == "dice" else (None, None)
    return {
        "cases": of_cases.number,
        "difference": of_cases.mean,
        "low": of_cases.low,
        "high": of_cases.high,
        "low_of_trainings": over_trainings[0],
        "high_of_trainings": over_trainings[1],
        "wins": int((differences > 0).sum()),
        "ties": int((differences == 0).sum()),
        "losses": int((differences < 0).sum()),
        "p": wilcoxon(differences),
        "direction": direction(differences),
        "p_equivalence": p_equivalence,
        "equivalence": verdict,
    }


def _with_verdicts(rows: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    complete = [row | {"p_holm": None, "verdict": None} for row in rows]
    families = [row for row in complete if row["sets_of_family"] == 1 or not row["dataset"]]
    for row, p in zip(families, holm([row["p"] for row in families]), strict=True):
        row["p_holm"] = p
        row["verdict"] = row["direction"] if p < SIGNIFICANCE else NO_DIFFERENCE
    for row in complete:
        del row["direction"]
    return complete


def _corrected_over_pairs(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    complete = [row | {"p_of_pairs": None} for row in rows]
    tested: dict[tuple[str, bool], list[dict[str, Any]]] = {}
    for row in complete:
        if row["verdict"]:
            tested.setdefault((row["metric"], row["second"] == complete[0]["second"]), []).append(row)
    for together in tested.values():
        for row, p in zip(together, holm([row["p"] for row in together]), strict=True):
            row["p_of_pairs"] = p
    return complete
