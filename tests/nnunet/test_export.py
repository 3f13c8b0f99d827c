"""The networks as other pipelines run them: exported to ONNX, and traced."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import Tensor, nn

from helpers.networks import ANISOTROPIC_2D, ANISOTROPIC_3D, ISOTROPIC_2D, ISOTROPIC_3D, planned_network
from nnunet_xattnres import BlockXAttnResConfig, XAttnResConfig
from nnunet_xattnres.common.processes import environment_with
from nnunet_xattnres.model.build import add_xattnres
from nnunet_xattnres.nnunet.installation import external_trainers

pytestmark = pytest.mark.feature("ONNX and TorchScript")

BLOCK = BlockXAttnResConfig(isar_in_encoder=True, bank_includes_input=True)
NETWORKS = {  # strides, network, config, image size
    "2d": (ISOTROPIC_2D[:3], PlainConvUNet, XAttnResConfig(), (16, 24)),
    "2d-wide": (ISOTROPIC_2D[:3], PlainConvUNet, XAttnResConfig(), (160, 160)),
    "2d-no-skips": (ANISOTROPIC_2D, ResidualEncoderUNet, XAttnResConfig(skip_connections=False), (16, 16)),
    "2d-block": (ISOTROPIC_2D[:3], ResidualEncoderUNet, BLOCK, (16, 24)),
    "3d": (ANISOTROPIC_3D[:4], PlainConvUNet, XAttnResConfig(), (8, 16, 16)),
    "3d-no-skips": (ISOTROPIC_3D[:3], PlainConvUNet, XAttnResConfig(skip_connections=False), (8, 16, 16)),
    "3d-residual": (ISOTROPIC_3D[:3], PlainConvUNet, XAttnResConfig(fusion="residual"), (8, 16, 16)),
    "3d-block": (ISOTROPIC_3D[:3], PlainConvUNet, BLOCK, (8, 16, 16)),
}
# Exporting to ONNX takes seconds; the README's snippet exports a 2D network.
FAST = ("3d-no-skips", "3d-block")


def build(name: str, backend: str = "auto") -> tuple[nn.Module, Tensor, Tensor]:
    """A network whose every weight acts, an image to export it with, and a batch of others."""
    strides, planned, config, size = NETWORKS[name]
    network = add_xattnres(planned_network(strides, planned), replace(config, backend=backend)).eval()
    with torch.no_grad():
        for parameter in network.xattnres.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    images = torch.randn(3, 1, *size)
    images[..., : size[-1] // 2] = 0  # as beyond the edge of a small image, where norms vanish
    return network, torch.zeros(1, 1, *size), images


def run_onnx(file: Path, images: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in NETWORKS]
)
def test_onnx_computes_what_the_network_does(name, tmp_path):
    network, image, images = build(name)
    dynamic = ({0: torch.export.Dim("batch")},)
    torch.onnx.export(network, (image,), tmp_path / "model.onnx", dynamo=True, verbose=False, dynamic_shapes=dynamic)
    with torch.no_grad():
        expected = network(images)
    torch.testing.assert_close(run_onnx(tmp_path / "model.onnx", images), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", NETWORKS)
def test_a_traced_network_computes_what_the_network_does(name, tmp_path):
    network, image, images = build(name)
    torch.jit.trace(network, image).save(tmp_path / "model.pt")
    with torch.no_grad():
        expected = network(images)
        traced = torch.jit.load(tmp_path / "model.pt")(images)
    torch.testing.assert_close(traced, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_graph_is_without_kernels():
    pytest.importorskip("triton")
    network, image, images = build("2d")
    of_kernels, _, _ = build("2d", "triton")
    of_kernels.load_state_dict(network.state_dict())
    # Without check_trace, which runs the network itself: kernels take a GPU.
    traced = torch.jit.trace(of_kernels, image, check_trace=False)
    with torch.no_grad():
        torch.testing.assert_close(traced(images), network(images), atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_the_snippet_of_the_readme(trained_model, tmp_path, monkeypatch):
    readme = Path(__file__).parents[2].joinpath("README.md").read_text()
    (snippet,) = (code for code in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "onnx" in code)
    assert "MODEL_FOLDER" in snippet
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    with environment_with(nnUNet_extTrainer=external_trainers()):
        exec(snippet.replace("MODEL_FOLDER", str(trained_model)), names)
    images = torch.randn(2, *names["patch"].shape[1:])
    with torch.no_grad():
        expected = names["network"](images)
    assert len(np.unique(expected)) > 1000
    torch.testing.assert_close(run_onnx(tmp_path / "model.onnx", images), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.jit.load(tmp_path / "model.pt")(images), expected, atol=1e-4, rtol=1e-4)
