"""The command `nnunet-xattnres doctor`: checks whether nnU-Net can train with this plugin here.

A package that may be missing or broken is imported by the check that needs it.
"""

import io
import os
import platform
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import metadata, requires
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from nnunet_xattnres.common.errors import XAttnResError, type_and_message
from nnunet_xattnres.common.files import why_not_writable
from nnunet_xattnres.common.processes import environment_with
from nnunet_xattnres.common.text import shell_command
from nnunet_xattnres.nnunet.folders import nnunet_folder
from nnunet_xattnres.nnunet.installation import (
    SUPPORTED_NNUNET,
    SUPPORTED_TORCH,
    check_nnunet_version,
    installed_version,
    list_trainers,
)

OK, NOTE, PROBLEM = "ok", "note", "PROBLEM"


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    status: `OK`; `NOTE` for what training does not need; `PROBLEM` for what training cannot work with.
    """

    status: str
    text: str


def run_doctor() -> None:
    """Print a line for every check. Raises `XAttnResError` if training would not work."""
    problems = 0
    for finding in examine():
        print(f"{finding.status:8}{finding.text}")
        problems += finding.status == PROBLEM
    if problems:
        raise XAttnResError(f"training would not work: mend the {problems} marked {PROBLEM}")


def examine() -> Iterator[Finding]:
    """All checks. A check whose packages are missing is left out, with a note."""
    nnunet = _nnunet_version()
    yield nnunet
    yield from _versions_for_nnunet()
    yield _folder("nnUNet_raw", written_to=False)
    yield _folder("nnUNet_preprocessed", written_to=True)
    yield _folder("nnUNet_results", written_to=True)
    pytorch = _import("torch", "torch", "pip install --force-reinstall torch, as pytorch.org says for your GPU")
    yield pytorch
    if pytorch.status == PROBLEM:
        yield Finding(NOTE, "GPU, Triton, torch.compile and trainers were not looked at: they need torch")
        return
    gpu = _gpu()
    yield gpu
    if nnunet.status == OK:
        install = shell_command("pip", "install", f"nnunetv2{SUPPORTED_NNUNET}")
        remedy = f"{install}, with --force-reinstall --no-deps if that finds it complete"
        nnunet = _import("nnU-Net", "nnunetv2.training.nnUNetTrainer.nnUNetTrainer", remedy)
        yield nnunet
    if nnunet.status == PROBLEM:
        yield Finding(NOTE, "Triton, torch.compile and trainers were not looked at: they need nnU-Net")
        return
    yield from _trainers_and_plans()
    if gpu.status != PROBLEM:
        yield from _compilation()
        yield _native_backend()


def _nnunet_version() -> Finding:
    try:
        check_nnunet_version()
    except XAttnResError as error:
        return Finding(PROBLEM, str(error))
    return Finding(OK, f"nnunetv2 {installed_version('nnunetv2')}")


def _versions_for_nnunet() -> Iterator[Finding]:
    """Python's version, and those of the packages that fail to fit nnU-Net most often."""
    if installed_version("nnunetv2") is None:
        return
    python = metadata("nnunetv2")["Requires-Python"] or ""
    yield _version("Python", platform.python_version(), python, "use another Python")
    for requirement in map(Requirement, requires("nnunetv2") or []):
        of_an_extra = requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})
        if requirement.name in ("torch", "dynamic-network-architectures") and not of_an_extra:
            name = requirement.name
            specifier = str(requirement.specifier & SpecifierSet(SUPPORTED_TORCH if name == "torch" else ""))
            remedy = shell_command("pip", "install", f"{name}{specifier}")
            yield _version(name, installed_version(name), specifier, remedy)


def _version(name: str, installed: str | None, specifier: str, remedy: str) -> Finding:
    if installed is None:
        return Finding(PROBLEM, f"{name} is not installed: {remedy}")
    if not SpecifierSet(specifier).contains(installed, prereleases=True):
        return Finding(
            PROBLEM, f"{name} {installed} does not fit nnU-Net with this plugin, which needs {specifier}: {remedy}"
        )
    return Finding(OK, f"{name} {installed}")


