import io
import json
import os
import signal
import sys
import tarfile
import time
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import SimpleITK as sitk

from helpers.plans import ISOTROPIC, planned
from nnunet_xattnres.common.errors import XAttnResError
from nnunet_xattnres.common.processes import last_meaningful_line
from nnunet_xattnres.nnunet.commands import NnUNet, find_command
from nnunet_xattnres.nnunet.datasets import phantom_dataset, read_dataset
from nnunet_xattnres.nnunet.derived_configurations import TrainingBudget
from nnunet_xattnres.tools.demo import BUDGET, Demo, check_trainer, run_demo
from nnunet_xattnres.tools.demo_report import PicturedCase, dice_table, draw_cases

TRAINER = "nnUNetTrainerXAttnRes"
SHAPE = (8, 9, 10)


def write_image(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(sitk.GetImageFromArray(array), str(path))


def write_cases(folder, suffix, number=5):
    """Noise, with a block of label 1 and one of label 2 in each case."""
    rng = np.random.default_rng(0)
    labels = np.zeros(SHAPE, np.uint8)
    labels[2:5, 2:5, 2:5] = 1
    labels[5:7, 5:7, 5:7] = 2
    for case in range(number):
        write_image(folder / "imagesTr" / f"case_{case}{suffix}.nii.gz", rng.normal(size=SHAPE).astype(np.float32))
        write_image(folder / "labelsTr" / f"case_{case}.nii.gz", labels)


@pytest.fixture
def raw(tmp_path):
    """A tiny dataset in nnU-Net's raw format."""
    folder = tmp_path / "data" / "Dataset123_Tiny"
    write_cases(folder, "_0000")
    dataset_json = {
        "channel_names": {"0": "noise"},
        "labels": {"background": 0, "large": 1, "small": 2},
        "numTraining": 5,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(dataset_json))
    return folder


@pytest.fixture
def msd(tmp_path):
    """The same as a task of the Medical Segmentation Decathlon."""
    folder = tmp_path / "data" / "Task12_Tiny"
    write_cases(folder, "")
    (folder / "imagesTs").mkdir()
    dataset_json = {
        "modality": {"0": "noise"},
        "labels": {"0": "background", "1": "large", "2": "small"},
        "numTraining": 5,
        "training": [],
        "test": [],
    }
    (folder / "dataset.json").write_text(json.dumps(dataset_json))
    return folder


def edit_json(path, **changes):
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def files_in(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def refusal(data, workdir, trainer=TRAINER):
    """The demo's error for `data`, after checking that it is one line and leaves neither traces nor changes."""
    before = files_in(data) if data.is_dir() else None
    with pytest.raises(XAttnResError) as error:
        run_demo(data, workdir, trainer, baseline=False)
    assert "\n" not in str(error.value)
    assert not list(workdir.glob("nnUNet_raw/*"))
    assert not (workdir / ".staging").exists()
    if before is not None:
        assert files_in(data) == before
    return str(error.value)


# Data that cannot be used


def test_missing_folder(tmp_path):
    assert "does not exist" in refusal(tmp_path / "nowhere", tmp_path / "work")


def test_archive_instead_of_a_folder(tmp_path):
    (tmp_path / "Task12_Tiny.tar").write_bytes(b"")
    assert "unpacked" in refusal(tmp_path / "Task12_Tiny.tar", tmp_path / "work")


def test_folder_of_neither_layout(tmp_path):
    (tmp_path / "holiday").mkdir()
    message = refusal(tmp_path / "holiday", tmp_path / "work")
    assert "dataset.json" in message
    assert "TaskNN_Name" in message
    assert "DatasetNNN_Name" in message


def test_invalid_json(raw, tmp_path):
    (raw / "dataset.json").write_text('{"labels": ')
    assert "not valid JSON" in refusal(raw, tmp_path / "work")


@pytest.mark.parametrize("key", ["labels", "file_ending", "channel_names", "numTraining"])
def test_raw_dataset_lacking_a_key(raw, tmp_path, key):
    edit_json(raw / "dataset.json", **{key: None})
    assert f"has no {key}" in refusal(raw, tmp_path / "work")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"labels": ["background", "large"]}, "labels"),
        ({"labels": {"background": 0, "whole": [1, 2], "small": 2}}, "regions_class_order"),
        ({"labels": {"background": 0, "large": 1, "small": 3}}, "consecutive"),
        ({"labels": {"large": 1, "small": 2}}, "Background"),
        ({"dataset": {"case_0": "imagesTr/case_0_0000.nii.gz"}}, "training cases"),
    ],
)
def test_raw_dataset_with_a_wrong_entry(raw, tmp_path, changes, complaint):
    edit_json(raw / "dataset.json", **changes)
    assert complaint in refusal(raw, tmp_path / "work")


