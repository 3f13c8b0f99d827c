"""The command `nnunet-xattnres doctor`, in environments that lack something."""

import errno
import importlib
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from helpers.overhead import write_small_plans
from nnunet_xattnres import ops, plans_with_xattnres
from nnunet_xattnres.cli import main
from nnunet_xattnres.common import files
from nnunet_xattnres.nnunet.installation import list_trainers, trainers_folder
from nnunet_xattnres.ops import native_library
from nnunet_xattnres.tools import doctor
from nnunet_xattnres.tools.doctor import NOTE, OK, PROBLEM

CHECKOUT = Path(__file__).parents[2]
EXPORT = 'export nnUNet_extTrainer="${nnUNet_extTrainer:+$nnUNet_extTrainer:}$(nnunet-xattnres trainers)"'
PLANS = "plans that carry XAttnRes need no trainer of this plugin: nnunet-xattnres plans -d DATASET"


class Line(NamedTuple):
    """A line of the command's, and the exit status of the command."""

    status: str
    text: str
    exit_status: int


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """An environment in which training works, and one trainer to look for: all of them take a second."""
    monkeypatch.setattr(doctor, "list_trainers", lambda: [("nnUNetTrainerXAttnRes", "")])
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("nnUNet_extTrainer", str(trainers_folder()))
    monkeypatch.delenv("nnUNet_compile", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def import_triton(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], None]:
    """Let the command, though not PyTorch, find Triton of a version, or none."""

    def set_version(version: str | None) -> None:
        def import_module(name: str) -> Any:
            if name != "triton":
                return importlib.import_module(name)
            if version is None:
                raise ModuleNotFoundError("No module named 'triton'", name=name)
            return SimpleNamespace(__version__=version)

        monkeypatch.setattr(doctor, "import_module", import_module)

    return set_version


@pytest.fixture
def examine(capsys: pytest.CaptureFixture[str]) -> Callable[[str], Line]:
    """Run the command, and find the line that mentions `about`."""

    def run(about: str) -> Line:
        exit_status = main(["doctor"])
        (line,) = (line for line in capsys.readouterr().out.splitlines() if about in line)
        status, text = line.split(maxsplit=1)
        return Line(status, text, exit_status)

    return run


def test_where_training_works_all_is_well(examine, monkeypatch):
    monkeypatch.setattr(doctor, "list_trainers", list_trainers)
    line = examine("nnU-Net finds")
    assert line.status == OK
    assert line.text == f"nnU-Net finds all {len(list(list_trainers()))} trainers of this plugin"
    assert line.exit_status == 0


def test_the_exit_status_is_that_of_the_lines(capsys, monkeypatch):
    assert main(["doctor"]) == 0
    captured = capsys.readouterr()
    assert PROBLEM not in captured.out
    assert captured.err == ""
    monkeypatch.delenv("nnUNet_raw")
    monkeypatch.delenv("nnUNet_results")
    assert main(["doctor"]) == 1
    captured = capsys.readouterr()
    assert captured.out.count(f"{PROBLEM} ") == 2
    assert captured.err == "nnunet-xattnres: training would not work: mend the 2 marked PROBLEM\n"


class TestNativeBackend:
    @pytest.mark.skipif(not native_library.is_available(), reason="no compiled library")
    def test_it_computes(self, examine):
        line = examine("'native'")
        assert line.status == OK
        assert line.text.startswith("the backend 'native' computes on a CPU, with ")

    def test_without_its_library_training_works(self, examine, monkeypatch, tmp_path):
        monkeypatch.setattr(native_library, "FILE", tmp_path / "missing.so")
        native_library.library.cache_clear()
        line = examine("'native'")
        native_library.library.cache_clear()
        assert line.status == NOTE
        assert "install a C compiler, such as gcc, and install nnunet-xattnres again" in line.text
        assert line.exit_status == 0