def _import(name: str, module: str, remedy: str) -> Finding:
    try:
        import_module(module)
    except Exception as error:  # A shared library that cannot be loaded raises OSError, not ImportError.
        return Finding(PROBLEM, f"{name} cannot be imported ({type_and_message(error)}): {remedy}")
    return Finding(OK, f"{name} can be imported")


def _folder(variable: str, written_to: bool) -> Finding:
    try:
        folder = nnunet_folder(variable)
    except XAttnResError as error:
        return Finding(PROBLEM, str(error))
    problem = why_not_writable(folder) if written_to else None
    if problem:
        text = f"{variable} names {folder}, which cannot be written to ({problem}): chmod it, or export another"
        return Finding(PROBLEM, text)
    return Finding(OK, f"{variable} is {folder}")


def _trainers_and_plans() -> Iterator[Finding]:
    """The trainers, and the plans that carry XAttnRes, which need none of them."""
    trainers, carrying = _trainers(), _plans_that_carry()
    if carrying and trainers.status == PROBLEM and "nnUNet_extTrainer" not in os.environ:
        trainers = Finding(NOTE, trainers.text)
    yield trainers
    if carrying:
        yield _plans(carrying)


def _plans_that_carry() -> list[Path]:
    """The plans in nnUNet_preprocessed that name a network class of this plugin."""
    folder = os.environ.get("nnUNet_preprocessed")
    files = sorted(Path(folder).glob("Dataset*/*lans*.json")) if folder else []
    return [file for file in files if b"nnunet_xattnres.architectures." in file.read_bytes()]


def _plans(carrying: list[Path]) -> Finding:
    from nnunet_xattnres.common.files import read_json
    from nnunet_xattnres.model.build import check_can_be_built
    from nnunet_xattnres.nnunet.planned_network import from_file

    for path in carrying:
        try:
            for configuration in read_json(path, "write them again")["configurations"]:
                check_can_be_built(from_file(path, configuration).manager)
        except Exception as error:
            why = str(error) if isinstance(error, XAttnResError) else type_and_message(error)
            return Finding(PROBLEM, f"{path} carry XAttnRes and cannot be used ({why}): write them again")
    names = ", ".join(f"{path.stem} of {path.parent.name}" for path in carrying)
    return Finding(OK, f"plans that carry XAttnRes: {names}")


def _trainers() -> Finding:
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    # The first one may be named in the report. A control, such as nnUNetTrainerNoSkip, would mislead there.
    names = sorted((name for name, _ in list_trainers()), key=lambda name: "XAttnRes" not in name)
    for name in names:
        try:
            with redirect_stdout(io.StringIO()):
                recursive_find_trainer_class_by_name(name)
        except (Exception, SystemExit) as error:
            return _trainer_problem(name, error)
    return Finding(OK, f"nnU-Net finds all {len(names)} trainers of this plugin")


def _trainer_problem(name: str, error: BaseException) -> Finding:
    from nnunet_xattnres.nnunet.trainer_lookup import failing_file

    value = os.environ.get("nnUNet_extTrainer")
    reason = type_and_message(error)
    where = "nnUNet_extTrainer is not set" if value is None else f"nnUNet_extTrainer is {value}"
    file = failing_file(error)
    if file is not None:
        text = f"nnU-Net cannot load {name}, because {file} fails ({reason}): mend that, or remove the file"
    elif isinstance(error, RuntimeError):
        remedy = 'export nnUNet_extTrainer="${nnUNet_extTrainer:+$nnUNet_extTrainer:}$(nnunet-xattnres trainers)"'
        text = f"nnU-Net does not find {name}, {where}: {remedy}"
        if value is None:
            text += " (plans that carry XAttnRes need no trainer of this plugin: nnunet-xattnres plans -d DATASET)"
    else:
        text = f"nnU-Net cannot load {name}, {where} ({reason}): mend that, or remove what is in the way"
    return Finding(PROBLEM, text)


