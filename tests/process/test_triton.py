"""The Triton backend under Triton's interpreter, in a process of its own: Triton is interpreted as a whole or not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

CASES = Path(__file__).with_name("triton_cases.py")


def run_cases(*options: str) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    alone = ("--noconftest", "-p", "no:cacheprovider", "-p", "no:xdist")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *alone, *options, CASES],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=CASES.parents[2],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_cases_pass_under_the_interpreter():
    run_cases()


@pytest.mark.slow
def test_the_slow_cases_pass_under_the_interpreter():
    run_cases("-m", "slow")
