"""The command `nnunet-xattnres overhead` with made-up measurements: its order, its files, its refusals."""

import csv
import json
import signal
import subprocess
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from helpers.overhead import NO_SKIP, PLANNED, made_up_answers, output_options, small_request, write_small_plans
from nnunet_xattnres import plans_with_xattnres
from nnunet_xattnres.cli import main
from nnunet_xattnres.nnunet.trainer_lookup import find_trainer
from nnunet_xattnres.overhead import runner
from nnunet_xattnres.overhead.measurement import FAILED, MEASURED, OUT_OF_MEMORY, WARM_UP_STEPS, Answer

find_trainer_once = cache(find_trainer)


@pytest.fixture(autouse=True)
def quick_look_up(monkeypatch):
    """nnU-Net looks through all of its modules for every trainer."""
    monkeypatch.setattr(runner, "find_trainer", find_trainer_once)


@pytest.fixture
def plans_file(tmp_path):
    return write_small_plans(tmp_path / "preprocessed")


@pytest.fixture
def outputs(tmp_path):
    return output_options(tmp_path / "out")


@pytest.mark.parametrize(
    "return_code, log, status, reason",
    [
        (-signal.SIGABRT, "terminate called after throwing\n  what(): std::bad_alloc", OUT_OF_MEMORY, ""),
        (-signal.SIGABRT, "Fatal\nworse", FAILED, "ended by SIGABRT: worse"),
        (3, "ModuleNotFoundError: no torch\n", FAILED, "exit status 3: ModuleNotFoundError: no torch"),
    ],
)
def test_how_a_process_can_end(return_code, log, status, reason):
    answer = runner._of_dead_process(Answer(FAILED, parameters=7), return_code, log)
    assert answer == Answer(status, reason, parameters=7)


def test_a_process_that_takes_too_long_is_ended():
    with pytest.raises(subprocess.TimeoutExpired):
        runner.measure_in_new_process(small_request(), timeout=1e-3)


def run_with(answer_of, monkeypatch, *arguments):
    """Run the command with made-up measurements. Returns the exit status and the trainers in order of measurement.

    Where a backend was chosen, a trainer is a pair of its name and the backend.
    """
    order = []

    def made_up(request, compile):
        order.append((request.trainer, request.backend) if request.backend else request.trainer)
        return answer_of(request.trainer, order.count(order[-1]))

    monkeypatch.setattr(runner, "measure_in_new_process", made_up)
    return main(["overhead", "--device", "cpu", *arguments]), order


def test_trainers_take_turns(monkeypatch, outputs, capsys):
    status, order = run_with(
        lambda trainer, number: made_up_answers([1.0])[0], monkeypatch, "--preset", "msd04", "--repeats", "2", *outputs
    )
    assert status == 0
    assert order == [PLANNED, "nnUNetTrainerXAttnRes", NO_SKIP, "nnUNetTrainerNoSkip"] * 2
    assert "Out of memory" not in capsys.readouterr().out


def test_backends_are_measured_side_by_side_where_there_is_attention(monkeypatch, outputs, capsys):
    def answer_of(trainer, number):
        return replace(made_up_answers([1.0])[0], reads_at=["E2"] if trainer == NO_SKIP else [])

    trainers = ["nnUNetTrainer", "nnUNetTrainerNoSkip", NO_SKIP]
    backends = ["--backend", "streaming", "reference", "streaming"]
    arguments = ["--preset", "msd04", "--trainers", *trainers, *backends, "--repeats", "1", *outputs]
    status, order = run_with(answer_of, monkeypatch, *arguments)
    assert status == 0
    assert order == [PLANNED, *trainers[:2], (NO_SKIP, "streaming"), (NO_SKIP, "reference")]
    out = capsys.readouterr().out
    assert [line.partition("  ")[0] for line in out.splitlines()[5:8]] == [
        "NoSkip",
        "XAttnResNoSkip (streaming)",
        "XAttnResNoSkip (reference)",
    ]
    assert out.count("reads at") == 1
    content = json.loads(Path(outputs[1]).read_text())
    assert content["options"]["backends"] == backends[1:]
    assert [row["backend"] for row in content["plans"][0]["trainers"]] == [None] * 3 + ["streaming", "reference"]
    with open(outputs[3]) as file:
        assert [row["backend"] for row in csv.DictReader(file)] == [""] * 3 + ["streaming", "reference"]


