import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import seaborn
import torch
from matplotlib import style
from torch._dynamo.testing import CompileCounterWithBackend

from helpers.networks import planned_network
from helpers.routing import assert_no_texts_overlap, force_to_read, history_of, make_initialized_trainer, validate
from nnunet_xattnres import BlockXAttnResConfig, XAttnResConfig
from nnunet_xattnres.common.errors import XAttnResError
from nnunet_xattnres.model.build import add_xattnres
from nnunet_xattnres.model.planned_unet import PlannedUNet
from nnunet_xattnres.routing import recording
from nnunet_xattnres.routing.drawing import draw_history, save_figure
from nnunet_xattnres.routing.recording import RoutingHistory, ValidationRecorder, WeightMeans, in_pool_order
from nnunet_xattnres.training import mixin as trainer_module

CONFIGS = {
    "stage": XAttnResConfig(),
    "decoder": XAttnResConfig(skip_connections=False, read_in_encoder=False),
    "residual": XAttnResConfig(fusion="residual"),
    "block": BlockXAttnResConfig(),
    "block-input": BlockXAttnResConfig(isar_in_encoder=True, bank_includes_input=True),
}
SOURCES = {  # of a planned network with three stages
    "stage": {
        "E2": ["E0", "current"],
        "D0": ["E0", "E1", "E2", "current"],
        "D1": ["E0", "E1", "E2", "D0", "current"],
    },
    "decoder": {"D0": ["E0", "E1", "E2", "current"], "D1": ["E0", "E1", "E2", "D0", "current"]},
    "residual": {"E2": ["E0"], "D0": ["E0", "E1", "E2"], "D1": ["E0", "E1", "E2", "D0"]},
    "block": {"D0_memory": ["block1", "block2"], "D1_memory": ["block1", "block2"]},
    "block-input": {
        **{f"E{i}_block2": ["input", "block1", "current"] for i in range(3)},
        **{
            f"D{d}_{part}": sources
            for d in range(2)
            for part, sources in (("memory", ["block1", "block2"]), ("block2", ["input", "block1", "current"]))
        },
    },
}


def network_of(config: str, random_queries: bool = False) -> PlannedUNet:
    network = add_xattnres(planned_network(), CONFIGS[config])
    assert isinstance(network, PlannedUNet)
    if random_queries:
        for name, parameter in network.xattnres.named_parameters():
            if name.endswith("query"):
                torch.nn.init.normal_(parameter)
    return network


