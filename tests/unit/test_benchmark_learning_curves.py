"""How fast trainers learn: targets, when they are reached, ratios, and whether curves are flat at the end."""

import math
import statistics
from dataclasses import replace

import pandas
import pytest

from helpers.benchmark import OURS, PLANNED, case_row, tables_of
from nnunet_xattnres.benchmark.learning_curves import flatness, learning_curves, steps_to_target
from nnunet_xattnres.benchmark.tables import Tables, make_table

DATASET = "Dataset001_A"
NO_SKIP = "nnUNetTrainerNoSkip"
# The last two of eight values are the last quarter: the smoothed curve ends with 0.6, 0.7 and 0.8, the target is 0.75.
RISING = [0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 0.7, 0.9]


def with_curves(curves: dict[tuple[str, int, int], dict[str, list[float]]]) -> Tables:
    """Tables with these pseudo-Dice values, by trainer, fold, seed and label. An epoch has 50 iterations."""
    tables = tables_of([case_row(DATASET, *training, "1", 0.5) for training in curves])
    rows = [
        {"dataset": DATASET, "configuration": "small", "trainer": trainer, "fold": fold, "seed": seed}
        | {"epoch": epoch, "label": label, "pseudo_dice": dice}
        for (trainer, fold, seed), of_training in curves.items()
        for epoch in range(len(next(iter(of_training.values()))))
        for label, dice in ((label, values[epoch]) for label, values in of_training.items())
    ]
    return replace(tables, label_curves=make_table("label_curves", rows))


def rows_by(rows: list[dict], *names: str) -> dict:
    found = {tuple(row[name] for name in names): row for row in rows}
    assert len(found) == len(rows)
    return found


def test_curves_are_smoothed_over_three_epochs_and_have_the_mean_of_labels_first():
    tables = with_curves({(PLANNED, 0, 0): {"a": [0.0, 0.3, 0.6, 0.9], "b": [0.0, 0.1, math.nan, 0.3]}})
    curves = learning_curves(tables)
    assert list(curves.label.unique()) == ["mean", "a", "b"]
    smoothed = {label: list(own.smoothed.fillna(-1)) for label, own in curves.groupby("label")}
    # An undefined value is left out.
    assert smoothed["mean"] == pytest.approx([-1, -1, 0.8 / 3, 1.4 / 3], abs=1e-6)
    assert smoothed["a"] == pytest.approx([-1, -1, 0.3, 0.6], abs=1e-6)
    assert smoothed["b"] == pytest.approx([-1, -1, 0.05, 0.2], abs=1e-6)
    assert list(curves.epoch[curves.label == "a"]) == [1, 2, 3, 4]
    assert set(curves.iterations) == {50}


def test_a_single_label_is_its_own_mean():
    curves = learning_curves(with_curves({(PLANNED, 0, 0): {"a": RISING}}))
    assert set(curves.label) == {"a"}


def test_steps_until_the_first_trainers_final_dice():
    fast = [0.5, 0.7, 0.75, 0.8, 0.8, 0.8, 0.8, 0.8]  # 0.65 in epoch 3, 0.75 in epoch 4
    faster = [0.75, 0.75, 0.75, 0.7, 0.7, 0.7, 0.7, 0.7]  # in epoch 3, and later no more
    tables = with_curves(
        {
            (PLANNED, 0, 0): {"a": RISING},
            (OURS, 0, 0): {"a": fast},
            (PLANNED, 1, 0): {"a": RISING},
            (OURS, 1, 0): {"a": faster},
            # Without the first trainer's training there is no target.
            (OURS, 2, 0): {"a": fast},
        }
    )
    planned, ours = steps_to_target(tables)
    assert (planned["trainer"], planned["trainings"], planned["reached"]) == (PLANNED, 2, 2)
    # 0.8 in epoch 8.
    assert (planned["epochs"], planned["steps"], planned["minutes"]) == (8, 400, pytest.approx(80 / 60, abs=1e-6))
    assert (planned["ratio"], planned["minutes_ratio"]) == (1, 1)
    assert (ours["trainer"], ours["trainings"], ours["reached"], ours["is_bound"]) == (OURS, 2, 2, False)
    assert (ours["epochs"], ours["steps"], ours["minutes"]) == (3.5, 175, pytest.approx(3.5 * 15 / 60, abs=1e-6))
    # 4/8 and 3/8.
    assert ours["ratio"] == pytest.approx(math.sqrt(12) / 8, abs=1e-5)
    assert ours["minutes_ratio"] == pytest.approx(1.5 * math.sqrt(12) / 8, abs=1e-5)
    # Too few for an interval.
    assert math.isnan(ours["low"]) and math.isnan(ours["high"])


