"""What a launched training gets: its seed, its threads, and on every GPU the same."""

import multiprocessing
import pickle
import random
import sys

import numpy as np
import torch
from nnunetv2.run import run_training

from nnunet_xattnres.benchmark import launch
from nnunet_xattnres.benchmark.launch import set_seeds


def test_seeds_fix_what_the_process_draws():
    def draw():
        return [np.random.random(), torch.rand(()).item(), random.random()]

    set_seeds(3)
    first = draw()
    set_seeds(3)
    assert draw() == first
    set_seeds(4)
    assert draw() != first


def test_nnunet_is_seeded_and_keeps_to_the_threads_of_the_cell(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(multiprocessing, "cpu_count", multiprocessing.cpu_count)
    monkeypatch.setattr(launch, "close_in_forks", lambda descriptor: None)
    # Whatever the installed command is called by, it is nnU-Net's own function.
    train = ["nnUNetv2_train", "999", "2d", "0", "-device", "cpu"]
    monkeypatch.setattr(run_training, "run_training", lambda *given, **options: seen.append(torch.rand(()).item()))
    threads = torch.get_num_threads()
    for seed in (3, 3, 4):
        monkeypatch.setattr(sys, "argv", ["launch", str(seed), "9", str(tmp_path), *train])
        (tmp_path / "checkpoint_final.pth").touch()
        # As it would be on a machine with other numbers of cores and threads.
        monkeypatch.setattr(multiprocessing, "cpu_count", lambda: threads + 1)
        launch.main()
        assert torch.get_num_threads() == threads
    assert seen[0] == seen[1] != seen[2]


def test_with_several_gpus_every_process_is_seeded(tmp_path, monkeypatch):
    drawn = {}

    def note(rank, *arguments):
        drawn[rank, arguments] = torch.rand(()).item()

    monkeypatch.setattr(run_training, "run_ddp", run_training.run_ddp)
    recorded = []
    monkeypatch.setattr(launch, "record_costs", lambda *given: recorded.append(given))
    launch.seed_every_gpu(3, tmp_path, 2)
    # nnU-Net sends it to processes of their own.
    seeded = pickle.loads(pickle.dumps(run_training.run_ddp))
    monkeypatch.setattr(run_training, "run_ddp", note)
    for rank in (0, 1):
        seeded(rank, "004", "2d")
    set_seeds(3)
    assert drawn[0, ("004", "2d")] == torch.rand(()).item()
    assert drawn[1, ("004", "2d")] != drawn[0, ("004", "2d")]
    # Once for all of them.
    assert recorded == [(tmp_path, "cuda", 2)]