class TestCollecting:
    @pytest.mark.parametrize("config", CONFIGS)
    def test_every_target_has_weights_over_its_sources(self, config):
        network, image = network_of(config, random_queries=True), torch.randn(2, 1, 8, 8, 8)
        expected = network(image)
        with network.routing() as weights:
            logits = network(image)
        assert network.routing_sources == SOURCES[config]
        assert weights.keys() == SOURCES[config].keys()
        for target, (of_call,) in weights.items():
            stage = target.partition("_")[0]
            # Encoder stages read at the resolution of the stage before, but inside a stage at its own.
            size = {"E0": 8, "E1": 4, "E2": 4 if target == "E2" else 2, "D0": 4, "D1": 8}[stage]
            assert of_call.shape == (len(SOURCES[config][target]), 2, size, size, size)
            assert not of_call.requires_grad
            torch.testing.assert_close(of_call.sum(dim=0), torch.ones(2, size, size, size))
        assert torch.equal(logits, expected)
        assert all(any(of_call[0].std() > 1e-3 for of_call in weights[target]) for target in list(weights)[1:])

    def test_queries_that_force_a_source_find_it(self):
        network = network_of("stage")
        force_to_read(network, "D1", "E1")
        with network.routing() as weights:
            network(torch.rand(1, 1, 8, 8, 8))
        assert weights["D1"][0][1].min() > 0.99
        assert weights["D0"][0].flatten(1).mean(dim=1) == pytest.approx(0.25)

    def test_calls_add_up_and_end_with_the_context(self):
        network, image = network_of("stage"), torch.randn(1, 1, 8, 8, 8)
        backends = {name: attention.attend for name, attention in network.xattnres.items()}
        means = WeightMeans(network.routing_sources)
        with pytest.raises(KeyError), network.routing(["D1"]) as weights, network.routing(receive=means.add):
            network(image)
            network(image)
            raise KeyError
        network(image)
        assert [len(calls) for calls in weights.values()] == [2]
        assert {name: attention.attend for name, attention in network.xattnres.items()} == backends
        assert means.calls == dict.fromkeys(network.routing_sources, 2)
        torch.testing.assert_close(means.sums["D1"] / 2, torch.full((5,), 0.2))

    def test_means_are_over_calls_and_positions(self):
        means = WeightMeans({"D0": ["E0", "E1"]})
        means.add("D0", torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]))
        means.add("D0", torch.tensor([[[1.0, 1.0]], [[0.0, 0.0]]]))
        assert (means.sums["D0"] / means.calls["D0"]).tolist() == [0.75, 0.25]

    def test_an_unknown_target_is_named_beside_the_known_ones(self):
        network = network_of("stage")
        with pytest.raises(XAttnResError, match="no target D7: choose from E2, D0, D1"), network.routing(["D7"]):
            pass

    def test_a_name_without_a_list_is_an_error(self):
        with pytest.raises(XAttnResError, match=r"routing\(\['D0'\]\)"), network_of("stage").routing("D0"):
            pass

    def test_a_compiled_network_gives_its_weights_inside_the_context_only(self):
        torch._dynamo.reset()
        network, image = network_of("stage", random_queries=True), torch.randn(1, 1, 8, 8, 8)
        compiled = torch.compile(network, backend="eager")
        with torch.no_grad():
            compiled(image)
            with network.routing() as expected:
                network(image)
            with network.routing() as weights:
                compiled(image)
            compiled(image)
        torch.testing.assert_close(weights, expected)

    def test_the_planned_network_without_skips_has_no_targets(self):
        control = XAttnResConfig(skip_connections=False, read_in_encoder=False, read_in_decoder=False)
        assert add_xattnres(planned_network(), control).routing_sources == {}

    def test_sources_are_ordered_as_they_are_computed(self):
        sources = ["current", "D10", "E2", "D9", "E10", "E2"]
        assert in_pool_order(sources) == ["E2", "E10", "D9", "D10", "current"]
        assert in_pool_order(["current", "block1", "block0", "input"]) == ["input", "block0", "block1", "current"]


class TestHistory:
    def test_it_reads_what_it_wrote(self, tmp_path):
        history = history_of(4, 3)
        history.write(tmp_path / "routing.json")
        assert RoutingHistory.read(tmp_path / "routing.json") == history
        assert list(tmp_path.iterdir()) == [tmp_path / "routing.json"]

    def test_a_training_that_goes_on_replaces_what_comes_later(self):
        history = history_of(4, 5)
        history.record(2, {"D0": [1.0]})
        assert list(history.epochs) == [0, 1, 2]
        assert history.epochs[2] == {"D0": [1.0]}

    @pytest.mark.parametrize(
        "content",
        ["", '{"sources": {"D0"', "[]", "{}", '{"sources": {"D0": ["E0"]}, "epochs": {"0": {"D0": [0.5, 0.5]}}}'],
    )
    def test_a_damaged_file_is_an_error(self, content, tmp_path):
        (tmp_path / "routing.json").write_text(content)
        with pytest.raises(XAttnResError, match="no record of attention weights") as error:
            RoutingHistory.read(tmp_path / "routing.json")
        assert "\n" not in str(error.value)


