"""Copy the first cases of a Medical Segmentation Decathlon task: subset.py TASK COPY NUMBER"""

import json
import shutil
import sys
from pathlib import Path

task, copy, number = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
dataset = json.loads((task / "dataset.json").read_text())
dataset |= {"training": dataset["training"][:number], "test": [], "numTraining": number, "numTest": 0}
for folder in ("imagesTr", "labelsTr", "imagesTs"):
    (copy / folder).mkdir(parents=True)
for case in dataset["training"]:
    for file in case.values():
        shutil.copy(task / file, copy / file)
(copy / "dataset.json").write_text(json.dumps(dataset))
