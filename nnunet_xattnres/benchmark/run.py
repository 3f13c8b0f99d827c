"""The command `nnunet-xattnres benchmark run`."""

from pathlib import Path

from nnunet_xattnres.benchmark.collecting import check_names, take_over
from nnunet_xattnres.benchmark.locks import check_locks
from nnunet_xattnres.benchmark.machines import make_machine
from nnunet_xattnres.benchmark.preparation import prepare
from nnunet_xattnres.benchmark.scheduling import run_cells
from nnunet_xattnres.benchmark.spec import read_spec
from nnunet_xattnres.benchmark.spec_check import check_spec
from nnunet_xattnres.benchmark.tables import read_tables
from nnunet_xattnres.common.files import make_writable_folder
from nnunet_xattnres.common.text import shell_command
from nnunet_xattnres.nnunet.folders import check_not_of_nnunet


def run_benchmark(spec_file: Path, root: Path, report: Path | None = None) -> None:
    """Prepare and run the matrix in the folder `root`, which holds everything afterwards. Run again, it continues.

    report: a report on trainings of this matrix that were finished elsewhere; they are not trained again.

    Raises `XAttnResError` for a spec that cannot be run, before anything is trained, and if cells have failed.
    """
    check_locks()
    earlier = None if report is None else read_tables(report)
    spec, inputs = check_spec(read_spec(spec_file))
    if earlier is not None:
        check_names(earlier, spec)
    check_not_of_nnunet(root, "-o", "benchmark")
    make_writable_folder(root, "-o")
    root = root.resolve()
    machine = make_machine(root, spec.executor)
    cells = prepare(root, spec, inputs)
    if earlier is not None:
        take_over(earlier, root)
    run_cells(root, cells, machine)
    report_command = shell_command("nnunet-xattnres", "benchmark", "report", root, "-o", "REPORT")
    print(f"All {len(cells)} cells are finished: {report_command}")
