"""The command `nnunet-xattnres overhead`: measures networks in turn, each in a new process, and writes the results."""

import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory
from typing import Any

import matplotlib.backend_bases
import psutil
import torch
from tqdm import tqdm

from nnunet_xattnres import __version__
from nnunet_xattnres.common.device import NO_MEMORY_LEFT, choose_device, cpu_name
from nnunet_xattnres.common.errors import XAttnResError
from nnunet_xattnres.common.figures import write_figure
from nnunet_xattnres.common.files import write_json_atomically, write_text_atomically
from nnunet_xattnres.common.processes import (
    child_process,
    how_it_ended,
    last_meaningful_line,
    termination_as_exception,
    was_killed,
)
from nnunet_xattnres.common.text import counted, shell_command
from nnunet_xattnres.model.config import Config
from nnunet_xattnres.nnunet.commands import NnUNet
from nnunet_xattnres.nnunet.planned_network import PlannedNetwork, from_dataset, from_file, from_preset, with_batch_size
from nnunet_xattnres.nnunet.trainer_lookup import find_trainer
from nnunet_xattnres.ops.backends import check_backend
from nnunet_xattnres.overhead.measurement import FAILED, MEASURED, OUT_OF_MEMORY, Answer, Request
from nnunet_xattnres.overhead.results import Comparison, Row, cost_table, csv_lines, draw_ratios
from nnunet_xattnres.training.mixin import XAttnResTrainerMixin, adds_xattnres, check_bases

PLANNED = "nnUNetTrainerPlanned"
DEFAULT = ("nnUNetTrainerXAttnRes", "nnUNetTrainerXAttnResNoSkip", "nnUNetTrainerNoSkip")
FOR_PLANS_THAT_CARRY = ("nnUNetTrainer",)
MEASUREMENT = "nnunet_xattnres.overhead.measurement"
# For --batch-size and --repeats. PyTorch counts the elements of a tensor in 64 bits.
MAX_NUMBER = 10**6


@dataclass(frozen=True)
class Options:
    """What to measure and where to write it.

    dataset, presets, plans: where the plans come from. Exactly one of them is given.
    plans_name: of the dataset or preset. None for nnU-Net's default.
    trainers: measured beside nnUNetTrainerPlanned. None: with and without skip connections, and without both skip
        connections and attention; or, for plans that carry XAttnRes, nnU-Net's own trainer.
    backends: of the attention, measured side by side. Empty for each trainer's own.
    inference: measure the prediction of a volume, and no training step.
    batch_size: None for the planned one.
    device: see `choose_device`.
    compile: whether nnU-Net compiles the networks. None for its default on the device.
    repeats: processes per trainer.
    csv: None to write none.
    """

    dataset: str | None
    presets: Sequence[str]
    plans: Path | None
    configuration: str
    plans_name: str | None
    trainers: Sequence[str] | None
    backends: Sequence[str]
    inference: bool
    batch_size: int | None
    device: str | None
    compile: bool | None
    repeats: int
    json: Path
    csv: Path | None
    chart: Path


def run_overhead(options: Options) -> None:
    """Measure, write the files and print a table for every plan.

    Raises `XAttnResError`, before anything is measured, for options that cannot be used. Raises it at the end if a
    measurement failed for another reason than too little memory.
    """
    device = _device(options)
    _check_numbers(options)
    for backend in options.backends:
        check_backend(backend, device)
    all_planned = _all_planned(options)
    networks = _networks(options, all_planned[0].carried)
    _check_outputs(options)

    comparisons: list[Comparison] = []
    with tqdm(total=len(all_planned) * options.repeats * len(networks), unit="process") as progress:
        for planned in all_planned:
            comparisons.append(_compare(planned, networks, options, device, progress))
            _write(comparisons, options, device)
            progress.write(f"\n{cost_table(comparisons[-1])}")
    print(f"\n{_footnote(comparisons, options, device)}")
    written = ", ".join(str(path) for path in (options.json, options.csv, options.chart) if path is not None)
    print(f"Every single time, and the machine: {written}")
    failed = [row for comparison in comparisons for row in comparison.rows if row.status == FAILED]
    if failed:
        raise XAttnResError(
            f"{counted(len(failed), 'network')} could not be measured: {failed[0].name}: {failed[0].reason}"
        )


def _device(options: Options) -> str:
    device = choose_device(options.device)
    # nnU-Net's predictor compiles on every device.
    if device != "cuda" and options.compile and not options.inference:
        raise XAttnResError(f"nnU-Net never compiles on {device}: leave --compile out, or use --device cuda")
    return device


