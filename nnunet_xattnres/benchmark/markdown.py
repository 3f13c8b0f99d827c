"""A report as Markdown."""

import math
from collections.abc import Iterable, Sequence
from typing import Any
from urllib.parse import quote

import pandas

from nnunet_xattnres.benchmark.cells import FINISHED
from nnunet_xattnres.benchmark.comparisons import MARGIN, cases_left_empty, lacking_cases, unrelated_datasets
from nnunet_xattnres.benchmark.costs import COSTS, COSTS_OF_DEVICE
from nnunet_xattnres.benchmark.learning_curves import FLAT, LEARNED, TRAININGS_OF_INTERVAL, WINDOW
from nnunet_xattnres.benchmark.results import UNKNOWN_DEVICE, Results, Rows, versions_of
from nnunet_xattnres.benchmark.statistics import (
    BETTER,
    DIFFERENT,
    EQUIVALENT,
    INCONCLUSIVE,
    NO_DIFFERENCE,
    SIGNIFICANCE,
    WORSE,
)
from nnunet_xattnres.benchmark.summaries import MEAN_LABEL
from nnunet_xattnres.benchmark.tables import SET, Tables
from nnunet_xattnres.common.samples import RESAMPLES
from nnunet_xattnres.common.text import counted
from nnunet_xattnres.nnunet.installation import TRAINER_PREFIX, short_name

NOTHING = "-"
NAMES_IN_A_LIST = 8
OVER_TRAININGS = "over trainings"
OF_MARGIN = f"margin of {100 * MARGIN:g} points"
COST_COLUMNS = ["time", "parameters", "memory"]


