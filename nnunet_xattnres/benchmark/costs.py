"""Time, parameters and memory of trainers.

Time and memory are compared on one device only. A training that was taken over from a report has that report behind
the name of its device, because machines of the same name may differ in speed (`collecting.take_over`). A training on
several devices, one after the other, belongs to none.
"""

from typing import Any

import pandas

from nnunet_xattnres.benchmark.cells import FINISHED
from nnunet_xattnres.benchmark.cost_recording import OF_REPORT, SEVERAL
from nnunet_xattnres.common.samples import rounded

COSTS = ("seconds_per_epoch", "parameters", "peak_memory_gb")
COSTS_OF_DEVICE = ("seconds_per_epoch", "peak_memory_gb")


def costs(cells: pandas.DataFrame, dataset: str, configuration: str, trainer: str) -> dict[str, Any]:
    """A trainer's costs: medians over its finished cells, None if unknown.

    Time and memory are those on one device, cost_device: the known device of most finished cells of all trainers. If no
    device is known, cost_device is "", and the cells without a device count.
    """
    finished = _finished(cells, dataset, configuration)
    device = _most_frequent(finished.device)
    own = finished[finished.trainer == trainer]
    comparable = own[own.device == device]
    medians = {cost: (comparable if cost in COSTS_OF_DEVICE else own)[cost].median() for cost in COSTS}
    known = {cost: None if pandas.isna(median) else float(median) for cost, median in medians.items()}
    return known | {"cost_device": device}


def cost_ratios(cells: pandas.DataFrame, dataset: str, configuration: str, first: str, second: str) -> dict[str, Any]:
    """The ratios first / second: medians over the folds and seeds that both trainers have finished.

    For time and memory, only folds and seeds count that both have trained on the same device. Its name is the known one
    of most finished cells of all trainers, with any report. `seconds_per_epoch_cells` and `peak_memory_gb_cells` are
    the numbers of folds and seeds behind these two ratios.
    """
    finished = _finished(cells, dataset, configuration)
    name = _most_frequent(_without_report(finished.device))
    ours, theirs = (finished[finished.trainer == trainer] for trainer in (first, second))
    both = ours.merge(theirs, on=["fold", "seed"], suffixes=("", "_of_second"))
    is_one_device = (both.device == both.device_of_second) & (both.device != "")
    comparable = both[is_one_device & (_without_report(both.device) == name)]
    ratios: dict[str, Any] = {}
    for cost in COSTS:
        pairs = comparable if cost in COSTS_OF_DEVICE else both
        known = (pairs[cost] / pairs[f"{cost}_of_second"]).dropna()
        ratios[f"{cost}_ratio"] = rounded(known.median()) if len(known) else None
        if cost in COSTS_OF_DEVICE:
            ratios[f"{cost}_cells"] = len(known)
    return ratios


def _finished(cells: pandas.DataFrame, dataset: str, configuration: str) -> pandas.DataFrame:
    of_set = (cells.dataset == dataset) & (cells.configuration == configuration)
    return cells[of_set & (cells.state == FINISHED)]


def _without_report(devices: pandas.Series) -> pandas.Series:
    return devices.str.split(OF_REPORT, regex=False).str[0]


def _most_frequent(devices: pandas.Series) -> str:
    """The known device that is most frequent, "" if none is known."""
    known = [device for device in devices if device and SEVERAL not in device]
    return max(known, key=known.count, default="")
