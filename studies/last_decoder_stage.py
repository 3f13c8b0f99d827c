"""The time of the attention before the last decoder stage alone, beside the time that copying its tensors takes.

    python studies/last_decoder_stage.py msd04 msd03 msd06

It is measured in the planned 3d_fullres network of each preset, with batch size 1, on the CPU, with the backends
`streaming` and `native`. The input of the attention is computed beforehand. The limit is the time that the machine
takes to copy all sources and the output: once for the forward pass, twice for the backward pass.
"""

import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Timer

from nnunet_xattnres import XAttnResConfig, build_network_from_plans
from nnunet_xattnres.nnunet.presets import build_preset
from nnunet_xattnres.ops.reference import upsample

REPEATS = 5
MATRIX_PRODUCTS = ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm")
# More than the cache holds.
ELEMENTS_TO_COPY = 2**26
GB = 1e9


def measure(preset: str, backend: str) -> str:
    attention, x, pool = _last_attention(preset, backend)
    sources = [*pool, x]
    gradient = torch.ones_like(x)

    def forward_and_backward() -> None:
        attention(x, pool).backward(gradient)
        for tensor in (*sources, *attention.parameters()):
            tensor.grad = None

    forward = _seconds("attention(x, pool)", attention=attention, x=x, pool=pool)
    both = _seconds("step()", step=forward_and_backward)
    here, there = torch.ones(2, ELEMENTS_TO_COPY)
    pace = 2 * here.nbytes / statistics.median(_seconds("there.copy_(here)", here=here, there=there))
    read, written = sum(source.nbytes for source in sources), x.nbytes
    limit = 3 * (read + written) / pace
    return (
        f"{preset}, {backend}: {' x '.join(map(str, x.shape[2:]))}, "
        f"{len(sources)} sources of {read / GB:.3f} GB, output {written / GB:.3f} GB\n"
        f"  forward {_with_spread(forward)}, with backward {_with_spread(both)}, "
        f"{_share_of_matrix_products(forward_and_backward):.0%} of it matrix products\n"
        f"  limit {limit:.3f} s at {pace / GB:.0f} GB/s: {statistics.median(both) / limit:.0f}x"
    )


def _last_attention(preset: str, backend: str) -> tuple[nn.Module, Tensor, list[Tensor]]:
    """The attention of the last decoder stage, its input and its pool. Input and pool are leaves with gradients."""
    plans, dataset_json = build_preset(preset, "3d_fullres")
    configuration = PlansManager(plans).get_configuration("3d_fullres")
    channels, classes = len(dataset_json["channel_names"]), len(dataset_json["labels"])
    network = build_network_from_plans(configuration, channels, classes, XAttnResConfig(backend=backend))
    *_, attention = network.xattnres.values()
    given: list[Any] = []
    hook = attention.register_forward_pre_hook(lambda _, arguments: given.extend(arguments))
    with torch.no_grad():
        network(torch.randn(1, channels, *configuration.patch_size))
        described, pool, _ = given
        x = upsample(described)
    hook.remove()
    return attention, x.requires_grad_(), [h.requires_grad_() for h in pool]


def _seconds(statement: str, **names: object) -> list[float]:
    timer = Timer(statement, globals=names, num_threads=torch.get_num_threads())
    timer.timeit(1)
    return [timer.timeit(1).mean for _ in range(REPEATS)]


def _with_spread(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.3f} s [{min(seconds):.3f}, {max(seconds):.3f}]"


def _share_of_matrix_products(step: Callable[[], None]) -> float:
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        step()
    seconds = {event.key: event.self_cpu_time_total for event in profiled.key_averages()}
    return sum(seconds.get(name, 0) for name in MATRIX_PRODUCTS) / sum(seconds.values())


if __name__ == "__main__":
    for name in sys.argv[1:] or ["msd04"]:
        for backend in ("streaming", "native"):
            print(measure(name, backend), flush=True)
