"""Stage-level XAttnRes (arXiv 2604.03297): every stage reads from the outputs of all earlier stages."""

from collections.abc import Sequence

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from dynamic_network_architectures.building_blocks.simple_conv_blocks import StackedConvBlocks
from torch import Tensor, nn

from nnunet_xattnres.model.config import XAttnResConfig
from nnunet_xattnres.model.planned_unet import PlannedUNet
from nnunet_xattnres.ops.alignment import is_finer, resize
from nnunet_xattnres.ops.backends import attention_backend
from nnunet_xattnres.ops.reference import Candidate, Upsampled, upsample

# An average over so many voxels or fewer is not kept for the backward pass, but computed once more. This reaches two
# stages in 2D and one in 3D. Averages over more voxels are small, and computing them again takes as long.
LARGEST_AVERAGED = 16


class HistoryPool:
    """The global feature history pool H = [h_0, h_1, ...]: the outputs of the stages so far, in order of computation.

    The pool does the part of Resize that averages: a stage gets no output that is finer than its input. The average of
    averages is the average, so every output is averaged from one resolution to the next, once for all stages.
    """

    def __init__(self) -> None:
        self._averages: list[list[Tensor]] = []  # of every output h_k: h_k itself, then its averages, finest first

    def append(self, h: Tensor) -> None:
        self._averages.append([h])

    @property
    def outputs(self) -> list[Tensor]:
        return [averages[0] for averages in self._averages]

    def at(self, size: Sequence[int], count: int) -> list[Tensor]:
        """The first `count` outputs, (B, C_k, *size_k), those that are finer than `size` averaged to it.

        size: that of an output in the pool.
        """
        # The steps from the finest resolution to `size`.
        resolutions = [h.shape[2:] for h in self.outputs if not is_finer(size, h.shape[2:])]
        for averages in self._averages[:count]:
            for resolution in resolutions:
                if is_finer(averages[-1].shape[2:], resolution):
                    averages.append(resize(averages[-1], resolution))
        return [next(h for h in averages if not is_finer(h.shape[2:], size)) for averages in self._averages[:count]]


class HistoryAttention(nn.Module):
    """The attention before stage t: the stage's input x and the history pool h_0, h_1, ... become its new input.

        replace    out = sum_k a_k v_k              k over the pool and x, which is one more candidate, unprojected
        residual   out = x + gamma * sum_k a_k v_k  k over the pool alone

    v_k = Proj_{k,t}( Resize( h_k ) ), and the a_k are those of `ops.reference`, with the query w_t and the scale g_t.

    At initialisation w_t = 0, so that all weights are equal, g_t = 1, gamma = 0, and the projections preserve the
    variance. Projections are parameters and not convolutions, because nnU-Net's `initialize` would draw convolutions
    again.

    channels: C_t, the channels of x. source_channels: C_k of every source in the pool, in the order of computation.
    """

    def __init__(self, channels: int, source_channels: Sequence[int], config: XAttnResConfig) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(channels))  # w_t
        self.norm_scale = nn.Parameter(torch.ones(channels))  # g_t
        self.projections = nn.ParameterList(torch.empty(channels, source) for source in source_channels)  # Proj_{k,t}
        self.gamma = nn.Parameter(torch.zeros(channels)) if config.fusion == "residual" else None
        self.attend = attention_backend(config.backend)
        for projection in self.projections:
            nn.init.kaiming_normal_(projection, nonlinearity="linear")

    def forward(
        self, x: Tensor | Upsampled, pool: Sequence[Tensor], averaged_from: Sequence[Tensor | None] | None = None
    ) -> Tensor:
        """x (B, C_t, *size), computed or described; pool of (B, C_k, *size_k), nowhere finer -> (B, C_t, *size)

        averaged_from: `Candidate.averaged_from` of every output in the pool. None: of none.
        """
        given = zip(pool, self.projections, averaged_from or [None] * len(pool), strict=True)
        sources = [Candidate(*each) for each in given]
        if self.gamma is None:
            current = x if isinstance(x, Upsampled) else Candidate(x, None)
            return self.attend(self.query, self.norm_scale, [*sources, current], _size(x))
        mixture = self.attend(self.query, self.norm_scale, sources, _size(x))
        # In the precision of the mixture. Otherwise autocast would compute the sum, and what follows, in float32.
        gate = self.gamma.to(mixture.dtype).view(-1, *(1,) * (mixture.ndim - 2))
        return _computed(x) + gate * mixture


