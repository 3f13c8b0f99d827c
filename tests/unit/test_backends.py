"""The choice of a backend, and what is refused."""

import runpy
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from helpers.studies import load_study
from nnunet_xattnres import ops
from nnunet_xattnres.common.errors import XAttnResError
from nnunet_xattnres.model.config import BACKENDS, XAttnResConfig
from nnunet_xattnres.model.stage_level import HistoryAttention
from nnunet_xattnres.ops import backends, context
from nnunet_xattnres.ops.backends import ATTENTION_BACKENDS, attention_backend, check_backend, chosen_backend
from nnunet_xattnres.ops.reference import attend_reference
from nnunet_xattnres.ops.streaming import attend_streaming


@pytest.fixture
def without_triton(monkeypatch):
    for module in ("triton_operator", "triton_kernels"):
        monkeypatch.delitem(sys.modules, f"nnunet_xattnres.ops.{module}", raising=False)
        monkeypatch.delattr(ops, module, raising=False)
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


@pytest.fixture
def log(caplog):
    """What this package has logged. Nothing has been before. PyTorch logs what it compiles."""
    context._warn.cache_clear()
    yield lambda: [record.getMessage() for record in caplog.records if record.name == "nnunet_xattnres"]
    context._warn.cache_clear()


class TestWithoutTriton:
    """A training refuses the backend that its config names. A trained network predicts, and says so once."""

    @pytest.fixture(autouse=True)
    def _without_triton(self, without_triton):
        pass

    def test_a_training_says_what_to_do(self, log):
        with pytest.raises(XAttnResError, match=r"needs Triton, which cannot be imported \(ModuleNot.*'auto'$"):
            check_backend("triton", "cuda")
        assert log() == []

    def test_what_computes_is_known_with_the_reason(self):
        backend, why = chosen_backend("triton", "cuda", is_stage_level=True)
        assert backend == "streaming" and "cannot be imported" in why

    def test_a_trained_network_is_built_and_predicts(self, log):
        assert attention_backend("triton") is attention_backend("triton") is attend_streaming
        (line,) = log()
        assert "cannot be imported" in line and line.endswith("'streaming' computes instead")

    def test_a_triton_that_is_broken(self, monkeypatch, tmp_path):
        (tmp_path / "triton.py").write_text("raise OSError('libcuda.so is too old')")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "triton")
        with pytest.raises(XAttnResError, match=r"\(OSError: libcuda.so is too old\): pip install"):
            check_backend("triton", "cuda")

    def test_a_triton_whose_language_is_broken(self, monkeypatch, log):
        monkeypatch.setitem(sys.modules, "triton", ModuleType("triton"))
        monkeypatch.setitem(sys.modules, "triton.language", None)
        with pytest.raises(XAttnResError, match=r"cannot be imported \(ModuleNot.*triton.language.*'auto'$"):
            check_backend("triton", "cuda")
        assert attention_backend("triton") is attend_streaming
        (line,) = log()
        assert "triton.language" in line and line.endswith("'streaming' computes instead")