def _gpu() -> Finding:
    import torch

    from nnunet_xattnres.common.device import choose_device

    device = choose_device()
    if device == "cpu":
        why = "this PyTorch is built without CUDA" if torch.version.cuda is None else "PyTorch finds none"
        return Finding(NOTE, f"no GPU ({why}): nnU-Net's commands need -device cpu")
    try:
        (torch.ones(1, device=device) * 2).item()
        if device == "mps":
            return Finding(OK, "GPU: of this Apple computer; nnU-Net's commands need -device mps")
        properties = torch.cuda.get_device_properties(0)
    except Exception as error:
        remedy = "install a PyTorch that is made for it, see pytorch.org, or use -device cpu"
        return Finding(PROBLEM, f"PyTorch cannot compute on the GPU ({type_and_message(error)}): {remedy}")
    return Finding(OK, f"GPU: {properties.name}, {properties.total_memory / 1e9:.0f} GB")


def _compilation() -> Iterator[Finding]:
    import torch
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    from nnunet_xattnres.common.device import choose_device

    device = choose_device()
    # nnU-Net's rule is a method of its trainer. It uses these two attributes only.
    trainer = SimpleNamespace(device=torch.device(device), print_to_log_file=lambda *_: None)
    compiles = nnUNetTrainer._do_i_compile(trainer)
    triton = _triton(needed=compiles)
    yield triton
    if triton.status == OK and device == "cuda":
        yield _triton_backend()
    setting = os.environ.get("nnUNet_compile")
    rule = "by default" if setting is None else f"with nnUNet_compile={setting}"
    if not compiles:
        yield Finding(OK, f"torch.compile: nnU-Net does not compile on {device} {rule}")
    elif triton.status == OK:
        yield _compile_on(device, rule)


def _triton(needed: bool) -> Finding:
    try:
        # The module's own version: several distributions install this module, triton-windows for example.
        return Finding(OK, f"Triton {import_module('triton').__version__}")
    except Exception as error:
        missing = f"Triton cannot be imported ({type_and_message(error)})"
    if needed:
        return Finding(PROBLEM, f"{missing}, torch.compile needs it: pip install triton, or export nnUNet_compile=f")
    return Finding(NOTE, f'{missing}: backend="triton" is not available')


def _triton_backend() -> Finding:
    from nnunet_xattnres.ops.backends import check_backend

    try:
        check_backend("triton", "cuda")
    except Exception as error:  # PyTorch cannot tell the capability of a GPU that it cannot use.
        return Finding(NOTE, str(error) if isinstance(error, XAttnResError) else type_and_message(error))
    return Finding(OK, "the backend 'triton' has kernels for this GPU")


def _native_backend() -> Finding:
    from nnunet_xattnres.common.errors import XAttnResError
    from nnunet_xattnres.ops.native_library import library, parallel_runner

    try:
        library()
    except XAttnResError as error:
        return Finding(NOTE, f"{error}, which is slower on a CPU")
    threads = "its own threads" if parallel_runner() is None else "PyTorch's threads"
    return Finding(OK, f"the backend 'native' computes on a CPU, with {threads}")


def _compile_on(device: str, rule: str) -> Finding:
    """Compile a small function, with empty caches: results of earlier calls would hide that the compiler is gone."""
    import torch

    try:
        with (
            TemporaryDirectory(ignore_cleanup_errors=True) as cache,
            environment_with(TORCHINDUCTOR_CACHE_DIR=cache, TRITON_CACHE_DIR=cache),
        ):
            torch.compile(lambda x: x * 2)(torch.ones(1, device=device))
    except Exception as error:
        remedy = "install a C compiler and Python's headers (apt install gcc python3-dev), or export nnUNet_compile=f"
        return Finding(PROBLEM, f"torch.compile fails on {device} ({type_and_message(error)}): {remedy}")
    return Finding(OK, f"torch.compile works on {device}, where nnU-Net compiles {rule}")
