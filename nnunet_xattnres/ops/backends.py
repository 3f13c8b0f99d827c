"""The backends: ways to compute the function that `reference.py` defines."""

from collections.abc import Callable

from nnunet_xattnres.common.errors import XAttnResError
from nnunet_xattnres.ops.reference import Attention, attend_reference
from nnunet_xattnres.ops.streaming import attend_streaming


def attention_backend(name: str) -> Attention:
    """The function that computes the attention. Raises `XAttnResError` for a backend that is not available here."""
    name = chosen_backend(name)
    if name not in ATTENTION_BACKENDS:
        raise XAttnResError(
            f"the backend {name!r} is not available here: use 'auto' or one of {', '.join(ATTENTION_BACKENDS)}"
        )
    return ATTENTION_BACKENDS[name]()


def chosen_backend(name: str) -> str:
    """The backend that a config's `backend` stands for."""
    return "streaming" if name == "auto" else name


def check_backend(name: str, device: str) -> None:
    """Raise `XAttnResError` for a backend that is not available here, or not on a device, by its name."""
    attention_backend(name)
    if name == "triton":
        from nnunet_xattnres.ops.triton_operator import check_device

        check_device(device)


def _attend_triton() -> Attention:
    # Imported on request: Triton may be missing, and its import takes time.
    try:
        from nnunet_xattnres.ops.triton_operator import attend_triton
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise XAttnResError(
            "the backend 'triton' needs Triton, which is not installed: pip install triton, or use 'auto'"
        ) from error
    return attend_triton


# The backends by name. Each is a function that returns the backend, so that Triton is imported on request.
ATTENTION_BACKENDS: dict[str, Callable[[], Attention]] = {
    "reference": lambda: attend_reference,
    "streaming": lambda: attend_streaming,
    "triton": _attend_triton,
}
