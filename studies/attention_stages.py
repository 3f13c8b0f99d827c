"""Where the time of the attention goes: of every stage that reads, forward and backward, in one training step.

    python studies/attention_stages.py msd04
    python studies/attention_stages.py msd05 -c 2d --batch-size 4

The planned network of a preset with XAttnRes computes forward and backward passes of noise on the CPU, under PyTorch's
profiler, whose own time is in the times. A backward pass belongs to the stage of the forward pass that it is of.

- projections: matrix products. With `streaming` they interpolate too.
- loops: interpolation, norm, scores, mixture and their gradients, compiled. Only `native` has them.
- averages: of finer outputs. They count for the stage that needs them first.
- x: the transposed convolution, which is computed again in the backward pass. x gradients: its own, which the planned
  network has too.
- limit: what a copy of the sources and of the output takes on this machine, once forward and twice backward.
"""

import argparse
import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.benchmark import Timer

from nnunet_xattnres import XAttnResConfig, build_network_from_plans
from nnunet_xattnres.common.text import align_columns
from nnunet_xattnres.model.stage_level import XAttnResUNet
from nnunet_xattnres.nnunet.planned_network import from_preset
from nnunet_xattnres.nnunet.presets import DEFAULT_PLANS
from nnunet_xattnres.ops import native_operator, streaming
from nnunet_xattnres.ops.reference import Upsampled

REPEATS = 5
# More than the cache holds.
ELEMENTS_TO_COPY = 2**26
PARTS = ("projections", "loops", "averages", "x", "x gradients", "rest")
PASSES = ("forward", "backward")
# The functions that the profiler does not see, or not as a part, by part.
FUNCTIONS = (
    ("loops", native_operator, "mix"),
    ("loops", native_operator, "mix_gradients"),
    ("x", native_operator, "_upsampled_values"),
    ("x gradients", native_operator, "_upsampling_gradients"),
    ("x", streaming, "upsample"),
    ("x gradients", streaming, "upsample_gradients"),
)
# The profiler's names of what belongs to a part, with all that it calls.
PART_OF = {"_Average": "averages", "_AverageBackward": "averages"} | {
    f"aten::{name}": "projections" for name in ("mm", "bmm", "addmm", "baddbmm", "baddbmm_")
}
LABEL = "attention_stages: "
STAGE = f"{LABEL}stage "