def test_msd_task_lacking_a_key(msd, tmp_path):
    edit_json(msd / "dataset.json", training=None)
    assert "has no training" in refusal(msd, tmp_path / "work")


@pytest.mark.parametrize("layout", ["raw", "msd"])
def test_folder_that_nnunet_cannot_name(layout, tmp_path, request):
    folder = request.getfixturevalue(layout)
    renamed = folder.rename(folder.with_name("Hippocampus"))
    assert "rename" in refusal(renamed, tmp_path / "work")


def test_msd_task_without_test_images_folder(msd, tmp_path):
    (msd / "imagesTs").rmdir()
    assert "imagesTs" in refusal(msd, tmp_path / "work")


@pytest.mark.parametrize("folder", ["imagesTr", "labelsTr"])
@pytest.mark.parametrize("layout", ["raw", "msd"])
def test_truncated_nifti(layout, folder, tmp_path, request):
    data = request.getfixturevalue(layout)
    damaged = sorted((data / folder).iterdir())[2]
    damaged.write_bytes(damaged.read_bytes()[:-40])
    message = refusal(data, tmp_path / "work")
    assert "truncated" in message
    assert damaged.name in message


def test_case_without_label(raw, tmp_path):
    (raw / "labelsTr" / "case_3.nii.gz").unlink()
    message = refusal(raw, tmp_path / "work")
    assert "case_3 has no label" in message


def test_too_few_cases(raw, tmp_path):
    for file in (raw / "imagesTr/case_4_0000.nii.gz", raw / "labelsTr/case_4.nii.gz"):
        file.unlink()
    edit_json(raw / "dataset.json", numTraining=4)
    assert "4 training cases" in refusal(raw, tmp_path / "work")


def test_label_of_another_shape(raw, tmp_path):
    write_image(raw / "labelsTr" / "case_2.nii.gz", np.zeros((8, 9, 11), np.uint8))
    message = refusal(raw, tmp_path / "work")
    assert "labelsTr/case_2.nii.gz" in message
    assert "Shape mismatch" in message
    assert "(8, 9, 11)" in message


def test_unexpected_label_value_in_an_msd_task(msd, tmp_path):
    write_image(msd / "labelsTr" / "case_1.nii.gz", np.full(SHAPE, 7, np.uint8))
    message = refusal(msd, tmp_path / "work")
    assert str(msd) in message
    assert "labelsTr/case_1.nii.gz" in message
    assert "Unexpected labels" in message


def test_cases_that_dataset_json_does_not_announce(raw, tmp_path):
    edit_json(raw / "dataset.json", numTraining=6)
    message = refusal(raw, tmp_path / "work")
    assert "(6)" in message
    assert "Found 5" in message


def test_unknown_trainer_is_refused_before_anything_is_converted(msd, tmp_path):
    message = refusal(msd, tmp_path / "work", trainer="nnUNetTrainerXAtnRes")
    assert TRAINER in message
    assert not (tmp_path / "work").exists()


