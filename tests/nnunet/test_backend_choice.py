"""The backend that a training on a GPU chooses, with made-up measurements and with a process on a CPU."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from helpers.networks import ANISOTROPIC_2D, ISOTROPIC_3D, planned_network
from helpers.routing import make_initialized_trainer
from nnunet_xattnres.common.errors import XAttnResError
from nnunet_xattnres.model.config import XAttnResConfig
from nnunet_xattnres.model.planned_unet import uncompiled
from nnunet_xattnres.model.stage_level import XAttnResUNet
from nnunet_xattnres.ops import native_library
from nnunet_xattnres.ops.backends import attend_auto
from nnunet_xattnres.ops.reference import Upsampled
from nnunet_xattnres.ops.streaming import attend_streaming
from nnunet_xattnres.training import backend_choice, mixin
from nnunet_xattnres.training.checkpoint import read_checkpoint

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PATCH = (2, 1, 16, 16, 16)


@pytest.fixture
def network():
    return XAttnResUNet(planned_network(ISOTROPIC_3D), XAttnResConfig())


def backends_of(network):
    return {attention.attend for attention in network.xattnres.values()}


def test_the_largest_call_is_that_of_the_last_decoder_stage(network):
    call = backend_choice.largest_call(network, PATCH)
    assert call.size == PATCH[2:]
    stages = len(ISOTROPIC_3D)
    assert len(call.candidates) == stages + (stages - 2) + 1
    assert isinstance(call.candidates[-1], Upsampled)
    assert {each.features.device.type for each in call.candidates} == {"meta"}
    assert {len(each.features) for each in call.candidates} == {2}
    residual = XAttnResUNet(planned_network(ANISOTROPIC_2D), XAttnResConfig(fusion="residual"))
    call = backend_choice.largest_call(residual, (3, 1, 16, 16))
    assert not any(isinstance(each, Upsampled) for each in call.candidates)


@pytest.mark.parametrize(
    "findings, problem, chosen, why, is_recorded",
    [
        ({"streaming": 0.02, "triton": 0.01}, "", "triton", "streaming 20 ms, triton 10 ms", True),
        ({"streaming": 0.01, "triton": 0.02}, "", "streaming", "streaming 10 ms, triton 20 ms", True),
        ({"streaming": 0.01, "triton": "differs"}, "", "streaming", "streaming 10 ms, not triton (differs)", False),
        ({"streaming": "it fails", "triton": "it fails"}, "", "streaming", "not streaming (it fails)", False),
        ({}, "not measured within 60 s", "streaming", "not measured within 60 s", False),
    ],
)
def test_the_network_computes_with_the_fastest_backend(
    network, monkeypatch, findings, problem, chosen, why, is_recorded
):
    monkeypatch.setattr(backend_choice, "_measured", lambda call, device: (findings, problem))
    monkeypatch.setattr(backend_choice, "attention_backend", lambda name: f"computed by {name}")
    backend, reason, record = backend_choice.choose_backend(network, PATCH, CPU)
    assert backend == chosen and why in reason and "\n" not in reason
    # What could not be measured is measured again when the training goes on.
    assert (record is not None) == is_recorded
    assert backends_of(network) == {f"computed by {chosen}"}


def test_choosing_changes_nothing_else_of_a_training(network):
    network(torch.randn(PATCH)).sum().backward()
    parameters = [parameter for parameter in network.parameters() if parameter.grad is not None]
    gradients = [parameter.grad.clone() for parameter in parameters]
    state = {key: value.clone() for key, value in network.state_dict().items()}
    random_state = torch.get_rng_state()
    backend, reason, _ = backend_choice.choose_backend(network, PATCH, CPU)
    assert backend == "streaming" and "ms, not triton" in reason
    assert backends_of(network) == {attend_streaming}
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    assert network.training and not any(parameter.is_meta for parameter in network.parameters())
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)


def test_a_process_that_ends_badly_or_too_late_decides_nothing(network, monkeypatch):
    call = backend_choice.largest_call(network, PATCH)
    with monkeypatch.context() as patch:
        patch.setattr(backend_choice, "MAX_SECONDS", 1e-3)
        assert backend_choice._measured(call, CPU) == ({}, "not measured within 0.001 s")
    monkeypatch.setattr(backend_choice, "TIMING", "no_such_module")
    findings, problem = backend_choice._measured(call, CPU)
    assert findings == {}
    assert problem.startswith("not measured (exit status 1: ") and "no_such_module" in problem


class TestRecord:
    """A training that goes on under the conditions of its start does not measure again."""

    FINDINGS = {"streaming": 0.02, "triton": 0.01}  # noqa: RUF012

    @pytest.fixture
    def record(self, network, monkeypatch):
        monkeypatch.setattr(backend_choice, "_measured", lambda call, device: (self.FINDINGS, ""))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
        monkeypatch.setattr(backend_choice, "check_backend", lambda name, device: None)
        monkeypatch.setattr(backend_choice, "attention_backend", lambda name: f"computed by {name}")
        monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
        _, reason, record = backend_choice.choose_backend(network, PATCH, CUDA)
        assert "kept" not in reason and record["conditions"][0]["device"] == "Some GPU"
        monkeypatch.setattr(backend_choice, "_measured", lambda call, device: ({"streaming": 0.01}, ""))
        return record

    def test_the_same_conditions(self, network, record):
        backend, reason, again = backend_choice.choose_backend(network, PATCH, CUDA, record)
        assert backend == "triton" and again == record
        assert reason.endswith("attention, kept from an earlier start: streaming 20 ms, triton 10 ms")
        assert backends_of(network) == {"computed by triton"}

    @pytest.mark.parametrize(
        "changes",
        [
            None,
            {"conditions": None},
            {"findings": None},
            {"findings": {"streaming": 0.02}},
            {"findings": {"streaming": 0.02, "another": 0.01}},
            {"findings": {"streaming": 0.02, "triton": "it fails"}},
        ],
    )
    def test_a_record_that_is_no_record(self, network, record, changes):
        broken = "broken" if changes is None else record | changes
        _, reason, _ = backend_choice.choose_backend(network, PATCH, CUDA, broken)
        assert "kept" not in reason

    @pytest.mark.parametrize("what", ["device", "patch", "version", "package", "backend", "compiler"])
    def test_others(self, network, record, monkeypatch, what):
        patch = PATCH
        match what:
            case "device":
                monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Another GPU")
            case "patch":
                patch = (*PATCH[:2], 32, 16, 16)
            case "version":
                monkeypatch.setattr(backend_choice, "__version__", "0.0.1")
            case "package":
                monkeypatch.setattr(backend_choice, "installed_version", lambda name: "9.9")
            case "backend":  # installed as before, and broken
                monkeypatch.setattr(backend_choice, "check_backend", fail_for_triton)
            case "compiler":
                monkeypatch.setattr(shutil, "which", lambda name: None)
        backend, reason, again = backend_choice.choose_backend(network, patch, CUDA, record)
        assert backend == "streaming" and "kept" not in reason
        assert again["findings"] == {"streaming": 0.01} and again["conditions"] != record["conditions"]


@pytest.mark.parametrize(
    "variable, installed, expected",
    [
        (None, ["gcc"], True),
        (None, ["clang"], True),
        (None, ["cc"], False),
        ("icx", ["gcc"], False),
        ("cc", ["cc"], True),
    ],
)
def test_the_compiler_is_the_one_that_triton_takes(monkeypatch, variable, installed, expected):
    monkeypatch.delenv("CC", raising=False)
    if variable is not None:
        monkeypatch.setenv("CC", variable)
    monkeypatch.setattr(shutil, "which", lambda name: name if name in installed else None)
    assert backend_choice._has_c_compiler() is expected


def fail_for_triton(name, device):
    if name == "triton":
        raise XAttnResError("it cannot be imported")


@pytest.mark.parametrize(
    "of_ranks, expected",
    [
        ([({"streaming": 1.0, "triton": 2.0}, ""), ({"streaming": 3.0, "triton": 1.0}, "")], (3.0, 2.0)),
        ([({"streaming": 1.0, "triton": 2.0}, ""), ({"streaming": 3.0, "triton": "it fails"}, "")], (3.0, "it fails")),
        ([({"streaming": 1.0, "triton": "it fails"}, ""), ({"streaming": 3.0, "triton": 2.0}, "")], (3.0, "it fails")),
    ],
)
def test_what_several_processes_have_in_common(of_ranks, expected):
    assert backend_choice._common(of_ranks) == (dict(zip(("streaming", "triton"), expected, strict=True)), "")


def fail(error):
    def failing(*arguments, **options):
        raise error

    return failing


class TestAFailureStreams:
    """The measurement is optional: a training goes on without it, and its log says why."""

    def check(self, network, expected):
        backend, reason, record = backend_choice.choose_backend(network, PATCH, CPU)
        assert record is None
        assert backend == "streaming" and expected in reason and "\n" not in reason
        assert backends_of(network) == {attend_streaming}

    def test_no_folder_for_temporary_files(self, network, monkeypatch):
        error = FileNotFoundError(2, "No usable temporary directory found")
        monkeypatch.setattr(backend_choice, "TemporaryDirectory", fail(error))
        self.check(network, "not measured (FileNotFoundError: [Errno 2] No usable temporary directory found)")

    def test_conditions_that_nobody_knows(self, network, monkeypatch):
        monkeypatch.setattr(backend_choice, "installed_version", fail(OSError("broken")))
        self.check(network, "not measured (OSError: broken)")

    def test_a_full_disk(self, network, monkeypatch):
        monkeypatch.setattr(torch, "save", fail(OSError(28, "No space left on device")))
        self.check(network, "not measured (OSError: [Errno 28] No space left on device)")

    def test_a_network_that_needs_values(self, network):
        network.encoder.stages[0].register_forward_pre_hook(lambda module, inputs: inputs[0].sum().item() and None)
        self.check(network, "not measured (RuntimeError: ")

    def test_too_little_memory(self, network, monkeypatch):
        monkeypatch.setattr(backend_choice, "largest_call", fail(torch.OutOfMemoryError("CUDA out of memory.")))
        self.check(network, "not measured (torch.OutOfMemoryError: CUDA out of memory.)")

    def test_a_process_that_writes_nothing(self, network, monkeypatch):
        monkeypatch.setattr(backend_choice, "TIMING", "this")
        self.check(network, "not measured (FileNotFoundError: ")


def test_the_shapes_take_no_memory(network, monkeypatch):
    network.encoder.register_buffer("steps", torch.zeros(3))
    monkeypatch.setattr(torch.Tensor, "clone", fail(AssertionError("copied")))
    shapes = backend_choice._without_values(network)
    assert {tensor.device.type for tensor in (*shapes.parameters(), *shapes.buffers())} == {"meta"}
    assert not any(tensor.is_meta for tensor in (*network.parameters(), *network.buffers()))
    # nnU-Net's encoder is in its decoder too.
    assert shapes.decoder.encoder is shapes.encoder is not network.encoder


class TestTraining:
    @pytest.fixture
    def trainer(self, nnunet_environment, monkeypatch):
        monkeypatch.setattr(nnUNetTrainer, "on_train_start", lambda self: None)
        monkeypatch.setattr(mixin, "choose_backend", self.choose)
        self.calls = []
        return make_initialized_trainer(nnunet_environment)

    def choose(self, network, image_shape, device, record):
        self.calls.append((network, image_shape, device.type, record))
        return "triton", "triton was fast", {"conditions": {}, "findings": {"triton": 0.01}}

    @pytest.mark.parametrize("is_ddp", [False, True])
    def test_on_a_gpu_it_is_chosen_and_logged(self, trainer, is_ddp):
        trainer.device, trainer.is_ddp = CUDA, is_ddp
        trainer.on_train_start()
        patch_size = trainer.configuration_manager.patch_size
        shape = (trainer.batch_size, trainer.num_input_channels, *patch_size)
        assert self.calls == [(uncompiled(trainer.network), shape, "cuda", None)]
        log = Path(trainer.log_file).read_text()
        assert "computed by triton; " in log
        assert "XAttnRes is computed by triton; triton was fast" in log

    def test_the_measurement_is_kept_for_a_training_that_goes_on(self, trainer, nnunet_environment):
        trainer.device = CUDA
        trainer.on_train_start()
        checkpoint = Path(trainer.output_folder, "checkpoint_latest.pth")
        trainer.save_checkpoint(str(checkpoint))
        read_checkpoint(checkpoint, "")
        going_on = make_initialized_trainer(nnunet_environment)
        going_on.load_checkpoint(str(checkpoint))
        going_on.device = CUDA
        going_on.on_train_start()
        assert self.calls[1][3] == {"conditions": {}, "findings": {"triton": 0.01}}

    @pytest.mark.parametrize("device", [CPU, CUDA])
    def test_a_start_that_measures_nothing_keeps_the_record(self, trainer, nnunet_environment, monkeypatch, device):
        trainer.device = CUDA
        trainer.on_train_start()
        checkpoint = Path(trainer.output_folder, "checkpoint_latest.pth")
        trainer.save_checkpoint(str(checkpoint))
        monkeypatch.setattr(mixin, "choose_backend", lambda *arguments: ("streaming", "not measured", None))
        going_on = make_initialized_trainer(nnunet_environment)
        going_on.load_checkpoint(str(checkpoint))
        going_on.device = device
        going_on.on_train_start()
        going_on.save_checkpoint(str(checkpoint))
        recorded = read_checkpoint(checkpoint, "")["init_args"]["xattnres"]["backends"]
        assert recorded == {"conditions": {}, "findings": {"triton": 0.01}}

    def test_on_a_cpu_nothing_is_measured(self, trainer):
        trainer.on_train_start()
        assert self.calls == []
        assert backends_of(trainer.network) == {attend_auto}

    def test_the_log_says_why_auto_is_not_native_on_a_cpu(self, trainer, monkeypatch):
        monkeypatch.setattr(native_library, "why_not_available", lambda: "the library is damaged: install it again")
        trainer.on_train_start()
        log = Path(trainer.log_file).read_text()
        assert "XAttnRes is computed by streaming; the library is damaged: install it again" in log

    def test_a_backend_that_the_config_names_is_obeyed(self, trainer):
        trainer.device = CUDA
        trainer.network.config = replace(trainer.network.config, backend="reference")
        assert trainer.choose_backend() == ("reference", "")
        assert self.calls == []

    @pytest.mark.parametrize("name", ["Planned", "XAttnResBlock"])
    def test_without_attention_at_stage_level_nothing_is_measured(self, trainer, nnunet_environment, name):
        other = make_initialized_trainer(nnunet_environment, f"nnUNetTrainer{name}")
        other.device = CUDA
        assert other.choose_backend() == ("streaming", "")
        assert self.calls == []
