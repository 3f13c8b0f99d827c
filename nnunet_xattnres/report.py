"""What a run reports: Dice tables, and pictures of cases."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from nnunet_xattnres.files import written_atomically

# Okabe and Ito's palette, told apart with every kind of colour vision.
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")


def dice_table(summaries: dict[str, dict[str, Any]], labels: dict[str, Any]) -> str:
    """One row per label, one column per trainer.

    summaries: what nnU-Net's evaluation has written, by trainer.
    labels: those of dataset.json; a list of values is a region.
    """
    names = {tuple(map(int, v)) if isinstance(v, list) else int(v): name for name, v in labels.items()}
    keys = next(iter(summaries.values()))["mean"]
    rows = [["", *summaries]]
    for key in keys:
        rows.append([names.get(key, str(key)), *(f"{s['mean'][key]['Dice']:.3f}" for s in summaries.values())])
    rows.append(["mean", *(f"{s['foreground_mean']['Dice']:.3f}" for s in summaries.values())])
    return align_columns(rows)


def align_columns(rows: list[list[str]]) -> str:
    """A line per row, the first column on the left, the others on the right of their width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )


def dice_per_case(summary: dict[str, Any], file_ending: str) -> dict[str, float]:
    """The mean over the labels of every case; a case without any foreground, rightly left empty, counts as 1."""
    dice = {}
    for case in summary["metric_per_case"]:
        values = [metrics["Dice"] for metrics in case["metrics"].values() if not np.isnan(metrics["Dice"])]
        name = Path(case["prediction_file"]).name.removesuffix(file_ending)
        dice[name] = float(np.mean(values)) if values else 1.0
    return dice


def spread_over_ranking(dice: dict[str, float], number: int) -> list[str]:
    """Up to `number` cases from the worst to the best, evenly spread over the ranking."""
    ranked = sorted(dice, key=lambda case: dice[case])
    picks = np.linspace(0, len(ranked) - 1, min(number, len(ranked))).round().astype(int)
    return [ranked[pick] for pick in picks]


def names_of_values(labels: dict[str, Any]) -> dict[int, str]:
    """The names of the values in a label map; a value that only regions contain is named after its number."""
    values = {int(value) for label in labels.values() for value in (label if isinstance(label, list) else [label])}
    names = {int(label): name for name, label in labels.items() if not isinstance(label, list)}
    return {value: names.get(value, f"label {value}") for value in sorted(values) if value != 0}


@dataclass(frozen=True)
class PicturedCase:
    """What is drawn of a case.

    image: its first channel [z, y, x].
    reference, predictions: label maps [z, y, x]; the predictions by trainer.
    dice: the mean Dice of each trainer's prediction.
    spacing: of y and x in mm.
    """

    name: str
    image: NDArray[np.floating]
    reference: NDArray[np.integer]
    predictions: dict[str, NDArray[np.integer]]
    dice: dict[str, float]
    spacing: tuple[float, float]


def draw_cases(cases: list[PicturedCase], names: dict[int, str]) -> Figure:
    """A column per case: the slice with most of the reference's foreground, and the label maps on top of it.

    names: of the values in the label maps.
    """
    trainers = list(cases[0].predictions)
    tallest = max(case.image.shape[1] * case.spacing[0] / (case.image.shape[2] * case.spacing[1]) for case in cases)
    width, height = 2.2, 2.2 * np.clip(tallest, 0.5, 1.5) + 0.25
    figure = Figure(figsize=(width * len(cases) + 0.5, height * (2 + len(trainers)) + 0.6), layout="constrained")
    axes = figure.subplots(2 + len(trainers), len(cases), squeeze=False)
    for case, column in zip(cases, axes.T, strict=True):
        plane = int(np.isin(case.reference, list(names)).sum(axis=(1, 2)).argmax())
        for axis, label_map in zip(column, [None, case.reference, *case.predictions.values()], strict=True):
            labels = None if label_map is None else label_map[plane]
            draw_slice(axis, case.image[plane], case.spacing, labels)
            axis.set_anchor("N")
        column[0].set_title(f"{case.name}\nslice {plane}", fontsize=9)
        for axis, trainer in zip(column[2:], trainers, strict=True):
            axis.set_title(f"Dice {case.dice[trainer]:.2f}", fontsize=9)
    for axis, label in zip(axes[:, 0], ["image", "reference", *trainers], strict=True):
        # In two lines, for a panel is not as high as a trainer's name is long.
        axis.set_ylabel(label.replace("nnUNetTrainer", "nnUNetTrainer\n"), fontsize=9)
    handles = [Patch(color=label_colour(value), label=name) for value, name in names.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 5), fontsize=9, frameon=False)
    return figure


def figure_style() -> AbstractContextManager[None]:
    """nnU-Net's progress plot changes matplotlib's defaults for the whole process. In a PDF, text stays text."""
    return style.context(["default", {"pdf.fonttype": 42}])


def write_figure(figure: Figure, path: Path, dpi: int = 150) -> None:
    """Whole or not at all, in the format that the path's name says."""
    with written_atomically(path) as temporary:
        kind = path.suffix[1:].lower()
        # Without the time of writing, the same picture is the same file.
        figure.savefig(temporary, format=kind, dpi=dpi, metadata={"CreationDate": None} if kind == "pdf" else None)


def draw_slice(
    axis: Axes, image: NDArray[np.floating], spacing: tuple[float, float], labels: NDArray[np.integer] | None = None
) -> None:
    """A slice [y, x] in grey, and in colours a label map on top of it. spacing: of y and x in mm."""
    pixel_aspect = spacing[0] / spacing[1]
    darkest, brightest = np.percentile(image, (1, 99.5))
    axis.imshow(image, cmap="gray", vmin=darkest, vmax=brightest, aspect=pixel_aspect)
    if labels is not None:
        overlay = np.zeros((*labels.shape, 4))
        for value in np.unique(labels[labels > 0]):
            overlay[labels == value] = to_rgba(label_colour(value), alpha=0.65)
        axis.imshow(overlay, interpolation="nearest", aspect=pixel_aspect)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


def label_colour(value: int) -> str:
    return COLOURS[(int(value) - 1) % len(COLOURS)]
