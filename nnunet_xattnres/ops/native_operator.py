"""The native backend: compiled loops for the CPU, as a registered operator with gradients."""

import logging
from collections.abc import Sequence
from functools import cache
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from nnunet_xattnres.common.errors import XAttnResError
from nnunet_xattnres.ops.alignment import project
from nnunet_xattnres.ops.interpolation import upsampling_factors
from nnunet_xattnres.ops.native_library import Values, is_available, library, mix, mix_gradients
from nnunet_xattnres.ops.reference import EPS, Candidate, is_exporting, scaled_query, without_autocast
from nnunet_xattnres.ops.streaming import attend_streaming

# Written out, because older PyTorch cannot infer them from annotations with collections.abc.Sequence.
FORWARD_SCHEMA = "(Tensor query, Tensor[] features, Tensor[] projections, SymInt[] size, float eps) -> Tensor"
BACKWARD_SCHEMA = (
    "(Tensor gradient, Tensor query, Tensor[] features, Tensor[] projections, float eps, bool[] features_wanted, "
    "bool[] projections_wanted) -> (Tensor, Tensor[], Tensor[])"
)


def attend_native(
    query: Tensor,
    norm_scale: Tensor | None,
    candidates: Sequence[Candidate],
    size: Sequence[int],
    key_channels: int | None = None,
    eps: float = EPS,
) -> Tensor:
    """`attend_reference` in compiled loops over rows of the target. For the arguments see `Attention`.

    For the backward pass, the query and the candidates at their own resolutions are kept.

    `attend_streaming` takes over what the loops do not compute, see `is_served`, and says so once in the log.

    Raises `XAttnResError` for a candidate that is finer than the target.
    """
    if not is_served(query, candidates, key_channels):
        if not is_exporting() and not torch.compiler.is_compiling():
            _log_fallback()
        return attend_streaming(query, norm_scale, candidates, size, key_channels, eps)
    for candidate in candidates:
        upsampling_factors(candidate.features.shape[2:], size)
    # A list of tensors for an operator has no gaps, so the candidates with a projection come first.
    ordered = sorted(candidates, key=lambda candidate: candidate.projection is None)
    features = [candidate.features for candidate in ordered]
    projections = [candidate.projection for candidate in ordered if candidate.projection is not None]
    return attend_on_cpu(scaled_query(query, norm_scale), features, projections, size, eps)


def is_served(query: Tensor, candidates: Sequence[Candidate], key_channels: int | None) -> bool:
    """Whether the compiled loops compute a call.

    They compute the stage level on a CPU where all tensors are of float32 or all of float64. On the meta device, the
    operator gives the shapes. An exported graph must run without this package, so exports are not theirs.
    """
    tensors = [query, *(tensor for candidate in candidates for tensor in candidate if tensor is not None)]
    dtypes = {tensor.dtype for tensor in tensors}
    return (
        query.ndim == 1
        and key_channels is None
        and query.device.type in ("cpu", "meta")
        and dtypes in ({torch.float32}, {torch.float64})
        and not is_exporting()
        and is_available()
    )


def check_native(device: str) -> None:
    """Raise `XAttnResError` for another device than "cpu", and if the library is missing or does not fit."""
    if device != "cpu":
        raise XAttnResError(
            f"the backend 'native' runs on a CPU, and the network is on {device}: use the backend 'auto'"
        )
    library()


@cache
def _log_fallback() -> None:
    logging.getLogger(__name__).warning(
        "the backend 'native' computes the stage level on a CPU in float32 and float64, with its compiled library: "
        "'streaming' computes instead"
    )


@torch.library.custom_op("nnunet_xattnres::attend_on_cpu", mutates_args=(), schema=FORWARD_SCHEMA, device_types="cpu")
def attend_on_cpu(
    query: Tensor,
    features: Sequence[Tensor],
    projections: Sequence[Tensor],
    size: Sequence[int],
    eps: float,
) -> Tensor:
    """The attention over features (B, C_k, *source_size), each projected and then upsampled to `size`.

    query: w * g, (C,). projections: of the first features; the others have none. All tensors have one dtype.
    """
    with without_autocast(query):
        return mix(query.contiguous(), _values(features, projections, size), size, eps)


