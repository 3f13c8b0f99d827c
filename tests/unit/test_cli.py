"""The command `nnunet-xattnres`: trainers, mistakes in its options, an nnU-Net that does not fit."""

from importlib import metadata
from pathlib import Path

import pytest

from nnunet_xattnres.cli import main
from nnunet_xattnres.routing.recording import CAVEAT


def test_trainers_prints_the_folder_and_nothing_else(capsys):
    assert main(["trainers"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert (Path(out.strip()) / "nnUNetTrainerXAttnRes.py").is_file()


def test_trainers_list_describes_every_trainer_in_one_line(capsys):
    assert main(["trainers", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines]
    assert all(len(line.split()) > 1 for line in lines)
    for trainer in ("nnUNetTrainerXAttnRes", "nnUNetTrainerXAttnResNoSkip_250epochs", "nnUNetTrainerPlanned_5epochs"):
        assert trainer in names


@pytest.mark.parametrize("installed", ["2.7.0", "2.6.4", "3.0.1"])
def test_an_nnunet_that_does_not_fit_is_an_error(installed, monkeypatch, capsys):
    monkeypatch.setattr("nnunet_xattnres.nnunet.installation.version", lambda package: installed)
    assert main(["trainers"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert f"nnunetv2 {installed} does not fit" in captured.err


def test_a_missing_nnunet_is_an_error(monkeypatch, capsys):
    def missing(package: str) -> str:
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr("nnunet_xattnres.nnunet.installation.version", missing)
    assert main(["trainers"]) == 1
    assert "nnunetv2 is not installed: pip install" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ([], "nnunet-xattnres: the following arguments are required: COMMAND; see nnunet-xattnres --help"),
        (["trianers"], "'trianers' (choose from"),
        (
            ["demo", "--dta", "x"],
            "nnunet-xattnres demo: there is no option --dta: did you mean --data?; see nnunet-xattnres demo --help",
        ),
        (["warm-start", "--form=x"], "warm-start: there is no option --form: did you mean --from?; see"),
        (["benchmark", "run", "--contine-from", "x"], "benchmark run: there is no option --contine-from: did you mean"),
        (["doctor", "--everything"], "doctor: there is no option --everything; see nnunet-xattnres doctor --help"),
        (["doctor", "it"], "nnunet-xattnres doctor: unrecognized arguments: it; see nnunet-xattnres doctor --help"),
        (["doctor", "-x"], "nnunet-xattnres doctor: there is no option -x; see nnunet-xattnres doctor --help"),
        # Not taken for the beginning of -chk.
        (["inspect", "-c", "2d"], "inspect: there is no option -c: did you mean -chk?; see"),
        (["inspect", "-ch=2d"], "inspect: there is no option -ch: did you mean -chk"),
        (["trianers", "--lst"], "'trianers' (choose from"),
        (["overhead", "--repeats", "x"], "nnunet-xattnres overhead: argument --repeats: invalid int value: 'x'; see"),
        (["overhead", "--backend", "tritn"], "; see nnunet-xattnres overhead --help"),
    ],
)
def test_a_typo_is_answered_in_one_line(arguments, expected, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert expected in err


def test_options_can_be_shortened_and_values_can_begin_with_dashes(capsys):
    assert main(["trainers", "--li"]) == 0
    assert main(["overhead", "--preset=msd04", "--json=--x/y", "--rep", "0"]) == 1
    assert "--repeats must be from 1" in capsys.readouterr().err
    for repeats in (["--repeats=-1"], ["--repeats", "-1"]):
        assert main(["overhead", "--preset", "msd04", "-c3d_fullres", "-p=nnUNetPlans", *repeats]) == 1
        assert "--repeats must be from 1" in capsys.readouterr().err


@pytest.mark.parametrize("installed", ["2.8.0", "2.9rc1", "2.10.3+local"])
def test_later_releases_of_nnunet_2_fit(installed, monkeypatch):
    monkeypatch.setattr("nnunet_xattnres.nnunet.installation.version", lambda package: installed)
    assert main(["trainers"]) == 0


def test_an_interrupted_demo_says_how_to_continue(monkeypatch, capsys):
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nnunet_xattnres.tools.demo.run_demo", interrupted)
    assert main(["demo"]) == 130
    assert capsys.readouterr().err.endswith("interrupted; the same command continues\n")


def test_the_help_of_inspect_says_that_weights_are_not_influence(capsys):
    with pytest.raises(SystemExit):
        main(["inspect", "--help"])
    assert CAVEAT in " ".join(capsys.readouterr().out.split())
