"""Where the real cases of the feature matrix are, and how many it takes.

They are looked for in the folder $XATTNRES_DATA, or else in `shared/data` beside the project.
"""

import os
from pathlib import Path

DATA = Path(os.environ.get("XATTNRES_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
HIPPOCAMPUS = DATA / "Task04_Hippocampus"
ULTRASOUND = DATA / "Dataset802_LiverUltrasound"
NUM_TRAINING = 8
NUM_TEST = 3
