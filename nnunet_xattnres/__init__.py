"""Cross-stage attention residuals (XAttnRes, arXiv 2604.03297) for nnU-Net v2."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "BlockXAttnResConfig",
    "BlockXAttnResUNet",
    "XAttnResConfig",
    "XAttnResUNet",
    "build_network_from_plans",
    "plans_with_xattnres",
]

if TYPE_CHECKING:
    from nnunet_xattnres.architectures import BlockXAttnResUNet, XAttnResUNet, build_network_from_plans
    from nnunet_xattnres.model.config import BlockXAttnResConfig, XAttnResConfig
    from nnunet_xattnres.nnunet.xattnres_plans import plans_with_xattnres


def __getattr__(name: str) -> Any:
    # Imported on first use: `nnunet-xattnres trainers` runs in shell start-up files, and importing torch takes seconds.
    if name in __all__:
        of_other_modules = {"plans_with_xattnres": "nnunet.xattnres_plans"}
        module = "model.config" if name.endswith("Config") else of_other_modules.get(name, "architectures")
        return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
