"""How fast trainers learn: nnU-Net's pseudo-Dice of every label after every epoch.

Curves are smoothed: the value of an epoch is the mean of `WINDOW` epochs, itself the last of them. nnU-Net's own moving
average looks ten epochs back, too far for trainings of 25 epochs.

The first trainer of the spec that has curves sets the target in every fold and seed: the mean of its smoothed curve in
the last quarter of its epochs. By this definition it reaches its own target. A label that it has not learned has no
target: every trainer would reach it at once.
"""

from typing import Any

import numpy as np
import pandas
from numpy.typing import NDArray
from scipy import stats

from nnunet_xattnres.benchmark.costs import cost_ratios, costs
from nnunet_xattnres.benchmark.summaries import MEAN_LABEL
from nnunet_xattnres.benchmark.tables import CELL, SET, Tables
from nnunet_xattnres.common.samples import CONFIDENCE, DIGITS, rounded

WINDOW = 3
QUARTER = 4
# Targets are reached after whole epochs. Two trainings often have the same ratio, and an interval without width.
TRAININGS_OF_INTERVAL = 3
# In Dice.
LEARNED = 0.05
FLAT = 0.005
TRAINING = ["fold", "seed"]
CURVES = [*SET[:2], "label"]


def learning_curves(tables: Tables) -> pandas.DataFrame:
    """A row per training, label and epoch, of tables that have curves.

    CELL, label, epoch: how many are over, from 1. pseudo_dice, smoothed: NaN in the first epochs. iterations: per
    epoch, missing if unknown. Several labels have their mean first, as the label `MEAN_LABEL`.
    """
    parts = []
    for _, of_labels in tables.label_curves.groupby(SET[:2], sort=False):
        if of_labels.label.nunique() > 1:
            means = of_labels.groupby([*CELL, "epoch"], sort=False).pseudo_dice.mean()
            parts.append(means.reset_index().assign(label=MEAN_LABEL))
        parts.append(of_labels)
    curves = pandas.concat(parts, ignore_index=True)
    curves["epoch"] += 1
    smoothed = curves.groupby([*CELL, "label"], sort=False).pseudo_dice.rolling(WINDOW, min_periods=1).mean()
    curves["smoothed"] = smoothed.droplevel([*CELL, "label"]).where(curves.epoch >= WINDOW).round(DIGITS)
    return curves.merge(tables.cells[[*CELL, "iterations"]], on=CELL, how="left")


def first_trainer(tables: Tables) -> str:
    """The first trainer of the spec that has curves. There is one."""
    return tables.trainers.trainer[tables.trainers.trainer.isin(tables.label_curves.trainer)].iloc[0]


def flatness(tables: Tables) -> list[dict[str, Any]]:
    """A row per dataset, configuration and label: how the first trainer's curve ends.

    final: the mean target over trainings. gain: what the least-squares line through the pseudo-Dice of the last quarter
    gains in it, the mean over trainings. gain_low, gain_high: the lowest and the highest of them. flat: whether the
    gain is less than `FLAT`; None if the quarter is a single epoch.
    """
    curves = learning_curves(tables)
    rows: list[dict[str, Any]] = []
    for key, of_label in curves[curves.trainer == first_trainer(tables)].groupby(CURVES, sort=False):
        trainings = [own for _, own in of_label.groupby(TRAINING, sort=False)]
        gains = pandas.Series(map(_gain, trainings))
        gain = rounded(gains.mean())
        rows.append(
            dict(zip(CURVES, key, strict=True))
            | {"trainer": of_label.trainer.iloc[0], "trainings": len(trainings)}
            | {"final": rounded(pandas.Series(map(_target, trainings)).mean())}
            | {"gain": gain, "gain_low": rounded(gains.min()), "gain_high": rounded(gains.max())}
            | {"flat": None if np.isnan(gain) else gain < FLAT}
        )
    return rows


