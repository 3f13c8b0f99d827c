"""Model folders as nnU-Net leaves them behind."""

import json
from pathlib import Path

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


def save_model(trainer: nnUNetTrainer, folder: Path | None = None) -> Path:
    """Write what a trainer holds, trained or not, as a finished model. Returns its checkpoint.

    folder: default: where the trainer's results go.
    """
    folder = folder or Path(trainer.output_folder_base)
    checkpoint = folder / f"fold_{trainer.fold}" / "checkpoint_final.pth"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    trainer.save_checkpoint(str(checkpoint))
    (folder / "plans.json").write_text(json.dumps(trainer.plans_manager.plans))
    (folder / "dataset.json").write_text(json.dumps(trainer.dataset_json))
    return checkpoint
