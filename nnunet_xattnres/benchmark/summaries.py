"""What is reported of every trainer by itself: metrics, costs, and the spread between trainings."""

from typing import Any

import numpy as np
import pandas

from nnunet_xattnres.benchmark.comparisons import case_values
from nnunet_xattnres.benchmark.costs import costs
from nnunet_xattnres.benchmark.tables import SET, Tables
from nnunet_xattnres.common.samples import rounded, sample

MEAN_LABEL = "mean"


def summarise(tables: Tables) -> list[dict[str, Any]]:
    """A row per set, label and trainer. The label `MEAN_LABEL` is a case's mean over the labels of its reference.

    Values of a case are averaged over folds and seeds first.

    dice, nsd: means over cases. hd95: the median over cases, because an infinite distance has no mean.
    hd95_infinite: the number of cases with an infinite distance, in which a prediction is empty.
    empty_references: the number of predictions whose reference is empty. both_empty: those that are empty, too.
    false_positives: the others. false_positive_voxels: their mean volume.
    The costs are those of `costs`.
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
        "nsd": rounded(per_case.nsd.mean()),
        "hd95": rounded(per_case.hd95.median()),
        "hd95_infinite": int(np.isinf(per_case.hd95).sum()),
        "empty_references": len(empty),
        "both_empty": len(empty) - len(wrong),
        "false_positives": len(wrong),
        "false_positive_voxels": rounded(wrong.predicted_voxels.mean()),
    }


def spreads(tables: Tables) -> list[dict[str, Any]]:
    """A row per set: the spread of Dice between trainers, and between the trainings of one trainer.

    between: the standard deviation of the trainers' means.
    within: the standard deviation of the means of one trainer's folds and seeds, pooled over trainers (root of the mean
        variance).
    left_out: the trainers that have not finished all folds and seeds of the set. Only the others count.
    """
    values = case_values(tables.cases)
    arms = tables.cells[[*SET[:2], "trainer"]].drop_duplicates()
    rows = []
    for key, of_set in values.groupby(SET, sort=False):
        of_cells = of_set.groupby(["trainer", "fold", "seed"], sort=False).dice.mean().unstack(["fold", "seed"])
        complete = of_cells.dropna()
        within = rounded(np.sqrt(complete.var(axis=1).mean())) if complete.shape[1] > 1 else np.nan
        between = rounded(complete.mean(axis=1).std()) if min(complete.shape) > 1 else np.nan
        planned = arms[(arms.dataset == key[0]) & (arms.configuration == key[1])].trainer
        rows.append(
            dict(zip(SET, key, strict=True))
            | {
                "trainers": len(complete),
                "cells": complete.shape[1],
                "between": between,
                "within": within,
                "ratio": rounded(between / within) if within else np.nan,
                "left_out": ", ".join(planned[~planned.isin(complete.index)]),
            }
        )
    return rows
