"""The backends: ways to compute the function that `reference.py` defines."""

from collections.abc import Callable, Sequence
from types import ModuleType

from torch import Tensor

from nnunet_xattnres.common.errors import XAttnResError, type_and_message
from nnunet_xattnres.ops.context import log_fallback
from nnunet_xattnres.ops.native_operator import attend_native, check_native, is_served
from nnunet_xattnres.ops.reference import EPS, Attention, Candidate, Upsampled, attend_reference
from nnunet_xattnres.ops.streaming import attend_streaming


def attend_auto(
    query: Tensor,
    norm_scale: Tensor | None,
    candidates: Sequence[Candidate | Upsampled],
    size: Sequence[int],
    key_channels: int | None = None,
    eps: float = EPS,
) -> Tensor:
    """The fastest backend for a call, as far as is known without measuring: `native` for what it computes, else
    `streaming`."""
    if is_served(query, candidates, key_channels):
        return attend_native(query, norm_scale, candidates, size, eps=eps)
    return attend_streaming(query, norm_scale, candidates, size, key_channels, eps)


def attention_backend(name: str) -> Attention:
    """The function that computes the attention.

    Where `triton` is not installed, it is that of `streaming`, so that trained networks predict everywhere: a training
    calls `check_backend` before. Raises `XAttnResError` for a name that no backend has.
    """
    _check_name(name)
    return ATTENTION_BACKENDS[name]()


def chosen_backend(name: str, device: str, is_stage_level: bool) -> tuple[str, str]:
    """The backend that computes in single precision on a device, where a config has the backend `name`.

    With it, why `streaming` computes instead of the named backend, or on a CPU instead of `native`. Empty otherwise,
    and at block level, where all names but `reference` mean `streaming`.
    """
    if not is_stage_level and name != "reference":
        return "streaming", ""
    if name == "auto":
        name = "native" if device == "cpu" else "streaming"
    try:
        check_backend(name, device)
    except XAttnResError as error:
        return "streaming", str(error)
    return name, ""


def check_backend(name: str, device: str) -> None:
    """Raise `XAttnResError` for a backend that is not available here, or not on a device, by its name."""
    _check_name(name)
    if name == "native":
        check_native(device)
    if name == "triton":
        _triton_operator().check_device(device)


def _check_name(name: str) -> None:
    if name not in ATTENTION_BACKENDS:
        raise XAttnResError(f"the backend {name!r} is not available here: use one of {', '.join(ATTENTION_BACKENDS)}")


def _attend_triton() -> Attention:
    try:
        attend: Attention = _triton_operator().attend_triton
    except XAttnResError as error:
        log_fallback(str(error))
        return attend_streaming
    return attend


def _triton_operator() -> ModuleType:
    # Imported on request: Triton may be missing or broken, and its import takes time.
    try:
        from nnunet_xattnres.ops import triton_operator
    except Exception as error:
        raise XAttnResError(
            f"the backend 'triton' needs Triton, which cannot be imported ({type_and_message(error)}): pip install "
            "triton, or use the backend 'auto'"
        ) from error
    return triton_operator


# The backends by name. Each is a function that returns the backend, so that Triton is imported on request.
ATTENTION_BACKENDS: dict[str, Callable[[], Attention]] = {
    "auto": lambda: attend_auto,
    "reference": lambda: attend_reference,
    "streaming": lambda: attend_streaming,
    "native": lambda: attend_native,
    "triton": _attend_triton,
}
