"""nnU-Net's commands, called through their entry points in the process of the test."""

import multiprocessing
import runpy
import sys
from collections.abc import Mapping
from importlib.metadata import entry_points

import pytest
import torch

from helpers.training import run_in_threads
from nnunet_xattnres.nnunet.commands import NnUNet


class InProcess(NnUNet):
    """Runs commands where the test runs: no log is written, errors are nnU-Net's own. See `run_in_threads`."""

    def run(self, *command: str, log: str, environment: Mapping[str, str] | None = None) -> None:
        threads = torch.get_num_threads()
        # The planner makes nnUNet_n_proc_DA a number of threads and cannot have none.
        workers = "1" if "plan" in command[0] else "0"
        with pytest.MonkeyPatch.context() as patch:
            run_in_threads(self, patch)
            for name, value in ({"nnUNet_n_proc_DA": workers} | dict(environment or {})).items():
                patch.setenv(name, value)
            # nnU-Net takes a thread for every core that it counts, also where several workers share the cores.
            patch.setattr(multiprocessing, "cpu_count", lambda: threads)
            try:
                if command[0] == sys.executable:
                    patch.setattr(sys, "argv", list(command[2:]))
                    runpy.run_module(command[2], run_name="__main__")
                else:
                    patch.setattr(sys, "argv", list(command))
                    (script,) = entry_points(group="console_scripts", name=command[0])
                    script.load()()
            finally:
                torch.set_num_threads(threads)
