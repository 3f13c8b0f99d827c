"""The command `nnunet-xattnres overhead`. No test says how fast anything is."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import numpy as np
import psutil
import pytest
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_xattnres.cli import main
from nnunet_xattnres.common.device import SAMPLING_SECONDS, PeakMemory, is_out_of_memory
from nnunet_xattnres.common.errors import XAttnResError
from nnunet_xattnres.model.build import build_network_from_plans
from nnunet_xattnres.model.config import XAttnResConfig
from nnunet_xattnres.nnunet.commands import NnUNet
from nnunet_xattnres.nnunet.derived_configurations import TrainingBudget, add_small_configuration
from nnunet_xattnres.nnunet.planned_network import from_preset, with_batch_size
from nnunet_xattnres.nnunet.presets import RESENC_PATCHES, TASKS, build_preset
from nnunet_xattnres.overhead import measurement, runner
from nnunet_xattnres.overhead.measurement import (
    FAILED,
    MEASURED,
    OUT_OF_MEMORY,
    Answer,
    Measurement,
    Request,
    measure,
)
from nnunet_xattnres.overhead.results import Comparison, Row, cost_table, draw_ratios, paired_ratio
from nnunet_xattnres.overhead.runner import measure_in_new_process

PLANNED = "nnUNetTrainerPlanned"
NO_SKIP = "nnUNetTrainerXAttnResNoSkip"
DATASET = "Dataset004_Hippocampus"

PUBLISHED = {
    ("msd01", "3d_fullres"): ((128, 128, 128), 2),
    ("msd02", "3d_fullres"): ((80, 192, 160), 2),
    ("msd03", "3d_fullres"): ((128, 128, 128), 2),
    ("msd04", "3d_fullres"): ((40, 56, 40), 9),
    ("msd05", "3d_fullres"): ((20, 320, 256), 2),
    ("msd06", "3d_fullres"): ((80, 192, 160), 2),
    ("msd07", "3d_fullres"): ((40, 224, 224), 2),
    ("msd08", "3d_fullres"): ((64, 192, 192), 2),
    ("msd09", "3d_fullres"): ((64, 192, 160), 2),
    ("msd10", "3d_fullres"): ((56, 192, 160), 2),
    ("msd01", "2d"): ((192, 160), 107),
    ("msd02", "2d"): ((320, 256), 40),
    ("msd03", "2d"): ((512, 512), 12),
    ("msd04", "2d"): ((56, 40), 366),
    ("msd05", "2d"): ((320, 320), 32),
    ("msd06", "2d"): ((512, 512), 12),
    ("msd07", "2d"): ((512, 512), 12),
    ("msd08", "2d"): ((512, 512), 12),
    ("msd09", "2d"): ((512, 512), 12),
    ("msd10", "2d"): ((512, 512), 12),
}


def small_plans(planner_preset="msd04", configuration="3d_fullres"):
    """Hippocampus with a configuration `small` that a CPU trains a step of in a moment."""
    plans, dataset_json = build_preset(planner_preset, configuration)
    budget = TrainingBudget(1, 1, 1)
    add_small_configuration(
        plans, "small", configuration, base_features=2, max_patch_voxels=16**3, batch_size=1, budget=budget
    )
    return plans, dataset_json


@pytest.fixture
def plans_file(tmp_path):
    """As nnU-Net lays them out in nnUNet_preprocessed."""
    folder = tmp_path / "preprocessed" / DATASET
    folder.mkdir(parents=True)
    plans, dataset_json = small_plans()
    (folder / "dataset.json").write_text(json.dumps(dataset_json))
    (folder / "nnUNetPlans.json").write_text(json.dumps(plans))
    return folder / "nnUNetPlans.json"


@pytest.fixture
def outputs(tmp_path):
    """Where a run writes, as arguments."""
    folder = tmp_path / "out"
    folder.mkdir()
    return ["--json", str(folder / "o.json"), "--csv", str(folder / "o.csv"), "--chart", str(folder / "o.png")]


@pytest.fixture
def nnunet_folders(tmp_path, monkeypatch):
    """What the runner does for a measurement's process, for a measurement in this one; the shortest timing."""
    for name, value in NnUNet(tmp_path / "measured", "cpu").folders().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(measurement, "STEP_SECONDS", 0)
    monkeypatch.setattr(measurement, "INFERENCE_SECONDS", 0)


