"""Attention over aligned candidates at every position: out(p) = sum_k a_k(p) value_k(p).

    keys     K_k = g * key_k / sqrt( mean_c(key_k^2) + eps )  RMSNorm over channels, per position
    scores   e_k(p) = < w , K_k(p) >                          w: the query, g: the norm's scale
    weights  a_k(p) = softmax over k of e_k(p)

At stage level (XAttnRes, arXiv 2604.03297, after Attention Residuals, arXiv 2603.15031) key_k and value_k are both the
aligned candidate v_k, and w is one learned vector, the pseudo-query. At block level w is a field, w(p), and memory
entries bring keys of their own. Here are two of the `backends` that compute this function: `reference`, as plain as the
formulas, and `streaming`, which never holds the stack of aligned candidates.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from math import sqrt
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from nnunet_xattnres.alignment import Slab, SlabAlignment, align, average_if_finer, dot, slabs

EPS = 1e-6

# How many numbers of aligned candidates the streaming backend holds at once. On a CPU 2**20 to 2**23 were about equally
# fast, 2**21 the fastest by a tenth: a slab stays in the cache. Elsewhere launches cost more.
SLAB_NUMBERS = {"cpu": 2**21}
SLAB_NUMBERS_ELSEWHERE = 2**28

# PyTorch before 2.7 tells of exports to ONNX alone.
_is_torch_exporting = getattr(torch.compiler, "is_exporting", torch.onnx.is_in_onnx_export)


class Candidate(NamedTuple):
    """Something to read from: features (B, C_k, *source_size) and the projection (C_t, C_k) that aligns its channels.

    Without a projection the features enter as they are (C_k = C_t).
    """

    features: Tensor
    projection: Tensor | None


class Attention(Protocol):
    """What a backend computes.

    query: w, a vector (C_key,) or a field (B, C_key, *size). norm_scale: g, (C_key,), or None: the query is w * g.
    size: the target's spatial size.
    candidates: what is read, C_t channels each once it is aligned.
    key_channels: None where an aligned candidate is key and value at once (C_key = C_t); else its first `key_channels`
        are the key and the others the value.
    Returns (B, C_value, *size), in the dtype of the aligned candidates.
    """

    def __call__(
        self,
        query: Tensor,
        norm_scale: Tensor | None,
        candidates: Sequence[Candidate],
        size: Sequence[int],
        key_channels: int | None = None,
        eps: float = EPS,
    ) -> Tensor: ...


def attend_reference(
    query: Tensor,
    norm_scale: Tensor | None,
    candidates: Sequence[Candidate],
    size: Sequence[int],
    key_channels: int | None = None,
    eps: float = EPS,
) -> Tensor:
    """The formulas as they stand; see `Attention`."""
    aligned = torch.stack([align(candidate.features, candidate.projection, size) for candidate in candidates])
    keys, values = (aligned, aligned) if key_channels is None else aligned.tensor_split([key_channels], dim=2)
    with _without_autocast(values):
        weights = attention_weights(query, norm_scale, keys, eps)
        mixture = (weights.unsqueeze(2) * values.to(weights.dtype)).sum(dim=0)
    return mixture.to(values.dtype)


def attention_weights(query: Tensor, norm_scale: Tensor | None, keys: Tensor, eps: float = EPS) -> Tensor:
    """a_k(p) for a stack of keys before the norm: (K, B, C_key, *size) -> (K, B, *size), at least float32."""
    keys = keys.to(torch.promote_types(keys.dtype, torch.float32))
    keys = keys * inverse_rms(keys.square().mean(dim=2, keepdim=True), eps)
    query = scaled(query, norm_scale)
    scores = torch.einsum("c,kbc...->kb...", query, keys) if query.ndim == 1 else (query * keys).sum(dim=2)
    return scores.softmax(dim=0)


def inverse_rms(mean_square: Tensor, eps: float) -> Tensor:
    """( mean_square + eps )^(-1/2)"""
    if is_exporting():
        # PyTorch's ONNX exporter takes a summand of 1e-8 for zero and leaves it out.
        return torch.rsqrt(mean_square / eps + 1) / sqrt(eps)
    return torch.rsqrt(mean_square + eps)


def is_exporting() -> bool:
    """Whether torch.export, torch.onnx.export or torch.jit.trace is writing down the operations of a forward pass."""
    return torch.jit.is_tracing() or _is_torch_exporting()


def attend_streaming(
    query: Tensor,
    norm_scale: Tensor | None,
    candidates: Sequence[Candidate],
    size: Sequence[int],
    key_channels: int | None = None,
    eps: float = EPS,
) -> Tensor:
    """`attend_reference`, slab by slab, forward and backward.

    Only the candidates as they are given, at their own resolutions, and the query are kept for the backward pass,
    which aligns every slab once more. An exported graph has one slab.
    """
    sources = _distinct(_sources(candidates, size))
    arguments = scaled(query, norm_scale), tuple(size), key_channels, eps
    if is_exporting():
        return _mix_slab_by_slab(*arguments, sources)
    return _StreamingAttention.apply(*arguments, *sources)


@torch.no_grad()
def streaming_weights(
    query: Tensor,
    norm_scale: Tensor | None,
    candidates: Sequence[Candidate],
    size: Sequence[int],
    key_channels: int | None = None,
    eps: float = EPS,
) -> Tensor:
    """a_k(p) of a call, slab by slab: (K, B, *size), at least float32; the arguments are those of `Attention`."""
    with _without_autocast(query):
        call = _StreamingCall(scaled(query, norm_scale), tuple(size), key_channels, eps, _sources(candidates, size))
        weights = call.query.new_empty(len(candidates[0].features), len(candidates), *size)
        for slab in call.slabs():
            slab.of(weights).copy_(call.read(slab).scores.softmax(dim=0).transpose(0, 1))
    return weights.transpose(0, 1)


def _mix_slab_by_slab(
    query: Tensor, size: tuple[int, ...], key_channels: int | None, eps: float, sources: Sequence[Tensor | None]
) -> Tensor:
    """The attention, given as `_StreamingAttention` is."""
    with _without_autocast(query):
        call = _StreamingCall(query, size, key_channels, eps, sources)
        mixture = call.new_mixture()
        for slab in call.slabs():
            read = call.read(slab)
            slab.of(mixture).copy_(_weighted_sum(read.scores.softmax(dim=0), call.values(read)))
    return mixture


class _StreamingAttention(torch.autograd.Function):
    """Attention whose softmax, and whose whole backward pass, see one slab of positions at a time.

    query: w * g. sources: all features, then all projections.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, size: tuple[int, ...], key_channels: int | None, eps: float, *sources: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(query, *sources)
        ctx.arguments = size, key_channels, eps
        return _mix_slab_by_slab(query, size, key_channels, eps, sources)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, *sources = ctx.saved_tensors
        with _without_autocast(query):
            size, key_channels, eps = ctx.arguments
            call = _StreamingCall(query, size, key_channels, eps, sources)
            query_gradient = torch.zeros_like(call.query)
            needed = ctx.needs_input_grad[-len(sources) :]
            count = len(call.alignments)
            for alignment, *wanted in zip(call.alignments, needed[:count], needed[count:], strict=True):
                alignment.start_gradients(*wanted)
            for slab in call.slabs():
                read = call.read(slab)
                gradient = slab.of(gradients[0]).to(call.query.dtype)
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
                    call.add_to_query(query_gradient, slab, along_query, key)
                    if not alignment.has_gradients:
                        continue
                    value_gradient = alignment.expand_adjoint(weights[k].unsqueeze(1) * gradient)
                    key_gradient = value_gradient if key is value else torch.zeros_like(key)
                    key_gradient.addcmul_(along_query.unsqueeze(1), call.query_at(slab))
                    alignment.add_squared_norm_adjoint(norm_gradients[k], key, key_gradient)
                    alignment.accumulate_gradients(
                        slab, value_gradient if key is value else torch.cat((key_gradient, value_gradient), dim=1)
                    )
        features_gradients, projection_gradients = zip(
            *(alignment.gradients() for alignment in call.alignments), strict=True
        )
        return (
            query_gradient.to(query.dtype),
            None,
            None,
            None,
            *(
                None if gradient is None else gradient.to(source.dtype)
                for source, gradient in zip(sources, [*features_gradients, *projection_gradients], strict=True)
            ),
        )


