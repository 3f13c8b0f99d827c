"""The encoder/decoder that nnU-Net planned, and what stage level and block level add in the same way."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

from dynamic_network_architectures.architectures.abstract_arch import AbstractDynamicNetworkArchitectures
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from dynamic_network_architectures.building_blocks.plain_conv_encoder import PlainConvEncoder
from dynamic_network_architectures.building_blocks.residual import StackedResidualBlocks
from dynamic_network_architectures.building_blocks.residual_encoders import ResidualEncoder
from dynamic_network_architectures.building_blocks.unet_decoder import UNetDecoder
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

from nnunet_xattnres.common.errors import XAttnResError
from nnunet_xattnres.model.collecting import Receiver, collected, left_out, left_out_now
from nnunet_xattnres.model.config import Config


class PlannedUNet(AbstractDynamicNetworkArchitectures):
    """Base class of our networks. It takes over the encoder and the decoder of a planned network.

    planned: the network that nnU-Net planned, initialised. `encoder.*` and `decoder.*` keep nnU-Net's names in the
        state dict. What a subclass adds is under `xattnres.*`.

    config: what is added, set by the subclass. planned_parameters: the number of parameters of `planned`.

    forward: image (B, channels, *size) -> logits (B, classes, *size), or with `decoder.deep_supervision` a list of
        logits, the highest resolution first. Every axis must be divisible by the product of its strides.

    Raises `XAttnResError` if `planned` is not an encoder/decoder U-Net, and in forward for an indivisible image size.
    """

    config: Config
    encoder: PlainConvEncoder | ResidualEncoder
    decoder: UNetDecoder

    def __init__(self, planned: PlainConvUNet | ResidualEncoderUNet) -> None:
        super().__init__()
        check_class(type(planned), "give it a PlainConvUNet or ResidualEncoderUNet")
        self.planned_parameters = sum(parameter.numel() for parameter in planned.parameters())
        self.encoder = planned.encoder
        self.decoder = planned.decoder
        self.key_to_encoder = planned.key_to_encoder
        self.key_to_stem = planned.key_to_stem
        self.keys_to_in_proj = planned.keys_to_in_proj
        self.initialize: Callable[[nn.Module], None] = planned.initialize
        self.strides = [prod(per_axis) for per_axis in zip(*self.encoder.strides, strict=True)]
        self.encoder_channels = list(self.encoder.output_channels)
        self.decoder_channels = self.encoder_channels[-2::-1]
        self.xattnres = nn.ModuleDict()

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        self._check_divisible(image.shape[2:])
        stem = getattr(self.encoder, "stem", None)
        features = self.decoder_features(image if stem is None else stem(image))
        if not self.decoder.deep_supervision:
            return self.decoder.seg_layers[-1](features[-1])
        return [head(x) for head, x in zip(self.decoder.seg_layers, features, strict=True)][::-1]

    def decoder_features(self, x: Tensor) -> list[Tensor]:
        """The input of the first encoder stage -> the outputs of all decoder stages, the coarsest first."""
        raise NotImplementedError

    @property
    def routing_sources(self) -> dict[str, list[str]]:
        """The sources of every target by name, in the order of the attention weights."""
        raise NotImplementedError

    @contextmanager
    def routing(
        self, targets: Collection[str] | None = None, receive: Receiver | None = None
    ) -> Iterator[dict[str, list[Tensor]]]:
        """Collect the attention weights of every call of the network inside the `with` block.

            with network.routing() as weights:
                network(image)
            weights["D0"]  # a tensor per call, (K, B, *size), which sums to one over its K sources
            network.routing_sources["D0"]  # the names of the sources: E0, E1, ..., current

        B is the batch size, and `size` that of the target's input. The weights are computed beside the network's own
        output, without gradients, in float32 or float64. A compiled network works too, but is compiled again: call the
        uncompiled network.

        targets: names of the targets, by default all.
        receive: a function that is called with the target and the weights of every call. Then nothing is kept.

        Raises `XAttnResError` for a target that the network does not have, and for a name that is not in a list.
        """
        if isinstance(targets, str):
            raise XAttnResError(f"targets must be a list of names: routing([{targets!r}])")
        known = self.routing_sources
        for target in targets or ():
            _check_target(target, known)
        weights: dict[str, list[Tensor]] = {target: [] for target in (known if targets is None else targets)}
        with collected({target: self.xattnres[target] for target in weights}, receive or _keep_in(weights)):
            yield weights

    @contextmanager
    def without(self, target: str, source: str) -> Iterator[None]:
        """Leave a source out of a target inside the `with` block, as if its score were minus infinity.

            with network.without("D2", "E0"):
                network(image)

        The weights of the other sources sum to one. With residual fusion, a target whose only source is left out puts
        out its input. Several of these contexts leave several sources out. A block's newest output is among its sources
        twice, by its number and as `current`: the other one stays.

        Raises `XAttnResError` for a target or a source that the network does not have, and if nothing would be left to
        read.
        """
        known = self.routing_sources
        _check_target(target, known)
        if source not in known[target]:
            raise XAttnResError(f"{target} has no source {source}: choose from {', '.join(known[target])}")
        attention, index = self.xattnres[target], known[target].index(source)
        adds_to_input = getattr(attention, "gamma", None) is not None
        if not adds_to_input and len(left_out_now(attention) | {index}) == len(known[target]):
            raise XAttnResError(f"without {source} nothing is left that {target} can read: leave out fewer sources")
        with left_out(attention, index):
            yield

    def compute_conv_feature_map_size(self, input_size: Sequence[int]) -> int:
        """The number of elements that all convolutions put out for one image of `input_size`, as nnU-Net counts it.

        The convolutions of the planned network and the added 1x1 convolutions are counted.
        """
        voxels = []  # of every encoder stage's output
        size = list(input_size)
        for strides in self.encoder.strides:
            size = [extent // stride for extent, stride in zip(size, strides, strict=True)]
            voxels.append(prod(size))
        planned = self.encoder.compute_conv_feature_map_size(input_size)
        planned += self.decoder.compute_conv_feature_map_size(input_size)
        return int(planned) + self._projected_elements(voxels)

    def _projected_elements(self, voxels: list[int]) -> int:
        """The number of elements that the added 1x1 convolutions put out. voxels: of every encoder stage's output."""
        raise NotImplementedError

    def _check_divisible(self, size: Sequence[int]) -> None:
        if any(extent % stride for extent, stride in zip(size, self.strides, strict=True)):
            raise XAttnResError(
                f"an image of size {tuple(size)} does not fit this network: every axis must be divisible by the "
                f"product of its strides, {tuple(self.strides)}; pad or crop the image"
            )


