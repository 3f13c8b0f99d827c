"""What is known of a process: its environment, its output, its end."""

import os
import signal

import pytest

from nnunet_xattnres.common.processes import environment_with, how_it_ended, last_meaningful_line, was_killed


def test_environment_is_restored_even_after_an_error(monkeypatch):
    monkeypatch.setenv("XATTNRES_OLD", "old")
    monkeypatch.delenv("XATTNRES_NEW", raising=False)
    with pytest.raises(KeyError), environment_with(XATTNRES_OLD="other", XATTNRES_NEW="new"):
        assert (os.environ["XATTNRES_OLD"], os.environ["XATTNRES_NEW"]) == ("other", "new")
        raise KeyError
    assert os.environ["XATTNRES_OLD"] == "old"
    assert "XATTNRES_NEW" not in os.environ


def test_an_end_is_named_by_its_signal_or_its_status():
    assert how_it_ended(-signal.SIGABRT) == "ended by SIGABRT"
    assert how_it_ended(3) == "exit status 3"
    assert was_killed(-9)
    assert not was_killed(3)


def test_last_meaningful_line_skips_progress_bars():
    output = "ValueError: bad\n\n 10%|█   | 1/10 [00:01<00:09,  1.0it/s]\r100%|███| 10/10 [00:10<00:00,  1.0it/s]\n  \n"
    assert last_meaningful_line(output) == "ValueError: bad"
