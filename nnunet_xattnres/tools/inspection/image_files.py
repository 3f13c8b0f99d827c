"""The image files of cases, named as nnU-Net expects them."""

import re
from collections.abc import Sequence
from pathlib import Path

from nnunet_xattnres.common.errors import XAttnResError
from nnunet_xattnres.nnunet.folders import hint_if_unset


def find_cases(images: Sequence[Path], file_ending: str) -> dict[str, list[str]]:
    """The files of every case, in the order of its channels: CASE_0000, CASE_0001, ... with the dataset's ending.

    images: files, and folders of files. Other files in a folder are ignored.

    Raises `XAttnResError` if there is no image, for a file with another name, and for a missing or duplicate channel.
    """
    cases = _channels_by_case(images, file_ending)
    if not cases:
        raise XAttnResError(f"no image that ends in _0000{file_ending} in {', '.join(map(str, images))}")
    for case, channels in cases.items():
        missing = sorted(set(range(max(channels))) - channels.keys())
        if missing:
            names = ", ".join(f"{case}_{channel:04d}{file_ending}" for channel in missing)
            raise XAttnResError(f"{channels[max(channels)]} comes without {names}: add what is missing")
    return {case: [str(channels[number]) for number in sorted(channels)] for case, channels in cases.items()}


def _channels_by_case(images: Sequence[Path], file_ending: str) -> dict[str, dict[int, Path]]:
    pattern = re.compile(r"([^.].*)_(\d{4})" + re.escape(file_ending))
    cases: dict[str, dict[int, Path]] = {}
    for path in images:
        if not path.exists():
            hint = hint_if_unset("nnUNet_raw", path)
            raise XAttnResError(f"{path} does not exist: give images or a folder of images{hint}")
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            name = pattern.fullmatch(file.name)
            if name is not None:
                earlier = cases.setdefault(name[1], {}).setdefault(int(name[2]), file)
                if not earlier.samefile(file):
                    raise XAttnResError(f"{earlier} and {file} are the same channel of {name[1]}: leave one out")
            elif file is path:
                raise XAttnResError(f"{file} is not named as nnU-Net wants it: CASE_0000{file_ending}, _0001 and so on")
    return cases
