"""The native backend: compiled loops for the CPU, as a registered operator with gradients."""

from collections.abc import Sequence
from itertools import chain, islice, zip_longest
from math import prod
from typing import Any

import torch
from torch import Tensor

from nnunet_xattnres.common.errors import XAttnResError
from nnunet_xattnres.ops import native_library
from nnunet_xattnres.ops.alignment import averaged, is_finer, project
from nnunet_xattnres.ops.context import is_exporting, log_fallback, without_autocast
from nnunet_xattnres.ops.flops import interpolation_flops, projection_flops, register_flop_formula
from nnunet_xattnres.ops.interpolation import upsampling_factors
from nnunet_xattnres.ops.native_library import Values, mix, mix_gradients
from nnunet_xattnres.ops.reference import EPS, Candidate, Upsampled, computed, scaled_query
from nnunet_xattnres.ops.streaming import attend_streaming

Shape = Sequence[int]

BEYOND_LOOPS = "the backend 'native' computes the stage level on a CPU without autocast, in float32 and float64"
# Written out, because older PyTorch cannot infer them from annotations with collections.abc.Sequence.
TENSORS = "Tensor query, Tensor[] features, Tensor[] projections, Tensor[] upsampling"
FORWARD_SCHEMA = f"({TENSORS}, Tensor[] kept, SymInt[] size, float eps) -> Tensor"
BACKWARD_SCHEMA = (
    f"(Tensor gradient, {TENSORS}, float eps, bool[] features_wanted, bool[] projections_wanted, "
    "bool[] upsampling_wanted) -> (Tensor, Tensor[], Tensor[], Tensor[])"
)


def attend_native(
    query: Tensor,
    norm_scale: Tensor | None,
    candidates: Sequence[Candidate | Upsampled],
    size: Sequence[int],
    key_channels: int | None = None,
    eps: float = EPS,
) -> Tensor:
    """`attend_reference` in compiled loops over rows of the target. For the arguments see `Attention`.

    For the backward pass, the query and the candidates at their own resolutions are kept, or what they are averaged
    from.

    `attend_streaming` takes over what the loops do not compute, see `is_served`, and where there is no library that can
    be loaded. The log says so once.

    Raises `XAttnResError` for a candidate that is finer than the target.
    """
    problem = native_library.why_not_available() if is_served(query, candidates, key_channels) else BEYOND_LOOPS
    if problem:
        log_fallback(problem)
        return attend_streaming(query, norm_scale, candidates, size, key_channels, eps)
    for candidate in candidates:
        upsampling_factors(candidate.features.shape[2:], size)
    *others, last = candidates
    upsampling: list[Tensor] = []
    if isinstance(last, Upsampled):
        bias = last.weight.new_zeros(last.weight.shape[1]) if last.bias is None else last.bias
        upsampling = [last.features, last.weight, bias]
    else:
        others = [*others, last]
    # A list of tensors for an operator has no gaps, so the candidates with a projection come first.
    ordered = sorted(computed(others), key=lambda candidate: candidate.projection is None)
    features = [candidate.features for candidate in ordered]
    projections = [candidate.projection for candidate in ordered if candidate.projection is not None]
    kept = [each.features if each.averaged_from is None else each.averaged_from for each in ordered]
    return attend_on_cpu(scaled_query(query, norm_scale), features, projections, upsampling, kept, size, eps)


def is_served(query: Tensor, candidates: Sequence[Candidate | Upsampled], key_channels: int | None) -> bool:
    """Whether the compiled loops compute a call, where they are.

    They compute the stage level on a CPU without autocast, where all tensors are of float32 or all of float64. On the
    meta device, the operator gives the shapes. An exported graph must run without this package, so exports are not
    theirs.
    """
    dtypes = {query.dtype}
    for candidate in candidates:
        tensors = (
            (candidate.features, candidate.weight, candidate.bias)
            if isinstance(candidate, Upsampled)
            else (candidate.features, candidate.projection)
        )
        dtypes |= {tensor.dtype for tensor in tensors if tensor is not None}
    return (
        query.ndim == 1
        and key_channels is None
        and query.device.type in ("cpu", "meta")
        and dtypes in ({torch.float32}, {torch.float64})
        and not torch.is_autocast_enabled("cpu")
        and not is_exporting()
    )


def check_native(device: str) -> None:
    """Raise `XAttnResError` for another device than "cpu", and if the library is missing or does not fit."""
    if device != "cpu":
        raise XAttnResError(
            f"the backend 'native' runs on a CPU, and the network is on {device}: use the backend 'auto'"
        )
    if problem := native_library.why_not_available():
        raise XAttnResError(problem)


@torch.library.custom_op("nnunet_xattnres::attend_on_cpu", mutates_args=(), schema=FORWARD_SCHEMA, device_types="cpu")
def attend_on_cpu(
    query: Tensor,
    features: Sequence[Tensor],
    projections: Sequence[Tensor],
    upsampling: Sequence[Tensor],
    kept: Sequence[Tensor],
    size: Sequence[int],
    eps: float,
) -> Tensor:
    """The attention over features (B, C_k, *source_size), each projected and then upsampled to `size`.

    query: w * g, (C,). projections: of the first features; the others have none. upsampling: features, weight and bias
    of a transposed convolution whose output is one more candidate, or nothing. kept: for the backward pass, all
    features, or what they are the average of. All tensors have one dtype.
    """
    with without_autocast(query):
        values = _values(features, projections, upsampling, size)
        return mix(query.contiguous(), values, _batch(features, upsampling), size, eps)


