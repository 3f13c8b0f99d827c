"""The command `nnunet-xattnres compare`: the report of a benchmark on results that exist already.

In the report's terms the name of a result is a trainer, and each of its folds is a training. Results of one name are
repeats of one setup, and count as its seeds.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nnunet_xattnres.benchmark.cells import FINISHED
from nnunet_xattnres.benchmark.measuring import Prediction, References, measured_cases, measuring_versions
from nnunet_xattnres.benchmark.report import check_output, write_report
from nnunet_xattnres.benchmark.result_folders import MISSING, Result, read_result
from nnunet_xattnres.benchmark.tables import Tables, make_table
from nnunet_xattnres.common.errors import XAttnResError
from nnunet_xattnres.common.text import counted
from nnunet_xattnres.nnunet.datasets import check_nifti_files

REMEDY = "get the prediction again, or remove it, and its case is left out"
KEEP_RESULTS = "give the results, --folds and --group that it was made from"
# Columns of text of the table "cells".
UNKNOWN = dict.fromkeys(("plans", "patch_size", "features", "device", "versions"), "")


@dataclass(frozen=True)
class Options:
    """What is compared, and where the report goes.

    folders: result folders of nnU-Net, or folders of predictions. folds: of result folders; None for all.
    references: the folder of the reference segmentations. None: those that nnU-Net has preprocessed.
    group: a name for each folder. None: what tells the folders apart.
    family: whether all datasets are of the same patients.
    """

    folders: list[Path]
    output: Path
    folds: list[int] | None
    references: Path | None
    group: list[str] | None
    nsd_tolerance_mm: float
    family: bool


@dataclass(frozen=True)
class _Run:
    """A result with its name, and the seed that tells it from others of that name on its dataset."""

    result: Result
    name: str
    seed: int
    references: References

    def state(self, fold: int) -> str:
        return self.result.state(fold, self.references.file_ending)

    def lack(self, are_chosen: bool) -> str:
        """Why no fold is finished, and the remedy. are_chosen: whether the user has chosen folds."""
        if not self.result.planned:
            return (
                f"no predictions *{self.references.file_ending}: give the folder that they are in, as "
                "nnUNetv2_predict writes them"
            )
        if not self.result.predictions and (self.result.folder / "fold_all" / "validation").is_dir():
            return (
                "no predictions but those of fold_all, which has trained on these cases: train a fold (`nnUNetv2_train "
                "... 0`), or predict other cases with it and compare folders of predictions (--references)"
            )
        in_these = " in these folds" if are_chosen else ""
        return (
            f"no predictions of a finished validation{in_these}: validate with `nnUNetv2_train ... --val`, or choose "
            "another result"
        )

    def predictions(self, cell: dict[str, Any]) -> Iterator[Prediction]:
        """Those of a fold. Raises `XAttnResError` if one has no reference. cell: the columns of `CELL`."""
        paths = self.result.files(cell["fold"], self.references.file_ending)
        references = {path: self.result.references / path.name for path in paths}
        lacking = [path for path, reference in references.items() if not reference.is_file()]
        if lacking:
            folder = self.result.references
            remedy = "add it, or remove the prediction"
            if len(lacking) == len(paths):
                # A single name may be a slip. If no name fits, the folders are not of the same cases.
                there = next((path.name for path in sorted(folder.glob(f"*{self.references.file_ending}"))), "nothing")
                remedy = (
                    f"give the references of these cases, by the same names, with --references; {folder} holds {there}"
                )
            raise XAttnResError(
                f"{len(lacking)} of {counted(len(paths), 'prediction')} in {paths[0].parent} have no reference in "
                f"{folder}, such as {lacking[0].name}: {remedy}"
            )
        for path, reference in references.items():
            yield Prediction(cell, self.references, self.result.kind, reference, path, REMEDY)


def run_compare(options: Options) -> None:
    """Measure the predictions, and write the report.

    Raises `XAttnResError` if results cannot be compared, if a file is missing or damaged, and if the report cannot be
    written to its folder.
    """
    _check(options)
    results = [read_result(folder, options.references) for folder in options.folders]
    _check_place(options.output, results)
    runs = _runs(results, options)
    tables, predictions = _planned(runs, options.folds)
    check_output(options.output, tables, KEEP_RESULTS)
    check_nifti_files(dict.fromkeys(path for found in predictions for path in (found.reference, found.path)))
    write_report(replace(tables, cases=measured_cases(predictions)), options.output)


def _check(options: Options) -> None:
    places = [folder.resolve() for folder in options.folders]
    for folder, place in zip(options.folders, places, strict=True):
        if places.count(place) > 1:
            raise XAttnResError(f"{folder} is given twice: give every result once")
    if len(places) == 1:
        raise XAttnResError("there is only one result: give two or more")
    if options.group and len(options.group) != len(places):
        raise XAttnResError(
            f"--group has {counted(len(options.group), 'name')} for {len(places)} results: give one for each"
        )
    for name in options.group or ():
        if not name.strip() or not name.isprintable():
            raise XAttnResError(f"--group has the name {name!r}: give a name that can be read")
    if not 0 < options.nsd_tolerance_mm < math.inf:
        raise XAttnResError("--nsd-tolerance-mm must be a number above 0")


def _check_place(output: Path, results: list[Result]) -> None:
    """Raise `XAttnResError` if the report would go into a folder that is only read."""
    place = output.resolve()
    for folder in (folder for result in results for folder in (result.folder, result.references)):
        if folder.resolve() in (place, *place.parents):
            raise XAttnResError(f"{output} is in {folder}, which is only read: choose another -o")


def _runs(results: list[Result], options: Options) -> list[_Run]:
    """The results with their names. Raises `XAttnResError` if results cannot be compared."""
    kinds = {bool(result.planned): result.folder for result in results}
    if len(kinds) == 2:
        raise XAttnResError(
            f"{kinds[True]} is an nnU-Net result folder and {kinds[False]} a folder of predictions: give folders of "
            "one kind (nnUNetv2_accumulate_crossval_results makes a folder of predictions of all folds)"
        )
    if options.folds and False in kinds:
        raise XAttnResError("folders of predictions have no folds: leave out --folds")
    datasets = list(dict.fromkeys(result.dataset for result in results))
    if options.references and len(datasets) > 1:
        raise XAttnResError(
            f"--references are of one dataset, these results are of {', '.join(datasets)}: leave it out"
        )
    runs: list[_Run] = []
    for result, name in zip(results, options.group or _names(results), strict=True):
        earlier = [run.result for run in runs if (run.result.dataset, run.name) == (result.dataset, name)]
        if earlier and options.group is None:
            raise XAttnResError(
                f"{earlier[0].folder} and {result.folder} are both called {name}: give each result a name with "
                "--group, and repeats of one setup the same one"
            )
        family = "+".join(datasets) if options.family else result.dataset
        runs.append(_Run(result, name, len(earlier), result.read_references(family, options.nsd_tolerance_mm)))
    for dataset in datasets:
        _check_labels([run for run in runs if run.result.dataset == dataset])
    return runs


def _names(results: list[Result]) -> list[str]:
    """The parts in which each result differs from others on its dataset; the first part where there are none."""
    names = []
    for result in results:
        of_dataset = [other.parts for other in results if other.dataset == result.dataset]
        is_common = [len(set(parts)) == 1 for parts in zip(*of_dataset, strict=True)]
        own = [part for part, common in zip(result.parts, is_common, strict=True) if not common]
        names.append("__".join(own or result.parts[:1]))
    return names


def _check_labels(of_dataset: list[_Run]) -> None:
    first, *others = of_dataset
    if not others:
        raise XAttnResError(
            f"{first.result.folder} is the only result on {first.result.dataset}: give another one on it"
        )
    for run in others:
        ours, theirs = ((r.references.labels, r.references.ignored) for r in (run, first))
        if ours != theirs:
            raise XAttnResError(
                f"{run.result.dataset_json} has other labels than {first.result.dataset_json} "
                f"({run.references.row()['labels']} and {first.references.row()['labels']}): compare results with the "
                "same labels"
            )


def _planned(runs: list[_Run], folds: list[int] | None) -> tuple[Tables, list[Prediction]]:
    """The tables without cases, and the predictions to be measured. folds: as the user has chosen them."""
    cells: list[dict[str, Any]] = []
    curves: dict[str, list[dict[str, Any]]] = {"curves": [], "label_curves": []}
    predictions: list[Prediction] = []
    for run, cell, state in _cells(runs, folds):
        costs: dict[str, Any] = {}
        if state == FINISHED:
            costs, of_cell = run.result.costs(cell, run.references.labels)
            for name, rows in of_cell.items():
                curves[name] += rows
            predictions += run.predictions(cell)
        else:
            title = "{dataset} {trainer} fold {fold}".format(**cell)
            # The user knows no seeds: they number the runs that share a name.
            repeat = f" seed {cell['seed']}" if any(run.seed for run in runs) else ""
            print(f"Left out: {title}{repeat} ({state})")
        cells.append(UNKNOWN | run.result.planned | costs | cell | {"state": state})
    _check_common_cases(runs, predictions)
    setups = {run.name: run.result for run in reversed(runs)}
    tables = Tables(
        cases=make_table("cases", ()),
        cells=make_table("cells", cells),
        datasets=make_table("datasets", {run.result.dataset: run.references.row() for run in runs}.values()),
        trainers=make_table(
            "trainers",
            (
                {
                    "trainer": name,
                    "trainer_class": setups[name].trainer_class,
                    "planner": setups[name].planner,
                    "parameters_of": "",
                }
                for name in dict.fromkeys(run.name for run in runs)
            ),
        ),
        versions=measuring_versions(),
        **{name: make_table(name, rows) for name, rows in curves.items()},
    )
    return tables, predictions


def _cells(runs: list[_Run], chosen: list[int] | None) -> Iterator[tuple[_Run, dict[str, Any], str]]:
    """For every dataset all names, folds and seeds: a run of that name, the columns of `CELL`, and the state.

    chosen: folds, None for all. Raises `XAttnResError` if a result has no finished fold.
    """
    for dataset in dict.fromkeys(run.result.dataset for run in runs):
        of_dataset = [run for run in runs if run.result.dataset == dataset]
        configuration = "+".join(dict.fromkeys(run.result.configuration for run in of_dataset))
        folds = sorted(set(chosen or [fold for run in of_dataset for fold in run.result.predictions]))
        for run in of_dataset:
            if FINISHED not in map(run.state, folds):
                raise XAttnResError(f"{run.result.folder} has {run.lack(bool(chosen))}")
        by_name = {(run.name, run.seed): run for run in of_dataset}
        # The order of a benchmark's matrix.
        for seed in sorted({run.seed for run in of_dataset}):
            for fold in folds:
                for name in dict.fromkeys(run.name for run in of_dataset):
                    repeat = by_name.get((name, seed))
                    key = {"dataset": dataset, "configuration": configuration, "trainer": name}
                    state = repeat.state(fold) if repeat else MISSING
                    yield repeat or by_name[name, 0], key | {"fold": fold, "seed": seed}, state


def _check_common_cases(runs: list[_Run], predictions: list[Prediction]) -> None:
    cases: dict[tuple[str, str], set[tuple[int, int, str]]] = {}
    for found in predictions:
        cell = found.cell
        of_name = cases.setdefault((cell["dataset"], cell["trainer"]), set())
        of_name.add((cell["fold"], cell["seed"], found.path.name))
    for run in runs:
        first = next(other for other in runs if other.result.dataset == run.result.dataset)
        if cases[run.result.dataset, run.name].isdisjoint(cases[first.result.dataset, first.name]):
            raise XAttnResError(
                f"{run.result.folder} and {first.result.folder} have no predicted case in common in any fold: give "
                "results on the same cases and folds"
            )
