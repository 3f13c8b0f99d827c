"""The streaming backend: the attention computed chunk by chunk, forward and backward.

A chunk is a part of the target that fits into the cache. The candidates are aligned to one chunk at a time, in the
forward pass and once more in the backward pass, so that the stack of all aligned candidates never exists.
"""

from collections.abc import Iterable, Iterator, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nnunet_xattnres.ops.alignment import averaged, project
from nnunet_xattnres.ops.context import is_exporting, without_autocast
from nnunet_xattnres.ops.interpolation import (
    Interpolation,
    axis_interpolation,
    dense_interpolation,
    interpolation_matrix,
    upsampling_factors,
)
from nnunet_xattnres.ops.reference import (
    EPS,
    Candidate,
    Upsampled,
    computed,
    inverse_rms,
    scaled_query,
    upsample,
    upsample_gradients,
)

# How many elements of aligned candidates are held at once. On a CPU 2**20 to 2**23 were about equally fast, and 2**21
# was the fastest by a tenth: a chunk stays in the cache. On other devices the launches of small chunks cost more.
CHUNK_ELEMENTS = {"cpu": 2**21}
CHUNK_ELEMENTS_ELSEWHERE = 2**28


def attend_streaming(
    query: Tensor,
    norm_scale: Tensor | None,
    candidates: Sequence[Candidate | Upsampled],
    size: Sequence[int],
    key_channels: int | None = None,
    eps: float = EPS,
) -> Tensor:
    """`attend_reference`, chunk by chunk. For the arguments see `Attention`.

    For the backward pass, the query and the candidates at their own resolutions are kept, or what they are averaged
    from. An exported graph has one chunk.

    Raises `XAttnResError` for a candidate that is finer than the target.
    """
    arguments = scaled_query(query, norm_scale), tuple(size), key_channels, eps
    if is_exporting():
        return _mix_by_chunks(*arguments, _features_and_projections(computed(candidates)))
    features_and_projections, upsampling, dtype = _described(candidates)
    averaged_from = [None if isinstance(each, Upsampled) else each.averaged_from for each in candidates]
    tensors = _distinct([*averaged_from, *features_and_projections, *upsampling])
    return _StreamingAttention.apply(*arguments, dtype, len(candidates), *tensors)


@torch.no_grad()
def streaming_weights(
    query: Tensor,
    norm_scale: Tensor | None,
    candidates: Sequence[Candidate | Upsampled],
    size: Sequence[int],
    key_channels: int | None = None,
    eps: float = EPS,
) -> Tensor:
    """The weights a_k(p) of a call with these arguments: (K, B, *size), in float32 or float64."""
    tensors = _features_and_projections(computed(candidates))
    with without_autocast(query):
        call = _StreamingCall(scaled_query(query, norm_scale), tuple(size), key_channels, eps, tensors)
        weights = call.query.new_empty(len(candidates[0].features), len(candidates), *size)
        for chunk in call.chunks():
            chunk.of(weights).copy_(call.read(chunk).scores.softmax(dim=0).transpose(0, 1))
    return weights.transpose(0, 1)


def _mix_by_chunks(
    query: Tensor, size: tuple[int, ...], key_channels: int | None, eps: float, tensors: Sequence[Tensor | None]
) -> Tensor:
    """The forward pass, with the arguments of `_StreamingAttention`."""
    with without_autocast(query):
        call = _StreamingCall(query, size, key_channels, eps, tensors)
        mixture = call.new_mixture()
        for chunk in call.chunks():
            read = call.read(chunk)
            part = _weighted_sum(read.scores.softmax(dim=0), call.values(read))
            if is_exporting():
                # The only chunk. The older ONNX exporter loses what is copied into a part of a tensor.
                return part.to(mixture.dtype)
            chunk.of(mixture).copy_(part)
    return mixture


