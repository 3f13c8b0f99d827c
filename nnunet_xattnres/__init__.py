"""Cross-stage attention residuals (XAttnRes, arXiv 2604.03297) for nnU-Net v2."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["BlockXAttnResConfig", "BlockXAttnResUNet", "XAttnResConfig", "XAttnResUNet", "build_network_from_plans"]

if TYPE_CHECKING:
    from nnunet_xattnres.architectures import BlockXAttnResUNet, XAttnResUNet, build_network_from_plans
    from nnunet_xattnres.model.config import BlockXAttnResConfig, XAttnResConfig


def __getattr__(name: str) -> Any:
    # Imported on first use: `nnunet-xattnres trainers` runs in shell start-up files, and importing torch takes seconds.
    if name in __all__:
        module = "model.config" if name.endswith("Config") else "architectures"
        return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
