"""nnU-Net's own command, seeded: `python -m nnunet_xattnres.benchmark.launch SEED LOCK FOLDER nnUNetv2_train ...`.

SEED is set in Python, NumPy and torch, before nnU-Net begins; with `-num_gpus` in the process of every GPU. That fixes
initialisation and what the process itself draws. nnU-Net's augmentation works in further processes, which seed
themselves from the operating system.

On a CPU, nnU-Net takes as many threads as PyTorch does by itself: OMP_NUM_THREADS, if that is set.

LOCK is the number of the inherited file descriptor that holds the cell's lock. FOLDER is nnU-Net's of the training: it
gets costs.json, on what it was trained and how much memory its process took at most.
"""

import importlib
import json
import multiprocessing
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from nnunet_xattnres.common.device import cpu_name
from nnunet_xattnres.common.files import write_json_atomically
from nnunet_xattnres.training.checkpoint import FINAL_CHECKPOINT

COSTS = "costs.json"
SAMPLING_SECONDS = 0.2
WRITING_SECONDS = 5.0


def main() -> None:
    seed, lock, folder, command, *arguments = sys.argv[1:]
    _keep_to_this_process(int(lock))
    set_seeds(int(seed))
    keep_number_of_threads()
    (script,) = entry_points(group="console_scripts", name=command)
    run = script.load()
    if command == "nnUNetv2_train":
        if "-num_gpus" in arguments:
            num_gpus = int(arguments[arguments.index("-num_gpus") + 1])
            _reach_every_gpu(int(seed), Path(folder), num_gpus)
        else:
            record_costs(Path(folder), num_gpus=int("cuda" in arguments))
    sys.argv = [command, *arguments]
    run()


def run_on_gpu(seed: int, folder: Path, num_gpus: int, rank: int, *arguments: object) -> None:
    """What nnU-Net does with every GPU, seeded: each draws other patches, the weights are those of rank 0."""
    # A new process, in which it is nnU-Net's own.
    from nnunetv2.run.run_training import run_ddp

    set_seeds(seed + 1000 * rank)
    if rank == 0:
        record_costs(folder, num_gpus)
    run_ddp(rank, *arguments)


def set_seeds(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def keep_number_of_threads() -> None:
    """Let nnU-Net have the threads that PyTorch has now: with `-device cpu` it takes one for every core that it counts,
    also where several trainings share the cores."""
    threads = torch.get_num_threads()
    multiprocessing.cpu_count = lambda: threads


def record_costs(folder: Path, num_gpus: int) -> None:
    """Keep in `folder`, until the training has ended, the device and the most memory that this process has had.

    num_gpus: 0 for the CPU, whose memory is how far the process grows from now on, without nnU-Net's workers; that of
        GPUs is what PyTorch has allocated on the first one.
    """
    # What only validates costs nothing of this.
    if not (folder / FINAL_CHECKPOINT).exists():
        used = _used_memory(num_gpus)
        arguments = (folder, _device(num_gpus), lambda: _used_memory(num_gpus) - used)
        threading.Thread(target=_record_costs, args=arguments, name=COSTS, daemon=True).start()


def recorded_costs(folder: Path) -> dict[str, Any]:
    """Of all attempts at the training: peak_memory_gb, None where unknown, and the devices, each once.

    A damaged file says nothing.
    """
    try:
        return json.loads((folder / COSTS).read_text())
    except (FileNotFoundError, ValueError):
        return {"peak_memory_gb": None, "devices": []}


def _device(num_gpus: int) -> str:
    """As reports name it: times and memory of different ones are not compared."""
    if not num_gpus:
        return f"{cpu_name()}, {torch.get_num_threads()} threads"
    return f"{num_gpus} x {torch.cuda.get_device_name()}" if num_gpus > 1 else torch.cuda.get_device_name()


def _used_memory(num_gpus: int) -> int:
    return torch.cuda.max_memory_allocated() if num_gpus else psutil.Process().memory_info().rss


def _record_costs(folder: Path, device: str, used_memory: Callable[[], int]) -> None:
    earlier = recorded_costs(folder)
    devices = list(dict.fromkeys([*earlier["devices"], device]))
    peak, written, last_look = earlier["peak_memory_gb"] or 0.0, -1.0, -WRITING_SECONDS
    ended = False
    while not ended:
        ended = (folder / FINAL_CHECKPOINT).exists()
        peak = max(peak, used_memory() / 1e9)
        if peak > written and (ended or time.monotonic() > last_look + WRITING_SECONDS):
            write_json_atomically({"peak_memory_gb": peak, "devices": devices}, folder / COSTS)
            written, last_look = peak, time.monotonic()
        if not ended:
            time.sleep(SAMPLING_SECONDS)


def _keep_to_this_process(descriptor: int) -> None:
    """Do not let forked workers have it: one that outlives this process would keep the lock."""
    inherited = [descriptor]

    def close() -> None:
        while inherited:
            os.close(inherited.pop())

    os.register_at_fork(after_in_child=close)


def _reach_every_gpu(seed: int, folder: Path, num_gpus: int) -> None:
    """With `-num_gpus`, nnU-Net trains in processes of their own."""
    from nnunetv2.run import run_training

    # By the module's name, under which those processes can import it.
    seeded = importlib.import_module("nnunet_xattnres.benchmark.launch").run_on_gpu
    run_training.run_ddp = partial(seeded, seed, folder, num_gpus)


if __name__ == "__main__":
    main()