class _StreamingAttention(torch.autograd.Function):
    """The attention and its gradients, one chunk at a time.

    query: w * g. tensors: what the features are averaged from, all features, then all projections, then weight and bias
    of the last candidate if that is described. count: of the candidates. dtype: of the last candidate if it is
    described, which is computed in both passes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        size: tuple[int, ...],
        key_channels: int | None,
        eps: float,
        dtype: torch.dtype,
        count: int,
        *tensors: Tensor | None,
    ) -> Tensor:
        averaged_from, tensors = tensors[:count], tensors[count:]
        kept = [h if finer is None else finer for finer, h in zip(averaged_from, tensors, strict=False)]
        ctx.save_for_backward(query, *kept, *tensors[count:])
        ctx.arguments = size, key_channels, eps, dtype
        with without_autocast(query):
            return _mix_by_chunks(query, size, key_channels, eps, _with_last_computed(tensors, dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, *tensors = ctx.saved_tensors
        with without_autocast(query):
            size, key_channels, eps, dtype = ctx.arguments
            *described, weight, _ = tensors
            count = len(described) // 2
            tensors[:count] = [averaged(h, size) for h in tensors[:count]]
            call = _StreamingCall(query, size, key_channels, eps, _with_last_computed(tensors, dtype))
            query_gradient = torch.zeros_like(call.query)
            needed = ctx.needs_input_grad[-len(tensors) :]
            of_features = [*needed[: count - 1], any(needed[number] for number in (count - 1, -2, -1))]
            for alignment, *wanted in zip(call.alignments, of_features, needed[count:-2], strict=True):
                alignment.start_gradients(*wanted)
            for chunk in call.chunks():
                read = call.read(chunk)
                gradient = chunk.of(gradients[0]).to(call.query.dtype)
                weights = read.scores.softmax(dim=0)
                # out = sum_k a_k v_k and a = softmax(e): da_k = <dout, v_k>, de_k = a_k (da_k - sum_j a_j da_j).
                weight_gradients = torch.stack([dot(gradient, value) for value in call.values(read)])
                score_gradients = weights * (weight_gradients - (weights * weight_gradients).sum(dim=0))
                # e_k = r_k <q, key_k> with r_k = (|key_k|^2 / C + eps)^(-1/2): de_k/d<q, key_k> = r_k and
                # de_k/d|key_k|^2 = -e_k r_k^2 / 2C.
                product_gradients = score_gradients * read.inverse_rms
                norm_gradients = score_gradients * read.scores * read.inverse_rms.square() / (-2 * call.query_channels)
                for k, (alignment, partial) in enumerate(zip(call.alignments, read.partials, strict=True)):
                    key, value = call.key_and_value(partial)
                    along_query = alignment.expand_adjoint(product_gradients[k])
                    call.add_to_query(query_gradient, chunk, along_query, key)
                    if not alignment.has_gradients:
                        continue
                    value_gradient = alignment.expand_adjoint(weights[k].unsqueeze(1) * gradient)
                    key_gradient = value_gradient if key is value else torch.zeros_like(key)
                    key_gradient.addcmul_(along_query.unsqueeze(1), call.query_at(chunk))
                    alignment.add_squared_norm_adjoint(norm_gradients[k], key, key_gradient)
                    alignment.accumulate_gradients(
                        chunk, value_gradient if key is value else torch.cat((key_gradient, value_gradient), dim=1)
                    )
            features_gradients, projection_gradients = map(
                list, zip(*(alignment.gradients() for alignment in call.alignments), strict=True)
            )
            upsampling_gradients: Sequence[Tensor | None] = (None, None)
            if weight is not None and features_gradients[-1] is not None:
                wanted = [needed[number] for number in (count - 1, -2, -1)]
                features_gradients[-1], *upsampling_gradients = upsample_gradients(
                    features_gradients[-1].to(dtype), described[count - 1].to(dtype), weight.to(dtype), wanted
                )
        gradients_of_tensors = [*features_gradients, *projection_gradients, *upsampling_gradients]
        return (
            query_gradient.to(query.dtype),
            *(None,) * (5 + count),
            *(
                None if gradient is None else gradient.to(tensor.dtype)
                for tensor, gradient in zip(tensors, gradients_of_tensors, strict=True)
            ),
        )


class Chunk(NamedTuple):
    """A part of the target that is computed at once: some batch items, some rows of the first spatial axis."""

    items: slice
    rows: slice

    def of(self, tensor: Tensor) -> Tensor:
        """This part of a tensor (B, C, *size)."""
        return tensor[self.items, :, self.rows]


class _ChunkScores(NamedTuple):
    """The scores of one chunk.

    partials: `ChunkAlignment.partial` of every candidate. inverse_rms, scores: r_k and e_k, (K, B, *chunk size).
    """

    partials: Sequence[Tensor]
    inverse_rms: Tensor
    scores: Tensor


class _StreamingCall:
    """The arguments of one call, in float32 (float64 where the query is)."""

    def __init__(
        self,
        query: Tensor,
        size: tuple[int, ...],
        key_channels: int | None,
        eps: float,
        tensors: Sequence[Tensor | None],
    ) -> None:
        dtype = torch.promote_types(query.dtype, torch.float32)
        count = len(tensors) // 2
        self.query = query.to(dtype)
        self.query_is_field = query.ndim > 1
        self.query_channels = query.shape[1] if self.query_is_field else query.shape[0]
        self.size = size
        self.key_channels = key_channels
        self.eps = eps
        self.alignments = [
            # The product with a query field does not commute with interpolation.
            ChunkAlignment(features, projection, size, dtype, expand_last_axis=self.query_is_field)
            for features, projection in zip(tensors[:count], tensors[count:], strict=True)
            if features is not None
        ]

    def new_mixture(self) -> Tensor:
        # Candidates may differ in precision. The last one is the input of the stage wherever the stage reads that.
        last = self.alignments[-1]
        value_channels = last.channels - (self.key_channels or 0)
        return last.features.new_empty(last.features.shape[0], value_channels, *self.size)

    def chunks(self) -> Iterator[Chunk]:
        first = self.alignments[0]
        batch_size = first.features.shape[0]
        if is_exporting():
            # With a loop, the graph would take one batch size only.
            return iter([Chunk(slice(0, batch_size), slice(0, self.size[0]))])
        elements = CHUNK_ELEMENTS.get(self.query.device.type, CHUNK_ELEMENTS_ELSEWHERE)
        if torch.compiler.is_compiling():
            # A compiler unrolls the loop over chunks.
            elements = CHUNK_ELEMENTS_ELSEWHERE
        voxels = max(1, elements // (len(self.alignments) * first.channels))
        return chunks(batch_size, self.size, voxels)

    def read(self, chunk: Chunk) -> _ChunkScores:
        partials = [alignment.partial(chunk) for alignment in self.alignments]
        squared_norms, products = [], []
        for alignment, partial in zip(self.alignments, partials, strict=True):
            key, _ = self.key_and_value(partial)
            squared_norms.append(alignment.squared_norm(key))
            products.append(alignment.expand(self._product_with_query(chunk, key)))
        factors = inverse_rms(torch.stack(squared_norms) / self.query_channels, self.eps)
        return _ChunkScores(partials, factors, torch.stack(products) * factors)

    def values(self, read: _ChunkScores) -> Iterator[Tensor]:
        """The aligned values, one at a time."""
        for alignment, partial in zip(self.alignments, read.partials, strict=True):
            yield alignment.expand(self.key_and_value(partial)[1])

    def key_and_value(self, partial: Tensor) -> tuple[Tensor, Tensor]:
        if self.key_channels is None:
            return partial, partial
        return partial[:, : self.key_channels], partial[:, self.key_channels :]

    def query_at(self, chunk: Chunk) -> Tensor:
        """w, to be broadcast against keys."""
        return chunk.of(self.query) if self.query_is_field else self.query.view(-1, *(1,) * len(self.size))

    def add_to_query(self, query_gradient: Tensor, chunk: Chunk, weight: Tensor, key: Tensor) -> None:
        """Add weight(p) key(p) to the query's gradient, at p or, for a vector, over all positions."""
        if self.query_is_field:
            chunk.of(query_gradient).addcmul_(weight.unsqueeze(1), key)
        else:
            query_gradient += (key.flatten(2) @ weight.flatten(1).unsqueeze(2)).sum(dim=(0, 2))

    def _product_with_query(self, chunk: Chunk, key: Tensor) -> Tensor:
        if self.query_is_field:
            return dot(chunk.of(self.query), key)
        return (self.query @ key.flatten(2)).unflatten(1, key.shape[2:])


