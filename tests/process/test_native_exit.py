"""The end of a process that has used the native backend."""

import subprocess
import sys

import pytest

from nnunet_xattnres.ops import native_library

USE = """
import sys
from concurrent.futures import ThreadPoolExecutor
import torch
from nnunet_xattnres.ops import native_library
from nnunet_xattnres.ops.native_operator import attend_native
from nnunet_xattnres.ops.reference import Candidate

if sys.argv[1] == "own":
    native_library.parallel_runner = lambda: None
torch.set_num_threads(3)
features = torch.randn(2, 32, 64, 64, requires_grad=True)

def use(_=None):
    attend_native(torch.ones(32), None, [Candidate(features, None)], (64, 64)).sum().backward()

use()
pool = ThreadPoolExecutor(2)
running = [pool.submit(use) for _ in range(8)]
running[0].result()
print("used")
"""


@pytest.mark.skipif(not native_library.is_available(), reason="no compiled library")
@pytest.mark.parametrize("threads", ["of PyTorch", "own"])
def test_it_ends_cleanly_while_threads_are_alive(threads):
    """Other calls may be running when the program has nothing more to do."""
    done = subprocess.run([sys.executable, "-c", USE, threads], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "used\n", "")