def _size(x: Tensor | Upsampled) -> tuple[int, ...]:
    return x.size if isinstance(x, Upsampled) else tuple(x.shape[2:])


def _computed(x: Tensor | Upsampled) -> Tensor:
    return upsample(x) if isinstance(x, Upsampled) else x


class XAttnResUNet(PlannedUNet):
    """A planned U-Net whose stages read from the global feature history pool.

    Encoder stage i reads with x = h_(i-1) from h_0 .. h_(i-2), so stages 0 and 1 have nothing to read. A decoder stage
    reads with x = the output of its transposed convolution from all that is computed before it.

    Without skip connections, the first convolution of a decoder stage is replaced by one of half the input channels.
    """

    def __init__(self, planned: PlainConvUNet | ResidualEncoderUNet, config: XAttnResConfig) -> None:
        super().__init__(planned)
        self.config: XAttnResConfig = config
        # The keys are the stages that read: E2, E3, ... and D0, D1, ...
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
            upsampling = self.decoder.transpconvs[d]
            x = self._read(f"D{d}", Upsampled(x, upsampling.weight, upsampling.bias), pool)
            if self.config.skip_connections:
                x = torch.cat((x, skips[d]), dim=1)
            x = stage(x)
            pool.append(x)
        return pool.outputs[len(self.encoder.stages) :]

    def _projected_elements(self, voxels: list[int]) -> int:
        # A projection runs at the coarser of its two resolutions.
        total = 0
        pool = voxels + voxels[-2::-1]
        for stage, attention in self.xattnres.items():
            assert isinstance(attention, HistoryAttention)
            target = voxels[int(stage[1:]) - 1] if stage.startswith("E") else voxels[-2 - int(stage[1:])]
            sources = pool[: len(attention.projections)]
            total += len(attention.query) * sum(min(source, target) for source in sources)
        return total

    def _read(self, stage: str, x: Tensor | Upsampled, pool: HistoryPool) -> Tensor:
        """The input of a stage: the mixture if the stage reads, else x."""
        if stage not in self.xattnres:
            return _computed(x)
        attention = self.xattnres[stage]
        assert isinstance(attention, HistoryAttention)
        # An encoder stage does not read the newest output, which is x itself.
        count = len(attention.projections)
        features = pool.at(_size(x), count)
        # Every output is kept for the backward pass: by the stage that follows and, also in a frozen encoder, by the
        # attention of the decoder stage of the same resolution.
        averaged_from = [
            _averaged_from(source, h, is_kept=h.requires_grad or self.config.read_in_decoder)
            for source, h in zip(features, pool.outputs, strict=False)
        ]
        return attention(x, features, averaged_from)


def _averaged_from(features: Tensor, h: Tensor, is_kept: bool) -> Tensor | None:
    """The output h that `features` are averaged from, if averaging it once more is worth the memory of its average.

    is_kept: whether h is kept for the backward pass anyway.
    """
    return h if is_kept and features.numel() < h.numel() <= LARGEST_AVERAGED * features.numel() else None


def _drop_skip_channels(stage: StackedConvBlocks) -> nn.Module:
    """Replace the first convolution of a decoder stage by one without the channels of the skip connection."""
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
    # The block registers its convolution twice, and runs `all_modules`.
    block.all_modules[0] = block.conv
    block.input_channels = block.conv.in_channels
    return block.conv
