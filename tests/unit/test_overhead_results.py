"""Costs beside the planned network: ratios, the table and the chart."""

from dataclasses import replace

import pytest

from helpers.overhead import NO_SKIP, PLANNED, made_up_answers
from nnunet_xattnres.nnunet.planned_network import from_preset
from nnunet_xattnres.nnunet.presets import DEFAULT_PLANS, TASKS
from nnunet_xattnres.overhead.measurement import FAILED, OUT_OF_MEMORY, Answer
from nnunet_xattnres.overhead.results import Comparison, Row, cost_table, draw_ratios, paired_ratio


def test_ratios_are_paired_by_round():
    # The machine was twice as slow in the second round and thrice in the third.
    planned = Row(PLANNED, made_up_answers([1.0, 1.0, 1.2], [2.0], [3.0]))
    ours = Row(NO_SKIP, made_up_answers([1.5], [2.0, 2.0, 9.0], [3.3], memory=80), "streaming")
    figures = Comparison(from_preset("msd04", "3d_fullres", DEFAULT_PLANS), [planned, ours]).figures(ours)
    assert figures["step_seconds_ratio"] == pytest.approx(1.1)  # of 1.5, 1.0 and 1.1
    assert figures["step_seconds"] == 2.0
    assert (figures["step_seconds_min"], figures["step_seconds_max"]) == (1.5, 9.0)
    assert figures["peak_memory_bytes_ratio"] == pytest.approx(0.8)
    assert figures["kept_for_backward_bytes_ratio"] == pytest.approx(0.8)
    assert figures["parameters_ratio"] == 1.0


def test_no_ratio_without_both_sides():
    measured = Row(NO_SKIP, made_up_answers([1.0]))
    for other in (Row(PLANNED, [Answer(OUT_OF_MEMORY)]), Row(PLANNED)):
        assert paired_ratio(measured, other, lambda answer: answer.peak_memory) is None
        assert paired_ratio(other, measured, lambda answer: answer.peak_memory) is None


@pytest.fixture(scope="module")
def comparisons() -> list[Comparison]:
    """Ten presets and five networks, of which some do not get far."""
    comparisons = []
    for preset in TASKS:
        rows = [
            Row(PLANNED, made_up_answers([12.34], [15.6], memory=12_345_678_901, parameters=112_345_678)),
            Row(
                "nnUNetTrainerXAttnRes",
                made_up_answers([123.4], [156.7], memory=123_456_789_012, parameters=123_456_789),
            ),
            Row("nnUNetTrainerXAttnResNoSkip_250epochs", [Answer(OUT_OF_MEMORY, parameters=5_000_000, flops=10**13)]),
            Row(
                NO_SKIP, made_up_answers([123.4], [156.7], memory=123_456_789_012, parameters=111_111_111), "streaming"
            ),
            Row("MyOwnTrainer", [Answer(FAILED, "ValueError: my mistake")]),
        ]
        rows[1].answers[0] = replace(rows[1].answers[0], reads_at=[f"E{i}_block{j}" for i in range(8) for j in (2, 3)])
        comparisons.append(Comparison(from_preset(preset, "3d_fullres", DEFAULT_PLANS), rows))
    return comparisons


def test_the_table_fits_and_says_what_happened(comparisons):
    table = cost_table(comparisons[2])
    lines = table.splitlines()
    assert max(map(len, lines)) <= 120
    assert "msd03 (Liver), 3d_fullres of nnUNetPlans" in lines[0]
    assert "128 x 128 x 128, batch 2" in lines[0]
    row = {line.split()[0]: line for line in lines[2:7]}
    assert "[12.3, 15.6] 1.00x" in row["Planned"]
    assert "[123, 157] 10.02x" in row["XAttnRes"]
    assert "out of memory" in row["XAttnResNoSkip_250epochs"]
    assert row["XAttnResNoSkip"].startswith("XAttnResNoSkip (streaming)  ")
    assert "failed" in row["MyOwnTrainer"]
    assert "XAttnRes reads at: E0_block2 E0_block3 E1_block2" in table
    assert lines[-1] == "MyOwnTrainer failed: ValueError: my mistake"


def test_the_table_and_the_record_name_the_backend_that_computed_and_why():
    chosen = replace(made_up_answers([1.0])[0], computed_by="triton", inference_computed_by="streaming")
    slow, noisy = (replace(chosen, computed_by_reason=f"streaming {time} ms, triton 10 ms") for time in (20, 30))
    other = replace(chosen, computed_by="streaming", computed_by_reason="triton failed")
    rows = [Row(PLANNED, made_up_answers([1.0])), Row(NO_SKIP, [slow, noisy]), Row("XAttnRes", [slow, other])]
    comparison = Comparison(from_preset("msd04", "3d_fullres", DEFAULT_PLANS), rows)
    by_triton = "triton (streaming 20 ms, triton 10 ms); inference by streaming"
    assert cost_table(comparison).splitlines()[5:] == [
        f"XAttnResNoSkip computed by: {by_triton}",
        f"XAttnRes computed by: {by_triton}",
        "XAttnRes computed by: streaming (triton failed)",
    ]
    expected = [[], [by_triton], [by_triton, "streaming (triton failed)"]]
    assert [row["computed_by"] for row in comparison.record()["trainers"]] == expected
    assert [row["computed_by"] for row in comparison.csv_rows()] == [", or ".join(each) for each in expected]


def test_the_chart_has_every_bar_and_says_what_has_none(comparisons):
    figure = draw_ratios(comparisons)
    step_time, _, parameters = figure.axes
    assert len(step_time.patches) == 20
    assert {round(float(bar.get_width()), 2) for bar in step_time.patches} == {10.02}
    assert sum(text.get_text() == OUT_OF_MEMORY for text in step_time.texts) == 10
    assert sum(text.get_text() == FAILED for text in step_time.texts) == 10
    assert len(parameters.patches) == 30


def test_the_chart_of_the_planned_network_alone_can_be_drawn():
    comparison = Comparison(from_preset("msd04", "2d", DEFAULT_PLANS), [Row(PLANNED, made_up_answers([1.0]))])
    draw_ratios([comparison]).canvas.draw()
