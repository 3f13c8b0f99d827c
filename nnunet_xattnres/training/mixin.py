"""What all XAttnRes trainers share. The trainers themselves are in `trainers/` and only choose a preset."""

import os
from collections.abc import Iterator
from math import isclose
from pathlib import Path
from time import monotonic
from typing import Any, ClassVar

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunet_xattnres import __version__
from nnunet_xattnres.common.errors import XAttnResError, differences
from nnunet_xattnres.common.files import files_written_atomically, remove_leftovers, temporary_folder
from nnunet_xattnres.model.block_level import IntraStageAttention
from nnunet_xattnres.model.build import add_xattnres, check_plans
from nnunet_xattnres.model.config import BlockXAttnResConfig, Config, XAttnResConfig
from nnunet_xattnres.model.plan_classes import carried_config
from nnunet_xattnres.model.planned_unet import PlannedUNet, check_class, uncompiled
from nnunet_xattnres.model.stage_level import XAttnResUNet
from nnunet_xattnres.nnunet.planned_network import call_as_nnunet
from nnunet_xattnres.ops.backends import check_backend, chosen_backend
from nnunet_xattnres.training.backend_choice import Record, choose_backend
from nnunet_xattnres.training.checkpoint import LATEST_CHECKPOINT, check_content, read_checkpoint_as_nnunet
from nnunet_xattnres.training.routing_record import RoutingRecord
from nnunet_xattnres.training.variables import checkpoint_minutes, records_weights

# nnU-Net's `load_checkpoint` reads these keys, and the keys that every checkpoint has.
KEYS_TO_CONTINUE = ("current_epoch", "logging", "_best_ema", "optimizer_state", "grad_scaler_state")
DELETE_IT = "delete it to continue from another one"
# `nnUNetv2_train` itself looks whether the other checkpoints exist.
LEAVE_IT_OUT = "leave out --val_best, or give a checkpoint that exists"

BUDGET_KEYS = ("num_epochs", "num_iterations_per_epoch", "num_val_iterations_per_epoch")


