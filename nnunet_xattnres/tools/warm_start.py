"""The command `warm-start`: start a trainer with residual fusion from the weights of a trained plain nnU-Net.

The gates of residual fusion are zero at the start, so both networks compute the same function.
"""

import io
import os
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

from nnunet_xattnres.common.errors import XAttnResError, differences, reason
from nnunet_xattnres.common.files import check_writable, folder_written_atomically, write_json_atomically
from nnunet_xattnres.common.processes import environment_with
from nnunet_xattnres.common.text import shell_command
from nnunet_xattnres.model.config import XAttnResConfig
from nnunet_xattnres.nnunet.planned_network import PlannedNetwork, from_content, from_dataset, from_file
from nnunet_xattnres.nnunet.trainer_lookup import find_trainer
from nnunet_xattnres.training.checkpoint import FINAL_CHECKPOINT, finished_folds, read_checkpoint
from nnunet_xattnres.training.mixin import XAttnResTrainerMixin

# `nnUNetv2_train --c` continues from this file. It prefers checkpoint_final.pth, also to what it has trained since.
CHECKPOINT = "checkpoint_latest.pth"
PRETRAINED = "pretrained.pth"


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
    """Write the model folder and print the commands that use it.

    Raises `XAttnResError` for a trainer whose network is not the planned one at the start, for a checkpoint that cannot
    be read or belongs to another network, and for an output folder that is not empty.
    """
    trainer_class = find_residual_trainer(options.trainer)
    output = options.output.resolve()
    _check_output(output)
    target = from_dataset(options.dataset, options.configuration, options.plans_name)
    trained = read_trained(options.start, options.fold, options.trust_checkpoint)
    check_same_network(trained.planned, target)
    with (
        TemporaryDirectory(prefix="nnunet_xattnres_") as results,
        environment_with(nnUNet_results=results, nnUNet_wandb_enabled="0"),
        redirect_stdout(io.StringIO()),
    ):
        trainer = _trainer_with_weights(trainer_class, trained, target)
        model_folder = Path(trainer.output_folder_base).relative_to(results)
        _write_model_folder(output, trainer, trained)
    _print_next_commands(options, target, trained.fold, model_folder)


def find_residual_trainer(name: str) -> type[nnUNetTrainer]:
    """The trainer class of this name. Raises `XAttnResError` unless its network is the planned one at the start."""
    trainer_class = find_trainer(name)
    config = getattr(trainer_class, "xattnres_config", None)
    if (
        not issubclass(trainer_class, XAttnResTrainerMixin)
        or not isinstance(config, XAttnResConfig)
        or config.fusion != "residual"
        or not config.skip_connections
    ):
        raise XAttnResError(
            f"the network of {name} is not the planned one at the start: choose nnUNetTrainerXAttnResFinetune, or a "
            'trainer of your own with fusion="residual" and skip connections'
        )
    return trainer_class


