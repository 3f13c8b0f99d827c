"""Run the demo on the first cases of a Decathlon task, with a short training: demo.py TASK NUMBER"""

import json
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from nnunet_xattnres.nnunet.derived_configurations import TrainingBudget
from nnunet_xattnres.tools import demo

SHORT = TrainingBudget(num_epochs=3, num_iterations_per_epoch=30, num_val_iterations_per_epoch=2)


def copy_subset(task: Path, copy: Path, number: int) -> None:
    dataset = json.loads((task / "dataset.json").read_text())
    dataset |= {"training": dataset["training"][:number], "test": [], "numTraining": number, "numTest": 0}
    for folder in ("imagesTr", "labelsTr", "imagesTs"):
        (copy / folder).mkdir(parents=True)
    for case in dataset["training"]:
        for file in case.values():
            shutil.copy(task / file, copy / file)
    (copy / "dataset.json").write_text(json.dumps(dataset))


if __name__ == "__main__":
    task = Path(sys.argv[1])
    demo.BUDGET = SHORT
    with TemporaryDirectory() as work:
        copy_subset(task, Path(work, task.name), int(sys.argv[2]))
        demo.run_demo(Path(work, task.name), Path(work, "demo"), "nnUNetTrainerXAttnRes", baseline=False)