def test_trainer_without_the_mixin_is_said_to_ignore_the_budget(capsys, monkeypatch):
    monkeypatch.delenv("nnUNet_extTrainer", raising=False)
    check_trainer(TRAINER)
    assert "nnUNet_extTrainer" not in os.environ
    assert capsys.readouterr().out == ""
    check_trainer("nnUNetTrainerDA5")
    assert "ignores" in capsys.readouterr().out


def test_unwritable_workdir(raw, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(XAttnResError, match="--workdir"):
        run_demo(raw, tmp_path / "file" / "work", TRAINER, baseline=False)


# The steps


class RecordingNnUNet(NnUNet):
    """Notes the commands instead of running them."""

    def __init__(self, workdir):
        super().__init__(workdir, "cpu")
        object.__setattr__(self, "commands", [])

    def run(self, *command, log, environment=None):
        self.commands.append(command)


@pytest.fixture
def nnunet(tmp_path):
    (tmp_path / "work").mkdir()
    return RecordingNnUNet(tmp_path / "work")


@pytest.fixture
def preprocessed(nnunet, raw):
    """The demo with results of its first two steps in place."""
    demo = Demo(nnunet, read_dataset(raw), num_steps=7)
    nnunet.raw.mkdir()
    demo.raw_dataset.symlink_to(raw)
    references = demo.preprocessed_dataset / "gt_segmentations"
    references.mkdir(parents=True)
    for label in (raw / "labelsTr").iterdir():
        (references / label.name).symlink_to(label)
    splits = [{"train": ["case_0", "case_1", "case_2"], "val": ["case_3", "case_4"]}]
    (demo.preprocessed_dataset / "splits_final.json").write_text(json.dumps(splits))
    return demo


def checkpoint(demo, name, trainer=TRAINER):
    path = demo.nnunet.results / "Dataset123_Tiny" / f"{trainer}__nnUNetPlans__3d_fullres_demo" / "fold_0" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    return path


def test_raw_dataset_is_linked_and_recognised(raw, nnunet):
    Demo(nnunet, read_dataset(raw), 7).get_dataset()
    dataset = nnunet.raw / "Dataset123_Tiny"
    assert dataset.resolve() == raw
    with redirect_stdout(io.StringIO()) as output:
        Demo(nnunet, read_dataset(raw), 7).get_dataset()
    assert "Already there" in output.getvalue()


def test_msd_task_is_converted_and_recognised(msd, tmp_path):
    nnunet = NnUNet(tmp_path / "work", "cpu")
    nnunet.workdir.mkdir()
    Demo(nnunet, read_dataset(msd), 7).get_dataset()
    dataset = nnunet.raw / "Dataset012_Tiny"
    assert {path.name for path in (dataset / "imagesTr").iterdir()} == {f"case_{n}_0000.nii.gz" for n in range(5)}
    with redirect_stdout(io.StringIO()) as output:
        Demo(nnunet, read_dataset(msd), 7).get_dataset()
    assert "Already there" in output.getvalue()
    elsewhere = msd.parent / "copy" / msd.name
    elsewhere.parent.mkdir()
    msd.rename(elsewhere)
    with pytest.raises(XAttnResError, match="--workdir"):
        Demo(nnunet, read_dataset(elsewhere), 7).get_dataset()


def test_archive_of_an_msd_task_is_unpacked_and_converted(msd, tmp_path):
    archive = tmp_path / "Task12_Tiny.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(msd, arcname="Task12_Tiny")
    nnunet = NnUNet(tmp_path / "work", "cpu")
    nnunet.workdir.mkdir()
    Demo(nnunet, read_dataset(archive), 7).get_dataset()
    dataset = nnunet.raw / "Dataset012_Tiny"
    assert {path.name for path in (dataset / "imagesTr").iterdir()} == {f"case_{n}_0000.nii.gz" for n in range(5)}
    assert not (nnunet.workdir / ".staging").exists()


def test_number_that_is_taken(raw, nnunet):
    (nnunet.preprocessed / "Dataset123_Other").mkdir(parents=True)
    with pytest.raises(XAttnResError, match="same number"):
        Demo(nnunet, read_dataset(raw), 7).get_dataset()


def test_preprocessing_is_recognised_when_complete(preprocessed):
    preprocessed.plan_and_preprocess()
    assert preprocessed.nnunet.commands == []
    (preprocessed.preprocessed_dataset / "gt_segmentations" / "case_4.nii.gz").unlink()
    preprocessed.plan_and_preprocess()
    [command] = preprocessed.nnunet.commands
    assert command[:5] == ("nnUNetv2_plan_and_preprocess", "-d", "123", "-c", "3d_fullres")


def test_images_of_one_slice_use_the_2d_configuration(preprocessed, raw):
    for image in (raw / "imagesTr").iterdir():
        write_image(image, np.zeros((1, 9, 10), np.float32))
    assert preprocessed.planned_configuration == "2d"


def test_training_starts_continues_or_is_finished(preprocessed):
    preprocessed.train(TRAINER)
    checkpoint(preprocessed, "checkpoint_best.pth")
    preprocessed.train(TRAINER)
    checkpoint(preprocessed, "checkpoint_final.pth")
    preprocessed.train(TRAINER)
    first, second = preprocessed.nnunet.commands
    start = ("nnUNetv2_train", "Dataset123_Tiny", "3d_fullres_demo", "0", "-tr", TRAINER, "-device", "cpu")
    assert first == start
    assert second == (*start, "--c")


def test_prediction_is_repeated_only_after_a_new_training(preprocessed):
    final = checkpoint(preprocessed, "checkpoint_final.pth")
    predictions = preprocessed.output / "predictions" / TRAINER
    commands = preprocessed.nnunet.commands

    incomplete = predictions.with_name(f"{TRAINER}.incomplete")
    run = preprocessed.nnunet.run

    def run_and_write(*command, log, environment=None):
        run(*command, log=log)
        incomplete.mkdir(parents=True)

    object.__setattr__(preprocessed.nnunet, "run", run_and_write)
    preprocessed.predict(TRAINER)
    preprocessed.predict(TRAINER)
    assert len(commands) == 1
    assert predictions.is_dir()
    assert {path.name for path in preprocessed.held_out_images.iterdir()} == {
        "case_3_0000.nii.gz",
        "case_4_0000.nii.gz",
    }
    assert {path.name for path in preprocessed.held_out_references.iterdir()} == {"case_3.nii.gz", "case_4.nii.gz"}
    later = predictions.stat().st_mtime + 10
    os.utime(final, (later, later))
    preprocessed.predict(TRAINER)
    assert len(commands) == 2


def test_added_configuration_is_kept(preprocessed):
    plans = planned(ISOTROPIC[:4], [40, 56, 40])
    plans["configurations"]["3d_fullres"] = plans["configurations"].pop("full")
    preprocessed.plans_file.write_text(json.dumps(plans))
    preprocessed.add_configuration()
    added = json.loads(preprocessed.plans_file.read_text())
    small = added["configurations"]["3d_fullres_demo"]
    assert small["training"] == asdict(BUDGET)
    assert small["batch_size"] >= 2
    small["batch_size"] = 3
    preprocessed.plans_file.write_text(json.dumps(added))
    preprocessed.add_configuration()
    assert json.loads(preprocessed.plans_file.read_text()) == added


# The report


def summary(dice, files=()):
    return {
        "mean": {key: {"Dice": value} for key, value in dice.items()},
        "foreground_mean": {"Dice": float(np.mean(list(dice.values())))},
        "metric_per_case": [],
    }


def test_dice_table_has_a_row_per_label_and_a_column_per_trainer():
    table = dice_table(
        {"A": summary({1: 0.5, 2: 0.75}), "LongName": summary({1: 0.25, 2: 1.0})},
        {"background": 0, "large": 1, "small": 2},
    )
    assert [line.split() for line in table.splitlines()] == [
        ["A", "LongName"],
        ["large", "0.500", "0.250"],
        ["small", "0.750", "1.000"],
        ["mean", "0.625", "0.625"],
    ]
    assert len({len(line) for line in table.splitlines()}) == 1


def test_dice_table_names_regions():
    table = dice_table({"A": summary({(1, 2): 0.5, (2,): 0.75})}, {"background": 0, "whole": [1, 2], "core": [2]})
    assert [line.split()[0] for line in table.splitlines()] == ["A", "whole", "core", "mean"]


def test_picture_shows_the_largest_slice_in_the_labels_colours(tmp_path):
    reference = np.zeros((3, 20, 30), np.uint8)
    reference[1, 2:18, 2:28] = 1
    reference[2, 5:7, 5:7] = 2
    image = np.zeros(reference.shape)
    case = PicturedCase("case_0", image, reference, {"A": 2 * reference}, {"A": 0.25}, (1.0, 1.0))
    figure = draw_cases([case, case], {1: "large", 2: "small"})
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == [*2 * ["case_0\nslice 1"], *2 * [""], *2 * ["Dice 0.25"]]
    assert [axis.get_ylabel() for axis in figure.axes] == ["image", "", "reference", "", "A", ""]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["large", "small"]
    figure.savefig(tmp_path / "demo.png")
    pixels = matplotlib.image.imread(tmp_path / "demo.png")[..., :3].reshape(-1, 3)
    shown = {tuple(colour) for colour in np.unique((pixels * 255).round().astype(int), axis=0)}
    assert {(230, 159, 0), (86, 180, 233)} <= shown


# nnU-Net's commands


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Makes a console command on PATH out of Python source."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)

    def make(source, name="nnUNetv2_pretend"):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!{sys.executable}\n{source}")
        path.chmod(0o755)
        return name

    return make


def test_output_goes_to_the_terminal_and_to_the_log(command, tmp_path, capsys):
    name = command("import sys\nsys.stdout.write('10%|\\r20%|\\rdöne\\n')\nsys.stderr.write('warned\\n')")
    NnUNet(tmp_path, "cpu").run(name, log="pretend")
    assert "10%|\r20%|\rdöne\n" in capsys.readouterr().out
    log = (tmp_path / "logs" / "pretend.log").read_bytes().decode()
    assert "10%|\r20%|\rdöne\n" in log
    assert "warned" in log


def test_failure_is_one_line_with_the_reason_and_the_log(command, tmp_path):
    name = command("print('fine so far', flush=True)\nraise RuntimeError('no such case')")
    with pytest.raises(XAttnResError) as error:
        NnUNet(tmp_path, "cpu").run(name, "-d", "4", log="pretend")
    message = str(error.value)
    assert "\n" not in message
    assert f"{name} -d 4" in message
    assert "RuntimeError: no such case" in message
    assert str(tmp_path / "logs" / "pretend.log") in message


def test_killed_command_names_the_signal(command, tmp_path):
    name = command("import os\nos.kill(os.getpid(), 9)")
    with pytest.raises(XAttnResError, match="SIGKILL"):
        NnUNet(tmp_path, "cpu").run(name, log="pretend")


def test_workers_of_a_killed_command_end_with_it(command, tmp_path):
    name = command(
        "import os, subprocess, sys\n"
        "worker = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(worker.pid))\n"
        "os.kill(os.getpid(), 9)\n"
    )
    with pytest.raises(XAttnResError, match="SIGKILL"):
        NnUNet(tmp_path, "cpu").run(name, log="pretend")
    assert wait_until_ended(int((tmp_path / "pid").read_text()))


def test_missing_command_says_how_to_get_it():
    with pytest.raises(XAttnResError, match="pip install nnunetv2"):
        find_command("nnUNetv2_does_not_exist")


def test_nnunet_is_found_without_an_activated_environment(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert Path(find_command("nnUNetv2_train")).parent == Path(sys.executable).parent


def interrupted(text):
    raise KeyboardInterrupt


def terminated(text):
    os.kill(os.getpid(), signal.SIGTERM)
    # The handler runs as soon as Python code does.
    time.sleep(5)


@pytest.mark.parametrize(
    ("interruption", "exception"), [(interrupted, KeyboardInterrupt), (terminated, SystemExit)], ids=["ctrl-c", "term"]
)
def test_interruption_ends_the_command_and_its_workers(command, tmp_path, monkeypatch, interruption, exception):
    name = command(
        "import os, subprocess, sys, time\n"
        "worker = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(tmp_path / 'pids')!r}, 'w').write(f'{{os.getpid()}} {{worker.pid}}')\n"
        "print('ready', flush=True)\n"
        "time.sleep(600)\n"
    )
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sys.stdout, "write", interruption)
    with pytest.raises(exception):
        NnUNet(tmp_path, "cpu").run(name, log="pretend")
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGTERM) == handler
    for pid in map(int, (tmp_path / "pids").read_text().split()):
        assert wait_until_ended(pid), f"process {pid} still runs"


