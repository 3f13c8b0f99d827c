"""The choice of a backend, and what is refused."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

from helpers.studies import load_study
from nnunet_xattnres.common.errors import XAttnResError
from nnunet_xattnres.model.config import BACKENDS
from nnunet_xattnres.ops import backends
from nnunet_xattnres.ops.backends import ATTENTION_BACKENDS, attention_backend
from nnunet_xattnres.ops.reference import Candidate


@pytest.fixture
def without_triton(monkeypatch):
    for module in ("nnunet_xattnres.ops.triton_operator", "nnunet_xattnres.ops.triton_kernels"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)


def test_every_backend_that_can_be_configured_is_there():
    assert set(BACKENDS) == set(ATTENTION_BACKENDS)


def test_a_backend_that_is_not_available_here_says_which_are():
    with pytest.raises(
        XAttnResError, match=r"'cuda' is not available here.*auto, reference, streaming, native, triton$"
    ):
        attention_backend("cuda")


@pytest.mark.usefixtures("without_triton")
def test_triton_is_imported_on_request_only():
    for file in Path(backends.__file__).parent.glob("*.py"):
        # A module that is run a second time takes its registered operator away when it ends.
        if not file.name.startswith("triton") and "custom_op(" not in file.read_text():
            runpy.run_path(str(file))


@pytest.mark.usefixtures("without_triton")
def test_a_missing_triton_is_named():
    with pytest.raises(XAttnResError, match=r"needs Triton, which is not installed: .*'auto'$"):
        attention_backend("triton")


def test_triton_on_the_cpu_asks_for_another_backend(monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed")
    from nnunet_xattnres.ops import triton_operator

    monkeypatch.setattr(triton_operator, "INTERPRETED", False)
    attend = attention_backend("triton")
    with pytest.raises(XAttnResError, match=r"needs CUDA.*on cpu.*'auto'$"):
        attend(torch.ones(2), torch.ones(2), [Candidate(torch.ones(1, 2, 4, 4), None)], (4, 4))


def test_the_kernels_compile_for_a_gpu_that_is_not_here(tmp_path, monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed")
    from nnunet_xattnres.ops import triton_kernels as kernels

    if kernels.INTERPRETED:
        pytest.skip("TRITON_INTERPRET is set")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    study = load_study("triton_kernels")
    compiler = study.Compiler(80)
    with torch.device("meta"):
        query, coarse, fine = torch.empty(20), torch.empty(1, 2, 2, 20).half(), torch.empty(1, 20, 2, 4).half()
    compiler.record(lambda: kernels.mix(query, [coarse], [fine], (2, 4), 1e-6))
    compiler.record(lambda: kernels.mix_gradients(fine, query, [coarse], [fine], 1e-6))
    for compiled, grid, arguments in compiler.launches:
        assert compiled.asm["cubin"]
        assert study.loads_of_launch(compiled, grid, arguments).total() >= fine.numel()