class _SlabReading(NamedTuple):
    """What the attention sees of one slab.

    partials: a tensor per candidate, see `SlabAlignment.partial`. inverse_rms, scores: (K, B, *slab size).
    """

    partials: Sequence[Tensor]
    inverse_rms: Tensor
    scores: Tensor


class _StreamingCall:
    """The arguments of one call, ready for arithmetic in float32 (float64 where the query is)."""

    def __init__(
        self,
        query: Tensor,
        size: tuple[int, ...],
        key_channels: int | None,
        eps: float,
        sources: Sequence[Tensor | None],
    ) -> None:
        dtype = torch.promote_types(query.dtype, torch.float32)
        count = len(sources) // 2
        self.query = query.to(dtype)
        self.query_is_field = query.ndim > 1
        self.query_channels = query.shape[1] if self.query_is_field else query.shape[0]
        self.size = size
        self.key_channels = key_channels
        self.eps = eps
        self.alignments = [
            # The product with a field does not commute with interpolation.
            SlabAlignment(features, projection, size, dtype, expand_last_axis=self.query_is_field)
            for features, projection in zip(sources[:count], sources[count:], strict=True)
            if features is not None
        ]

    def new_mixture(self) -> Tensor:
        # The last candidate is the stage's own input where there is one, and never an image in another precision.
        last = self.alignments[-1]
        value_channels = last.channels - (self.key_channels or 0)
        return last.features.new_empty(last.features.shape[0], value_channels, *self.size)

    def slabs(self) -> Iterator[Slab]:
        first = self.alignments[0]
        batch_size = first.features.shape[0]
        if is_exporting():
            # A loop would fix the batch size.
            return iter([Slab(slice(0, batch_size), slice(0, self.size[0]))])
        # A compiler would unroll the loop over many small slabs.
        known = {} if torch.compiler.is_compiling() else SLAB_NUMBERS
        numbers = known.get(self.query.device.type, SLAB_NUMBERS_ELSEWHERE)
        positions = max(1, numbers // (len(self.alignments) * first.channels))
        return slabs(batch_size, self.size, positions)

    def read(self, slab: Slab) -> _SlabReading:
        partials = [alignment.partial(slab) for alignment in self.alignments]
        squared_norms, products = [], []
        for alignment, partial in zip(self.alignments, partials, strict=True):
            key, _ = self.key_and_value(partial)
            squared_norms.append(alignment.squared_norm(key))
            products.append(alignment.expand(self._product_with_query(slab, key)))
        factors = inverse_rms(torch.stack(squared_norms) / self.query_channels, self.eps)
        return _SlabReading(partials, factors, torch.stack(products) * factors)

    def values(self, read: _SlabReading) -> Iterator[Tensor]:
        """The aligned values, one at a time."""
        for alignment, partial in zip(self.alignments, read.partials, strict=True):
            yield alignment.expand(self.key_and_value(partial)[1])

    def key_and_value(self, partial: Tensor) -> tuple[Tensor, Tensor]:
        if self.key_channels is None:
            return partial, partial
        return partial[:, : self.key_channels], partial[:, self.key_channels :]

    def query_at(self, slab: Slab) -> Tensor:
        """w, to be broadcast against keys."""
        return slab.of(self.query) if self.query_is_field else self.query.view(-1, *(1,) * len(self.size))

    def add_to_query(self, query_gradient: Tensor, slab: Slab, weight: Tensor, key: Tensor) -> None:
        """Add weight(p) key(p) to the query's gradient, at p or, for a vector, over all positions."""
        if self.query_is_field:
            slab.of(query_gradient).addcmul_(weight.unsqueeze(1), key)
        else:
            query_gradient += (key.flatten(2) @ weight.flatten(1).unsqueeze(2)).sum(dim=(0, 2))

    def _product_with_query(self, slab: Slab, key: Tensor) -> Tensor:
        if self.query_is_field:
            return dot(slab.of(self.query), key)
        return (self.query @ key.flatten(2)).unflatten(1, key.shape[2:])


def _sources(candidates: Sequence[Candidate], size: Sequence[int]) -> list[Tensor | None]:
    """All features, averaged down where they are finer than the target, then all projections."""
    features = [average_if_finer(candidate.features, size) for candidate in candidates]
    return [*features, *(candidate.projection for candidate in candidates)]


def _distinct(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Views in place of repeated tensors: torch.compile does not trace a function that is given one twice."""
    distinct: list[Tensor | None] = []
    for number, tensor in enumerate(tensors):
        # PyTorch 2.11 traces no `id` of a tensor that is computed.
        if tensor is not None and any(tensor is earlier for earlier in tensors[:number]):
            tensor = tensor.view_as(tensor)
        distinct.append(tensor)
    return distinct


def scaled(query: Tensor, norm_scale: Tensor | None) -> Tensor:
    """w * g, the only way in which the norm's scale enters."""
    if norm_scale is None:
        return query
    return query * norm_scale.view(-1, *(1,) * (query.ndim - 2)) if query.ndim > 1 else query * norm_scale


def _without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Full precision for norms, scores and softmax: squares overflow float16 above 255."""
    has_autocast = tensor.device.type not in ("meta", "mps")
    return torch.autocast(tensor.device.type, enabled=False) if has_autocast else nullcontext()


def _weighted_sum(weights: Tensor, values: Iterable[Tensor]) -> Tensor:
    """sum_k a_k v_k, whose values may come one at a time"""
    (first_weight, *others), values = weights.unsqueeze(2), iter(values)
    total = first_weight * next(values)
    for weight, value in zip(others, values, strict=True):
        total.addcmul_(weight, value)
    return total
