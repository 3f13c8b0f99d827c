"""Block-level XAttnRes, after the authors' later reference code: ISAR with SAPQ inside a stage, DKVMR for its skip.

A block is what a planned stage repeats: a convolution with norm and nonlinearity (PlainConvUNet, and every decoder) or
a residual block (the encoder of ResidualEncoderUNet). ISAR and DKVMR are the attention of `ops`, with a query at every
position.
"""

from collections.abc import Sequence
from math import sqrt

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import Tensor, nn

from nnunet_xattnres.model.config import BlockXAttnResConfig
from nnunet_xattnres.model.planned_unet import PlannedUNet, blocks_of
from nnunet_xattnres.ops.alignment import project, resize
from nnunet_xattnres.ops.backends import attention_backend
from nnunet_xattnres.ops.reference import Candidate

EPS = 1e-8


class IntraStageAttention(nn.Module):
    """ISAR with its spatial adaptive pseudo-query (SAPQ): the new input of block i, read from the bank of its stage.

        query    W(p) = Conv1x1( b_(i-1) )(p)
        scores   e_k(p) = < W(p) , RMSNorm(v_k)(p) > / ( sqrt(C) * temperature )
        weights  a_k(p) = softmax over k of e_k(p)
        output   out(p) = sum_k a_k(p) v_k(p)

    The v_k are the bank and once more the current feature b_(i-1). The bank is b_1 .. b_(i-1), the outputs of the
    earlier blocks. Where configured, the input of the stage comes before them. The convolution is zero at
    initialisation, so all weights are equal.

    channels: C.
    """

    temperature: Tensor

    def __init__(self, channels: int, config: BlockXAttnResConfig) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(channels, channels))
        self.norm_scale = nn.Parameter(torch.ones(channels))
        # A buffer, so that it is saved with the weights. For prediction, nnU-Net builds the network from the trainer
        # class alone. A later change of the temperature in the class must not change what a trained network predicts.
        self.register_buffer("temperature", torch.tensor(float(config.temperature)))
        self.attend = attention_backend(config.backend)

    def forward(self, bank: Sequence[Tensor]) -> Tensor:
        """bank of (B, C, *size), the current feature last -> (B, C, *size)"""
        current = bank[-1]
        query = _query_field(current, self.query, self.norm_scale, sqrt(len(self.query)) * self.temperature)
        candidates = [Candidate(entry, None) for entry in [*bank, current]]
        return self.attend(query, None, candidates, tuple(current.shape[2:]), eps=EPS)

    def compute_conv_feature_map_size(self, voxels: int) -> int:
        """The number of elements that the 1x1 convolution puts out for one image of so many voxels."""
        return voxels * len(self.query)


class InputProjection(nn.Module):
    """The 1x1 projection of a stage's input that opens the bank, where its channels differ from those of the blocks."""

    def __init__(self, channels: int, input_channels: int) -> None:
        super().__init__()
        self.projection = nn.Parameter(torch.empty(channels, input_channels))
        nn.init.kaiming_normal_(self.projection, nonlinearity="linear")

    def forward(self, stage_input: Tensor) -> Tensor:
        """(B, C_in, *size) -> (B, C, *size)"""
        return project(stage_input, self.projection)

    def compute_conv_feature_map_size(self, voxels: int) -> int:
        """The number of elements that the 1x1 convolution puts out for one image of so many voxels."""
        return voxels * len(self.projection)