def uncompiled(network: nn.Module) -> nn.Module:
    """The network inside the wrappers of torch.compile and distributed training."""
    if isinstance(network, DistributedDataParallel):
        network = network.module
    return network._orig_mod if isinstance(network, OptimizedModule) else network


def check_class(network_class: type, remedy: str, origin: str = "") -> None:
    """Raise `XAttnResError` unless nnU-Net's planners write this class.

    origin: where the network comes from, a clause for the message.
    """
    # Subclasses are refused too, because their own forward would be lost.
    if network_class not in (PlainConvUNet, ResidualEncoderUNet):
        raise XAttnResError(f"XAttnRes cannot read in a {network_class.__name__}{origin}: {remedy}")


def _check_target(target: str, known: Collection[str]) -> None:
    if target not in known:
        raise XAttnResError(f"the network has no target {target}: choose from {', '.join(known) or 'none'}")


def _keep_in(weights: dict[str, list[Tensor]]) -> Receiver:
    return lambda target, of_call: weights[target].append(of_call)


def blocks_of(stage: nn.Module) -> Any:
    """The blocks of a planned stage: residual blocks, or convolutions with norm and nonlinearity."""
    stacked = stage[-1] if isinstance(stage, nn.Sequential) else stage
    return stacked.blocks if isinstance(stacked, StackedResidualBlocks) else stacked.convs