class TestVersions:
    @pytest.mark.parametrize("package", ["nnunetv2", "torch", "dynamic-network-architectures"])
    def test_are_named(self, examine, package):
        version = doctor.installed_version(package)
        assert version is not None
        assert examine(f"{package} {version}").status == OK

    @pytest.mark.parametrize(
        "package, other", [("torch", "2.9.1"), ("torch", "2.6.0"), ("dynamic-network-architectures", "0.3")]
    )
    def test_that_nnunet_or_this_plugin_excludes(self, examine, monkeypatch, package, other):
        installed = doctor.installed_version
        monkeypatch.setattr(doctor, "installed_version", lambda name: other if name == package else installed(name))
        line = examine(f"{package} {other}")
        assert line.status == PROBLEM
        assert line.text.startswith(f"{package} {other} does not fit nnU-Net with this plugin, which needs ")
        assert f"pip install '{package}" in line.text
        assert line.exit_status == 1


class TestBrokenInstallation:
    def test_what_nnunet_needs(self, examine, monkeypatch):
        def import_module(name: str) -> Any:
            if name.startswith("nnunetv2."):
                raise ModuleNotFoundError("No module named 'dynamic_network_architectures.initialization'")
            return importlib.import_module(name)

        monkeypatch.setattr(doctor, "import_module", import_module)
        line = examine("nnU-Net cannot be imported")
        reason = "ModuleNotFoundError: No module named 'dynamic_network_architectures.initialization'"
        assert line.status == PROBLEM
        assert line.text.startswith(f"nnU-Net cannot be imported ({reason}): pip install 'nnunetv2")
        assert line.exit_status == 1
        assert examine("were not looked at").text.endswith("trainers were not looked at: they need nnU-Net")

    @pytest.mark.parametrize("remains", [False, True])
    def test_nnunet_is_not_there(self, examine, monkeypatch, remains):
        def version(package: str) -> str | None:
            """importlib.metadata's, where a package is missing or its folder of metadata is empty."""
            if remains:
                return None
            raise PackageNotFoundError(package)

        monkeypatch.setattr("nnunet_xattnres.nnunet.installation.version", version)
        line = examine("nnunetv2 ")
        assert line.status == PROBLEM
        assert line.text.startswith("nnunetv2 is not installed: pip install 'nnunetv2")


@pytest.mark.parametrize("variable", ["nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"])
class TestFolders:
    def test_that_is_there(self, examine, variable):
        line = examine(f" {variable} ")
        assert line.status == OK
        assert line.text == f"{variable} is {os.environ[variable]}"

    def test_that_is_not_set(self, examine, variable, monkeypatch):
        monkeypatch.delenv(variable)
        line = examine(f" {variable} ")
        assert line.status == PROBLEM
        assert line.text == f"{variable} is not set: export {variable}=FOLDER"
        assert line.exit_status == 1

    def test_that_does_not_exist(self, examine, variable, monkeypatch, tmp_path):
        monkeypatch.setenv(variable, str(tmp_path / "nowhere"))
        line = examine(f" {variable} ")
        assert line.status == PROBLEM
        assert "is no folder: mkdir -p it" in line.text
        assert line.exit_status == 1


class TestFoldersThatCannotBeWrittenTo:
    @pytest.fixture(autouse=True)
    def refuse(self, monkeypatch):
        def refused(dir: str) -> Any:
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(files, "TemporaryFile", refused)

    def test_data_are_only_read(self, examine):
        assert examine(" nnUNet_raw ").status == OK

    @pytest.mark.parametrize("variable", ["nnUNet_preprocessed", "nnUNet_results"])
    def test_where_training_writes(self, examine, variable):
        line = examine(f" {variable} ")
        assert line.status == PROBLEM
        assert "cannot be written to (Permission denied)" in line.text
        assert line.exit_status == 1


