"""Cross-stage attention residuals (XAttnRes, arXiv 2604.03297) for nnU-Net v2."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["BlockXAttnResConfig", "BlockXAttnResUNet", "XAttnResConfig", "XAttnResUNet", "build_network_from_plans"]

if TYPE_CHECKING:
    from nnunet_xattnres.config import BlockXAttnResConfig, XAttnResConfig
    from nnunet_xattnres.network import BlockXAttnResUNet, XAttnResUNet, build_network_from_plans


def __getattr__(name: str) -> Any:
    # Imported on first use: `nnunet-xattnres trainers` runs in shell start-up files, importing torch takes seconds.
    if name in __all__:
        from nnunet_xattnres import config, network

        return getattr(config if name.endswith("Config") else network, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
