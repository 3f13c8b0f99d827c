"""The backend of a training on a GPU whose config leaves it open, chosen by measuring."""

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from nnunet_xattnres import __version__
from nnunet_xattnres.common.errors import XAttnResError, type_and_message
from nnunet_xattnres.common.processes import child_process, how_it_ended, last_meaningful_line
from nnunet_xattnres.model.stage_level import HistoryAttention, XAttnResUNet
from nnunet_xattnres.nnunet.installation import installed_version
from nnunet_xattnres.ops.backends import attention_backend, check_backend
from nnunet_xattnres.ops.reference import Candidate, Upsampled
from nnunet_xattnres.ops.timing import Call, Findings, fastest

TIMING = "nnunet_xattnres.ops.timing"
# The first is taken where nothing can be measured. `reference` is not among them: the planned patch need not fit.
MEASURED_BACKENDS = ("streaming", "triton")
# Most of it for imports, which take long on a busy machine or from a network's disk. Measuring takes seconds.
MAX_SECONDS = 60

# Of a measurement, in checkpoints: the "conditions" of every process, and "findings".
Record = dict[str, Any]
T = TypeVar("T")


def choose_backend(
    network: XAttnResUNet, image_shape: Sequence[int], device: torch.device, record: Record | None = None
) -> tuple[str, str, Record | None]:
    """Let the network compute with the backend that is the fastest for its largest attention in mixed precision.

    image_shape: of a batch. record: of an earlier measurement, which is used if it was made under the same conditions.
    They are compared in all processes.

    All processes of a distributed training call this and choose the same backend: one that every process can use, by
    its time in the slowest process, for which the others wait in every step.

    Returns the backend's name, one line that says why, and the record of the measurement. It is None where not every
    backend has a time, so that the next start measures again. A training can do without a measurement, so nothing that
    fails in it ends the training.
    """
    own, findings, problem, source = None, {}, "", ""
    try:
        own = _conditions(image_shape, device)
    except Exception as error:
        problem = _not_measured(error)
    # Nothing before an exchange keeps a process from coming there, where the others wait.
    conditions = _of_all_processes(own)
    if kept := _kept_findings(record, conditions):
        findings, source = kept, ", kept from an earlier start"
    elif own is not None:
        try:
            findings, problem = _measured(largest_call(network, image_shape), device)
        except Exception as error:
            problem = _not_measured(error)
    common, problem = _common(_of_all_processes((findings, problem)))
    chosen = fastest(common) or MEASURED_BACKENDS[0]
    for attention in network.xattnres.values():
        assert isinstance(attention, HistoryAttention)
        attention.attend = attention_backend(chosen)
    found = [
        f"{backend} {1000 * value:.3g} ms" if isinstance(value, float) else f"not {backend} ({value})"
        for backend, value in common.items()
    ]
    reason = f"forward and backward pass of the largest attention{source}: {problem or ', '.join(found)}"
    is_complete = bool(common) and all(isinstance(value, float) for value in common.values())
    return chosen, reason, {"conditions": conditions, "findings": common} if is_complete else None


def _not_measured(error: Exception) -> str:
    return f"not measured ({type_and_message(error)})"


def _conditions(image_shape: Sequence[int], device: torch.device) -> dict[str, Any]:
    """What a choice of backends depends on in one process, as a checkpoint can hold it.

    The batch size is left out: nnU-Net may give the processes of a training different ones.
    """
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "image_shape": list(image_shape[1:]),
        "versions": [__version__, *map(installed_version, ("torch", "triton"))],
        "backends": [backend for backend in MEASURED_BACKENDS if _is_here(backend, device)],
        "has_c_compiler": _has_c_compiler(),
    }


def _has_c_compiler() -> bool:
    """Whether there is the compiler that Triton would take. Triton needs none for what it finds in its cache."""
    chosen = os.environ.get("CC")
    return any(shutil.which(name) for name in ((chosen,) if chosen is not None else ("gcc", "clang")))


def _kept_findings(record: Record | None, conditions: list[Any]) -> Findings:
    """The findings of a record that was made under these conditions. Empty if it is another one, or none of ours."""
    if not isinstance(record, dict) or record.get("conditions") != conditions:
        return {}
    findings = record.get("findings")
    if not isinstance(findings, dict) or set(findings) != set(MEASURED_BACKENDS):
        return {}
    return findings if all(isinstance(value, float) for value in findings.values()) else {}


def _is_here(backend: str, device: torch.device) -> bool:
    try:
        check_backend(backend, device.type)
    except XAttnResError:
        return False
    return True


def _of_all_processes(own: T) -> list[T]:
    """What every process of a distributed training has, in order of their ranks."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return [own]
    of_all: list[T] = [own] * distributed.get_world_size()
    distributed.all_gather_object(of_all, own)
    return of_all


def _common(of_processes: Sequence[tuple[Findings, str]]) -> tuple[Findings, str]:
    """For every backend, its longest time in all processes, or why one of them cannot use it. And the first problem."""
    common: Findings = {}
    for rank, (findings, problem) in enumerate(of_processes):
        if problem:
            return {}, problem if len(of_processes) == 1 else f"{problem} on rank {rank}"
        for backend, value in findings.items():
            known = common.get(backend, 0.0)
            if isinstance(known, float):
                common[backend] = max(known, value) if isinstance(value, float) else value
    return common, ""


def largest_call(network: XAttnResUNet, image_shape: Sequence[int]) -> Call:
    """The shapes of the call of the attention that has the most elements. image_shape: of a batch."""
    calls: list[Call] = []

    def record(
        query: Tensor, norm_scale: Tensor, candidates: Sequence[Candidate | Upsampled], size: Sequence[int]
    ) -> Tensor:
        calls.append(Call(query, norm_scale, candidates, tuple(size)))
        return query.new_empty(image_shape[0], len(query), *size)

    shapes = _without_values(network)
    for attention in shapes.xattnres.values():
        attention.attend = record  # type: ignore[assignment]
    with torch.no_grad():
        shapes(torch.empty(*image_shape, device="meta"))
    return max(calls, key=lambda call: call.elements)


def _without_values(network: XAttnResUNet) -> XAttnResUNet:
    """A copy of the network on the meta device. It takes no memory of the device that the network is on."""
    parameters = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
        for parameter in network.parameters()
    }
    buffers = {id(buffer): torch.empty_like(buffer, device="meta") for buffer in network.buffers()}
    # `deepcopy` takes what is here for copies that it has made.
    return copy.deepcopy(network, parameters | buffers)


def _measured(call: Call, device: torch.device) -> tuple[Findings, str]:
    """What a new process finds, and else why it finds nothing."""
    with TemporaryDirectory(prefix="nnunet_xattnres_", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        torch.save((call, str(device), MEASURED_BACKENDS), folder / "call.pt")
        log = folder / "log.txt"
        command = [sys.executable, "-m", TIMING, str(folder)]
        try:
            with log.open("wb") as output, child_process(command, os.environ, output) as process:
                return_code = process.wait(MAX_SECONDS)
        except subprocess.TimeoutExpired:
            return {}, f"not measured within {MAX_SECONDS} s"
        if return_code:
            last_line = last_meaningful_line(log.read_text(errors="replace"))
            return {}, f"not measured ({how_it_ended(return_code)}: {last_line})"
        findings: Findings = json.loads((folder / "findings.json").read_text())
        return findings, ""