class TestTrainers:
    def test_that_nnunet_is_not_told_of(self, examine, monkeypatch):
        monkeypatch.delenv("nnUNet_extTrainer")
        line = examine("nnU-Net does not find nnUNetTrainer")
        assert line.status == PROBLEM
        assert line.text.endswith(f"nnUNet_extTrainer is not set: {EXPORT} ({PLANS})")
        assert line.exit_status == 1

    def test_that_are_elsewhere(self, examine, monkeypatch, tmp_path):
        monkeypatch.setenv("nnUNet_extTrainer", str(tmp_path))
        line = examine("nnU-Net does not find nnUNetTrainer")
        assert line.status == PROBLEM
        assert line.text.endswith(f"nnUNet_extTrainer is {tmp_path}: {EXPORT}")

    def test_a_control_is_not_the_one_that_is_named(self, examine, monkeypatch):
        monkeypatch.setattr(
            doctor, "list_trainers", lambda: [("nnUNetTrainerNoSkip", ""), ("nnUNetTrainerXAttnRes", "")]
        )
        monkeypatch.delenv("nnUNet_extTrainer")
        assert examine("nnU-Net does not find").text.startswith("nnU-Net does not find nnUNetTrainerXAttnRes,")

    def test_the_remedy_is_that_of_the_readme(self):
        assert EXPORT in (CHECKOUT / "README.md").read_text()

    @pytest.mark.parametrize(
        "content, reason",
        [
            ("import nothing_of_that_name", "ModuleNotFoundError: No module named 'nothing_of_that_name'"),
            ("import json\njson.loads('')", "json.decoder.JSONDecodeError: Expecting value"),
            ("def", "SyntaxError: invalid syntax"),
            ("raise RuntimeError('no licence')", "RuntimeError: no licence"),
            ("import sys\nsys.exit('no licence')", "SystemExit: no licence"),
        ],
    )
    def test_beside_one_that_cannot_be_imported(self, examine, monkeypatch, tmp_path, content, reason):
        broken = tmp_path / "a_broken.py"
        broken.write_text(content)
        monkeypatch.setenv("nnUNet_extTrainer", f"{tmp_path}{os.pathsep}{trainers_folder()}")
        line = examine("nnUNetTrainerXAttnRes")
        assert line.status == PROBLEM
        assert line.text.startswith(f"nnU-Net cannot load nnUNetTrainerXAttnRes, because {broken} fails ({reason}")
        assert line.text.endswith("): mend that, or remove the file")

    def test_under_a_name_that_is_taken(self, examine, monkeypatch, tmp_path):
        (tmp_path / "a_namesake.py").write_text("class nnUNetTrainerXAttnRes: pass")
        monkeypatch.setenv("nnUNet_extTrainer", f"{tmp_path}{os.pathsep}{trainers_folder()}")
        line = examine("nnU-Net cannot load nnUNetTrainerXAttnRes")
        assert line.status == PROBLEM
        assert "must inherit from 'nnUNetTrainer'" in line.text


class TestPlansThatCarryXAttnRes:
    @pytest.fixture
    def plans(self, tmp_path) -> Path:
        file = write_small_plans(tmp_path / "nnUNet_preprocessed")
        carrying = plans_with_xattnres(json.loads(file.read_text()), "nnUNetXAttnResPlans")
        path = file.with_name("nnUNetXAttnResPlans.json")
        path.write_text(json.dumps(carrying))
        return path

    def test_are_named(self, examine, plans):
        line = examine("plans that carry XAttnRes")
        assert (line.status, line.exit_status) == (OK, 0)
        assert line.text == f"plans that carry XAttnRes: nnUNetXAttnResPlans of {plans.parent.name}"

    def test_need_no_trainers(self, examine, plans, monkeypatch):
        monkeypatch.delenv("nnUNet_extTrainer")
        line = examine("nnU-Net does not find nnUNetTrainer")
        assert (line.status, line.exit_status) == (NOTE, 0)
        assert line.text.endswith(f"{EXPORT} ({PLANS})")

    def test_that_cannot_be_used(self, examine, plans):
        plans.write_text(plans.read_text().replace('"fusion": "replace"', '"fusion": "both"'))
        line = examine("carry XAttnRes and cannot be used")
        assert (line.status, line.exit_status) == (PROBLEM, 1)
        assert "XAttnResConfig.fusion must be one of replace, residual, not 'both'" in line.text

    def test_whose_network_cannot_be_built(self, examine, plans):
        content = json.loads(plans.read_text())
        for configuration in content["configurations"].values():
            configuration["architecture"]["arch_kwargs"]["features_per_stage"] = [4]
        plans.write_text(json.dumps(content))
        line = examine("carry XAttnRes and cannot be used (AssertionError")
        assert (line.status, line.exit_status) == (PROBLEM, 1)


