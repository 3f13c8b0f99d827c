"""What the loss of a source costs: every case is predicted once more without it."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from nnunetv2.evaluation.evaluate_predictions import compute_tp_fp_fn_tn, region_or_label_to_mask
from tqdm import tqdm

from nnunet_xattnres.common.device import is_out_of_memory
from nnunet_xattnres.common.errors import XAttnResError, one_line
from nnunet_xattnres.common.files import write_text_atomically
from nnunet_xattnres.common.samples import Sample, sample
from nnunet_xattnres.common.text import counted
from nnunet_xattnres.nnunet.datasets import labels_or_regions, unknown_values
from nnunet_xattnres.routing.drawing import HeatMap, draw_heat_maps, save_figure
from nnunet_xattnres.tools.inspection.regions import LabelMap, Volume
from nnunet_xattnres.tools.inspection.trained_model import Model

OFF_DISTRIBUTION = (
    "A network without one of its sources mixes features in a way that it was not trained for. A number says how much "
    "this network relies on the source, not how good one would be that is trained without it."
)
CHANGED = "changed"
WITH_REFERENCES = "Change in Dice without the source; negative: worse. Brackets: 95 % bootstrap interval over cases."
WITHOUT_REFERENCES = (
    "Share of the labelled voxels whose label changes without the source. Voxels count that have a label with it or "
    "without it. Brackets: 95 % bootstrap interval over cases."
)
NAME = "knock_out"

# By target, source and label. NaN where it is undefined.
Effects = dict[str, dict[str, dict[str, float]]]


class KnockOut:
    """The sources that are left out, one after the other, and what that has changed in the cases so far.

    sources: their names. None: all of the chosen targets of the model.
    labels: a folder of references. None: predictions are compared with those of the whole network.
    cases: their names.

    Raises `XAttnResError` for a source that no target has, and for a missing reference.
    """

    def __init__(self, model: Model, sources: Sequence[str] | None, labels: Path | None, cases: Sequence[str]) -> None:
        self.model = model
        known = list(dict.fromkeys(source for of_target in model.sources.values() for source in of_target))
        for source in sources or ():
            if source not in known:
                raise XAttnResError(f"no chosen target has a source {source}: choose from {', '.join(known)}")
        self.pairs = [
            (target, source)
            for target, of_target in model.sources.items()
            for source in of_target
            if sources is None or source in sources
        ]
        self.references = _references(labels, cases, model.dataset_json["file_ending"]) if labels else {}
        self.labels = labels_or_regions(model.dataset_json["labels"]) if labels else {CHANGED: ()}
        self._weights: dict[tuple[str, str], list[float]] = {pair: [] for pair in self.pairs}
        self._effects: dict[tuple[str, str], list[dict[str, float]]] = {pair: [] for pair in self.pairs}
        self._num_cases = len(cases)

    @property
    def cost(self) -> str:
        """One line: the number of predictions."""
        number = len(self.pairs)
        return (
            f"--knock-out: {counted(number, 'pair')} of target and source x {counted(self._num_cases, 'case')} = "
            f"{counted(number * self._num_cases, 'prediction')} beside those of the maps; --targets and "
            "--sources cut them"
        )

    def check_references(self, cases: Mapping[str, Sequence[str]]) -> None:
        """Raise `XAttnResError` for a reference that `reference` would refuse, before hours of predictions.

        cases: the files of every case, one per channel.
        """
        for case in self.references:
            self.reference(case, *self.model.read(cases[case]))

    def reference(self, case: str, image: Volume, properties: Mapping[str, Any]) -> LabelMap | None:
        """The reference of a case [z, y, x], or None without references. image, properties: from `Model.read`.

        Raises `XAttnResError` if it cannot be read, does not fit the image, or holds values that the model's
        dataset.json does not name.
        """
        if not self.references:
            return None
        path = self.references[case]
        try:
            (reference,), read = self.model.reader.read_seg(str(path))
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise XAttnResError(f"cannot read {path} ({one_line(str(error))}): get the file again") from None
        remedy = "--labels takes the references of these images"
        if reference.shape != image.shape[1:]:
            raise XAttnResError(f"{path} has the shape {reference.shape}, its image {image.shape[1:]}: {remedy}")
        if not np.allclose(read["spacing"], properties["spacing"], rtol=1e-3):
            raise XAttnResError(
                f"{path} has the spacing {tuple(read['spacing'])}, its image {tuple(properties['spacing'])}: {remedy}"
            )
        if unknown := unknown_values(reference, self.labels, self.model.label_manager.ignore_label):
            raise XAttnResError(f"{path} holds the values {unknown}, which are no labels of the model: {remedy}")
        return reference

    def of_case(
        self,
        image: Volume,
        properties: dict[str, Any],
        prediction: LabelMap,
        reference: LabelMap | None,
        weights: Mapping[str, Mapping[str, float]],
    ) -> Effects:
        """Predict a case without every source in turn, and keep what that changes.

        prediction: of the whole network. weights: the mean weight of every source, by target.
        """
        effects: Effects = {}
        without = self.model.segmentations_without(image, properties, self.pairs)
        before = None if reference is None else self._dice(prediction, reference)
        single = self.model.predictor.allow_tqdm
        for (target, source), other in tqdm(without, total=len(self.pairs), unit="prediction", disable=not single):
            if reference is None or before is None:
                effect = {CHANGED: _share_changed(prediction, other)}
            else:
                after = self._dice(other, reference)
                effect = {label: after[label] - before[label] for label in self.labels}
            effects.setdefault(target, {})[source] = effect
            self._effects[target, source].append(effect)
            self._weights[target, source].append(weights[target][source])
        return effects

    def write(self, folder: Path, formats: Sequence[str]) -> str:
        """Write table and heat maps of all cases into `folder`. Returns the table. formats: see `inspect_case`."""
        samples = {
            pair: {label: _sample(effect[label] for effect in effects) for label in self.labels}
            for pair, effects in self._effects.items()
        }
        weights = {pair: float(np.mean(of_cases)) for pair, of_cases in self._weights.items()}
        table = self._markdown(weights, samples)
        write_text_atomically(table, folder / f"{NAME}.md")
        write_text_atomically(self._csv(weights, samples), folder / f"{NAME}.csv")
        for file_format in formats:
            save_figure(lambda: self._draw(weights, samples), folder / f"{NAME}.{file_format}")
        return table

    def _dice(self, prediction: LabelMap, reference: LabelMap) -> dict[str, float]:
        ignore = self.model.label_manager.ignore_label
        ignored = None if ignore is None else reference == ignore
        dice = {}
        for label, values in self.labels.items():
            masks = (region_or_label_to_mask(labels, values) for labels in (reference, prediction))
            tp, fp, fn, _ = compute_tp_fp_fn_tn(*masks, ignored)
            dice[label] = float(2 * tp / (2 * tp + fp + fn)) if tp + fp + fn else np.nan
        return dice

    @property
    def _what(self) -> str:
        return WITH_REFERENCES if self.references else WITHOUT_REFERENCES

    def _markdown(self, weights: Mapping[tuple[str, str], float], samples: Mapping[Any, Mapping[str, Sample]]) -> str:
        lines = [
            f"{self._what} Mean weight: over the predicted foreground. Cases: {self._num_cases}.",
            "",
            OFF_DISTRIBUTION,
            "",
            "| " + " | ".join(["target", "source", "mean weight", *self.labels]) + " |",
            "|" + "---|" * (3 + len(self.labels)),
        ]
        for (target, source), weight in weights.items():
            cells = [_cell(samples[target, source][label], bool(self.references)) for label in self.labels]
            lines.append("| " + " | ".join([target, source, f"{weight:.3f}", *cells]) + " |")
        return "\n".join(lines) + "\n"

    def _csv(self, weights: Mapping[tuple[str, str], float], samples: Mapping[Any, Mapping[str, Sample]]) -> str:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        effect = "dice_change" if self.references else "share_changed"
        writer.writerow(["target", "source", "mean_weight", "label", "cases", effect, "low", "high"])
        for (target, source), weight in weights.items():
            for label, of_label in samples[target, source].items():
                numbers = ["" if np.isnan(x) else x for x in (of_label.mean, of_label.low, of_label.high)]
                writer.writerow([target, source, round(weight, 6), label, of_label.number, *numbers])
        return text.getvalue()

    def _draw(self, weights: Mapping[tuple[str, str], float], samples: Mapping[Any, Mapping[str, Sample]]) -> Figure:
        maps = [HeatMap("Mean attention weight over the predicted foreground", "weight", weights)]
        for label in self.labels:
            what = f"Change in Dice of {label} without the source" if self.references else "Share of voxels that change"
            of_label = {pair: of_pair[label] for pair, of_pair in samples.items()}
            maps.append(
                HeatMap(
                    what,
                    "change in Dice" if self.references else "share",
                    {pair: of_pair.mean for pair, of_pair in of_label.items()},
                    {pair: (of_pair.low, of_pair.high) for pair, of_pair in of_label.items()},
                    signed=bool(self.references),
                )
            )
        interval = "; small: 95 % bootstrap interval over cases" * (self._num_cases > 1)
        return draw_heat_maps(maps, f"{counted(self._num_cases, 'case')}{interval}\n{OFF_DISTRIBUTION}")


def _references(labels: Path, cases: Sequence[str], file_ending: str) -> dict[str, Path]:
    references = {case: labels / f"{case}{file_ending}" for case in cases}
    missing = [path for path in references.values() if not path.is_file()]
    if missing:
        raise XAttnResError(
            f"{len(missing)} of {len(cases)} cases have no reference, such as {missing[0]}: --labels takes a folder "
            "with one for every case, or leave it out"
        )
    return references


def _share_changed(prediction: LabelMap, other: LabelMap) -> float:
    labelled = (prediction > 0) | (other > 0)
    return float((prediction != other)[labelled].mean()) if labelled.any() else 0.0


def _sample(values: Any) -> Sample:
    defined = np.array(list(values))
    return sample(defined[~np.isnan(defined)])


def _cell(of_cases: Sample, signed: bool) -> str:
    if not of_cases.number:
        return "undefined"
    form = "+.3f" if signed else ".3f"
    mean, low, high = (f"{round(x, 3) + 0.0:{form}}" for x in (of_cases.mean, of_cases.low, of_cases.high))  # no -0
    return mean if of_cases.number == 1 else f"{mean} [{low}, {high}]"
