"""The compiled library of the native backend: where it is, and its calls. The C sources are in `native/`."""

import ctypes
import os
from collections.abc import Sequence
from ctypes import POINTER, Structure, byref, c_double, c_int64, c_void_p, cast
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from nnunet_xattnres.common.errors import XAttnResError

FILE = Path(__file__).with_name("native_attention.so")
ABI = 4


class Values(NamedTuple):
    """A projected candidate as the kernels read it.

    tensor: (B, *source_size, C), or (B, C, *size) if `channels_first`, contiguous.
    cells: the steps of a transposed convolution along z and y, (1, 1) otherwise. With cells, the tensor is
        (cells z * cells y, B, z / cells z, y / cells y, x, C).
    """

    tensor: Tensor
    source_size: Sequence[int]
    channels_first: bool = False
    cells: tuple[int, int] = (1, 1)


class _Candidate(Structure):
    _fields_ = (
        ("values", c_void_p),
        ("gradient", c_void_p),
        ("size", c_int64 * 3),
        ("cells", c_int64 * 2),
        ("channels_first", c_int64),
    )


class _Call(Structure):
    _fields_ = (
        ("candidates", POINTER(_Candidate)),
        ("query", c_void_p),
        ("gradient", c_void_p),
        ("output", c_void_p),
        ("count", c_int64),
        ("batch", c_int64),
        ("channels", c_int64),
        ("size", c_int64 * 3),
        ("eps", c_double),
        ("is_double", c_int64),
        ("threads", c_int64),
        ("parallel", c_void_p),
    )


class _Average(Structure):
    _fields_ = (
        ("values", c_void_p),
        ("output", c_void_p),
        ("planes", c_int64),
        ("size", c_int64 * 3),
        ("factor", c_int64 * 3),
        ("is_double", c_int64),
        ("threads", c_int64),
        ("parallel", c_void_p),
    )


@cache
def library() -> ctypes.CDLL:
    """The library. Raises `XAttnResError` if it is missing or does not fit this package or platform."""
    if not FILE.is_file():
        raise XAttnResError(
            "the backend 'native' has no compiled library here: install a C compiler, such as gcc, and install "
            "nnunet-xattnres again (until then the backend 'auto' takes 'streaming')"
        )
    try:
        loaded = ctypes.CDLL(str(FILE))
        abi = loaded.nnunet_xattnres_abi()
    except (OSError, AttributeError) as error:
        raise XAttnResError(
            f"the library of the backend 'native' cannot be loaded: install nnunet-xattnres again ({error})"
        ) from error
    if abi != ABI:
        raise XAttnResError(
            f"the library of the backend 'native' has interface {abi} and this package needs {ABI}: install "
            "nnunet-xattnres again"
        )
    for function in (loaded.nnunet_xattnres_forward, loaded.nnunet_xattnres_backward, loaded.nnunet_xattnres_average):
        function.restype = c_int64
    return loaded


def is_available() -> bool:
    """Whether the library is there and can be loaded."""
    return not why_not_available()


# A graph holds what is known when it is compiled.
@torch.compiler.assume_constant_result
def why_not_available() -> str:
    """Why the library cannot be used, in one line. Empty if it can."""
    return _problem()


# The answer stays: loading takes time.
@cache
def _problem() -> str:
    try:
        library()
    except XAttnResError as error:
        return str(error)
    return ""


@cache
def parallel_runner() -> int | None:
    """The address of GOMP_parallel in the OpenMP runtime that PyTorch has loaded, or None.

    A second pool of threads would compete with PyTorch's threads, which spin after every operator.
    """
    for file in sorted(Path(torch.__file__).parent.glob("lib/lib*omp*")):
        try:
            runtime = ctypes.CDLL(str(file), mode=os.RTLD_NOLOAD)
            return cast(runtime.GOMP_parallel, c_void_p).value
        except (OSError, AttributeError):
            continue
    return None


def mix(query: Tensor, values: Sequence[Values], batch: int, size: Sequence[int], eps: float) -> Tensor:
    """The mixture (B, C, *size) of candidates that are nowhere finer than `size`. query: w * g, (C,), contiguous."""
    mixture = query.new_empty(batch, len(query), *size)
    _run("forward", query, values, [None] * len(values), size, eps, None, mixture)
    return mixture


def mix_gradients(
    gradient: Tensor, query: Tensor, values: Sequence[Values], wanted: Sequence[bool], eps: float
) -> tuple[Tensor, list[Tensor | None]]:
    """The gradients of `mix` with respect to the query and to the values, in their layout, where `wanted`.

    Values that are channels last and at the target's resolution are overwritten by their gradient: the kernels read a
    row of them only for the row of the target that they compute. Fresh memory would cost time.

    gradient: of the mixture, contiguous.
    """
    size = tuple(gradient.shape[2:])
    gradients = [
        None if not want else each.tensor if _is_overwritten(each, size) else torch.empty_like(each.tensor)
        for each, want in zip(values, wanted, strict=True)
    ]
    query_gradient = torch.empty_like(query)
    _run("backward", query, values, gradients, gradient.shape[2:], eps, gradient, query_gradient)
    return query_gradient, gradients


def average(features: Tensor, factors: Sequence[int]) -> Tensor:
    """The area average of whole cells: (B, C, *source_size) -> (B, C, *size). features: contiguous.

    factors: by which each axis of the source is longer than that of the result.
    """
    size = [extent // factor for extent, factor in zip(features.shape[2:], factors, strict=True)]
    averaged = features.new_empty(*features.shape[:2], *size)
    call = _Average(
        features.data_ptr(),
        averaged.data_ptr(),
        features.shape[0] * features.shape[1],
        _three_axes(size),
        _three_axes(factors),
        features.dtype == torch.float64,
        torch.get_num_threads(),
        parallel_runner(),
    )
    _check_memory(library().nnunet_xattnres_average(byref(call)))
    return averaged


def _is_overwritten(values: Values, size: tuple[int, ...]) -> bool:
    return not values.channels_first and tuple(values.source_size) == size


def _run(
    direction: str,
    query: Tensor,
    values: Sequence[Values],
    gradients: Sequence[Tensor | None],
    size: Sequence[int],
    eps: float,
    gradient: Tensor | None,
    output: Tensor,
) -> None:
    candidates = (_Candidate * len(values))(
        *(
            _Candidate(
                each.tensor.data_ptr(),
                None if of_each is None else of_each.data_ptr(),
                _three_axes(each.source_size),
                (c_int64 * 2)(*each.cells),
                each.channels_first,
            )
            for each, of_each in zip(values, gradients, strict=True)
        )
    )
    call = _Call(
        candidates,
        query.data_ptr(),
        None if gradient is None else gradient.data_ptr(),
        output.data_ptr(),
        len(values),
        len(output if gradient is None else gradient),
        len(query),
        _three_axes(size),
        eps,
        query.dtype == torch.float64,
        torch.get_num_threads(),
        parallel_runner(),
    )
    _check_memory(getattr(library(), f"nnunet_xattnres_{direction}")(byref(call)))


def _check_memory(missing: int) -> None:
    """missing: bytes that the library could not allocate."""
    if missing:
        raise MemoryError(
            f"the backend 'native' cannot allocate {missing / 1e6:.1f} MB for its buffers: free memory, or choose a "
            "smaller patch or batch size"
        )


def _three_axes(size: Sequence[int]) -> ctypes.Array[c_int64]:
    """(z, y, x) of a 3D or a 2D size."""
    return (c_int64 * 3)(*(1,) * (3 - len(size)), *size)