class TestWithoutGpu:
    def test_is_a_note(self, examine):
        line = examine("no GPU")
        assert line.status == NOTE
        assert "-device cpu" in line.text
        assert line.exit_status == 0

    def test_no_triton_is_a_note(self, examine, import_triton):
        import_triton(None)
        line = examine("Triton cannot be imported")
        assert line.status == NOTE
        assert line.exit_status == 0

    def test_triton_of_another_distribution(self, examine, import_triton):
        import_triton("3.4.0+rocm")
        assert examine("Triton").text == "Triton 3.4.0+rocm"

    def test_nothing_is_compiled(self, examine, monkeypatch):
        monkeypatch.setattr(torch, "compile", None)
        line = examine("nnU-Net does not compile on cpu by default")
        assert line.status == OK
        assert line.exit_status == 0


class TestAppleGpu:
    @pytest.fixture(autouse=True)
    def gpu(self, monkeypatch):
        """An Apple GPU where there is none; tensors are on the CPU."""
        ones = torch.ones
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
        monkeypatch.setattr(torch, "ones", lambda *size, device: ones(*size))

    def test_that_computes(self, examine):
        line = examine("GPU:")
        assert line.status == OK
        assert line.text == "GPU: of this Apple computer; nnU-Net's commands need -device mps"
        assert line.exit_status == 0

    def test_nothing_is_compiled(self, examine, monkeypatch):
        monkeypatch.setattr(torch, "compile", None)
        line = examine("nnU-Net does not compile on mps by default")
        assert line.status == OK
        assert line.exit_status == 0