def test_inference_has_a_table_of_its_own(monkeypatch, outputs, capsys):
    requests = []

    def made_up(request, compile):
        requests.append(request)
        return Answer(MEASURED, parameters=10, flops=10**9, inference_seconds=[2.0, 4.0], compiled=compile)

    monkeypatch.setattr(runner, "measure_in_new_process", made_up)
    arguments = ["--preset", "msd04", "--device", "cpu", "--inference", "--compile", "--repeats", "1"]
    assert main(["overhead", *arguments, *outputs]) == 0
    assert all(request.inference for request in requests)
    out = capsys.readouterr().out
    assert out.splitlines()[2].split() == ["nnUNetTrainer", "parameters", "GFLOPs", "inference", "s"]
    assert out.splitlines()[3].endswith("3.00 [2.00, 4.00] 1.00x")
    assert "prediction of a volume" in out
    assert "training step" not in out
    content = json.loads(Path(outputs[1]).read_text())
    assert content["options"]["inference"] is True
    assert content["plans"][0]["trainers"][0]["inference_seconds_max"] == 4.0
    assert Path(outputs[5]).is_file()


def test_plans_that_carry_xattnres_are_beside_their_planned_part(plans_file, monkeypatch, outputs, capsys):
    carrying = plans_with_xattnres(json.loads(plans_file.read_text()), "carrying", configurations=["small"])
    plans_file.write_text(json.dumps(carrying))
    requests = []

    def made_up(request, compile):
        requests.append(request)
        return made_up_answers([1.0])[0]

    monkeypatch.setattr(runner, "measure_in_new_process", made_up)
    options = ["--plans", str(plans_file), "-c", "small", "--repeats", "1", "--backend", "reference", *outputs]
    assert main(["overhead", "--device", "cpu", *options]) == 0
    assert [request.trainer for request in requests] == [PLANNED, "nnUNetTrainer"]
    planned, theirs = (request.plans["configurations"]["small"]["architecture"] for request in requests)
    assert planned["network_class_name"] == "dynamic_network_architectures.architectures.unet.PlainConvUNet"
    assert "xattnres" not in planned["arch_kwargs"]
    assert theirs["network_class_name"] == "nnunet_xattnres.architectures.PlainConvXAttnResUNet"
    assert theirs["arch_kwargs"]["xattnres"]["backend"] == "reference"
    assert "PlainConvXAttnResUNet" in capsys.readouterr().out
    assert main(["overhead", "--device", "cpu", *options, "--trainers", NO_SKIP]) == 1
    assert f"carry XAttnRes already: leave {NO_SKIP} out" in capsys.readouterr().err
    assert len(requests) == 2


def test_what_does_not_fit_is_not_tried_again_and_no_failure(monkeypatch, outputs, capsys):
    def answer_of(trainer, number):
        return Answer(OUT_OF_MEMORY, parameters=7) if trainer == NO_SKIP else made_up_answers([1.0])[0]

    arguments = ["--preset", "msd04", "msd05", "--trainers", NO_SKIP, PLANNED, "--repeats", "3", *outputs]
    status, order = run_with(answer_of, monkeypatch, *arguments)
    assert status == 0
    assert order == [PLANNED, NO_SKIP, PLANNED, PLANNED] * 2
    out = capsys.readouterr().out
    assert out.count("out of memory") == 2
    assert "try a smaller --batch-size" in out
    with open(outputs[3]) as file:
        rows = list(csv.DictReader(file))
    assert [(row["name"][:5], row["trainer"], row["status"]) for row in rows] == [
        (preset, trainer, status)
        for preset in ("msd04", "msd05")
        for trainer, status in ((PLANNED, MEASURED), (NO_SKIP, OUT_OF_MEMORY))
    ]


def test_a_failure_is_a_row_and_the_exit_status(monkeypatch, outputs, capsys):
    def answer_of(trainer, number):
        return Answer(FAILED, "ValueError: my mistake") if trainer == NO_SKIP else made_up_answers([1.0])[0]

    status, order = run_with(answer_of, monkeypatch, "--preset", "msd04", "--trainers", NO_SKIP, *outputs)
    captured = capsys.readouterr()
    assert status == 1
    assert order == [PLANNED, NO_SKIP, PLANNED, PLANNED]
    assert "XAttnResNoSkip failed: ValueError: my mistake" in captured.out
    assert f"{NO_SKIP}: ValueError: my mistake" in captured.err.splitlines()[-1]