def markdown(tables: Tables, results: Results, figures: list[str]) -> str:
    """The whole report."""
    parts = [
        f"# Comparison of {_kind(tables)}",
        _overview(tables),
        "## What is compared",
        _arms(tables),
        _trainings(tables),
        "## Differences",
        _explanation(results),
        _verdicts(results.with_first),
        *_differences("### Paired differences in Dice", results.with_first, "dice"),
        _left_empty(tables, results.with_first),
        *_differences("### Paired differences in NSD", results.with_first, "nsd"),
        *(_picture(name) for name in figures if name.startswith("paired")),
        "## Every trainer",
        "Dice and NSD in %, HD95 in mm. Brackets: 95 % bootstrap interval of the mean over cases. HD95 is the median "
        f"over cases; how many are infinite, because a prediction is empty, stands beside it.{_about_costs(results)}",
        *_trainers(tables, results.summary, figures),
        *_empty_references(results.summary),
        *_learning(results, figures),
        "## Which datasets can tell trainers apart",
        "Standard deviation of the trainers' mean Dice, beside that of the folds and seeds of one trainer (pooled), in "
        "percentage points. Where the ratio is low, these means do not tell trainers apart. What is common to all "
        "trainers in a fold is in the second value, and not in the paired differences. "
        "Trainers that lack one of the trainings are left out.",
        _spreads(results.spreads),
        *_differences("## Paired differences in Dice, other pairs", results.without_first, "dice"),
        _left_empty(tables, results.without_first),
        f"## {_kind(tables).capitalize()}",
        *(_picture(name) for name in figures if name.startswith("curves")),
        "Versions:",
        "\n".join(f"- {line}" for line in versions_of(tables)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _picture(name: str) -> str:
    """A link to a figure. The name of a dataset may hold a space."""
    return f"![{name}]({quote(name)}.png)"


def _kind(tables: Tables) -> str:
    """What a row of the table "cells" is. Predictions of unknown origin have no plans."""
    return "trainings" if (tables.cells.plans != "").any() else "predictions"


def _overview(tables: Tables) -> str:
    cells = tables.cells
    finished = cells[cells.state == FINISHED]
    tolerances = "; ".join(f"{row.dataset} {row.nsd_tolerance_mm:g} mm" for row in tables.datasets.itertuples())
    if _kind(tables) == "trainings":
        verb = "is" if len(finished) == 1 else "are"
        number = f"{len(finished)} of {counted(len(cells), 'training')} {verb} finished. "
        number += f"Trainers are named without `{TRAINER_PREFIX}`. "
    else:
        number = f"{counted(len(finished), 'folder')} of predictions. "
    lines = [f"{number}Tolerance of NSD: {tolerances}."]
    lines += [
        f"\n**{one} and {other} are of the family {family} and have no name of a {kind} case in common, by which "
        "patients are told: if they are the same ones, the family's test counts them twice and is not to be trusted.**"
        for family, kind, one, other in unrelated_datasets(tables.cases)
    ]
    unfinished = cells[cells.state != FINISHED]
    if len(unfinished):
        lines.append("\n**Not finished, and therefore in no number:**\n")
        several_seeds = cells.seed.nunique() > 1
        for (dataset, configuration, trainer), of_arm in unfinished.groupby([*SET[:2], "trainer"], sort=False):
            missing = ", ".join(
                f"fold {row.fold}{f' seed {row.seed}' * several_seeds} ({row.state})" for row in of_arm.itertuples()
            )
            lines.append(f"- {dataset}, {configuration}, {short_name(trainer)}: {missing}")
    lacking = lacking_cases(tables.cases)
    if lacking:
        lines.append("\n**Predicted by some trainers only, and in no difference with a trainer that lacks them:**\n")
    for row in lacking:
        names = [*row["cases"][:NAMES_IN_A_LIST], *(["..."] if len(row["cases"]) > NAMES_IN_A_LIST else [])]
        lines.append(f"- {_set_name(row)}: {short_name(row['trainer'])} lacks {len(row['cases'])}: {', '.join(names)}")
    return "\n".join(lines)


def _arms(tables: Tables) -> str:
    lines = [
        [
            short_name(row.trainer),
            row.trainer_class or NOTHING,
            row.planner or NOTHING,
            _number(row.width, "g", "x"),
            short_name(row.parameters_of) or NOTHING,
        ]
        for row in tables.trainers.itertuples()
    ]
    header = ["trainer", "nnU-Net's class", "planner", "widened by", "widened to the parameters of"]
    return _table(header, lines, may_be_left_out=header[1:])


def _trainings(tables: Tables) -> str:
    """The budget and size of the finished trainings; trainers that share them share a line."""
    columns = ["dataset", "configuration", "plans", "patch_size", "batch_size", "features", "iterations", "epochs"]
    # Predictions of unknown origin have no plans.
    finished = tables.cells[(tables.cells.state == FINISHED) & (tables.cells.plans != "")]
    lines = []
    for values, own in finished.groupby(columns, sort=False, dropna=False):
        known = ["trainer's own" if pandas.isna(value) else str(value) for value in values]
        lines.append([*known[:2], ", ".join(map(short_name, own.trainer.unique())), *known[2:]])
    header = ["dataset", "configuration", "trainers", "plans", "patch", "batch", "channels of the stages"]
    return _table([*header, "iterations per epoch", "epochs"], lines) if lines else ""


def _explanation(results: Results) -> str:
    if results.first is None:
        return ""
    first = short_name(results.first)
    parts = [
        f"Here every trainer is compared with {first}. The other pairs have a table "
        "further down, and all pairs and metrics are in comparisons.csv.\n",
        "- **Differences** are paired: cases in the folds and seeds that both trainers have finished, values averaged "
        "over these first, a case's value being its mean over the labels that its reference contains.",
        "- **Dice, NSD**: the mean difference in points. Brackets: 95 % bootstrap interval over cases "
        f"({RESAMPLES} resamples). It says what these trainings would show on other cases. Neither it nor p says how "
        "far another training would differ. 'Ahead in': in how many of the trainings the first trainer had the higher "
        "mean.",
    ]
    if _knows(results.comparisons, ["low_of_trainings"]):
        parts.append(
            f"- **{OVER_TRAININGS}**: 95 % interval of a hierarchical bootstrap, which resamples trainings (folds, and "
            "seeds within them) and the cases within them. It says what other trainings may show. If it contains 0, "
            "a better or worse may come from these trainings alone. Of few trainings it is rough: with two folds, it "
            "holds half of the variance between folds, and 1.5 times that between cases. Where folds differ, it is too "
            "narrow. '-': one training, which has no such interval, or a family."
        )
    else:
        parts.append(
            "- There is no interval over trainings, because no pair has two trainings in common. Nothing here says how "
            "far another training would differ."
        )
    parts += [
        "- **p**: Wilcoxon signed-rank over cases. **p (Holm)**: for every pair by itself corrected over families with "
        "Holm's method; datasets of the same patients are one family and have one test, of each patient's mean "
        "difference. **p (Holm, pairs)**: corrected over families and pairs together, for the pairs with "
        f"{first} and for the other pairs by themselves.",
        f"- **first is** better or worse if p (Holm) is below {SIGNIFICANCE:g} and the mean points the same way; "
        f"everything else is '{NO_DIFFERENCE}', which is no proof of equality. It is not corrected for the number of "
        "pairs: for that, look at p (Holm, pairs).",
        f"- **{OF_MARGIN}** (Dice): two one-sided t tests over cases (TOST), p in brackets, not corrected. "
        f"'{EQUIVALENT}': the mean difference is shown to be within the margin, at {SIGNIFICANCE:g}. '{DIFFERENT}': "
        f"its 95 % t interval lies outside. '{INCONCLUSIVE}': neither. A trainer can be better and equivalent: the "
        "difference is shown, and it is small. Where the interval over trainings leaves the margin, other trainings "
        "may differ by more.",
    ]
    if _knows(results.comparisons, [f"{cost}_ratio" for cost in COSTS]):
        parts.append(
            "- **time, parameters, memory**: first / second, the median over these trainings. Of time and memory only "
            "the folds and seeds count that both have trained on one machine, and the number in brackets is how many. "
            "They are of the device on which most trainings ran, over all reports."
        )
    return "\n".join(parts)


def _verdicts(comparisons: Rows) -> str:
    """How often each verdict fell on Dice, by pair."""
    pairs: dict[tuple[str, str], list[str]] = {}
    for row in comparisons:
        if row["metric"] == "dice" and row["verdict"]:
            pairs.setdefault((row["first"], row["second"]), []).append(row["verdict"])
    verdicts = (BETTER, WORSE, NO_DIFFERENCE)
    lines = [
        [f"{short_name(first)} - {short_name(second)}", *(str(fell.count(verdict)) for verdict in verdicts)]
        for (first, second), fell in pairs.items()
    ]
    return (
        _table(["Dice, number of families", *verdicts], lines) if lines else "There is no pair of trainers to compare."
    )


def _differences(heading: str, comparisons: Rows, metric: str) -> list[str]:
    rows = [row for row in comparisons if row["metric"] == metric]
    title = {"dice": "Dice", "nsd": "NSD"}[metric]
    header = ["first - second", "dataset", "trainings", "ahead in", "cases", f"{title}, points", OVER_TRAININGS]
    header += ["wins/ties/losses", "p", "p (Holm)", "p (Holm, pairs)", "first is", OF_MARGIN, *COST_COLUMNS]
    lines = [
        [
            f"{short_name(row['first'])} - {short_name(row['second'])}",
            _set_name(row) if row["dataset"] else f"family {row['family']}, by patient",
            _number(row["cells"], "d"),
            _number(row["cells_ahead"], "d"),
            str(row["cases"]),
            f"{_points(row['difference'], '+')} {_interval(row['low'], row['high'], '+')}",
            _interval(row["low_of_trainings"], row["high_of_trainings"], "+") or NOTHING,
            f"{row['wins']}/{row['ties']}/{row['losses']}",
            _number(row["p"], ".2g"),
            _number(row["p_holm"], ".2g"),
            _number(row["p_of_pairs"], ".3g"),
            f"see family {row['family']}" if row["verdict"] is None else row["verdict"],
            _equivalence(row),
            *_cost_ratios(row),
        ]
        for row in rows
    ]
    return [heading, _table(header, lines, may_be_left_out=[OVER_TRAININGS, OF_MARGIN, *COST_COLUMNS])] if lines else []


def _cost_ratios(row: dict[str, Any]) -> list[str]:
    ratios = {cost: _number(row[f"{cost}_ratio"], ".2f", "x") for cost in COSTS}
    for cost in COSTS_OF_DEVICE:
        if ratios[cost] != NOTHING:
            ratios[cost] += f" ({row[f'{cost}_cells']})"
    return list(ratios.values())


def _left_empty(tables: Tables, comparisons: Rows) -> str:
    """A note on pairs that are equivalent, if cases in which both predict nothing contribute to that."""
    lines = []
    for row in comparisons:
        if row["equivalence"] == EQUIVALENT and row["dataset"]:
            of_pair = cases_left_empty(tables, row["first"], row["second"])
            (of_set,) = of_pair[(of_pair[SET] == [row[name] for name in SET]).all(axis=1)].itertuples()
            if of_set.empty:
                pair = f"{short_name(row['first'])} - {short_name(row['second'])}"
                lines.append(f"- {pair}, {_set_name(row)}: {of_set.empty} of {counted(of_set.cases, 'case')}")
    if not lines:
        return ""
    text = (
        f"**Left empty by both**, which predict nothing of the labels there. The difference of such a case is 0 and "
        f"adds to '{EQUIVALENT}', although it says nothing of how well the two segment:"
    )
    return "\n".join([text, "", *lines])


def _equivalence(row: dict[str, Any]) -> str:
    if row["equivalence"] in (None, DIFFERENT):
        return row["equivalence"] or NOTHING
    return f"{row['equivalence']} ({_number(row['p_equivalence'], '.2g')})"


def _trainers(tables: Tables, summary: Rows, figures: list[str]) -> list[str]:
    parts = []
    costs_header = ["s / epoch", "parameters", "memory GB"]
    header = ["label", "trainer", "trainings", "cases", "Dice", "NSD", "HD95", "infinite", *costs_header]
    for key in dict.fromkeys(tuple(row[name] for name in SET) for row in summary):
        rows = [row for row in summary if tuple(row[name] for name in SET) == key]
        if len({row["label"] for row in rows}) == 2:
            # Of a single label, which is its own mean.
            rows = [row for row in rows if row["label"] != MEAN_LABEL]
        most = {row["label"]: max(other["cases"] for other in rows if other["label"] == row["label"]) for row in rows}
        fewer_trainings = any(row["cells"] < row["cells_of_set"] for row in rows)
        fewer_cases = any(row["cases"] < most[row["label"]] for row in rows)
        lines = [
            [
                row["label"],
                short_name(row["trainer"]),
                f"{row['cells']}{'*' if row['cells'] < row['cells_of_set'] else ''}",
                f"{row['cases']}{'*' if not fewer_trainings and row['cases'] < most[row['label']] else ''}",
                f"{_points(row['dice'])} {_interval(row['dice_low'], row['dice_high'])}",
                _points(row["nsd"]),
                _number(row["hd95"], ".2f"),
                str(row["hd95_infinite"]),
                *_costs(row),
            ]
            for row in rows
        ]
        parts += [
            f"### {_set_name(rows[0])}",
            _table(header, lines, may_be_left_out=costs_header),
        ]
        if _knows(rows, COSTS_OF_DEVICE):
            parts.append(f"Time and memory: {rows[0]['cost_device'] or UNKNOWN_DEVICE}.")
        if fewer_trainings or fewer_cases:
            fewer = "folds or seeds than others, and so maybe other cases" if fewer_trainings else "cases than others"
            parts.append(
                f"\\* Fewer {fewer}: not to be compared with the other "
                "rows; the paired differences are over common ones."
            )
        parts += [_picture(name) for name in figures if name == "_".join(["dice", *key])]
    return parts


def _about_costs(results: Results) -> str:
    text = ""
    if _knows(results.summary, COSTS):
        text += (
            " Costs are medians over trainings, of time and memory over those on the device under the table; '-': not "
            "known there."
        )
    if _knows(results.summary, ["peak_memory_gb"]):
        text += (
            " On a GPU, memory is what PyTorch has allocated. On a CPU it is how far the process grew, with what the "
            "allocator held back: it says what a training needs, and does not rank networks."
        )
    return text


def _knows(rows: Rows, columns: Iterable[str]) -> bool:
    return any(not pandas.isna(row[column]) for row in rows for column in columns)


def _costs(row: dict[str, Any]) -> list[str]:
    parameters = row["parameters"]
    millions = NOTHING if parameters is None else f"{parameters / 1e6:.3g} M"
    return [_number(row["seconds_per_epoch"], ".3g"), millions, _number(row["peak_memory_gb"], ".3g")]


def _empty_references(summary: Rows) -> list[str]:
    rows = [row for row in summary if row["empty_references"] and row["label"] != MEAN_LABEL]
    if not rows:
        return []
    header = ["dataset", "label", "trainer", "predictions", "rightly empty", "false positives", "their mean volume"]
    lines = [
        [
            _set_name(row),
            row["label"],
            short_name(row["trainer"]),
            str(row["empty_references"]),
            str(row["both_empty"]),
            str(row["false_positives"]),
            _number(row["false_positive_voxels"], ".4g", " voxels"),
        ]
        for row in rows
    ]
    text = (
        "Predictions of cases whose reference lacks the label. They are in none of the means above: where both are "
        "empty Dice is undefined, and of a false positive it is 0, however small that is."
    )
    return ["## Empty references", text, _table(header, lines)]


def _spreads(rows: Rows) -> str:
    header = ["dataset", "trainers", "trainings of each", "between trainers", "within a trainer", "ratio", "left out"]
    lines = [
        [
            _set_name(row),
            str(row["trainers"]),
            str(row["cells"]),
            _points(row["between"]),
            _points(row["within"]),
            _number(row["ratio"], ".2f"),
            ", ".join(map(short_name, row["left_out"].split(", "))) or NOTHING,
        ]
        for row in rows
    ]
    return _table(header, lines)


def _learning(results: Results, figures: list[str]) -> list[str]:
    if not results.learning:
        return []
    first = short_name(results.learning["flatness"][0]["trainer"])
    text = (
        f"Curves are nnU-Net's pseudo-Dice on patches of the validation cases, each value the mean of {WINDOW} epochs. "
        f"The target is the final pseudo-Dice of {first} in the same fold and seed: the mean of its curve over the "
        "last quarter of its epochs. Steps and minutes: when the curve first reaches it, the median over trainings, a "
        "training that does not reach it being later than all others. Beside them the ratio to "
        f"{first} over trainings: geometric mean and, from {TRAININGS_OF_INTERVAL} trainings on, 95 % t interval, not "
        "corrected for the number of trainers and labels. Every fold and seed counts by itself. The ratio of minutes "
        "is that of epochs, times the ratio of the time per epoch. "
        "'-': no time is known on the device under the table. "
        "'>': a training has not reached the target and counts with its whole budget, so that the ratio is higher. "
        f"A training counts if {first} has learned the label (pseudo-Dice of {100 * LEARNED:g} % or more). Figures: "
        "median and range over trainings; the grey line is the mean target."
    )
    flat = (
        f"Flat: the curve of {first} gains less than {_points(FLAT)} points in its last quarter, by the least-squares "
        "line, as the mean over trainings (brackets: the lowest and the highest). Its learning rate falls to 0, so "
        "that a curve can be flat at the end of a budget that a longer one would beat."
    )
    flat_lines = [
        [
            _configuration_name(row),
            row["label"],
            str(row["trainings"]),
            _points(row["final"]),
            f"{_points(row['gain'], '+')} {_interval(row['gain_low'], row['gain_high'], '+')}".strip(),
            {None: "too short to say", True: "yes", False: "no"}[row["flat"]],
        ]
        for row in results.learning["flatness"]
    ]
    header = ["dataset", "label", "trainer", "trainings", "reached in", "steps", "minutes", "steps, ratio"]
    steps = results.learning["steps_to_target"]
    most = {(_configuration_name(row), row["label"]): row["trainings"] for row in reversed(steps)}
    is_incomplete = [row["trainings"] < most[_configuration_name(row), row["label"]] for row in steps]
    lines = [
        [
            _configuration_name(row),
            row["label"],
            short_name(row["trainer"]),
            f"{row['trainings']}{'*' * has_fewer}",
            str(row["reached"]),
            _until_target(row["steps"], 0),
            _until_target(row["minutes"], 1),
            *_learning_ratios(row, first),
        ]
        for row, has_fewer in zip(steps, is_incomplete, strict=True)
    ]
    return [
        "## How fast every trainer learns",
        text,
        _table([*header, "minutes, ratio"], lines) if lines else f"{first} has learned no label.",
        f"\\* Fewer trainings than {first}: its steps and minutes are not to be compared with those of other rows; the "
        "ratios are over common trainings."
        if any(is_incomplete)
        else "",
        flat,
        _table(["dataset", "label", "trainings", "final pseudo-Dice", "gain, points", "flat"], flat_lines),
        *(_picture(name) for name in figures if name.startswith("learning")),
    ]


def _until_target(value: float | None, digits: int) -> str:
    return "not reached" if value == math.inf else _number(value, f",.{digits}f")


def _learning_ratios(row: dict[str, Any], first: str) -> list[str]:
    if short_name(row["trainer"]) == first:
        return [NOTHING, NOTHING]
    bound = "> " if row["is_bound"] else ""
    interval = "" if math.isnan(row["low"]) else f" [{row['low']:.2f}, {row['high']:.2f}]"
    minutes = _number(row["minutes_ratio"], ".2f", "x")
    return [f"{bound}{row['ratio']:.2f}x{interval}", minutes if minutes == NOTHING else bound + minutes]


def _configuration_name(row: dict[str, Any]) -> str:
    return f"{row['dataset']}, {row['configuration']}"


def _set_name(row: dict[str, Any]) -> str:
    return f"{row['dataset']}, {row['configuration']}, {row['set']}"


def _table(header: list[str], lines: list[list[str]], may_be_left_out: Sequence[str] = ()) -> str:
    """may_be_left_out: columns that are not shown if nothing is in them."""
    columns = [
        column
        for column in zip(header, *lines, strict=True)
        if column[0] not in may_be_left_out or set(column[1:]) != {NOTHING}
    ]
    header, *lines = (list(row) for row in zip(*columns, strict=True))
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows)


def _points(fraction: float, sign: str = "") -> str:
    # 0 is added because a value that is rounded to -0.0 would keep its sign.
    return NOTHING if math.isnan(fraction) else f"{round(100 * fraction, 2) + 0:{sign}.2f}"


def _interval(low: float, high: float, sign: str = "") -> str:
    return "" if math.isnan(low) else f"[{_points(low, sign)}, {_points(high, sign)}]"


def _number(value: float | None, form: str, unit: str = "") -> str:
    return NOTHING if value is None or math.isnan(value) else f"{value:{form}}{unit}"
