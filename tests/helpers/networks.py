"""Networks as nnU-Net plans them, small."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import Tensor, nn

from nnunet_xattnres.model import block_level
from nnunet_xattnres.ops import alignment

ISOTROPIC_3D = ((1, 1, 1), (2, 2, 2), (2, 2, 2))
ANISOTROPIC_3D = ((1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 2, 2))
ISOTROPIC_2D = ((1, 1), (2, 2), (2, 2), (2, 2))
ANISOTROPIC_2D = ((1, 1), (2, 2), (2, 1), (1, 2))


def planned_network(
    strides: Sequence[Sequence[int]] = ISOTROPIC_3D,
    network: type[nn.Module] = PlainConvUNet,
    features: int = 4,
    max_features: int = 320,
    input_channels: int = 1,
    classes: int = 3,
    deep_supervision: bool = False,
    seed: int = 0,
) -> PlainConvUNet | ResidualEncoderUNet:
    """Initialised as `get_network_from_plans` does it. Anisotropic kernels; features double up to `max_features`."""
    torch.manual_seed(seed)
    num_stages = len(strides)
    three_d = len(strides[0]) == 3
    if network is PlainConvUNet:
        blocks = {"n_conv_per_stage": 2, "n_conv_per_stage_decoder": 2}
    else:
        blocks = {"n_blocks_per_stage": [1, 3, *[2] * (num_stages - 2)], "n_conv_per_stage_decoder": 1}
    planned = network(
        input_channels=input_channels,
        num_classes=classes,
        n_stages=num_stages,
        features_per_stage=[min(features * 2**i, max_features) for i in range(num_stages)],
        conv_op=nn.Conv3d if three_d else nn.Conv2d,
        kernel_sizes=[
            [1 if stride[0] == 1 and i == 0 else 3, *[3] * (len(stride) - 1)] for i, stride in enumerate(strides)
        ],
        strides=strides,
        conv_bias=True,
        norm_op=nn.InstanceNorm3d if three_d else nn.InstanceNorm2d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        deep_supervision=deep_supervision,
        **blocks,
    )
    planned.apply(planned.initialize)
    return planned


def smallest_image(strides: Sequence[Sequence[int]], bottleneck: Sequence[int]) -> tuple[int, ...]:
    """The image size that leaves `bottleneck` positions at the lowest resolution."""
    size = list(bottleneck)
    for stride in strides:
        size = [extent * factor for extent, factor in zip(size, stride, strict=True)]
    return tuple(size)


@contextmanager
def projected_elements() -> Iterator[list[int]]:
    """A list that is filled with the number of elements that each of our 1x1 convolutions puts out for one image."""
    elements: list[int] = []
    project = alignment.project

    def counting_project(features: Tensor, projection: Tensor | None) -> Tensor:
        out = project(features, projection)
        if projection is not None:
            elements.append(out[0].numel())
        return out

    with pytest.MonkeyPatch.context() as patch:
        for module in (alignment, block_level):
            patch.setattr(module, "project", counting_project)
        yield elements