def _features_and_projections(candidates: Sequence[Candidate]) -> list[Tensor | None]:
    """All features, then all projections."""
    return [*(candidate.features for candidate in candidates), *(candidate.projection for candidate in candidates)]


def _described(
    candidates: Sequence[Candidate | Upsampled],
) -> tuple[list[Tensor | None], tuple[Tensor | None, Tensor | None], torch.dtype]:
    """All features and projections as they are, weight and bias of the last candidate, and its dtype once computed."""
    *others, last = candidates
    if not isinstance(last, Upsampled):
        return _features_and_projections(computed(candidates)), (None, None), last.features.dtype
    tensors = _features_and_projections([*computed(others), Candidate(last.features, None)])
    device = last.features.device.type
    lowered = device not in ("meta", "mps") and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if lowered else last.features.dtype
    return tensors, (last.weight, last.bias), dtype


def _with_last_computed(tensors: Sequence[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    """The features and projections. tensors: as in `_StreamingAttention`."""
    *described, weight, bias = tensors
    last = len(described) // 2 - 1
    coarse = described[last]
    if weight is not None and coarse is not None:
        bias = None if bias is None else bias.to(dtype)
        described[last] = upsample(Upsampled(coarse.to(dtype), weight.to(dtype), bias))
    return described


def _distinct(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The tensors, repeated ones as views: torch.compile does not trace a function that gets one tensor twice."""
    distinct: list[Tensor | None] = []
    for number, tensor in enumerate(tensors):
        # PyTorch 2.11 cannot trace `id` of a computed tensor.
        if tensor is not None and any(tensor is earlier for earlier in tensors[:number]):
            tensor = tensor.view_as(tensor)
        distinct.append(tensor)
    return distinct


def _weighted_sum(weights: Tensor, values: Iterable[Tensor]) -> Tensor:
    """sum_k a_k v_k. The values may come one at a time."""
    (first_weight, *others), values = weights.unsqueeze(2), iter(values)
    total = first_weight * next(values)
    for weight, value in zip(others, values, strict=True):
        total.addcmul_(weight, value)
    return total


def chunks(batch_size: int, size: Sequence[int], max_voxels: int) -> Iterator[Chunk]:
    """Cut a target into chunks of at most `max_voxels` voxels, and of at least one row.

    A chunk has whole batch items if they fit, and else rows of one item.
    """
    items = max(1, max_voxels // prod(size))
    rows = min(size[0], max(1, max_voxels // prod(size[1:])))
    for item in range(0, batch_size, items):
        for row in range(0, size[0], rows):
            yield Chunk(slice(item, min(item + items, batch_size)), slice(row, min(row + rows, size[0])))


class ChunkAlignment:
    """A candidate aligned to one chunk of the target at a time, and the adjoint, which accumulates the gradients.

    Linear interpolation by integer factors is a product with a banded matrix W per axis. Alignment is a chain of matrix
    products, and its adjoint is the chain of their transposes: exact and deterministic.

    `partial` leaves the last axis at the resolution of the source. There, v(x) = sum_i W[x, i] u_i, and two products of
    v follow from products of the u_i, which have a fraction of the voxels:

        < w , v(x) >  = sum_i W[x, i] < w , u_i >
        | v(x) |^2    = sum_i W[x, i]^2 |u_i|^2 + 2 W[x, i] W[x, i+1] < u_i , u_(i+1) >

    The second line holds because every x lies between two neighbouring i.

    features: (B, C_k, *source_size), nowhere finer than the target. projection: (C_t, C_k) or None for the identity.
    size: of the target. dtype: of all arithmetic. expand_last_axis: whether `partial` interpolates the last axis too.

    Raises `XAttnResError` for features that are finer than the target.
    """

    def __init__(
        self,
        features: Tensor,
        projection: Tensor | None,
        size: Sequence[int],
        dtype: torch.dtype,
        expand_last_axis: bool,
    ) -> None:
        self.features = features
        self.projection = None if projection is None else projection.to(dtype)
        self.dtype = dtype
        self.channels = features.shape[1] if projection is None else projection.shape[0]
        self.source_rows = features.shape[2]
        self.row_factor = upsampling_factors(features.shape[2:], size)[0]
        self.is_resized = tuple(features.shape[2:]) != tuple(size)
        # A coarser source is projected as a whole, because chunks share its rows. A source of the target's size is
        # projected chunk by chunk, which takes no memory for another feature map.
        self.source = project(features.to(dtype), self.projection) if self.is_resized else features
        (source_rows, rows), *others = zip(features.shape[2:], size, strict=True)
        self.rows = None if source_rows == rows else interpolation_matrix(source_rows, rows, self.source)
        self.others = [
            None if source == target else axis_interpolation(source, target, self.source) for source, target in others
        ]
        self.last = None if expand_last_axis else self.others.pop()
        if self.last is not None:
            last = self.last.adjoint.matrix.T
            self.last_of_products = torch.cat((last.square(), 2 * last[:, :-1] * last[:, 1:]), dim=1)

    def partial(self, chunk: Chunk) -> Tensor:
        """The u_i: aligned to the chunk along all axes but the last, (B, C_t, rows, ..., extent of the source)."""
        source = self._source_chunk(chunk).of(self.source)
        if self.is_resized:
            for axis, interpolation in self._interpolations(chunk):
                source = interpolation.forward.multiply(source, axis)
            return source
        return project(source.to(self.dtype), self.projection)

    def expand(self, partial: Tensor) -> Tensor:
        """Interpolate the last axis of the u_i, or of something that is linear in them."""
        return partial if self.last is None else self.last.forward.multiply(partial, partial.ndim - 1)

    def squared_norm(self, partial: Tensor) -> Tensor:
        """| v |^2 over channels: the u_i (B, C, ..., I) -> (B, ..., X)

        The rounding error is in proportion to max |u_i|^2, not to | v |^2. Where neighbours are nearly opposite in all
        channels, a norm below about 1e-6 max |u_i|^2 (in float32) is lost: it is 0 or an error of that size.
        """
        if self.last is None:
            return dot(partial, partial)
        products = torch.cat((dot(partial, partial), dot(partial[..., :-1], partial[..., 1:])), dim=-1)
        # Rounding can make a vanishing norm negative.
        return (products @ self.last_of_products.T).clamp_(min=0)

    def start_gradients(self, of_features: bool, of_projection: bool) -> None:
        """Choose the gradients to compute."""
        self.source_gradient: Tensor | None = None
        self.projection_gradient: Tensor | None = None
        self.has_gradients = of_features or of_projection
        self.has_features_gradient = of_features
        if of_features or (of_projection and self.is_resized):
            # Chunks share no rows of a source of the target's size. Nothing is summed, so its own precision is enough.
            allocate = torch.zeros_like if self.is_resized else torch.empty_like
            self.source_gradient = allocate(self.source)
        if of_projection and self.projection is not None:
            self.projection_gradient = torch.zeros_like(self.projection)

    def expand_adjoint(self, gradient: Tensor) -> Tensor:
        """The gradient of what was given to `expand`, from that of its result."""
        return gradient if self.last is None else self.last.adjoint.multiply(gradient, gradient.ndim - 1)

    def add_squared_norm_adjoint(self, gradient: Tensor, partial: Tensor, partial_gradient: Tensor) -> None:
        """Add what a gradient (B, ..., X) of `squared_norm` contributes to the gradient of the u_i."""
        if self.last is None:
            partial_gradient.addcmul_(partial, gradient.unsqueeze(1), value=2)
            return
        extent = partial.shape[-1]
        own, of_neighbours = (gradient @ self.last_of_products).unsqueeze(1).tensor_split([extent], dim=-1)
        partial_gradient.addcmul_(partial, own, value=2)
        partial_gradient[..., :-1].addcmul_(partial[..., 1:], of_neighbours)
        partial_gradient[..., 1:].addcmul_(partial[..., :-1], of_neighbours)

    def accumulate_gradients(self, chunk: Chunk, gradient: Tensor) -> None:
        """Add what a gradient of `partial` contributes to those of features and projection."""
        source_chunk = self._source_chunk(chunk)
        if self.is_resized:
            for axis, interpolation in reversed(self._interpolations(chunk)):
                gradient = interpolation.adjoint.multiply(gradient, axis)
            of_chunk: Tensor | None = gradient
        else:
            of_chunk = self._project_adjoint(gradient, source_chunk.of(self.features))
        if of_chunk is not None and self.source_gradient is not None:
            sum_of_chunks = source_chunk.of(self.source_gradient)
            sum_of_chunks.add_(of_chunk) if self.is_resized else sum_of_chunks.copy_(of_chunk)

    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of features and projection, after all chunks."""
        if self.is_resized and self.source_gradient is not None:
            return self._project_adjoint(self.source_gradient, self.features), self.projection_gradient
        return self.source_gradient, self.projection_gradient

    def _source_chunk(self, chunk: Chunk) -> Chunk:
        """The part of the source that a chunk of the target is computed from."""
        if self.row_factor == 1:
            return chunk
        # Target row r lies at source row (r + 1/2) / factor - 1/2, between the two source rows that it is made of.
        first = (2 * chunk.rows.start + 1 - self.row_factor) // (2 * self.row_factor)
        last = (2 * chunk.rows.stop - 1 - self.row_factor) // (2 * self.row_factor) + 1
        return Chunk(chunk.items, slice(max(first, 0), min(last + 1, self.source_rows)))

    def _interpolations(self, chunk: Chunk) -> list[tuple[int, Interpolation]]:
        """The interpolations of `partial`, with their axes."""
        rows = None if self.rows is None else dense_interpolation(self.rows[chunk.rows, self._source_chunk(chunk).rows])
        return [(axis, each) for axis, each in enumerate([rows, *self.others], start=2) if each is not None]

    def _project_adjoint(self, gradient: Tensor, projected_from: Tensor) -> Tensor | None:
        """Add to the gradient of the projection, and return that of the features if it is wanted."""
        if self.projection_gradient is not None:
            projected_from = projected_from.to(self.dtype).flatten(2)
            self.projection_gradient += (gradient.flatten(2) @ projected_from.mT).sum(dim=0)
        if not self.has_features_gradient:
            return None
        return project(gradient, None if self.projection is None else self.projection.T)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """< a , b > over channels: (B, C, *size) twice -> (B, *size)"""
    return (a * b).sum(dim=1)