class TestGpu:
    @pytest.fixture(autouse=True)
    def gpu(self, import_triton, monkeypatch):
        """A GPU, Triton and a compiler where there are none; tensors are on the CPU."""
        ones = torch.ones
        properties = SimpleNamespace(name="Some GPU", total_memory=24e9)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
        monkeypatch.setattr(torch, "ones", lambda *size, device: ones(*size))
        monkeypatch.setattr(torch, "compile", lambda function: function)
        import_triton("3.4.0")

    def test_that_computes(self, examine):
        line = examine("GPU:")
        assert line.status == OK
        assert line.text == "GPU: Some GPU, 24 GB"
        assert line.exit_status == 0

    def test_that_this_pytorch_is_not_made_for(self, examine, monkeypatch):
        def refused(*size: int, device: str) -> torch.Tensor:
            raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nCUDA kernel ...")

        monkeypatch.setattr(torch, "ones", refused)
        line = examine("GPU")
        assert line.status == PROBLEM
        reason = "RuntimeError: CUDA error: no kernel image is available for execution on the device"
        assert line.text.startswith(f"PyTorch cannot compute on the GPU ({reason}")
        assert "install a PyTorch that is made for it" in line.text
        assert line.exit_status == 1

    def test_the_triton_backend(self, examine, monkeypatch):
        kernels = pytest.importorskip("nnunet_xattnres.ops.triton_operator", reason="Triton is not installed")
        monkeypatch.setattr(kernels, "INTERPRETED", False)
        assert examine("the backend 'triton'").status == OK
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
        line = examine("the backend 'triton'")
        assert line.status == NOTE
        assert "needs a GPU of compute capability 8.0, and 7.5 is that of this GPU: use the backend 'auto'" in line.text
        assert line.exit_status == 0

    def test_the_triton_backend_on_a_gpu_that_pytorch_cannot_use(self, examine, monkeypatch):
        kernels = pytest.importorskip("nnunet_xattnres.ops.triton_operator", reason="Triton is not installed")
        monkeypatch.setattr(kernels, "INTERPRETED", False)

        def refused() -> tuple[int, int]:
            raise RuntimeError("CUDA unknown error")

        monkeypatch.setattr(torch.cuda, "get_device_capability", refused)
        line = examine("CUDA unknown error")
        assert (line.status, line.exit_status) == (NOTE, 0)

    def test_a_triton_whose_kernels_cannot_be_imported(self, examine, monkeypatch):
        for module in ("triton_operator", "triton_kernels"):
            monkeypatch.delitem(sys.modules, f"nnunet_xattnres.ops.{module}", raising=False)
            monkeypatch.delattr(ops, module, raising=False)
        monkeypatch.setitem(sys.modules, "triton.language", None)
        line = examine("the backend 'triton' needs Triton, which cannot be imported")
        assert (line.status, line.exit_status) == (NOTE, 0)

    def test_nnunet_compiles(self, examine):
        line = examine("torch.compile")
        assert line.status == OK
        assert line.text == "torch.compile works on cuda, where nnU-Net compiles by default"
        assert line.exit_status == 0

    def test_nnunet_does_not_compile_if_told_so(self, examine, monkeypatch):
        monkeypatch.setattr(torch, "compile", None)
        monkeypatch.setenv("nnUNet_compile", "f")
        line = examine("torch.compile")
        assert line.status == OK
        assert line.text == "torch.compile: nnU-Net does not compile on cuda with nnUNet_compile=f"
        assert line.exit_status == 0

    def test_without_triton_cannot_compile(self, examine, import_triton):
        import_triton(None)
        line = examine("Triton")
        assert line.status == PROBLEM
        assert "pip install triton, or export nnUNet_compile=f" in line.text
        assert line.exit_status == 1

    def test_without_triton_that_nnunet_does_not_need(self, examine, import_triton, monkeypatch):
        import_triton(None)
        monkeypatch.setenv("nnUNet_compile", "f")
        line = examine("Triton")
        assert line.status == NOTE
        assert line.exit_status == 0


class TestCompilation:
    """torch.compile itself, with backends that need no compiler, on the CPU as if nnU-Net compiled there."""

    @pytest.fixture(autouse=True)
    def compiles(self, import_triton, monkeypatch):
        monkeypatch.setattr(nnUNetTrainer, "_do_i_compile", lambda trainer: True)
        import_triton("3.4.0")
        torch.compiler.reset()

    def test_without_a_compiler(self, examine, monkeypatch):
        def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
            raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable.")

        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
        line = examine("torch.compile")
        assert line.status == PROBLEM
        assert line.text.startswith("torch.compile fails on cpu (")
        assert "RuntimeError: Failed to find C compiler. Please specify via CC environment variable." in line.text
        assert "install a C compiler" in line.text
        assert "or export nnUNet_compile=f" in line.text
        assert line.exit_status == 1

    def test_what_was_compiled_before_is_not_looked_at(self, examine, monkeypatch, tmp_path):
        caches = []

        def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
            caches.extend(os.environ[name] for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"))
            assert os.listdir(caches[0]) == []
            return graph.forward

        (tmp_path / "cached.so").touch()
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
        line = examine("torch.compile")
        assert line.status == OK
        assert line.exit_status == 0
        assert len(caches) == 2
        assert str(tmp_path) not in caches
