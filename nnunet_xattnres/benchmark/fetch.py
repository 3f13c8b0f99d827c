"""The command `nnunet-xattnres benchmark fetch`: tasks of the Medical Segmentation Decathlon from a public mirror."""

import hashlib
import os
import re
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

from nnunet_xattnres.common.errors import XAttnResError, suggestion
from nnunet_xattnres.common.files import make_writable_folder

MIRROR = "https://msd-for-monai.s3-us-west-2.amazonaws.com"
# The MD5 sums of these files in MONAI's DecathlonDataset (monai/apps/datasets.py).
MD5 = {
    "Task01_BrainTumour": "240a19d752f0d9e9101544901065d872",
    "Task02_Heart": "06ee59366e1e5124267b774dbd654057",
    "Task03_Liver": "a90ec6c4aa7f6a3d087205e23d4e6397",
    "Task04_Hippocampus": "9d24dba78a72977dbd1d2e110310f31b",
    "Task05_Prostate": "35138f08b1efaef89d7424d2bcc928db",
    "Task06_Lung": "8afd997733c7fc0432f71255ba4e52dc",
    "Task07_Pancreas": "4f7080cfca169fa8066d17ce6eb061e4",
    "Task08_HepaticVessel": "641d79e80ec66453921d997fbf12a29c",
    "Task09_Spleen": "410d4a301da4e5b2f6f86ec3ddba524e",
    "Task10_Colon": "bad7a188931dc2f6acf72b08eb6202d0",
}
CHUNK = 1 << 20
TIMEOUT_SECONDS = 60
NOTHING_LEFT = 416


def fetch(task: str, folder: Path) -> None:
    """Download `task`.tar to `folder`. An interrupted download is continued.

    Raises `XAttnResError` for an unknown task, if the mirror cannot be reached, if `folder` cannot be written to, and
    if the file has another MD5 sum than MONAI's.
    """
    name = _name(task)
    archive = folder / f"{name}.tar"
    if archive.is_file():
        print(f"Already there: {archive}")
        return
    make_writable_folder(folder, "-o")
    partial = archive.with_suffix(".tar.part")
    try:
        _download(f"{MIRROR}/{name}.tar", partial)
    except OSError as error:
        reason = getattr(error, "reason", None) or error.strerror or error
        raise XAttnResError(f"cannot download {MIRROR}/{name}.tar ({reason}): try again, it continues") from None
    if _md5(partial) != MD5[name]:
        partial.unlink()
        raise XAttnResError(f"{name}.tar has another MD5 sum than MONAI's file of that name: fetch it again")
    os.replace(partial, archive)
    print(f"{archive}: a dataset's path in a spec may name it")


def _name(task: str) -> str:
    number = re.fullmatch(r"(?:Task)?0*(\d+)", task)
    known = [name for name in MD5 if name == task or (number and int(name[4:6]) == int(number[1]))]
    if not known:
        near = suggestion(task, MD5) or f"there are {', '.join(MD5)}"
        raise XAttnResError(f"the Decathlon has no task {task}: {near}")
    return known[0]


def _download(url: str, partial: Path) -> None:
    there = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={there}-"} if there else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code == NOTHING_LEFT and there:
            return
        raise
    with response:
        # A server that does not support ranges sends the whole file.
        there = there if response.status == 206 else 0
        left = int(response.headers.get("Content-Length", 0))
        with partial.open("ab" if there else "wb") as file, _bar(there, there + left, partial.name) as bar:
            while chunk := response.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
    if left and partial.stat().st_size < there + left:
        raise ConnectionError("the connection has ended early")


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file, _bar(0, path.stat().st_size, "MD5 sum") as bar:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


def _bar(initial: int, total: int, description: str) -> "tqdm[None]":
    return tqdm(desc=description, initial=initial, total=total or None, unit="B", unit_scale=True, unit_divisor=1024)
