"""What differs between trainers, and how surely.

The value of a case is its mean over the labels that its reference contains. Differences are paired: a case counts in
the folds and seeds that both trainers have finished, and its values are averaged over them first. In cases whose
reference lacks a label, that label has no part in any mean; what was predicted there is counted apart (`summarise`).

Datasets of one family are the same patients, so that they are one hypothesis, not several: a patient, a case name, has
the mean of its differences in all sets of the family (datasets, configurations, validation and test), and the family
has one test. Holm's correction is over families, for every pair of trainers and metric by itself.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas
from numpy.typing import NDArray
from scipy import stats

from nnunet_xattnres.benchmark.matrix import FINISHED
from nnunet_xattnres.benchmark.tables import CELL, Tables

BETTER, WORSE, NO_DIFFERENCE = "better", "worse", "no difference shown"
SIGNIFICANCE = 0.05
CONFIDENCE = 0.95
RESAMPLES = 9999
SEED = 0
METRICS = ("dice", "nsd")
SET = ["dataset", "configuration", "set"]
COSTS = ("seconds_per_epoch", "parameters", "peak_memory_gb")
COSTS_OF_DEVICE = ("seconds_per_epoch", "peak_memory_gb")
MEAN_LABEL = "mean"
# Sums differ between machines in their last digits.
DIGITS = 6


@dataclass(frozen=True)
class Sample:
    """Values of cases: their mean, and its bootstrap interval over cases; NaN where there are too few."""

    number: int
    mean: float
    low: float
    high: float


def sample(values: NDArray[np.floating]) -> Sample:
    """The percentile bootstrap, always with the same resamples."""
    if len(values) < 2:
        return Sample(len(values), round(float(values.mean()), DIGITS) if len(values) else np.nan, np.nan, np.nan)
    interval = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(SEED),
    ).confidence_interval
    low, high = (round(float(limit), DIGITS) for limit in interval)
    return Sample(len(values), round(float(values.mean()), DIGITS), low, high)


def wilcoxon(differences: NDArray[np.floating]) -> float:
    """The two-sided p of the signed-rank test; cases without a difference tell nothing."""
    if not differences.any():
        return 1.0
    # As recorded, so that equal differences are ties whatever the last digits.
    return float(f"{stats.wilcoxon(differences.round(DIGITS)).pvalue:.6g}")


def direction(differences: NDArray[np.floating]) -> str:
    """What a significant test would mean; nothing, where the signed ranks point elsewhere than the mean."""
    # As in the test, cases without a difference have no rank.
    differences = differences[differences != 0]
    mean = np.sign(differences.sum())
    ranks = np.sign((np.sign(differences) * stats.rankdata(np.abs(differences))).sum())
    return NO_DIFFERENCE if mean != ranks or not mean else BETTER if mean > 0 else WORSE


def holm(p_values: list[float]) -> list[float]:
    """Corrected for their number: each may be compared with the level that all of them together are to keep."""
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = float(f"{largest:.6g}")
    return corrected


def case_values(cases: pandas.DataFrame) -> pandas.DataFrame:
    """A row per prediction: the means over the labels that the reference contains."""
    present = cases[cases.reference_voxels > 0]
    return present.groupby(["family", *CELL, "set", "case"], sort=False)[list(METRICS)].mean().reset_index()


def compare(tables: Tables) -> list[dict[str, Any]]:
    """Every pair of trainers and metric: a row per set, and one per family of several sets.

    Differences are first - second, the costs' ratios first / second; first is the later one in the spec. cells are
    the folds and seeds that both have finished, whose costs are compared; cells_ahead those of them with a positive
    mean difference. p_holm and verdict are the family's: None in the rows of sets that share one.
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
    return rows