def _check_numbers(options: Options) -> None:
    for name, value in (("--batch-size", options.batch_size), ("--repeats", options.repeats)):
        if value is not None and not 1 <= value <= MAX_NUMBER:
            raise XAttnResError(f"{name} must be from 1 to {MAX_NUMBER}, not {value}")
    if options.inference and options.batch_size is not None:
        raise XAttnResError("nnU-Net predicts patch by patch: leave out --batch-size or --inference")


def _networks(options: Options, carried: Config | None) -> list[tuple[str, str | None]]:
    """The trainers to measure, the planned network's first, each with every backend if it has attention.

    carried: the XAttnRes that the plans carry.
    """
    default = DEFAULT if carried is None else FOR_PLANS_THAT_CARRY
    networks: list[tuple[str, str | None]] = []
    for trainer in dict.fromkeys([PLANNED, *(options.trainers or default)]):
        trainer_class = find_trainer(trainer)
        check_bases(trainer_class)
        if carried is not None and adds_xattnres(trainer_class):
            raise XAttnResError(f"the plans carry XAttnRes already: leave {trainer} out, or choose other plans")
        config = carried if carried is not None and trainer != PLANNED else None
        if issubclass(trainer_class, XAttnResTrainerMixin):
            config = config or trainer_class.xattnres_config
        backends = dict.fromkeys(options.backends) if config is not None and config.has_attention else ()
        networks += [(trainer, backend) for backend in backends] or [(trainer, None)]
    return networks


def _all_planned(options: Options) -> list[PlannedNetwork]:
    if sum(map(bool, (options.dataset, options.presets, options.plans))) != 1:
        raise XAttnResError("say whose plans: one of -d DATASET, --preset NAME ... and --plans FILE")
    if options.plans is not None and options.plans_name is not None:
        raise XAttnResError("-p goes with -d or --preset: leave it out, --plans FILE says which plans")
    plans_name = "nnUNetPlans" if options.plans_name is None else options.plans_name
    if options.plans is not None:
        all_planned = [from_file(options.plans, options.configuration)]
    elif options.dataset is not None:
        all_planned = [from_dataset(options.dataset, options.configuration, plans_name)]
    else:
        presets = dict.fromkeys(options.presets)
        all_planned = [from_preset(preset, options.configuration, plans_name) for preset in presets]
    if options.batch_size is None:
        return all_planned
    return [with_batch_size(planned, options.batch_size) for planned in all_planned]


def _check_outputs(options: Options) -> None:
    outputs = {"--json": options.json, "--csv": options.csv, "--chart": options.chart}
    paths = {option: path for option, path in outputs.items() if path is not None}
    if len({path.resolve() for path in paths.values()}) < len(paths):
        raise XAttnResError(f"{', '.join(paths)} must be different files")
    for option, path in paths.items():
        try:
            if path.is_dir():
                raise XAttnResError(f"{option} {path} is a folder: name a file")
            # As long as the temporary name that the file is written under, or longer.
            with NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"):
                pass
        except OSError as error:
            raise XAttnResError(f"cannot write {path} ({error.strerror}): choose another {option}") from None
    formats = matplotlib.backend_bases.FigureCanvasBase.get_supported_filetypes()
    if options.chart.suffix[1:].lower() not in formats:
        raise XAttnResError(f"--chart {options.chart} has no suffix of a picture: use .png, .pdf or .svg")


def _compare(
    planned: PlannedNetwork,
    networks: list[tuple[str, str | None]],
    options: Options,
    device: str,
    progress: "tqdm[Any]",
) -> Comparison:
    """Measure all networks in turn, `options.repeats` times. One that fails is not measured again.

    The planned network is that of the plans without the XAttnRes that they may carry.
    """
    rows = [Row(trainer, backend=backend) for trainer, backend in networks]
    for repetition in range(options.repeats):
        for row in rows:
            if row.status == MEASURED:
                progress.set_description(f"{planned.name}, {row.name}, {repetition + 1}/{options.repeats}")
                request = Request(
                    _plans_of(planned, row),
                    planned.configuration,
                    planned.dataset_json,
                    row.trainer,
                    device,
                    row.backend,
                    options.inference,
                )
                row.answers.append(measure_in_new_process(request, options.compile))
            progress.update()
    return Comparison(planned, rows, options.inference)


def _plans_of(planned: PlannedNetwork, row: Row) -> dict[str, Any]:
    if row.trainer == PLANNED:
        planned = planned.without_xattnres()
    elif planned.carried is not None and row.backend is not None:
        planned = planned.with_backend(row.backend)
    return planned.plans


