"""Times of backends for one call of the attention, measured in a process of its own:
`python -m nnunet_xattnres.ops.timing FOLDER`.

A kernel that fails can leave a GPU unusable for the process that started it. So the training is not that process. The
process reads a `Call`, the device and the names of backends from FOLDER/call.pt, and writes FOLDER/findings.json.
"""

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from torch import Tensor

from nnunet_xattnres.common.errors import XAttnResError, type_and_message
from nnunet_xattnres.ops.backends import attention_backend, check_backend
from nnunet_xattnres.ops.reference import Attention, Candidate, Upsampled, attend_reference

REPEATS = 5
# Beside the largest value of an output or a gradient: several roundings to half precision, no more.
TOLERANCE = 0.02
# Without a measurement the first backend would be taken. Noise must not decide against it.
MUST_WIN_BY = 0.05

Findings = dict[str, float | str]


@dataclass(frozen=True)
class Call:
    """The arguments of one call of the attention, for their shapes alone: on the meta device."""

    query: Tensor
    norm_scale: Tensor
    candidates: Sequence[Candidate | Upsampled]
    size: Sequence[int]

    @property
    def elements(self) -> int:
        """Of all aligned candidates."""
        return len(self.candidates) * len(self.candidates[0].features) * len(self.query) * math.prod(self.size)


def main() -> None:
    folder = Path(sys.argv[1])
    call, device, backends = torch.load(folder / "call.pt", weights_only=False)
    device = torch.device(device)
    if device.type == "cuda":
        # Triton computes on the current device.
        torch.cuda.set_device(device)
    # As nnU-Net trains on a GPU.
    torch.backends.cudnn.benchmark = True
    findings = measure(call, device, torch.get_autocast_dtype("cuda"), backends)
    (folder / "findings.json").write_text(json.dumps(findings))


def measure(call: Call, device: torch.device, dtype: torch.dtype, backends: Sequence[str]) -> Findings:
    """Seconds of forward and backward pass with each backend, or the reason why it cannot be used.

    dtype: of the features, and of autocast if it is not float32.
    """
    findings: Findings = {}
    for backend in backends:
        try:
            check_backend(backend, device.type)
            attend = attention_backend(backend)
            if equals_reference(attend, call, device, dtype):
                findings[backend] = seconds(_step(attend, call, device, dtype), device)
            else:
                findings[backend] = "it differs from reference"
        except XAttnResError as error:
            findings[backend] = str(error)
        except Exception as error:
            findings[backend] = type_and_message(error)
    return findings


def fastest(findings: Findings) -> str | None:
    """The fastest backend. One is taken instead of an earlier one if it wins by 5 %. None if none can be used."""
    times = {backend: found for backend, found in findings.items() if isinstance(found, float)}
    chosen = next(iter(times), None)
    for backend, time in times.items():
        if chosen is not None and time < (1 - MUST_WIN_BY) * times[chosen]:
            chosen = backend
    return chosen


def equals_reference(attend: Attention, call: Call, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether output and gradients for the smallest features of the same proportions are those of `reference`."""
    small = _smallest(call)
    computed = _step(attend, small, device, dtype)()
    expected = _step(attend_reference, small, device, dtype, torch.float32)()
    return all(
        torch.allclose(a.float(), b.float(), rtol=0, atol=TOLERANCE * b.float().abs().max().item())
        for a, b in zip(computed, expected, strict=True)
    )


def seconds(step: Callable[[], object], device: torch.device) -> float:
    """The median time of a step. The first one compiles, and is not timed."""
    times = []
    for _ in range(1 + REPEATS):
        start = perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(perf_counter() - start)
    return median(times[1:])


def _step(
    attend: Attention, call: Call, device: torch.device, dtype: torch.dtype, computed_in: torch.dtype | None = None
) -> Callable[[], list[Tensor]]:
    """A function that computes the output of a call with random values, and all gradients.

    dtype: that the features are rounded to. computed_in: None for the same.
    """
    generator = torch.Generator(device).manual_seed(0)
    computed_in = computed_in or dtype
    leaves: list[Tensor] = []

    def random(like: Tensor, inputs: int = 1, is_feature: bool = False) -> Tensor:
        values = torch.randn(like.shape, generator=generator, device=device) / inputs**0.5
        leaves.append((values.to(dtype).to(computed_in) if is_feature else values).requires_grad_())
        return leaves[-1]

    def filled(each: Candidate | Upsampled) -> Candidate | Upsampled:
        features = random(each.features, is_feature=True)
        if isinstance(each, Upsampled):
            bias = None if each.bias is None else random(each.bias)
            return Upsampled(features, random(each.weight, each.weight.shape[0]), bias)
        projection = each.projection
        return Candidate(features, None if projection is None else random(projection, projection.shape[1]))

    query, norm_scale = random(call.query, len(call.query)), random(call.norm_scale)
    candidates = [filled(each) for each in call.candidates]
    shape = (len(call.candidates[0].features), len(call.query), *call.size)
    gradient = torch.randn(shape, generator=generator, device=device).to(dtype)

    def step() -> list[Tensor]:
        with torch.autocast(device.type, computed_in, enabled=computed_in != torch.float32):
            output = attend(query, norm_scale, candidates, call.size)
        return [output.detach(), *torch.autograd.grad(output, leaves, gradient.to(output.dtype))]

    return step


def _smallest(call: Call) -> Call:
    """The call for one image, with all sizes divided by their greatest common divisor along each axis."""
    sizes = [call.size, *(each.features.shape[2:] for each in call.candidates)]
    divisors = [math.gcd(*extents) for extents in zip(*sizes, strict=True)]

    def shrunk(features: Tensor) -> Tensor:
        extents = [extent // divisor for extent, divisor in zip(features.shape[2:], divisors, strict=True)]
        return features.new_empty(1, features.shape[1], *extents)

    candidates = [
        Upsampled(shrunk(each.features), each.weight, each.bias)
        if isinstance(each, Upsampled)
        else Candidate(shrunk(each.features), each.projection)
        for each in call.candidates
    ]
    size = [extent // divisor for extent, divisor in zip(call.size, divisors, strict=True)]
    return Call(call.query, call.norm_scale, candidates, size)


if __name__ == "__main__":
    main()
