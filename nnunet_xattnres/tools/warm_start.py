"""The command `warm-start`: start a trainer with residual fusion from the weights of a trained plain nnU-Net.

The gates of residual fusion are zero at the start, so both networks compute the same function. Where the segmentation
heads are to have another meaning, only these start anew.
"""

import io
import os
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.dataset_name_id_conversion import convert_dataset_name_to_id
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, nn

from nnunet_xattnres.common.errors import XAttnResError, differences, reason
from nnunet_xattnres.common.files import check_writable, folder_written_atomically, write_json_atomically
from nnunet_xattnres.common.processes import environment_with
from nnunet_xattnres.common.text import shell_command
from nnunet_xattnres.model.config import XAttnResConfig
from nnunet_xattnres.nnunet.folders import check_not_of_nnunet, hint_if_unset
from nnunet_xattnres.nnunet.planned_network import (
    PlannedNetwork,
    all_of_dataset,
    from_content,
    from_dataset,
    from_file,
)
from nnunet_xattnres.nnunet.trainer_lookup import find_trainer
from nnunet_xattnres.training.checkpoint import (
    FINAL_CHECKPOINT,
    LATEST_CHECKPOINT,
    checkpoints_of_folds,
    choose_fold,
    read_checkpoint,
)
from nnunet_xattnres.training.mixin import XAttnResTrainerMixin

PRETRAINED = "pretrained.pth"
# nnU-Net initialises weights of this name anew in every training from pretrained weights.
HEADS = ".seg_layers."


@dataclass(frozen=True)
class Options:
    """What to start from, what to train, and where the model folder goes.

    start: a model folder of nnU-Net, or a checkpoint.
    fold: of the model folder. None for its only fold.
    trainer: the name of the trainer that will continue.
    dataset, configuration, plans_name: what it will be trained on, planned and preprocessed.
    output: a folder that does not exist or is empty.
    trust_checkpoint: see `read_checkpoint`.
    """

    start: Path
    fold: str | None
    trainer: str
    dataset: str
    configuration: str
    plans_name: str
    output: Path
    trust_checkpoint: bool


@dataclass(frozen=True)
class TrainedNetwork:
    """A trained plain nnU-Net. file: its checkpoint. planned: the plans and configuration that it was trained with."""

    file: Path
    planned: PlannedNetwork
    fold: int | str
    checkpoint: dict[str, Any]


def run_warm_start(options: Options) -> None:
    """Write the model folder, or pretrained weights if the heads differ, and print the commands that use it.

    Raises `XAttnResError` for a checkpoint that cannot be read or belongs to another network, for a trainer whose
    network is not the planned one at the start, and for an output folder that is not empty.
    """
    trained = read_trained(options.start, options.fold, options.trust_checkpoint)
    target = from_dataset(options.dataset, options.configuration, options.plans_name)
    trainer_class = find_residual_trainer(options.trainer, target)
    output = options.output.resolve()
    _check_output(output)
    check_same_network(trained, target)
    same_heads = head_names(trained.planned) == head_names(target)
    with (
        TemporaryDirectory(prefix="nnunet_xattnres_") as results,
        environment_with(nnUNet_results=results, nnUNet_wandb_enabled="0"),
        redirect_stdout(io.StringIO()),
    ):
        trainer = _trainer_with_weights(trainer_class, trained, target, same_heads)
        model_folder = Path(trainer.output_folder_base).relative_to(results)
        _write(output, trainer, trained if same_heads else None)
    channels, channels_here = trained.planned.channel_names, target.channel_names
    if channels != channels_here:
        print(
            f"The trained network reads the channels {', '.join(channels)}, those of {target.name} are "
            f"{', '.join(channels_here)}: check that they mean the same."
        )
    train = ["nnUNetv2_train", target.plans["dataset_name"], options.configuration, str(trained.fold)]
    train += ["-tr", options.trainer, "-p", options.plans_name]
    if same_heads:
        _print_commands_of_model_folder(options, train, trained.fold, model_folder)
        print("To train from it with new heads, as nnU-Net does with pretrained weights:")
    else:
        print(
            f"The segmentation heads of {target.name} start anew, because those of the trained network have another "
            f"meaning: {', '.join(head_names(trained.planned))} (here {', '.join(head_names(target))}). To train:"
        )
    print(f"  {shell_command(*train, '-pretrained_weights', options.output / PRETRAINED)}")