def read_trained(path: Path, fold: str | None, trusted: bool) -> TrainedNetwork:
    """Read a model folder's checkpoint and plans, or a checkpoint and the plans that it records.

    Raises `XAttnResError` if there is no usable checkpoint, or if its network has XAttnRes already.
    """
    if fold is not None and path.is_file():
        raise XAttnResError(f"-f chooses a fold of a model folder, but {path} is none: leave -f out")
    found_fold, file = _checkpoint_in(path, fold) if path.is_dir() else (None, path)
    checkpoint = read_checkpoint(file, "choose another --from", trusted)
    if any(key.startswith("xattnres.") for key in checkpoint["network_weights"]):
        written_by = checkpoint["trainer_name"]
        raise XAttnResError(
            f"{file} was written by {written_by} and has XAttnRes already: train on with -tr {written_by} and --c, or "
            "start from it with -tr and -pretrained_weights"
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


def check_same_network(trained: PlannedNetwork, target: PlannedNetwork) -> None:
    """Raise `XAttnResError`, which lists the differences, if the two do not plan the same network."""
    found = differences(_planned_properties(trained), _planned_properties(target))
    if found:
        raise XAttnResError(
            f"the trained network is not the one that {target.configuration} of {target.plans['plans_name']} plans for "
            f"{target.name}: {found}; nnUNetv2_move_plans_between_datasets copies its plans"
        )


def _checkpoint_in(folder: Path, fold: str | None) -> tuple[str, Path]:
    """The fold and its final checkpoint."""
    checkpoints = finished_folds(folder)
    if not checkpoints:
        raise XAttnResError(f"{folder} has no fold_*/{FINAL_CHECKPOINT}: name a model folder, or a checkpoint itself")
    if fold is None and len(checkpoints) > 1:
        raise XAttnResError(f"{folder} has several folds: choose one of them with -f: {', '.join(checkpoints)}")
    if fold is not None and fold not in checkpoints:
        raise XAttnResError(f"{folder} has no finished fold {fold}: choose from {', '.join(checkpoints)}")
    chosen = fold or next(iter(checkpoints))
    return chosen, checkpoints[chosen]


def _planned_properties(planned: PlannedNetwork) -> dict[str, Any]:
    """What decides, together with the weights, what a plain nnU-Net computes."""
    return {
        "input channels": planned.num_input_channels,
        "segmentation heads": planned.num_segmentation_heads,
        "network": planned.manager.network_arch_class_name.rpartition(".")[2],
        **planned.manager.network_arch_init_kwargs,
    }


def _check_output(output: Path) -> None:
    check_writable(output, "-o")
    if output.is_dir() and any(output.iterdir()):
        raise XAttnResError(f"{output} is there already and not an empty folder: choose another -o")


def _trainer_with_weights(
    trainer_class: type[nnUNetTrainer], trained: TrainedNetwork, target: PlannedNetwork
) -> nnUNetTrainer:
    """The trainer before its first epoch, on the CPU, with the trained weights."""
    trainer = target.make_trainer(trainer_class, trained.fold, "cpu")
    if not Path(trainer.preprocessed_dataset_folder).is_dir():
        raise XAttnResError(f"{trainer.preprocessed_dataset_folder} does not exist: run nnUNetv2_preprocess first")
    trainer.initialize()
    _load_weights(trainer.network, trained)
    trainer.inference_allowed_mirroring_axes = trained.checkpoint.get("inference_allowed_mirroring_axes")
    # A checkpoint records the number of the next epoch, which is 0.
    trainer.current_epoch = -1
    return trainer


def _load_weights(network: nn.Module, trained: TrainedNetwork) -> None:
    weights = trained.checkpoint["network_weights"]
    planned = {key: value for key, value in network.state_dict().items() if not key.startswith("xattnres.")}
    shapes, planned_shapes = ({key: tuple(value.shape) for key, value in each.items()} for each in (weights, planned))
    if shapes != planned_shapes:
        key = next(key for key in planned_shapes | shapes if shapes.get(key) != planned_shapes.get(key))
        raise XAttnResError(
            f"{trained.file} was written by {trained.checkpoint['trainer_name']}, whose network is not the planned "
            f"one: {key} has the shape {shapes.get(key)} (planned {planned_shapes.get(key)}); choose another --from"
        )
    network.load_state_dict(weights, strict=False)


def _write_model_folder(output: Path, trainer: nnUNetTrainer, trained: TrainedNetwork) -> None:
    # Until the model is trained further, it must predict from images that are preprocessed as in its first training.
    plans = trained.planned.plans
    configuration = {trainer.configuration_name: trained.planned.manager.configuration}
    try:
        with folder_written_atomically(output) as folder:
            write_json_atomically(
                plans | {"configurations": plans["configurations"] | configuration}, folder / "plans.json"
            )
            write_json_atomically(trained.planned.dataset_json, folder / "dataset.json")
            fold = folder / f"fold_{trained.fold}"
            fold.mkdir()
            trainer.save_checkpoint(str(fold / CHECKPOINT))
            trainer.save_checkpoint(str(folder / PRETRAINED))
    # PyTorch raises RuntimeError for a full disk.
    except (OSError, RuntimeError) as error:
        raise XAttnResError(f"cannot write {output} ({reason(error)}): make room or choose another -o") from error


def _print_next_commands(options: Options, target: PlannedNetwork, fold: int | str, model_folder: Path) -> None:
    train = ["nnUNetv2_train", target.plans["dataset_name"], options.configuration, str(fold), "-tr", options.trainer]
    train += ["-p", options.plans_name]
    predict = ["nnUNetv2_predict_from_modelfolder", "-m", str(options.output), "-f", str(fold), "-chk", CHECKPOINT]
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
    print("To train from it with new heads, as nnU-Net does with pretrained weights:")
    print(f"  {shell_command(*train, '-pretrained_weights', options.output / PRETRAINED)}")
