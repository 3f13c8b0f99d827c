"""nnU-Net's own command, seeded: `python -m nnunet_xattnres.benchmark.launch SEED LOCK FOLDER nnUNetv2_train ...`.

SEED: set in Python, NumPy and torch before nnU-Net begins; with `-num_gpus` in the process of every GPU. It fixes the
initialisation and what the process itself draws. It does not fix augmentation, which nnU-Net does in worker processes
that seed themselves from the operating system.
LOCK: the number of the inherited file descriptor that holds the cell's lock.
FOLDER: nnU-Net's folder of the training, for the record of its costs.

On a CPU, nnU-Net takes as many threads as PyTorch does by itself: OMP_NUM_THREADS, if that is set.
"""

import importlib
import multiprocessing
import random
import sys
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import torch

from nnunet_xattnres.benchmark.cost_recording import record_costs
from nnunet_xattnres.benchmark.locks import close_in_forks


def main() -> None:
    seed, lock, folder, command, *arguments = sys.argv[1:]
    close_in_forks(int(lock))
    set_seeds(int(seed))
    keep_number_of_threads()
    (script,) = entry_points(group="console_scripts", name=command)
    run = script.load()
    if command == "nnUNetv2_train":
        if "-num_gpus" in arguments:
            num_gpus = int(arguments[arguments.index("-num_gpus") + 1])
            seed_every_gpu(int(seed), Path(folder), num_gpus)
        else:
            record_costs(Path(folder), device=arguments[arguments.index("-device") + 1])
    sys.argv = [command, *arguments]
    run()


def set_seeds(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def keep_number_of_threads() -> None:
    """Let nnU-Net use the number of threads that PyTorch uses now.

    With `-device cpu`, nnU-Net takes a thread for every core that it counts, even if several trainings share the cores.
    """
    threads = torch.get_num_threads()
    multiprocessing.cpu_count = lambda: threads


def seed_every_gpu(seed: int, folder: Path, num_gpus: int) -> None:
    """With `-num_gpus`, let nnU-Net's training process of every GPU run `run_on_gpu`."""
    from nnunetv2.run import run_training

    # Those processes import the function by the name of its module, which is not __main__ there.
    seeded = importlib.import_module("nnunet_xattnres.benchmark.launch").run_on_gpu
    run_training.run_ddp = partial(seeded, seed, folder, num_gpus)


def run_on_gpu(seed: int, folder: Path, num_gpus: int, rank: int, *arguments: object) -> None:
    """nnU-Net's training on one of several GPUs, seeded. Ranks draw different patches; the weights are rank 0's."""
    # In this new process the function is nnU-Net's own.
    from nnunetv2.run.run_training import run_ddp

    set_seeds(seed + 1000 * rank)
    if rank == 0:
        record_costs(folder, "cuda", num_gpus)
    run_ddp(rank, *arguments)


if __name__ == "__main__":
    main()
