"""The demo's Dice table and its picture of cases."""

import matplotlib.image
import numpy as np

from nnunet_xattnres.tools.demo_report import PicturedCase, dice_per_case, dice_table, draw_cases, spread_over_ranking


def summary(dice):
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


def test_a_case_without_foreground_counts_as_1_if_it_is_left_empty():
    cases = {"both": (0.5, 0.75), "one": (np.nan, 0.25), "none": (np.nan, np.nan)}
    metrics = [
        {"prediction_file": f"/predictions/{name}.nii.gz", "metrics": {n: {"Dice": d} for n, d in enumerate(dice)}}
        for name, dice in cases.items()
    ]
    assert dice_per_case({"metric_per_case": metrics}, ".nii.gz") == {"both": 0.625, "one": 0.25, "none": 1.0}


def test_pictured_cases_are_spread_from_the_worst_to_the_best():
    dice = {name: place / 10 for place, name in enumerate("abcdefg")}
    assert spread_over_ranking(dice, 3) == ["a", "d", "g"]
    assert spread_over_ranking({"b": 0.9, "a": 0.1}, 4) == ["a", "b"]


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