# Milliseconds of a stage, a pass and a part.
Times = Counter[tuple[str, str, str]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("preset")
    parser.add_argument("-c", dest="configuration", default="3d_fullres")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--backend", default="native", choices=("native", "streaming"))
    options = parser.parse_args()
    planned = from_preset(options.preset, options.configuration, DEFAULT_PLANS)
    channels = planned.num_input_channels
    config = XAttnResConfig(backend=options.backend)
    network = build_network_from_plans(planned.manager, channels, planned.num_segmentation_heads, config)
    print(f"{planned.name}, {options.configuration}, batch {options.batch_size}, {options.backend}, milliseconds")
    print(report(network, torch.randn(options.batch_size, channels, *planned.manager.patch_size)))


def report(network: XAttnResUNet, images: Tensor, repeats: int = REPEATS) -> str:
    """The medians over all repeats, a line for each stage and pass."""
    sizes = copied_bytes(network, images)
    rounds = [measure(network, images) for _ in range(1 + repeats)][1:]
    pace = bytes_per_second()
    rows = [["stage", "pass", "all", *PARTS, "limit"]]
    for stage, nbytes in sizes.items():
        for number, name in enumerate(PASSES, start=1):
            times = [statistics.median(each[stage, name, part] for each in rounds) for part in PARTS]
            limit = 1e3 * number * nbytes / pace
            rows.append([stage, name, *(f"{value:.2f}" for value in (sum(times), *times, limit))])
    network_times = [statistics.median(sum_of(each, name) for each in rounds) for name in PASSES]
    of_network = ", ".join(f"{name} {value:.0f}" for name, value in zip(PASSES, network_times, strict=True))
    return f"{align_columns(rows)}\nthe whole network: {of_network}; limit at {pace / 1e9:.0f} GB/s"


def sum_of(times: Times, name: str) -> float:
    """Of all parts of a pass, in the attention and outside it."""
    return sum(value for (_, of_pass, _), value in times.items() if of_pass == name)


def measure(network: XAttnResUNet, images: Tensor) -> Times:
    """One forward and backward pass. What is outside the attention is a stage without a name."""
    network.zero_grad()
    with labelled(network), profile(activities=[ProfilerActivity.CPU]) as profiled:
        outputs = network(images)
        sum(output.sum() for output in (outputs if isinstance(outputs, list) else [outputs])).backward()
    events = [event for event in profiled.events() if event.device_type == torch.autograd.DeviceType.CPU]
    stage_of = {}
    for event in sorted(events, key=lambda event: event.time_range.start):
        if event.sequence_nr >= 0 and not is_backward(event):
            # Of the operators with one number, the last one has the gradient.
            stage_of[event.sequence_nr] = stage_around(event)
    times: Times = Counter()
    for event in events:
        *_, outermost = with_callers(event)
        backward = is_backward(event)
        stage = stage_of.get(outermost.sequence_nr, "") if backward else stage_around(event)
        times[stage, PASSES[backward], part_of(event)] += event.self_cpu_time_total / 1e3
    return times


def with_callers(event: FunctionEvent) -> Iterator[FunctionEvent]:
    """An event and all events around it, the innermost first."""
    while event is not None:
        yield event
        event = event.cpu_parent


def is_backward(event: FunctionEvent) -> bool:
    *_, outermost = with_callers(event)
    return outermost.name.startswith("autograd::engine")


def stage_around(event: FunctionEvent) -> str:
    """The stage in whose forward pass an event is. Outside the attention it is empty."""
    names = (caller.name for caller in with_callers(event))
    return next((name.removeprefix(STAGE) for name in names if name.startswith(STAGE)), "")


def part_of(event: FunctionEvent) -> str:
    """The outermost part that an event is in: a matrix product of x belongs to x."""
    part = "rest"
    for caller in with_callers(event):
        name = caller.name.removeprefix(LABEL)
        part = name if name in PARTS else PART_OF.get(caller.name, part)
    return part


@contextmanager
def labelled(network: XAttnResUNet) -> Iterator[None]:
    """Name stages and parts for the profiler."""

    def read(stage: str, *arguments: Any) -> Tensor:
        if stage not in network.xattnres:
            return network_read(stage, *arguments)
        with record_function(STAGE + stage):
            return network_read(stage, *arguments)

    network_read = network._read
    with ExitStack() as stack:
        stack.enter_context(patch.object(network, "_read", read))
        for part, module, name in FUNCTIONS:
            stack.enter_context(patch.object(module, name, with_label(LABEL + part, getattr(module, name))))
        yield


def with_label(label: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def wrapper(*arguments: Any) -> Any:
        with record_function(label):
            return function(*arguments)

    return wrapper


@torch.no_grad()
def copied_bytes(network: XAttnResUNet, images: Tensor) -> dict[str, int]:
    """Of the sources and the output of every stage that reads, in order of computation."""
    sizes: dict[str, int] = {}

    def record(stage: str, arguments: tuple[Tensor | Upsampled, list[Tensor]], output: Tensor) -> None:
        # The input has the size of the output.
        sizes[stage] = sum(h.nbytes for h in arguments[1]) + 2 * output.nbytes

    def hook(stage: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda _, arguments, output: record(stage, arguments, output)

    handles = [attention.register_forward_hook(hook(stage)) for stage, attention in network.xattnres.items()]
    network(images)
    for handle in handles:
        handle.remove()
    return sizes


def bytes_per_second() -> float:
    """The pace at which the machine copies: bytes that are read and written."""
    here, there = torch.ones(2, ELEMENTS_TO_COPY)
    timer = Timer("there.copy_(here)", globals={"here": here, "there": there}, num_threads=torch.get_num_threads())
    timer.timeit(1)
    return 2 * here.nbytes / statistics.median(timer.timeit(1).mean for _ in range(REPEATS))


if __name__ == "__main__":
    main()