@torch.library.custom_op(
    "nnunet_xattnres::attend_on_cpu_backward", mutates_args=(), schema=BACKWARD_SCHEMA, device_types="cpu"
)
def attend_on_cpu_backward(
    gradient: Tensor,
    query: Tensor,
    features: Sequence[Tensor],
    projections: Sequence[Tensor],
    upsampling: Sequence[Tensor],
    eps: float,
    features_wanted: Sequence[bool],
    projections_wanted: Sequence[bool],
    upsampling_wanted: Sequence[bool],
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """The gradients of `attend_on_cpu`: of the query, and of those tensors of each list that want one.

    features: what was kept. Where they are finer than the target, the gradient is that of their average.
    """
    with without_autocast(query):
        size = gradient.shape[2:]
        sources = [averaged(h, size) for h in features]
        values = _values(sources, projections, upsampling, size)
        wanted = [any(pair) for pair in zip_longest(features_wanted, projections_wanted)]
        if upsampling:
            wanted.append(any(upsampling_wanted))
        query_gradient, value_gradients = mix_gradients(gradient.contiguous(), query.contiguous(), values, wanted, eps)
        channels_first = [each.channels_first for each in values]
        of_features, of_projections, of_upsampling = [], [], []
        # Each gradient of values is freed as soon as it has been used, so that few of them exist at the peak.
        del values
        if upsampling:
            of_output = value_gradients.pop()
            if of_output is not None:
                of_upsampling = _upsampling_gradients(of_output, upsampling, upsampling_wanted)
            del of_output
        for k in range(len(sources)):
            h, of_values = sources.pop(0), value_gradients.pop(0)
            if of_values is None:
                continue
            # (B, C_t, voxels), a view where the kernels compute channels last.
            of_values = of_values.flatten(2) if channels_first[k] else of_values.flatten(1, -2).mT
            projection = projections[k] if k < len(projections) else None
            if features_wanted[k]:
                of_features.append(project(of_values, None if projection is None else projection.T).reshape(h.shape))
            if projection is not None and projections_wanted[k]:
                of_projections.append((of_values @ h.flatten(2).mT).sum(dim=0))
    return query_gradient, of_features, of_projections, of_upsampling


def _batch(features: Sequence[Tensor], upsampling: Sequence[Tensor]) -> int:
    return (features[0] if features else upsampling[0]).shape[0]


def _values(
    features: Sequence[Tensor], projections: Sequence[Tensor], upsampling: Sequence[Tensor], size: Sequence[int]
) -> list[Values]:
    """The projected candidates, and the output of the transposed convolution, as the kernels read them."""
    values = []
    for h, projection in zip_longest(features, projections):
        source_size = h.shape[2:]
        if projection is not None:
            # The product comes out channels last.
            product = torch.bmm(h.flatten(2).mT, projection.T.expand(len(h), -1, -1))
            values.append(Values(product.unflatten(1, source_size), source_size))
        elif tuple(source_size) == tuple(size):
            values.append(Values(h.contiguous(), source_size, channels_first=True))
        else:
            values.append(Values(h.movedim(1, -1).contiguous(), source_size))
    if upsampling:
        coarse, weight, bias = upsampling
        values.append(_upsampled_values(coarse, weight, bias, size))
    return values


def _upsampled_values(features: Tensor, weight: Tensor, bias: Tensor, size: Sequence[int]) -> Values:
    """The output of a transposed convolution, which is one matrix product per step along z and y.

    A product's row has the outputs of the steps along x in turn, so that the product of a coarse row is a row of the
    output, channels last.
    """
    by_cell = _weight_by_cell(weight)
    voxels = features.flatten(2).mT
    output = features.new_empty(len(by_cell), *voxels.shape[:2], by_cell.shape[2])
    bias = bias.repeat(weight.shape[-1])
    for product, of_cell in zip(output, by_cell, strict=True):
        torch.baddbmm(bias, voxels, of_cell.expand(len(voxels), -1, -1), out=product)
    cells = (1, *weight.shape[2:])[-3:-1]
    return Values(output, size, cells=cells)


def _weight_by_cell(weight: Tensor) -> Tensor:
    """(C_in, C, *steps) -> (steps z * steps y, C_in, steps x * C)"""
    by_cell = weight.flatten(2, -2) if weight.ndim > 4 else weight
    return by_cell.permute(2, 0, 3, 1).flatten(2)


def _upsampling_gradients(gradient: Tensor, upsampling: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor]:
    """The wanted gradients of features, weight and bias, from that of `_upsampled_values`."""
    features, weight, bias = upsampling
    by_cell = _weight_by_cell(weight)
    gradients = []
    if wanted[0]:
        of_features = features.new_zeros(features.flatten(2).shape)
        for of_product, of_cell in zip(gradient, by_cell, strict=True):
            of_features.baddbmm_(of_cell.expand(len(features), -1, -1), of_product.mT)
        gradients.append(of_features.reshape(features.shape))
    if wanted[1]:
        products = torch.stack([(features.flatten(2) @ of_product).sum(dim=0) for of_product in gradient])
        # (cells, C_in, steps x * C) -> (C_in, C, *steps)
        of_weight = products.unflatten(2, (-1, weight.shape[1])).permute(1, 3, 0, 2)
        gradients.append(of_weight.reshape(weight.shape).contiguous())
    if wanted[2]:
        gradients.append(gradient.sum(dim=(0, 1, 2)).view(-1, len(bias)).sum(dim=0))
    return gradients


@attend_on_cpu.register_fake
def _(
    query: Tensor,
    features: Sequence[Tensor],
    projections: Sequence[Tensor],
    upsampling: Sequence[Tensor],
    kept: Sequence[Tensor],
    size: Sequence[int],
    eps: float,
) -> Tensor:
    return query.new_empty(_batch(features, upsampling), query.shape[0], *size)


@attend_on_cpu_backward.register_fake
def _(
    gradient: Tensor,
    query: Tensor,
    features: Sequence[Tensor],
    projections: Sequence[Tensor],
    upsampling: Sequence[Tensor],
    eps: float,
    features_wanted: Sequence[bool],
    projections_wanted: Sequence[bool],
    upsampling_wanted: Sequence[bool],
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    of_features = []
    for k, (h, wanted) in enumerate(zip(features, features_wanted, strict=True)):
        batch, channels, *size = _averaged_shape(h.shape, gradient.shape)
        if not wanted:
            continue
        # The loops compute the gradient of a coarser source channels last. A projection makes it channels first.
        if k < len(projections) or tuple(size) == tuple(gradient.shape[2:]):
            of_features.append(query.new_empty(batch, channels, *size))
        else:
            of_features.append(query.new_empty(batch, *size, channels).movedim(-1, 1))
    of_projections, of_upsampling = (
        [tensor.new_empty(tensor.shape) for tensor, wanted in zip(*pair, strict=True) if wanted]
        for pair in ((projections, projections_wanted), (upsampling, upsampling_wanted))
    )
    return query.new_empty(query.shape), of_features, of_projections, of_upsampling


def _averaged_shape(features: Shape, target: Shape) -> Shape:
    """(B, C_k, *source_size), with the size of the target (B, C, *size) if the source is finer."""
    return (*features[:2], *target[2:]) if is_finer(features[2:], target[2:]) else features


def _save_for_backward(
    ctx: Any,
    inputs: tuple[Tensor, Sequence[Tensor], Sequence[Tensor], Sequence[Tensor], Sequence[Tensor], Sequence[int], float],
    output: Tensor,
) -> None:
    query, _, projections, upsampling, kept, _, ctx.eps = inputs
    lists = kept, projections, upsampling
    ctx.lengths = [len(tensors) for tensors in lists]
    ctx.save_for_backward(query, *chain(*lists))


def _backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    query, *tensors = ctx.saved_tensors
    given = iter(tensors)
    lists = [list(islice(given, length)) for length in ctx.lengths]
    wanted = ctx.needs_input_grad[1:4]
    query_gradient, *gradients = attend_on_cpu_backward(gradient, query, *lists, ctx.eps, *wanted)
    complete = (
        [next(of_wanted) if each else None for each in flags]
        for of_wanted, flags in zip(map(iter, gradients), wanted, strict=True)
    )
    return query_gradient, *complete, [None] * ctx.lengths[0], None, None


attend_on_cpu.register_autograd(_backward, setup_context=_save_for_backward)


@register_flop_formula(torch.ops.nnunet_xattnres.attend_on_cpu)
def _flops(
    query: Shape,
    features: list[Shape],
    projections: list[Shape],
    upsampling: list[Shape],
    kept: list[Shape],
    size: Shape,
    *_: Any,
    **__: Any,
) -> int:
    return _projections_flops(features, projections, upsampling) + interpolation_flops(features, query[0], size)


@register_flop_formula(torch.ops.nnunet_xattnres.attend_on_cpu_backward)
def _backward_flops(
    gradient: Shape,
    query: Shape,
    features: list[Shape],
    projections: list[Shape],
    upsampling: list[Shape],
    *_: Any,
    **__: Any,
) -> int:
    # The forward pass once more, and the gradients: two per projection, one adjoint per interpolation.
    features = [_averaged_shape(shape, gradient) for shape in features]
    interpolations = interpolation_flops(features, query[0], gradient[2:])
    return 3 * _projections_flops(features, projections, upsampling) + 2 * interpolations


def _projections_flops(features: list[Shape], projections: list[Shape], upsampling: list[Shape]) -> int:
    of_projections = projection_flops(features[: len(projections)], projections)
    return of_projections + (2 * prod(upsampling[0]) * prod(upsampling[1][1:]) if upsampling else 0)
