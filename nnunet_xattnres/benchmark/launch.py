"""nnU-Net's own command, seeded: `python -m nnunet_xattnres.benchmark.launch SEED LOCK FOLDER nnUNetv2_train ...`.

SEED is set in Python, NumPy and torch, before nnU-Net begins; with `-num_gpus` in the process of every GPU. That fixes
initialisation and what the process itself draws. nnU-Net's augmentation works in further processes, which seed
themselves from the operating system.

On a CPU, nnU-Net takes as many threads as PyTorch does by itself: OMP_NUM_THREADS, if that is set.

LOCK is the number of the inherited file descriptor that holds the cell's lock. FOLDER is nnU-Net's of the training: it
gets memory.json, what the training's process took at most.
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

import numpy as np
import psutil
import torch

from nnunet_xattnres.checkpoint import FINAL_CHECKPOINT
from nnunet_xattnres.plans import write_json_atomically

MEMORY = "memory.json"
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
            _reach_every_gpu(int(seed), Path(folder))
        else:
            record_memory(Path(folder), on_gpu="cuda" in arguments)
    sys.argv = [command, *arguments]
    run()


def run_on_gpu(seed: int, folder: Path, rank: int, *arguments: object) -> None:
    """What nnU-Net does with every GPU, seeded: each draws other patches, the weights are those of rank 0."""
    # A new process, in which it is nnU-Net's own.
    from nnunetv2.run.run_training import run_ddp

    set_seeds(seed + 1000 * rank)
    if rank == 0:
        record_memory(folder, on_gpu=True)
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


def record_memory(folder: Path, on_gpu: bool) -> None:
    """Keep in `folder`, until the training has ended, the most memory that this process has had.

    on_gpu: what PyTorch has allocated there; else how far the process grows from now on, without nnU-Net's workers.
    """
    used = _used_memory(on_gpu)
    threading.Thread(target=_record_memory, args=(folder, lambda: _used_memory(on_gpu) - used), daemon=True).start()


def recorded_memory(folder: Path) -> float | None:
    """In GB, of all attempts at the training; None where nothing is recorded, or the file is damaged."""
    try:
        return json.loads((folder / MEMORY).read_text())["peak_memory_gb"]
    except (FileNotFoundError, ValueError):
        return None


def _used_memory(on_gpu: bool) -> int:
    return torch.cuda.max_memory_allocated() if on_gpu else psutil.Process().memory_info().rss


def _record_memory(folder: Path, used_memory: Callable[[], int]) -> None:
    recorded = recorded_memory(folder) or 0.0
    peak, last_look = recorded, -WRITING_SECONDS
    while not (folder / FINAL_CHECKPOINT).exists():
        peak = max(peak, used_memory() / 1e9)
        if peak > recorded and time.monotonic() > last_look + WRITING_SECONDS:
            write_json_atomically({"peak_memory_gb": peak}, folder / MEMORY)
            recorded, last_look = peak, time.monotonic()
        time.sleep(SAMPLING_SECONDS)
    if peak > recorded:
        write_json_atomically({"peak_memory_gb": peak}, folder / MEMORY)


def _keep_to_this_process(descriptor: int) -> None:
    """Do not let forked workers have it: one that outlives this process would keep the lock."""
    inherited = [descriptor]

    def close() -> None:
        while inherited:
            os.close(inherited.pop())

    os.register_at_fork(after_in_child=close)


def _reach_every_gpu(seed: int, folder: Path) -> None:
    """With `-num_gpus`, nnU-Net trains in processes of their own."""
    from nnunetv2.run import run_training

    # By the module's name, under which those processes can import it.
    seeded = importlib.import_module("nnunet_xattnres.benchmark.launch").run_on_gpu
    run_training.run_ddp = partial(seeded, seed, folder)


if __name__ == "__main__":
    main()
