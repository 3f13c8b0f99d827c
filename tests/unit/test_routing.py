"""The record of a training's attention weights, and its picture."""

import json

import numpy as np
import pytest
import seaborn
import torch
from matplotlib import style
from torch._dynamo.testing import CompileCounterWithBackend

from helpers.networks import planned_network
from helpers.routing import assert_no_texts_overlap, force_to_read, history_of
from nnunet_xattnres import XAttnResConfig
from nnunet_xattnres.common.errors import XAttnResError
from nnunet_xattnres.model.build import add_xattnres
from nnunet_xattnres.routing.drawing import HeatMap, draw_heat_maps, draw_history, save_figure
from nnunet_xattnres.routing.recording import CAVEAT, RoutingHistory, ValidationRecorder, in_pool_order


def test_sources_are_ordered_as_they_are_computed():
    sources = ["current", "D10", "E2", "D9", "E10", "E2"]
    assert in_pool_order(sources) == ["E2", "E10", "D9", "D10", "current"]
    assert in_pool_order(["current", "block1", "block0", "input"]) == ["input", "block0", "block1", "current"]


def test_recording_does_not_compile_a_compiled_network_anew():
    torch._dynamo.reset()
    network, image = add_xattnres(planned_network(((1, 1), (2, 2))), XAttnResConfig()), torch.randn(1, 1, 8, 8)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(network, backend=counter)
    with torch.no_grad():
        compiled(image)
        frames = counter.frame_count
        assert frames
        recorder = ValidationRecorder(compiled, torch.device("cpu"), training_steps=250)
        recorder.observe(image)
        compiled(image)
    assert counter.frame_count == frames
    assert recorder.means()["D0"] == pytest.approx([1 / 3] * 3, abs=1e-5)


class TestHistory:
    def test_it_reads_what_it_wrote(self, tmp_path):
        history = history_of(4, 3)
        history.write(tmp_path / "routing.json")
        assert RoutingHistory.read(tmp_path / "routing.json") == history
        assert list(tmp_path.iterdir()) == [tmp_path / "routing.json"]
        assert json.loads((tmp_path / "routing.json").read_text())["note"] == CAVEAT

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
        assert CAVEAT in [text.get_text() for text in figure.texts]

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
        network = add_xattnres(planned_network(), XAttnResConfig())
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
        assert cells.mask.sum() == 15 - sum(map(len, network.routing_sources.values()))
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


class TestHeatMaps:
    def maps(self, num_cases: int) -> list[HeatMap]:
        sources = history_of(5, 1).sources
        rng = np.random.default_rng(0)
        weights = {(target, source): rng.uniform(0, 1) for target in sources for source in sources[target]}
        changes = {pair: rng.uniform(-1, 0.01) for pair in weights}
        changes["D0", "E0"] = -0.0001
        spread = 0.1 if num_cases > 1 else np.nan
        intervals = {pair: (change - spread, change + spread) for pair, change in changes.items()}
        changes["D1", "E1"] = np.nan  # undefined in every case
        return [HeatMap("weights", "weight", weights), HeatMap("change", "Dice", changes, intervals, signed=True)]

    @pytest.mark.parametrize("num_cases", [1, 2])
    def test_no_texts_overlap(self, num_cases):
        assert_no_texts_overlap(draw_heat_maps(self.maps(num_cases), "a note " * 40))

    def test_where_every_number_is_undefined_it_is_said_in_place_of_a_scale(self):
        nothing = HeatMap("change", "Dice", dict.fromkeys(self.maps(2)[0].numbers, np.nan))
        (axis,) = draw_heat_maps([nothing], "note").axes
        assert [text.get_text() for text in axis.texts] == ["undefined"]

    def test_zero_is_in_the_middle_of_signed_colours_and_has_no_sign(self):
        figure = draw_heat_maps(self.maps(2), "note")
        scales = [axis.collections[0].norm for axis in figure.axes if axis.get_xlabel() == "source"]
        assert [scale.vmin == -scale.vmax for scale in scales] == [False, True]
        texts = [text.get_text() for axis in figure.axes for text in axis.texts]
        assert "0.000" in texts and "-0.000" not in texts and "nan" not in texts
