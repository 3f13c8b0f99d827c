"""What a GPU says of the attention: the tests of the Triton kernels, and the costs with every backend that runs on it.

    make gpu

writes results/gpu/DEVICE.json, and DEVICE.md with the tables. Networks are measured as by `nnunet-xattnres overhead`,
one round each, those that tell most first. A call ends within ten minutes. The next one goes on where it ended, and
tries again what failed. Delete the file to measure everything anew.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from nnunet_xattnres.common.errors import XAttnResError, differences
from nnunet_xattnres.common.files import read_json, why_not_writable, write_json_atomically, write_text_atomically
from nnunet_xattnres.common.processes import child_process, last_meaningful_line
from nnunet_xattnres.model.config import BACKENDS
from nnunet_xattnres.nnunet.installation import check_nnunet_version, installed_version

try:
    check_nnunet_version()
except XAttnResError as error:
    sys.exit(f"gpu: {error}")

from nnunet_xattnres.nnunet.planned_network import from_preset
from nnunet_xattnres.ops.backends import check_backend
from nnunet_xattnres.overhead.measurement import FAILED, MEASURED, Answer, Request
from nnunet_xattnres.overhead.results import Comparison, Row, cost_table
from nnunet_xattnres.overhead.runner import PLANNED, environment, measure_in_new_process

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results" / "gpu"
TESTS = "tests/process/triton_cases.py"
PRESETS = (("msd03", "3d_fullres"), ("msd04", "3d_fullres"), ("msd05", "2d"), ("msd07", "3d_fullres"))
# The planned network and the one without attention, which no backend changes.
WITHOUT_ATTENTION = (PLANNED, "nnUNetTrainerNoSkip")
WITH_ATTENTION = ("nnUNetTrainerXAttnRes", "nnUNetTrainerXAttnResNoSkip")
# Of a call. To end its last process takes up to 20 seconds more.
SECONDS = 9 * 60
# Of the tests, or of one network.
MAX_SECONDS = 4 * 60
# Results of different versions must not stand in one table.
VERSIONS = ("torch", "cuda", "triton", "nnunetv2", "nnunet_xattnres")


@dataclass(frozen=True)
class Network:
    """One network to measure."""

    preset: str
    configuration: str
    compile: bool
    trainer: str
    backend: str | None

    def name(self) -> str:
        """The key of the result."""
        how = "compiled" if self.compile else "eager"
        return " ".join(filter(None, (self.preset, self.configuration, how, self.trainer, self.backend)))

    def measure(self, timeout: float) -> dict[str, Any]:
        planned = from_preset(self.preset, self.configuration, "nnUNetPlans")
        request = Request(
            planned.plans, self.configuration, planned.dataset_json, self.trainer, "cuda", backend=self.backend
        )
        return asdict(measure_in_new_process(request, self.compile, timeout))


def main() -> int:
    if not torch.cuda.is_available():
        print("gpu: PyTorch finds no CUDA device here, so there is nothing to measure", file=sys.stderr)
        return 1
    # Interpreted kernels would be measured otherwise.
    os.environ.pop("TRITON_INTERPRET", None)
    device = re.sub(r"\W+", "_", torch.cuda.get_device_name()).strip("_").lower()
    try:
        if problem := why_not_writable(RESULTS):
            raise XAttnResError(f"cannot write to {RESULTS} ({problem})")
        measure_all(RESULTS / f"{device}.json")
    except XAttnResError as error:
        print(f"gpu: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ngpu: interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0


def measure_all(path: Path) -> None:
    """Measure what `path` does not hold, until the time of a call is over. Every result is written at once.

    Raises `XAttnResError` if `path` is of other versions.
    """
    end = monotonic() + SECONDS
    backends, unavailable = available_backends()
    record = _started(path) | {"unavailable": unavailable}
    results = record["results"]
    tasks: dict[str, Callable[[float], dict[str, Any]]] = {TESTS: run_tests}
    tasks |= {network.name(): network.measure for network in networks(backends)}
    # What failed before comes last: it must not take the time of what was never measured.
    due = [name for name in tasks if name not in results]
    due += [name for name in tasks if name in results and results[name]["status"] == FAILED]
    for name in due:
        timeout = min(MAX_SECONDS, end - monotonic())
        if timeout <= 0:
            break
        print(name, end=": ", flush=True)
        try:
            result = tasks[name](timeout)
        except subprocess.TimeoutExpired:
            if timeout < MAX_SECONDS:
                print("left for the next call")
                break
            result = asdict(Answer(FAILED, reason=f"not done within {MAX_SECONDS} s"))
        print(result["status"], result["reason"])
        results[name] = result
        write_json_atomically(record, path)
        write_text_atomically(report(record, backends), path.with_suffix(".md"))
    failed = sum(result["status"] == FAILED for result in results.values())
    missing = sum(name not in results for name in tasks)
    rest = f"{missing} are left: run make gpu again" if missing else f"to measure anew, delete {path.name} first"
    print(f"{path.with_suffix('.md')}: {len(results)} results, {failed} of them failures; {rest}")


def available_backends() -> tuple[list[str], dict[str, str]]:
    """The backends that run here, and why others do not. `auto` is one of the others."""
    here, unavailable = [], {}
    for backend in BACKENDS:
        try:
            check_backend(backend, "cuda")
        except XAttnResError as error:
            unavailable[backend] = str(error)
        else:
            here.append(backend)
    return [backend for backend in here if backend != "auto"], unavailable


def networks(backends: list[str]) -> list[Network]:
    """All networks, in order of measurement: `reference` last, which is slow and may not fit."""
    of_trainers: list[tuple[str, str | None]] = [(trainer, None) for trainer in WITHOUT_ATTENTION]
    of_trainers += [(trainer, backend) for trainer in WITH_ATTENTION for backend in backends]
    all_networks = [
        Network(preset, configuration, compile, trainer, backend)
        for preset, configuration in PRESETS
        for compile in (True, False)
        for trainer, backend in of_trainers
    ]
    return sorted(all_networks, key=lambda network: network.backend == "reference")


def run_tests(timeout: float) -> dict[str, Any]:
    """Run the tests of the Triton kernels, compiled."""
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", str(ROOT / TESTS)]
    with tempfile.TemporaryFile() as output:
        with child_process(command, os.environ, output) as process:
            return_code = process.wait(timeout)
        output.seek(0)
        log = output.read().decode(errors="replace")
    return {
        "status": FAILED if return_code else MEASURED,
        "reason": last_meaningful_line(log),
        "failed": [line for line in log.splitlines() if line.startswith(("FAILED", "ERROR"))],
    }


def report(record: dict[str, Any], backends: list[str]) -> str:
    """The results as Markdown."""
    results = record["results"]
    versions = ", ".join(f"{name} {record['environment'][name]}" for name in VERSIONS)
    lines = [f"# {record['device']}", "", f"{versions}. `make gpu` measured it, one round each.", ""]
    lines += [f"Not on this device: {reason}." for reason in record["unavailable"].values()]
    if TESTS in results:
        tests = results[TESTS]
        lines += ["", f"`{TESTS}`: {tests['reason']}", *[f"- `{line}`" for line in tests.get("failed", [])]]
    for preset, configuration in PRESETS:
        planned = from_preset(preset, configuration, "nnUNetPlans")
        for compile in (True, False):
            of_table = [n for n in networks(backends) if (n.preset, n.compile) == (preset, compile)]
            rows = [
                Row(network.trainer, [Answer(**results[network.name()])], network.backend)
                for network in of_table
                if network.name() in results
            ]
            # Every ratio is to the planned network.
            if rows and rows[0].trainer == PLANNED:
                table = cost_table(Comparison(planned, rows))
                lines += ["", f"## {preset}, {'compiled' if compile else 'not compiled'}", "", "```text", table, "```"]
    return "\n".join(lines) + "\n"


def _started(path: Path) -> dict[str, Any]:
    """What `path` holds, or the record of a first call."""
    here = environment() | {"cuda": torch.version.cuda, "triton": installed_version("triton")}
    if not path.exists():
        return {"device": torch.cuda.get_device_name(), "environment": here, "results": {}}
    record = read_json(path, "delete it")
    there = record["environment"]
    changed = differences({name: there.get(name) for name in VERSIONS}, {name: here[name] for name in VERSIONS})
    if changed:
        raise XAttnResError(f"{path} is of other versions: {changed}: move it away to measure anew")
    return record


if __name__ == "__main__":
    sys.exit(main())
