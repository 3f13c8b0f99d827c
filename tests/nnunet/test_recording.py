"""Attention weights in nnU-Net's trainings: recorded in every validation, drawn from time to time."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from helpers.routing import make_initialized_trainer, validate
from nnunet_xattnres.common.errors import XAttnResError
from nnunet_xattnres.nnunet.commands import NnUNet
from nnunet_xattnres.routing import recording
from nnunet_xattnres.routing.recording import RoutingHistory, ValidationRecorder, WeightMeans
from nnunet_xattnres.training import routing_record


class Logger:
    """One of nnU-Net's further loggers, such as Weights and Biases."""

    def __init__(self) -> None:
        self.logged: dict[tuple[str, int], Any] = {}

    def log(self, key: str, value: Any, step: int) -> None:
        self.logged[key, step] = value


@pytest.fixture
def trainer(nnunet_environment: NnUNet) -> Any:
    return make_initialized_trainer(nnunet_environment, configuration="2d_small")


@pytest.fixture
def nothing_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than these trainings."""
    monkeypatch.setattr(routing_record, "save_figure", lambda draw, path: None)


def test_every_validation_is_recorded_and_drawn(trainer):
    logger = Logger()
    trainer.logger.loggers.append(logger)
    for epoch in range(2):
        file = validate(trainer, epoch)
    history = RoutingHistory.read(file)
    assert history.sources == trainer.network.routing_sources
    assert list(history.epochs) == [0, 1]
    for target, weights in history.epochs[1].items():
        # Queries are zero before the first training step.
        assert weights == pytest.approx([1 / len(weights)] * len(weights), abs=1e-5)
        assert [logger.logged[f"routing/{target}/{name}", 1] for name in history.sources[target]] == weights
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("training_steps, patches", [(2, [1]), (50, [2]), (99, [2]), (100, [2, 2]), (250, [2, 2])])
def test_only_as_many_patches_are_recorded_as_cost_little(trainer, monkeypatch, training_steps, patches):
    calls = []
    monkeypatch.setattr(WeightMeans, "add", lambda self, target, weights: calls.append((target, weights.shape[1])))
    trainer.num_iterations_per_epoch = training_steps
    validate(trainer, num_batches=3)
    assert calls == [(target, number) for number in patches for target in trainer.network.routing_sources]
    assert not Path(trainer.output_folder, recording.RECORD).exists()  # nothing was taken in


def test_drawing_takes_little_of_the_time(trainer, monkeypatch):
    clock, drawn = [0.0], []

    def draw(*arguments: object) -> None:
        drawn.append(trainer.current_epoch)
        clock[0] += 2
        Path(trainer.output_folder, recording.PICTURE).touch()

    monkeypatch.setattr(routing_record, "monotonic", lambda: clock[0])
    monkeypatch.setattr(routing_record, "save_figure", draw)
    trainer.num_epochs = 6
    monkeypatch.setattr(routing_record, "DRAWING_SHARE", 0.01)
    # At once, for there is no picture yet, and then 200 s after it has taken two.
    for epoch, clock[0] in enumerate((90, 110, 280, 300, 320, 330)):
        file = validate(trainer, epoch)
    assert drawn == [0, 3, 5]
    assert list(RoutingHistory.read(file).epochs) == list(range(6))


@pytest.mark.usefixtures("nothing_drawn")
def test_a_continued_training_appends(trainer, nnunet_environment):
    for epoch in range(3):
        file = validate(trainer, epoch)
    before = RoutingHistory.read(file)
    again = make_initialized_trainer(nnunet_environment, configuration="2d_small")
    with torch.no_grad():
        again.network.xattnres["D0"].query.fill_(1.0)
    validate(again, epoch=1)
    history = RoutingHistory.read(file)
    assert list(history.epochs) == [0, 1]
    assert history.epochs[0] == before.epochs[0]
    assert history.epochs[1] != before.epochs[1]


@pytest.mark.usefixtures("nothing_drawn")
@pytest.mark.parametrize(
    "content", ['{"sources": {"D0"', '{"sources": {"D0": ["E0"]}, "epochs": {"0": {"D0": [1]}}}', "NaN inside"]
)
def test_a_file_of_no_use_makes_room(trainer, content, capsys):
    if content == "NaN inside":
        sources = trainer.network.routing_sources
        no_numbers = {target: [math.nan] * len(names) for target, names in sources.items()}
        content = json.dumps({"sources": sources, "epochs": {"3": no_numbers}})
    record = Path(trainer.output_folder, recording.RECORD)
    record.write_text(content)
    assert list(RoutingHistory.read(validate(trainer, epoch=4)).epochs) == [4]
    assert "starts anew" in capsys.readouterr().out
    assert record.with_suffix(".old.json").read_text() == content


@pytest.mark.usefixtures("nothing_drawn")
def test_a_file_that_cannot_be_read_now_stays(trainer, monkeypatch, capsys):
    before = validate(trainer).read_text()

    def fail(path: Path) -> bytes:
        raise OSError("Stale file handle")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", fail)
        record = validate(trainer, epoch=1)
    assert "of epoch 1 are not recorded (OSError" in capsys.readouterr().out
    assert record.read_text() == before


def test_a_pass_that_fails_does_not_end_a_training(trainer, monkeypatch, capsys):
    def fail(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(WeightMeans, "add", fail)
    assert not validate(trainer).exists()
    assert "of epoch 0 are not recorded (OutOfMemoryError: CUDA out of memory)" in capsys.readouterr().out


def test_a_picture_that_fails_leaves_the_record(trainer, monkeypatch, capsys):
    trainer.logger.loggers.append(logger := Logger())
    monkeypatch.setattr(routing_record, "draw_history", lambda history: 1 / 0)
    assert list(RoutingHistory.read(validate(trainer)).epochs) == [0]
    assert logger.logged
    assert "of epoch 0 are not drawn (ZeroDivisionError" in capsys.readouterr().out


def test_a_full_disk_does_not_end_a_training(trainer, monkeypatch, capsys):
    def disk_full(*arguments: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(RoutingHistory, "write", disk_full)
    validate(trainer)
    assert "of epoch 0 are not recorded (OSError: No space left on device)" in capsys.readouterr().out


@pytest.mark.usefixtures("nothing_drawn")
def test_weights_that_are_no_numbers_are_null(trainer):
    trainer.logger.loggers.append(logger := Logger())
    with torch.no_grad():
        trainer.network.xattnres["D0"].query.fill_(math.nan)
    content = json.loads(validate(trainer).read_text(), parse_constant=pytest.fail)
    assert set(content["epochs"]["0"]["D0"]) == {None}
    assert not any(key.startswith("routing/D0/") for key, _ in logger.logged)


def test_the_log_says_what_all_of_recording_has_cost(trainer, monkeypatch, capsys):
    """After the first epoch and after the last one."""
    clock = [0.0]

    def takes(seconds: float, result: Any = None) -> Any:
        def work(*arguments: object) -> Any:
            clock[0] += seconds
            return result

        return work

    means = {target: [0.5] * len(names) for target, names in trainer.network.routing_sources.items()}
    monkeypatch.setattr(routing_record, "monotonic", lambda: clock[0])
    monkeypatch.setattr(ValidationRecorder, "observe", takes(1.0))
    monkeypatch.setattr(ValidationRecorder, "means", takes(10.0, means))
    monkeypatch.setattr(RoutingHistory, "write", takes(100.0))
    monkeypatch.setattr(routing_record, "save_figure", takes(1000.0))
    trainer._routing_record = routing_record.RoutingRecord(trainer)
    trainer.num_epochs = 3
    for epoch in range(3):
        validate(trainer, epoch)
    told = re.findall(r"weights has taken (\S+) s of (\S+) s so far; (\S+) switches", capsys.readouterr().out)
    # There is no picture, so it is drawn in every epoch.
    each, switch = 3 * 1.0 + 10 + 100 + 1000, "nnUNet_xattnres_record=false"
    assert told == [(str(each), str(each), switch), (str(3 * each), str(3 * each), switch)]


@pytest.mark.parametrize(
    "value, records", [("false", False), ("0", False), ("F", False), ("True", True), ("1", True), ("t", True)]
)
def test_a_variable_switches_it_off(nnunet_environment, monkeypatch, value, records):
    monkeypatch.setattr(routing_record, "save_figure", lambda draw, path: None)
    monkeypatch.setenv("nnUNet_xattnres_record", value)
    passes = []
    monkeypatch.setattr(ValidationRecorder, "observe", lambda self, data: passes.append(data))
    trainer = make_initialized_trainer(nnunet_environment, configuration="2d_small")
    assert not validate(trainer).exists()
    assert bool(passes) == records


@pytest.mark.parametrize("value", ["yes", "on", "", "false "])
def test_another_word_is_refused_when_the_trainer_is_made(nnunet_environment, monkeypatch, value):
    monkeypatch.setenv("nnUNet_xattnres_record", value)
    with pytest.raises(XAttnResError, match=f"^nnUNet_xattnres_record={value} is neither true, 1, t nor false, 0, f: "):
        make_initialized_trainer(nnunet_environment, configuration="2d_small")


@pytest.mark.parametrize("name", ["nnUNetTrainerPlanned", "nnUNetTrainerNoSkip"])
def test_where_nothing_is_read_nothing_is_written(nnunet_environment, name):
    trainer = make_initialized_trainer(nnunet_environment, name, "2d_small")
    folder = validate(trainer).parent
    assert not (folder / recording.RECORD).exists()
    assert not (folder / recording.PICTURE).exists()


def test_a_compiled_network_is_recorded_as_it_is_uncompiled(trainer):
    with torch.no_grad():
        torch.nn.init.normal_(trainer.network.xattnres["D0"].query)
    image = torch.randn(2, 1, *trainer.configuration_manager.patch_size)
    counter = CompileCounterWithBackend("eager")
    recorded = []
    for network in (trainer.network, torch.compile(trainer.network, backend=counter)):
        trainer.network = network
        trainer.on_validation_epoch_start()
        trainer._routing_record.recorder.observe(image)
        recorded.append(trainer._routing_record.recorder.means())
    assert counter.frame_count == 0
    assert recorded[0] == recorded[1]
