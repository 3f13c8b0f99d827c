"""The networks as other pipelines run them: exported to ONNX, and traced."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from nnunet_xattnres.trainers.nnUNetTrainerXAttnRes import nnUNetTrainerXAttnRes
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, nn

from helpers import plans as plans_by_hand
from helpers.networks import ANISOTROPIC_2D, ANISOTROPIC_3D, ISOTROPIC_2D, ISOTROPIC_3D, planned_network
from nnunet_xattnres import BlockXAttnResConfig, XAttnResConfig
from nnunet_xattnres.common.files import write_json_atomically
from nnunet_xattnres.common.processes import environment_with
from nnunet_xattnres.model.build import add_xattnres
from nnunet_xattnres.nnunet.installation import external_trainers
from nnunet_xattnres.nnunet.presets import build_preset

pytestmark = pytest.mark.feature("ONNX and TorchScript")

BLOCK = BlockXAttnResConfig(isar_in_encoder=True, bank_includes_input=True)
NO_SKIP_CONTROL = XAttnResConfig(skip_connections=False, read_in_encoder=False, read_in_decoder=False)
NETWORKS = {  # strides, network, config, image size
    "2d": (ISOTROPIC_2D[:3], PlainConvUNet, XAttnResConfig(), (16, 24)),
    "2d-wide": (ISOTROPIC_2D[:3], PlainConvUNet, XAttnResConfig(), (160, 160)),
    "2d-no-skips": (ANISOTROPIC_2D[:3], ResidualEncoderUNet, XAttnResConfig(skip_connections=False), (16, 16)),
    "2d-decoder-only": (ISOTROPIC_2D[:3], PlainConvUNet, XAttnResConfig(read_in_encoder=False), (16, 24)),
    "2d-no-attention": (ISOTROPIC_2D[:3], PlainConvUNet, NO_SKIP_CONTROL, (16, 24)),
    "2d-block": (ISOTROPIC_2D[:3], ResidualEncoderUNet, BLOCK, (16, 24)),
    "3d": (ANISOTROPIC_3D[:4], PlainConvUNet, XAttnResConfig(), (8, 16, 16)),
    "3d-no-skips": (ISOTROPIC_3D[:3], PlainConvUNet, XAttnResConfig(skip_connections=False), (8, 16, 16)),
    "3d-residual": (ISOTROPIC_3D[:3], PlainConvUNet, XAttnResConfig(fusion="residual"), (8, 16, 16)),
    "3d-block": (ISOTROPIC_3D[:3], PlainConvUNet, BLOCK, (8, 16, 16)),
    "3d-block-encoder": (ISOTROPIC_3D[:2], PlainConvUNet, replace(BLOCK, isar_in_decoder=False), (4, 8, 8)),
}
# An export to ONNX takes seconds. The snippet of the documentation exports a 2D network at stage level.
FAST_ONNX = ("3d-block-encoder",)
FAST_OLDER_ONNX = ("2d", "2d-wide", "2d-no-skips", "3d-residual", "3d-block-encoder")
FAST_TRACED = ("2d-wide", "2d-no-skips", "3d-residual", "3d-block-encoder")


def each_network(fast: Sequence[str]) -> list:
    return [pytest.param(name, marks=() if name in fast else pytest.mark.slow) for name in NETWORKS]


def build(name: str, backend: str = "auto") -> tuple[nn.Module, Tensor, Tensor]:
    """A network whose every weight acts, an image to export it with, and a batch of others."""
    strides, planned, config, size = NETWORKS[name]
    network = add_xattnres(planned_network(strides, planned), replace(config, backend=backend)).eval()
    with torch.no_grad():
        for parameter in network.xattnres.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    images = torch.randn(3, 1, *size)
    images[..., : size[-1] // 2] = 0  # as beyond the edge of a small image, where norms vanish
    return network, torch.zeros(2, 1, *size), images


def run_onnx(file: Path, images: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])


def check_onnx(file: Path, network: nn.Module, images: Tensor) -> None:
    """ONNX Runtime computes what the network does."""
    with torch.no_grad():
        expected = network(images)
    # Where neighbouring voxels are nearly opposite, the norm loses digits, in one of 200,000 voxels here.
    torch.testing.assert_close(run_onnx(file, images), expected, atol=5e-4, rtol=5e-4)


@pytest.mark.parametrize("name", each_network(FAST_ONNX))
def test_onnx_computes_what_the_network_does(name, tmp_path):
    network, image, images = build(name)
    dynamic = ({0: torch.export.Dim("batch")},)
    torch.onnx.export(network, (image,), tmp_path / "model.onnx", dynamo=True, verbose=False, dynamic_shapes=dynamic)
    for batch in (images[:1], images):
        check_onnx(tmp_path / "model.onnx", network, batch)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", each_network(FAST_OLDER_ONNX))
def test_the_older_onnx_exporter_computes_what_the_network_does(name, tmp_path):
    """`dynamo=False`, the default of PyTorch before 2.9. Its graphs have one batch size."""
    network, _, images = build(name)
    for batch in (images[:1], images):
        torch.onnx.export(network, (torch.zeros_like(batch),), tmp_path / "model.onnx", dynamo=False)
        check_onnx(tmp_path / "model.onnx", network, batch)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", each_network(FAST_TRACED))
def test_a_traced_network_computes_what_the_network_does(name, tmp_path):
    network, image, images = build(name)
    # Without check_trace, which runs the graph on the same image again.
    torch.jit.trace(network, image, check_trace=False).save(tmp_path / "model.pt")
    with torch.no_grad():
        expected = network(images)
        traced = torch.jit.load(tmp_path / "model.pt")(images)
    torch.testing.assert_close(traced, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_graph_is_without_kernels(monkeypatch):
    operator = pytest.importorskip("nnunet_xattnres.ops.triton_operator", reason="Triton is not installed")
    # Kernels would take the CPU's tensors.
    monkeypatch.setattr(operator, "INTERPRETED", True)
    monkeypatch.delattr(operator, "attend_upsampled")
    network, image, images = build("2d")
    of_kernels, _, _ = build("2d", "triton")
    of_kernels.load_state_dict(network.state_dict())
    # Without check_trace, which runs the network itself: kernels take a GPU.
    traced = torch.jit.trace(of_kernels, image, check_trace=False)
    with torch.no_grad():
        torch.testing.assert_close(traced(images), network(images), atol=1e-4, rtol=1e-4)


@pytest.fixture
def model_folder(tmp_path):
    """What nnUNetTrainerXAttnRes leaves behind: a 2D network of two stages, whose weights are random."""
    plans, dataset_json = build_preset("msd04", "2d")
    plans["configurations"]["2d"] |= plans_by_hand.planned([[1, 1], [2, 2]], [16, 32])["configurations"]["full"]
    manager = PlansManager(plans)
    network = nnUNetTrainerXAttnRes.build_network_architecture(manager, manager.get_configuration("2d"), 1, 3, False)
    nn.init.normal_(network.xattnres["D0"].query)
    checkpoint = {
        "trainer_name": nnUNetTrainerXAttnRes.__name__,
        "init_args": {"configuration": "2d"},
        "network_weights": network.state_dict(),
    }
    folder = tmp_path / "model"
    (folder / "fold_0").mkdir(parents=True)
    torch.save(checkpoint, folder / "fold_0" / "checkpoint_final.pth")
    write_json_atomically(plans, folder / "plans.json")
    write_json_atomically(dataset_json, folder / "dataset.json")
    return folder


def documented_export() -> str:
    """The code in README.md or docs/deployment.md that exports a trained model."""
    root = Path(__file__).parents[2]
    pages = [page.read_text() for page in (root / "README.md", root / "docs" / "deployment.md") if page.exists()]
    blocks = re.findall(r"```python\n(.*?)```", "\n".join(pages), re.DOTALL)
    (code,) = (block for block in blocks if "onnx" in block)
    return code


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_the_documented_export_computes_what_the_network_does(model_folder, tmp_path, monkeypatch):
    code = documented_export()
    assert "MODEL_FOLDER" in code
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    with environment_with(nnUNet_extTrainer=external_trainers()):
        exec(code.replace("MODEL_FOLDER", str(model_folder)), names)
    images = torch.randn(2, *names["patch"].shape[1:])
    with torch.no_grad():
        expected = names["network"](images)
    assert len(np.unique(expected)) > 1000
    torch.testing.assert_close(run_onnx(tmp_path / "model.onnx", images), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.jit.load(tmp_path / "model.pt")(images), expected, atol=1e-4, rtol=1e-4)
