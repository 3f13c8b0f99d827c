"""The measurement of one network, in the process of the tests. No test says how fast anything is."""

import json
import runpy
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from helpers.memory import limited
from helpers.overhead import NO_SKIP, PLANNED, small_plans, small_request, use_own_trainer
from nnunet_xattnres.common.errors import XAttnResError
from nnunet_xattnres.model.config import XAttnResConfig
from nnunet_xattnres.model.stage_level import XAttnResUNet
from nnunet_xattnres.nnunet.commands import NnUNet
from nnunet_xattnres.nnunet.xattnres_plans import plans_with_xattnres
from nnunet_xattnres.ops import native_library
from nnunet_xattnres.ops.backends import ATTENTION_BACKENDS, chosen_backend
from nnunet_xattnres.ops.reference import attend_reference
from nnunet_xattnres.ops.streaming import attend_streaming
from nnunet_xattnres.overhead import measurement, runner
from nnunet_xattnres.overhead.measurement import (
    FAILED,
    MEASURED,
    OUT_OF_MEMORY,
    Answer,
    Measurement,
    Request,
    kept_for_backward,
    measure,
)
from nnunet_xattnres.training.mixin import XAttnResTrainerMixin

BLOCK_INPUT = "nnUNetTrainerXAttnResBlockInput"
READS_AT = {
    PLANNED: [],
    NO_SKIP: ["E2", "D0", "D1"],
    BLOCK_INPUT: [
        *("E0_block2", "E1_block2", "E2_block2"),
        *("D0_memory", "D0_block2", "D1_memory", "D1_block2"),
    ],
}
REGIONS = {"background": 0, "whole": [1, 2], "part": [2]}


@pytest.fixture(autouse=True)
def nnunet_folders(tmp_path, monkeypatch):
    """The folders that the runner gives a measurement, and the shortest timing."""
    for name, value in NnUNet(tmp_path / "measured", "cpu").folders().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(measurement, "STEP_SECONDS", 0)
    monkeypatch.setattr(measurement, "INFERENCE_SECONDS", 0)


@pytest.mark.parametrize("trainer", READS_AT)
def test_a_measurement_knows_everything(trainer):
    first, *_, answer = measure(small_request(trainer))
    assert answer.status == MEASURED, answer.reason
    assert len(answer.step_seconds) == len(answer.inference_seconds) == 1
    assert min(*answer.step_seconds, *answer.inference_seconds, answer.peak_memory, answer.parameters) > 0
    assert answer.kept_for_backward > 0
    assert answer.compiled is False
    assert answer.threads == torch.get_num_threads()
    assert answer.reads_at == READS_AT[trainer]
    assert (answer.computed_by is None) == (trainer == PLANNED)
    assert answer.inference_computed_by == answer.computed_by
    # If the process is killed while it measures, this is what it leaves.
    assert first.status == FAILED
    assert first.parameters == answer.parameters


def test_every_call_is_timed():
    calls = []
    times = measurement._times(lambda: calls.append(None), seconds=1e-4)
    assert len(times) == len(calls) > 1
    assert sum(times[:-1]) < 1e-4 <= sum(times)


@pytest.mark.parametrize(
    "labels, trainer",
    [
        (REGIONS, NO_SKIP),
        (REGIONS | {"ignore": 3}, NO_SKIP),
        ({"background": 0, "part": 1, "ignore": 2}, NO_SKIP),
        ({"background": 0, "part": 1}, "nnUNetTrainerNoDeepSupervision"),
    ],
)
def test_targets_fit_the_loss_of_every_kind_of_labels(labels, trainer):
    _, dataset_json = small_plans()
    dataset_json |= {"labels": labels, "regions_class_order": [1, 2]}
    *_, answer = measure(small_request(trainer, dataset_json))
    assert answer.status == MEASURED, answer.reason


def test_2d_and_several_channels():
    plans, dataset_json = small_plans("msd01", "2d")
    *_, answer = measure(Request(plans, "small", dataset_json, NO_SKIP, "cpu"))
    assert answer.status == MEASURED, answer.reason


def test_flops_are_those_of_the_batch_and_of_the_network():
    def flops(trainer, batch_size=1):
        return Measurement(small_request(trainer, batch_size=batch_size)).counts(torch.device("meta"))["flops"]

    planned = flops(PLANNED)
    assert flops(PLANNED, 3) == 3 * planned
    assert flops("nnUNetTrainerNoSkip") < planned < flops("nnUNetTrainerXAttnRes")