class TestTritonOnADevice:
    @pytest.fixture(autouse=True)
    def _compiled(self, monkeypatch):
        operator = pytest.importorskip("nnunet_xattnres.ops.triton_operator", reason="Triton is not installed")
        monkeypatch.setattr(operator, "INTERPRETED", False)

    @pytest.fixture
    def capability(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        return lambda *version: monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: version)

    def test_a_training_on_a_cpu_is_refused(self):
        with pytest.raises(XAttnResError, match=r"needs CUDA.*on cpu.*'auto'$"):
            check_backend("triton", "cpu")

    def test_a_trained_network_predicts_on_a_cpu(self, log):
        network = HistoryAttention(2, [3], XAttnResConfig(backend="triton"))
        x, h = torch.randn(1, 2, 4, 4), torch.randn(1, 3, 2, 2)
        expected = network(x, [h])
        network.attend = attend_reference
        torch.testing.assert_close(expected, network(x, [h]))
        network.attend = attention_backend("triton")
        assert torch.equal(network(x, [h]), expected)
        (line,) = log()
        assert "needs CUDA" in line and line.endswith("'streaming' computes instead")

    def test_a_compiled_network_predicts_on_a_cpu(self, log):
        torch._dynamo.reset()
        network = HistoryAttention(2, [3], XAttnResConfig(backend="triton"))
        x, h = torch.randn(1, 2, 4, 4), torch.randn(1, 3, 2, 2)
        compiled = torch.compile(network, fullgraph=True, backend="eager")
        computed = compiled(x, [h])
        (line,) = log()
        assert "needs CUDA" in line and line.endswith("'streaming' computes instead")
        torch.testing.assert_close(computed, network(x, [h]))

    @pytest.mark.parametrize("compiles", [False, True])
    def test_what_its_kernels_do_not_compute_is_streamed_and_logged(self, compiles, log, monkeypatch):
        torch._dynamo.reset()
        monkeypatch.setattr("nnunet_xattnres.ops.triton_operator.INTERPRETED", True)
        network = HistoryAttention(513, [3], XAttnResConfig(backend="triton"))
        x, h = torch.randn(1, 513, 2, 2), torch.randn(1, 3, 2, 2)
        computed = (torch.compile(network, fullgraph=True, backend="eager") if compiles else network)(x, [h])
        (line,) = log()
        assert "up to 512 channels" in line and line.endswith("'streaming' computes instead")
        network.attend = attend_streaming
        torch.testing.assert_close(computed, network(x, [h]))

    def test_what_computes_is_known_with_the_reason(self, capability):
        assert chosen_backend("triton", "cpu", is_stage_level=False) == ("streaming", "")
        backend, why = chosen_backend("triton", "cpu", is_stage_level=True)
        assert backend == "streaming" and "needs CUDA, and the network is on cpu" in why
        capability(9, 0)
        assert chosen_backend("triton", "cuda", is_stage_level=True) == ("triton", "")

    @pytest.mark.parametrize("version", [(5, 2), (7, 5)])
    def test_a_gpu_that_is_too_old(self, capability, version):
        capability(*version)
        here = ".".join(map(str, version))
        with pytest.raises(XAttnResError, match=rf"capability 8.0, and {here} is that of this GPU: use the .* 'auto'$"):
            check_backend("triton", "cuda")

    @pytest.mark.parametrize("version", [(8, 0), (9, 0), (12, 0)])
    def test_a_gpu_that_is_not(self, capability, version):
        capability(*version)
        check_backend("triton", "cuda")

    @pytest.mark.parametrize("version", ["3.3.0", "3.4.0"])
    def test_a_triton_that_is_too_old(self, capability, monkeypatch, version):
        capability(9, 0)
        monkeypatch.setattr("triton.__version__", version)
        backend, why = chosen_backend("triton", "cuda", is_stage_level=True)
        assert backend == "streaming"
        assert why == (
            f"the backend 'triton' needs Triton 3.5 (PyTorch 2.9), and {version} is installed: update PyTorch, or use "
            "the backend 'auto'"
        )

    @pytest.mark.parametrize("version", ["3.5.0", "3.10.0"])
    def test_a_triton_that_is_not(self, capability, monkeypatch, version):
        capability(9, 0)
        monkeypatch.setattr("triton.__version__", version)
        assert chosen_backend("triton", "cuda", is_stage_level=True) == ("triton", "")

    def test_under_the_interpreter_every_device_does(self, capability, monkeypatch):
        monkeypatch.setattr("nnunet_xattnres.ops.triton_operator.INTERPRETED", True)
        capability(7, 0)
        check_backend("triton", "cuda")
        check_backend("triton", "cpu")


@pytest.mark.parametrize("target, binary", [(("cuda", 80, 32), "cubin"), (("hip", "gfx90a", 64), "hsaco")])
@pytest.mark.parametrize("channels, dtype", [(20, torch.float16), (20, torch.float32), (5, torch.float64)])
def test_the_kernels_compile_for_a_gpu_that_is_not_here(target, binary, channels, dtype, tmp_path, monkeypatch):
    compiler_of_triton = pytest.importorskip("triton.backends.compiler", reason="Triton is not installed")
    from nnunet_xattnres.ops import triton_kernels as kernels

    if kernels.INTERPRETED:
        pytest.skip("TRITON_INTERPRET is set")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.version, "hip", "7.0" if binary == "hsaco" else None)
    study = load_study("triton_kernels")
    compiler = study.Compiler(compiler_of_triton.GPUTarget(*target))
    with torch.device("meta"):
        query = torch.empty(channels)
        coarse, fine = torch.empty(1, 2, 2, channels, dtype=dtype), torch.empty(1, channels, 2, 4, dtype=dtype)
    compiler.record(lambda: kernels.mix(query, [coarse], [fine], (2, 4), 1e-6))
    compiler.record(lambda: kernels.mix_gradients(fine, query, [coarse], [fine], 1e-6))
    for launch in compiler.launches:
        assert launch[0].asm[binary]
        # The study follows no branch that depends on values, as those of exponentials in double precision do.
        if binary == "cubin" and dtype != torch.float64:
            assert study.accesses_of_launches([launch]).total() >= fine.numel()