def test_an_interrupted_run_keeps_the_finished_plans(monkeypatch, outputs, capsys):
    def answer_of(trainer, number):
        if number == 2:
            raise KeyboardInterrupt
        return made_up_answers([1.0])[0]

    arguments = ["--preset", "msd04", "msd05", "--trainers", NO_SKIP, "--repeats", "1", *outputs]
    status, _ = run_with(answer_of, monkeypatch, *arguments)
    assert status == 130
    captured = capsys.readouterr()
    assert "plans whose table was printed are in the files" in captured.err
    assert [preset in captured.out for preset in ("msd04", "msd05")] == [True, False]
    assert [plans["name"] for plans in json.loads(Path(outputs[1]).read_text())["plans"]] == ["msd04 (Hippocampus)"]
    assert sorted(path.name for path in Path(outputs[1]).parent.iterdir()) == ["o.csv", "o.json", "o.png"]


def test_a_run_that_is_interrupted_early_has_neither_table_nor_files(monkeypatch, outputs, capsys):
    def answer_of(trainer, number):
        raise KeyboardInterrupt

    status, _ = run_with(answer_of, monkeypatch, "--preset", "msd04", *outputs)
    assert status == 130
    assert capsys.readouterr().out == ""
    assert not any(Path(path).exists() for path in outputs[1::2])


# Mistakes: one line, before anything is measured


def test_an_apple_gpu_is_measured_where_there_is_one(monkeypatch, outputs, refuse):
    devices = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert "never compiles on mps" in refuse("--preset", "msd04", "--compile")
    assert "'triton' needs CUDA" in refuse("--preset", "msd04", "--device", "mps", "--backend", "triton")
    answer = made_up_answers([1.0])[0]
    monkeypatch.setattr(
        runner, "measure_in_new_process", lambda request, compile: devices.append(request.device) or answer
    )
    assert main(["overhead", "--preset", "msd04", "--trainers", PLANNED, "--repeats", "1", *outputs]) == 0
    assert devices == ["mps"]
    assert devices[0] in WARM_UP_STEPS