def request(trainer=PLANNED, dataset_json=None, backend=None, **changes):
    plans, preset_json = small_plans()
    plans["configurations"]["small"].update(changes)
    return Request(plans, "small", dataset_json or preset_json, trainer, "cpu", backend)


def trainer_file(folder: Path, body: str) -> None:
    """A trainer of the user's own, `nnUNetTrainerMine`."""
    folder.mkdir(exist_ok=True)
    (folder / "nnUNetTrainerMine.py").write_text(
        "import torch\n"
        "from nnunet_xattnres.model.config import XAttnResConfig\n"
        "from nnunet_xattnres.training.mixin import XAttnResTrainerMixin\n\n\n"
        "class nnUNetTrainerMine(XAttnResTrainerMixin):\n"
        f"{body}\n"
    )


# Presets


def test_every_task_has_both_configurations():
    assert {preset for preset, _ in PUBLISHED} == set(TASKS)


@pytest.mark.parametrize(
    "preset, configuration, plans_name",
    [(*which, "nnUNetPlans") for which in PUBLISHED]
    + [(preset, "3d_fullres", plans_name) for preset, plans_name in RESENC_PATCHES],
)
def test_presets_are_plans_that_nnunet_builds(preset, configuration, plans_name):
    plans, dataset_json = build_preset(preset, configuration, plans_name)
    manager = PlansManager(plans).get_configuration(configuration)
    if plans_name == "nnUNetPlans":
        patch_size, batch_size = PUBLISHED[preset, configuration]
        assert (tuple(manager.patch_size), manager.batch_size) == (patch_size, batch_size)
    bottleneck = np.array(manager.patch_size) / np.prod(manager.pool_op_kernel_sizes, axis=0)
    assert np.all(bottleneck == bottleneck.astype(int))
    assert np.all(bottleneck >= 4)
    assert np.all(bottleneck < 12)
    with torch.device("meta"):
        classes = PlansManager(plans).get_label_manager(dataset_json).num_segmentation_heads
        channels = len(dataset_json["channel_names"])
        network = build_network_from_plans(manager, channels, classes, XAttnResConfig())
        full_resolution = network(torch.empty(1, channels, *manager.patch_size))[0]
    assert classes == TASKS[preset].classes
    assert full_resolution.shape == (1, classes, *manager.patch_size)
    assert ("ResidualEncoder" in manager.network_arch_class_name) == (plans_name != "nnUNetPlans")


def test_the_default_3d_network_has_its_known_size():
    plans, _ = build_preset("msd03")
    planned = XAttnResConfig(read_in_encoder=False, read_in_decoder=False)
    with torch.device("meta"):
        network = build_network_from_plans(PlansManager(plans).get_configuration("3d_fullres"), 1, 3, planned)
    # nnU-Net's 3D U-Net of six stages: 31.2 million.
    assert sum(parameter.numel() for parameter in network.parameters()) == 31_196_399


# One measurement


def test_peak_memory_is_what_was_allocated_in_between():
    memory = PeakMemory(torch.device("cpu"))
    with memory.observed():
        allocated = torch.ones(64_000_000)  # 256 MB
        time.sleep(20 * SAMPLING_SECONDS)
        del allocated
    assert 256e6 <= memory.peak < 300e6
    with memory.observed():
        torch.ones(1000)
    assert 256e6 <= memory.peak < 300e6


