"""Whether nnU-Net can train with this plugin here: what the command `nnunet-xattnres doctor` looks at."""

import io
import os
import platform
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.metadata import metadata, requires, version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile
from types import SimpleNamespace

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from nnunet_xattnres.device import choose_device
from nnunet_xattnres.errors import XAttnResError, one_line
from nnunet_xattnres.installation import SUPPORTED_NNUNET, list_trainers

OK, NOTE, PROBLEM = "ok", "note", "PROBLEM"


@dataclass(frozen=True)
class Finding:
    """One line. status: `OK`, `NOTE` for what training can do without, `PROBLEM` for what it cannot."""

    status: str
    text: str


def run_doctor() -> None:
    """Print a line for everything that is looked at. Raises `XAttnResError` if training would not work."""
    problems = 0
    for finding in examine():
        print(f"{finding.status:8}{finding.text}")
        problems += finding.status == PROBLEM
    if problems:
        raise XAttnResError(f"training would not work: mend the {problems} marked {PROBLEM}")


def examine() -> Iterator[Finding]:
    yield from _versions()
    yield _folder("nnUNet_raw", written_to=False)
    yield _folder("nnUNet_preprocessed", written_to=True)
    yield _folder("nnUNet_results", written_to=True)
    yield _trainers()
    yield _gpu()
    yield from _compilation()


def _versions() -> Iterator[Finding]:
    yield _version("Python", platform.python_version(), metadata("nnunetv2")["Requires-Python"] or "")
    yield _version("nnunetv2", version("nnunetv2"), SUPPORTED_NNUNET)
    for requirement in map(Requirement, requires("nnunetv2") or []):
        of_an_extra = requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})
        if requirement.name in ("torch", "dynamic-network-architectures") and not of_an_extra:
            yield _version(requirement.name, version(requirement.name), str(requirement.specifier))


def _version(name: str, installed: str, specifier: str) -> Finding:
    if SpecifierSet(specifier).contains(installed, prereleases=True):
        return Finding(OK, f"{name} {installed}")
    how = "use another Python" if name == "Python" else f"pip install '{name}{specifier}'"
    return Finding(PROBLEM, f"{name} {installed} does not fit nnU-Net, which needs {specifier}: {how}")


def _folder(variable: str, written_to: bool) -> Finding:
    value = os.environ.get(variable)
    if not value:
        return Finding(PROBLEM, f"{variable} is not set: export {variable}=FOLDER")
    if not Path(value).is_dir():
        return Finding(PROBLEM, f"{variable} names {value}, which is no folder: mkdir -p it, or export another")
    if written_to:
        try:
            with TemporaryFile(dir=value):
                pass
        except OSError as error:
            return Finding(
                PROBLEM,
                f"{variable} names {value}, which cannot be written to ({error.strerror}): chmod it, or export another",
            )
    return Finding(OK, f"{variable} is {value}")


def _trainers() -> Finding:
    names = [name for name, _ in list_trainers()]
    remedy = 'export nnUNet_extTrainer="$(nnunet-xattnres trainers)"'
    for name in names:
        try:
            with redirect_stdout(io.StringIO()):
                recursive_find_trainer_class_by_name(name)
        except RuntimeError:
            value = os.environ.get("nnUNet_extTrainer")
            where = "nnUNet_extTrainer is not set" if value is None else f"nnUNet_extTrainer is {value}"
            return Finding(PROBLEM, f"nnU-Net does not find {name}, {where}: {remedy}")
        except Exception as error:
            return Finding(PROBLEM, f"nnU-Net cannot load {name} ({one_line(str(error))}): {remedy}")
    return Finding(OK, f"nnU-Net finds all {len(names)} trainers")


def _gpu() -> Finding:
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return Finding(OK, f"GPU: {properties.name}, {properties.total_memory / 1e9:.0f} GB")
    why = "this PyTorch is built without CUDA" if torch.version.cuda is None else "PyTorch finds none"
    return Finding(NOTE, f"no GPU ({why}): nnU-Net's commands need -device cpu")


def _compilation() -> Iterator[Finding]:
    device = torch.device(choose_device())
    # nnU-Net's rule is a method of its trainer that needs nothing else of it.
    compiles = nnUNetTrainer._do_i_compile(SimpleNamespace(device=device, print_to_log_file=lambda *_: None))
    if find_spec("triton") is not None:
        yield Finding(OK, f"Triton {version('triton')}")
    elif compiles:
        yield Finding(PROBLEM, "no Triton, which torch.compile needs: pip install triton, or export nnUNet_compile=f")
    else:
        yield Finding(NOTE, 'no Triton: backend="triton" is not available')
    setting = os.environ.get("nnUNet_compile")
    rule = "by default" if setting is None else f"with nnUNet_compile={setting}"
    yield Finding(OK, f"torch.compile: nnU-Net {'compiles' if compiles else 'does not compile'} on {device} {rule}")