class MemoryRouting(nn.Module):
    """DKVMR, decoupled key-value memory routing. It replaces a skip connection.

        memory   [ K_j | V_j ] = Conv1x1( m_j )     m_1 .. m_n: the outputs of the blocks of the encoder stage
        query    Q = Conv1x1( x )                   x: the upsampled decoder feature
        weights  a_j(p) = softmax over j of < Q(p) , RMSNorm(K_j)(p) > / sqrt(d)
        output   out(p) = sum_j a_j(p) V_j(p)

    Keys have d = max(8, int(kv_ratio * C)) channels. A memory of one entry leaves no choice, so it has V only.

    channels: C, of the memory and of x. num_entries: n.
    """

    def __init__(self, channels: int, num_entries: int, config: BlockXAttnResConfig) -> None:
        super().__init__()
        self.num_entries = num_entries
        self.key_channels = max(8, int(config.kv_ratio * channels)) if num_entries > 1 else 0
        self.key_value = nn.Parameter(torch.empty(self.key_channels + channels, channels))
        nn.init.kaiming_normal_(self.key_value, nonlinearity="linear")
        if self.key_channels:
            self.query = nn.Parameter(torch.empty(self.key_channels, channels))
            self.norm_scale = nn.Parameter(torch.ones(self.key_channels))
            nn.init.kaiming_normal_(self.query, nonlinearity="linear")
        self.attend = attention_backend(config.backend)

    def forward(self, x: Tensor, memory: Sequence[Tensor]) -> Tensor:
        """x (B, C, *size), memory of (B, C, *size) -> (B, C, *size)"""
        if not self.key_channels:
            return project(memory[0], self.key_value)
        query = _query_field(x, self.query, self.norm_scale, sqrt(self.key_channels))
        entries = [Candidate(entry, self.key_value) for entry in memory]
        return self.attend(query, None, entries, tuple(x.shape[2:]), self.key_channels, EPS)

    def compute_conv_feature_map_size(self, voxels: int) -> int:
        """The number of elements that the 1x1 convolutions put out for one image of so many voxels."""
        return voxels * (self.num_entries * len(self.key_value) + self.key_channels)


def _query_field(x: Tensor, query: Tensor, norm_scale: Tensor, divisor: float | Tensor) -> Tensor:
    """Conv1x1(x) * g / divisor. The factors go into the weight: the backward pass then keeps one field only."""
    return project(x, query * norm_scale[:, None] / divisor)


class BlockXAttnResUNet(PlannedUNet):
    """A planned U-Net with block-level XAttnRes: ISAR between the blocks of a stage, DKVMR in place of its skip.

    A part that could not change anything is not created. The keys of `xattnres` name the parts: `D0_memory` is DKVMR in
    place of a skip connection, `E1_block3` is ISAR before the third block of a stage, and `E1_input` is the projection
    of the stage's input that opens the bank. Stages count from 0, as in nnU-Net, and blocks from 1, as in the formulas.
    """

    def __init__(self, planned: PlainConvUNet | ResidualEncoderUNet, config: BlockXAttnResConfig) -> None:
        super().__init__(planned)
        self.config: BlockXAttnResConfig = config
        if config.isar_in_encoder:
            for i, stage in enumerate(self.encoder.stages):
                self._add_intra_stage_attention(f"E{i}", stage, self.encoder_channels[i])
        for d, channels in enumerate(self.decoder_channels):
            num_entries = len(blocks_of(self.encoder.stages[-2 - d]))
            self.xattnres[f"D{d}_memory"] = MemoryRouting(channels, num_entries, config)
            if config.isar_in_decoder:
                self._add_intra_stage_attention(f"D{d}", self.decoder.stages[d], channels)

    @property
    def routing_sources(self) -> dict[str, list[str]]:
        """The sources of every target by name. Blocks of a memory are those of the encoder stage at its resolution."""
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

    def _projected_elements(self, voxels: list[int]) -> int:
        total = 0
        for name, part in self.xattnres.items():
            assert isinstance(part, IntraStageAttention | InputProjection | MemoryRouting)
            index = int(name.split("_")[0][1:])
            total += part.compute_conv_feature_map_size(voxels[index if name.startswith("E") else -2 - index])
        return total

    def _add_intra_stage_attention(self, name: str, stage: nn.Module, channels: int) -> None:
        """ISAR before every block whose bank then holds at least two different entries."""
        blocks = blocks_of(stage)
        reads_input = self.config.bank_includes_input and len(blocks) > 1
        if reads_input and blocks[0].input_channels != channels:
            self.xattnres[f"{name}_input"] = InputProjection(channels, blocks[0].input_channels)
        for i in range(2 if reads_input else 3, len(blocks) + 1):
            self.xattnres[f"{name}_block{i}"] = IntraStageAttention(channels, self.config)

    def _opens_bank_with_input(self, name: str) -> bool:
        # The second block has something to choose from only if the input opens the bank.
        return f"{name}_block2" in self.xattnres

    def _run_blocks(self, name: str, stage: nn.Module, x: Tensor) -> list[Tensor]:
        """The outputs b_1, b_2, ... of a stage's blocks."""
        first, *others = blocks_of(stage)
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
