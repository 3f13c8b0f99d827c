"""The command `nnunet-xattnres plans`: write plans that carry XAttnRes."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from nnunet_xattnres.common.errors import XAttnResError, reason
from nnunet_xattnres.common.files import read_json, write_json_atomically
from nnunet_xattnres.common.text import NAME, NAME_RULE, shell_command
from nnunet_xattnres.model.config import BlockXAttnResConfig, Config, XAttnResConfig
from nnunet_xattnres.nnunet.planned_network import from_file, plans_of_dataset
from nnunet_xattnres.nnunet.xattnres_plans import (
    default_plans_name,
    plans_with_xattnres,
    preset_config,
    preset_names,
)

# nnU-Net writes these files beside the plans.
NAMES_OF_NNUNET = ("dataset", "dataset_fingerprint", "splits_final")


@dataclass(frozen=True)
class Options:
    """The options of the command. The fields from skip_connections on are those of a config, None for the preset's.

    plans_name: of the plans to start from. configurations: None for all of them.
    output: the name of the new plans. None for one that says what they are made from.
    """

    dataset: str
    plans_name: str
    configurations: list[str] | None
    preset: str
    output: str | None
    skip_connections: bool | None
    read_in_encoder: bool | None
    read_in_decoder: bool | None
    fusion: str | None
    isar_in_encoder: bool | None
    isar_in_decoder: bool | None
    bank_includes_input: bool | None
    kv_ratio: float | None
    temperature: float | None


def run_plans(options: Options) -> None:
    """Write the plans and print how they are used.

    Raises `XAttnResError` for plans and configurations that do not exist or cannot get XAttnRes, for options that do
    not fit together, and if the name belongs to another file.
    """
    config = _config(options)
    given = _default_name(options, config) if options.output is None else options.output
    name = given.removesuffix(".json")
    # A file system may ignore case.
    if not NAME.fullmatch(name) or name.lower() in NAMES_OF_NNUNET:
        raise XAttnResError(
            f"{shell_command('-o', given)} is no name for plans: {NAME_RULE}, and no name of nnU-Net's own files"
        )
    source = plans_of_dataset(options.dataset, options.plans_name)
    plans = read_json(source, "give plans of nnU-Net")
    there = plans.get("configurations")
    if not isinstance(there, dict) or not there or not all(isinstance(entry, dict) for entry in there.values()):
        raise XAttnResError(f"{source} has no configurations: nnUNetv2_plan_experiment writes plans that have them")
    new = plans_with_xattnres(plans, name, config, options.configurations)
    for configuration in new["configurations"]:
        from_file(source, configuration)
    path = source.with_name(f"{name}.json")
    _write(new, path)
    print(f"{path}: {', '.join(new['configurations'])}")
    _print_use(path.stem, source.stem, plans["dataset_name"], (options.configurations or list(there))[0])


def _config(options: Options) -> Config:
    """The preset with the options that change it."""
    config = preset_config(options.preset)
    names = [field.name for kind in (XAttnResConfig, BlockXAttnResConfig) for field in fields(kind)]
    changes: dict[str, Any] = {name: getattr(options, name, None) for name in names}
    changes = {name: value for name, value in changes.items() if value is not None}
    for name in changes:
        if not hasattr(config, name):
            level = "stage" if isinstance(config, BlockXAttnResConfig) else "block"
            option = f"--{name.replace('_', '-')}"
            raise XAttnResError(f"{option} is an option of {level}-level presets, and {options.preset} is none")
    return replace(config, **changes)


def _default_name(options: Options, config: Config) -> str:
    """The name of the preset that the config is. Raises `XAttnResError` if it is none."""
    for preset in preset_names():
        if preset_config(preset) == config:
            return default_plans_name(options.plans_name, preset)
    raise XAttnResError("these options are those of no preset: give the plans a name with -o")


def _write(plans: dict[str, object], path: Path) -> None:
    if path.exists():
        if read_json(path, "choose another -o") != plans:
            raise XAttnResError(f"{path} is there already and differs: choose another -o, or remove it first")
        return
    try:
        write_json_atomically(plans, path)
    except OSError as error:
        raise XAttnResError(f"cannot write {path} ({reason(error)}): mend that and run again") from None


def _print_use(name: str, source: str, dataset: str, configuration: str) -> None:
    print("To train, with any trainer that builds the network of its plans:")
    print(f"  {shell_command('nnUNetv2_train', dataset, configuration, '0', '-p', name)}")
    print(
        f"They use the data that is preprocessed for {source}. Do not run nnUNetv2_preprocess with -plans_name {name}: "
        f"it would delete that data and write it anew. For another dataset, move {source} with "
        "nnUNetv2_move_plans_between_datasets and a new -tp, preprocess, and run nnunet-xattnres plans there."
    )
