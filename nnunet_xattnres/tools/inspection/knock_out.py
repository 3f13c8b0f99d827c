"""What the removal of a source costs: every case is predicted once more without it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from nnunetv2.evaluation.evaluate_predictions import compute_tp_fp_fn_tn, region_or_label_to_mask
from tqdm import tqdm

from nnunet_xattnres.common.errors import XAttnResError
from nnunet_xattnres.common.samples import Sample, sample
from nnunet_xattnres.common.text import counted
from nnunet_xattnres.tools.inspection.knock_out_report import KnockOutReport, Pair
from nnunet_xattnres.tools.inspection.references import References
from nnunet_xattnres.tools.inspection.regions import LabelMap, Volume
from nnunet_xattnres.tools.inspection.trained_model import Model

CHANGED = "changed"  # the only column without references


class KnockOut:
    """The sources that are left out, one after the other, and what that has changed in the cases so far.

    sources: their names. None: all of the chosen targets of the model.
    references: None: predictions are compared with those of the whole network.

    Raises `XAttnResError` for a source that no target has.
    """

    def __init__(
        self, model: Model, sources: Sequence[str] | None, references: References | None, num_cases: int
    ) -> None:
        self.model = model
        self.references = references
        self._num_cases = num_cases
        known = list(dict.fromkeys(source for of_target in model.sources.values() for source in of_target))
        for source in sources or ():
            if source not in known:
                raise XAttnResError(f"no chosen target has a source {source}: choose from {', '.join(known)}")
        self.pairs: list[Pair] = [
            (target, source)
            for target, of_target in model.sources.items()
            for source in of_target
            if sources is None or source in sources
        ]
        # One entry per case so far.
        self._mean_weights: dict[Pair, list[float]] = {pair: [] for pair in self.pairs}
        self._effects: dict[Pair, list[dict[str, float]]] = {pair: [] for pair in self.pairs}

    @property
    def cost(self) -> str:
        """One line: the number of predictions."""
        pairs, predictions = len(self.pairs), len(self.pairs) * self._num_cases
        return (
            f"--knock-out: {counted(pairs, 'pair')} of target and source x {counted(self._num_cases, 'case')} = "
            f"{counted(predictions, 'prediction')} beside those of the maps; --targets and --sources cut them"
        )

    def of_case(
        self,
        image: Volume,
        properties: dict[str, Any],
        prediction: LabelMap,
        reference: LabelMap | None,
        mean_weights: Mapping[Pair, float],
    ) -> dict[Pair, dict[str, float]]:
        """Predict a case without every source in turn. Returns, and keeps, what that changes, by label.

        prediction: of the whole network. reference: see `References.read`.
        mean_weights: over the predicted foreground. NaN where nothing is predicted as foreground.
        """
        effects = {}
        dice_before = self._dice(prediction, reference)
        without = self.model.segmentations_without(image, properties, self.pairs)
        is_single = self.model.predictor.allow_tqdm
        with tqdm(without, total=len(self.pairs), unit="prediction", disable=not is_single) as progress:
            for pair, other in progress:
                if reference is None:
                    effects[pair] = {CHANGED: share_changed(prediction, other)}
                else:
                    dice_after = self._dice(other, reference)
                    effects[pair] = {label: dice_after[label] - dice_before[label] for label in dice_before}
                self._effects[pair].append(effects[pair])
                self._mean_weights[pair].append(mean_weights[pair])
        return effects

    def report(self) -> KnockOutReport:
        return KnockOutReport(
            {pair: _mean(of_cases) for pair, of_cases in self._mean_weights.items()},
            {
                pair: {label: _sample([effect[label] for effect in of_cases]) for label in of_cases[0]}
                for pair, of_cases in self._effects.items()
            },
            self._num_cases,
            int(np.isnan(next(iter(self._mean_weights.values()))).sum()),
            self.references is not None,
        )

    def _dice(self, prediction: LabelMap, reference: LabelMap | None) -> dict[str, float]:
        """By label. NaN where both have none of it. Empty without references."""
        if self.references is None or reference is None:
            return {}
        ignore = self.model.label_manager.ignore_label
        ignored = None if ignore is None else reference == ignore
        dice = {}
        for label, values in self.references.labels.items():
            masks = (region_or_label_to_mask(labels, values) for labels in (reference, prediction))
            tp, fp, fn, _ = compute_tp_fp_fn_tn(*masks, ignored)
            dice[label] = float(2 * tp / (2 * tp + fp + fn)) if tp + fp + fn else np.nan
        return dice


def share_changed(prediction: LabelMap, other: LabelMap) -> float:
    """The share of the voxels with a label in either of two label maps whose label differs. NaN if there are none."""
    labelled = (prediction > 0) | (other > 0)
    return float((prediction != other)[labelled].mean()) if labelled.any() else np.nan


def _mean(of_cases: Sequence[float]) -> float:
    values = [value for value in of_cases if not np.isnan(value)]
    return float(np.mean(values)) if values else np.nan


def _sample(of_cases: Sequence[float]) -> Sample:
    values = np.array(of_cases)
    return sample(values[~np.isnan(values)])
