"""The figures of a report."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from nnunet_xattnres.benchmark.comparisons import case_values
from nnunet_xattnres.benchmark.learning_curves import learning_curves
from nnunet_xattnres.benchmark.results import Results
from nnunet_xattnres.benchmark.statistics import BETTER, NO_DIFFERENCE, WORSE
from nnunet_xattnres.benchmark.tables import SET, Tables
from nnunet_xattnres.common.figures import COLOURS, figure_style, write_figure
from nnunet_xattnres.nnunet.installation import short_name

# Yellow is too light for lines and points on white.
LINE_COLOURS = ("black", *(colour for colour in COLOURS if colour != "#F0E442"))
LINE_STYLES = ("-", "--", ":")
VERDICT_STYLES: dict[str, dict[str, Any]] = {
    BETTER: {"color": "#0072B2", "marker": "^"},
    WORSE: {"color": "#D55E00", "marker": "v"},
    NO_DIFFERENCE: {"color": "0.45", "marker": "o", "markerfacecolor": "white"},
}
POINTS = 100  # Dice is drawn in percent
FORMATS = ("png", "pdf")
FONT_SIZE = 8
SMALL_FONT_SIZE = 7
PANELS_PER_ROW = 3
INCHES_OF_A_NAME = 1.9


def write_figures(tables: Tables, results: Results, output: Path) -> list[str]:
    """Write all figures to the folder `output`, in every format. Returns their names."""
    trainers = list(tables.trainers.trainer)
    values = case_values(tables.cases)
    figures: dict[str, Callable[[], Figure]] = {}
    differences = [row for row in results.with_first if row["metric"] == "dice"]
    if differences:
        figures["paired_differences"] = partial(draw_differences, differences)
    for key, of_set in values.groupby(SET, sort=False):
        figures["_".join(["dice", *key])] = partial(draw_cases, of_set, trainers)
    for key, of_curves in tables.curves.groupby(SET[:2], sort=False):
        figures["_".join(["curves", *key])] = partial(draw_curves, of_curves, trainers)
    if results.learning:
        for key, of_curves in learning_curves(tables).groupby(SET[:2], sort=False):
            finals = [row for row in results.learning["flatness"] if (row["dataset"], row["configuration"]) == key]
            figures["_".join(["learning", *key])] = partial(draw_learning, of_curves, finals, trainers)
    with figure_style():
        for name, draw in figures.items():
            figure = draw()
            for kind in FORMATS:
                write_figure(figure, output / f"{name}.{kind}")
    return list(figures)


def set_title(row: Any) -> str:
    """A set's name, from a row with the columns of `SET`."""
    return f"{row['dataset']}\n{row['configuration']}, {row['set']}"


def draw_differences(rows: list[dict[str, Any]]) -> Figure:
    """A panel per set and per family of several sets, a line per trainer: its mean difference in Dice and the interval.

    rows: of `compare`, of one metric and one second trainer. The verdict on a family of several sets is drawn in the
        family's panel.
    """
    trainers = list(dict.fromkeys(row["first"] for row in rows))
    panels: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        panels.setdefault(set_title(row) if row["dataset"] else f"family {row['family']}\nper patient", []).append(row)
    num_rows = -(-len(panels) // PANELS_PER_ROW)
    num_columns = min(len(panels), PANELS_PER_ROW)
    size = (2.6 + 2.0 * num_columns, 0.9 + num_rows * (0.75 + 0.22 * len(trainers)))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(num_rows, num_columns, squeeze=False, sharey=True)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, of_panel) in zip(axes.flat, panels.items(), strict=False):
        _draw_panel_of_differences(axis, of_panel, trainers)
        axis.set_title(title, fontsize=FONT_SIZE)
    for axis in axes[:, 0]:
        axis.set_yticks(range(len(trainers)), [short_name(trainer) for trainer in trainers], fontsize=FONT_SIZE)
        axis.set_ylim(len(trainers) - 0.5, -0.5)  # the first on top
    label = f"mean Dice less that of {short_name(rows[0]['second'])}, percentage points\nwith 95 % interval over cases"
    figure.supxlabel(label, fontsize=FONT_SIZE)
    handles = [Line2D([], [], linestyle="-", label=verdict, **style) for verdict, style in VERDICT_STYLES.items()]
    if any(row["verdict"] is None for row in rows):
        handles.append(Line2D([], [], color="0.45", label="tested with its family"))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), fontsize=FONT_SIZE, frameon=False)
    return figure


def _draw_panel_of_differences(axis: Axes, rows: list[dict[str, Any]], trainers: list[str]) -> None:
    for row in rows:
        position = trainers.index(row["first"])
        style: dict[str, Any] = VERDICT_STYLES.get(row["verdict"], {"color": "0.45", "marker": "|"})
        axis.plot([POINTS * row["low"], POINTS * row["high"]], [position] * 2, color=style["color"], linewidth=1.4)
        axis.plot(POINTS * row["difference"], position, markersize=5, **style)
    axis.axvline(0, color="black", linewidth=0.8, zorder=0)
    axis.xaxis.set_major_locator(MaxNLocator(4))
    axis.margins(x=0.08)
    axis.tick_params(labelsize=SMALL_FONT_SIZE, length=2, pad=2)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="y", color="0.92")
    axis.set_axisbelow(True)
    axis.spines[["top", "right", "left"]].set_visible(False)