def wait_until_ended(pid, seconds=10.0):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    return False


def test_last_meaningful_line_skips_progress_bars():
    output = "ValueError: bad\n\n 10%|█   | 1/10 [00:01<00:09,  1.0it/s]\r100%|███| 10/10 [00:10<00:00,  1.0it/s]\n  \n"
    assert last_meaningful_line(output) == "ValueError: bad"


def test_commands_work_in_the_workdir_whatever_the_shell_says(tmp_path, monkeypatch):
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(variable, "/precious")
    monkeypatch.setenv("nnUNet_extTrainer", "/mine")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("nnUNet_n_proc_DA", "7")
    environment = NnUNet(tmp_path, "cpu").environment()
    assert environment["nnUNet_raw"] == str(tmp_path / "nnUNet_raw")
    assert environment["nnUNet_preprocessed"] == str(tmp_path / "nnUNet_preprocessed")
    assert environment["nnUNet_results"] == str(tmp_path / "nnUNet_results")
    assert environment["nnUNet_extTrainer"].split(os.pathsep)[0] == "/mine"
    assert "/precious" not in environment.values()
    assert environment["OMP_NUM_THREADS"] == "1"
    assert environment["nnUNet_n_proc_DA"] == "7"


def test_memory_settings_are_for_the_cpu_only(tmp_path, monkeypatch):
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_", raising=False)
    assert "MALLOC_TRIM_THRESHOLD_" in NnUNet(tmp_path, "cpu").environment()
    assert "MALLOC_TRIM_THRESHOLD_" not in NnUNet(tmp_path, "cuda").environment()


