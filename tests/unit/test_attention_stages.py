"""The study `studies/attention_stages.py`: what it counts for which stage and part. No test says how long it takes."""

import pytest
import torch

from helpers.networks import planned_network
from helpers.studies import load_study
from nnunet_xattnres.model.config import XAttnResConfig
from nnunet_xattnres.model.stage_level import XAttnResUNet
from nnunet_xattnres.ops import native_library, native_operator, streaming


@pytest.fixture(scope="module")
def study():
    return load_study("attention_stages")


def small_network(backend):
    return XAttnResUNet(planned_network(deep_supervision=True), XAttnResConfig(backend=backend))


@pytest.mark.parametrize("backend", ["streaming", "native"])
def test_every_pass_of_a_stage_has_the_parts_that_it_computes(study, backend):
    if backend == "native" and not native_library.is_available():
        pytest.skip("no compiled library")
    before = native_operator.mix, streaming.upsample
    times = study.measure(small_network(backend), torch.randn(2, 1, 16, 16, 16))
    assert (native_operator.mix, streaming.upsample) == before
    parts = {key for key, value in times.items() if value > 0}
    for name in study.PASSES:
        for stage in ("E2", "D0", "D1"):
            assert ((stage, name, "loops") in parts) == (backend == "native")
            assert {(stage, name, "projections"), (stage, name, "rest")} <= parts
            # An encoder stage has its input from the stage before.
            assert ((stage, name, "x") in parts) == (stage != "E2")
            assert ((stage, name, "x gradients") in parts) == (stage != "E2" and name == "backward")
        # E2 and D0 read E0 at the same resolution. The average is made once, and D1 reads it as it is.
        assert ("E2", name, "averages") in parts
        assert ("D1", name, "averages") not in parts
        assert ("", name, "rest") in parts
    assert ("D0", "backward", "averages") in parts


def test_the_report_has_a_line_for_every_pass_and_the_limit(study, monkeypatch):
    monkeypatch.setattr(study, "bytes_per_second", lambda: 1e6)
    lines = study.report(small_network("streaming"), torch.randn(1, 1, 16, 16, 16), repeats=1).splitlines()
    assert [line.split()[:2] for line in lines[1:-1]] == [[s, p] for s in ("E2", "D0", "D1") for p in study.PASSES]
    # D1 reads E0 (4 channels), E1 (8, half the size), E2 (16, a quarter), D0 as E1, and x as E0.
    elements = (4 + 8 / 8 + 16 / 64 + 8 / 8 + 2 * 4) * 16**3
    limits = [float(line.split()[-1]) for line in lines[-3:-1]]
    assert limits == pytest.approx([4e-3 * elements, 8e-3 * elements], abs=0.01)
    assert lines[-1].startswith("the whole network: forward ")