class XAttnResTrainerMixin(nnUNetTrainer):
    """An nnU-Net trainer whose planned network gets XAttnRes, at stage level or at block level.

    Put it before any nnU-Net trainer: `class Mine(XAttnResTrainerMixin, nnUNetTrainerDA5): ...`. The other order is
    refused when the trainer is made.

    xattnres_config: what is added to the planned network. It is a class attribute because nnU-Net builds the network
        for inference from the class alone. Every checkpoint records what the network was built with, and it is checked
        when one is loaded.
    default_num_epochs: the number of epochs if the plans do not say it. None: that of the base trainer.
    checkpoint_minutes: the longest time between two writings of `checkpoint_latest.pth`, as far as epochs are shorter.
        The environment variable `nnUNet_xattnres_checkpoint_minutes` overrides it.

    Every validation appends the mean attention weights to `xattnres_routing.json`, beside nnU-Net's `progress.png`, and
    sends them to the additional loggers of nnU-Net. `xattnres_routing.png` shows them. It is drawn in the first and in
    the last epoch, and in between as often as drawing takes at most 0.3 % of the training time. The environment
    variable `nnUNet_xattnres_record=false` switches all of this off.

    A configuration in the plans may hold a budget: `"training": {"num_epochs": ..., "num_iterations_per_epoch": ...,
    "num_val_iterations_per_epoch": ...}`. Each key is optional and overrides the trainer's value.

    On a GPU, a training whose config has the backend "auto" measures the backends when it starts: see `choose_backend`.

    `checkpoint_latest.pth` is written after every twentieth of the epochs, at most 50 epochs apart as in nnU-Net, and
    in between before `checkpoint_minutes` have passed.

    Raises `XAttnResError` for the wrong order of bases, for an invalid budget or environment variable, for plans or a
    base trainer without an encoder/decoder U-Net, for a backend that is not available on the device, and for a
    checkpoint that is damaged or that another trainer or preset has written.
    """

    xattnres_config: ClassVar[Config] = XAttnResConfig()
    default_num_epochs: ClassVar[int | None] = None
    checkpoint_minutes: ClassVar[float] = 30.0

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),
    ) -> None:
        # Not when the class is defined: nnU-Net imports all files of a folder to find one trainer.
        check_bases(type(self))
        # All that may be refused is looked at before nnU-Net makes the output folder.
        planned = PlansManager(plans).get_configuration(configuration)
        check_plans(planned, self.xattnres_config)
        budget = planned.configuration.get("training", {})
        _check_budget(budget, configuration)
        config = carried_config(planned) or self.xattnres_config
        # Other networks do not compute with the backend. Prediction does not come here, so that a network predicts on
        # machines without its backend.
        if isinstance(config, XAttnResConfig) and config.has_attention:
            check_backend(config.backend, device.type)
        self._checkpoint_seconds = 60 * checkpoint_minutes(self.checkpoint_minutes)
        records = records_weights()
        super().__init__(plans, configuration, fold, dataset_json, device)
        if self.default_num_epochs is not None:
            self.num_epochs = self.default_num_epochs
        for key, value in budget.items():
            setattr(self, key, value)
        self._routing_record = RoutingRecord(self) if records else None
        self._backend_record: Record | None = None
        self._saved_at = self._epoch_ended_at = monotonic()
        # nnU-Net writes it 20 times in its 1000 epochs.
        self.save_every: int = min(self.save_every, max(1, self.num_epochs // 20))

    @classmethod
    def build_network_architecture(
        cls,
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """The network that the base trainer builds from the plans, with this class's XAttnRes."""
        check_plans(configuration_manager, cls.xattnres_config)
        planned = call_as_nnunet(
            super().build_network_architecture,
            plans_manager,
            configuration_manager,
            num_input_channels,
            num_output_channels,
            enable_deep_supervision,
        )
        bases = cls.__mro__[cls.__mro__.index(XAttnResTrainerMixin) + 1 :]
        builder = next(base.__name__ for base in bases if "build_network_architecture" in vars(base))
        remedy = "put the mixin before a trainer that builds the network of the plans"
        if not isinstance(planned, PlannedUNet):  # the plans carry XAttnRes
            check_class(type(planned), remedy, f", which {builder} builds from these plans")
        return add_xattnres(planned, cls.xattnres_config)

    def on_train_start(self) -> None:
        # A trainer before the mixin may have called nnU-Net's `__init__` and left out the mixin's.
        check_bases(type(self))
        if self._is_first_process:
            # nnU-Net trains once at a time in a folder.
            remove_leftovers(Path(self.output_folder))
        super().on_train_start()
        _check_temperature(self.network)
        backend, reason = self.choose_backend()
        if self._is_first_process:
            self.print_to_log_file(f"XAttnRes: {_description(self.network, backend)}")
            if reason:
                self.print_to_log_file(f"XAttnRes is computed by {backend}; {reason}")

    def choose_backend(self) -> tuple[str, str]:
        """Choose the backend that computes. On a GPU, "auto" at stage level is measured.

        Returns its name, and why it was chosen if that is not plain. The network must be initialised.
        """
        network, config = uncompiled(self.network), config_of(self.network)
        is_measured = config.backend == "auto" and self.device.type == "cuda"
        if is_measured and isinstance(network, XAttnResUNet) and network.xattnres:
            image_shape = (self.batch_size, self.num_input_channels, *self.configuration_manager.patch_size)
            record = self._backend_record
            backend, reason, new_record = choose_backend(network, image_shape, self.device, record)
            self._backend_record = new_record or record
            return backend, reason
        return chosen_backend(config.backend, self.device.type, isinstance(config, XAttnResConfig))

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        if self._routing_record:
            self._routing_record.start_validation()

    def validation_step(self, batch: dict) -> dict:
        if self._routing_record:
            self._routing_record.observe(batch["data"])
        return super().validation_step(batch)

    def on_validation_epoch_end(self, val_outputs: list[dict]) -> None:
        super().on_validation_epoch_end(val_outputs)
        if self._routing_record:
            self._routing_record.end_validation(writes=self._is_first_process)

    def on_epoch_end(self) -> None:
        now = monotonic()
        without_another = now + (now - self._epoch_ended_at) - self._saved_at
        self._epoch_ended_at = now
        save_every = self.save_every
        if without_another > self._checkpoint_seconds:
            # nnU-Net then writes it after this epoch, unless the training ends with it.
            self.save_every = 1
        try:
            super().on_epoch_end()
        finally:
            self.save_every = save_every

    def save_checkpoint(self, filename: str) -> None:
        """Write the checkpoint as a whole or not at all: if the process is killed, the previous one remains.

        The base trainer gets the file's name in a temporary folder, and may write nothing. What it writes into that
        folder is moved to its final place.
        """
        # nnU-Net stores `my_init_kwargs` in every checkpoint and ignores keys that it does not know.
        self.my_init_kwargs["xattnres"] = {
            "version": __version__,
            "config": config_of(self.network).architecture(),
            "backends": self._backend_record,
        }
        with files_written_atomically(Path(filename)) as temporary:
            super().save_checkpoint(str(temporary))
        if Path(filename).name == LATEST_CHECKPOINT:
            self._saved_at = monotonic()

    def load_checkpoint(
        self,
        filename_or_checkpoint: dict[str, Any] | str | Path | None = None,
        *,
        checkpoint: dict[str, Any] | str | Path | None = None,
    ) -> None:
        """Check a checkpoint, then load it.

        The argument has the name `filename_or_checkpoint` in nnU-Net 2.8, and `checkpoint` on its main branch.
        """
        given = filename_or_checkpoint if checkpoint is None else checkpoint
        if isinstance(given, dict):
            check_content(given, "the checkpoint", "give another one")
            self._check_checkpoint("the checkpoint", given, "give another one")
            # nnU-Net 2.8 documents a dict, and cannot load one.
            with temporary_folder(Path(self.output_folder)) as folder:
                torch.save(given, folder / "checkpoint.pth")
                super().load_checkpoint(str(folder / "checkpoint.pth"))
        elif given is None:
            raise TypeError("load_checkpoint needs a file or a checkpoint")
        else:
            name = os.fspath(given)
            content = read_checkpoint_as_nnunet(Path(name), DELETE_IT, LEAVE_IT_OUT)
            self._check_checkpoint(name, content, DELETE_IT)
            super().load_checkpoint(name)
        self._backend_record = self.my_init_kwargs.get("xattnres", {}).get("backends")

    @property
    def _is_first_process(self) -> bool:
        """Of all processes of a distributed training. nnU-Net that trains on several nodes has a global rank."""
        return getattr(self, "global_rank", self.local_rank) == 0

    def _check_checkpoint(self, name: str, checkpoint: dict[str, Any], remedy: str) -> None:
        """Raise `XAttnResError` unless training can go on from the checkpoint with the network that is built here."""
        missing = [key for key in KEYS_TO_CONTINUE if key not in checkpoint]
        if missing:
            raise XAttnResError(f"{name} lacks {' and '.join(missing)}, so training cannot go on from it: {remedy}")
        written_by = checkpoint["trainer_name"]
        record: dict[str, Any] | None = checkpoint["init_args"].get("xattnres")
        if record is None:
            raise XAttnResError(
                f"{name} was written by {written_by}, which has no XAttnRes: continue it with -tr {written_by}"
            )
        if not self.was_initialized:
            self.initialize()
        check_preset(name, checkpoint, self.network, type(self).__name__, "continue it")
        if record["version"] != __version__:
            self.print_to_log_file(f"{name} was written by nnunet-xattnres {record['version']}, this is {__version__}")


def check_bases(trainer: type[nnUNetTrainer]) -> None:
    """Raise `XAttnResError` if an nnU-Net trainer comes before the mixin, so that its methods replace the mixin's."""
    bases = trainer.__mro__
    if XAttnResTrainerMixin not in bases:
        return
    for base in bases[: bases.index(XAttnResTrainerMixin)]:
        if issubclass(base, nnUNetTrainer) and not issubclass(base, XAttnResTrainerMixin):
            raise XAttnResError(
                f"{trainer.__name__} has {base.__name__} before XAttnResTrainerMixin, whose methods it would replace: "
                f"put the mixin first, as in class {trainer.__name__}(XAttnResTrainerMixin, {base.__name__})"
            )


def adds_xattnres(trainer: type[nnUNetTrainer]) -> bool:
    """Whether a trainer adds XAttnRes, which plans that carry it do not permit."""
    return issubclass(trainer, XAttnResTrainerMixin) and not trainer.xattnres_config.is_planned_network


def config_of(network: nn.Module) -> Config:
    """What a network was built with, in whatever it is wrapped. A network of nnU-Net's own has nothing added."""
    return next((ours.config for ours in _our_networks(network)), XAttnResConfig.of_planned_network())


def _our_networks(network: nn.Module) -> Iterator[PlannedUNet]:
    return (module for module in network.modules() if isinstance(module, PlannedUNet))


def _check_temperature(network: nn.Module) -> None:
    """Raise `XAttnResError` if weights that nnU-Net has loaded with -pretrained_weights bring another temperature."""
    config = config_of(network)
    for attention in network.modules():
        if isinstance(attention, IntraStageAttention) and isinstance(config, BlockXAttnResConfig):
            loaded = attention.temperature.item()
            if not isclose(loaded, config.temperature, rel_tol=1e-6):
                raise XAttnResError(
                    f"the pretrained weights come with temperature={loaded:g} (here {config.temperature:g}): choose "
                    "weights of the same preset"
                )


def _description(network: nn.Module, backend: str) -> str:
    """One line: the preset, the backend that computes it, and the parameters beside those of the planned network."""
    parameters = sum(parameter.numel() for parameter in network.parameters())
    ours = next(_our_networks(network), None)
    if ours is None:
        return f"the planned network, nothing added; {parameters:,} parameters"
    return (
        f"{ours.config}, computed by {backend}; {parameters:,} parameters, "
        f"{parameters / ours.planned_parameters:.3f}x the {ours.planned_parameters:,} of the planned network"
    )


def check_preset(name: str, checkpoint: dict[str, Any], network: nn.Module, trainer: str, what: str) -> None:
    """Raise `XAttnResError` if the checkpoint records another preset than that of the network.

    name: of the checkpoint, for the message. trainer: the name of the trainer that built the network.
    what: what to do with the checkpoint by the trainer that wrote it.
    """
    record = checkpoint["init_args"]["xattnres"]
    config = config_of(network).architecture()
    if record["config"] != config:
        raise XAttnResError(
            f"{name} was written by {checkpoint['trainer_name']} of nnunet-xattnres {record['version']} with "
            f"{_differences(record['config'], config)}: {what} with that trainer and version, not with "
            f"{trainer} of {__version__}"
        )


def _differences(recorded: dict[str, Any], here: dict[str, Any]) -> str:
    if not recorded.keys() & here.keys():
        return f"another kind of preset ({', '.join(recorded)})"
    return differences(recorded, here)


def _check_budget(budget: Any, configuration: str) -> None:
    where = f'"training" of the configuration {configuration} in the plans'
    if not isinstance(budget, dict) or any(key not in BUDGET_KEYS for key in budget):
        raise XAttnResError(f"{where} may hold {', '.join(BUDGET_KEYS)} and nothing else, not {budget!r}")
    for key, value in budget.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise XAttnResError(f"{key} in {where} must be a positive whole number, not {value!r}")
