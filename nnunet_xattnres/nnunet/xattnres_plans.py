"""Plans that carry XAttnRes: then any trainer trains it, and nnU-Net finds the network without `nnUNet_extTrainer`."""

from collections.abc import Iterable
from importlib import import_module
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_xattnres.common.errors import XAttnResError, suggestion, type_and_message
from nnunet_xattnres.model.build import check_can_be_built
from nnunet_xattnres.model.config import Config, XAttnResConfig
from nnunet_xattnres.model.plan_classes import architecture_with, carried_config
from nnunet_xattnres.nnunet.installation import TRAINER_PREFIX, list_trainers

DEFAULT_PRESET = "XAttnRes"
PLANS = "Plans"


def preset_names() -> list[str]:
    """The presets: XAttnRes, and what the names of the other XAttnRes trainers add to it."""
    names = [name.removeprefix(TRAINER_PREFIX) for name, _ in list_trainers()]
    stems = [name for name in names if name.startswith(DEFAULT_PRESET) and not name.endswith("epochs")]
    return [stem.removeprefix(DEFAULT_PRESET) or stem for stem in stems]


def preset_config(preset: str) -> Config:
    """The config of the trainer of this preset.

    preset: NoSkip, XAttnResNoSkip or nnUNetTrainerXAttnResNoSkip, for example.

    Raises `XAttnResError` if there is none.
    """
    trainer = TRAINER_PREFIX + _full_name(preset)
    config: Config = getattr(import_module(f"nnunet_xattnres.trainers.{trainer}"), trainer).xattnres_config
    return config


def default_plans_name(plans_name: str, preset: str) -> str:
    """nnUNetXAttnResNoSkipPlans for nnUNetPlans and NoSkip."""
    return f"{plans_name.removesuffix(PLANS)}{_full_name(preset)}{PLANS}"


def _full_name(preset: str) -> str:
    """XAttnResNoSkip, of whichever name of a preset. Raises `XAttnResError` if there is none."""
    known = preset_names()
    short = preset.removeprefix(TRAINER_PREFIX + DEFAULT_PRESET).removeprefix(DEFAULT_PRESET) or DEFAULT_PRESET
    if short in known:
        return DEFAULT_PRESET + (short if short != DEFAULT_PRESET else "")
    choices = f"choose from {', '.join(known)}"
    if preset in dict(list_trainers()) and DEFAULT_PRESET not in preset:
        raise XAttnResError(f"{preset} is a control and adds no XAttnRes: train with -tr {preset}, or {choices}")
    raise XAttnResError(f"there is no preset {preset} of XAttnRes: {suggestion(short, known) or choices}")


def plans_with_xattnres(
    plans: dict[str, Any], name: str, config: Config | None = None, configurations: Iterable[str] | None = None
) -> dict[str, Any]:
    """The plans of a dataset with XAttnRes in their networks. They use the data that is preprocessed for `plans`.

    plans: the content of a plans file. name: of the new plans, which must be the name of their file without `.json`.
    config: `XAttnResConfig()` by default.
    configurations: all by default. Those that they inherit from, or have as their previous stage, are added.

    Raises `XAttnResError` for a configuration that is not there, one whose architecture is not an encoder/decoder
    U-Net, cannot be built or carries XAttnRes already, and for a config that changes nothing.
    """
    if isinstance(configurations, str):
        raise XAttnResError(f"configurations must be a list of names: [{configurations!r}]")
    config = config or XAttnResConfig()
    if config.is_planned_network:
        raise XAttnResError("this config adds nothing to the planned network: train it with the plans as they are")
    chosen = with_what_they_need(plans, plans["configurations"] if configurations is None else configurations)
    new = plans | {"plans_name": name, "configurations": {}}
    for configuration in chosen:
        try:
            new["configurations"][configuration] = _converted(plans, configuration, config, chosen)
        except XAttnResError:
            raise
        except Exception as error:
            raise XAttnResError(
                f"the network of configuration {configuration} cannot be built ({type_and_message(error)}): correct "
                "that configuration in the plans"
            ) from None
    return new


def with_what_they_need(plans: dict[str, Any], configurations: Iterable[str]) -> list[str]:
    """The configurations, those that they inherit from and those of their previous stages, in the order of the plans.

    Raises `XAttnResError` for a configuration that is not in the plans.
    """
    there = plans["configurations"]
    waiting, needed = list(configurations), set[str]()
    while waiting:
        name = waiting.pop()
        if not isinstance(name, str):
            raise XAttnResError(f"the plans name the configuration {name!r}, which is no name: correct the plans")
        if name not in there:
            near = suggestion(name, there) or f"choose from {', '.join(there)}"
            raise XAttnResError(f"no configuration {name} in the plans: {near}")
        if name not in needed:
            needed.add(name)
            waiting += [there[name][key] for key in ("inherits_from", "previous_stage") if there[name].get(key)]
    return [name for name in there if name in needed]


def _converted(plans: dict[str, Any], name: str, config: Config, chosen: list[str]) -> dict[str, Any]:
    """The entry of a configuration. Its architecture is written out, also where it inherits it, and can be built."""
    manager = PlansManager(plans).get_configuration(name)
    if carried_config(manager) is not None:
        raise XAttnResError(
            f"configuration {name} of {plans['plans_name']} carries XAttnRes already: choose the plans that they were "
            "made from"
        )
    # nnU-Net's reader replaces entries of its older format by the architecture.
    entry = {key: value for key, value in plans["configurations"][name].items() if key in manager.configuration}
    if any(stage not in chosen for stage in manager.next_stage_names or ()):
        # nnU-Net's validation predicts for every next stage that is named here.
        entry["next_stage"] = [stage for stage in manager.next_stage_names if stage in chosen]
    try:
        entry["architecture"] = architecture_with(manager, config)
    except XAttnResError as error:
        raise XAttnResError(f"configuration {name}: {error}") from None
    new = PlansManager(plans | {"configurations": plans["configurations"] | {name: entry}})
    check_can_be_built(new.get_configuration(name))
    return entry