def measure_in_new_process(request: Request, compile: bool | None = None, timeout: float | None = None) -> Answer:
    """The answer of a new Python process. If this process is interrupted, the new one and its workers are ended.

    compile: whether nnU-Net compiles the network. None for its default.
    timeout: in seconds. Raises `subprocess.TimeoutExpired` after them.
    """
    with termination_as_exception(), TemporaryDirectory(prefix="nnunet_xattnres_") as name:
        folder = Path(name)
        (folder / "request.json").write_text(json.dumps(asdict(request)))
        variables = os.environ | NnUNet(folder, request.device).folders() | {"nnUNet_wandb_enabled": "0"}
        if compile is not None:
            variables["nnUNet_compile"] = str(int(compile))
        if request.device == "cpu":
            # Without this, the timer starts CUDA, which takes some hundred megabytes, to wait for an idle GPU.
            variables["CUDA_VISIBLE_DEVICES"] = ""
        log = folder / "log.txt"
        command = [sys.executable, "-m", MEASUREMENT, str(folder)]
        with log.open("wb") as output, child_process(command, variables, output) as process:
            return_code = process.wait(timeout)
        answer_file = folder / "answer.json"
        answer = Answer(**json.loads(answer_file.read_text())) if answer_file.is_file() else Answer(FAILED)
        return answer if return_code == 0 else _of_dead_process(answer, return_code, log.read_text(errors="replace"))


def _of_dead_process(answer: Answer, return_code: int, log: str) -> Answer:
    """The answer of a process that did not end well: what it knew, and why it ended."""
    if was_killed(return_code) or NO_MEMORY_LEFT.search(log):
        return replace(answer, status=OUT_OF_MEMORY)
    return replace(answer, status=FAILED, reason=f"{how_it_ended(return_code)}: {last_meaningful_line(log)}")


def _write(comparisons: list[Comparison], options: Options, device: str) -> None:
    chosen = ("compile", "backends", "inference", "repeats")
    choices = {"device": device} | {name: getattr(options, name) for name in chosen}
    content = {
        "command": shell_command("nnunet-xattnres", *sys.argv[1:]),
        "environment": environment(),
        "options": choices,
        "plans": [comparison.record() for comparison in comparisons],
    }
    write_json_atomically(content, options.json)
    if options.csv is not None:
        write_text_atomically(csv_lines(comparisons), options.csv)
    write_figure(draw_ratios(comparisons), options.chart)


def environment() -> dict[str, Any]:
    """What the times depend on beside the network: the machine and the versions."""
    return {
        "cpu": cpu_name(),
        "cores": psutil.cpu_count(logical=False),
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "nnunetv2": version("nnunetv2"),
        "nnunet_xattnres": __version__,
        "allocator": {name: value for name, value in sorted(os.environ.items()) if name.startswith("MALLOC_")},
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
    }


def _footnote(comparisons: list[Comparison], options: Options, device: str) -> str:
    answers = [answer for comparison in comparisons for row in comparison.rows for answer in row.answers]
    threads = next((answer.threads for answer in answers if answer.threads), None)
    compiled = any(answer.compiled for answer in answers)
    name = next((answer.device_name for answer in answers if answer.device_name), None) or cpu_name()
    cores = [f"{threads} thread{'' if threads == 1 else 's'}"] if device == "cpu" else []
    how = ", ".join([*cores, "compiled" if compiled else "not compiled"])
    lines = [
        f"On {name}, {how}. Backend of the attention: {', '.join(options.backends) or 'as each trainer says'}.",
        "x: beside the planned network, the median over rounds. In brackets: the shortest and the longest time.",
    ]
    if options.inference:
        lines += [
            "FLOPs: matrix products and convolutions of one patch.",
            "Inference: nnU-Net's prediction of a volume, two patches long along every axis, with mirroring.",
        ]
    else:
        lines += [
            "FLOPs: matrix products and convolutions of one training step. Inference: one patch.",
            "Kept: from the forward to the backward pass, without parameters. MB, GB: 10^6, 10^9 bytes.",
        ]
    if device == "cpu" and not options.inference:
        settings = " ".join(f"{name}={value}" for name, value in environment()["allocator"].items())
        lines.append(
            "Memory: how far the process grows, which depends on the C library's allocator too "
            f"({settings or 'no MALLOC_* variable is set'})."
        )
    if any(row.status == OUT_OF_MEMORY for comparison in comparisons for row in comparison.rows):
        smaller = "" if options.inference else "a smaller --batch-size, or at 1 "
        lines.append(f"Out of memory: try {smaller}a machine with more memory.")
    return "\n".join(lines)
