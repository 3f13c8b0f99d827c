"""The backend of a training on a GPU whose config leaves it open, chosen by measuring."""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from nnunet_xattnres.common.errors import type_and_message
from nnunet_xattnres.common.processes import child_process, how_it_ended, last_meaningful_line
from nnunet_xattnres.model.stage_level import HistoryAttention, XAttnResUNet
from nnunet_xattnres.ops.backends import attention_backend
from nnunet_xattnres.ops.reference import Candidate, Upsampled
from nnunet_xattnres.ops.timing import Call, Findings, fastest

TIMING = "nnunet_xattnres.ops.timing"
# The first is taken where nothing can be measured. `reference` is not among them: the planned patch need not fit.
MEASURED_BACKENDS = ("streaming", "triton")
# Most of it for imports, which take long on a busy machine or from a network's disk. Measuring takes seconds.
MAX_SECONDS = 60


def choose_backend(network: XAttnResUNet, image_shape: Sequence[int], device: torch.device) -> tuple[str, str]:
    """Let the network compute with the backend that is the fastest for its largest attention in mixed precision.

    image_shape: of a batch. Returns the backend's name, and one line that says why. A training can do without the
    measurement, so nothing that fails in it ends the training.
    """
    try:
        findings, problem = _measured(largest_call(network, image_shape), device)
    except Exception as error:
        findings, problem = {}, f"not measured ({type_and_message(error)})"
    chosen = fastest(findings) or MEASURED_BACKENDS[0]
    for attention in network.xattnres.values():
        assert isinstance(attention, HistoryAttention)
        attention.attend = attention_backend(chosen)
    found = [
        f"{backend} {1000 * value:.3g} ms" if isinstance(value, float) else f"not {backend} ({value})"
        for backend, value in findings.items()
    ]
    return chosen, f"forward and backward pass of the largest attention: {problem or ', '.join(found)}"


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
