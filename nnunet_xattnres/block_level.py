"""Block-level XAttnRes, after the authors' later reference code: ISAR with SAPQ inside a stage, DKVMR for its skip.

A block is what a planned stage repeats: a convolution with norm and nonlinearity (PlainConvUNet, and every decoder) or
a residual block (the encoder of ResidualEncoderUNet). Both parts are the attention of `attention.py`, with a query at
every position.
"""

from collections.abc import Sequence
from math import sqrt

import torch
from torch import Tensor, nn

from nnunet_xattnres.alignment import project
from nnunet_xattnres.attention import Candidate
from nnunet_xattnres.backends import attention_backend
from nnunet_xattnres.config import BlockXAttnResConfig

EPS = 1e-8


class IntraStageAttention(nn.Module):
    """ISAR with its spatial adaptive pseudo-query (SAPQ): a block's new input, from what its stage has computed so far.

    logits_k(p) = < W(p), RMSNorm(v_k(p)) > / (sqrt(C) * temperature), W = Conv1x1(current), softmax over k, out = sum
    a_k v_k. The v_k are the bank, b_1 .. b_(i-1) and maybe the stage's input before them, and once more the current
    feature b_(i-1). W is zero at initialisation, so that all weights are equal.

    channels: C.
    """

    temperature: Tensor

    def __init__(self, channels: int, config: BlockXAttnResConfig) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(channels, channels))
        self.norm_scale = nn.Parameter(torch.ones(channels))
        # Saved with the weights: nnU-Net builds the network for prediction from the trainer class alone, and a class
        # whose temperature has changed since must not change what a trained network predicts.
        self.register_buffer("temperature", torch.tensor(float(config.temperature)))
        self.attend = attention_backend(config.backend)

    def forward(self, bank: Sequence[Tensor]) -> Tensor:
        """bank of (B, C, *size), the current feature last -> (B, C, *size)"""
        current = bank[-1]
        query = _query_field(current, self.query, self.norm_scale, sqrt(len(self.query)) * self.temperature)
        candidates = [Candidate(entry, None) for entry in [*bank, current]]
        return self.attend(query, None, candidates, tuple(current.shape[2:]), eps=EPS)

    def compute_conv_feature_map_size(self, positions: int) -> int:
        """How many numbers the 1x1 convolution puts out for one image, at so many positions."""
        return positions * len(self.query)


class InputProjection(nn.Module):
    """The 1x1 projection of a stage's input, of other channels than its blocks put out, that opens their bank."""

    def __init__(self, channels: int, input_channels: int) -> None:
        super().__init__()
        self.projection = nn.Parameter(torch.empty(channels, input_channels))
        nn.init.kaiming_normal_(self.projection, nonlinearity="linear")

    def forward(self, stage_input: Tensor) -> Tensor:
        """(B, C_in, *size) -> (B, C, *size)"""
        return project(stage_input, self.projection)

    def compute_conv_feature_map_size(self, positions: int) -> int:
        """How many numbers the 1x1 convolution puts out for one image, at so many positions."""
        return positions * len(self.projection)


class MemoryRouting(nn.Module):
    """DKVMR, decoupled key-value memory routing: what takes the place of a skip connection.

    [K_j | V_j] = Conv1x1(m_j) for every memory entry m_j, an output of a block of the encoder stage; Q = Conv1x1(x);
    a = softmax over j of < Q(p), RMSNorm(K_j(p)) > / sqrt(d); out = sum_j a_j V_j. With a single entry there is
    nothing to choose, and only V is there.

    channels: C of the memory and of x. num_entries: memory entries. d = max(8, int(kv_ratio * C)).
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

    def compute_conv_feature_map_size(self, positions: int) -> int:
        """How many numbers the 1x1 convolutions put out for one image, at so many positions."""
        return positions * (self.num_entries * len(self.key_value) + self.key_channels)


def _query_field(x: Tensor, query: Tensor, norm_scale: Tensor, divisor: float | Tensor) -> Tensor:
    """Conv1x1(x) * g / divisor; the factors enter its weight, so that a single field is kept for the backward pass."""
    return project(x, query * norm_scale[:, None] / divisor)
