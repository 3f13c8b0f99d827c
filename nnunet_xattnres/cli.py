"""The command `nnunet-xattnres`."""

import argparse
import sys
import warnings
from collections.abc import Sequence
from dataclasses import fields
from io import TextIOWrapper
from pathlib import Path
from typing import TypeAlias, TypeVar

from nnunet_xattnres import __version__
from nnunet_xattnres.common.argument_parser import Parser
from nnunet_xattnres.common.errors import XAttnResError
from nnunet_xattnres.model.config import BACKENDS, FUSIONS
from nnunet_xattnres.nnunet.installation import check_installed, check_nnunet_version, list_trainers, trainers_folder

Options = TypeVar("Options")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status: 1 after a mistake, with one line on stderr, and 130 after Ctrl-C."""
    if isinstance(sys.stdout, TextIOWrapper):
        # A file or a pipe on Windows cannot take all characters.
        sys.stdout.reconfigure(errors="replace")
    parsed = _parser().parse_args(arguments)
    # A package that nnU-Net imports causes it. Users cannot change that.
    warnings.filterwarnings("ignore", "`torch.jit.interface` is deprecated", FutureWarning)
    try:
        if parsed.run is not _doctor:  # doctor reports the version in a line of its own.
            check_nnunet_version()
        parsed.run(parsed)
    except XAttnResError as error:
        print(f"nnunet-xattnres: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nnnunet-xattnres: interrupted; {parsed.after_interruption}", file=sys.stderr)
        return 130
    return 0


Commands: TypeAlias = "argparse._SubParsersAction[Parser]"


def _parser() -> Parser:
    parser = Parser(prog="nnunet-xattnres", description="Cross-stage attention residuals (XAttnRes) for nnU-Net v2.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_trainers(commands)
    _add_demo(commands)
    _add_plans(commands)
    _add_overhead(commands)
    _add_warm_start(commands)
    _add_doctor(commands)
    _add_inspect(commands)
    _add_benchmark(commands)
    _add_compare(commands)
    return parser


def _add_trainers(commands: Commands) -> None:
    trainers = commands.add_parser(
        "trainers",
        help="print the folder of the trainers",
        description="Print the folder of the trainers, for the environment variable nnUNet_extTrainer.",
    )
    trainers.add_argument("--list", action="store_true", help="list the trainers, one a line, instead")
    trainers.set_defaults(run=_trainers, after_interruption="the same command lists them all")


def _add_demo(commands: Commands) -> None:
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
    _add_trainer(demo, "nnUNetTrainerXAttnRes")
    demo.add_argument(
        "--baseline", action="store_true", help="also train the planned network with the same budget, and compare"
    )
    demo.set_defaults(run=_demo, after_interruption="the same command continues")


def _add_doctor(commands: Commands) -> None:
    doctor = commands.add_parser(
        "doctor",
        help="check whether training would work here",
        description="Check versions, environment variables, trainers and GPU: one line each, ok or what to do. "
        "The exit status is 0 only if training would work.",
    )
    doctor.set_defaults(run=_doctor, after_interruption="nothing was changed")


def _add_plans(commands: Commands) -> None:
    plans = commands.add_parser(
        "plans",
        help="write plans that carry XAttnRes, for nnU-Net's own trainers and yours",
        description="Write plans whose network has XAttnRes beside the plans of a dataset. Every trainer that builds "
        "the network of its plans trains it, as nnU-Net's own do, except those of Primus. Nothing is preprocessed "
        "again: the data are those of the plans that they are made from.",
    )
    plans.add_argument("-d", required=True, dest="dataset", metavar="DATASET", help="name or number of the dataset")
    plans.add_argument(
        "-p", default="nnUNetPlans", dest="plans_name", metavar="PLANS", help="made from these (default: %(default)s)"
    )
    plans.add_argument(
        "-c", nargs="+", dest="configurations", metavar="CONFIG", help="configurations (default: all of the plans)"
    )
    plans.add_argument(
        "--preset",
        default="XAttnRes",
        metavar="NAME",
        help="what is added: XAttnRes, XAttnResNoSkip, XAttnResDecoder, XAttnResFinetune, XAttnResBlock or "
        "XAttnResBlockInput, as the trainer of that name adds it (default: %(default)s). The options below change it",
    )
    stage = plans.add_argument_group("stage level")
    _add_flags(
        stage,
        {
            "skip-connections": "keep nnU-Net's skip connections beside the attention",
            "read-in-encoder": "encoder stages read from the history pool",
            "read-in-decoder": "decoder stages read from the history pool",
        },
    )
    stage.add_argument(
        "--fusion", choices=FUSIONS, help="the mixture replaces the stage's input, or is added to it through a gate"
    )
    block = plans.add_argument_group("block level")
    _add_flags(
        block,
        {
            "isar-in-encoder": "blocks of encoder stages read from the earlier blocks of their stage",
            "isar-in-decoder": "blocks of decoder stages read from the earlier blocks of their stage",
            "bank-includes-input": "these blocks also read the input of their stage",
        },
    )
    for option, text in (
        ("kv-ratio", "channels of the keys, as a multiple of the memory's, from 0.001 to 8"),
        ("temperature", "divides the scores among blocks, from 0.001 to 1000"),
    ):
        block.add_argument(f"--{option}", type=float, metavar="NUMBER", help=text)
    plans.add_argument(
        "-o",
        dest="output",
        metavar="NAME",
        help="name of the plans (default: nnUNetXAttnResPlans, by plans and preset)",
    )
    plans.set_defaults(run=_plans, after_interruption="nothing was written")


def _add_flags(group: argparse._ArgumentGroup, texts: dict[str, str]) -> None:
    """Add --FLAG and --no-FLAG for every flag, with its text in the help."""
    for flag, text in texts.items():
        group.add_argument(f"--{flag}", action=argparse.BooleanOptionalAction, help=text)


def _add_overhead(commands: Commands) -> None:
    overhead = commands.add_parser(
        "overhead",
        help="measure time and memory beside the planned network",
        description="Measure parameters, FLOPs, training step time, peak memory, what is kept for the backward pass, "
        "and inference time of trainers beside the planned network, on this machine: one process per measurement, the "
        "trainers in turn.",
    )
    plans = overhead.add_argument_group("plans, from one of")
    plans.add_argument("-d", dest="dataset", metavar="DATASET", help="name or number of a planned nnU-Net dataset")
    plans.add_argument(
        "--preset",
        nargs="+",
        default=[],
        dest="presets",
        metavar="NAME",
        help="msd01 ... msd10: nnU-Net's published plans for the tasks of the Medical Segmentation Decathlon",
    )
    plans.add_argument("--plans", type=Path, metavar="FILE", help="a plans file with dataset.json beside it")
    overhead.add_argument(
        "-c", default="3d_fullres", dest="configuration", metavar="CONFIG", help="configuration (default: %(default)s)"
    )
    overhead.add_argument(
        "-p",
        dest="plans_name",
        metavar="PLANS",
        help="plans of the dataset or preset (default: nnUNetPlans); msd03 and msd07 also have "
        "nnUNetResEncUNetMPlans and nnUNetResEncUNetLPlans",
    )
    overhead.add_argument(
        "--trainers",
        nargs="+",
        metavar="NAME",
        help="measured beside nnUNetTrainerPlanned (default: nnUNetTrainerXAttnRes nnUNetTrainerXAttnResNoSkip, and "
        "nnUNetTrainerNoSkip, which has neither skip connections nor attention; for plans that carry XAttnRes: "
        "nnUNetTrainer)",
    )
    overhead.add_argument(
        "--backend",
        nargs="+",
        choices=BACKENDS,
        default=[],
        dest="backends",
        help="how the attention is computed; several are measured side by side (default: as each trainer says)",
    )
    overhead.add_argument(
        "--inference",
        action="store_true",
        help="measure nnU-Net's prediction of a volume, two patches long along every axis, and no training step",
    )
    overhead.add_argument("--batch-size", type=int, metavar="N", help="patches per step (default: as planned)")
    _add_device(overhead)
    overhead.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="with torch.compile or without (default: as nnU-Net does it on the device)",
    )
    overhead.add_argument(
        "--repeats", type=int, default=3, metavar="N", help="processes per trainer (default: %(default)s)"
    )
    for kind, default in (("json", "overhead.json"), ("csv", None), ("chart", "overhead.png")):
        overhead.add_argument(
            f"--{kind}",
            type=Path,
            default=default and Path(default),
            metavar="FILE",
            help=f"where it is written (default: {default or 'not written'})",
        )
    overhead.set_defaults(run=_overhead, after_interruption="plans whose table was printed are in the files")


def _add_warm_start(commands: Commands) -> None:
    warm_start = commands.add_parser(
        "warm-start",
        help="turn a trained plain nnU-Net into the start of a fine-tuning with XAttnRes",
        description="Turn a trained plain nnU-Net into a model folder that computes the same, and that a trainer with "
        "residual fusion, or any trainer on plans with residual fusion, trains on.",
    )
    warm_start.add_argument(
        "--from",
        type=Path,
        required=True,
        dest="start",
        metavar="MODEL_FOLDER_OR_CHECKPOINT",
        help="the trained network: a folder with plans.json, dataset.json and fold_*, or a .pth file",
    )
    warm_start.add_argument(
        "-f", dest="fold", metavar="FOLD", help="fold of the model folder (default: the only finished one)"
    )
    _add_trainer(warm_start, "nnUNetTrainerXAttnResFinetune")
    warm_start.add_argument(
        "-d", required=True, dest="dataset", metavar="DATASET", help="name or number of the dataset to train on"
    )
    warm_start.add_argument(
        "-c", required=True, dest="configuration", metavar="CONFIG", help="its configuration, planned and preprocessed"
    )
    warm_start.add_argument(
        "-p", default="nnUNetPlans", dest="plans_name", metavar="PLANS", help="its plans (default: %(default)s)"
    )
    warm_start.add_argument(
        "-o", type=Path, required=True, dest="output", metavar="FOLDER", help="the model folder to write"
    )
    _add_trust_checkpoint(warm_start)
    warm_start.set_defaults(run=_warm_start, after_interruption="nothing was written")


def _add_inspect(commands: Commands) -> None:
    inspect = commands.add_parser(
        "inspect",
        help="show what a trained model reads in any case",
        description="Run a trained model through nnU-Net's own preprocessing and inference, and write, in a folder per "
        "case, its attention weights as NIfTI over the image, their means by predicted label (routing.json), a picture "
        "(routing.png) and the prediction. A weight is a share of the mixture. It does not measure influence: features "
        "differ in size.",
    )
    inspect.add_argument(
        "-m",
        dest="model",
        type=Path,
        required=True,
        metavar="MODEL_FOLDER",
        help="in nnUNet_results: TRAINER__PLANS__CONFIGURATION",
    )
    inspect.add_argument(
        "-f", dest="fold", metavar="FOLD", help="a number, or all (default: the only one that has the checkpoint)"
    )
    inspect.add_argument(
        "-chk",
        dest="checkpoint",
        default="checkpoint_final.pth",
        metavar="NAME",
        help="file in the fold's folder (default: %(default)s)",
    )
    inspect.add_argument(
        "-i",
        dest="images",
        type=Path,
        nargs="+",
        required=True,
        metavar="IMAGE",
        help="a folder, or files; named as nnU-Net wants them, CASE_0000.nii.gz and one more file per channel",
    )
    inspect.add_argument("-o", dest="output", type=Path, required=True, metavar="OUT", help="where the folders go")
    inspect.add_argument(
        "--targets",
        type=_names,
        metavar="D3,D4",
        help="which targets (default: all); maps of fewer take less memory and time",
    )
    inspect.add_argument(
        "--knock-out",
        action="store_true",
        help="predict every case again without each source of each target: table and heat maps of what that changes",
    )
    inspect.add_argument(
        "--sources", type=_names, metavar="E0,E1", help="which sources --knock-out leaves out (default: all)"
    )
    inspect.add_argument(
        "--labels",
        type=Path,
        metavar="FOLDER",
        help="references for --knock-out, CASE.nii.gz, which then gives the change in Dice (default: the share of "
        "labelled voxels that change)",
    )
    _add_device(inspect)
    inspect.add_argument("--pdf", action="store_true", help="pictures as PDF too, and that of the training")
    _add_trust_checkpoint(inspect)
    inspect.set_defaults(run=_inspect, after_interruption="the cases that were finished are there")


def _add_benchmark(commands: Commands) -> None:
    benchmark = commands.add_parser(
        "benchmark",
        help="train a matrix of datasets, configurations, trainers, folds and seeds, and compare",
        description="Train a matrix of datasets, configurations, trainers, folds and seeds, and compare.",
    )
    steps = benchmark.add_subparsers(required=True, metavar="STEP")

    run = steps.add_parser(
        "run",
        help="run a matrix",
        description="Run the matrix of a spec. Running it again continues where it was left.",
    )
    run.add_argument("spec", type=Path, metavar="SPEC.yaml", help="what the matrix consists of")
    run.add_argument("-o", dest="output", type=Path, required=True, metavar="DIR", help="where everything is written")
    run.add_argument(
        "--continue-from",
        type=Path,
        metavar="REPORT",
        help="the folder of a report: do not train again what it has finished",
    )
    run.set_defaults(run=_benchmark_run, after_interruption="the same command continues")

    status = steps.add_parser("status", help="show how far a matrix is", description="Show how far a matrix is.")
    status.add_argument("output", type=Path, metavar="DIR", help="the folder of `benchmark run`")
    status.set_defaults(run=_benchmark_status, after_interruption="nothing was changed")

    fetch = steps.add_parser(
        "fetch",
        help="download a task of the Medical Segmentation Decathlon",
        description="Download a task of the Medical Segmentation Decathlon from its public mirror and check it. "
        "Running it again continues a download.",
    )
    fetch.add_argument("task", metavar="TASK", help="its name or number: Task04_Hippocampus, or 4")
    fetch.add_argument(
        "-o", dest="output", type=Path, default=Path(), metavar="FOLDER", help="where the .tar goes (default: here)"
    )
    fetch.set_defaults(run=_benchmark_fetch, after_interruption="the same command continues the download")

    report = steps.add_parser(
        "report",
        help="compare trainers, with intervals and tests",
        description="Measure all predictions of a benchmark and compare its trainers: tables as Markdown, CSV and "
        "JSON, figures as PNG and PDF.",
    )
    report.add_argument(
        "results", type=Path, metavar="DIR", help="the folder of `benchmark run`, or one with the CSV files of a report"
    )
    report.add_argument("-o", dest="output", type=Path, required=True, metavar="OUT", help="where the report goes")
    report.set_defaults(run=_benchmark_report, after_interruption="the same command begins again")


def _add_compare(commands: Commands) -> None:
    compare = commands.add_parser(
        "compare",
        help="compare results that exist already, with intervals and tests",
        description="Compare the validation predictions in nnU-Net's result folders, of whatever trainer, or folders "
        "of predictions. Writes the same report as `benchmark report`. Nothing is trained, and the results are only "
        "read. The others are compared with the first one.",
    )
    compare.add_argument(
        "folders",
        type=Path,
        nargs="+",
        metavar="RESULT",
        help="in nnUNet_results: TRAINER__PLANS__CONFIGURATION; or a folder of predictions, which needs --references",
    )
    compare.add_argument("-o", dest="output", type=Path, required=True, metavar="REPORT", help="where the report goes")
    compare.add_argument(
        "--folds", type=int, nargs="+", metavar="FOLD", help="of result folders (default: all that are validated)"
    )
    compare.add_argument(
        "--references",
        type=Path,
        metavar="FOLDER",
        help="the reference segmentations (default, for result folders: nnUNet_preprocessed/DATASET/gt_segmentations)",
    )
    compare.add_argument(
        "--group",
        nargs="+",
        metavar="NAME",
        help="a name for each RESULT; those of one name are repeats of one setup (default: what tells them apart)",
    )
    compare.add_argument(
        "--nsd-tolerance-mm",
        type=float,
        default=1.0,
        metavar="MM",
        help="of the normalised surface Dice (default: %(default)g)",
    )
    compare.add_argument(
        "--family", action="store_true", help="the datasets are of the same patients, and count as one in the tests"
    )
    compare.set_defaults(run=_compare, after_interruption="the same command begins again")


def _add_trainer(command: argparse.ArgumentParser, default: str) -> None:
    command.add_argument("--trainer", default=default, metavar="NAME", help="trainer (default: %(default)s)")


def _names(names: str) -> list[str]:
    return [name.strip() for name in names.split(",")]


def _add_device(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", choices=("cpu", "cuda", "mps"), help="default: a GPU if there is one, cuda or mps")


def _add_trust_checkpoint(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--trust-checkpoint",
        action="store_true",
        help="read a checkpoint that holds other things than nnU-Net stores, which may run any code",
    )


def _chosen(options: type[Options], arguments: argparse.Namespace) -> Options:
    """The options of a command: a dataclass whose fields are the arguments of the same names."""
    return options(**{field.name: getattr(arguments, field.name) for field in fields(options)})  # type: ignore[arg-type]


def _trainers(arguments: argparse.Namespace) -> None:
    if not arguments.list:
        print(trainers_folder())
        return
    for name, description in list_trainers():
        print(f"{name:42} {description}")


def _demo(arguments: argparse.Namespace) -> None:
    from nnunet_xattnres.tools.demo import run_demo

    run_demo(arguments.data, arguments.workdir, arguments.trainer, arguments.baseline)


def _plans(arguments: argparse.Namespace) -> None:
    from nnunet_xattnres.tools.plans import Options, run_plans

    run_plans(_chosen(Options, arguments))


def _overhead(arguments: argparse.Namespace) -> None:
    from nnunet_xattnres.overhead.runner import Options, run_overhead

    run_overhead(_chosen(Options, arguments))


def _warm_start(arguments: argparse.Namespace) -> None:
    from nnunet_xattnres.tools.warm_start import Options, run_warm_start

    run_warm_start(_chosen(Options, arguments))


def _doctor(arguments: argparse.Namespace) -> None:
    from nnunet_xattnres.tools.doctor import run_doctor

    run_doctor()


def _inspect(arguments: argparse.Namespace) -> None:
    from nnunet_xattnres.tools.inspection.command import Options, run_inspect

    run_inspect(_chosen(Options, arguments))


def _benchmark_run(arguments: argparse.Namespace) -> None:
    check_installed("pydantic", "submitit", "yaml")
    from nnunet_xattnres.benchmark.run import run_benchmark

    run_benchmark(arguments.spec, arguments.output, arguments.continue_from)


def _benchmark_status(arguments: argparse.Namespace) -> None:
    from nnunet_xattnres.benchmark.status import run_status

    run_status(arguments.output)


def _benchmark_fetch(arguments: argparse.Namespace) -> None:
    from nnunet_xattnres.benchmark.fetch import fetch

    fetch(arguments.task, arguments.output)


def _benchmark_report(arguments: argparse.Namespace) -> None:
    from nnunet_xattnres.benchmark.report import run_report

    run_report(arguments.results, arguments.output)


def _compare(arguments: argparse.Namespace) -> None:
    check_installed("monai", "statsmodels")
    from nnunet_xattnres.benchmark.compare import Options, run_compare

    run_compare(_chosen(Options, arguments))