def find_residual_trainer(name: str, target: PlannedNetwork) -> type[nnUNetTrainer]:
    """The trainer class of this name. Raises `XAttnResError` unless its network is the planned one at the start."""
    trainer_class = find_trainer(name)
    config = target.carried
    if config is None and issubclass(trainer_class, XAttnResTrainerMixin):
        config = trainer_class.xattnres_config
    if not isinstance(config, XAttnResConfig) or config.fusion != "residual" or not config.skip_connections:
        raise XAttnResError(
            f"the network of {name} is not the planned one at the start: choose nnUNetTrainerXAttnResFinetune, a "
            'trainer of your own with fusion="residual" and skip connections, or plans that carry both '
            "(nnunet-xattnres plans --preset Finetune)"
        )
    return trainer_class


def read_trained(path: Path, fold: str | None, trusted: bool) -> TrainedNetwork:
    """Read a model folder's checkpoint and plans, or a checkpoint and the plans that it records.

    Raises `XAttnResError` if there is no usable checkpoint, or if its network has XAttnRes already.
    """
    if fold is not None and path.is_file():
        raise XAttnResError(f"-f chooses a fold of a model folder, but {path} is none: leave -f out")
    found_fold, file = _checkpoint_in(path, fold) if path.is_dir() else (None, path)
    remedy = f"choose another --from{hint_if_unset('nnUNet_results', path)}"
    checkpoint = read_checkpoint(file, remedy, trusted)
    if any(key.startswith("xattnres.") for key in checkpoint["network_weights"]):
        written_by = checkpoint["trainer_name"]
        raise XAttnResError(
            f"{file} was written by {written_by} and has XAttnRes already: train with -tr {written_by} and --c, or "
            f"from it with -tr {written_by} and -pretrained_weights"
        )
    recorded = checkpoint["init_args"]
    try:
        configuration, plans, dataset_json = (recorded[key] for key in ("configuration", "plans", "dataset_json"))
        trained_fold = found_fold or str(recorded["fold"])
    except KeyError as error:
        raise XAttnResError(f"{file} does not record its {error.args[0]}: choose another --from") from None
    # The fold becomes part of a path.
    if trained_fold != "all" and not trained_fold.isdecimal():
        raise XAttnResError(f"{file} records fold {trained_fold!r}, which nnU-Net does not have: choose another --from")
    if path.is_dir():
        planned = from_file(path / "plans.json", configuration)
    else:
        planned = from_content(plans, configuration, dataset_json, f"the plans recorded in {file}")
    return TrainedNetwork(file, planned, trained_fold if trained_fold == "all" else int(trained_fold), checkpoint)


def check_same_network(trained: TrainedNetwork, target: PlannedNetwork) -> None:
    """Raise `XAttnResError`, with a remedy that works, unless both plan the same network apart from its heads."""
    if _network(trained.planned) == _network(target):
        return
    problem = (
        f"the trained network is not the one that {target.configuration} of {target.plans['plans_name']} plans for "
        f"{target.name}: {differences(_network(trained.planned), _network(target))}"
    )
    fitting = [
        (
            plans_name != target.plans["plans_name"],
            plans_name,
            planned.configuration != trained.planned.configuration,
            planned.configuration,
        )
        for plans_name, planned in all_of_dataset(target.name)
        if planned.carried == target.carried and _network(planned) == _network(trained.planned)
    ]
    if fitting:
        choices = [f"-p {plans_name} -c {configuration}" for _, plans_name, _, configuration in sorted(fitting)]
        raise XAttnResError(f"{problem}; choose {' or '.join(choices)}")
    # With the plans of the trained network, the channels are still those of the dataset.
    moved = replace(trained.planned, dataset_json=target.dataset_json)
    if moved.num_input_channels != trained.planned.num_input_channels:
        raise XAttnResError(
            f"{problem}; no plans change the input channels of {target.name}: choose another --from, or a dataset with "
            "the same channels"
        )
    raise XAttnResError(f"{problem}; {_moving_of_plans(trained, target)}")