def unrelated_datasets(cases: pandas.DataFrame) -> list[tuple[str, str, str]]:
    """Family and names of every two datasets that are said to be the same patients and share no validation case.

    Two that have no fold in common are not judged: other folds are other patients.
    """
    validation = cases[cases.set == "validation"]
    found = []
    for family, of_family in validation.groupby("family", sort=False):
        names = of_family.groupby(["dataset", "fold"], sort=False)["case"].agg(set)
        for one, other in combinations(of_family.dataset.unique(), 2):
            common = names[one].index.intersection(names[other].index)
            if len(common) and not any(names[one][fold] & names[other][fold] for fold in common):
                found.append((family, one, other))
    return found


def _pair(values: pandas.DataFrame, first: str, second: str) -> pandas.DataFrame:
    """A row per case, fold and seed that both have, with the differences."""
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
            common = cells.merge(of_set[["fold", "seed"]].drop_duplicates())
            ratios = _cost_ratios(common, key[0], key[1], first, second)
            yield identity | num_cells | _test(per_case.to_numpy()) | ratios
        if len(sets) > 1:
            identity = {"family": family, **dict.fromkeys(SET, ""), "sets_of_family": len(sets)}
            per_set = of_family.groupby([*SET, "case"], sort=False)[metric].mean()
            per_patient = per_set.groupby("case", sort=False).mean()
            no_ratios = {f"{cost}_ratio": None for cost in COSTS}
            yield identity | {"cells": None, "cells_ahead": None} | _test(per_patient.to_numpy()) | no_ratios


