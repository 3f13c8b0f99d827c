"""The encoder/decoder that nnU-Net planned, with XAttnRes at stage level or at block level."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from pydoc import locate
from typing import Any

import torch
from dynamic_network_architectures.architectures.abstract_arch import AbstractDynamicNetworkArchitectures
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from dynamic_network_architectures.building_blocks.plain_conv_encoder import PlainConvEncoder
from dynamic_network_architectures.building_blocks.residual import StackedResidualBlocks
from dynamic_network_architectures.building_blocks.residual_encoders import ResidualEncoder
from dynamic_network_architectures.building_blocks.simple_conv_blocks import StackedConvBlocks
from dynamic_network_architectures.building_blocks.unet_decoder import UNetDecoder
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

from nnunet_xattnres.alignment import is_finer, resize
from nnunet_xattnres.attention import Candidate
from nnunet_xattnres.backends import attention_backend
from nnunet_xattnres.block_level import InputProjection, IntraStageAttention, MemoryRouting
from nnunet_xattnres.config import BlockXAttnResConfig, Config, XAttnResConfig
from nnunet_xattnres.errors import XAttnResError
from nnunet_xattnres.routing.collecting import Receiver, collected


class HistoryPool:
    """The global feature history pool H = [h_0, h_1, ...]: the outputs of the stages so far, in order of computation.

    Many stages read a fine output at a coarse resolution. Area averages compose, so every output is averaged from one
    resolution to the next, as far as somebody reads it, once for all who do.
    """

    def __init__(self) -> None:
        self._averages: list[list[Tensor]] = []  # of every output: itself, and ever coarser averages

    def append(self, h: Tensor) -> None:
        self._averages.append([h])

    @property
    def outputs(self) -> list[Tensor]:
        return [averages[0] for averages in self._averages]

    def at(self, size: Sequence[int], count: int) -> list[Tensor]:
        """The first `count` outputs, (B, C_k, *size_k), averaged down to `size`, that of an output, where finer."""
        resolutions = [h.shape[2:] for h in self.outputs]
        for averages in self._averages[:count]:
            for resolution in resolutions:
                if is_finer(averages[-1].shape[2:], resolution) and not is_finer(size, resolution):
                    averages.append(resize(averages[-1], resolution))
        return [next(h for h in averages if not is_finer(h.shape[2:], size)) for averages in self._averages[:count]]


class HistoryAttention(nn.Module):
    """What one stage reads: its input x and the history pool h_0, h_1, ... become the stage's new input.

    replace:   out = sum_k a_k v_k, k over the pool and x
    residual:  out = x + gamma * sum_k a_k v_k, k over the pool alone

    channels: C_t, those of x. source_channels: C_k of every source in the pool, in order of computation.
    At initialisation w = 0 (all weights equal), g = 1, gamma = 0, and the projections preserve variance. They are
    plain parameters rather than convolutions, which nnU-Net's `initialize` would draw anew.
    """

    def __init__(self, channels: int, source_channels: Sequence[int], config: XAttnResConfig) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(channels))  # w_t
        self.norm_scale = nn.Parameter(torch.ones(channels))  # g_t
        self.projections = nn.ParameterList(torch.empty(channels, source) for source in source_channels)
        self.gamma = nn.Parameter(torch.zeros(channels)) if config.fusion == "residual" else None
        self.attend = attention_backend(config.backend)
        for projection in self.projections:
            nn.init.kaiming_normal_(projection, nonlinearity="linear")

    def forward(self, x: Tensor, pool: Sequence[Tensor]) -> Tensor:
        """x (B, C_t, *size), pool of (B, C_k, *size_k) -> (B, C_t, *size)"""
        sources = [Candidate(h, projection) for h, projection in zip(pool, self.projections, strict=True)]
        size = tuple(x.shape[2:])
        if self.gamma is None:
            return self.attend(self.query, self.norm_scale, [*sources, Candidate(x, None)], size)
        mixture = self.attend(self.query, self.norm_scale, sources, size)
        return x + self.gamma.view(-1, *(1,) * len(size)) * mixture


class PlannedUNet(AbstractDynamicNetworkArchitectures):
    """An encoder/decoder that nnU-Net planned, taken over: what stage and block level have in common.

    planned: the network that nnU-Net planned, initialised. `encoder.*` and `decoder.*` keep nnU-Net's state-dict names,
    what a subclass adds lives under `xattnres.*`.

    forward: image (B, channels, *size), every axis divisible by the product of its strides, -> logits
    (B, classes, *size), or with `decoder.deep_supervision` a list of them, the highest resolution first.

    Raises `XAttnResError` if `planned` is not an encoder/decoder U-Net, and in forward for an indivisible image size.
    """

    encoder: PlainConvEncoder | ResidualEncoder
    decoder: UNetDecoder

    def __init__(self, planned: PlainConvUNet | ResidualEncoderUNet) -> None:
        super().__init__()
        _check_class(type(planned))
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
        """What the first encoder stage sees -> the outputs of all decoder stages, the coarsest first."""
        raise NotImplementedError

    @property
    def routing_sources(self) -> dict[str, list[str]]:
        """What every target chooses from, by name: its sources, in the order of its weights."""
        raise NotImplementedError

    @contextmanager
    def routing(
        self, targets: Collection[str] | None = None, receive: Receiver | None = None
    ) -> Iterator[dict[str, list[Tensor]]]:
        """Collect the attention weights of the calls inside.

            with network.routing() as weights:
                network(image)
            weights["D0"]  # a tensor per call, (K, B, *size), that sums to one over its K sources
            network.routing_sources["D0"]  # their names: E0, E1, ..., current

        B is the batch size and size that of the target's input. The weights are computed without gradients, in float32
        or better, beside the call itself, which computes what it always does. What torch.compile has made of the
        network gives its weights too, but is compiled anew for it: better call the network itself.

        targets: to collect from; default: all.
        receive: is given target and weights of every call, in place of keeping them.

        Raises `XAttnResError` for a target that the network does not have, and for a single name without a list.
        """
        if isinstance(targets, str):
            raise XAttnResError(f"targets are a list, also of one name: routing([{targets!r}])")
        known = self.routing_sources
        for target in targets or ():
            if target not in known:
                raise XAttnResError(f"the network has no target {target}: choose from {', '.join(known) or 'none'}")
        weights: dict[str, list[Tensor]] = {target: [] for target in (known if targets is None else targets)}
        with collected({target: self.xattnres[target] for target in weights}, receive or _keep_in(weights)):
            yield weights

    def compute_conv_feature_map_size(self, input_size: Sequence[int]) -> int:
        """How many numbers all convolutions put out for one image of `input_size`, as nnU-Net's networks count it.

        Counts the planned network's convolutions and the 1x1 convolutions that are added.
        """
        positions = []  # of every encoder stage's output
        size = list(input_size)
        for strides in self.encoder.strides:
            size = [extent // stride for extent, stride in zip(size, strides, strict=True)]
            positions.append(prod(size))
        planned = self.encoder.compute_conv_feature_map_size(input_size)
        planned += self.decoder.compute_conv_feature_map_size(input_size)
        return int(planned) + self._projected_numbers(positions)

    def _projected_numbers(self, positions: list[int]) -> int:
        """How many numbers the added 1x1 convolutions put out, from the positions at every encoder stage."""
        raise NotImplementedError

    def _check_divisible(self, size: Sequence[int]) -> None:
        if any(extent % stride for extent, stride in zip(size, self.strides, strict=True)):
            raise XAttnResError(
                f"an image of size {tuple(size)} does not fit this network: every axis must be divisible by the "
                f"product of its strides, {tuple(self.strides)}; pad or crop the image"
            )


class XAttnResUNet(PlannedUNet):
    """A planned U-Net whose stages read from the global feature history pool (XAttnRes, arXiv 2604.03297).

    Without skip connections the first convolution of every decoder stage is replaced by one of half the input channels.
    """

    def __init__(self, planned: PlainConvUNet | ResidualEncoderUNet, config: XAttnResConfig) -> None:
        super().__init__(planned)
        self.config = config
        # By the stage that reads: E0, E1, ... and D0, D1, ...
        if config.read_in_encoder:
            for i in range(2, len(self.encoder_channels)):
                pool = self.encoder_channels[: i - 1]
                self.xattnres[f"E{i}"] = HistoryAttention(self.encoder_channels[i - 1], pool, config)
        if config.read_in_decoder:
            for d, channels in enumerate(self.decoder_channels):
                pool = self.encoder_channels + self.decoder_channels[:d]
                self.xattnres[f"D{d}"] = HistoryAttention(channels, pool, config)

        if not config.skip_connections:
            for stage in self.decoder.stages:
                _drop_skip_channels(stage).apply(self.initialize)

    @property
    def routing_sources(self) -> dict[str, list[str]]:
        pool = [f"E{i}" for i in range(len(self.encoder_channels))] + [
            f"D{d}" for d in range(len(self.decoder_channels))
        ]
        sources = {}
        for target, attention in self.xattnres.items():
            assert isinstance(attention, HistoryAttention)
            sources[target] = pool[: len(attention.projections)] + ["current"] * (attention.gamma is None)
        return sources

    def decoder_features(self, x: Tensor) -> list[Tensor]:
        pool = HistoryPool()
        for i, stage in enumerate(self.encoder.stages):
            x = stage(self._read(f"E{i}", x, pool))
            pool.append(x)
        skips = pool.outputs[-2::-1]
        for d, stage in enumerate(self.decoder.stages):
            x = self.decoder.transpconvs[d](x)
            x = self._read(f"D{d}", x, pool)
            if self.config.skip_connections:
                x = torch.cat((x, skips[d]), dim=1)
            x = stage(x)
            pool.append(x)
        return pool.outputs[len(self.encoder.stages) :]

    def _projected_numbers(self, positions: list[int]) -> int:
        # Every projection runs at the coarser of its two resolutions.
        total = 0
        pool = positions + positions[-2::-1]
        for stage, attention in self.xattnres.items():
            assert isinstance(attention, HistoryAttention)
            target = positions[int(stage[1:]) - 1] if stage.startswith("E") else positions[-2 - int(stage[1:])]
            sources = pool[: len(attention.projections)]
            total += len(attention.query) * sum(min(source, target) for source in sources)
        return total

    def _read(self, stage: str, x: Tensor, pool: HistoryPool) -> Tensor:
        """The input of a stage: what it reads from the pool if it reads, else x."""
        if stage not in self.xattnres:
            return x
        attention = self.xattnres[stage]
        assert isinstance(attention, HistoryAttention)
        # An encoder stage leaves out the newest output: it is x itself.
        return attention(x, pool.at(x.shape[2:], len(attention.projections)))


class BlockXAttnResUNet(PlannedUNet):
    """A planned U-Net with block-level XAttnRes: ISAR between the blocks of a stage, DKVMR in place of its skip.

    Where a part could not change anything there is none: the keys of `xattnres` say what there is, counting stages from
    0, as nnU-Net does, and blocks from 1, as the formulas do. `D0_memory` is DKVMR in place of a skip connection,
    `E1_block3` ISAR before a stage's third block, `E1_input` the projection of the stage's input that opens the bank.
    """

    def __init__(self, planned: PlainConvUNet | ResidualEncoderUNet, config: BlockXAttnResConfig) -> None:
        super().__init__(planned)
        self.config = config
        if config.isar_in_encoder:
            for i, stage in enumerate(self.encoder.stages):
                self._add_intra_stage_attention(f"E{i}", stage, self.encoder_channels[i])
        for d, channels in enumerate(self.decoder_channels):
            num_entries = len(_blocks(self.encoder.stages[-2 - d]))
            self.xattnres[f"D{d}_memory"] = MemoryRouting(channels, num_entries, config)
            if config.isar_in_decoder:
                self._add_intra_stage_attention(f"D{d}", self.decoder.stages[d], channels)

    @property
    def routing_sources(self) -> dict[str, list[str]]:
        """Blocks count from 1 in their stage, those of a memory in the encoder stage that it stands for."""
        sources = {}
        for target, part in self.xattnres.items():
            if isinstance(part, IntraStageAttention):
                stage, _, number = target.partition("_block")
                earlier = [f"block{i}" for i in range(1, int(number))]
                sources[target] = ["input"] * self._opens_bank_with_input(stage) + [*earlier, "current"]
            elif isinstance(part, MemoryRouting) and part.num_entries > 1:
                sources[target] = [f"block{i}" for i in range(1, part.num_entries + 1)]
        return sources

    def decoder_features(self, x: Tensor) -> list[Tensor]:
        memories = []  # by encoder stage, the outputs of its blocks
        for i, stage in enumerate(self.encoder.stages):
            memories.append(self._run_blocks(f"E{i}", stage, x))
            x = memories[-1][-1]
        features = []
        for d, stage in enumerate(self.decoder.stages):
            x = self.decoder.transpconvs[d](x)
            skip = self.xattnres[f"D{d}_memory"](x, memories[-2 - d])
            x = self._run_blocks(f"D{d}", stage, torch.cat((x, skip), dim=1))[-1]
            features.append(x)
        return features

    def _projected_numbers(self, positions: list[int]) -> int:
        total = 0
        for name, part in self.xattnres.items():
            assert isinstance(part, IntraStageAttention | InputProjection | MemoryRouting)
            index = int(name.split("_")[0][1:])
            total += part.compute_conv_feature_map_size(positions[index if name.startswith("E") else -2 - index])
        return total

    def _add_intra_stage_attention(self, name: str, stage: nn.Module, channels: int) -> None:
        """ISAR before every block whose bank then holds at least two different entries."""
        blocks = _blocks(stage)
        reads_input = self.config.bank_includes_input and len(blocks) > 1
        if reads_input and blocks[0].input_channels != channels:
            self.xattnres[f"{name}_input"] = InputProjection(channels, blocks[0].input_channels)
        for i in range(2 if reads_input else 3, len(blocks) + 1):
            self.xattnres[f"{name}_block{i}"] = IntraStageAttention(channels, self.config)

    def _opens_bank_with_input(self, name: str) -> bool:
        # Only then is there something to choose before the second block.
        return f"{name}_block2" in self.xattnres

    def _run_blocks(self, name: str, stage: nn.Module, x: Tensor) -> list[Tensor]:
        """The outputs b_1, b_2, ... of a stage's blocks."""
        first, *others = _blocks(stage)
        outputs = [first(x)]
        opening = []
        if self._opens_bank_with_input(name):
            projection = f"{name}_input"
            x = resize(x, outputs[0].shape[2:])
            opening.append(self.xattnres[projection](x) if projection in self.xattnres else x)
        for i, block in enumerate(others, start=2):
            attention = f"{name}_block{i}"
            current = outputs[-1]
            if attention in self.xattnres:
                current = self.xattnres[attention]([*opening, *outputs])
            outputs.append(block(current))
        return outputs


