"""The mean attention weights of a network, recorded in every validation of its training."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import chain
from math import isfinite
from pathlib import Path

import torch
from torch import Tensor, distributed, nn

from nnunet_xattnres.common.errors import XAttnResError
from nnunet_xattnres.common.files import write_text_atomically
from nnunet_xattnres.model.planned_unet import PlannedUNet, uncompiled

RECORD = "xattnres_routing.json"
PICTURE = "xattnres_routing.png"
DECIMALS = 6
# Without it a reader takes a large weight for a large effect.
CAVEAT = "A weight is a share of the mixture. It does not measure influence: features differ in size."

MOST_RECORDED_BATCHES = 2
# Recording a batch costs an additional forward pass, about a third of a training step: less than 0.7 % of 50 steps.
TRAINING_STEPS_PER_RECORDED_BATCH = 50


@dataclass
class RoutingHistory:
    """The mean attention weights of every target in every epoch.

    sources: the names of the sources of every target, in the order of its weights.
    epochs: the weights by epoch and target. None stands for NaN and infinity.
    """

    sources: dict[str, list[str]]
    epochs: dict[int, dict[str, list[float | None]]] = field(default_factory=dict)

    @property
    def all_sources(self) -> list[str]:
        """Every source once, in the order in which sources are computed."""
        return in_pool_order(chain(*self.sources.values()))

    @classmethod
    def read(cls, path: Path) -> "RoutingHistory":
        """Read what `write` has written.

        Raises `XAttnResError` for a file with other content, and `OSError` for a file that cannot be read.
        """
        text = path.read_bytes()
        try:
            content = json.loads(text)
            history = cls(
                {target: list(sources) for target, sources in content["sources"].items()},
                {int(epoch): dict(weights) for epoch, weights in content["epochs"].items()},
            )
            if not history.epochs:
                raise ValueError("it holds no epoch")
            for weights in history.epochs.values():
                for target, sources in history.sources.items():
                    if len(weights[target]) != len(sources):
                        raise ValueError(f"{target} has {len(weights[target])} weights for {len(sources)} sources")
                    if not all(weight is None or isfinite(weight) for weight in weights[target]):
                        raise ValueError(f"{target} has weights that are no numbers")
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise XAttnResError(f"{path} is no record of attention weights ({error!r})") from None
        return history

    def record(self, epoch: int, means: dict[str, list[float | None]]) -> None:
        """Add an epoch. Earlier records of this epoch and of later epochs are removed: training has been repeated."""
        self.epochs = {earlier: of_epoch for earlier, of_epoch in self.epochs.items() if earlier < epoch}
        self.epochs[epoch] = means

    def write(self, path: Path) -> None:
        content = {"note": CAVEAT, "sources": self.sources, "epochs": self.epochs}
        write_text_atomically(json.dumps(content, allow_nan=False), path)


class ValidationRecorder:
    """Records the mean weights of the first batches of a validation.

    Each recorded batch runs through the uncompiled network once more, so that nothing is compiled again.

    network: the trainer's network. It may be wrapped for compilation and for distributed training.
    training_steps: the number per epoch. If it is small, less is recorded, but always one patch.
    """

    def __init__(self, network: nn.Module, device: torch.device, training_steps: int) -> None:
        self.network = uncompiled(network)
        self.device = device
        self.sources = self.network.routing_sources if isinstance(self.network, PlannedUNet) else {}
        affordable = training_steps // TRAINING_STEPS_PER_RECORDED_BATCH
        self._whole_batches = affordable > 0
        self._batches_to_record = min(MOST_RECORDED_BATCHES, max(1, affordable)) if self.sources else 0
        self._means = WeightMeans(self.sources)

    @torch.no_grad()
    def observe(self, data: Tensor) -> None:
        """Record a batch (B, channels, *size), unless enough batches have been recorded."""
        if not self._batches_to_record:
            return
        assert isinstance(self.network, PlannedUNet)
        self._batches_to_record -= 1
        # As in nnU-Net's validation, mixed precision is for GPUs only.
        mixed_precision = torch.autocast("cuda") if self.device.type == "cuda" else nullcontext()
        with mixed_precision, self.network.routing(receive=self._means.add):
            self.network((data if self._whole_batches else data[:1]).to(self.device, non_blocking=True))

    def means(self) -> dict[str, list[float | None]]:
        """The mean weights of every target over all processes of the training. Empty if nothing was recorded.

        Every process of a distributed training must call this.
        """
        if not self.sources:
            return {}
        # Every process must take part, even if it has recorded nothing, because the others wait for it.
        sums = torch.cat(list(self._means.sums.values())).to(self.device)
        calls = torch.tensor([self._means.calls[target] for target in self.sources], device=self.device)
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(sums)
            distributed.all_reduce(calls)
        if not calls.all():
            return {}
        numbers = iter(sums.tolist())
        return {
            target: [_number_or_none(next(numbers) / number_of_calls) for _ in names]
            for (target, names), number_of_calls in zip(self.sources.items(), calls.tolist(), strict=True)
        }


def _number_or_none(weight: float) -> float | None:
    return round(weight, DECIMALS) if isfinite(weight) else None


# In this order a picture shows the sources of several targets.
KINDS_OF_SOURCES = ("input", "E", "D", "block", "current")


class WeightMeans:
    """Accumulates the mean weight of every source over batch items, positions and calls. No map is kept.

    sums: by target, the sum of the means of all calls, (K,). calls: by target, the number of calls.
    """

    def __init__(self, sources: Mapping[str, Sequence[str]]) -> None:
        self.sums = {target: torch.zeros(len(names)) for target, names in sources.items()}
        self.calls = dict.fromkeys(sources, 0)

    def add(self, target: str, weights: Tensor) -> None:
        """weights: of one call, (K, B, *size)"""
        self.sums[target] += weights.mean(dim=list(range(1, weights.ndim))).cpu()
        self.calls[target] += 1


def in_pool_order(sources: Iterable[str]) -> list[str]:
    """Every name of a source once, in the order E0, E1, ..., D0, ..., current."""

    def rank(name: str) -> tuple[int, int]:
        kind, number = kind_and_number(name)
        return KINDS_OF_SOURCES.index(kind), number

    return sorted(set(sources), key=rank)


def kind_and_number(source: str) -> tuple[str, int]:
    """("E", 2) for E2. A source without a number has number 0."""
    kind, number = re.fullmatch(r"(\D+)(\d*)", source).groups()  # type: ignore[union-attr]
    return kind, int(number or 0)