@pytest.mark.skipif(not native_library.is_available(), reason="no compiled library")
def test_flops_are_those_of_the_backend_that_computes_on_the_device(monkeypatch):
    """Shapes alone have no device of their own, and "auto" would be `native` for them."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "made up")

    def flops(backend, device):
        request = Measurement(small_request(NO_SKIP, backend=backend))
        request.trainer.device = torch.device(device)
        return request.counts(torch.device("meta"))["flops"]

    assert flops("auto", "cuda") == flops("streaming", "cpu") != flops("auto", "cpu")


def test_a_step_has_the_backend_that_the_training_chose_and_inference_that_of_a_predictor(monkeypatch):
    """On a GPU, a training measures the backends. A predictor does not."""
    computed = []

    def attend_chosen(query, *arguments):
        computed.append(("chosen", torch.is_inference_mode_enabled()))
        return attend_reference(query, *arguments)

    def attend_default(query, *arguments):
        if query.device.type != "meta":
            computed.append(("default", torch.is_inference_mode_enabled()))
        return attend_streaming(query, *arguments)

    def choose_backend(trainer):
        for attention in trainer.network.xattnres.values():
            attention.attend = attend_chosen
        return "reference", "it was fast"

    monkeypatch.setattr(XAttnResTrainerMixin, "choose_backend", choose_backend)
    monkeypatch.setitem(ATTENTION_BACKENDS, "auto", lambda: attend_default)
    *_, answer = measure(small_request(NO_SKIP))
    assert answer.status == MEASURED, answer.reason
    assert set(computed) == {("chosen", False), ("default", True)}
    assert (answer.computed_by, answer.computed_by_reason) == ("reference", "it was fast")
    assert answer.inference_computed_by == chosen_backend("auto", "cpu", is_stage_level=True)[0]
    expected = Measurement(small_request(NO_SKIP, backend="reference")).counts(torch.device("meta"))
    assert answer.flops == expected["flops"]


def choose_triton(trainer):
    return "triton", "it was fast"


def test_flops_are_those_of_triton_where_the_training_chose_it(monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setattr(XAttnResTrainerMixin, "choose_backend", choose_triton)
    *_, answer = measure(small_request(NO_SKIP))
    assert (answer.status, answer.computed_by) == (MEASURED, "triton")
    expected = Measurement(small_request(NO_SKIP)).counts(torch.device("meta"), "triton")["flops"]
    assert answer.flops == expected != Measurement(small_request(NO_SKIP)).counts(torch.device("meta"))["flops"]


@pytest.mark.parametrize("successes, chooses", [(0, False), (1, True)])
def test_flops_that_cannot_be_counted_are_all_that_is_not_known(monkeypatch, successes, chooses):
    """Neither on the meta device nor on the trainer's, or not for the backend that the training chose."""
    expected = Measurement(small_request(NO_SKIP)).counts(torch.device("meta"))
    counters = []

    class Broken(FlopCounterMode):
        def __enter__(self):
            counters.append(self)
            if len(counters) > successes:
                raise RuntimeError("no shapes without a GPU")
            return super().__enter__()

    monkeypatch.setattr(measurement, "FlopCounterMode", Broken)
    if chooses:
        monkeypatch.setattr(XAttnResTrainerMixin, "choose_backend", choose_triton)
    *_, answer = measure(small_request(NO_SKIP))
    assert answer.status == MEASURED and len(answer.step_seconds) == 1
    assert len(counters) == 2
    assert {name: getattr(answer, name) for name in expected} == expected | {"flops": None}


def test_a_measurement_that_is_finished_does_not_fail_because_counts_fail(monkeypatch):
    def counts(self, device):
        raise RuntimeError("no shapes")

    monkeypatch.setattr(Measurement, "counts", counts)
    *_, answer = measure(small_request(NO_SKIP))
    assert (answer.status, answer.parameters) == (MEASURED, None) and len(answer.step_seconds) == 1


def test_a_trainer_of_nnunet_itself_streams_where_the_backend_of_the_plans_is_not_available():
    plans, dataset_json = small_plans()
    carrying = plans_with_xattnres(plans, "carrying", XAttnResConfig(backend="triton"), ["small"])
    *_, answer = measure(Request(carrying, "small", dataset_json, "nnUNetTrainer", "cpu"))
    assert answer.status == MEASURED, answer.reason
    assert answer.computed_by == answer.inference_computed_by == "streaming"
    assert "the backend 'triton' needs" in answer.computed_by_reason


def test_what_is_kept_is_counted_once_without_parameters():
    class Network(nn.Linear):
        def forward(self, x):
            y = super().forward(x)  # keeps x and the weight
            return y * y + y[:, :1].exp()  # keeps y, a part of it, and the exponential

    kept = kept_for_backward(Network(4, 3), torch.zeros(2, 4))
    assert kept == 4 * (2 * 4 + 2 * 3 + 2)


def test_what_a_compiled_network_keeps_is_counted_too():
    images = torch.zeros(2, 4)
    network = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
    compiled = torch.compile(network, backend="aot_eager")
    assert kept_for_backward(compiled, images) == kept_for_backward(network, images) == 4 * (2 * 4 + 2 * 3)