def build_network_from_plans(
    configuration: ConfigurationManager,
    num_input_channels: int,
    num_output_channels: int,
    config: Config | None = None,
    deep_supervision: bool = True,
) -> nn.Module:
    """Build the network of a planned configuration, with XAttnRes.

    configuration: `PlansManager("nnUNetPlans.json").get_configuration("3d_fullres")`, from nnU-Net.
    config: the arrangement, by default `XAttnResConfig()`; where it changes nothing, the planned network is returned.

    Raises `XAttnResError` if the planned architecture is not an encoder/decoder U-Net.
    """
    check_architecture(configuration)
    planned = get_network_from_plans(
        configuration.network_arch_class_name,
        configuration.network_arch_init_kwargs,
        configuration.network_arch_init_kwargs_req_import,
        num_input_channels,
        num_output_channels,
        deep_supervision=deep_supervision,
    )
    return add_xattnres(planned, config or XAttnResConfig())


def add_xattnres(planned: PlainConvUNet | ResidualEncoderUNet, config: Config) -> nn.Module:
    """Let the planned network read as `config` says; where that is nowhere, it is returned."""
    if isinstance(config, BlockXAttnResConfig):
        return BlockXAttnResUNet(planned, config)
    return planned if config.is_planned_network else XAttnResUNet(planned, config)