def head_names(planned: PlannedNetwork) -> list[str]:
    """What the segmentation heads stand for: the names of labels or, with regions, of regions."""
    labels = PlansManager(planned.plans).get_label_manager(planned.dataset_json)
    heads = labels.all_regions if labels.has_regions else labels.all_labels
    return [
        " or ".join(
            name
            for name, value in labels.label_dict.items()
            if name != "ignore" and np.array_equal(np.atleast_1d(value), np.atleast_1d(head))
        )
        for head in heads
    ]


def _moving_of_plans(trained: TrainedNetwork, target: PlannedNetwork) -> str:
    """The commands that plan the trained network for the target's dataset."""
    preprocessed = Path(nnUNet_preprocessed) / target.name
    source, plans_name = (trained.planned.plans[key] for key in ("dataset_name", "plans_name"))
    new_name = f"{plans_name}From{source}"
    while (preprocessed / f"{new_name}.json").exists():
        new_name += "_"
    commands = []
    if not _plans_network(Path(nnUNet_preprocessed) / source / f"{plans_name}.json", trained):
        plans_of_model = trained.file.resolve().parents[1] / "plans.json"
        if not _plans_network(plans_of_model, trained):
            return "give the model folder, with its plans.json, as --from"
        source, plans_name = target.name, f"{new_name}_original"
        commands.append(["cp", str(plans_of_model), str(preprocessed / f"{plans_name}.json")])
    move = ["nnUNetv2_move_plans_between_datasets", "-s", source, "-t", target.name, "-sp", plans_name, "-tp", new_name]
    configuration = trained.planned.configuration
    commands += [move, _preprocessing(target.name, new_name, configuration)]
    choice = f"choose -p {new_name} -c {configuration}"
    if target.carried is not None:
        choice = f"run nnunet-xattnres plans with -p {new_name} -c {configuration}, and choose the plans that it writes"
    return (
        f"to plan it for {target.name}: {' && '.join(shell_command(*command) for command in commands)}; then {choice}"
    )


def _plans_network(plans: Path, trained: TrainedNetwork) -> bool:
    """Whether this file of plans exists and has the trained network in the configuration of its training."""
    try:
        planned = from_file(plans, trained.planned.configuration)
    except XAttnResError:
        return False
    return _architecture(planned) == _architecture(trained.planned)


def _preprocessing(dataset: str, plans_name: str, configuration: str) -> list[str]:
    number = str(convert_dataset_name_to_id(dataset))
    return ["nnUNetv2_preprocess", "-d", number, "-plans_name", plans_name, "-c", configuration]


def _checkpoint_in(folder: Path, fold: str | None) -> tuple[str, Path]:
    """The fold and its final checkpoint."""
    checkpoints = checkpoints_of_folds(folder)
    if not checkpoints:
        raise XAttnResError(f"{folder} has no fold_*/{FINAL_CHECKPOINT}: name a model folder, or a checkpoint itself")
    chosen = choose_fold(folder, fold)
    if chosen not in checkpoints:
        raise XAttnResError(f"{folder} has no finished fold {chosen}: choose from {', '.join(checkpoints)}")
    return chosen, checkpoints[chosen]


def _network(planned: PlannedNetwork) -> dict[str, Any]:
    """What decides, together with the weights, what a plain nnU-Net computes before its segmentation heads.

    The XAttnRes that plans carry does not belong to it.
    """
    return {"input channels": planned.num_input_channels, **_architecture(planned)}


def _architecture(planned: PlannedNetwork) -> dict[str, Any]:
    manager = planned.without_xattnres().manager
    return {"network": manager.network_arch_class_name.rpartition(".")[2], **manager.network_arch_init_kwargs}


def _check_output(output: Path) -> None:
    check_not_of_nnunet(output, "-o", "warm")
    check_writable(output, "-o")
    if output.is_dir() and any(output.iterdir()):
        raise XAttnResError(f"{output} is there already and not an empty folder: choose another -o")


