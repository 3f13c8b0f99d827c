"""Two processes, as nnU-Net's `-num_gpus 2` starts them, on the CPU."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from helpers.networks import planned_network
from helpers.processes import run_ranks
from helpers.routing import make_initialized_trainer, validate
from nnunet_xattnres import BlockXAttnResConfig, XAttnResConfig
from nnunet_xattnres.common.errors import XAttnResError
from nnunet_xattnres.model.build import add_xattnres
from nnunet_xattnres.model.planned_unet import uncompiled
from nnunet_xattnres.nnunet.commands import NnUNet
from nnunet_xattnres.routing.recording import RECORD, RoutingHistory, ValidationRecorder
from nnunet_xattnres.training import backend_choice

pytestmark = pytest.mark.feature("Two processes (gloo, small networks)")

CPU = torch.device("cpu")
CONFIGS = {
    "stage": XAttnResConfig(),
    "stage-residual-no-skips": XAttnResConfig(skip_connections=False, fusion="residual"),
    "block": BlockXAttnResConfig(isar_in_encoder=True, bank_includes_input=True),
}


def build(config: str, deep_supervision: bool) -> torch.nn.Module:
    return add_xattnres(planned_network(deep_supervision=deep_supervision), CONFIGS[config])


def train_two_steps(rank: int, folder: Path, config: str, deep_supervision: bool) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=2)
    network = build(config, deep_supervision)
    if not deep_supervision:
        # nnU-Net leaves these without a gradient, which DistributedDataParallel refuses.
        network.decoder.seg_layers[:-1].requires_grad_(False)
    network = DistributedDataParallel(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    torch.manual_seed(rank)  # every process has data of its own
    for _ in range(2):
        optimizer.zero_grad()
        logits = network(torch.randn(2, 1, 8, 8, 8))
        sum(x.square().mean() for x in (logits if deep_supervision else [logits])).backward()
        optimizer.step()
    torch.save(network.module.state_dict(), folder / f"rank{rank}.pth")
    distributed.destroy_process_group()


@pytest.mark.parametrize("config, deep_supervision", [("stage", True), ("stage", False), ("block", True)])
def test_two_processes_end_with_equal_weights(config, deep_supervision, tmp_path):
    run_ranks(train_two_steps, tmp_path, config, deep_supervision)
    first, second = (torch.load(tmp_path / f"rank{rank}.pth") for rank in range(2))
    untrained = build(config, deep_supervision).state_dict()
    for name, weights in first.items():
        assert torch.equal(weights, second[name]), name
    moved = {name for name, weights in first.items() if not torch.equal(weights, untrained[name])}
    # The norm's scale wakes a step after the query, and in residual fusion both a step after the gate.
    assert {name for name in first if name.startswith("xattnres.") and name.endswith("query")} <= moved


@pytest.mark.parametrize("deep_supervision", [True, False])
@pytest.mark.parametrize("config", CONFIGS)
def test_every_parameter_of_ours_gets_a_gradient(config, deep_supervision):
    """DistributedDataParallel waits for ever, or refuses, where one gets none."""
    network = build(config, deep_supervision)
    logits = network(torch.randn(1, 1, 8, 8, 8))
    sum(map(torch.sum, logits if deep_supervision else [logits])).backward()
    assert [name for name, parameter in network.xattnres.named_parameters() if parameter.grad is None] == []


FAST = {"streaming": 0.03, "triton": 0.01}
# What the processes find: seconds, a reason, or an error. And what both choose then, and why.
MEASUREMENTS: list[tuple[list[Any], str, str]] = [
    ([FAST, FAST | {"streaming": 0.02}], "triton", "streaming 30 ms, triton 10 ms"),
    ([FAST, FAST | {"triton": 0.05}], "streaming", "streaming 30 ms, triton 50 ms"),
    ([FAST, FAST | {"triton": "no kernel"}], "streaming", "not triton (no kernel)"),
    ([FAST, RuntimeError("CUDA out of memory")], "streaming", "CUDA out of memory) on rank 1"),
    ([OSError("no folder"), FAST], "streaming", "no folder) on rank 0"),
]


def choose_backends(rank: int, folder: Path) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=2)
    network = build("stage", deep_supervision=True)
    choices = []
    for of_ranks, _, _ in MEASUREMENTS:
        found = of_ranks[rank]

        def measured(call: object, device: object, found: Any = found) -> tuple[dict, str]:
            if isinstance(found, Exception):
                raise found
            return found, ""

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(backend_choice, "_measured", measured)
            patch.setattr(backend_choice, "attention_backend", lambda name: name)
            choices.append(backend_choice.choose_backend(network, (2, 1, 8, 8, 8), CPU))
        assert {attention.attend for attention in network.xattnres.values()} == {choices[-1][0]}
    torch.save(choices, folder / f"rank{rank}.pth")
    distributed.destroy_process_group()


def test_all_processes_choose_the_same_backend_whatever_fails_in_one(tmp_path):
    run_ranks(choose_backends, tmp_path)
    choices, of_the_other = (torch.load(tmp_path / f"rank{rank}.pth") for rank in range(2))
    assert choices == of_the_other
    for (backend, reason, _), (_, chosen, why) in zip(choices, MEASUREMENTS, strict=True):
        assert backend == chosen and why in reason


def choose_with_a_record(rank: int, folder: Path) -> None:
    """Twice on GPUs of two kinds, and once more where the second process can no longer use Triton."""
    distributed.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=2)
    network = build("stage", deep_supervision=True)
    measured, choices, record = [], [], None

    def measure(call: object, device: object) -> tuple[dict, str]:
        measured.append(len(choices))
        return {"streaming": 0.03, "triton": 0.01 * (1 + rank)}, ""

    def check(backend: str, device: str) -> None:
        if len(choices) == 2 and rank == 1 and backend == "triton":
            raise XAttnResError("it cannot be imported")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend_choice, "_measured", measure)
        patch.setattr(backend_choice, "check_backend", check)
        patch.setattr(backend_choice, "attention_backend", lambda name: name)
        patch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {rank}")
        for _ in range(3):
            choices.append(backend_choice.choose_backend(network, (2, 1, 8, 8, 8), torch.device("cuda"), record))
            record = choices[-1][2]
    torch.save((measured, choices), folder / f"rank{rank}.pth")
    distributed.destroy_process_group()


def test_all_processes_keep_a_measurement_or_none_does(tmp_path):
    run_ranks(choose_with_a_record, tmp_path)
    (measured, choices), of_the_other = (torch.load(tmp_path / f"rank{rank}.pth") for rank in range(2))
    assert (measured, choices) == of_the_other
    assert measured == [0, 2]
    assert ["kept" in reason for _, reason, _ in choices] == [False, True, False]
    assert choices[0][2]["findings"] == {"streaming": 0.03, "triton": 0.02}
    assert [each["device"] for each in choices[0][2]["conditions"]] == ["GPU 0", "GPU 1"]


def record_on(rank: int, distribute: bool) -> ValidationRecorder:
    """A recorder that has seen data of its own, of the network that all ranks have."""
    network = build("stage", deep_supervision=True)
    for target in network.routing_sources:
        torch.nn.init.normal_(network.xattnres[target].query)
    recorder = ValidationRecorder(DistributedDataParallel(network) if distribute else network, CPU, 250)
    recorder.observe(torch.randn(1, 1, 8, 8, 8, generator=torch.Generator().manual_seed(rank)))
    return recorder


def make_validating_trainer(nnunet: NnUNet, output: Path) -> Any:
    """A trainer with the weights that all ranks have, and a folder of its own."""
    torch.manual_seed(0)
    trainer = make_initialized_trainer(nnunet, configuration="2d_small")
    for target in trainer.network.routing_sources:
        torch.nn.init.normal_(trainer.network.xattnres[target].query)
    output.mkdir()
    trainer.output_folder = str(output)
    return trainer


def record_in_a_process(rank: int, folder: Path, nnunet: NnUNet) -> None:
    # nnU-Net's constructor takes distributed training for training on GPUs.
    trainer = make_validating_trainer(nnunet, folder / f"output_of_rank{rank}")
    distributed.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=2)
    recorder = record_on(rank, distribute=True)
    torch.save(recorder.means(), folder / f"rank{rank}.pth")
    if rank == 1:  # a process that has seen no data must not keep the other waiting
        recorder = ValidationRecorder(recorder.network, CPU, 250)
    torch.save(recorder.means(), folder / f"first_of_rank{rank}.pth")

    wrapped = DistributedDataParallel(torch.compile(trainer.network, backend="eager"))
    assert uncompiled(wrapped) is trainer.network
    trainer.network = DistributedDataParallel(trainer.network)
    trainer.is_ddp, trainer.local_rank = True, rank
    validate(trainer, seed=rank)
    distributed.destroy_process_group()


def test_processes_of_a_training_record_their_common_mean(nnunet_environment, tmp_path):
    run_ranks(record_in_a_process, tmp_path, nnunet_environment)
    means, of_the_other = (torch.load(tmp_path / f"rank{rank}.pth") for rank in range(2))
    assert means == of_the_other
    alone = [record_on(rank, distribute=False).means() for rank in range(2)]
    assert_is_mean(means, alone)
    assert alone[0]["D1"] != pytest.approx(alone[1]["D1"], abs=1e-3)
    for target, weights in alone[0].items():
        assert torch.load(tmp_path / "first_of_rank1.pth")[target] == pytest.approx(weights, abs=1e-5)

    # The trainer's hook: the first rank writes it, and no other.
    assert list((tmp_path / "output_of_rank1").iterdir()) == []
    trainer = make_validating_trainer(nnunet_environment, tmp_path / "alone")
    alone = [RoutingHistory.read(validate(trainer, seed=rank)).epochs[0] for rank in range(2)]
    assert_is_mean(RoutingHistory.read(tmp_path / "output_of_rank0" / RECORD).epochs[0], alone)


def assert_is_mean(means: dict, of_ranks: list[dict]) -> None:
    for target, weights in means.items():
        assert weights == pytest.approx(np.mean([each[target] for each in of_ranks], axis=0), abs=1e-5)