def test_phantoms_are_the_source_without_data():
    assert phantom_dataset().name == "Dataset900_Phantom"


@pytest.mark.long
def test_the_demo_ends_with_a_table_and_a_picture_and_does_nothing_twice(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("nnunet_xattnres.nnunet.datasets.PHANTOM_CASES", 5)
    monkeypatch.setattr("nnunet_xattnres.tools.demo.BUDGET", TrainingBudget(1, 5, 1))
    monkeypatch.setattr("nnunet_xattnres.tools.demo.MAX_PATCH_VOXELS", 30_000)
    run_demo(None, tmp_path, TRAINER, baseline=True)
    first = capsys.readouterr().out
    table = first[first.index("Dice on") :].splitlines()[2:]
    assert table[0].split() == [TRAINER, "nnUNetTrainerPlanned"]
    assert all(0 <= float(dice) <= 1 for row in table[1:4] for dice in row.split()[-2:])
    (picture,) = tmp_path.rglob("demo.png")
    assert matplotlib.image.imread(picture).std() > 0

    results = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pth")}
    run_demo(None, tmp_path, TRAINER, baseline=True)
    second = capsys.readouterr().out
    assert second.count("Already there") == 8
    assert second[second.index("Dice on") :].splitlines()[2:6] == table[:4]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pth")} == results
