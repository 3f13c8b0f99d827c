"""The spec of a benchmark: a YAML file that says which trainings belong to the matrix and how they run.

The models check all that the spec alone can tell. `spec_check` looks at datasets, trainers and planners.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from nnunet_xattnres.common.errors import XAttnResError, one_line, suggestion
from nnunet_xattnres.common.files import write_text_atomically
from nnunet_xattnres.common.text import NAME, NAME_RULE

PLANNER = "ExperimentPlanner"
# The configurations that nnU-Net itself plans.
PLANNED = ("2d", "3d_lowres", "3d_fullres", "3d_cascade_fullres")
# Beyond these limits a number is taken for a slip.
WIDTHS = (0.25, 8.0)
LARGEST_BATCH = 10_000
# A letter too many: 2dd is like 2d by 0.8, a longer name more.
LIKENESS_OF_A_SLIP, LIKENESS_OF_A_SHORT_SLIP = 0.9, 0.8
SHORT = 3


def _as_tuple(value: Any) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise XAttnResError(f"must be a list, not {value!r}")
    return tuple(value)


def _at_least_one(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if not values:
        raise XAttnResError("say at least one")
    return values


def _all_different(values: tuple[Any, ...]) -> tuple[Any, ...]:
    names = [getattr(value, "name", value) for value in values]
    if twice := [name for name in names if names.count(name) > 1]:
        raise XAttnResError(f"{twice[0]} is there twice: say it once")
    return values


def _is_name(text: str) -> str:
    if not NAME.fullmatch(text):
        raise XAttnResError(f"{text} is no name: {NAME_RULE}")
    return text


T = TypeVar("T")
Text = Annotated[str, Field(min_length=1)]
Name = Annotated[str, AfterValidator(_is_name)]
Count = Annotated[int, Field(ge=1)]
Fold = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
List = Annotated[tuple[T, ...], BeforeValidator(_as_tuple)]
AtLeastOne = AfterValidator(_at_least_one)
AllDifferent = AfterValidator(_all_different)


class _Entry(BaseModel):
    """A mapping of the spec. Values are not converted: "3" is no number, and neither is `true`."""

    model_config = ConfigDict(frozen=True, strict=True)
    # The key for a value that stands in place of the mapping, by the value's type.
    shorthands: ClassVar[Mapping[type, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _keys_with_values(cls, entry: Any) -> Any:
        """A key without a value counts as not given. Raises `XAttnResError` for an unknown key."""
        if isinstance(entry, cls):
            return entry
        if type(entry) in cls.shorthands:
            entry = {cls.shorthands[type(entry)]: entry}
        keys = ", ".join(cls.model_fields)
        if not isinstance(entry, dict):
            raise XAttnResError(f"must hold {keys}, not {entry!r}")
        for key in entry:
            if key not in cls.model_fields:
                raise XAttnResError(
                    f"unknown key {key}: {suggestion(str(key), cls.model_fields) or f'it takes {keys}'}"
                )
        return {key: value for key, value in entry.items() if value is not None}


class Dataset(_Entry):
    """A dataset of the matrix. Its path or id alone may stand for it.

    path: an MSD task, as a folder or a .tar, or a folder in nnU-Net's raw format; relative to the spec's folder.
    id: the number of a dataset in nnUNet_raw, in place of a path.
    name: nnU-Net's name for it, DatasetNNN_Name; optional.
    nsd_tolerance_mm: of the normalised surface Dice; in pixels where images have no spacing.
    family: datasets of the same patients share a family, which counts as one in corrections for multiple testing.
    test: predict imagesTs, labelled in labelsTs; by default where a dataset in nnU-Net's raw format has such images.
    configurations, trainers, folds, seeds: which of the spec's; by default all.
    """

    shorthands = {int: "id", str: "path"}

    path: Text | None = None
    id: Annotated[int, Field(ge=1, le=999)] | None = None
    name: Text = ""
    nsd_tolerance_mm: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    family: Text = ""
    test: bool | None = None
    configurations: Annotated[List[Text], AllDifferent] = ()
    trainers: Annotated[List[Text], AllDifferent] = ()
    folds: Annotated[List[Fold], AllDifferent] = ()
    seeds: Annotated[List[Seed], AllDifferent] = ()

    @field_validator("path")
    @classmethod
    def _absolute(cls, path: str, info: ValidationInfo) -> str:
        """Absolute, with environment variables filled in. A dataset that is read from no file keeps its path."""
        if not info.context:
            return path
        expanded = os.path.expanduser(os.path.expandvars(path))
        if unset := re.search(r"\$\{?(\w+)", expanded):
            raise XAttnResError(f"the environment variable {unset[1]} in {path} is not set: export it")
        return os.path.abspath(info.context["folder"] / expanded)

    @model_validator(mode="after")
    def _check(self) -> "Dataset":
        if (self.path is None) == (self.id is None):
            raise XAttnResError("give either a path or an id")
        return self


class Configuration(_Entry):
    """A configuration of the matrix: nnU-Net's own of that name, or one made from `base`, smaller or trained shorter.

    features: channels of the first stage, doubled from stage to stage, never more than planned.
    patch_voxels: the planned patch, scaled down to at most so many voxels.
    batch_size, epochs, iterations, validation_iterations (the latter two per epoch): by default nnU-Net's own.
    """

    name: Name
    base: Text = Field(default_factory=lambda given: given["name"])
    features: Count | None = None
    patch_voxels: Count | None = None
    batch_size: Annotated[int, Field(ge=1, le=LARGEST_BATCH)] | None = None
    epochs: Count | None = None
    iterations: Count | None = None
    validation_iterations: Count | None = None

    @model_validator(mode="after")
    def _check(self) -> "Configuration":
        changes = self.model_fields_set - {"name", "base"}
        if changes and self.name in (self.base, *PLANNED):
            raise XAttnResError("it changes what nnU-Net plans: give it a name of its own and a base, 3d_fullres say")
        if not changes and self.name != self.base:
            raise XAttnResError(f"it is the same as its base {self.base}: say what it changes")
        if changes & {"iterations", "validation_iterations"} and self.epochs is None:
            raise XAttnResError("it has iterations and no epochs: say both")
        return self


class Arm(_Entry):
    """What is compared: a trainer, on the configuration as it is, or widened, or as another planner plans it, or with
    plans that carry XAttnRes.

    The name of a trainer alone may stand for it.

    name: as reports call it; by default the trainer's.
    planner: the class that plans, e.g. nnUNetPlannerResEncM.
    parameters_of: widen all stages such that there are as many parameters as with that trainer.
    width: widen all stages by that factor.
    preset: of the XAttnRes that the plans carry, see `nnunet-xattnres plans --preset`. By default they carry none.
    """

    shorthands = {str: "trainer"}

    trainer: Text
    name: Name = Field(default_factory=lambda given: given["trainer"], validate_default=True)
    planner: Text = PLANNER
    parameters_of: Text | None = None
    width: Annotated[float, Field(ge=WIDTHS[0], le=WIDTHS[1])] | None = None
    preset: Text | None = None

    @property
    def is_wide(self) -> bool:
        return self.width is not None or self.parameters_of is not None

    @model_validator(mode="after")
    def _check(self) -> "Arm":
        if (self.is_wide or self.planner != PLANNER or self.preset) and "name" not in self.model_fields_set:
            raise XAttnResError(
                f"{self.trainer} with a width, planner or preset needs a name, by which reports call it"
            )
        if self.is_wide and self.preset:
            raise XAttnResError("a preset keeps the planned width: remove it, or parameters_of and width")
        if self.parameters_of is not None and self.width is not None:
            raise XAttnResError("parameters_of and width each set the width: say one of them")
        return self


class Executor(_Entry):
    """How trainings are run. Its kind alone may stand for it.

    jobs: trainings at a time on this machine; by default one per GPU (or per `num_gpus` of them), one without.
    num_gpus: GPUs of one training, nnU-Net's `-num_gpus`.
    parameters: of submitit's Slurm executor: partition, time (minutes), cpus_per_task, gpus_per_node, mem, ...
    """

    shorthands = {str: "kind"}

    kind: Literal["local", "slurm"] = "local"
    jobs: Count | None = None
    num_gpus: Count = 1
    parameters: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> "Executor":
        if self.kind == "slurm" and self.jobs is not None:
            raise XAttnResError("Slurm itself decides how many trainings run at a time: remove jobs")
        if self.kind == "local" and self.parameters:
            raise XAttnResError("parameters are those of submitit's Slurm executor: say kind: slurm, or remove them")
        gpus = self.parameters.get("gpus_per_node")
        if self.num_gpus > 1 and gpus not in (None, self.num_gpus):
            raise XAttnResError(f"num_gpus is {self.num_gpus} and gpus_per_node {gpus}: say num_gpus alone")
        return self


class Spec(_Entry):
    """datasets x configurations x trainers x folds x seeds, and how they are run."""

    datasets: Annotated[List[Dataset], AtLeastOne]
    configurations: Annotated[List[Configuration], AtLeastOne, AllDifferent]
    trainers: Annotated[List[Arm], AtLeastOne, AllDifferent]
    folds: Annotated[List[Fold], AtLeastOne, AllDifferent]
    seeds: Annotated[List[Seed], AtLeastOne, AllDifferent]
    executor: Executor = Executor()

    def configurations_of(self, dataset: Dataset) -> list[Configuration]:
        return [c for c in self.configurations if c.name in (dataset.configurations or (c.name,))]

    def arms_of(self, dataset: Dataset) -> list[Arm]:
        return [arm for arm in self.trainers if arm.name in (dataset.trainers or (arm.name,))]

    def folds_of(self, dataset: Dataset) -> list[int]:
        return [fold for fold in self.folds if fold in (dataset.folds or (fold,))]

    def seeds_of(self, dataset: Dataset) -> list[int]:
        return [seed for seed in self.seeds if seed in (dataset.seeds or (seed,))]

    @field_validator("configurations", mode="before")
    @classmethod
    def _with_names(cls, value: Any) -> Any:
        """From a list of names, or from names, each with what it changes."""
        if isinstance(value, list):
            return [{"name": name} for name in value]
        if not isinstance(value, dict):
            return value
        for name, changes in value.items():
            if not isinstance(changes, dict | None) or "name" in (changes or {}):
                raise XAttnResError(f"{name} must hold what it changes, such as base and epochs, not {changes!r}")
        return [{"name": name} | (changes or {}) for name, changes in value.items()]

    @model_validator(mode="after")
    def _check(self) -> "Spec":
        for dataset in self.datasets:
            for kind in ("configurations", "trainers", "folds", "seeds"):
                known = [str(getattr(entry, "name", entry)) for entry in getattr(self, kind)]
                for name in map(str, getattr(dataset, kind)):
                    if name not in known:
                        near = suggestion(name, known) or f"there are {', '.join(known)}"
                        raise XAttnResError(f"{kind} of dataset {dataset.path or dataset.id} has {name}: {near}")
        planned = [*PLANNED]
        for configuration in self.configurations:
            # A base that resembles none of these may be a configuration that another planner plans.
            likeness = LIKENESS_OF_A_SLIP if len(configuration.base) > SHORT else LIKENESS_OF_A_SHORT_SLIP
            near = suggestion(configuration.base, planned, likeness)
            if near and configuration.base not in planned:
                raise XAttnResError(
                    f"configuration {configuration.name}: nnU-Net plans no {configuration.base}: {near}"
                )
            planned.append(configuration.name)
        wide = [planned_name(c, arm) for arm in self.trainers if arm.is_wide for c in self.configurations]
        if twice := [name for name in wide if [*planned, *wide].count(name) > 1]:
            raise XAttnResError(
                f"the plans would have {twice[0]} twice (a wide trainer adds CONFIGURATION_TRAINER): rename one"
            )
        return self


def planned_name(configuration: Configuration, arm: Arm) -> str:
    """What the plans call the configuration of an arm."""
    return f"{configuration.name}_{arm.name}" if arm.is_wide else configuration.name


def without_executor(spec: Spec) -> Spec:
    """What decides about results: another executor continues the same matrix."""
    return spec.model_copy(update={"executor": Executor()})


def read_spec(path: Path) -> Spec:
    """Read a spec; paths in it are relative to its folder and may hold environment variables.

    Raises `XAttnResError` for the first mistake that can be told without looking at datasets, trainers and planners.
    """
    try:
        content = yaml.load(path.read_text(), _Loader)
    except OSError as error:
        raise XAttnResError(f"cannot read {path} ({error.strerror}): give the YAML file of a benchmark") from None
    except (yaml.YAMLError, ValueError) as error:
        raise XAttnResError(f"{path} is not valid YAML ({one_line(str(error))}): mend it") from None
    try:
        return Spec.model_validate(content, context={"folder": path.parent})
    except ValidationError as error:
        raise XAttnResError(one_line(f"{path}: {_first_mistake(error, content)}")) from None


def write_spec(spec: Spec, path: Path) -> None:
    """Write a spec that `read_spec` reads as the same, whatever folder it is in."""
    content = spec.model_dump(exclude_none=True)
    content["configurations"] = {entry.pop("name"): entry for entry in content["configurations"]}
    write_text_atomically(yaml.safe_dump(content, sort_keys=False), path)


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


def _first_mistake(error: ValidationError, content: Any) -> str:
    """The place in the spec and what is wrong there, such as `configurations, small, epochs: must be ..., not 0`."""
    mistake = error.errors()[0]
    place = [f"entry {step + 1}" if isinstance(step, int) else step for step in mistake["loc"]]
    if place[:1] == ["configurations"] and len(place) > 1 and isinstance(content["configurations"], dict):
        place[1] = str(list(content["configurations"])[int(mistake["loc"][1])])
    if mistake["type"] == "value_error":
        what = str(mistake["ctx"]["error"])
    elif mistake["type"] == "missing":
        what = f"{place.pop()} is missing"
    else:
        # pydantic: "Input should be ...", "String should have ..."
        what = f"must {mistake['msg'].partition(' should ')[2]}, not {mistake['input']!r}"
    return ": ".join(filter(None, [", ".join(place), what]))
