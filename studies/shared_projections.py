"""XAttnRes with fewer parameters: the projections shared, or factorised. Parameters, and trainers that measure Dice.

    python studies/shared_projections.py [2d | 3d_fullres]

prints the number of parameters for the Decathlon's plans. nnU-Net's commands find the trainers after

    export nnUNet_extTrainer=path/to/studies

full:        a projection (C_t, C_k) for every source k of every target t, as in the paper; the default
shared:      one for all targets of the same width C_t that read source k
factorised:  the product of a (C_t, r) that belongs to the target and an (r, C_k) that belongs to the source, r <= 64
"""

import sys
from collections.abc import Callable, Iterator

import torch
from nnunet_xattnres.trainers.nnUNetTrainerPlanned import nnUNetTrainerPlanned
from nnunet_xattnres.trainers.nnUNetTrainerXAttnRes import nnUNetTrainerXAttnRes
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import Tensor, nn

from nnunet_xattnres.model.stage_level import HistoryAttention, XAttnResUNet
from nnunet_xattnres.nnunet.presets import TASKS, build_preset
from nnunet_xattnres.training.mixin import XAttnResTrainerMixin

MAX_RANK = 64


def share(network: XAttnResUNet) -> None:
    """Let targets of one width read a source through one projection."""
    by_source_and_width: dict[tuple[int, int], nn.Parameter] = {}
    for attention in _attentions(network):
        width = len(attention.query)
        for k, projection in enumerate(attention.projections):
            attention.projections[k] = by_source_and_width.setdefault((k, width), projection)


def factorise(network: XAttnResUNet) -> None:
    """Replace every projection by the product of a target's and a source's factor."""
    of_sources: dict[int, nn.Parameter] = {}
    for attention in _attentions(network):
        for k, projection in enumerate(attention.projections):
            of_sources.setdefault(k, _variance_preserving(min(MAX_RANK, projection.shape[1]), projection.shape[1]))
        attention.projections = FactorisedProjections(
            len(attention.query), [of_sources[k] for k in range(len(attention.projections))]
        )


class FactorisedProjections(nn.Module):
    """The projections of one target, computed from its own factors (C_t, r) and those of the sources (r, C_k)."""

    def __init__(self, channels: int, of_sources: list[nn.Parameter]) -> None:
        super().__init__()
        self.of_sources = nn.ParameterList(of_sources)
        self.of_target = nn.ParameterList(_variance_preserving(channels, len(factor)) for factor in of_sources)

    def __len__(self) -> int:
        return len(self.of_target)

    def __iter__(self) -> Iterator[Tensor]:
        for of_target, of_source in zip(self.of_target, self.of_sources, strict=True):
            yield of_target @ of_source


class _RearrangedProjections(XAttnResTrainerMixin):
    rearrange: Callable[[XAttnResUNet], None]

    @classmethod
    def build_network_architecture(
        cls,
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        network = super().build_network_architecture(
            plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision
        )
        cls.rearrange(network)
        return network


class nnUNetTrainerXAttnResSharedProjections(_RearrangedProjections):
    """nnUNetTrainerXAttnRes, one projection for all targets of one width."""

    rearrange = staticmethod(share)


class nnUNetTrainerXAttnResFactorisedProjections(_RearrangedProjections):
    """nnUNetTrainerXAttnRes, every projection a product of two thin factors."""

    rearrange = staticmethod(factorise)


ARMS: dict[str, type[XAttnResTrainerMixin]] = {
    "planned": nnUNetTrainerPlanned,
    "full": nnUNetTrainerXAttnRes,
    "shared": nnUNetTrainerXAttnResSharedProjections,
    "factorised": nnUNetTrainerXAttnResFactorisedProjections,
}


def print_parameters(configuration: str) -> None:
    print("| plans | stages | planned |" + "".join(f" {arm} |" for arm in list(ARMS)[1:]))
    print("|---|---|---|" + "---|" * (len(ARMS) - 1))
    for preset, task in TASKS.items():
        plans, dataset_json = build_preset(preset, configuration)
        planned, *others = (_parameters(trainer, plans, configuration, dataset_json) for trainer in ARMS.values())
        stages = plans["configurations"][configuration]["architecture"]["arch_kwargs"]["n_stages"]
        ratios = "".join(f" {count / planned:.2f}x |" for count in others)
        print(f"| {preset} {task.name} | {stages} | {planned / 1e6:.1f} M |{ratios}")


def _parameters(trainer: type[XAttnResTrainerMixin], plans: dict, configuration: str, dataset_json: dict) -> int:
    manager = PlansManager(plans)
    with torch.device("meta"):
        network = trainer.build_network_architecture(
            manager,
            manager.get_configuration(configuration),
            len(dataset_json["channel_names"]),
            len(dataset_json["labels"]),
        )
    return sum(parameter.numel() for parameter in network.parameters())


def _attentions(network: XAttnResUNet) -> Iterator[HistoryAttention]:
    yield from network.xattnres.values()


def _variance_preserving(rows: int, columns: int) -> nn.Parameter:
    factor = nn.Parameter(torch.empty(rows, columns))
    nn.init.kaiming_normal_(factor, nonlinearity="linear")
    return factor


if __name__ == "__main__":
    print_parameters(*(sys.argv[1:] or ["2d"]))
