"""Attention weights of the calls of a network, collected beside what it computes."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_xattnres.attention import Attention, streaming_weights

# What takes in the weights of a call, (K, B, *size), which sum to one over the K sources of a target.
Receiver = Callable[[str, Tensor], None]

# In the order in which a picture shows sources of several targets.
KINDS_OF_SOURCES = ("input", "E", "D", "block", "current")


@contextmanager
def collected(attentions: Mapping[str, nn.Module], receive: Receiver) -> Iterator[None]:
    """Give the weights of every call of the attentions, which are named by target, to `receive`."""
    backends: dict[str, Attention] = {target: module.attend for target, module in attentions.items()}  # type: ignore
    for target, module in attentions.items():
        module.attend = _also_collecting(backends[target], target, receive)  # type: ignore
    try:
        yield
    finally:
        for target, module in attentions.items():
            module.attend = backends[target]  # type: ignore


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


def _also_collecting(attend: Attention, target: str, receive: Receiver) -> Attention:
    def attend_and_collect(*arguments: Any, **options: Any) -> Tensor:
        receive(target, streaming_weights(*arguments, **options))
        return attend(*arguments, **options)

    return attend_and_collect