@pytest.fixture
def refuse(monkeypatch, capsys, outputs, plans_file):
    """Run the command, expect it to refuse, and return the line it says."""

    def never(*arguments):
        raise AssertionError("something was measured")

    monkeypatch.setattr(runner, "measure_in_new_process", never)
    monkeypatch.setenv("nnUNet_preprocessed", str(plans_file.parents[1]))

    def run(*arguments):
        capsys.readouterr()
        assert main(["overhead", *outputs, *map(str, arguments)]) == 1
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        assert not any(Path(path).exists() for path in outputs[1::2])
        return captured.err

    return run


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ([], "one of -d DATASET, --preset NAME ... and --plans FILE"),
        (["-d", "4", "--preset", "msd01"], "one of -d DATASET"),
        (["--preset", "msd11"], "did you mean msd"),
        (["--preset", "liver"], "choose from msd01, msd02"),
        (["--preset", "msd01", "-c", "3d_lowres"], "-p nnUNetPlans -c 3d_fullres, -p nnUNetPlans -c 2d"),
        (["--preset", "msd01", "-p", "nnUNetResEncUNetMPlans"], "are there for msd03, msd07"),
        (["--preset", "msd03", "-p", "nnUNetResEncUNetMPlans", "-c", "2d"], "nnUNetResEncUNetLPlans -c 3d_fullres"),
        (["-d", "Dataset004_Hipocampus"], "did you mean Dataset004_Hippocampus?"),
        (["-d", "17"], "knows no dataset 17"),
        (["-d", "hippocampus"], "did you mean Dataset004_Hippocampus?"),
        (["-d", "4", "-p", "nnUNetPlan"], "did you mean nnUNetPlans?"),
        (["-d", "4", "-p", "../nnUNetPlans"], "-p ../nnUNetPlans is no name of plans"),
        (["-d", "4", "-p", ""], "-p '' is no name of plans"),
        (["-d", "4", "-c", "3d_fulres"], "did you mean 3d_fullres?"),
        (["-d", "4", "-c", "nothing like it"], "choose from 3d_fullres, small"),
        (["--preset", "msd04", "--trainers", "nnUNetTrainerXAtnRes"], "did you mean nnUNetTrainerXAttnRes"),
        (["--preset", "msd04", "--batch-size", "0"], "--batch-size must be from 1 to 1000000, not 0"),
        (["--preset", "msd04", "--batch-size", "1" + "0" * 20], "--batch-size must be from 1 to 1000000, not 1000"),
        (["--preset", "msd04", "--repeats", "0"], "--repeats must be from 1 to 1000000, not 0"),
        (["--preset", "msd04", "--device", "cpu", "--compile"], "never compiles on cpu"),
        (["--preset", "msd04", "--inference", "--batch-size", "2"], "leave out --batch-size or --inference"),
        (["--preset", "msd04", "--json", "nowhere/o.json"], "cannot write nowhere/o.json (No such file or directory)"),
        (["--preset", "msd04", "--chart", "o.tiffany"], "use .png, .pdf or .svg"),
        (["--preset", "msd04", "--csv", "."], "is a folder"),
        (["--preset", "msd04", "--csv", "x" * 300], "File name too long"),
        (["--preset", "msd04", "--csv", "x" * 250], "File name too long"),
        (["--plans", "nowhere.json", "-p", "nnUNetPlans"], "-p goes with -d or --preset"),
        (["--plans", "nowhere.json"], "cannot read nowhere.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes(arguments, expected, refuse):
    assert expected in refuse(*arguments)


def test_no_gpu(refuse, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "use --device cpu" in refuse("--preset", "msd04", "--device", "cuda")


def test_backend_that_is_not_there(refuse, monkeypatch):
    monkeypatch.setattr("nnunet_xattnres.ops.backends.ATTENTION_BACKENDS", {"reference": None})
    assert "'triton' is not available here" in refuse("--preset", "msd04", "--backend", "triton")


def test_triton_on_a_cpu(refuse, monkeypatch):
    kernels = pytest.importorskip("nnunet_xattnres.ops.triton_operator", reason="Triton is not installed")
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    assert "'triton' needs CUDA" in refuse("--preset", "msd04", "--device", "cpu", "--backend", "triton")


def test_files_that_are_not_python_beside_trainers(refuse, tmp_path, monkeypatch):
    folder = tmp_path / "mine" / "drafts"  # which nnU-Net does not import
    folder.mkdir(parents=True)
    (folder / "draft.py").write_text("class nnUNetTrainerDraft(\n")
    (folder / "null.py").write_bytes(b"\0")
    (folder / "latin1.py").write_bytes(b"# \xe9\n")
    monkeypatch.setenv("nnUNet_extTrainer", str(folder.parent))
    assert "did you mean nnUNetTrainerXAttnRes" in refuse("--preset", "msd04", "--trainers", "nnUNetTrainerXAtnRes")


def test_two_outputs_in_one_file(refuse, tmp_path):
    assert "different files" in refuse("--preset", "msd04", "--json", tmp_path / "x", "--csv", tmp_path / "x")


def test_a_dataset_without_nnunets_folder(refuse, monkeypatch, tmp_path):
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "nowhere"))
    assert "nnUNet_preprocessed names " in refuse("-d", "4")
    monkeypatch.setenv("nnUNet_preprocessed", "")
    assert "nnUNet_preprocessed is not set" in refuse("-d", "4")
    monkeypatch.delenv("nnUNet_preprocessed")
    assert "nnUNet_preprocessed is not set" in refuse("-d", "4")


def test_a_number_of_two_datasets(refuse, monkeypatch, tmp_path):
    for name in ("Dataset004_A", "Dataset004_B"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    assert f"Dataset004_A, Dataset004_B in {tmp_path} have the same number" in refuse("-d", "4")


def test_plans_without_dataset_json(refuse, plans_file):
    (plans_file.parent / "dataset.json").unlink()
    assert "nnU-Net puts it beside the plans" in refuse("--plans", plans_file)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"configurations": {"small": {}}}'])
def test_plans_that_are_none(content, refuse, plans_file):
    plans_file.write_text(content)
    assert str(plans_file) in refuse("--plans", plans_file, "-c", "small")


def test_an_architecture_that_is_no_unet(refuse, plans_file):
    plans = json.loads(plans_file.read_text())
    plans["configurations"]["small"]["architecture"]["network_class_name"] = "torch.nn.Identity"
    plans_file.write_text(json.dumps(plans))
    assert "XAttnRes cannot read in a Identity" in refuse("--plans", plans_file, "-c", "small")
