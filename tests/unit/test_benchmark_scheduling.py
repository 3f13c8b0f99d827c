"""Many cells on machines that are made up: what is started, waited for, tried again and given up."""

import time
from dataclasses import replace
from threading import Thread

import pytest

from helpers.benchmark import CELL
from nnunet_xattnres.benchmark import scheduling
from nnunet_xattnres.benchmark.cells import FAILED, FINISHED, RUNNING
from nnunet_xattnres.benchmark.locks import locked
from nnunet_xattnres.benchmark.scheduling import ATTEMPTS, Schedule, run_cells


class FakeMachine:
    """Does with every cell, at once, what it is told to."""

    poll_seconds = 0.01

    def __init__(self, root, do):
        self.root, self.do, self.submissions = root, do, []

    def has_room(self):
        return True

    def has(self, cell):
        return False

    def submit(self, cell):
        self.submissions.append(cell)
        self.do(cell)
        return True

    def stop(self):
        pass


class SlowMachine(FakeMachine):
    """What a cell does, it does just after somebody has seen that it has a process."""

    def __init__(self, root, do):
        super().__init__(root, do)
        self.live = []

    def has(self, cell):
        if cell not in self.live:
            return False
        self.live.remove(cell)
        self.do(cell)
        return True

    def submit(self, cell):
        self.submissions.append(cell)
        self.live.append(cell)
        return True


class ReluctantMachine(FakeMachine):
    """Refuses more often than a cell may fail."""

    refusals = 2 * ATTEMPTS

    def submit(self, cell):
        self.refusals -= 1
        return self.refusals < 0 and super().submit(cell)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(scheduling, "SECONDS_FOR_A_LOOK", 0.1)


def test_a_failed_cell_does_not_stop_the_others_and_is_tried_again_by_the_next_run(tmp_path):
    cells = [replace(CELL, fold=fold) for fold in range(3)]

    def do(cell):
        cell.write_record(tmp_path, FAILED if cell.fold == 0 else FINISHED, reason="no luck")

    machine = FakeMachine(tmp_path, do)
    Schedule(tmp_path, cells, machine).run()
    assert machine.submissions == cells
    again = FakeMachine(tmp_path, do)
    Schedule(tmp_path, cells, again).run()
    assert again.submissions == cells[:1]


@pytest.mark.parametrize("state", [FINISHED, FAILED])
def test_what_another_run_has_settled_meanwhile_is_not_given_up(state, tmp_path):
    schedule = Schedule(tmp_path, [CELL], FakeMachine(tmp_path, lambda cell: None))
    schedule.attempts[CELL] = ATTEMPTS
    CELL.write_record(tmp_path, state, reason="another's")
    schedule.start(CELL)
    assert CELL.record(tmp_path)["reason"] == "another's"


def test_what_another_run_does_is_not_given_up(tmp_path):
    schedule = Schedule(tmp_path, [CELL], FakeMachine(tmp_path, lambda cell: None))
    schedule.attempts[CELL] = ATTEMPTS
    with locked(CELL.lock(tmp_path), 0):
        schedule.start(CELL)
    assert CELL.record(tmp_path) == {}


def test_a_process_that_always_dies_is_given_up(tmp_path):
    machine = FakeMachine(tmp_path, lambda cell: None)
    Schedule(tmp_path, [CELL], machine).run()
    assert len(machine.submissions) == ATTEMPTS
    assert str(tmp_path / "jobs") in CELL.record(tmp_path)["reason"]


@pytest.mark.parametrize("before", [None, "another"])
def test_a_cell_that_fails_between_two_looks_has_failed(before, tmp_path):
    if before:
        CELL.write_record(tmp_path, FAILED, reason=before)
    # On a node whose clock is behind.
    machine = SlowMachine(tmp_path, lambda cell: cell.write_record(tmp_path, FAILED, reason="no luck", time=0.0))
    Schedule(tmp_path, [CELL], machine).run()
    assert machine.submissions == [CELL]
    assert CELL.record(tmp_path)["reason"] == "no luck"


def test_a_cell_that_another_run_has_is_waited_for_and_not_begun(tmp_path):
    machine = FakeMachine(tmp_path, lambda cell: cell.write_record(tmp_path, FINISHED))
    with locked(CELL.lock(tmp_path), 0):
        CELL.write_record(tmp_path, RUNNING)
        run = Thread(target=Schedule(tmp_path, [CELL], machine).run)
        run.start()
        time.sleep(0.2)
        assert run.is_alive()
        CELL.write_record(tmp_path, FINISHED)
    run.join(10)
    assert not run.is_alive()
    assert machine.submissions == []


def test_a_cell_whose_other_run_dies_is_taken_over(tmp_path):
    machine = FakeMachine(tmp_path, lambda cell: cell.write_record(tmp_path, FINISHED))
    with locked(CELL.lock(tmp_path), 0):
        CELL.write_record(tmp_path, RUNNING)
        run = Thread(target=Schedule(tmp_path, [CELL], machine).run)
        run.start()
        time.sleep(0.2)
    run.join(10)
    assert machine.submissions == [CELL]


def test_what_a_machine_does_not_take_is_not_given_up(tmp_path):
    machine = ReluctantMachine(tmp_path, lambda cell: cell.write_record(tmp_path, FINISHED))
    run_cells(tmp_path, [CELL], machine)
    assert CELL.state(tmp_path) == FINISHED


def test_the_machine_says_how_often_cells_are_looked_at(tmp_path, monkeypatch):
    machine = FakeMachine(tmp_path, lambda cell: cell.write_record(tmp_path, FINISHED))
    machine.poll_seconds = 30.0
    waited = []
    monkeypatch.setattr(scheduling.time, "sleep", waited.append)
    Schedule(tmp_path, [CELL], machine).run()
    assert waited == [30.0]
