"""The command `nnunet-xattnres benchmark run`."""

from pathlib import Path

from nnunet_xattnres.benchmark.matrix import SPEC, locked
from nnunet_xattnres.benchmark.preparation import check_spec, prepare
from nnunet_xattnres.benchmark.running import make_machine, run_cells
from nnunet_xattnres.benchmark.spec import Spec, read_spec, without_executor, write_spec
from nnunet_xattnres.errors import XAttnResError


def run_benchmark(spec_file: Path, root: Path) -> None:
    """Prepare and run the matrix in the folder `root`, which holds everything afterwards; again continues.

    Raises `XAttnResError` for a spec that cannot be run, before anything is trained, and if cells have failed.
    """
    spec, sources = check_spec(read_spec(spec_file))
    root = _folder(root)
    _claim(root, spec)
    make_machine(root, spec.executor)
    cells = prepare(root, spec, sources)
    run_cells(root, cells, spec.executor)
    print(f"All {len(cells)} cells are finished: nnunet-xattnres benchmark report {root} -o REPORT")


def _folder(root: Path) -> Path:
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise XAttnResError(f"cannot make the folder {root} ({error.strerror}): choose another -o") from None
    return root.resolve()


def _claim(root: Path, spec: Spec) -> None:
    """Raise `XAttnResError` if the folder holds the results of another spec."""
    path = root / SPEC
    with locked(root / ".spec.lock", patience=float("inf")):
        if path.exists() and without_executor(read_spec(path)) != without_executor(spec):
            raise XAttnResError(f"{root} holds the results of another spec, {path}: choose another -o")
        write_spec(spec, path)