def steps_to_target(tables: Tables) -> list[dict[str, Any]]:
    """A row per dataset, configuration, label and trainer: when its curve first reaches the first trainer's target.

    Only folds and seeds count in which the first trainer has learned the label. A label without any has no row.

    trainings: the number of these. reached: in how many the target is reached.
    epochs, steps, minutes: the median over trainings, infinite if it was not reached there; None if unknown.
    ratio: the geometric mean of steps / those of the first trainer. A training with unknown iterations counts with as
        many as the other.
    low, high: the t interval of ratio, each training counting by itself. NaN for fewer than `TRAININGS_OF_INTERVAL`
        trainings, and for a bound.
    minutes_ratio: the geometric mean of epochs / those of the first trainer, times the ratio of the time per epoch.
    is_bound: a training has not reached the target and counts with all its epochs, so that the ratios are too low.
    """
    curves = learning_curves(tables)
    first = first_trainer(tables)
    rows: list[dict[str, Any]] = []
    for key, of_label in curves.groupby(CURVES, sort=False):
        identity = dict(zip(CURVES, key, strict=True))
        by_training = {
            trainer: {name: own for name, own in of_trainer.groupby(TRAINING, sort=False)}
            for trainer, of_trainer in of_label.groupby("trainer", sort=False)
        }
        of_first = by_training.get(first, {})
        targets = {name: _target(curve) for name, curve in of_first.items()}
        targets = {name: target for name, target in targets.items() if target >= LEARNED}
        for trainer in tables.trainers.trainer[tables.trainers.trainer.isin(by_training)]:
            own = {name: curve for name, curve in by_training[trainer].items() if name in targets}
            if not own:
                continue
            epochs = np.array([_first_epoch(curve, targets[name]) for name, curve in own.items()])
            budgets = np.array([len(curve) for curve in own.values()])
            epochs_of_first = np.array([_first_epoch(of_first[name], targets[name]) for name in own])
            iterations = np.array([_iterations(curve) / _iterations(of_first[name]) for name, curve in own.items()])
            ratios = np.minimum(epochs, budgets) / epochs_of_first
            rows.append(
                identity
                | {"trainer": trainer, "trainings": len(own), "reached": int(np.isfinite(epochs).sum())}
                | _amounts(tables, identity, trainer, epochs, of_label[of_label.trainer == trainer].iterations)
                | _ratios(
                    tables,
                    identity,
                    (trainer, first),
                    ratios,
                    np.nan_to_num(iterations, nan=1.0),
                    is_bound=bool(np.isinf(epochs).any()),
                )
            )
    return rows


def _last_quarter(curve: pandas.DataFrame) -> pandas.DataFrame:
    return curve.tail(max(1, len(curve) // QUARTER))


def _target(curve: pandas.DataFrame) -> float:
    return rounded(_last_quarter(curve).smoothed.mean())


def _gain(curve: pandas.DataFrame) -> float:
    end = _last_quarter(curve).dropna(subset="pseudo_dice")
    return len(end) * stats.linregress(end.epoch, end.pseudo_dice).slope if len(end) > 1 else np.nan


def _first_epoch(curve: pandas.DataFrame, target: float) -> float:
    """Infinite if the curve does not reach the target."""
    reached = curve.epoch[curve.smoothed >= target]
    return float(reached.iloc[0]) if len(reached) else np.inf


def _iterations(curve: pandas.DataFrame) -> float:
    """Per epoch; NaN if unknown."""
    return float(curve.iterations.to_numpy(float, na_value=np.nan)[0])


def _amounts(
    tables: Tables, identity: dict[str, Any], trainer: str, epochs: NDArray[np.floating], iterations: pandas.Series
) -> dict[str, Any]:
    median = float(np.median(epochs))
    known = set(iterations.dropna())
    seconds = costs(tables.cells, identity["dataset"], identity["configuration"], trainer)["seconds_per_epoch"]
    return {
        "epochs": median,
        "steps": median * known.pop() if len(known) == 1 else None,
        "minutes": None if seconds is None else rounded(median * seconds / 60),
    }


def _ratios(
    tables: Tables,
    identity: dict[str, Any],
    pair: tuple[str, str],
    of_epochs: NDArray[np.floating],
    of_iterations: NDArray[np.floating],
    is_bound: bool,
) -> dict[str, float | None]:
    of_costs = cost_ratios(tables.cells, identity["dataset"], identity["configuration"], *pair)
    of_time = of_costs["seconds_per_epoch_ratio"]
    logs = np.log(of_epochs * of_iterations)
    half = np.nan
    if len(logs) >= TRAININGS_OF_INTERVAL and not is_bound:
        half = stats.t.ppf((1 + CONFIDENCE) / 2, len(logs) - 1) * stats.sem(logs)
    return {
        "ratio": rounded(np.exp(logs.mean())),
        "low": rounded(np.exp(logs.mean() - half)),
        "high": rounded(np.exp(logs.mean() + half)),
        "minutes_ratio": None if of_time is None else rounded(stats.gmean(of_epochs) * of_time),
        "is_bound": is_bound,
    }
