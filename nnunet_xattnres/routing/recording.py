"""What a network reads on average, recorded in every validation of its training."""

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

MOST_RECORDED_BATCHES = 2
# A recorded batch costs one more forward pass, about a third of a training step: less than 0.7 % of so many.
TRAINING_STEPS_PER_RECORDED_BATCH = 50


@dataclass
class RoutingHistory:
    """What every target read, on average, in every epoch.

    sources: by target, in the order of its weights.
    epochs: by epoch and target. None takes the place of a weight that is no number.
    """

    sources: dict[str, list[str]]
    epochs: dict[int, dict[str, list[float | None]]] = field(default_factory=dict)

    @property
    def all_sources(self) -> list[str]:
        return in_pool_order(chain(*self.sources.values()))

    @classmethod
    def read(cls, path: Path) -> "RoutingHistory":
        """Raises `XAttnResError` for a file that is damaged or something else, `OSError` for an unreadable one."""
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
        """Add an epoch. What was recorded of it and of later ones, by a training that went on from here, goes."""
        self.epochs = {earlier: of_epoch for earlier, of_epoch in self.epochs.items() if earlier < epoch}
        self.epochs[epoch] = means

    def write(self, path: Path) -> None:
        content = {"sources": self.sources, "epochs": self.epochs}
        write_text_atomically(json.dumps(content, allow_nan=False), path)


class ValidationRecorder:
    """The mean weights of the first batches of a validation.

    Each of them runs through the network once more, uncompiled: what torch.compile has made of it is never touched.

    network: the trainer's, compiled and distributed as it may be.
    training_steps: of an epoch. Less is recorded where they are few, but always one patch.
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
        """Record a batch, unless there have been enough."""
        if not self._batches_to_record:
            return
        assert isinstance(self.network, PlannedUNet)
        self._batches_to_record -= 1
        # nnU-Net validates in mixed precision on a GPU, and nowhere else.
        mixed_precision = torch.autocast("cuda") if self.device.type == "cuda" else nullcontext()
        with mixed_precision, self.network.routing(receive=self._means.add):
            self.network((data if self._whole_batches else data[:1]).to(self.device, non_blocking=True))

    def means(self) -> dict[str, list[float | None]]:
        """Over all processes of the training, of which each calls this. Empty where nothing was recorded."""
        if not self.sources:
            return {}
        # Every process takes part, whether or not it has recorded anything: the others wait for it.
        sums = torch.cat(list(self._means.sums.values())).to(self.device)
        calls = torch.tensor([self._means.calls[target] for target in self.sources], device=self.device)
        if distributed.is_initialized():
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


# In the order in which a picture shows sources of several targets.
KINDS_OF_SOURCES = ("input", "E", "D", "block", "current")


class WeightMeans:
    """The mean weight of every source, over batch items, positions and calls; no map is kept.

    sums: by target, of the means of every call, (K,). calls: how many.
    """

    def __init__(self, sources: Mapping[str, Sequence[str]]) -> None:
        self.sums = {target: torch.zeros(len(names)) for target, names in sources.items()}
        self.calls = dict.fromkeys(sources, 0)

    def add(self, target: str, weights: Tensor) -> None:
        self.sums[target] += weights.mean(dim=list(range(1, weights.ndim))).cpu()
        self.calls[target] += 1


def in_pool_order(sources: Iterable[str]) -> list[str]:
    """Names of sources, each once: E0, E1, ..., D0, ..., current."""

    def rank(name: str) -> tuple[int, int]:
        kind, number = kind_and_number(name)
        return KINDS_OF_SOURCES.index(kind), number

    return sorted(set(sources), key=rank)


def kind_and_number(source: str) -> tuple[str, int]:
    """E and 2 of E2; one that is not numbered counts as number 0."""
    kind, number = re.fullmatch(r"(\D+)(\d*)", source).groups()  # type: ignore[union-attr]
    return kind, int(number or 0)