def draw_cases(values: pandas.DataFrame, trainers: list[str]) -> Figure:
    """A box per trainer, and a point per case. values: of one set, from `case_values`."""
    per_case = values.groupby(["trainer", "case"], sort=False).dice.mean() * POINTS
    trainers = [trainer for trainer in trainers if trainer in per_case.index]
    figure = Figure(figsize=(6.4, 0.9 + 0.45 * len(trainers)), layout="constrained")
    axis = figure.subplots()
    # Points have the same places whenever the figure is drawn.
    rng = np.random.default_rng(0)
    for position, trainer in enumerate(trainers):
        dice = per_case[trainer].to_numpy()
        axis.plot(
            dice,
            position + rng.uniform(-0.28, 0.28, len(dice)),
            ".",
            color=LINE_COLOURS[position % len(LINE_COLOURS)],
            alpha=0.7,
            markersize=5,
            markeredgewidth=0,
            rasterized=len(dice) > 1000,
        )
    black = {"color": "black", "linewidth": 1.0}
    axis.boxplot(
        [per_case[trainer].to_numpy() for trainer in trainers],
        positions=range(len(trainers)),
        orientation="horizontal",
        widths=0.62,
        showfliers=False,
        medianprops={"color": "black", "linewidth": 2.0},
        boxprops=black,
        whiskerprops=black,
        capprops=black,
        manage_ticks=False,
    )
    axis.set_yticks(range(len(trainers)), [short_name(trainer) for trainer in trainers], fontsize=FONT_SIZE)
    axis.set_ylim(len(trainers) - 0.5, -0.5)
    axis.set_xlabel("Dice of a case, %", fontsize=FONT_SIZE)
    axis.set_title(set_title(values.iloc[0]).replace("\n", ", "), fontsize=FONT_SIZE + 1)
    axis.tick_params(labelsize=FONT_SIZE, length=2)
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right", "left"]].set_visible(False)
    return figure


def draw_curves(curves: pandas.DataFrame, trainers: list[str]) -> Figure:
    """Pseudo-Dice and losses by epoch, a line per training. curves: of one dataset and configuration."""
    present = [trainer for trainer in trainers if (curves.trainer == trainer).any()]
    figure = Figure(figsize=(9.6, 3.2), layout="constrained")
    panels = {"pseudo_dice": "pseudo-Dice", "train_loss": "training loss", "val_loss": "validation loss"}
    for axis, (column, title) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for (trainer, _, _), of_cell in curves.groupby(["trainer", "fold", "seed"], sort=False):
            # A single epoch would make no line.
            marker = "." if len(of_cell) == 1 else ""
            axis.plot(of_cell.epoch, of_cell[column], marker=marker, alpha=0.75, **_line(present.index(trainer)))
        _label_panel(axis, title, "epoch")
    first = curves.iloc[0]
    figure.suptitle(f"{first.dataset}, {first.configuration}: a line per fold and seed", fontsize=FONT_SIZE + 1)
    _legend_of_lines(figure, present)
    return figure


def draw_learning(curves: pandas.DataFrame, finals: list[dict[str, Any]], trainers: list[str]) -> Figure:
    """A panel per label, a line per trainer: the median smoothed pseudo-Dice over trainings, and the range around it.

    curves: of `learning_curves`, of one dataset and configuration. finals: its rows of `flatness`.
    """
    present = [trainer for trainer in trainers if (curves.trainer == trainer).any()]
    labels = list(curves.label.unique())
    has_steps = curves.iterations.nunique(dropna=False) == 1 and curves.iterations.notna().all()
    figure = Figure(figsize=(max(6.4, 3.2 * len(labels)), 3.4), layout="constrained")
    for axis, label in zip(figure.subplots(1, len(labels), squeeze=False).flat, labels, strict=True):
        for final in (row["final"] for row in finals if row["label"] == label):
            axis.axhline(POINTS * final, color="0.6", linewidth=0.8, zorder=0)
        for position, trainer in enumerate(present):
            own = curves[(curves.label == label) & (curves.trainer == trainer)].dropna(subset="smoothed")
            values = POINTS * own.groupby("epoch").smoothed.agg(["min", "median", "max"])
            x = values.index * (int(curves.iterations.iloc[0]) if has_steps else 1)
            line = _line(position)
            axis.plot(x, values["median"], marker="." if len(values) == 1 else "", **line)
            axis.fill_between(x, values["min"], values["max"], color=line["color"], alpha=0.1, linewidth=0)
        _label_panel(axis, label, "steps" if has_steps else "epochs")
    first = curves.iloc[0]
    figure.suptitle(f"{first.dataset}, {first.configuration}: pseudo-Dice, %", fontsize=FONT_SIZE + 1)
    _legend_of_lines(figure, present)
    return figure


def _label_panel(axis: Axes, title: str, x_label: str) -> None:
    """The title and the axes of a panel of curves."""
    axis.set_title(title, fontsize=FONT_SIZE)
    axis.set_xlabel(x_label, fontsize=FONT_SIZE)
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axis.tick_params(labelsize=SMALL_FONT_SIZE, length=2)
    axis.spines[["top", "right"]].set_visible(False)


def _legend_of_lines(figure: Figure, trainers: list[str]) -> None:
    handles = [Line2D([], [], label=short_name(trainer), **_line(i)) for i, trainer in enumerate(trainers)]
    ncols = min(len(handles), int(figure.get_figwidth() // INCHES_OF_A_NAME))
    figure.legend(handles=handles, loc="outside lower center", ncols=ncols, fontsize=FONT_SIZE, frameon=False)


def _line(position: int) -> dict[str, Any]:
    style = LINE_STYLES[position // len(LINE_COLOURS) % len(LINE_STYLES)]
    return {"color": LINE_COLOURS[position % len(LINE_COLOURS)], "linestyle": style, "linewidth": 1.1}