def check_architecture(configuration: ConfigurationManager) -> None:
    """Raise `XAttnResError` if the planned architecture is not an encoder/decoder U-Net, before it is built."""
    network_class = locate(configuration.network_arch_class_name)
    if isinstance(network_class, type):  # nnU-Net itself deals with a class that has moved
        _check_class(network_class)


def uncompiled(network: nn.Module) -> nn.Module:
    """The network inside what torch.compile and distributed training wrap around it."""
    if isinstance(network, DistributedDataParallel):
        network = network.module
    return network._orig_mod if isinstance(network, OptimizedModule) else network


def _check_class(network_class: type) -> None:
    # Not their subclasses either, whose own forward would be lost.
    if network_class not in (PlainConvUNet, ResidualEncoderUNet):
        raise XAttnResError(
            f"XAttnRes cannot read in a {network_class.__name__}: choose plans whose architecture is a PlainConvUNet "
            "or ResidualEncoderUNet, such as nnUNetPlans or nnUNetResEncUNetMPlans"
        )


def _keep_in(weights: dict[str, list[Tensor]]) -> Receiver:
    return lambda target, of_call: weights[target].append(of_call)


def _blocks(stage: nn.Module) -> Any:
    """The blocks of a planned stage, in an nn.Sequential: residual blocks, or convolutions with what follows them."""
    stacked = stage[-1] if isinstance(stage, nn.Sequential) else stage
    return stacked.blocks if isinstance(stacked, StackedResidualBlocks) else stacked.convs


def _drop_skip_channels(stage: StackedConvBlocks) -> nn.Module:
    """Replace the first convolution of a decoder stage by one without the skip connection's input channels."""
    block = stage.convs[0]
    old = block.conv
    block.conv = type(old)(
        old.in_channels // 2,
        old.out_channels,
        old.kernel_size,
        old.stride,
        old.padding,
        bias=old.bias is not None,
        device=old.weight.device,
        dtype=old.weight.dtype,
    )
    # The block registers its convolution twice; `all_modules` is what it runs.
    block.all_modules[0] = block.conv
    block.input_channels = block.conv.in_channels
    return block.conv
