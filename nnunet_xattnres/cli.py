"""The command `nnunet-xattnres`."""

import argparse
import ast
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from nnunet_xattnres import __version__
from nnunet_xattnres.errors import XAttnResError
from nnunet_xattnres.installation import check_nnunet_version, trainers_folder


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns its exit status: 1 after a mistake, explained in a line on stderr; 130 after Ctrl-C."""
    parsed = _parser().parse_args(arguments)
    try:
        check_nnunet_version()
        parsed.run(parsed)
    except XAttnResError as error:
        print(f"nnunet-xattnres: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nnnunet-xattnres: interrupted; the same command continues", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nnunet-xattnres", description="Cross-stage attention residuals (XAttnRes) for nnU-Net v2."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    trainers = commands.add_parser(
        "trainers",
        help="print the folder of the trainers",
        description="Print the folder of the trainers, for the environment variable nnUNet_extTrainer.",
    )
    trainers.add_argument("--list", action="store_true", help="list the trainers, one a line, instead")
    trainers.set_defaults(run=_trainers)

    demo = commands.add_parser(
        "demo",
        help="plan, train, predict and evaluate, small enough for a CPU",
        description="Plan, train, predict and evaluate through nnU-Net's own commands, small enough for a CPU. "
        "Running it again continues where it was left.",
    )
    demo.add_argument(
        "--data",
        type=Path,
        metavar="FOLDER",
        help="a Medical Segmentation Decathlon task or an nnU-Net raw dataset; default: generated phantoms",
    )
    demo.add_argument(
        "--workdir",
        type=Path,
        default=Path("xattnres_demo"),
        metavar="FOLDER",
        help="where everything is written (default: %(default)s)",
    )
    demo.add_argument(
        "--trainer", default="nnUNetTrainerXAttnRes", metavar="NAME", help="trainer (default: %(default)s)"
    )
    demo.add_argument(
        "--baseline", action="store_true", help="also train the planned network with the same budget, and compare"
    )
    demo.set_defaults(run=_demo)
    return parser


def _trainers(arguments: argparse.Namespace) -> None:
    if not arguments.list:
        print(trainers_folder())
        return
    for name, description in list_trainers():
        print(f"{name:42} {description}")


def list_trainers() -> Iterator[tuple[str, str]]:
    """Name and first line of documentation of every trainer, read from source: importing nnU-Net takes seconds."""
    for path in sorted(trainers_folder().glob("nnUNetTrainer*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                yield node.name, (ast.get_docstring(node) or "").partition("\n")[0]


def _demo(arguments: argparse.Namespace) -> None:
    from nnunet_xattnres.demo import run_demo

    run_demo(arguments.data, arguments.workdir, arguments.trainer, arguments.baseline)
