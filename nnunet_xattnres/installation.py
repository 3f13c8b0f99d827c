"""Where the plugin is installed and whether nnU-Net can use it from there."""

import importlib.util
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from nnunet_xattnres.errors import XAttnResError

# The first nnU-Net release that looks for trainers in the folders of `nnUNet_extTrainer`
# and passes plans to `build_network_architecture`.
MINIMUM_NNUNET = (2, 8)


def trainers_folder() -> Path:
    """The folder of this plugin's trainers, for the environment variable `nnUNet_extTrainer`."""
    spec = importlib.util.find_spec("nnunet_xattnres.trainers")
    if spec is None or not spec.submodule_search_locations:
        raise XAttnResError("nnunet-xattnres is not installed completely (no trainers): reinstall it with pip")
    return Path(spec.submodule_search_locations[0])


def check_nnunet_version() -> None:
    """Raise `XAttnResError` unless the installed nnU-Net finds external trainers."""
    required = ".".join(map(str, MINIMUM_NNUNET))
    try:
        installed = version("nnunetv2")
    except PackageNotFoundError:
        raise XAttnResError(f"nnunetv2 is not installed: pip install 'nnunetv2>={required}'") from None
    if tuple(int(part) for part in installed.split(".")[:2]) < MINIMUM_NNUNET:
        raise XAttnResError(
            f"nnunetv2 {installed} is too old to find external trainers (nnUNet_extTrainer): "
            f"pip install --upgrade 'nnunetv2>={required}'"
        )
