"""What a benchmark consists of: the spec, a YAML file, read and checked."""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from nnunet_xattnres.common.errors import XAttnResError, one_line, suggestion
from nnunet_xattnres.common.files import write_text_atomically

PLANNER = "ExperimentPlanner"
NUM_FOLDS = 5
# nnU-Net's own, which the plans have already.
PLANNED = ("2d", "3d_lowres", "3d_fullres", "3d_cascade_fullres")
# What is tried at most, to tell a slip from an intention.
WIDTHS = (0.25, 8.0)
LARGEST_BATCH = 10_000
LIKENESS_OF_A_SLIP = 0.9
LOCAL, SLURM = EXECUTORS = ("local", "slurm")
# It becomes part of folder names, in which nnU-Net separates by two underscores.
NAME = re.compile(r"(?!.*__)[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Dataset:
    """A dataset of the matrix.

    path: an MSD task, as a folder or a .tar, or a folder in nnU-Net's raw format. id: a dataset in nnUNet_raw, instead.
    name: nnU-Net's name for it, DatasetNNN_Name; needs not be given.
    nsd_tolerance_mm: of the normalised surface Dice; pixels where images have no spacing.
    family: datasets of the same patients share one, and count as one in corrections for multiple testing.
    test: predict imagesTs, labelled in labelsTs; by default where a dataset in nnU-Net's raw format has such images.
    configurations, trainers: which of the spec's; by default all.
    """

    path: str | None = None
    id: int | None = None
    name: str = ""
    nsd_tolerance_mm: float = 1.0
    family: str = ""
    test: bool | None = None
    configurations: tuple[str, ...] = ()
    trainers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Configuration:
    """A configuration of the matrix: nnU-Net's own of that name, or one made from `base`, smaller or trained shorter.

    features: channels of the first stage, doubled from stage to stage, never more than planned.
    patch_voxels: the planned patch, scaled down to at most so many voxels.
    batch_size, epochs, iterations, validation_iterations (the latter two per epoch): nnU-Net's own where not given.
    """

    name: str
    base: str = ""
    features: int | None = None
    patch_voxels: int | None = None
    batch_size: int | None = None
    epochs: int | None = None
    iterations: int | None = None
    validation_iterations: int | None = None


@dataclass(frozen=True)
class Arm:
    """What is compared: a trainer, on the configuration as it is, or widened, or as another planner plans it.

    planner: the class that plans, e.g. nnUNetPlannerResEncM.
    parameters_of: widen all stages such that there are as many parameters as with that trainer.
    width: widen all stages by that factor.
    """

    name: str
    trainer: str
    planner: str = PLANNER
    parameters_of: str | None = None
    width: float | None = None

    @property
    def is_wide(self) -> bool:
        return self.width is not None or self.parameters_of is not None


@dataclass(frozen=True)
class Executor:
    """How cells are run.

    jobs: cells at a time on this machine; by default one per GPU (or per `num_gpus` of them), one without.
    num_gpus: GPUs of one training, nnU-Net's `-num_gpus`.
    parameters: of submitit's Slurm executor: partition, time (minutes), cpus_per_task, gpus_per_node, mem, ...
    """

    kind: str = LOCAL
    jobs: int | None = None
    num_gpus: int = 1
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Spec:
    """datasets x configurations x trainers x folds x seeds, and how they are run."""

    datasets: tuple[Dataset, ...]
    configurations: tuple[Configuration, ...]
    trainers: tuple[Arm, ...]
    folds: tuple[int, ...]
    seeds: tuple[int, ...]
    executor: Executor = field(default_factory=Executor)

    def configurations_of(self, dataset: Dataset) -> list[Configuration]:
        return [c for c in self.configurations if c.name in (dataset.configurations or (c.name,))]

    def arms_of(self, dataset: Dataset) -> list[Arm]:
        return [arm for arm in self.trainers if arm.name in (dataset.trainers or (arm.name,))]


def read_spec(path: Path) -> Spec:
    """Read a spec; paths in it are relative to its folder and may hold environment variables.

    Raises `XAttnResError` for whatever is wrong in it that can be told without looking at datasets and trainers.
    """
    try:
        content = yaml.load(path.read_text(), _Loader)
    except OSError as error:
        raise XAttnResError(f"cannot read {path} ({error.strerror}): give the YAML file of a benchmark") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise XAttnResError(f"{path} is not valid YAML ({one_line(str(error))}): mend it") from None
    try:
        return _spec(content, path.parent)
    except XAttnResError as error:
        raise XAttnResError(f"{path}: {error}") from None


class _Loader(yaml.SafeLoader):
    """Refuses a key that is there twice, of which YAML would keep the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.composer.ComposerError(None, None, f"{key.value} is there twice", key.start_mark)
            seen.add(str(key.value))
        return node


def write_spec(spec: Spec, path: Path) -> None:
    """Write a spec that `read_spec` reads as the same, whatever folder it is in."""
    content = asdict(spec)
    content["configurations"] = {entry.pop("name"): entry for entry in content["configurations"]}
    write_text_atomically(yaml.safe_dump(_without_none(content), sort_keys=False), path)


def without_executor(spec: Spec) -> Spec:
    """What decides about results: another executor continues the same matrix."""
    return replace(spec, executor=Executor())


def planned_name(configuration: Configuration, arm: Arm) -> str:
    """What the plans call the configuration of an arm."""
    return f"{configuration.name}_{arm.name}" if arm.is_wide else configuration.name


def _without_none(content: Any) -> Any:
    """The same without entries that are None, and with lists for tuples."""
    if isinstance(content, Mapping):
        return {key: _without_none(value) for key, value in content.items() if value is not None}
    if isinstance(content, list | tuple):
        return [_without_none(value) for value in content]
    return content


def _spec(content: Any, folder: Path) -> Spec:
    if not isinstance(content, dict):
        raise XAttnResError(f"must hold {', '.join(f.name for f in fields(Spec))}, key by key")
    _check_keys(content, Spec, "the spec")
    for key in ("datasets", "configurations", "trainers", "folds", "seeds"):
        if content.get(key) in (None, [], {}):
            raise XAttnResError(f"{key} is missing: say at least one")
    spec = Spec(
        datasets=tuple(_dataset(entry, folder) for entry in _list(content, "datasets")),
        configurations=_configurations(content["configurations"]),
        trainers=tuple(_arm(entry) for entry in _list(content, "trainers")),
        folds=tuple(_whole(fold, "folds", 0, NUM_FOLDS - 1) for fold in _list(content, "folds")),
        seeds=tuple(_whole(seed, "seeds", 0, 2**31 - 1) for seed in _list(content, "seeds")),
        executor=_executor({} if content.get("executor") is None else content["executor"]),
    )
    _check_unique("trainers", [arm.name for arm in spec.trainers])
    _check_different(spec.trainers)
    _check_planned_names(spec)
    _check_unique("folds", spec.folds)
    _check_unique("seeds", spec.seeds)
    for dataset in spec.datasets:
        for kind in ("configurations", "trainers"):
            known = [entry.name for entry in getattr(spec, kind)]
            for name in getattr(dataset, kind):
                if name not in known:
                    near = suggestion(name, known) or f"there are {', '.join(known)}"
                    raise XAttnResError(f"{kind} of dataset {_called(dataset)}: the spec has no {name}: {near}")
    return spec


def _called(dataset: Dataset) -> str:
    return dataset.path or str(dataset.id)


def _dataset(entry: Any, folder: Path) -> Dataset:
    where = "an entry of datasets"
    if isinstance(entry, int) and not isinstance(entry, bool):
        entry = {"id": entry}
    elif isinstance(entry, str):
        entry = {"path": entry}
    values = _entry(entry, Dataset, where)
    if ("path" in values) == ("id" in values):
        raise XAttnResError(f"{where} needs a path or an id, one of them: {entry}")
    if "path" in values:
        values["path"] = _absolute(_text(values["path"], f"path in {where}"), folder)
        where = f"dataset {values['path']}"
    else:
        where = f"dataset {_whole(values['id'], f'id in {where}', 1, 999)}"
    for key in ("name", "family"):
        if key in values:
            _text(values[key], f"{key} of {where}")
    if "nsd_tolerance_mm" in values:
        values["nsd_tolerance_mm"] = _positive(values["nsd_tolerance_mm"], f"nsd_tolerance_mm of {where}")
    if not isinstance(values.get("test"), bool | None):
        raise XAttnResError(f"test of {where} must be true or false, not {values['test']!r}")
    for key in ("configurations", "trainers"):
        if key in values:
            values[key] = tuple(_text(name, f"{key} of {where}") for name in _list(values, key))
            _check_unique(f"{key} of {where}", values[key])
    return Dataset(**values)


def _absolute(path: str, folder: Path) -> str:
    expanded = os.path.expanduser(os.path.expandvars(path))
    unset = re.search(r"\$\{?(\w+)", expanded)
    if unset:
        raise XAttnResError(f"the environment variable {unset[1]} in {path} is not set: export it")
    return os.path.abspath(folder / expanded)


def _configurations(content: Any) -> tuple[Configuration, ...]:
    if isinstance(content, list):
        names = [_text(name, "configurations") for name in content]
        _check_unique("configurations", names)
        content = dict.fromkeys(names)
    if not isinstance(content, dict):
        raise XAttnResError("configurations must be names, each with what it changes")
    configurations = tuple(_configuration(name, entry) for name, entry in content.items())
    for number, configuration in enumerate(configurations):
        # A slip shows before anything is planned; but another planner may know more of them.
        known = [*PLANNED, *(earlier.name for earlier in configurations[:number])]
        near = suggestion(configuration.base, known, LIKENESS_OF_A_SLIP)
        if near and configuration.base not in known:
            raise XAttnResError(f"configuration {configuration.name}: nnU-Net plans no {configuration.base}: {near}")
    return configurations


def _configuration(name: Any, entry: Any) -> Configuration:
    where = f"configuration {name}"
    if not NAME.fullmatch(_text(name, "the name of a configuration")):
        raise XAttnResError(f"{where}: letters, digits, points, dashes and single underscores make a name")
    values = _entry(entry or {}, Configuration, where, but=("name",))
    base = values.pop("base", "") or name
    for key, value in values.items():
        _whole(value, f"{key} of {where}", 1, LARGEST_BATCH if key == "batch_size" else None)
    if values and name in (_text(base, f"base of {where}"), *PLANNED):
        raise XAttnResError(f"{where} changes what nnU-Net plans: give it a name of its own and a base, 3d_fullres say")
    if base != name and not values:
        raise XAttnResError(f"{where} is the same as its base {base}: say what it changes")
    if "epochs" not in values and {"iterations", "validation_iterations"} & values.keys():
        raise XAttnResError(f"{where} has iterations and no epochs: say both")
    return Configuration(name=name, base=base, **values)


def _arm(entry: Any) -> Arm:
    where = "an entry of trainers"
    if isinstance(entry, str):
        entry = {"trainer": entry}
    values = _entry(entry, Arm, where)
    if "trainer" not in values:
        raise XAttnResError(f"{where} needs a trainer: {entry}")
    for key in ("name", "trainer", "planner", "parameters_of"):
        if key in values:
            _text(values[key], f"{key} in {where}")
    changes = [key for key in ("parameters_of", "width", "planner") if values.get(key, PLANNER) != PLANNER]
    if "name" not in values and changes:
        raise XAttnResError(f"{where} with {changes[0]} needs a name, by which reports call it: {entry}")
    if "parameters_of" in values and "width" in values:
        raise XAttnResError(f"{where} has parameters_of and width: each sets the width, say one of them")
    if "width" in values:
        values["width"] = _positive(values["width"], f"width in {where}")
        if not WIDTHS[0] <= values["width"] <= WIDTHS[1]:
            raise XAttnResError(f"width in {where} must be from {WIDTHS[0]} to {WIDTHS[1]}, not {values['width']}")
    values.setdefault("name", values["trainer"])
    if not NAME.fullmatch(values["name"]):
        raise XAttnResError(f"trainer {values['name']}: letters, digits, points, dashes and underscores make a name")
    return Arm(**values)


def _executor(entry: Any) -> Executor:
    if isinstance(entry, str):
        entry = {"kind": entry}
    values = _entry(entry, Executor, "executor")
    kind = values.get("kind", LOCAL)
    if kind not in EXECUTORS:
        near = suggestion(str(kind), EXECUTORS) or f"choose {' or '.join(EXECUTORS)}"
        raise XAttnResError(f"there is no executor {kind}: {near}")
    for key in ("jobs", "num_gpus"):
        if key in values:
            _whole(values[key], f"{key} of executor", 1)
    if kind == SLURM and "jobs" in values:
        raise XAttnResError("executor slurm takes no jobs: Slurm decides how many cells run at a time")
    parameters = values.get("parameters", {})
    if not isinstance(parameters, dict) or (parameters and kind == LOCAL):
        raise XAttnResError("parameters of executor are those of submitit's Slurm executor, name by name")
    gpus = parameters.get("gpus_per_node")
    if values.get("num_gpus", 1) > 1 and gpus not in (None, values["num_gpus"]):
        raise XAttnResError(f"executor has num_gpus {values['num_gpus']} and gpus_per_node {gpus}: say num_gpus alone")
    return Executor(**values)


def _entry(entry: Any, kind: type, where: str, but: Iterable[str] = ()) -> dict[str, Any]:
    """What is given: a key without a value is not."""
    if not isinstance(entry, dict):
        raise XAttnResError(f"{where} must hold {', '.join(_keys(kind, but))}, not {entry!r}")
    _check_keys(entry, kind, where, but)
    return {key: value for key, value in entry.items() if value is not None}


def _check_keys(entry: dict[Any, Any], kind: type, where: str, but: Iterable[str] = ()) -> None:
    known = _keys(kind, but)
    for key in entry:
        if key not in known:
            near = suggestion(str(key), known) or f"it takes {', '.join(known)}"
            raise XAttnResError(f"{where} has an unknown key {key}: {near}")


def _keys(kind: type, but: Iterable[str]) -> list[str]:
    return [field.name for field in fields(kind) if field.name not in but]


def _list(content: dict[str, Any], key: str) -> list[Any]:
    if not isinstance(content[key], list):
        raise XAttnResError(f"{key} must be a list, not {content[key]!r}")
    return content[key]


def _check_unique(kind: str, values: Iterable[Any]) -> None:
    seen = set()
    for value in values:
        if value in seen:
            raise XAttnResError(f"{kind} has {value} twice: say it once")
        seen.add(value)


def _check_different(arms: Iterable[Arm]) -> None:
    names: dict[Arm, str] = {}
    for arm in arms:
        same = names.setdefault(replace(arm, name=""), arm.name)
        if same != arm.name:
            raise XAttnResError(f"trainers {same} and {arm.name} are the same: remove one")


def _check_planned_names(spec: Spec) -> None:
    wide = [
        planned_name(configuration, arm)
        for arm in spec.trainers
        if arm.is_wide
        for configuration in spec.configurations
    ]
    names = [*PLANNED, *(configuration.name for configuration in spec.configurations), *wide]
    for name in wide:
        if names.count(name) > 1:
            raise XAttnResError(
                f"the plans would have {name} twice, for a wide trainer's is called CONFIGURATION_TRAINER: rename one"
            )


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise XAttnResError(f"{where} must be a text, not {value!r}")
    return value


def _whole(value: Any, where: str, least: int, most: int | None = None) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least or (most is not None and value > most):
        limits = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise XAttnResError(f"{where} must be a whole number {limits}, not {value!r}")
    return value


def _positive(value: Any, where: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise XAttnResError(f"{where} must be a positive number, not {value!r}")
    return float(value)
