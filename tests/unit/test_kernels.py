import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nnunet_xattnres.common.errors import XAttnResError
from nnunet_xattnres.model.config import BACKENDS
from nnunet_xattnres.ops.backends import ATTENTION_BACKENDS, attention_backend
from nnunet_xattnres.ops.reference import Candidate
from nnunet_xattnres.ops.streaming import attend_streaming

TESTS = Path(__file__).parent


@pytest.mark.long
def test_under_the_interpreter():
    """What `triton_cases.py` tests, in a process of its own: Triton is interpreted as a whole or not at all."""
    pytest.importorskip("triton", reason="Triton is not installed")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--noconftest",
        "-p",
        "no:cacheprovider",
        TESTS / "triton_cases.py",
    ]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=environment, cwd=TESTS.parents[1], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_kernels_compile_for_a_gpu_that_is_not_here(tmp_path, monkeypatch):
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    from nnunet_xattnres.ops import triton_kernels as kernels

    if kernels.INTERPRETED:
        pytest.skip("TRITON_INTERPRET is set")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tile = {"FACTORS": ((1, 2, 2), (1, 1, 1)), "CHANNELS": 20, "BLOCK_CHANNELS": 32, "TILE": 64, "EPS": 1e-6}
    part = {"ROWS": 2, "PARTS": 4, "TILE_X": 2, "TILE_SOURCES": 32, "CHANNELS": 20, "BLOCK_CHANNELS": 32}
    factors = {"FACTOR_Z": 1, "FACTOR_Y": 2, "FACTOR_X": 2}
    for kernel, options in (
        (kernels._mix_kernel, tile),
        (kernels._coefficients_kernel, tile | {"BLOCK_SOURCES": 2}),
        (kernels._source_gradient_kernel, part | factors),
    ):
        constants = options | {"PRECISION": triton.language.float32}
        types = {"sources": ("*fp16", "*fp16"), "source": "*fp16", "gradient": "*fp16", "mixture": "*fp16"}
        types |= {"source_parts": "*fp16", "query": "*fp32", "coefficients": "*fp32", "query_parts": "*fp32"}
        types |= dict.fromkeys(constants, "constexpr")
        signature = {name: types.get(name, "i32") for name in kernel.arg_names}
        source = triton.compiler.ASTSource(kernel, signature, constants)
        target = triton.backends.compiler.GPUTarget("cuda", 80, 32)
        assert triton.compile(source, target=target).asm["cubin"]


def test_a_missing_triton_is_named(monkeypatch):
    for module in ("nnunet_xattnres.ops.triton_operator", "nnunet_xattnres.ops.triton_kernels"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(XAttnResError, match=r"needs Triton, which is not installed: .*'auto'$"):
        attention_backend("triton")


def test_a_network_on_the_cpu_is_told_to_use_another_backend(monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed")
    from nnunet_xattnres.ops import triton_operator as kernels

    monkeypatch.setattr(kernels, "INTERPRETED", False)
    attend = attention_backend("triton")
    with pytest.raises(XAttnResError, match=r"needs a GPU.*'auto'$"):
        attend(torch.ones(2), torch.ones(2), [Candidate(torch.ones(1, 2, 4, 4), None)], (4, 4))


def test_every_backend_that_can_be_configured_is_there():
    assert set(BACKENDS) == {"auto", *ATTENTION_BACKENDS}


def test_auto_is_not_triton_and_triton_is_imported_on_request_only():
    assert attention_backend("auto") is attend_streaming
    code = "import sys, nnunet_xattnres.ops.backends; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=TESTS.parents[1]).returncode == 0