def _trainer_with_weights(
    trainer_class: type[nnUNetTrainer], trained: TrainedNetwork, target: PlannedNetwork, with_heads: bool
) -> nnUNetTrainer:
    """The trainer before its first epoch, on the CPU, with the trained weights."""
    trainer = target.make_trainer(trainer_class, trained.fold, "cpu")
    preprocessed = Path(trainer.preprocessed_dataset_folder)
    if not (preprocessed.is_dir() and any(preprocessed.iterdir())):
        command = shell_command(*_preprocessing(target.name, target.plans["plans_name"], target.configuration))
        raise XAttnResError(f"there is no preprocessed data in {preprocessed}: run {command}")
    trainer.initialize()
    _load_weights(trainer.network, trained, with_heads)
    trainer.inference_allowed_mirroring_axes = trained.checkpoint.get("inference_allowed_mirroring_axes")
    # A checkpoint records the number of the next epoch, which is 0.
    trainer.current_epoch = -1
    return trainer


def _load_weights(network: nn.Module, trained: TrainedNetwork, with_heads: bool) -> None:
    def taken_over(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            key: value
            for key, value in state.items()
            if not key.startswith("xattnres.") and (with_heads or HEADS not in key)
        }

    weights, planned = taken_over(trained.checkpoint["network_weights"]), taken_over(network.state_dict())
    shapes, planned_shapes = ({key: tuple(value.shape) for key, value in each.items()} for each in (weights, planned))
    if shapes != planned_shapes:
        key = next(key for key in planned_shapes | shapes if shapes.get(key) != planned_shapes.get(key))
        raise XAttnResError(
            f"{trained.file} was written by {trained.checkpoint['trainer_name']}, whose network is not the planned "
            f"one: {key} has the shape {shapes.get(key)} (planned {planned_shapes.get(key)}); choose another --from"
        )
    network.load_state_dict(weights, strict=False)


def _write(output: Path, trainer: nnUNetTrainer, trained: TrainedNetwork | None) -> None:
    """Write pretrained weights and, unless `trained` is None, what makes the folder a model folder."""
    try:
        with folder_written_atomically(output) as folder:
            if trained is not None:
                _write_model(folder, trainer, trained)
            trainer.save_checkpoint(str(folder / PRETRAINED))
    # PyTorch raises RuntimeError for a full disk.
    except (OSError, RuntimeError) as error:
        raise XAttnResError(f"cannot write {output} ({reason(error)}): make room or choose another -o") from error


def _write_model(folder: Path, trainer: nnUNetTrainer, trained: TrainedNetwork) -> None:
    # Until the model is trained further, it must predict from images that are preprocessed as in its first training.
    plans = trained.planned.plans
    # The network is that of the trainer. Its plans may carry XAttnRes.
    network = {"architecture": trainer.configuration_manager.configuration["architecture"]}
    configuration = {trainer.configuration_name: trained.planned.manager.configuration | network}
    write_json_atomically(plans | {"configurations": plans["configurations"] | configuration}, folder / "plans.json")
    write_json_atomically(trained.planned.dataset_json, folder / "dataset.json")
    fold = folder / f"fold_{trained.fold}"
    fold.mkdir()
    # `nnUNetv2_train --c` continues from this file. It prefers checkpoint_final.pth, also to what it has trained since.
    trainer.save_checkpoint(str(fold / LATEST_CHECKPOINT))


def _print_commands_of_model_folder(
    options: Options, train: Sequence[str], fold: int | str, model_folder: Path
) -> None:
    model = ["-m", str(options.output), "-f", str(fold), "-chk", LATEST_CHECKPOINT]
    predict = ["nnUNetv2_predict_from_modelfolder", *model]
    print(f"{options.output} computes what {options.start} does. To predict with it:")
    print(f"  {shell_command(*predict, '-i', 'IMAGES', '-o', 'PREDICTIONS')}")
    print("To train on from it, segmentation heads included:")
    results = os.environ.get("nnUNet_results")
    place = None if results is None else Path(results, model_folder)
    if place is None or options.output.resolve() != place.resolve():
        if place is not None and (place / f"fold_{fold}").exists():
            there = place / f"fold_{fold}"
            print(f"{there} is there already: move it away first, or --c goes on from a {FINAL_CHECKPOINT} there")
        copy = shell_command("cp", "-r", f"{options.output}/.")
        place_in_results = f'"$nnUNet_results"/{shell_command(model_folder)}'
        print(f"  mkdir -p {place_in_results} && {copy} {place_in_results}")
    print(f"  {shell_command(*train, '--c')}")
