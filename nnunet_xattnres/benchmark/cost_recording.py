"""The device, the versions and the peak memory of a training, recorded in its folder while it runs."""

import json
import statistics
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from nnunet_xattnres.common.device import PeakMemory, cpu_name
from nnunet_xattnres.common.files import write_json_atomically
from nnunet_xattnres.training.checkpoint import FINAL_CHECKPOINT

COSTS = "costs.json"
RECORDED_VERSIONS = ("nnunet-xattnres", "nnunetv2", "torch", "numpy")
# Between the names of devices, or versions, if a training was continued with others.
SEVERAL = " and "
# Between the name of a device and the report that a training comes from, see `collecting.take_over`.
OF_REPORT = ", report "
SAMPLING_SECONDS = 0.2
WRITING_SECONDS = 5.0


def record_costs(folder: Path, device: str, num_gpus: int = 1) -> None:
    """Record in `folder`, until the training has ended, the device, the versions and the peak memory of this process.

    device: "cpu", "cuda" or "mps". Memory on a CPU is the growth of this process from now on, without nnU-Net's
        workers. Memory on GPUs is what PyTorch has allocated on the first one.
    """
    # A process that only validates has no costs of a training.
    if not (folder / FINAL_CHECKPOINT).exists():
        memory = PeakMemory(torch.device(device))
        arguments = (folder, _device_name(device, num_gpus), memory)
        threading.Thread(target=_record, args=arguments, name=COSTS, daemon=True).start()


def logged_times(logged: dict[str, Any]) -> dict[str, Any]:
    """epochs and seconds_per_epoch (the median). logged: what a checkpoint holds of nnU-Net's log."""
    times = zip(logged["epoch_start_timestamps"], logged["epoch_end_timestamps"], strict=True)
    seconds = [end - start for start, end in times]
    return {"epochs": len(seconds), "seconds_per_epoch": statistics.median(seconds)}


def recorded_costs(folder: Path) -> dict[str, Any]:
    """Over all attempts at a training: peak_memory_gb, None if unknown; device and versions, each "" if unknown."""
    recorded = _recorded(folder)
    joined = {"device": SEVERAL.join(recorded["devices"]), "versions": SEVERAL.join(recorded["versions"])}
    return {"peak_memory_gb": recorded["peak_memory_gb"]} | joined


def _recorded(folder: Path) -> dict[str, Any]:
    """The content of the file of costs. A damaged file counts as no record."""
    nothing: dict[str, Any] = {"peak_memory_gb": None, "devices": [], "versions": []}
    try:
        return nothing | json.loads((folder / COSTS).read_text())
    except (FileNotFoundError, ValueError):
        return nothing


def _versions() -> str:
    packages = [f"{package} {version(package)}" for package in RECORDED_VERSIONS]
    return "; ".join([*packages, f"python {sys.version.split()[0]}"])


def _device_name(device: str, num_gpus: int) -> str:
    """The device's name in reports, which compare time and memory between trainings on one device only."""
    if device == "mps":
        return f"{cpu_name()}, MPS"
    if device == "cpu":
        return f"{cpu_name()}, {torch.get_num_threads()} threads"
    return f"{num_gpus} x {torch.cuda.get_device_name()}" if num_gpus > 1 else torch.cuda.get_device_name()


def _record(folder: Path, device: str, memory: PeakMemory) -> None:
    earlier = _recorded(folder)
    devices = list(dict.fromkeys([*earlier["devices"], device]))
    versions = list(dict.fromkeys([*earlier["versions"], _versions()]))
    peak, written, last_writing = earlier["peak_memory_gb"] or 0.0, -1.0, -WRITING_SECONDS
    has_ended = False
    while not has_ended:
        has_ended = (folder / FINAL_CHECKPOINT).exists()
        memory.sample()
        peak = max(peak, memory.peak / 1e9)
        if peak > written and (has_ended or time.monotonic() > last_writing + WRITING_SECONDS):
            costs = {"peak_memory_gb": peak, "devices": devices, "versions": versions}
            write_json_atomically(costs, folder / COSTS)
            written, last_writing = peak, time.monotonic()
        if not has_ended:
            time.sleep(SAMPLING_SECONDS)