class TestPictureOfATraining:
    @pytest.mark.parametrize("num_stages, num_epochs", [(8, 3), (3, 1)])
    def test_no_texts_overlap(self, num_stages, num_epochs):
        with style.context("default"):
            figure = draw_history(history_of(num_stages, num_epochs))
            assert_no_texts_overlap(figure)

    @pytest.mark.parametrize("num_stages", [8, 10])
    def test_no_two_lines_look_alike(self, num_stages):
        figure = draw_history(history_of(num_stages, 2))
        for axis in figure.axes[1:]:
            looks = [(line.get_color(), line.get_linestyle(), line.get_linewidth()) for line in axis.lines]
            assert len(set(looks)) == len(looks)

    def test_lines_of_a_resolution_have_one_colour(self):
        lines = {line.get_label(): line for line in draw_history(history_of(4, 2)).legends[0].get_lines()}
        assert lines["D0"].get_color() == lines["E2"].get_color() != lines["E0"].get_color()
        assert lines["D0"].get_linestyle() != lines["E2"].get_linestyle()

    def test_the_heat_map_shows_the_source_that_is_read(self):
        network = network_of("stage")
        force_to_read(network, "D1", "E1")
        recorder = ValidationRecorder(network, torch.device("cpu"), training_steps=250)
        recorder.observe(torch.rand(1, 1, 8, 8, 8))
        figure = draw_history(RoutingHistory(recorder.sources, {7: recorder.means()}))
        heat_map = figure.axes[0]
        row = [label.get_text() for label in heat_map.get_yticklabels()].index("D1")
        column = [label.get_text() for label in heat_map.get_xticklabels()].index("E1")
        cells = heat_map.collections[0].get_array()
        assert np.unravel_index(cells.argmax(), cells.shape) == (row, column)
        assert cells[row, column] > 0.99
        assert cells.mask.sum() == 15 - sum(map(len, SOURCES["stage"].values()))
        assert "epoch 7" in figure.get_suptitle()

    @pytest.mark.parametrize("num_epochs", [251, 1000])
    def test_lines_reach_the_latest_epoch(self, num_epochs):
        for axis in draw_history(history_of(3, num_epochs)).axes:
            for line in axis.lines:
                assert line.get_xdata()[0] == 0
                assert line.get_xdata()[-1] == num_epochs - 1

    def test_weights_that_are_no_numbers_leave_gaps(self, tmp_path):
        history = history_of(3, 2)
        history.epochs[1] = {target: [None] * len(names) for target, names in history.sources.items()}
        save_figure(lambda: draw_history(history), tmp_path / "routing.png")
        assert (tmp_path / "routing.png").stat().st_size > 10_000

    def test_it_is_vectors_in_a_pdf_and_the_same_after_nnunet_has_drawn(self, tmp_path):
        def draw(name: str) -> bytes:
            save_figure(lambda: draw_history(history_of(4, 2)), tmp_path / name)
            return (tmp_path / name).read_bytes()

        before = draw("before.png")
        assert draw("routing.pdf").startswith(b"%PDF")
        with style.context("default"):
            seaborn.set_theme(font_scale=2.5)
            assert draw("after.png") == before


class Logger:
    """One of nnU-Net's further loggers, such as Weights and Biases."""

    def __init__(self) -> None:
        self.logged: dict[tuple[str, int], Any] = {}

    def log(self, key: str, value: Any, step: int) -> None:
        self.logged[key, step] = value


