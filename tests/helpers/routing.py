"""Attention weights in tests: forced, made up, recorded, and drawn without overlaps."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.backend_bases import RendererBase
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from helpers.phantom_dataset import make_trainer
from nnunet_xattnres.model.planned_unet import PlannedUNet
from nnunet_xattnres.routing import recording
from nnunet_xattnres.routing.recording import RoutingHistory


def force_to_read(network: PlannedUNet, target: str, source: str) -> None:
    """Queries for all-positive features, which only the projection of one encoder stage's output gives."""
    stage = network.encoder.stages[int(source[1:])]
    norm = [module for module in stage.modules() if isinstance(module, torch.nn.InstanceNorm3d)][-1]
    attention = network.xattnres[target]
    with torch.no_grad():
        norm.weight.fill_(0)
        norm.bias.fill_(1)
        attention.query.fill_(100)
        for name, projection in zip(network.routing_sources[target], attention.projections, strict=False):
            projection.fill_(float(name == source))


def history_of(num_stages: int, num_epochs: int) -> RoutingHistory:
    pool = [f"E{i}" for i in range(num_stages)] + [f"D{d}" for d in range(num_stages - 1)]
    sources = {f"E{i}": [*pool[: i - 1], "current"] for i in range(2, num_stages)}
    sources |= {f"D{d}": [*pool[: num_stages + d], "current"] for d in range(num_stages - 1)}
    rng = np.random.default_rng(0)
    return RoutingHistory(
        sources,
        {
            epoch: {target: rng.dirichlet([1] * len(names)).tolist() for target, names in sources.items()}
            for epoch in range(num_epochs)
        },
    )


def assert_no_texts_overlap(figure: Figure) -> None:
    drawn = []  # ticks out of sight exist, but are not drawn
    draw = Text.draw

    def note(text: Text, renderer: RendererBase) -> None:
        drawn.append(text)
        draw(text, renderer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Text, "draw", note)
        FigureCanvasAgg(figure).draw()
    boxes = [(text.get_text(), text.get_window_extent()) for text in drawn if text.get_visible() and text.get_text()]
    assert len(boxes) > 10
    page = figure.bbox
    for i, (text, box) in enumerate(boxes):
        assert page.x0 <= box.x0 and page.y0 <= box.y0 and box.x1 <= page.x1 and box.y1 <= page.y1, text
        for other, other_box in boxes[:i]:
            assert not box.overlaps(other_box), (text, other)


def make_initialized_trainer(nnunet, name: str = "nnUNetTrainerXAttnRes", configuration: str = "3d_small") -> Any:
    trainer = make_trainer(nnunet, recursive_find_trainer_class_by_name(name), configuration)
    trainer.initialize()
    trainer.set_deep_supervision_enabled(True)
    Path(trainer.output_folder).mkdir(parents=True, exist_ok=True)
    return trainer


def validate(trainer: Any, epoch: int = 0, num_batches: int = 3, seed: int = 0) -> Path:
    """What nnU-Net does after the training steps of an epoch, on noise."""
    trainer.current_epoch = epoch
    patch = trainer.configuration_manager.patch_size
    strides = np.cumprod(trainer.configuration_manager.pool_op_kernel_sizes, axis=0)[:-1]
    torch.manual_seed(seed)
    with torch.no_grad():
        trainer.on_validation_epoch_start()
        outputs = []
        for _ in range(num_batches):
            target = [torch.zeros(2, 1, *(patch // stride)) for stride in strides]
            outputs.append(trainer.validation_step({"data": torch.randn(2, 1, *patch), "target": target}))
        trainer.on_validation_epoch_end(outputs)
    return Path(trainer.output_folder, recording.RECORD)
