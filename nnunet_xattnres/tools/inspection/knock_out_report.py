"""Table and heat maps of what the removal of sources costs."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from nnunet_xattnres.common.samples import Sample
from nnunet_xattnres.common.text import counted
from nnunet_xattnres.routing.drawing import HeatMap, draw_heat_maps, save_figure

OFF_DISTRIBUTION = (
    "A network without one of its sources mixes features in a way that it was not trained for. A number says how much "
    "this network relies on the source, not how good one would be that is trained without it."
)
WITH_REFERENCES = "Change in Dice without the source; negative: worse. Brackets: 95 % bootstrap interval over cases."
WITHOUT_REFERENCES = (
    "Share of the labelled voxels whose label changes without the source. Voxels count that have a label with it or "
    "without it. Brackets: 95 % bootstrap interval over cases."
)
UNDEFINED = "undefined"
NAME = "knock_out"
FILES = tuple(f"{NAME}.{ending}" for ending in ("md", "csv", "png", "pdf"))

Pair = tuple[str, str]  # target and source


@dataclass(frozen=True)
class KnockOutReport:
    """What the removal of every source of a target has changed.

    mean_weights: over the predicted foreground and the cases that have one. NaN if there is no such case.
    effects: by label, over cases: the change in Dice, or without references the share of labelled voxels that change.
    num_without_foreground: the number of cases in which nothing is predicted as foreground.
    """

    mean_weights: Mapping[Pair, float]
    effects: Mapping[Pair, Mapping[str, Sample]]
    num_cases: int
    num_without_foreground: int
    has_references: bool

    @property
    def labels(self) -> list[str]:
        return list(next(iter(self.effects.values())))

    def write(self, folder: Path, formats: Sequence[str]) -> None:
        """formats: of the heat maps, "png" or "pdf"."""
        (folder / f"{NAME}.md").write_text(self.markdown(), "utf-8")
        (folder / f"{NAME}.csv").write_text(self.csv(), "utf-8")
        for file_format in formats:
            save_figure(self.figure, folder / f"{NAME}.{file_format}")

    def markdown(self) -> str:
        what = WITH_REFERENCES if self.has_references else WITHOUT_REFERENCES
        no_foreground = (
            f" Nothing is predicted as foreground in {counted(self.num_without_foreground, 'case')}: no mean weight."
        )
        lines = [
            f"{what} Mean weight: over the predicted foreground. Cases: {self.num_cases}."
            + no_foreground * (self.num_without_foreground > 0),
            "",
            OFF_DISTRIBUTION,
            "",
            "| " + " | ".join(["target", "source", "mean weight", *self.labels]) + " |",
            "|" + "---|" * (3 + len(self.labels)),
        ]
        for (target, source), weight in self.mean_weights.items():
            shown = UNDEFINED if np.isnan(weight) else f"{weight:.3f}"
            cells = [effect_cell(effect, self.has_references) for effect in self.effects[target, source].values()]
            lines.append("| " + " | ".join([target, source, shown, *cells]) + " |")
        return "\n".join(lines) + "\n"

    def csv(self) -> str:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        name = "dice_change" if self.has_references else "share_changed"
        writer.writerow(["target", "source", "mean_weight", "label", "cases", name, "low", "high"])
        for (target, source), weight in self.mean_weights.items():
            for label, effect in self.effects[target, source].items():
                mean_weight, *numbers = ("" if np.isnan(x) else x for x in (round(weight, 6), *_interval(effect)))
                writer.writerow([target, source, mean_weight, label, effect.number, *numbers])
        return text.getvalue()

    def figure(self) -> Figure:
        interval = "; small: 95 % bootstrap interval over cases" * (self.num_cases > 1)
        note = f"{counted(self.num_cases, 'case')}{interval}\n{OFF_DISTRIBUTION}"
        return draw_heat_maps(list(self._heat_maps()), note)

    def _heat_maps(self) -> Iterator[HeatMap]:
        title = "Mean attention weight over the predicted foreground"
        if self.num_without_foreground == self.num_cases:
            title = "No mean attention weight: nothing is predicted as foreground"
        yield HeatMap(title, "weight", self.mean_weights)
        for label in self.labels:
            effects = {pair: of_pair[label] for pair, of_pair in self.effects.items()}
            yield HeatMap(
                f"Change in Dice of {label} without the source"
                if self.has_references
                else "Share of voxels that change",
                "change in Dice" if self.has_references else "share",
                {pair: effect.mean for pair, effect in effects.items()},
                {pair: (effect.low, effect.high) for pair, effect in effects.items()},
                signed=self.has_references,
            )


def effect_cell(effect: Sample, is_signed: bool) -> str:
    """The mean and, with several cases, its interval."""
    if not effect.number:
        return UNDEFINED
    form = "+.3f" if is_signed else ".3f"
    mean, low, high = (f"{round(x, 3) + 0.0:{form}}" for x in _interval(effect))  # no minus sign before zero
    return mean if effect.number == 1 else f"{mean} [{low}, {high}]"


def _interval(effect: Sample) -> tuple[float, float, float]:
    return effect.mean, effect.low, effect.high