@pytest.mark.parametrize("preset, configuration, passes", [("msd04", "3d_fullres", 27 * 8), ("msd05", "2d", 2 * 9 * 4)])
def test_inference_is_nnunets_prediction_of_a_volume(preset, configuration, passes, monkeypatch):
    """Two patches per axis are three positions of the sliding window. It mirrors along all axes of a patch."""
    plans, dataset_json = small_plans(preset, configuration)
    plans["configurations"]["small"]["patch_size"] = [8] * 3 if configuration == "3d_fullres" else [64] * 2
    shapes = []
    monkeypatch.setattr(XAttnResUNet, "forward", lambda self, image: shapes.append(image.shape) or image[:, :1] + 1)
    monkeypatch.setattr(Measurement, "costs", None)
    *_, answer = measure(Request(plans, "small", dataset_json, NO_SKIP, "cpu", inference=True))
    assert answer.status == MEASURED, answer.reason
    assert len(answer.inference_seconds) == 1
    assert (answer.step_seconds, answer.peak_memory, answer.kept_for_backward) == ([], None, None)
    assert answer.compiled is False
    assert answer.computed_by == answer.inference_computed_by == chosen_backend("auto", "cpu", is_stage_level=True)[0]
    # One to count FLOPs, and one patch before the time is taken.
    passes_per_patch = 8 if configuration == "3d_fullres" else 4
    assert len(shapes) == 1 + passes_per_patch + passes
    assert {shape[0] for shape in shapes} == {1}


def test_flops_of_inference_are_those_of_one_forward_pass():
    def flops(**changes):
        request = replace(small_request(NO_SKIP, batch_size=2), **changes)
        return Measurement(request).counts(torch.device("meta"))["flops"]

    assert 0 < flops(inference=True) < flops() / 4


def test_what_shapes_alone_do_not_tell_is_counted_on_the_device(monkeypatch):
    expected = Measurement(small_request(NO_SKIP)).counts(torch.device("meta"))
    forward = XAttnResUNet.forward

    def forward_with_values(network, images):
        if images.is_meta:
            raise NotImplementedError("needs numbers")
        return forward(network, images)

    monkeypatch.setattr(XAttnResUNet, "forward", forward_with_values)
    *_, answer = measure(small_request(NO_SKIP))
    assert answer.status == MEASURED, answer.reason
    assert {name: getattr(answer, name) for name in expected} == expected


@pytest.mark.parametrize("error", [NotImplementedError, RuntimeError, TypeError, ValueError])
def test_whatever_error_shapes_alone_raise(error, monkeypatch):
    def counts(self, device):
        if device.type == "meta":
            raise error("needs numbers")
        return {"flops": 7}

    monkeypatch.setattr(Measurement, "counts", counts)
    monkeypatch.setattr(Measurement, "costs", lambda self: {"peak_memory": 8})
    assert list(measure(small_request(NO_SKIP))) == [Answer(MEASURED, flops=7, peak_memory=8)]


def test_what_the_user_can_mend_fails_before_anything_is_timed(monkeypatch):
    def counts(self, device):
        raise XAttnResError("mend it")

    monkeypatch.setattr(Measurement, "counts", counts)
    monkeypatch.setattr(Measurement, "costs", None)
    assert list(measure(small_request(NO_SKIP))) == [Answer(FAILED, "mend it")]


def test_the_backend_replaces_the_trainers():
    trainer = Measurement(small_request(NO_SKIP, backend="reference")).trainer
    assert trainer.xattnres_config.backend == "reference"
    assert not trainer.xattnres_config.skip_connections
    assert Measurement(small_request(NO_SKIP)).trainer.xattnres_config.backend == "auto"


def test_a_batch_that_does_not_fit_is_out_of_memory_with_its_counts():
    resource = pytest.importorskip("resource")
    voxels = int(np.prod(small_plans()[0]["configurations"]["small"]["patch_size"]))
    available = psutil.virtual_memory().available
    batch_size = 2 * available // (4 * voxels)
    with limited(resource.RLIMIT_DATA, psutil.Process().memory_info().data + available):
        *_, answer = measure(small_request(PLANNED, batch_size=batch_size))
    assert answer.status == OUT_OF_MEMORY, answer.reason
    assert answer.parameters > 0


def test_a_trainer_that_raises_has_failed(tmp_path, monkeypatch):
    use_own_trainer("raise ValueError('my mistake\\nand more of it')", tmp_path / "mine", monkeypatch)
    *_, answer = measure(small_request("nnUNetTrainerMine"))
    assert (answer.status, answer.reason) == (FAILED, "ValueError: my mistake")
    assert answer.parameters > 0


def test_the_program_limits_its_memory_and_writes_its_answer(tmp_path, monkeypatch):
    """`python -m nnunet_xattnres.overhead.measurement FOLDER`, for a trainer that does not exist."""
    growth = []
    monkeypatch.setattr("nnunet_xattnres.common.device.limit_memory", growth.append)
    monkeypatch.setattr(sys, "argv", ["measurement", str(tmp_path)])
    Path(tmp_path, "request.json").write_text(json.dumps(asdict(small_request("nnUNetTrainerNone"))))
    monkeypatch.delitem(sys.modules, runner.MEASUREMENT)
    runpy.run_module(runner.MEASUREMENT, run_name="__main__")
    answer = Answer(**json.loads(Path(tmp_path, "answer.json").read_text()))
    assert answer.status == FAILED
    assert "finds no trainer nnUNetTrainerNone" in answer.reason
    assert len(growth) == 1
    assert 0 < growth[0] <= psutil.virtual_memory().total