@torch.library.custom_op(
    "nnunet_xattnres::attend_on_cpu_backward", mutates_args=(), schema=BACKWARD_SCHEMA, device_types="cpu"
)
def attend_on_cpu_backward(
    gradient: Tensor,
    query: Tensor,
    features: Sequence[Tensor],
    projections: Sequence[Tensor],
    eps: float,
    features_wanted: Sequence[bool],
    projections_wanted: Sequence[bool],
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The gradients of `attend_on_cpu`: of the query, of the features that want one, and of such projections."""
    with without_autocast(query):
        values = _values(features, projections, gradient.shape[2:])
        wanted = [any(pair) for pair in zip_longest(features_wanted, projections_wanted)]
        query_gradient, value_gradients = mix_gradients(gradient.contiguous(), query.contiguous(), values, wanted, eps)
        of_features, of_projections = [], []
        for k, (h, value_gradient) in enumerate(zip(features, value_gradients, strict=True)):
            if value_gradient is None:
                continue
            # (B, C_t, voxels), a view where the kernels compute channels last.
            value_gradient = value_gradient.flatten(2) if values[k].channels_first else value_gradient.flatten(1, -2).mT
            projection = projections[k] if k < len(projections) else None
            if features_wanted[k]:
                of_h = project(value_gradient, None if projection is None else projection.T)
                of_features.append(of_h.reshape(h.shape))
            if projection is not None and projections_wanted[k]:
                of_projections.append((value_gradient @ h.flatten(2).mT).sum(dim=0))
    return query_gradient, of_features, of_projections


def _values(features: Sequence[Tensor], projections: Sequence[Tensor], size: Sequence[int]) -> list[Values]:
    """The projected candidates, as the kernels read them."""
    values = []
    for h, projection in zip_longest(features, projections):
        source_size = h.shape[2:]
        if projection is not None:
            # The product comes out channels last.
            product = torch.bmm(h.flatten(2).mT, projection.T.expand(len(h), -1, -1))
            values.append(Values(product.unflatten(1, source_size), source_size, False))
        elif tuple(source_size) == tuple(size):
            values.append(Values(h.contiguous(), source_size, True))
        else:
            values.append(Values(h.movedim(1, -1).contiguous(), source_size, False))
    return values


@attend_on_cpu.register_fake
def _(
    query: Tensor, features: Sequence[Tensor], projections: Sequence[Tensor], size: Sequence[int], eps: float
) -> Tensor:
    return query.new_empty(features[0].shape[0], query.shape[0], *size)


@attend_on_cpu_backward.register_fake
def _(
    gradient: Tensor,
    query: Tensor,
    features: Sequence[Tensor],
    projections: Sequence[Tensor],
    eps: float,
    features_wanted: Sequence[bool],
    projections_wanted: Sequence[bool],
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    of_features = [h.new_empty(h.shape) for h, wanted in zip(features, features_wanted, strict=True) if wanted]
    of_projections = [
        projection.new_empty(projection.shape)
        for projection, wanted in zip(projections, projections_wanted, strict=True)
        if wanted
    ]
    return query.new_empty(query.shape), of_features, of_projections


def _save_for_backward(
    ctx: Any,
    inputs: tuple[Tensor, Sequence[Tensor], Sequence[Tensor], Sequence[int], float],
    output: Tensor,
) -> None:
    query, features, projections, _, ctx.eps = inputs
    ctx.num_features = len(features)
    ctx.save_for_backward(query, *features, *projections)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, list[Tensor | None], list[Tensor | None], None, None]:
    query, *tensors = ctx.saved_tensors
    features, projections = tensors[: ctx.num_features], tensors[ctx.num_features :]
    _, features_wanted, projections_wanted, *_ = ctx.needs_input_grad
    query_gradient, *gradients = attend_on_cpu_backward(
        gradient, query, features, projections, ctx.eps, features_wanted, projections_wanted
    )
    of_features, of_projections = (
        [next(computed) if each else None for each in wanted]
        for computed, wanted in zip(map(iter, gradients), (features_wanted, projections_wanted), strict=True)
    )
    return query_gradient, of_features, of_projections, None, None


attend_on_cpu.register_autograd(_backward, setup_context=_save_for_backward)