def test_the_ratio_has_the_t_interval_of_logarithms():
    in_epoch_4, in_epoch_3 = [0.5, 0.7, 0.75, 0.8, 0.8, 0.8, 0.8, 0.8], [0.8] * 8
    ours_by_seed = [in_epoch_4, in_epoch_3, in_epoch_3]
    curves = {(PLANNED, 0, seed): {"a": RISING} for seed in range(3)}
    curves |= {(OURS, 0, seed): {"a": curve} for seed, curve in enumerate(ours_by_seed)}
    planned, ours = steps_to_target(with_curves(curves))
    assert (planned["ratio"], planned["low"], planned["high"]) == (1, 1, 1)
    logs = [math.log(4 / 8), math.log(3 / 8), math.log(3 / 8)]
    # t of two degrees of freedom is 4.30265.
    half = 4.30265 * statistics.stdev(logs) / math.sqrt(3)
    expected = [math.exp(statistics.mean(logs) + sign * half) for sign in (-1, 0, 1)]
    assert [ours["low"], ours["ratio"], ours["high"]] == pytest.approx(expected, rel=1e-4)


def test_what_is_not_reached_is_later_than_all_else():
    low = [0.5] * 12
    tables = with_curves(
        {(trainer, 0, seed): {"a": RISING} for seed in range(3) for trainer in (PLANNED, OURS)}
        | {(OURS, 0, 2): {"a": low}}
        | {(NO_SKIP, 0, seed): {"a": values} for seed, values in enumerate([RISING, low, low])}
    )
    _, ours, no_skip = steps_to_target(tables)
    assert (ours["trainings"], ours["reached"], ours["epochs"], ours["is_bound"]) == (3, 2, 8, True)
    assert (no_skip["trainings"], no_skip["reached"], no_skip["is_bound"]) == (3, 1, True)
    assert (no_skip["epochs"], no_skip["steps"], no_skip["minutes"]) == (math.inf, math.inf, math.inf)
    # They count with their whole budget, 12 epochs instead of the 8 of the first trainer, and have no interval.
    assert no_skip["ratio"] == pytest.approx((12 / 8) ** (2 / 3), rel=1e-5)
    assert math.isnan(no_skip["low"]) and math.isnan(no_skip["high"])


def test_a_label_that_the_first_trainer_has_not_learned_is_no_target():
    nothing = [0.0] * 8
    tables = with_curves(
        {
            (PLANNED, 0, 0): {"a": RISING, "b": nothing},
            (PLANNED, 0, 1): {"a": RISING, "b": nothing},
            (OURS, 0, 0): {"a": RISING, "b": RISING},
        }
    )
    rows = rows_by(steps_to_target(tables), "label", "trainer")
    assert set(rows) == {(label, trainer) for label in ("mean", "a") for trainer in (PLANNED, OURS)}
    assert math.isnan(rows["a", OURS]["low"])
    finals = {row["label"]: row["final"] for row in flatness(tables)}
    assert finals == {"mean": 0.375, "a": 0.75, "b": 0}


@pytest.mark.parametrize("end, gain, flat", [([0.8, 0.801], 0.002, True), ([0.8, 0.803], 0.006, False)])
def test_a_curve_is_flat_if_its_last_quarter_gains_less_than_half_a_point(end, gain, flat):
    tables = with_curves({(PLANNED, 0, 0): {"a": [*RISING[:6], *end]}, (OURS, 0, 0): {"a": RISING}})
    (row,) = flatness(tables)
    assert (row["trainer"], row["trainings"], row["flat"]) == (PLANNED, 1, flat)
    assert row["gain"] == pytest.approx(gain, abs=1e-6)


def test_the_gain_is_the_mean_over_trainings():
    ends = {0: [0.80, 0.81], 1: [0.80, 0.79]}
    (row,) = flatness(with_curves({(PLANNED, 0, seed): {"a": [*RISING[:6], *end]} for seed, end in ends.items()}))
    assert (row["gain"], row["gain_low"], row["gain_high"], row["flat"]) == (0, -0.02, 0.02, True)


def test_trainings_of_a_few_epochs_have_no_target_and_may_be_flat_or_not():
    tables = with_curves({(PLANNED, 0, 0): {"a": [0.5, 0.6]}})
    (row,) = flatness(tables)
    assert math.isnan(row["final"]) and row["flat"] is None
    assert steps_to_target(tables) == []


def test_steps_of_trainings_with_different_iterations_per_epoch():
    tables = with_curves({(trainer, 0, seed): {"a": RISING} for trainer in (PLANNED, OURS) for seed in range(3)})
    tables.cells.loc[tables.cells.trainer == OURS, "iterations"] = 250
    planned, ours = steps_to_target(tables)
    assert (planned["steps"], ours["steps"]) == (400, 2000)
    assert (ours["ratio"], ours["low"], ours["high"]) == (5, 5, 5)
    # The time of an epoch is known, and is 1.5 times as long.
    assert ours["minutes_ratio"] == 1.5


def test_unknown_costs_and_iterations():
    tables = with_curves({(trainer, 0, 0): {"a": RISING} for trainer in (PLANNED, OURS)})
    tables.cells[["iterations", "seconds_per_epoch"]] = pandas.NA
    _, ours = steps_to_target(tables)
    assert (ours["epochs"], ours["steps"], ours["minutes"], ours["minutes_ratio"]) == (8, None, None, None)
    # The same network on the same plans has the same iterations.
    assert ours["ratio"] == 1
