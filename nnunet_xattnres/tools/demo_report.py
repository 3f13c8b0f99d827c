"""The demo's results: a Dice table and a picture of cases."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from nnunet_xattnres.common.figures import draw_slice, label_colour
from nnunet_xattnres.common.text import align_columns


def dice_table(summaries: dict[str, dict[str, Any]], labels: dict[str, Any]) -> str:
    """A row per label, a column per trainer, and a row for the mean.

    summaries: the files of nnU-Net's evaluation, by trainer.
    labels: as in dataset.json. A list of values is a region.
    """
    names = {tuple(map(int, v)) if isinstance(v, list) else int(v): name for name, v in labels.items()}
    keys = next(iter(summaries.values()))["mean"]
    rows = [["", *summaries]]
    for key in keys:
        rows.append([names.get(key, str(key)), *(f"{s['mean'][key]['Dice']:.3f}" for s in summaries.values())])
    rows.append(["mean", *(f"{s['foreground_mean']['Dice']:.3f}" for s in summaries.values())])
    return align_columns(rows)


def dice_per_case(summary: dict[str, Any], file_ending: str) -> dict[str, float]:
    """The mean Dice over the labels, by case. A case without foreground whose prediction is empty counts as 1."""
    dice = {}
    for case in summary["metric_per_case"]:
        values = [metrics["Dice"] for metrics in case["metrics"].values() if not np.isnan(metrics["Dice"])]
        name = Path(case["prediction_file"]).name.removesuffix(file_ending)
        dice[name] = float(np.mean(values)) if values else 1.0
    return dice


def spread_over_ranking(dice: dict[str, float], number: int) -> list[str]:
    """Up to `number` cases, from the worst to the best, in equal steps of the ranking."""
    ranked = sorted(dice, key=lambda case: dice[case])
    picks = np.linspace(0, len(ranked) - 1, min(number, len(ranked))).round().astype(int)
    return [ranked[pick] for pick in picks]


@dataclass(frozen=True)
class PicturedCase:
    """One case of the picture.

    image: its first channel [z, y, x].
    reference, predictions: label maps [z, y, x], the predictions by trainer.
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
    """A column per case: the slice in which the reference has the most foreground, alone and under each label map.

    names: of the foreground values in the label maps.
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
        # Two lines: a trainer's name is longer than a panel is high.
        axis.set_ylabel(label.replace("nnUNetTrainer", "nnUNetTrainer\n"), fontsize=9)
    handles = [Patch(color=label_colour(value), label=name) for value, name in names.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 5), fontsize=9, frameon=False)
    return figure
