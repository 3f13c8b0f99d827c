from pathlib import Path

import numpy as np
import pytest
from nnunetv2.dataset_conversion.generate_dataset_json import generate_dataset_json
from PIL import Image

from helpers.in_process import InProcess
from helpers.phantom_dataset import ONE_SHORT_EPOCH, PHANTOM, plans_file, read_plans
from helpers.training import train
from nnunet_xattnres.common.files import write_json_atomically
from nnunet_xattnres.common.processes import environment_with
from nnunet_xattnres.nnunet.commands import NnUNet
from nnunet_xattnres.nnunet.phantom import write_phantom_dataset
from nnunet_xattnres.nnunet.plans import add_small_configuration

pytest_plugins = ["integration.table"]

LARGE_2D = "Dataset902_Large2d"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long tests begin first: of several workers, all but one would be idle beside a long test that begins last."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture(scope="session")
def nnunet(tmp_path_factory: pytest.TempPathFactory) -> NnUNet:
    """A working directory with a phantom dataset, planned and preprocessed by nnU-Net's own entry points.

    Plans: nnUNetPlans and nnUNetResEncUNetMPlans with 2d and 3d_fullres; nnUNetPlans also with 2d_small and 3d_small,
    which train for one short epoch.
    """
    nnunet = NnUNet(tmp_path_factory.mktemp("nnunet"), "cpu")
    write_phantom_dataset(nnunet.raw / PHANTOM, num_cases=6, seed=0)
    here = InProcess(nnunet.workdir, "cpu")
    here.run("nnUNetv2_plan_and_preprocess", "-d", "901", "-c", "2d", "3d_fullres", "-npfp", "2", log="plan")
    here.run("nnUNetv2_plan_experiment", "-d", "901", "-pl", "nnUNetPlannerResEncM", log="plan_resenc")
    plans = read_plans(nnunet)
    for name, base in (("2d_small", "2d"), ("3d_small", "3d_fullres")):
        add_small_configuration(
            plans, name, base, base_features=4, max_patch_voxels=64**3, batch_size=2, budget=ONE_SHORT_EPOCH
        )
    write_json_atomically(plans, plans_file(nnunet))
    return nnunet


@pytest.fixture(scope="session")
def large_2d_plans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nnU-Net's plans for 512 x 512 images, whose network has many stages."""
    nnunet = InProcess(tmp_path_factory.mktemp("large_2d"), "cpu")
    folder = nnunet.raw / LARGE_2D
    rng = np.random.default_rng(0)
    for kind in ("imagesTr", "labelsTr"):
        (folder / kind).mkdir(parents=True)
    for case in range(2):
        label = np.zeros((512, 512), np.uint8)
        label[100:300, 200:400] = 1
        image = rng.integers(0, 100, label.shape, dtype=np.uint8) + 100 * label
        Image.fromarray(image).save(folder / "imagesTr" / f"case{case}_0000.png")
        Image.fromarray(label).save(folder / "labelsTr" / f"case{case}.png")
    generate_dataset_json(str(folder), {0: "photo"}, {"background": 0, "square": 1}, 2, ".png")
    nnunet.run("nnUNetv2_plan_and_preprocess", "-d", "902", "--no_pp", "-npfp", "2", log="plan")
    return nnunet.preprocessed / LARGE_2D / "nnUNetPlans.json"


@pytest.fixture
def nnunet_environment(nnunet: NnUNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NnUNet:
    """The environment variables of `nnunet` in this process; results go to a folder of the test's own."""
    for name, value in (nnunet.folders() | {"nnUNet_results": str(tmp_path / "results")}).items():
        monkeypatch.setenv(name, value)
    return nnunet


@pytest.fixture(scope="session")
def trained_model(nnunet: NnUNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model folder of nnUNetTrainerXAttnRes with 2d_small, folds 0 and 1."""
    own = {"nnUNet_results": str(tmp_path_factory.mktemp("trained")), "nnUNet_n_proc_DA": "0"}
    with environment_with(**nnunet.folders() | own):
        folds = [train(PHANTOM, "2d_small", "nnUNetTrainerXAttnRes", fold=fold) for fold in (0, 1)]
    return Path(folds[0].output_folder_base)