def _test(differences: NDArray[np.floating]) -> dict[str, Any]:
    differences = differences.round(DIGITS)
    of_cases = sample(differences)
    return {
        "cases": of_cases.number,
        "difference": of_cases.mean,
        "low": of_cases.low,
        "high": of_cases.high,
        "wins": int((differences > 0).sum()),
        "ties": int((differences == 0).sum()),
        "losses": int((differences < 0).sum()),
        "p": wilcoxon(differences),
        "direction": direction(differences),
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


def costs(cells: pandas.DataFrame, dataset: str, configuration: str, trainer: str) -> dict[str, Any]:
    """Medians over the finished cells; None what is not known.

    Time and memory are those on one device, cost_device: of those known, that of most finished cells of all trainers.
    If none is known it is "", and they are those of all cells.
    """
    finished = _finished(cells, dataset, configuration)
    device = _cost_device(finished)
    own = finished[finished.trainer == trainer]
    comparable = own[own.device == device]
    medians = {cost: (comparable if cost in COSTS_OF_DEVICE else own)[cost].median() for cost in COSTS}
    known = {cost: None if pandas.isna(median) else float(median) for cost, median in medians.items()}
    return known | {"cost_device": device}


def _cost_ratios(
    cells: pandas.DataFrame, dataset: str, configuration: str, first: str, second: str
) -> dict[str, float | None]:
    """Medians over folds and seeds, those of time and memory over the ones that both have trained on `cost_device`."""
    finished = _finished(cells, dataset, configuration)
    ours, theirs = (finished[finished.trainer == trainer] for trainer in (first, second))
    both = ours.merge(theirs, on=["fold", "seed"], suffixes=("", "_of_second"))
    device = _cost_device(finished)
    comparable = both[(both.device == device) & (both.device_of_second == device) & (device != "")]
    ratios = {}
    for cost in COSTS:
        pairs = comparable if cost in COSTS_OF_DEVICE else both
        median = (pairs[cost] / pairs[f"{cost}_of_second"]).median()
        ratios[f"{cost}_ratio"] = None if pandas.isna(median) else _rounded(median)
    return ratios


def _cost_device(finished: pandas.DataFrame) -> str:
    """Of the devices known, that of most of these cells; "" where none is."""
    devices = [device for device in finished.device if device]
    return max(devices, key=devices.count, default="")


def _finished(cells: pandas.DataFrame, dataset: str, configuration: str) -> pandas.DataFrame:
    return cells[(cells.dataset == dataset) & (cells.configuration == configuration) & (cells.state == FINISHED)]


def summarise(tables: Tables) -> list[dict[str, Any]]:
    """Every set, label and trainer: metrics, costs, and what was predicted where the reference is empty.

    The label `MEAN_LABEL` stands for a case's mean over the labels that its reference contains. Values of a case are
    averaged over folds and seeds. hd95 is the median over cases, for an infinite distance has no mean; hd95_infinite
    counts the cases in which a prediction is empty. Of predictions whose reference is empty: empty_references counts
    them, both_empty those that are rightly empty, false_positives the others, and false_positive_voxels is the mean
    volume of these. What was spent is that of `costs`.
    """
    rows = []
    for key, of_set in tables.cases.groupby(SET, sort=False):
        labels = list(dict.fromkeys(of_set.label))
        num_cells = len(of_set[["fold", "seed"]].drop_duplicates())
        for label in [MEAN_LABEL, *labels]:
            of_label = of_set if label == MEAN_LABEL else of_set[of_set.label == label]
            for trainer in tables.trainers.trainer[tables.trainers.trainer.isin(of_label.trainer)]:
                own = of_label[of_label.trainer == trainer]
                own_cells = len(own[["fold", "seed"]].drop_duplicates())
                rows.append(
                    dict(zip(SET, key, strict=True))
                    | {"label": label, "trainer": trainer, "cells": own_cells, "cells_of_set": num_cells}
                    | _metrics(own)
                    | costs(tables.cells, key[0], key[1], trainer)
                )
    return rows


def _metrics(cases: pandas.DataFrame) -> dict[str, Any]:
    per_prediction = cases[cases.reference_voxels > 0].groupby(["case", "fold", "seed"], sort=False)
    per_case = per_prediction[["dice", "nsd", "hd95"]].mean().groupby("case", sort=False).mean()
    dice = sample(per_case.dice.to_numpy())
    empty = cases[cases.reference_voxels == 0]
    wrong = empty[empty.predicted_voxels > 0]
    return {
        "cases": dice.number,
        "dice": dice.mean,
        "dice_low": dice.low,
        "dice_high": dice.high,
        "nsd": _rounded(per_case.nsd.mean()),
        "hd95": _rounded(per_case.hd95.median()),
        "hd95_infinite": int(np.isinf(per_case.hd95).sum()),
        "empty_references": len(empty),
        "both_empty": len(empty) - len(wrong),
        "false_positives": len(wrong),
        "false_positive_voxels": _rounded(wrong.predicted_voxels.mean()),
    }


def _rounded(value: float) -> float:
    return round(float(value), DIGITS)


def spreads(tables: Tables) -> list[dict[str, Any]]:
    """Every set: how far trainers differ, beside how far the trainings of one trainer do, in Dice.

    between: standard deviation of the trainers' means. within: that of the means of one trainer's folds and seeds,
    pooled over trainers (root of the mean variance). Of trainers that have finished all folds and seeds of the set;
    left_out names the others.
    """
    values = case_values(tables.cases)
    arms = tables.cells[[*SET[:2], "trainer"]].drop_duplicates()
    rows = []
    for key, of_set in values.groupby(SET, sort=False):
        of_cells = of_set.groupby(["trainer", "fold", "seed"], sort=False).dice.mean().unstack(["fold", "seed"])
        complete = of_cells.dropna()
        enough = complete.shape[0] > 1 and complete.shape[1] > 1
        between = _rounded(complete.mean(axis=1).std()) if enough else np.nan
        within = _rounded(np.sqrt(complete.var(axis=1).mean())) if enough else np.nan
        planned = arms[(arms.dataset == key[0]) & (arms.configuration == key[1])].trainer
        rows.append(
            dict(zip(SET, key, strict=True))
            | {
                "trainers": len(complete),
                "cells": complete.shape[1],
                "between": between,
                "within": within,
                "ratio": _rounded(between / within) if within else np.nan,
                "left_out": ", ".join(planned[~planned.isin(complete.index)]),
            }
        )
    return rows