def test_memory_is_limited_before_the_kernel_has_to_kill():
    program = """if True:
        import torch
        from nnunet_xattnres.common.device import is_out_of_memory, limit_memory
        limit_memory(300_000_000)
        kept = []
        try:
            for _ in range(10):
                kept.append(torch.ones(20_000_000))  # 80 MB each
        except RuntimeError as error:
            print("refused", len(kept), is_out_of_memory(error))
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "refused 3 True\n", done.stderr


def test_other_errors_are_not_taken_for_want_of_memory():
    assert not is_out_of_memory(RuntimeError("sizes of tensors must match"))
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))


@pytest.mark.parametrize("trainer", [PLANNED, NO_SKIP, "nnUNetTrainerXAttnResBlockInput"])
def test_a_measurement_knows_everything(trainer, nnunet_folders):
    *_, answer = measure(request(trainer))
    assert answer.status == MEASURED, answer.reason
    assert len(answer.step_seconds) == len(answer.inference_seconds) == 1
    assert min(*answer.step_seconds, *answer.inference_seconds, answer.peak_memory, answer.parameters) > 0
    assert answer.compiled is False
    assert answer.threads == torch.get_num_threads()
    assert (
        answer.reads_at
        == {
            PLANNED: [],
            NO_SKIP: ["E2", "D0", "D1"],
            "nnUNetTrainerXAttnResBlockInput": [
                *("E0_block2", "E1_block2", "E2_block2"),
                *("D0_memory", "D0_block2", "D1_memory", "D1_block2"),
            ],
        }[trainer]
    )


def test_every_call_is_timed_but_the_first():
    calls = []
    times = measurement._times(lambda: calls.append(None), seconds=1e-4)
    assert len(times) == len(calls) - 1 > 1
    assert sum(times[:-1]) < 1e-4 <= sum(times)


def test_the_command_imports_nothing_that_warns_of_a_missing_gpu():
    """Before an error of one line, say."""
    code = "import sys, nnunet_xattnres.overhead.runner; sys.exit('torch.utils.cpp_extension' in sys.modules)"
    environment = os.environ | {"CUDA_HOME": "/nowhere", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")


REGIONS = {"background": 0, "whole": [1, 2], "part": [2]}


@pytest.mark.parametrize(
    "labels, trainer",
    [
        (REGIONS, NO_SKIP),
        (REGIONS | {"ignore": 3}, NO_SKIP),
        ({"background": 0, "part": 1, "ignore": 2}, NO_SKIP),
        ({"background": 0, "part": 1}, "nnUNetTrainerNoDeepSupervision"),
    ],
)
def test_targets_fit_the_loss_of_every_kind_of_labels(labels, trainer, nnunet_folders):
    _, dataset_json = small_plans()
    dataset_json |= {"labels": labels, "regions_class_order": [1, 2]}
    *_, answer = measure(request(trainer, dataset_json))
    assert answer.status == MEASURED, answer.reason


def test_2d_and_several_channels(nnunet_folders):
    plans, dataset_json = small_plans("msd01", "2d")
    *_, answer = measure(Request(plans, "small", dataset_json, NO_SKIP, "cpu"))
    assert answer.status == MEASURED, answer.reason


def test_flops_are_those_of_the_batch_and_of_the_network(nnunet_folders):
    def flops(trainer, batch_size=1):
        return Measurement(request(trainer, batch_size=batch_size)).counts(torch.device("meta"))["flops"]

    assert flops(PLANNED, 3) == 3 * flops(PLANNED)
    assert flops("nnUNetTrainerNoSkip") < flops(PLANNED) < flops("nnUNetTrainerXAttnRes")


@pytest.mark.parametrize("error", [NotImplementedError, RuntimeError, TypeError, ValueError])
def test_what_shapes_alone_do_not_tell_is_counted_on_the_device(error, nnunet_folders, monkeypatch):
    *_, expected = measure(request(NO_SKIP))
    counts = Measurement.counts

    def without_meta(self, device):
        if device.type == "meta":
            raise error("needs numbers")
        return counts(self, device)

    monkeypatch.setattr(Measurement, "counts", without_meta)
    *_, answer = measure(request(NO_SKIP))
    assert answer.status == MEASURED, answer.reason
    assert (answer.parameters, answer.flops, answer.reads_at) == (
        expected.parameters,
        expected.flops,
        expected.reads_at,
    )


def test_what_the_user_can_mend_fails_before_anything_is_timed(nnunet_folders, monkeypatch):
    def counts(self, device):
        raise XAttnResError("mend it")

    monkeypatch.setattr(Measurement, "counts", counts)
    monkeypatch.setattr(Measurement, "costs", None)
    assert list(measure(request(NO_SKIP))) == [Answer(FAILED, "mend it")]


def test_the_backend_replaces_the_trainers(nnunet_folders):
    trainer = Measurement(request(NO_SKIP, backend="reference")).trainer
    assert trainer.xattnres_config.backend == "reference"
    assert not trainer.xattnres_config.skip_connections
    assert Measurement(request(NO_SKIP)).trainer.xattnres_config.backend == "auto"


def test_a_batch_that_does_not_fit_is_out_of_memory_with_its_counts():
    voxels = int(np.prod(small_plans()[0]["configurations"]["small"]["patch_size"]))
    batch_size = 2 * psutil.virtual_memory().total // (4 * voxels)
    answer = measure_in_new_process(request(PLANNED, batch_size=batch_size))
    assert answer.status == OUT_OF_MEMORY, answer.reason
    assert answer.parameters > 0


def use_trainer_that(does, tmp_path, monkeypatch):
    """Let nnU-Net find `nnUNetTrainerMine`, whose training step is this line."""
    trainer_file(tmp_path / "mine", f"    def train_step(self, batch):\n        {does}")
    monkeypatch.setenv("nnUNet_extTrainer", str(tmp_path / "mine"))


def test_a_trainer_that_raises_has_failed(nnunet_folders, tmp_path, monkeypatch):
    use_trainer_that("raise ValueError('my mistake\\nand more of it')", tmp_path, monkeypatch)
    *_, answer = measure(request("nnUNetTrainerMine"))
    assert (answer.status, answer.reason) == (FAILED, "ValueError: my mistake")
    assert answer.parameters > 0


def test_a_process_that_the_kernel_kills_was_out_of_memory(tmp_path, monkeypatch):
    use_trainer_that("import os; os.kill(os.getpid(), 9)", tmp_path, monkeypatch)
    answer = measure_in_new_process(request("nnUNetTrainerMine"))
    assert (answer.status, answer.reason) == (OUT_OF_MEMORY, "")
    assert answer.parameters > 0


@pytest.mark.parametrize(
    "return_code, log, status, reason",
    [
        (-signal.SIGABRT, "terminate called after throwing\n  what(): std::bad_alloc", OUT_OF_MEMORY, ""),
        (-signal.SIGABRT, "Fatal\nworse", FAILED, "ended by SIGABRT: worse"),
        (3, "ModuleNotFoundError: no torch\n", FAILED, "exit status 3: ModuleNotFoundError: no torch"),
    ],
)
def test_how_else_a_process_can_end(return_code, log, status, reason):
    answer = runner._of_dead_process(Answer(FAILED, parameters=7), return_code, log)
    assert answer == Answer(status, reason, parameters=7)


# Ratios, table, chart


def answers(*seconds, memory=100, parameters=10):
    return [
        Answer(
            MEASURED,
            step_seconds=list(of_round),
            inference_seconds=[0.5],
            peak_memory=memory,
            parameters=parameters,
            flops=3_000_000_000,
        )
        for of_round in seconds
    ]


def test_ratios_are_paired_by_round():
    # The machine was twice as slow in the second round and thrice in the third.
    planned = Row(PLANNED, answers([1.0, 1.0, 1.2], [2.0], [3.0]))
    ours = Row(NO_SKIP, answers([1.5], [2.0, 2.0, 9.0], [3.3], memory=80))
    figures = Comparison(from_preset("msd04", "3d_fullres", "nnUNetPlans"), [planned, ours]).figures(ours)
    assert figures["step_seconds_ratio"] == pytest.approx(1.1)  # of 1.5, 1.0 and 1.1
    assert figures["step_seconds"] == 2.0
    assert (figures["step_seconds_min"], figures["step_seconds_max"]) == (1.5, 9.0)
    assert figures["peak_memory_bytes_ratio"] == pytest.approx(0.8)
    assert figures["parameters_ratio"] == 1.0


def test_no_ratio_without_both_sides():
    measured = Row(NO_SKIP, answers([1.0]))
    for other in (Row(PLANNED, [Answer(OUT_OF_MEMORY)]), Row(PLANNED)):
        assert paired_ratio(measured, other, lambda answer: answer.peak_memory) is None
        assert paired_ratio(other, measured, lambda answer: answer.peak_memory) is None


def many_comparisons():
    """Ten presets and four trainers, of which some do not get far."""
    comparisons = []
    for preset in TASKS:
        rows = [
            Row("nnUNetTrainerPlanned", answers([12.34], [15.6], memory=12_345_678_901, parameters=112_345_678)),
            Row("nnUNetTrainerXAttnRes", answers([123.4], [156.7], memory=123_456_789_012, parameters=123_456_789)),
            Row("nnUNetTrainerXAttnResNoSkip_250epochs", [Answer(OUT_OF_MEMORY, parameters=5, flops=10**13)]),
            Row("MyOwnTrainer", [Answer(FAILED, "ValueError: my mistake")]),
        ]
        rows[1].answers[0] = replace(rows[1].answers[0], reads_at=[f"E{i}_block{j}" for i in range(8) for j in (2, 3)])
        comparisons.append(Comparison(from_preset(preset, "3d_fullres", "nnUNetPlans"), rows))
    return comparisons


def test_the_table_fits_and_says_what_happened():
    table = cost_table(many_comparisons()[2])
    lines = table.splitlines()
    assert max(map(len, lines)) <= 120
    assert "msd03 (Liver), 3d_fullres of nnUNetPlans" in lines[0]
    assert "128 x 128 x 128, batch 2" in lines[0]
    row = {line.split()[0]: line for line in lines[2:6]}
    assert "[12.3, 15.6] 1.00x" in row["Planned"]
    assert "[123, 157] 10.02x" in row["XAttnRes"]
    assert "out of memory" in row["XAttnResNoSkip_250epochs"]
    assert "failed" in row["MyOwnTrainer"]
    assert "XAttnRes reads at: E0_block2 E0_block3 E1_block2" in table
    assert lines[-1] == "MyOwnTrainer failed: ValueError: my mistake"


def test_the_chart_has_every_bar_and_says_what_has_none():
    figure = draw_ratios(many_comparisons())
    step_time, _, parameters = figure.axes
    assert len(step_time.patches) == 10
    assert {round(float(bar.get_width()), 2) for bar in step_time.patches} == {10.02}
    assert sum(text.get_text() == OUT_OF_MEMORY for text in step_time.texts) == 10
    assert sum(text.get_text() == FAILED for text in step_time.texts) == 10
    assert len(parameters.patches) == 20


def test_the_chart_of_the_planned_network_alone_can_be_drawn():
    comparison = Comparison(from_preset("msd04", "2d", "nnUNetPlans"), [Row(PLANNED, answers([1.0]))])
    draw_ratios([comparison]).canvas.draw()


# The runner


def run_with(answer_of, monkeypatch, *arguments):
    """Run the command with made-up measurements. Returns the exit status and the trainers in order of measurement."""
    order = []

    def made_up(request, compile):
        order.append(request.trainer)
        return answer_of(request.trainer, order.count(request.trainer))

    monkeypatch.setattr(runner, "measure_in_new_process", made_up)
    return main(["overhead", "--device", "cpu", *arguments]), order


def test_trainers_take_turns(monkeypatch, outputs, capsys):
    status, order = run_with(
        lambda trainer, number: answers([1.0])[0], monkeypatch, "--preset", "msd04", "--repeats", "2", *outputs
    )
    assert status == 0
    assert order == [PLANNED, "nnUNetTrainerXAttnRes", NO_SKIP] * 2
    assert "Out of memory" not in capsys.readouterr().out


def test_what_does_not_fit_is_not_tried_again_and_no_failure(monkeypatch, outputs, capsys):
    def answer_of(trainer, number):
        return Answer(OUT_OF_MEMORY, parameters=7) if trainer == NO_SKIP else answers([1.0])[0]

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
        return Answer(FAILED, "ValueError: my mistake") if trainer == NO_SKIP else answers([1.0])[0]

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
        return answers([1.0])[0]

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


def test_the_whole_command(plans_file, outputs, monkeypatch, capsys):
    monkeypatch.setenv("nnUNet_preprocessed", str(plans_file.parents[1]))
    monkeypatch.setenv("MALLOC_ARENA_MAX", "3")
    arguments = ["-d", "4", "-c", "small", "--trainers", NO_SKIP, "--repeats", "1", "--device", "cpu", *outputs]
    assert main(["overhead", *arguments]) == 0
    captured = capsys.readouterr()
    # While it runs there is one bar and nothing of nnU-Net's own output.
    assert all("process" in line for line in captured.err.strip().split("\r") if line.strip()), captured.err
    assert "Please cite" not in captured.out
    assert f"{DATASET}, small of nnUNetPlans" in captured.out
    assert "XAttnResNoSkip reads at: E2 D0 D1" in captured.out
    assert "MALLOC_ARENA_MAX=3" in captured.out
    assert max(map(len, captured.out.splitlines()[:6])) <= 120

    content = json.loads(Path(outputs[1]).read_text())
    assert content["environment"]["torch"] == torch.__version__
    assert content["environment"]["allocator"]["MALLOC_ARENA_MAX"] == "3"
    planned, ours = content["plans"][0]["trainers"]
    assert (planned["trainer"], ours["trainer"]) == (PLANNED, NO_SKIP)
    assert planned["step_seconds_ratio"] == planned["peak_memory_bytes_ratio"] == 1
    assert ours["parameters"] < planned["parameters"]
    assert len(ours["rounds"]) == 1
    assert ours["step_seconds_min"] == min(ours["rounds"][0]["step_seconds"])
    with open(outputs[3]) as file:
        assert [row["trainer"] for row in csv.DictReader(file)] == [PLANNED, NO_SKIP]
    assert matplotlib.image.imread(outputs[5]).std() > 0


def test_ctrl_c_ends_the_measurement_and_leaves_nothing(plans_file, tmp_path):
    mine = tmp_path / "mine"
    trainer_file(
        mine,
        "    def train_step(self, batch):\n"
        f"        open({str(tmp_path / 'pid')!r}, 'w').write(str(__import__('os').getpid()))\n"
        "        __import__('time').sleep(600)",
    )
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    environment = os.environ | {"nnUNet_extTrainer": str(mine), "TMPDIR": str(temporary)}
    plans = ["--plans", str(plans_file), "-c", "small"]
    program = (
        "import nnunet_xattnres.overhead.runner as runner; runner.PLANNED = 'nnUNetTrainerMine'; "
        "from nnunet_xattnres.cli import main; raise SystemExit(main())"
    )
    command = [sys.executable, "-c", program, "overhead", *plans, "--trainers", "nnUNetTrainerMine"]
    process = subprocess.Popen(
        [*command, "--device", "cpu"],
        env=environment,
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        # Whoever runs the tests may ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "pid").is_file() or not (tmp_path / "pid").read_text():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))
    assert not list(temporary.glob("nnunet_xattnres_*"))


# Bad input: one line, before anything is measured


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
        (["-d", "4", "-c", "3d_fulres"], "did you mean 3d_fullres?"),
        (["-d", "4", "-c", "nothing like it"], "choose from 3d_fullres, small"),
        (["--preset", "msd04", "--trainers", "nnUNetTrainerXAtnRes"], "did you mean nnUNetTrainerXAttnRes"),
        (["--preset", "msd04", "--batch-size", "0"], "--batch-size must be from 1 to 1000000, not 0"),
        (["--preset", "msd04", "--batch-size", "1" + "0" * 20], "--batch-size must be from 1 to 1000000, not 1000"),
        (["--preset", "msd04", "--repeats", "0"], "--repeats must be from 1 to 1000000, not 0"),
        (["--preset", "msd04", "--device", "cpu", "--compile"], "never compiles on a CPU"),
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
    assert "'triton' needs a GPU" in refuse("--preset", "msd04", "--device", "cpu", "--backend", "triton")


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


def test_a_dataset_without_nnunets_folder(refuse, monkeypatch):
    monkeypatch.delenv("nnUNet_preprocessed")
    assert "nnUNet_preprocessed is not set" in refuse("-d", "4")


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


def test_the_batch_size_of_an_inherited_configuration(plans_file):
    planned = from_preset("msd04", "3d_fullres", "nnUNetPlans")
    changed = with_batch_size(planned, 5)
    assert (changed.manager.batch_size, planned.manager.batch_size) == (5, 9)


def test_unknown_preset_is_an_error_for_python_too():
    with pytest.raises(XAttnResError, match="there is no preset"):
        build_preset("msd00")