class TestTraining:
    def test_every_validation_is_recorded_and_drawn(self, nnunet_environment):
        trainer = make_initialized_trainer(nnunet_environment)
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
    def test_only_as_many_patches_are_recorded_as_cost_little(
        self, nnunet_environment, monkeypatch, training_steps, patches
    ):
        calls = []
        monkeypatch.setattr(WeightMeans, "add", lambda self, target, weights: calls.append((target, weights.shape[1])))
        trainer = make_initialized_trainer(nnunet_environment, configuration="2d_small")
        trainer.num_iterations_per_epoch = training_steps
        validate(trainer, num_batches=3)
        assert calls == [(target, number) for number in patches for target in trainer.network.routing_sources]
        assert not Path(trainer.output_folder, recording.RECORD).exists()  # nothing was taken in

    def test_drawing_takes_little_of_the_time(self, nnunet_environment, monkeypatch):
        clock, drawn = [0.0], []

        def draw(*arguments: object) -> None:
            drawn.append(trainer.current_epoch)
            clock[0] += 2
            Path(trainer.output_folder, recording.PICTURE).touch()

        monkeypatch.setattr(trainer_module, "monotonic", lambda: clock[0])
        monkeypatch.setattr(trainer_module, "save_figure", draw)
        trainer = make_initialized_trainer(nnunet_environment, configuration="2d_small")
        trainer.num_epochs = 6
        monkeypatch.setattr(trainer_module, "DRAWING_SHARE", 0.01)
        # At once, for there is no picture yet, and then 200 s after it has taken two.
        for epoch, clock[0] in enumerate((90, 110, 280, 300, 320, 330)):
            file = validate(trainer, epoch)
        assert drawn == [0, 3, 5]
        assert list(RoutingHistory.read(file).epochs) == list(range(6))

    def test_a_continued_training_appends(self, nnunet_environment):
        trainer = make_initialized_trainer(nnunet_environment, configuration="2d_small")
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

    @pytest.mark.parametrize(
        "content", ['{"sources": {"D0"', '{"sources": {"D0": ["E0"]}, "epochs": {"0": {"D0": [1]}}}', "NaN inside"]
    )
    def test_a_file_of_no_use_makes_room(self, nnunet_environment, content, capsys):
        trainer = make_initialized_trainer(nnunet_environment, configuration="2d_small")
        if content == "NaN inside":
            sources = trainer.network.routing_sources
            no_numbers = {target: [math.nan] * len(names) for target, names in sources.items()}
            content = json.dumps({"sources": sources, "epochs": {"3": no_numbers}})
        record = Path(trainer.output_folder, recording.RECORD)
        record.write_text(content)
        assert list(RoutingHistory.read(validate(trainer, epoch=4)).epochs) == [4]
        assert "starts anew" in capsys.readouterr().out
        assert record.with_suffix(".old.json").read_text() == content

    def test_a_file_that_cannot_be_read_now_stays(self, nnunet_environment, monkeypatch, capsys):
        trainer = make_initialized_trainer(nnunet_environment, configuration="2d_small")
        before = validate(trainer).read_text()

        def fail(path: Path) -> bytes:
            raise OSError("Stale file handle")

        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_bytes", fail)
            record = validate(trainer, epoch=1)
        assert "of epoch 1 are not recorded (OSError" in capsys.readouterr().out
        assert record.read_text() == before

    def test_a_pass_that_fails_does_not_end_a_training(self, nnunet_environment, monkeypatch, capsys):
        def fail(*arguments: object) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

        trainer = make_initialized_trainer(nnunet_environment, configuration="2d_small")
        monkeypatch.setattr(WeightMeans, "add", fail)
        assert not validate(trainer).exists()
        assert "of epoch 0 are not recorded (OutOfMemoryError: CUDA out of memory)" in capsys.readouterr().out

    def test_a_picture_that_fails_leaves_the_record(self, nnunet_environment, monkeypatch, capsys):
        trainer = make_initialized_trainer(nnunet_environment, configuration="2d_small")
        trainer.logger.loggers.append(logger := Logger())
        monkeypatch.setattr(trainer_module, "draw_history", lambda history: 1 / 0)
        assert list(RoutingHistory.read(validate(trainer)).epochs) == [0]
        assert logger.logged
        assert "of epoch 0 are not drawn (ZeroDivisionError" in capsys.readouterr().out

    def test_a_full_disk_does_not_end_a_training(self, nnunet_environment, monkeypatch, capsys):
        def disk_full(*arguments: object) -> None:
            raise OSError("No space left on device")

        trainer = make_initialized_trainer(nnunet_environment, configuration="2d_small")
        monkeypatch.setattr(RoutingHistory, "write", disk_full)
        validate(trainer)
        assert "of epoch 0 are not recorded (OSError: No space left on device)" in capsys.readouterr().out

    def test_weights_that_are_no_numbers_are_null(self, nnunet_environment):
        trainer = make_initialized_trainer(nnunet_environment, configuration="2d_small")
        trainer.logger.loggers.append(logger := Logger())
        with torch.no_grad():
            trainer.network.xattnres["D0"].query.fill_(math.nan)
        content = json.loads(validate(trainer).read_text(), parse_constant=pytest.fail)
        assert set(content["epochs"]["0"]["D0"]) == {None}
        assert not any(key.startswith("routing/D0/") for key, _ in logger.logged)

    @pytest.mark.parametrize("name", ["nnUNetTrainerPlanned", "nnUNetTrainerNoSkip"])
    def test_where_nothing_is_read_nothing_is_written(self, nnunet_environment, name):
        trainer = make_initialized_trainer(nnunet_environment, name, "2d_small")
        assert not validate(trainer).parent.joinpath(recording.RECORD).exists()
        assert not validate(trainer).parent.joinpath(recording.PICTURE).exists()

    def test_a_compiled_network_is_not_compiled_anew(self, nnunet_environment):
        trainer = make_initialized_trainer(nnunet_environment, configuration="2d_small")
        eager = trainer.network
        force = torch.randn_like(eager.xattnres["D0"].query)
        with torch.no_grad():
            eager.xattnres["D0"].query.copy_(force)
        expected = RoutingHistory.read(validate(trainer)).epochs
        # What dynamo has learnt of other sizes would make all of them symbols.
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("eager")
        trainer.network = torch.compile(eager, backend=counter)
        validate(trainer)
        compiled = counter.frame_count
        assert compiled
        recorded = RoutingHistory.read(validate(trainer)).epochs
        assert counter.frame_count == compiled
        assert recorded == expected
